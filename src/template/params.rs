//! The params that a template takes: a JSON Schema that types, bounds and defaults them.
//!
//! A param is a scalar or a list of scalars: an object would bring keys of its own.

use std::collections::BTreeSet;

use jsonschema::Validator;
use jsonschema::error::{TypeKind, ValidationErrorKind};
use serde_json::{Map, Value, json};

use super::syntax::{self, Variables};

/// The param that chooses the template, in every row.
pub(super) const TEMPLATE: &str = "template";

/// What the schema of one param may say. Others are most likely misspelt, and would bound nothing.
const KEYWORDS: [&str; 22] = [
    "$comment",
    "const",
    "default",
    "deprecated",
    "description",
    "enum",
    "examples",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "multipleOf",
    "pattern",
    "title",
    "type",
    "uniqueItems",
];
/// What the schema of all params may say: these, and whatever binds them together.
const OUTER_KEYWORDS: [&str; 16] = [
    "$comment",
    "$schema",
    "additionalProperties",
    "allOf",
    "anyOf",
    "dependentRequired",
    "dependentSchemas",
    "description",
    "else",
    "if",
    "not",
    "oneOf",
    "properties",
    "required",
    "then",
    "title",
];
/// Most faults of one row's params that are told at once.
const MOST_FAULTS: usize = 5;
/// Longest value that is shown, in characters.
const LONGEST_VALUE: usize = 60;

/// The params that a template takes.
#[derive(Debug)]
pub(super) struct Params {
    properties: Map<String, Value>,
    validator: Validator,
}

impl Params {
    /// Reads a schema. `plain` are the params that go into a text which is not YAML, such as a script: they need
    /// a pattern or a list of values, and all of a value must match it.
    pub(super) fn read(
        schema: Option<&Value>,
        own: &Map<String, Value>,
        plain: &BTreeSet<String>,
    ) -> Result<Self, Vec<String>> {
        let empty = json!({ "properties": {} });
        let schema = schema.unwrap_or(&empty);
        let mut faults = outer_faults(schema);
        let mut properties = schema["properties"].as_object().cloned().unwrap_or_default();
        let required: BTreeSet<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        for name in required.iter().filter(|name| !properties.contains_key(**name)) {
            faults.push(format!("params.required names {name:?}, which is not among params.properties"));
        }
        for (name, property) in &mut properties {
            if name == TEMPLATE || own.contains_key(name) {
                faults.push(format!("params.{name}: the name is taken by a variable of ours"));
            } else if !syntax::is_name(name) {
                faults
                    .push(format!("params.{name}: a name is made of letters, digits and _, and begins with no digit"));
            }
            faults.extend(property_faults(property).into_iter().map(|fault| format!("params.{name}: {fault}")));
            if property.get("default").is_none() && !required.contains(name.as_str()) {
                faults.push(format!("params.{name} needs a default, or its name under params.required"));
            }
            if plain.contains(name) {
                faults.extend(bind_whole(property).map(|fault| format!("params.{name}: {fault}")));
            }
        }
        let mut whole = schema.clone();
        whole["type"] = "object".into();
        whole["additionalProperties"] = false.into();
        whole["properties"] = properties.clone().into();
        if !faults.is_empty() {
            return Err(faults);
        }
        let validator = jsonschema::options().should_validate_formats(true).build(&whole).map_err(|error| {
            let place = error.instance_path().to_string().replace("/properties/", ".").replace('/', ".");
            vec![format!("params{place} is no JSON Schema: {error}")]
        })?;
        Ok(Self { properties, validator })
    }

    /// What a desktop gets: what it gave, checked, and defaults for the rest, which may name variables of ours.
    pub(super) fn resolve(
        &self,
        given: &Map<String, Value>,
        own: &Map<String, Value>,
    ) -> Result<Map<String, Value>, String> {
        if let Some(unknown) = given.keys().find(|name| !self.properties.contains_key(*name)) {
            let known: Vec<&str> =
                std::iter::once(TEMPLATE).chain(self.properties.keys().map(String::as_str)).collect();
            return Err(format!("params: the template takes no {unknown:?}; it takes: {}", known.join(", ")));
        }
        let variables = Variables { own: own.clone(), params: Map::new() };
        let mut values = Map::new();
        for (name, property) in &self.properties {
            let value = match (given.get(name), property.get("default")) {
                (Some(given), _) => given.clone(),
                (None, Some(default)) => syntax::fill(default, &variables)
                    .map_err(|fault| format!("params.{name}: its default has an {fault}"))?,
                (None, None) => continue,
            };
            values.insert(name.clone(), value);
        }
        let values = Value::Object(values);
        let faults: Vec<String> =
            self.validator.iter_errors(&values).take(MOST_FAULTS).map(|error| self.words(&error)).collect();
        if !faults.is_empty() {
            return Err(faults.join("; "));
        }
        let Value::Object(values) = values else { unreachable!("it was made an object") };
        match values.iter().find(|(_, value)| !is_flat(value)) {
            Some((name, value)) => {
                Err(format!("params.{name} must be a value or a list of values, not {}", show(value)))
            }
            None => Ok(values),
        }
    }

    /// Params to try the template with: one set with defaults, one with examples where there are any.
    pub(super) fn samples(&self, own: &Map<String, Value>) -> Result<Vec<Map<String, Value>>, Vec<String>> {
        let first_example = |property: &Value| property["examples"].get(0).cloned();
        let needed = self.properties.iter().filter(|(_, property)| property.get("default").is_none());
        let least: Map<String, Value> = needed
            .map(|(name, property)| (name.clone(), first_example(property).unwrap_or_else(|| made_up(property))))
            .collect();
        let base = self.resolve(&least, own).map_err(|fault| {
            vec![format!("sample values do not hold: {fault}; give the param a fitting default, or examples")]
        })?;
        let mut faults = vec![];
        for (name, property) in &self.properties {
            for example in property["examples"].as_array().into_iter().flatten() {
                let mut with_example = least.clone();
                with_example.insert(name.clone(), example.clone());
                if let Err(fault) = self.resolve(&with_example, own) {
                    faults.push(format!("params.{name}: its example {} does not hold: {fault}", show(example)));
                }
            }
        }
        let mut with_examples = least;
        with_examples.extend(
            self.properties.iter().filter_map(|(name, property)| Some((name.clone(), first_example(property)?))),
        );
        // Examples that hold one by one may exclude each other: then they are no set.
        let other = self.resolve(&with_examples, own).ok().filter(|other| *other != base);
        if faults.is_empty() { Ok(std::iter::once(base).chain(other).collect()) } else { Err(faults) }
    }

    /// A fault in words for the one who wrote the row.
    fn words(&self, error: &jsonschema::ValidationError<'_>) -> String {
        let path = error.instance_path().to_string();
        let name = path.trim_start_matches('/').replace('/', ".");
        let value = show(error.instance());
        let must = |what: String| format!("params.{name} must {what}, not {value}");
        match error.kind() {
            ValidationErrorKind::Required { property } => {
                format!("params.{} is missing", property.as_str().unwrap_or_default())
            }
            ValidationErrorKind::Type { kind } => must(format!(
                "be {}",
                match kind {
                    TypeKind::Single(kind) => article(&kind.to_string()),
                    TypeKind::Multiple(kinds) => {
                        kinds.iter().map(|kind| article(&kind.to_string())).collect::<Vec<_>>().join(" or ")
                    }
                }
            )),
            ValidationErrorKind::Minimum { limit } => must(format!("be at least {limit}")),
            ValidationErrorKind::Maximum { limit } => must(format!("be at most {limit}")),
            ValidationErrorKind::ExclusiveMinimum { limit } => must(format!("be greater than {limit}")),
            ValidationErrorKind::ExclusiveMaximum { limit } => must(format!("be less than {limit}")),
            ValidationErrorKind::MultipleOf { multiple_of } => must(format!("be a multiple of {multiple_of}")),
            ValidationErrorKind::Enum { options } => {
                let options: Vec<String> = options.as_array().into_iter().flatten().map(Value::to_string).collect();
                must(format!("be one of {}", options.join(", ")))
            }
            ValidationErrorKind::Constant { expected_value } => must(format!("be {expected_value}")),
            ValidationErrorKind::Pattern { pattern } => must(format!("match {}", unbound(pattern))),
            ValidationErrorKind::Format { format } => must(format!("be written as a {format}")),
            ValidationErrorKind::MinLength { limit } => must(format!("have at least {limit} characters")),
            ValidationErrorKind::MaxLength { limit } => must(format!("have at most {limit} characters")),
            ValidationErrorKind::MinItems { limit } => must(format!("have at least {limit} items")),
            ValidationErrorKind::MaxItems { limit } => must(format!("have at most {limit} items")),
            ValidationErrorKind::UniqueItems => must("have no item twice".to_owned()),
            _ if name.is_empty() => format!("params do not fit together: {}", cut(error.to_string())),
            _ => format!("params.{name}: {}", cut(error.to_string())),
        }
    }
}

/// What is wrong with the schema as a whole.
fn outer_faults(schema: &Value) -> Vec<String> {
    let Some(fields) = schema.as_object() else {
        return vec!["params must be a JSON Schema with properties".to_owned()];
    };
    let mut faults = vec![];
    for (keyword, value) in fields.iter().filter(|(keyword, _)| *keyword != "type") {
        if !OUTER_KEYWORDS.contains(&keyword.as_str()) {
            faults.push(format!("params.{keyword}: a param is described under params.properties"));
        }
        if keyword == "additionalProperties" && *value != json!(false) {
            faults.push("params.additionalProperties: a row may give only what is described".to_owned());
        }
    }
    if !fields.get("properties").is_some_and(Value::is_object) {
        faults.push("params.properties is missing: the params by name, each with its schema".to_owned());
    }
    if fields.get("required").is_some_and(|required| !required.is_array()) {
        faults.push("params.required must be a list of names".to_owned());
    }
    faults
}

/// What is wrong with the schema of one param.
fn property_faults(property: &Value) -> Vec<String> {
    let Some(fields) = property.as_object() else {
        return vec!["it must be a JSON Schema such as {type: integer, minimum: 1, default: 2}".to_owned()];
    };
    let misspelt = fields.keys().filter(|keyword| !KEYWORDS.contains(&keyword.as_str())).map(|keyword| {
        let nearest = KEYWORDS.iter().min_by_key(|known| strsim::damerau_levenshtein(known, keyword));
        format!("there is no {keyword:?} here; did you mean {:?}?", nearest.unwrap_or(&"type"))
    });
    let mut faults: Vec<String> = misspelt.collect();
    let scalars = ["string", "integer", "number", "boolean", "null"];
    let types = types(property);
    if types.is_empty() {
        faults.push(format!("its type is missing: one of {}, array", scalars.join(", ")));
    }
    let is_array = types.contains(&"array");
    if !types.iter().all(|kind| scalars.contains(kind) || *kind == "array") {
        faults.push("an object would bring keys of its own: use several params".to_owned());
    }
    if is_array && !types_of_items(property).iter().all(|kind| scalars.contains(kind)) {
        faults.push("the items of a list must be plain values: give their type".to_owned());
    }
    faults
}

fn types(schema: &Value) -> Vec<&str> {
    match &schema["type"] {
        Value::String(kind) => vec![kind],
        Value::Array(kinds) => kinds.iter().map(|kind| kind.as_str().unwrap_or("?")).collect(),
        _ => vec![],
    }
}

fn types_of_items(property: &Value) -> Vec<&str> {
    Some(types(&property["items"])).filter(|types| !types.is_empty()).unwrap_or_else(|| vec!["?"])
}

/// Begin and end of a pattern that all of a value must match. JSON Schema's own patterns match anywhere.
const WHOLE: (&str, &str) = ("^(?:", ")$");

/// Makes a param fit for a text that is not YAML: all of it must match its pattern.
fn bind_whole(property: &mut Value) -> Option<String> {
    let types = types(property);
    if types.contains(&"array") {
        return Some("a list cannot be put into user data that is not #cloud-config".to_owned());
    }
    if !types.contains(&"string") || property.get("enum").is_some() || property.get("const").is_some() {
        return None;
    }
    match property["pattern"].as_str() {
        Some(pattern) => {
            property["pattern"] = format!("{}{pattern}{}", WHOLE.0, WHOLE.1).into();
            None
        }
        None => Some("it is put into user data that is not #cloud-config: bound it by a pattern or an enum".to_owned()),
    }
}

fn unbound(pattern: &str) -> &str {
    pattern.strip_prefix(WHOLE.0).and_then(|rest| rest.strip_suffix(WHOLE.1)).unwrap_or(pattern)
}

/// A value to try a param with that has neither default nor example.
fn made_up(property: &Value) -> Value {
    let stated = property["enum"].get(0).or(property.get("const")).or(property.get("minimum")).cloned();
    stated.unwrap_or_else(|| match types(property).first() {
        Some(&"integer" | &"number") => 1.into(),
        Some(&"boolean") => false.into(),
        Some(&"array") => json!([]),
        Some(&"null") => Value::Null,
        _ => "sample".into(),
    })
}

fn is_flat(value: &Value) -> bool {
    let is_scalar = |value: &Value| !value.is_array() && !value.is_object();
    match value {
        Value::Array(items) => items.iter().all(is_scalar),
        value => is_scalar(value),
    }
}

fn article(kind: &str) -> String {
    match kind {
        "null" => "null".to_owned(),
        "array" => "a list".to_owned(),
        "boolean" => "true or false".to_owned(),
        "integer" => "a whole number".to_owned(),
        kind => format!("a {kind}"),
    }
}

fn show(value: &Value) -> String {
    cut(value.to_string())
}

fn cut(text: String) -> String {
    match text.char_indices().nth(LONGEST_VALUE) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Map<String, Value> {
        Map::from_iter([("vm_name".to_owned(), json!("cyberdesk-k1"))])
    }

    fn read(properties: Value, plain: &[&str]) -> Result<Params, Vec<String>> {
        let plain = plain.iter().map(|name| (*name).to_owned()).collect();
        Params::read(Some(&json!({ "properties": properties })), &own(), &plain)
    }

    fn resolve(params: &Params, given: Value) -> Result<Map<String, Value>, String> {
        params.resolve(given.as_object().expect("params are an object"), &own())
    }

    #[test]
    fn a_row_gets_defaults_and_what_it_asked_for() {
        let params = read(
            json!({
                "cpu": { "type": "integer", "minimum": 1, "maximum": 8, "default": 2 },
                "hostname": { "type": "string", "default": "${vm_name}" },
                "keys": { "type": "array", "items": { "type": "string" }, "default": [] },
            }),
            &[],
        )
        .expect("a schema");
        let got = resolve(&params, json!({ "cpu": 8 })).expect("fits");
        assert_eq!(Value::Object(got), json!({ "cpu": 8, "hostname": "cyberdesk-k1", "keys": [] }));
    }

    #[test]
    fn a_bad_param_is_refused_in_words_for_the_app_s_developer() {
        let params = read(
            json!({
                "cpu": { "type": "integer", "minimum": 1, "maximum": 8, "default": 2 },
                "image": { "type": "string", "enum": ["debian", "ubuntu"], "default": "debian" },
                "name": { "type": "string", "pattern": "^[a-z]+$", "maxLength": 5, "default": "a" },
                "keys": { "type": "array", "items": { "type": "string" }, "maxItems": 2, "default": [] },
                "fast": { "type": ["boolean", "null"], "default": null },
            }),
            &[],
        )
        .expect("a schema");
        let cases = [
            (json!({ "cpu": 64 }), "params.cpu must be at most 8, not 64"),
            (json!({ "cpu": 0 }), "params.cpu must be at least 1, not 0"),
            (json!({ "cpu": "4" }), "params.cpu must be a whole number, not \"4\""),
            (json!({ "cpu": 1.5 }), "params.cpu must be a whole number, not 1.5"),
            (json!({ "image": "arch" }), "params.image must be one of \"debian\", \"ubuntu\", not \"arch\""),
            (json!({ "name": "A" }), "params.name must match ^[a-z]+$, not \"A\""),
            (json!({ "name": "abcdef" }), "params.name must have at most 5 characters, not \"abcdef\""),
            (json!({ "keys": ["a", 5] }), "params.keys.1 must be a string, not 5"),
            (json!({ "keys": [["a"]] }), "params.keys.0 must be a string, not [\"a\"]"),
            (json!({ "keys": ["a", "b", "c"] }), "params.keys must have at most 2 items"),
            (json!({ "fast": 1 }), "params.fast must be null or true or false, not 1"),
            (
                json!({ "gpus": 8 }),
                "params: the template takes no \"gpus\"; it takes: template, cpu, fast, image, keys, name",
            ),
        ];
        for (given, words) in cases {
            let fault = resolve(&params, given).expect_err(words);
            assert!(fault.contains(words), "{words:?} is not in {fault:?}");
        }
        let needed = Params::read(
            Some(&json!({ "required": ["image"], "properties": { "image": { "type": "string" } } })),
            &own(),
            &BTreeSet::new(),
        );
        let fault = resolve(&needed.expect("a schema"), json!({})).expect_err("missing");
        assert_eq!(fault, "params.image is missing");
    }

    #[test]
    fn a_schema_that_bounds_nothing_is_refused() {
        let cases = [
            (json!({ "cpu": { "type": "integer", "maximun": 8, "default": 2 } }), "did you mean \"maximum\"?"),
            (json!({ "cpu": { "type": "integer" } }), "params.cpu needs a default"),
            (json!({ "cpu": { "default": 2 } }), "params.cpu: its type is missing"),
            (json!({ "cpu": { "type": "object", "default": {} } }), "an object would bring keys"),
            (json!({ "cpu": { "type": "array", "default": [] } }), "the items of a list must be plain"),
            (json!({ "cpu": { "type": "array", "items": { "type": "object" }, "default": [] } }), "must be plain"),
            (
                json!({ "cpu": { "type": "integer", "minimum": "one", "default": 2 } }),
                "params.cpu.minimum is no JSON Schema",
            ),
            (json!({ "vm_name": { "type": "string", "default": "a" } }), "taken by a variable of ours"),
            (json!({ "template": { "type": "string", "default": "a" } }), "taken by a variable of ours"),
            (json!({ "a-b": { "type": "string", "default": "a" } }), "a name is made of letters"),
            (
                json!({ "a": { "type": "string", "pattern": "(", "default": "a" } }),
                "params.a.pattern is no JSON Schema",
            ),
            (json!({ "a": 5 }), "it must be a JSON Schema"),
        ];
        for (properties, words) in cases {
            let faults = read(properties, &[]).map(drop).expect_err(words);
            assert!(faults.iter().any(|fault| fault.contains(words)), "{words:?} is not in {faults:?}");
        }
        let shorthand = Params::read(Some(&json!({ "cpu": { "type": "integer" } })), &own(), &BTreeSet::new());
        assert!(shorthand.is_err_and(|faults| faults[0].contains("under params.properties")));
    }

    #[test]
    fn a_param_in_a_script_must_match_its_pattern_as_a_whole() {
        let faults = read(json!({ "motd": { "type": "string", "default": "hi" } }), &["motd"]).map(drop);
        assert!(faults.is_err_and(|faults| faults[0].contains("bound it by a pattern")));
        let loose = json!({ "motd": { "type": "string", "pattern": "[a-z]+|x", "default": "hi" } });
        let params = read(loose.clone(), &["motd"]).expect("a schema");
        for hostile in ["hi; rm -rf /", "x\nrm", "hi\n"] {
            let fault = resolve(&params, json!({ "motd": hostile })).expect_err(hostile);
            assert!(fault.contains("must match [a-z]+|x,"), "{fault}");
        }
        let elsewhere = read(loose, &[]).expect("a schema");
        assert!(resolve(&elsewhere, json!({ "motd": "hi; there" })).is_ok(), "elsewhere a pattern is JSON Schema's");
    }

    #[test]
    fn a_template_is_tried_with_defaults_and_with_examples() {
        let params =
            read(json!({ "cpu": { "type": "integer", "default": 2, "examples": [4, 8] } }), &[]).expect("a schema");
        let samples = params.samples(&own()).expect("samples");
        assert_eq!(json!(samples), json!([{ "cpu": 2 }, { "cpu": 4 }]));
        let cases = [
            (json!({ "cpu": { "type": "integer", "maximum": 1, "default": 2 } }), "must be at most 1"),
            (
                json!({ "cpu": { "type": "integer", "maximum": 4, "default": 2, "examples": [8] } }),
                "its example 8 does not hold",
            ),
            (json!({ "a": { "type": "string", "default": "${vm_nam}" } }), "did you mean ${vm_name}?"),
        ];
        for (properties, words) in cases {
            let faults = read(properties, &[]).expect("a schema").samples(&own()).expect_err(words);
            assert!(faults[0].contains(words), "{words:?} is not in {faults:?}");
        }
    }
}
