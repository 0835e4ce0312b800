//! Types: what virt-api says of a manifest that does not have the shape of a VM.
//!
//! It checks the shape by the schema that it was built with before it reads the manifest, so its words come before the
//! API server's own. The schema here is the one that the simulator's kinds have.

use std::sync::LazyLock;

use serde_json::{Value, json};

use super::quantity::milli;
use super::rules::Causes;
use crate::simulator::schema;

/// What is said of an amount that is none.
pub(super) const QUANTITY: &str =
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

/// What virt-api knows besides the schema: the values that a field may have.
const CHOICES: [(&str, &[&str]); 1] =
    [("spec.template.spec.dnsPolicy", &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"])];

/// Why a manifest is no VM.
#[derive(Debug)]
pub(super) enum Misfit {
    /// Something is missing, of another type, or none of its choices.
    Shape(Causes),
    /// An amount cannot be read.
    Quantity,
}

/// The VM's schema, with what is known of the one part that the API server leaves open.
static VM: LazyLock<Value> = LazyLock::new(|| {
    let kinds = schema::definitions().unwrap_or_default();
    let vm = kinds.iter().find(|kind| kind.spec.names.kind == "VirtualMachine");
    let schema = vm.and_then(|vm| vm.spec.versions.first()?.schema.as_ref()?.open_api_v3_schema.as_ref());
    let mut schema = json!(schema)["properties"]["spec"].take();
    let texts = json!({ "type": "object", "additionalProperties": { "type": "string" } });
    schema["properties"]["template"]["properties"]["metadata"] =
        json!({ "type": "object", "properties": { "labels": texts, "annotations": texts } });
    schema
});

/// Holds a VM against the schema.
pub(super) fn misfits(vm: &Value) -> Result<(), Misfit> {
    let mut causes = Causes::default();
    let mut unreadable = false;
    look("spec", &vm["spec"], &VM, &mut causes, &mut unreadable);
    match (causes.is_empty(), unreadable) {
        (false, _) => Err(Misfit::Shape(causes)),
        (true, true) => Err(Misfit::Quantity),
        (true, false) => Ok(()),
    }
}

fn look(at: &str, value: &Value, schema: &Value, causes: &mut Causes, unreadable: &mut bool) {
    if value.is_null() {
        return;
    }
    if schema["pattern"].is_string() {
        *unreadable |= value.is_string() && milli(value).is_none();
        return;
    }
    let wanted = schema["type"].as_str().unwrap_or_default();
    if !wanted.is_empty() && wanted != kind(value) && !(wanted == "number" && kind(value) == "integer") {
        return causes.shape(&format!("{at} in body must be of type {wanted}: {:?}", kind(value)));
    }
    let choices = CHOICES.iter().find(|(field, _)| *field == at).map(|(_, choices)| *choices);
    if let Some(choices) = choices.filter(|choices| value.as_str().is_some_and(|text| !choices.contains(&text))) {
        return causes.shape(&format!("{at} in body should be one of [{}]", choices.join(" ")));
    }
    for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        // The rest that KubeVirt requires, it fills in by itself.
        if at == "spec" && value[required].is_null() {
            causes.shape(&format!("{at}.{required} in body is required"));
        }
    }
    for (name, field) in value.as_object().into_iter().flatten() {
        let schema = match &schema["properties"][name] {
            Value::Null => &schema["additionalProperties"],
            known => known,
        };
        look(&format!("{at}.{name}"), field, schema, causes, unreadable);
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        look(&format!("{at}[{index}]"), item, &schema["items"], causes, unreadable);
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}
