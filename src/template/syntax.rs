//! `${variable}`: what it looks like in a text, and what is put in its place.
//!
//! `$${variable}` stands for the text `${variable}`; every other `$` and brace is left alone, so that shell,
//! Jinja and systemd's own syntax need no escaping. In a document, values are put into parsed strings, never
//! into text, so no value can add a key.

use serde_json::{Map, Value, json};
use tinytemplate::TinyTemplate;

/// The values that `${…}` stands for: scalars, or lists of scalars.
#[derive(Clone, Debug, Default)]
pub(super) struct Variables {
    /// Ours, such as `vm_name`.
    pub(super) own: Map<String, Value>,
    /// The desktop's params: `${params.NAME}`, or `${NAME}` alone.
    pub(super) params: Map<String, Value>,
}

impl Variables {
    fn get(&self, name: &str) -> Option<&Value> {
        match name.strip_prefix(PARAMS) {
            Some(param) => self.params.get(param),
            None => self.own.get(name).or_else(|| self.params.get(name)),
        }
    }

    /// Says that there is no such variable, and which one may have been meant.
    pub(super) fn unknown(&self, name: &str) -> String {
        let known = || self.own.keys().chain(self.params.keys());
        let bare = name.strip_prefix(PARAMS).unwrap_or(name);
        let nearest = known()
            .map(|known| (strsim::damerau_levenshtein(known, bare), known))
            .min()
            .filter(|(distance, _)| *distance <= 3)
            .map(|(_, known)| format!("; did you mean ${{{known}}}?"))
            .unwrap_or_default();
        let known = known().map(String::as_str).collect::<Vec<_>>().join(", ");
        format!("unknown variable ${{{name}}}{nearest} Known: {known}. For the text itself write $${{{name}}}")
    }

    /// Whether there is such a variable.
    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }
}

/// What comes before the name of a param, if anything does.
pub(super) const PARAMS: &str = "params.";

/// A part of a text.
enum Piece<'t> {
    /// Left as it is.
    Text(&'t str),
    /// `${name}`, and where it begins, in bytes.
    Variable(&'t str, usize),
}

fn pieces(text: &str) -> Vec<Piece<'_>> {
    let mut pieces = vec![];
    let (mut taken, mut from) = (0, 0);
    while let Some(at) = text[from..].find("${").map(|at| from + at) {
        let Some(name) = name_at(&text[at + 2..]) else {
            // `${name:-default}`, `${array[@]}` and an open brace are the shell's, not ours.
            from = at + 2;
            continue;
        };
        let end = at + name.len() + 3;
        match text[taken..at].strip_suffix('$') {
            Some(before) => pieces.extend([Piece::Text(before), Piece::Text(&text[at..end])]),
            None => pieces.extend([Piece::Text(&text[taken..at]), Piece::Variable(name, at)]),
        }
        (taken, from) = (end, end);
    }
    pieces.push(Piece::Text(&text[taken..]));
    pieces
}

/// The name that is closed by the first brace, if it is one.
fn name_at(text: &str) -> Option<&str> {
    let (name, _) = text.split_once('}')?;
    is_name(name.strip_prefix(PARAMS).unwrap_or(name)).then_some(name)
}

/// Whether this can be the name of a variable.
pub(super) fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Names of the variables in a text.
pub(super) fn names(text: &str) -> impl Iterator<Item = &str> {
    pieces(text).into_iter().filter_map(|piece| match piece {
        Piece::Variable(name, _) => Some(name),
        Piece::Text(_) => None,
    })
}

/// Where a variable first stands in a text: `LINE:COLUMN`, both from 1. The beginning, if it does not.
pub(super) fn place(text: &str, variable: &str) -> String {
    let at = pieces(text).into_iter().find_map(|piece| match piece {
        Piece::Variable(name, at) if name == variable => Some(at),
        Piece::Variable(..) | Piece::Text(_) => None,
    });
    let before = &text[..at.unwrap_or(0)];
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    format!("{line}:{column}")
}

/// Shows every string of a document, and whether it is a key.
pub(super) fn visit<'v>(value: &'v Value, see: &mut dyn FnMut(&'v str, bool)) {
    match value {
        Value::String(text) => see(text, false),
        Value::Array(items) => items.iter().for_each(|item| visit(item, see)),
        Value::Object(fields) => fields.iter().for_each(|(key, field)| {
            see(key, true);
            visit(field, see);
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => (),
    }
}

/// Fills every string of a parsed document. Keys are left as they are. A string that is one variable and
/// nothing else becomes its value, a number or list too.
pub(super) fn fill(value: &Value, variables: &Variables) -> Result<Value, String> {
    Ok(match value {
        Value::String(text) => fill_string(text, variables)?,
        Value::Array(items) => items.iter().map(|item| fill(item, variables)).collect::<Result<_, _>>()?,
        Value::Object(fields) => fields
            .iter()
            .map(|(key, field)| Ok((key.clone(), fill(field, variables)?)))
            .collect::<Result<Map<_, _>, String>>()?
            .into(),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    })
}

fn fill_string(text: &str, variables: &Variables) -> Result<Value, String> {
    match pieces(text).as_slice() {
        [Piece::Text(""), Piece::Variable(name, _), Piece::Text("")] => {
            variables.get(name).cloned().ok_or_else(|| variables.unknown(name))
        }
        _ => render(text, variables).map(Value::String),
    }
}

/// Renders a text through tinytemplate.
///
/// tinytemplate gives meaning to braces and backslashes (and version 1.2.1 panics on a text that ends in
/// a backslash). So it gets the text's own parts as values too, and sees nothing but its own tags.
pub(super) fn render(text: &str, variables: &Variables) -> Result<String, String> {
    if !text.contains("${") {
        return Ok(text.to_owned());
    }
    let (mut template, mut values) = (String::new(), vec![]);
    for piece in pieces(text) {
        let value = match piece {
            Piece::Text(text) => json!(text),
            Piece::Variable(name, _) => match variables.get(name) {
                None => return Err(variables.unknown(name)),
                Some(Value::Array(_) | Value::Object(_)) => {
                    return Err(format!("${{{name}}} is a list: it must be all of its place, not a part of a text"));
                }
                Some(value) => value.clone(),
            },
        };
        template.push_str(&format!("{{values.{}}}", values.len()));
        values.push(value);
    }
    let mut engine = TinyTemplate::new();
    engine.set_default_formatter(&tinytemplate::format_unescaped);
    let rendered =
        engine.add_template("text", &template).and_then(|()| engine.render("text", &json!({ "values": values })));
    rendered.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables() -> Variables {
        let fields = |value: Value| value.as_object().cloned().unwrap_or_default();
        Variables {
            own: fields(json!({ "vm_name": "cyberdesk-k1", "namespace": "desks" })),
            params: fields(json!({ "cpu": 4, "fast": true, "motd": "x\nevil: true", "keys": ["a", "b"] })),
        }
    }

    fn text(source: &str) -> Result<String, String> {
        render(source, &variables())
    }

    #[test]
    fn only_our_own_variables_are_replaced() {
        let cases = [
            ("${vm_name}", "cyberdesk-k1"),
            ("a ${vm_name} in ${namespace}.", "a cyberdesk-k1 in desks."),
            ("$${vm_name}", "${vm_name}"),
            ("$${vm_name}${vm_name}$${params.cpu}", "${vm_name}cyberdesk-k1${params.cpu}"),
            ("${cpu}${params.cpu}Gi ${fast}", "44Gi true"),
            ("$HOME $(id) $$ {x} {{ jinja }} {% if %} \\{ \\", "$HOME $(id) $$ {x} {{ jinja }} {% if %} \\{ \\"),
            ("${HOME:-/root} ${a[@]} ${a.b} ${", "${HOME:-/root} ${a[@]} ${a.b} ${"),
            ("awk '{print $1}' ${namespace}\\", "awk '{print $1}' desks\\"),
            ("", ""),
        ];
        for (source, wanted) in cases {
            assert_eq!(text(source).expect(source), wanted);
        }
    }

    #[test]
    fn a_value_that_is_all_of_a_string_keeps_its_type_and_adds_no_key() {
        let document = json!({
            "cores": "${cpu}", "text": "${cpu}", "fast": "${params.fast}", "keys": "${keys}",
            "a": "${motd}", "b": "say ${motd}", "c": ["${cpu} cores"],
        });
        let wanted = json!({
            "cores": 4, "text": 4, "fast": true, "keys": ["a", "b"],
            "a": "x\nevil: true", "b": "say x\nevil: true", "c": ["4 cores"],
        });
        assert_eq!(fill(&document, &variables()).expect("fills"), wanted);
        let fault = fill(&json!("my ${keys}"), &variables()).expect_err("a list in a text");
        assert!(fault.contains("${keys} is a list"), "{fault}");
    }

    #[test]
    fn an_unknown_variable_is_told_with_the_nearest_known_one() {
        for (name, nearest) in [("vm_nmae", "vm_name"), ("params.cpus", "cpu")] {
            let fault = text(&format!("${{{name}}}")).expect_err(name);
            assert!(fault.contains(&format!("did you mean ${{{nearest}}}?")), "{fault}");
        }
    }

    #[test]
    fn the_place_of_a_variable_is_its_first_one_that_is_not_escaped() {
        assert_eq!(place("$${x}\n a: ${y} ${x}", "x"), "2:10");
    }

    proptest::proptest! {
        #[test]
        fn any_text_renders_or_is_refused_without_a_panic(source in "([a-z{}$\\\\ \n:]|\\$\\{|vm_name|\\}|é){0,40}") {
            let rendered = text(&source);
            if !source.contains("${") {
                proptest::prop_assert_eq!(rendered.expect("no variable in it"), source);
            }
        }
    }
}
