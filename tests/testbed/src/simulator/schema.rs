//! The two CustomResourceDefinitions of the simulator: VirtualMachine and VirtualMachineInstance.
//!
//! What an API server does with a manifest before any webhook sees it (prune unknown fields, refuse wrong types,
//! fill defaults) depends on the schema alone, so the schema has to be whole: `instance_spec.schema` names every field
//! of KubeVirt's v1 API in a short notation, and this module turns it into OpenAPI. Statuses are open: only the
//! simulator and the played node write them, and the webhook sees to that.

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// The spec of a VirtualMachineInstance in the notation explained at the top of that file.
const INSTANCE_SPEC: &str = include_str!("instance_spec.schema");

/// Kubernetes' pattern for a quantity such as `512Mi` or `0.5`.
const QUANTITY: &str = r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$";

/// Both definitions, ready to be applied.
pub fn definitions() -> Result<Vec<CustomResourceDefinition>> {
    let spec = parse(INSTANCE_SPEC).context("instance_spec.schema")?;
    [virtual_machine(&spec), virtual_machine_instance(&spec)]
        .into_iter()
        .map(|definition| Ok(serde_json::from_value(definition)?))
        .collect()
}

fn virtual_machine(instance_spec: &Value) -> Value {
    let open = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
    let schema = json!({
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": { "type": "string" },
            "kind": { "type": "string" },
            "metadata": { "type": "object" },
            "spec": {
                "type": "object",
                "required": ["template"],
                "properties": {
                    "dataVolumeTemplates": { "type": "array", "items": open },
                    "instancetype": open,
                    "preference": open,
                    "runStrategy": { "type": "string" },
                    "running": { "type": "boolean" },
                    "template": {
                        "type": "object",
                        "properties": {
                            "metadata": { "type": "object", "nullable": true, "x-kubernetes-preserve-unknown-fields": true },
                            "spec": instance_spec,
                        },
                    },
                    "updateVolumesStrategy": { "type": "string" },
                },
            },
            "status": {
                "type": "object",
                "x-kubernetes-preserve-unknown-fields": true,
                // KubeVirt's own default, and the first of this field's lies: any status at all reads "Stopped".
                "properties": { "printableStatus": { "type": "string", "default": "Stopped" } },
            },
        },
    });
    definition(
        "VirtualMachine",
        ["vm", "vms"],
        schema,
        json!({ "status": {} }),
        json!([
            { "name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp" },
            { "name": "Status", "type": "string", "jsonPath": ".status.printableStatus" },
            { "name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].status" },
        ]),
    )
}

fn virtual_machine_instance(spec: &Value) -> Value {
    let schema = json!({
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": { "type": "string" },
            "kind": { "type": "string" },
            "metadata": { "type": "object" },
            "spec": spec,
            "status": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
        },
    });
    // No status subresource: as in KubeVirt, a status write is a write of the object and moves its generation.
    definition(
        "VirtualMachineInstance",
        ["vmi", "vmis"],
        schema,
        json!({}),
        json!([
            { "name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp" },
            { "name": "Phase", "type": "string", "jsonPath": ".status.phase" },
            { "name": "IP", "type": "string", "jsonPath": ".status.interfaces[0].ipAddress" },
            { "name": "NodeName", "type": "string", "jsonPath": ".status.nodeName" },
            { "name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].status" },
            { "name": "Live-Migratable", "type": "string", "priority": 1,
              "jsonPath": ".status.conditions[?(@.type=='LiveMigratable')].status" },
            { "name": "Paused", "type": "string", "priority": 1,
              "jsonPath": ".status.conditions[?(@.type=='Paused')].status" },
        ]),
    )
}

fn definition(kind: &str, short: [&str; 2], schema: Value, subresources: Value, columns: Value) -> Value {
    let singular = kind.to_lowercase();
    let plural = format!("{singular}s");
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{plural}.kubevirt.io"), "labels": { "kubevirt.io": "" } },
        "spec": {
            "group": "kubevirt.io",
            "scope": "Namespaced",
            "names": { "kind": kind, "plural": plural, "singular": singular, "shortNames": short, "categories": ["all"] },
            "versions": [{
                "name": "v1",
                "served": true,
                "storage": true,
                "schema": { "openAPIV3Schema": schema },
                "subresources": subresources,
                "additionalPrinterColumns": columns,
            }],
        },
    })
}

/// Reads the notation and returns the schema of its one field that is not a `define`.
fn parse(text: &str) -> Result<Value> {
    let uncommented: Vec<&str> = text.lines().map(|line| line.split('#').next().unwrap_or_default()).collect();
    let joined = uncommented.join("\n");
    let mut reader = Reader { words: joined.split_whitespace().collect(), at: 0, shapes: HashMap::new() };
    while reader.peek() == Some("define") {
        reader.at += 1;
        let name = reader.next()?;
        ensure!(reader.next()? == "{", "define {name}: expected {{");
        let shape = reader.object()?;
        reader.shapes.insert(name.to_owned(), shape);
    }
    let (_, _, schema) = reader.field()?;
    ensure!(reader.peek().is_none(), "words after the end");
    Ok(schema)
}

struct Reader<'a> {
    words: Vec<&'a str>,
    at: usize,
    shapes: HashMap<String, Value>,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.words.get(self.at).copied()
    }

    fn next(&mut self) -> Result<&'a str> {
        let word = self.peek().context("ends too early")?;
        self.at += 1;
        Ok(word)
    }

    /// The fields up to the closing brace, as an object schema.
    fn object(&mut self) -> Result<Value> {
        let (mut properties, mut required) = (Map::new(), Vec::new());
        while self.peek() != Some("}") {
            let (name, mandatory, schema) = self.field()?;
            if mandatory {
                required.push(name.clone());
            }
            ensure!(properties.insert(name.clone(), schema).is_none(), "{name} twice");
        }
        self.at += 1;
        let mut object = json!({ "type": "object", "properties": properties });
        if !required.is_empty() {
            object["required"] = json!(required);
        }
        Ok(object)
    }

    /// One field: its name, whether it is required, its schema.
    fn field(&mut self) -> Result<(String, bool, Value)> {
        let word = self.next()?;
        let end = word.find(|c: char| !c.is_alphanumeric()).unwrap_or(word.len());
        let (name, mut rest) = word.split_at(end);
        let (mut mandatory, mut wraps) = (false, Vec::new());
        let mut schema = loop {
            if let Some(after) = rest.strip_prefix('!') {
                (mandatory, rest) = (true, after);
            } else if let Some(after) = rest.strip_prefix("[]") {
                wraps.push("items");
                rest = after;
            } else if let Some(after) = rest.strip_prefix('*') {
                wraps.push("additionalProperties");
                rest = after;
            } else if let Some(shape) = rest.strip_prefix('@') {
                break self.shapes.get(shape).with_context(|| format!("{word}: no such shape"))?.clone();
            } else if let Some(scalar) = rest.strip_prefix(':') {
                break scalar_schema(scalar);
            } else if rest == "=\"\"" {
                break json!({ "type": "string", "default": "" });
            } else if rest.is_empty() && self.peek() == Some("{") {
                self.at += 1;
                break self.object().with_context(|| name.to_owned())?;
            } else if rest.is_empty() {
                break json!({ "type": "string" });
            } else {
                bail!("cannot read {word:?}");
            }
        };
        for wrap in wraps.into_iter().rev() {
            schema = match wrap {
                "items" => json!({ "type": "array", "items": schema }),
                _ => json!({ "type": "object", "additionalProperties": schema }),
            };
        }
        Ok((name.to_owned(), mandatory, schema))
    }
}

fn scalar_schema(name: &str) -> Value {
    match name {
        "int" => json!({ "type": "integer", "format": "int64" }),
        "bool" => json!({ "type": "boolean" }),
        "number" => json!({ "type": "number" }),
        "quantity" => json!({
            "anyOf": [{ "type": "integer" }, { "type": "string" }],
            "pattern": QUANTITY,
            "x-kubernetes-int-or-string": true,
        }),
        "intstr" => json!({
            "anyOf": [{ "type": "integer" }, { "type": "string" }],
            "x-kubernetes-int-or-string": true,
        }),
        "any" => json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true }),
        "object" => json!({ "type": "object" }),
        choices => json!({ "type": "string", "enum": choices.split('|').collect::<Vec<_>>() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notation_becomes_open_api() {
        let text = "define ref { name=\"\" }\nspec! { a! b[]:int # why\n c* { d:bool } e@ref f:X|Y }";
        let schema = parse(text).expect("valid notation");
        assert_eq!(
            schema,
            json!({ "type": "object", "required": ["a"], "properties": {
                "a": { "type": "string" },
                "b": { "type": "array", "items": { "type": "integer", "format": "int64" } },
                "c": { "type": "object", "additionalProperties":
                    { "type": "object", "properties": { "d": { "type": "boolean" } } } },
                "e": { "type": "object", "properties": { "name": { "type": "string", "default": "" } } },
                "f": { "type": "string", "enum": ["X", "Y"] },
            } })
        );
    }

    #[test]
    fn both_definitions_are_well_formed() {
        let names: Vec<_> = definitions().expect("valid").into_iter().filter_map(|crd| crd.metadata.name).collect();
        assert_eq!(names, ["virtualmachines.kubevirt.io", "virtualmachineinstances.kubevirt.io"]);
    }
}
