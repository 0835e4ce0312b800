//! KubeVirt's vocabulary, shared by the played node and the simulator: kinds, names, and how to read and write the
//! two objects everything turns on.
//!
//! VirtualMachine and VirtualMachineInstance are kept as [`DynamicObject`]s: their manifests come from templates that
//! people write, and must pass through untouched.

use std::time::Duration;

use anyhow::{Result, bail};
use http::{HeaderValue, Request};
use jiff::Timestamp;
use kube::api::{Api, DynamicObject, PostParams};
use kube::client::Body;
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Resource};
use serde_json::{Value, json};

/// Held by virt-controller on a VM until its VMI is gone, and on a VMI until the VM has seen how it ended.
pub const VM_CONTROLLER_FINALIZER: &str = "kubevirt.io/virtualMachineControllerFinalize";
/// Held on a VMI until its pods are gone.
pub const FOREGROUND_FINALIZER: &str = "kubevirt.io/foregroundDeleteVirtualMachine";
/// Label of every virt-launcher pod, with the value `virt-launcher`.
pub const APP_LABEL: &str = "kubevirt.io";
/// The UID of the VMI a virt-launcher pod was made for.
pub const CREATED_BY_LABEL: &str = "kubevirt.io/created-by";
/// Names the node on a VMI once it is `Scheduled`.
pub const NODE_NAME_LABEL: &str = "kubevirt.io/nodeName";
/// The identity under which virt-controller (and so the simulator, and the played node) writes.
pub const CONTROLLER_USER: &str = "system:serviceaccount:kubevirt:kubevirt-controller";
/// `terminationGracePeriodSeconds` of a VMI that does not name one.
pub const DEFAULT_GRACE_SECONDS: i64 = 30;

/// The VirtualMachine kind.
pub fn vm_resource() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "VirtualMachine"))
}

/// The VirtualMachineInstance kind.
pub fn vmi_resource() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "VirtualMachineInstance"))
}

/// VirtualMachines of one namespace.
pub fn vms(client: &Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &vm_resource())
}

/// VirtualMachineInstances of one namespace.
pub fn vmis(client: &Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &vmi_resource())
}

/// The same connection, acting as KubeVirt's controller: virt-api lets only KubeVirt's own service accounts write the
/// status of a VMI. The caller must be allowed to impersonate (an admin is).
pub fn as_kubevirt(client: &Client) -> Client {
    let namespace = client.default_namespace().to_owned();
    let client = client.clone();
    let service = tower::service_fn(move |mut request: Request<Body>| {
        let headers = request.headers_mut();
        headers.insert("Impersonate-User", HeaderValue::from_static(CONTROLLER_USER));
        headers.insert("Impersonate-Group", HeaderValue::from_static("system:masters"));
        let client = client.clone();
        async move { client.send(request).await }
    });
    Client::new(service, namespace)
}

/// `status.phase` of a VMI; a VMI without one is `Pending`.
pub fn phase(vmi: &DynamicObject) -> &str {
    match vmi.data["status"]["phase"].as_str() {
        None | Some("") => "Pending",
        Some(phase) => phase,
    }
}

/// Whether the VMI has ended: `Succeeded` or `Failed`, for ever.
pub fn is_final(vmi: &DynamicObject) -> bool {
    matches!(phase(vmi), "Succeeded" | "Failed")
}

/// Whether the object is being deleted.
pub fn is_deleting<K: Resource>(object: &K) -> bool {
    object.meta().deletion_timestamp.is_some()
}

/// Whether the object carries this finalizer.
pub fn has_finalizer<K: Resource>(object: &K, finalizer: &str) -> bool {
    object.meta().finalizers.iter().flatten().any(|held| held == finalizer)
}

/// The UID of the object's controlling owner.
pub fn controller_uid<K: Resource>(object: &K) -> Option<&str> {
    let mut owners = object.meta().owner_references.iter().flatten();
    owners.find(|owner| owner.controller == Some(true)).map(|owner| owner.uid.as_str())
}

/// An annotation's value.
pub fn annotation<'a, K: Resource>(object: &'a K, key: &str) -> Option<&'a str> {
    object.meta().annotations.as_ref()?.get(key).map(String::as_str)
}

/// The condition of this type in a status.
pub fn condition<'a>(status: &'a Value, kind: &str) -> Option<&'a Value> {
    status["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind)
}

/// Sets or removes one condition. One that says the same already keeps its transition time, so that setting it again
/// is not a change.
pub fn set_condition(status: &mut Value, kind: &str, wanted: Option<Value>) {
    let mut conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    let position = conditions.iter().position(|condition| condition["type"] == kind);
    match (position, wanted) {
        (Some(at), Some(wanted)) if says_the_same(&conditions[at], &wanted) => return,
        (Some(at), Some(wanted)) => conditions[at] = wanted,
        (Some(at), None) => drop(conditions.remove(at)),
        (None, Some(wanted)) => conditions.push(wanted),
        (None, None) => return,
    }
    status["conditions"] = Value::Array(conditions);
}

/// Compares what two conditions say, not when they began to.
fn says_the_same(one: &Value, other: &Value) -> bool {
    ["status", "reason", "message"].iter().all(|key| one[key] == other[key])
}

/// A condition as it stands in a status, beginning now.
pub fn new_condition(kind: &str, status: bool, reason: &str, message: &str, now: Timestamp) -> Value {
    let mut condition = json!({
        "type": kind,
        "status": if status { "True" } else { "False" },
        "lastProbeTime": null,
        "lastTransitionTime": seconds(now),
    });
    for (key, text) in [("reason", reason), ("message", message)] {
        if !text.is_empty() {
            condition[key] = json!(text);
        }
    }
    condition
}

/// Moves a VMI's status to a phase and notes when, once per phase.
pub fn enter_phase(status: &mut Value, phase: &str, now: Timestamp) {
    status["phase"] = json!(phase);
    let mut seen = status["phaseTransitionTimestamps"].as_array().cloned().unwrap_or_default();
    if !seen.iter().any(|entry| entry["phase"] == phase) {
        seen.push(json!({ "phase": phase, "phaseTransitionTimestamp": seconds(now) }));
        status["phaseTransitionTimestamps"] = Value::Array(seen);
    }
}

/// Kubernetes writes times in whole seconds.
pub fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Whether the API server refused a write because the object has moved on or is gone: look again, nothing is wrong.
pub fn is_race(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 404 | 409))
}

/// How long an API server may take to heed new webhooks.
const HEEDED_WITHIN: Duration = Duration::from_secs(30);

/// Waits until dry runs show that both sets of webhooks are asked: the one writes defaults, the other refuses.
pub(crate) async fn admission_is_heeded(client: &Client) -> Result<()> {
    let api = vms(client, "default");
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let probe = |strategy: &str| -> Result<DynamicObject> {
        Ok(serde_json::from_value(json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine",
            "metadata": { "name": "is-the-webhook-there" },
            "spec": { "runStrategy": strategy, "template": { "spec": { "domain": { "devices": {} } } } },
        }))?)
    };
    let (good, bad) = (probe("Halted")?, probe("Nonsense")?);
    let mut last = String::new();
    let asked = async {
        loop {
            let defaulted = match api.create(&dry_run, &good).await {
                Ok(vm) => vm.data["spec"]["template"]["spec"]["domain"]["firmware"]["uuid"].is_string(),
                Err(error) => {
                    last = error.to_string();
                    false
                }
            };
            if defaulted && api.create(&dry_run, &bad).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    if tokio::time::timeout(HEEDED_WITHIN, asked).await.is_err() {
        bail!("the API server does not ask KubeVirt's webhooks: {last}");
    }
    Ok(())
}
