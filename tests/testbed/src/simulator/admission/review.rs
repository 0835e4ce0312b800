//! From a request to its answer: which rules and defaults apply to whom.

use jiff::Timestamp;
use k8s_openapi::ByteString;
use kube::api::DynamicObject;
use serde_json::{Value, json};

use super::rules::{self, Causes};
use super::{defaults, devices, types};
use crate::kubevirt::{CREATED_BY_LABEL, FOREGROUND_FINALIZER, NODE_NAME_LABEL};
use crate::node;

/// Paths of the webhooks, as the real virt-api's.
pub(super) const MUTATE_VM: &str = "virtualmachines-mutate";
pub(super) const MUTATE_VMI: &str = "virtualmachineinstances-mutate";
pub(super) const VALIDATE_VM: &str = "virtualmachines-validate";
pub(super) const VALIDATE_VMI_CREATE: &str = "virtualmachineinstances-validate-create";
pub(super) const VALIDATE_VMI_UPDATE: &str = "virtualmachineinstances-validate-update";

/// Labels that only KubeVirt sets on a VMI.
const RESERVED_LABELS: [&str; 6] = [
    CREATED_BY_LABEL,
    "kubevirt.io/migrationJobUID",
    NODE_NAME_LABEL,
    "kubevirt.io/migrationTargetNodeName",
    "kubevirt.io/schedulable",
    "kubevirt.io/install-strategy",
];

/// The `response` of an AdmissionReview, without the `uid`.
pub(super) fn answer(hook: &str, request: &Value, now: Timestamp) -> Value {
    let (new, old) = (&request["object"], &request["oldObject"]);
    let by_kubevirt = request["userInfo"]["username"]
        .as_str()
        .is_some_and(|name| name.starts_with("system:serviceaccount:kubevirt:"));
    let creating = request["operation"] == "CREATE";
    let deleting = new["metadata"]["deletionTimestamp"].is_string();
    match hook {
        MUTATE_VM | VALIDATE_VM if deleting => allowed(),
        MUTATE_VM => mutate_vm(new, creating),
        MUTATE_VMI if creating => create_vmi(new, now),
        // Others' status writes are undone in silence: the answer is a success, the object is as it was.
        MUTATE_VMI if !by_kubevirt && new["status"] != old["status"] => patch(&[("/status", &old["status"])]),
        MUTATE_VMI => allowed(),
        VALIDATE_VM => validate_vm(new, old, by_kubevirt),
        VALIDATE_VMI_CREATE => validate_vmi(new, by_kubevirt),
        VALIDATE_VMI_UPDATE => validate_vmi_update(new, old, by_kubevirt),
        other => refused_with(404, &format!("no webhook {other}")),
    }
}

fn mutate_vm(vm: &Value, creating: bool) -> Value {
    let mut spec = vm["spec"].clone();
    // Its webhook comes before the API server's own look at the types, and looks at them first.
    match types::misfits(vm) {
        Ok(()) => {}
        Err(types::Misfit::Shape(causes)) => return refused(&causes),
        Err(types::Misfit::Quantity) => return refused_with(400, types::QUANTITY),
    }
    if creating {
        defaults::firmware(&mut spec["template"]["spec"]);
        defaults::pci_topology(&mut spec["template"]["metadata"]);
    }
    defaults::architecture_and_machine(&mut spec["template"]["spec"]);
    patch(&[("/spec", &spec)])
}

fn create_vmi(vmi: &Value, now: Timestamp) -> Value {
    let (mut spec, mut metadata) = (vmi["spec"].clone(), vmi["metadata"].clone());
    let mut status = if vmi["status"].is_object() { vmi["status"].clone() } else { json!({}) };
    defaults::instance(&mut spec);
    defaults::initial_status(&mut status, &spec, now);
    defaults::pci_topology(&mut metadata);
    match metadata["finalizers"].as_array_mut() {
        Some(finalizers) => finalizers.push(json!(FOREGROUND_FINALIZER)),
        None => metadata["finalizers"] = json!([FOREGROUND_FINALIZER]),
    }
    // `add` also replaces, and needs nothing to be there.
    patch(&[("/spec", &spec), ("/metadata", &metadata), ("/status", &status)])
}

fn validate_vm(vm: &Value, old: &Value, by_kubevirt: bool) -> Value {
    let mut causes = Causes::default();
    let template = &vm["spec"]["template"];
    // As KubeVirt does it: the rules see the template with the defaults that its VMI would get.
    let mut spec = template["spec"].clone();
    defaults::before_rules(&mut spec);

    devices::discontinued_bindings("spec", &spec, &mut causes);
    if causes.is_empty() {
        reserved_labels("spec.template.metadata", &template["metadata"], by_kubevirt, &mut causes);
        rules::check("spec.template.spec", &spec, &mut causes);
        // KubeVirt looks at a VM's sockets twice, and says so twice.
        rules::sockets_within_maximum("spec.template.spec", &spec, &mut causes);
        rules::run_strategy(&vm["spec"], &mut causes);
    }
    if causes.is_empty() {
        rules::not_played(&vm["spec"], &spec, &mut causes);
        rules::not_played_on_update(vm, old, &mut causes);
        understands_script("spec.template.metadata", &template["metadata"], &mut causes);
    }
    if !causes.is_empty() {
        return refused(&causes);
    }
    let mut response = allowed();
    if vm["spec"]["running"].is_boolean() {
        response["warnings"] = json!(["spec.running is deprecated, please use spec.runStrategy instead."]);
    }
    response
}

fn validate_vmi(vmi: &Value, by_kubevirt: bool) -> Value {
    let mut causes = Causes::default();
    rules::check("spec", &vmi["spec"], &mut causes);
    devices::volumes_have_disks("spec", &vmi["spec"], &mut causes);
    rules::memory_is_named("spec", &vmi["spec"], &mut causes);
    reserved_labels("metadata", &vmi["metadata"], by_kubevirt, &mut causes);
    rules::architecture("spec", &vmi["spec"], &mut causes);
    if causes.is_empty() {
        rules::not_played(&json!({}), &vmi["spec"], &mut causes);
        understands_script("metadata", &vmi["metadata"], &mut causes);
    }
    if causes.is_empty() { allowed() } else { refused(&causes) }
}

fn validate_vmi_update(new: &Value, old: &Value, by_kubevirt: bool) -> Value {
    let mut causes = Causes::default();
    let reserved = |vmi: &Value| RESERVED_LABELS.map(|label| vmi["metadata"]["labels"][label].clone());
    if by_kubevirt {
        return allowed();
    }
    if new["spec"] != old["spec"] {
        causes.add("FieldValueNotSupported", "", "update of VMI object is restricted");
    } else if reserved(new) != reserved(old) {
        let words = "modification of the following reserved kubevirt.io/ labels on a VMI object is prohibited";
        causes.add("FieldValueNotSupported", "", words);
    } else {
        understands_script("metadata", &new["metadata"], &mut causes);
    }
    if causes.is_empty() { allowed() } else { refused(&causes) }
}

fn reserved_labels(at: &str, metadata: &Value, by_kubevirt: bool, causes: &mut Causes) {
    if !by_kubevirt && RESERVED_LABELS.iter().any(|label| metadata["labels"][label].is_string()) {
        let words = "creation of the following reserved kubevirt.io/ labels on a VMI object is prohibited";
        causes.add("FieldValueNotSupported", &format!("{at}.labels"), words);
    }
}

/// A guest's script that the node would not understand is refused here, where its author sees it.
fn understands_script(at: &str, metadata: &Value, causes: &mut Causes) {
    let carrier = json!({ "metadata": { "annotations": metadata["annotations"] } });
    let Ok(carrier) = serde_json::from_value::<DynamicObject>(carrier) else {
        return;
    };
    if let Err(error) = node::check_script(&carrier) {
        causes.add("FieldValueInvalid", &format!("{at}.annotations"), &format!("{error:#}"));
    }
}

fn allowed() -> Value {
    json!({ "allowed": true })
}

fn patch(parts: &[(&str, &Value)]) -> Value {
    let operation = |(path, value): &(&str, &Value)| match value {
        Value::Null => json!({ "op": "remove", "path": path }),
        value => json!({ "op": "add", "path": path, "value": value }),
    };
    let operations: Vec<Value> = parts.iter().map(operation).collect();
    let bytes = ByteString(Value::from(operations).to_string().into_bytes());
    json!({ "allowed": true, "patchType": "JSONPatch", "patch": bytes })
}

/// At most ten causes are told, as by KubeVirt.
fn refused(causes: &Causes) -> Value {
    const TOLD: usize = 10;
    let told: Vec<&Value> = causes.iter().take(TOLD).collect();
    let words: Vec<&str> = told.iter().filter_map(|cause| cause["message"].as_str()).collect();
    let mut message = words.join(", ");
    if causes.len() > TOLD {
        message += &format!(", and {} more validation errors", causes.len() - TOLD);
    }
    json!({ "allowed": false, "status": { "code": 422, "reason": "Invalid", "message": message, "details": { "causes": told } } })
}

fn refused_with(code: u16, message: &str) -> Value {
    json!({ "allowed": false, "status": { "code": code, "message": message } })
}
