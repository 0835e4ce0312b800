//! Turns a VM template and a desktop into the manifests to create. Pure.
//!
//! A template set is a folder or a ConfigMap: `NAME.yaml` is a VirtualMachine, `NAME.user-data` the
//! cloud-init user data that goes with it. In both, `${variable}` stands for a value and `$${variable}`
//! for the text `${variable}`; every other `$` and brace is left alone. In the YAML, values are put into
//! parsed strings, never into text, so no value can add a key.
//!
//! User data always goes into a Secret of the desktop's own: inline, KubeVirt refuses more than
//! 2,048 bytes (KubeVirt's `vmi-create-admitter.go`), and whoever reads VMs would read it.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tinytemplate::TinyTemplate;
use uuid::Uuid;

use crate::model::StartRules;
use crate::names::{ANNOTATION_TEMPLATE, Key, MANAGER, Owner};
use crate::reason::Reason;

/// The template that a desktop gets when its params name none.
const DEFAULT: &str = "default";

/// Where KubeVirt takes cloud-init from.
const CLOUD_INIT_SOURCES: [&str; 2] = ["cloudInitNoCloud", "cloudInitConfigDrive"];

/// Why no manifest could be made, in words for the one who can mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// `bad-template` or `bad-params`.
    pub reason: Reason,
    /// What is wrong and what to do.
    pub message: String,
}

fn bad_template(message: impl Into<String>) -> Refusal {
    Refusal { reason: Reason::BadTemplate, message: message.into() }
}

/// The objects to create for one desktop.
///
/// Its `Debug` shows none of it: a template may hold secrets, and logs must not.
#[derive(Clone, PartialEq)]
pub struct Manifests {
    /// The VirtualMachine.
    pub vm: Value,
    /// The name of the Secret.
    pub secret_name: String,
    /// The data of the Secret that it takes its cloud-init from, if it has any.
    pub user_data: Option<BTreeMap<String, Vec<u8>>>,
    /// Labels of both.
    pub labels: BTreeMap<String, String>,
}

impl fmt::Debug for Manifests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manifests").field("secret_name", &self.secret_name).finish_non_exhaustive()
    }
}

impl Manifests {
    /// What the template says of starts.
    pub fn start_rules(&self) -> StartRules {
        let annotations = self.vm.pointer("/metadata/annotations").and_then(Value::as_object);
        let texts = |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
        StartRules::read(&annotations.into_iter().flatten().filter_map(texts).collect())
    }
}

/// All templates there are, by name. Its `Debug` shows the names only.
#[derive(Clone, PartialEq)]
pub struct Templates {
    namespace: String,
    sources: BTreeMap<String, Source>,
}

impl fmt::Debug for Templates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.sources.keys()).finish()
    }
}

#[derive(Clone, Default, PartialEq)]
struct Source {
    vm: Option<String>,
    user_data: Option<String>,
}

impl Templates {
    /// Templates from files by name, as a folder or the `data` of a ConfigMap holds them. Names that
    /// end neither in `.yaml` nor in `.user-data` are no templates. VMs are made in `namespace`.
    pub fn new<N: AsRef<str>, T: Into<String>>(namespace: &str, files: impl IntoIterator<Item = (N, T)>) -> Self {
        let mut sources: BTreeMap<String, Source> = BTreeMap::new();
        for (file, text) in files {
            if let Some(name) = file.as_ref().strip_suffix(".yaml") {
                sources.entry(name.to_owned()).or_default().vm = Some(text.into());
            } else if let Some(name) = file.as_ref().strip_suffix(".user-data") {
                sources.entry(name.to_owned()).or_default().user_data = Some(text.into());
            }
        }
        sources.retain(|_, source| source.vm.is_some());
        Self { namespace: namespace.to_owned(), sources }
    }

    /// The templates that ship with the binary.
    pub fn built_in(namespace: &str) -> Self {
        Self::new(
            namespace,
            [
                ("default.yaml", include_str!("../templates/default.yaml")),
                ("default.user-data", include_str!("../templates/default.user-data")),
                ("small.yaml", include_str!("../templates/small.yaml")),
            ],
        )
    }

    /// Makes the manifests of one desktop. `params` choose among what the template offers.
    ///
    /// # Errors
    ///
    /// If the template cannot be rendered, or does not take these params.
    pub fn render(
        &self,
        key: &Key,
        owner: &Owner,
        user: Option<Uuid>,
        params: Option<&Value>,
    ) -> Result<Manifests, Refusal> {
        let (name, source) = self.choose(params)?;
        let mut variables = BTreeMap::from([
            ("vm_name", key.vm_name()),
            ("namespace", self.namespace.clone()),
            ("cyberdesk_name", key.to_string()),
            ("managed_by", MANAGER.to_owned()),
        ]);
        let user_data = match &source.user_data {
            Some(text) => {
                render_text(text, &variables).map_err(|why| why.in_file(&format!("{name}.user-data"), text))?
            }
            None => String::new(),
        };
        variables.insert("user_data_base64", BASE64.encode(user_data));

        let file = format!("{name}.yaml");
        let text = source.vm.as_deref().expect("sources without a VM are dropped when they are read");
        let mut vm: Value = serde_saphyr::from_str(text).map_err(|error| {
            // What follows the first line is a drawing of the place.
            let error = error.to_string();
            bad_template(format!("{file} is not YAML: {}", error.lines().next().unwrap_or_default()))
        })?;
        fill(&mut vm, &variables).map_err(|why| why.in_file(&file, text))?;

        let secret_name = owner.secret_name();
        let labels = owner.labels(key, user);
        let hash = hash(source);
        finish(&mut vm, key, &self.namespace, &labels, &hash).map_err(|why| bad_template(format!("{file}: {why}")))?;
        let user_data = move_user_data(&mut vm, &secret_name).map_err(|why| bad_template(format!("{file}: {why}")))?;
        Ok(Manifests { vm, secret_name, user_data, labels })
    }

    fn choose(&self, params: Option<&Value>) -> Result<(&str, &Source), Refusal> {
        let bad_params = |message| Refusal { reason: Reason::BadParams, message };
        let none = Map::new();
        let params = match params {
            None | Some(Value::Null) => &none,
            Some(Value::Object(params)) => params,
            Some(other) => {
                return Err(bad_params(format!(
                    "params must be an object such as {{\"template\": \"{DEFAULT}\"}}, not {other}"
                )));
            }
        };
        let names = || self.sources.keys().cloned().collect::<Vec<_>>().join(", ");
        if let Some(unknown) = params.keys().find(|key| *key != "template") {
            return Err(bad_params(format!("params: the template takes no {unknown:?}; it takes: template")));
        }
        let name = match params.get("template") {
            None => DEFAULT,
            Some(Value::String(name)) => name,
            Some(other) => {
                return Err(bad_params(format!(
                    "params.template must be the name of a template ({}), not {other}",
                    names()
                )));
            }
        };
        match (self.sources.get_key_value(name), params.contains_key("template")) {
            (Some((name, source)), _) => Ok((name, source)),
            (None, true) => {
                Err(bad_params(format!("params.template: there is no template {name:?}; there are: {}", names())))
            }
            (None, false) => Err(bad_template(format!("there is no template {DEFAULT}.yaml; there are: {}", names()))),
        }
    }
}

fn hash(source: &Source) -> String {
    let mut hasher = Sha256::new();
    for part in [&source.vm, &source.user_data] {
        hasher.update(part.as_deref().unwrap_or_default());
        hasher.update([0]);
    }
    hasher.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// What is wrong with one `${…}`; [`Fault::in_file`] finds the place.
#[derive(Debug)]
struct Fault {
    variable: String,
    message: String,
}

impl Fault {
    fn in_file(self, file: &str, text: &str) -> Refusal {
        let at = text.find(&format!("${{{}}}", self.variable)).unwrap_or(0);
        let line = text[..at].matches('\n').count() + 1;
        let column = text[..at].chars().rev().take_while(|c| *c != '\n').count() + 1;
        bad_template(format!("{file}:{line}:{column}: {}", self.message))
    }
}

/// Renders every string of a parsed document. Keys are left as they are.
fn fill(value: &mut Value, variables: &BTreeMap<&str, String>) -> Result<(), Fault> {
    match value {
        Value::String(text) => {
            if text.contains("${") {
                *text = render_text(text, variables)?;
            }
            Ok(())
        }
        Value::Array(items) => items.iter_mut().try_for_each(|item| fill(item, variables)),
        Value::Object(fields) => fields.values_mut().try_for_each(|field| fill(field, variables)),
        Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
    }
}

/// Renders `${…}` through tinytemplate.
///
/// tinytemplate gives meaning to braces and backslashes (and version 1.2.1 panics on a text that ends in
/// a backslash). So it gets the text's own parts as values too, and sees nothing but its own tags.
fn render_text(text: &str, variables: &BTreeMap<&str, String>) -> Result<String, Fault> {
    let mut template = String::new();
    let mut parts: Vec<String> = vec![String::new()];
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, tail) = rest.split_at(at);
        let part = parts.last_mut().expect("there is always a part");
        let end = tail.find('}').filter(|end| is_name(&tail[2..*end]));
        let Some(end) = end else {
            // `${name:-default}`, `${array[@]}` and an open brace are the shell's, not ours.
            part.push_str(before);
            part.push_str("${");
            rest = &tail[2..];
            continue;
        };
        let name = &tail[2..end];
        rest = &tail[end + 1..];
        if let Some(before) = before.strip_suffix('$') {
            part.push_str(before);
            part.push_str(&tail[..=end]);
            continue;
        }
        if !variables.contains_key(name) {
            return Err(unknown(name, variables));
        }
        part.push_str(before);
        template.push_str(&format!("{{parts.{}}}{{values.{name}}}", parts.len() - 1));
        parts.push(String::new());
    }
    parts.last_mut().expect("there is always a part").push_str(rest);
    template.push_str(&format!("{{parts.{}}}", parts.len() - 1));

    let fault = |error: tinytemplate::error::Error| Fault { variable: String::new(), message: error.to_string() };
    let mut engine = TinyTemplate::new();
    engine.set_default_formatter(&tinytemplate::format_unescaped);
    engine.add_template("text", &template).map_err(fault)?;
    engine.render("text", &json!({ "parts": parts, "values": variables })).map_err(fault)
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn unknown(name: &str, variables: &BTreeMap<&str, String>) -> Fault {
    let nearest = variables
        .keys()
        .map(|known| (strsim::damerau_levenshtein(known, name), known))
        .min()
        .filter(|(distance, _)| *distance <= 3)
        .map(|(_, known)| format!("; did you mean ${{{known}}}?"))
        .unwrap_or_default();
    let known = variables.keys().copied().collect::<Vec<_>>().join(", ");
    Fault {
        variable: name.to_owned(),
        message: format!(
            "unknown variable ${{{name}}}{nearest} Known: {known}. For the text itself write $${{{name}}}"
        ),
    }
}

/// Sets what is ours to set, and refuses what would take the fleet out of our hands.
fn finish(
    vm: &mut Value,
    key: &Key,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    hash: &str,
) -> Result<(), String> {
    if (vm["apiVersion"].as_str(), vm["kind"].as_str()) != (Some("kubevirt.io/v1"), Some("VirtualMachine")) {
        return Err("it must be a VirtualMachine of kubevirt.io/v1".into());
    }
    let metadata = object_at(vm, &["metadata"])?;
    for forbidden in ["ownerReferences", "finalizers"] {
        if metadata.contains_key(forbidden) {
            return Err(format!("metadata.{forbidden} is not allowed: the operator alone decides when the VM goes"));
        }
    }
    metadata.insert("name".into(), key.vm_name().into());
    metadata.insert("namespace".into(), namespace.into());
    object_at(vm, &["metadata", "annotations"])?.insert(ANNOTATION_TEMPLATE.into(), hash.into());
    for path in [&["metadata", "labels"][..], &["spec", "template", "metadata", "labels"]] {
        let fields = object_at(vm, path)?;
        fields.extend(labels.iter().map(|(label, value)| (label.clone(), value.clone().into())));
    }
    Ok(())
}

/// The object at this path, made where it is missing.
fn object_at<'a>(mut value: &'a mut Value, path: &[&str]) -> Result<&'a mut Map<String, Value>, String> {
    for step in path {
        let Value::Object(fields) = value else {
            return Err(format!("{} must be an object", path.join(".")));
        };
        let field = fields.entry(*step).or_insert(Value::Null);
        if field.is_null() {
            *field = json!({});
        }
        value = field;
    }
    value.as_object_mut().ok_or_else(|| format!("{} must be an object", path.join(".")))
}

/// Moves inline cloud-init data into the Secret's data, and puts a reference to the Secret in its place.
///
/// The Secret's keys are KubeVirt's: `userdata` and `networkdata` (`pkg/cloud-init/cloud-init.go`).
fn move_user_data(vm: &mut Value, secret: &str) -> Result<Option<BTreeMap<String, Vec<u8>>>, String> {
    let Some(volumes) = vm.pointer_mut("/spec/template/spec/volumes").and_then(Value::as_array_mut) else {
        return Ok(None);
    };
    let mut data = BTreeMap::new();
    for source in volumes.iter_mut().flat_map(cloud_init_of) {
        for (field, reference, key) in
            [("userData", "secretRef", "userdata"), ("networkData", "networkDataSecretRef", "networkdata")]
        {
            let encoded = source.remove(&format!("{field}Base64"));
            let bytes = match (source.remove(field), encoded) {
                (None, None) => continue,
                (Some(Value::String(text)), None) => text.into_bytes(),
                (None, Some(Value::String(text))) => {
                    BASE64.decode(text.trim()).map_err(|error| format!("{field}Base64 is not base64: {error}"))?
                }
                _ => {
                    return Err(format!("cloud-init takes either {field} or {field}Base64, as a string"));
                }
            };
            if bytes.is_empty() {
                return Err(format!(
                    "cloud-init {field} is empty: add NAME.user-data beside the template, or drop the volume"
                ));
            }
            if data.insert(key.to_owned(), bytes).is_some() {
                return Err(format!("only one volume may carry {field}"));
            }
            source.insert(reference.into(), json!({ "name": secret }));
        }
    }
    Ok((!data.is_empty()).then_some(data))
}

fn cloud_init_of(volume: &mut Value) -> Option<&mut Map<String, Value>> {
    let fields = volume.as_object_mut()?;
    let source = CLOUD_INIT_SOURCES.into_iter().find(|source| fields.contains_key(*source))?;
    fields.get_mut(source)?.as_object_mut()
}

#[cfg(test)]
mod tests;
