//! What virt-controller does about one VirtualMachineInstance: pure functions of the VMI and its pods.
//!
//! It owns the VMI up to `Scheduled`; then the node does, and only conditions, `activePods` and the news that the pod
//! has vanished are still written from here.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::{Map, Value, json};
use std::sync::Arc;

use crate::kubevirt::{
    FOREGROUND_FINALIZER, NODE_NAME_LABEL, VM_CONTROLLER_FINALIZER, enter_phase, is_deleting, is_final, new_condition,
    phase, set_condition,
};

/// The one thing to do about a VMI's pods.
#[derive(Clone, Debug)]
pub(super) enum Sync {
    /// Nothing.
    Rest,
    /// Delete these.
    DeletePods(Vec<Arc<Pod>>),
    /// Make the virt-launcher pod.
    CreatePod,
}

/// What to do, given the pods that the VMI controls.
pub(super) fn sync(vmi: &DynamicObject, pods: &[Arc<Pod>]) -> Sync {
    if is_deleting(vmi) {
        let alive: Vec<_> = pods.iter().filter(|pod| !is_deleting(&***pod)).cloned().collect();
        return if alive.is_empty() { Sync::Rest } else { Sync::DeletePods(alive) };
    }
    if phase(vmi) == "Pending" && current_pod(vmi, pods).is_none() { Sync::CreatePod } else { Sync::Rest }
}

/// The newest pod on the VMI's node, or the newest at all while it has no node.
pub(super) fn current_pod<'a>(vmi: &DynamicObject, pods: &'a [Arc<Pod>]) -> Option<&'a Pod> {
    let node = vmi.data["status"]["nodeName"].as_str();
    let here = pods.iter().filter(|pod| node.is_none() || node == pod_node(pod));
    here.max_by_key(|pod| pod.creation_timestamp().map(|time| time.0)).map(Arc::as_ref)
}

/// Why a pod could not be made.
pub(super) struct Failure {
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// The VMI as it is to be written next; equal to the old one if there is nothing to write.
///
/// `owner` tells whether the VM that made it still exists.
pub(super) fn update(
    vmi: &DynamicObject,
    pods: &[Arc<Pod>],
    failure: Option<Failure>,
    owner: bool,
    now: Timestamp,
) -> DynamicObject {
    let mut next = vmi.clone();
    let pod = current_pod(vmi, pods);
    let mut failure = failure;
    let mut status = vmi.data["status"].clone();
    if !pods.is_empty() || status["activePods"].is_object() {
        let active: Map<String, Value> =
            pods.iter().map(|pod| (pod.uid().unwrap_or_default(), json!(pod_node(pod).unwrap_or_default()))).collect();
        status["activePods"] = Value::Object(active);
    }
    set_condition(&mut status, "Ready", Some(ready(vmi, pod, now)));

    match (phase(vmi), pod) {
        ("Pending", Some(_)) => enter_phase(&mut status, "Scheduling", now),
        ("Pending", None) if is_deleting(vmi) => enter_phase(&mut status, "Failed", now),
        ("Pending", None) => {}
        ("Scheduling", None) => enter_phase(&mut status, "Failed", now),
        ("Scheduling", Some(pod)) => {
            set_condition(&mut status, "PodScheduled", unscheduled(pod));
            failure = image_failure(pod).or(failure);
            if is_going(pod) {
                enter_phase(&mut status, "Failed", now);
            } else if pod_condition(pod, "Ready").is_some_and(|ready| ready["status"] == "True") && !is_deleting(vmi) {
                hand_over(&mut next, &mut status, pod, now);
            }
        }
        // Without a note in `phaseTransitionTimestamps`: a quirk of KubeVirt.
        ("Running" | "Scheduled", None) => status["phase"] = json!("Failed"),
        _ if is_final(vmi) => {
            let finalizers = next.metadata.finalizers.get_or_insert_default();
            let before = finalizers.len();
            finalizers.retain(|held| held != FOREGROUND_FINALIZER || !pods.is_empty());
            if !owner && finalizers.len() == before {
                finalizers.retain(|held| held != VM_CONTROLLER_FINALIZER);
            }
        }
        _ => {}
    }
    if !matches!(phase(vmi), "Running" | "Scheduled") {
        let synchronized =
            failure.map(|failure| new_condition("Synchronized", false, failure.reason, &failure.message, now));
        set_condition(&mut status, "Synchronized", synchronized);
    }
    next.data["status"] = status;
    next
}

/// The pod is ready: from here on the node decides.
fn hand_over(next: &mut DynamicObject, status: &mut Value, pod: &Pod, now: Timestamp) {
    enter_phase(status, "Scheduled", now);
    let node = pod_node(pod).unwrap_or_default();
    status["nodeName"] = json!(node);
    next.labels_mut().insert(NODE_NAME_LABEL.to_owned(), node.to_owned());
    // Interfaces are known by name; their addresses come from the guest.
    let networks = next.data["spec"]["networks"].as_array().into_iter().flatten();
    let interface =
        |network: &Value| json!({ "name": network["name"], "infoSource": "multus-status", "podInterfaceName": "eth0" });
    status["interfaces"] = networks.map(interface).collect();
}

/// Whether the guest can be used, as seen from its pod.
fn ready(vmi: &DynamicObject, pod: Option<&Pod>, now: Timestamp) -> Value {
    let not = |reason: &str, message: &str| new_condition("Ready", false, reason, message, now);
    let Some(pod) = pod else {
        return not("PodNotExists", "virt-launcher pod has not yet been scheduled");
    };
    if is_going(pod) {
        not("PodTerminating", "virt-launcher pod is terminating")
    } else if phase(vmi) != "Running" {
        not("GuestNotRunning", "Guest VM is not reported as running")
    } else if let Some(condition) = pod_condition(pod, "Ready") {
        let said = |key: &str| condition[key].as_str().unwrap_or_default().to_owned();
        new_condition("Ready", condition["status"] == "True", &said("reason"), &said("message"), now)
    } else {
        not("PodConditionMissing", "virt-launcher pod is missing the Ready condition")
    }
}

/// Ended, or about to.
fn is_going(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    is_deleting(pod) || matches!(phase, Some("Succeeded" | "Failed"))
}

fn pod_node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

fn pod_condition(pod: &Pod, kind: &str) -> Option<Value> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let found = conditions.iter().find(|condition| condition.type_ == kind)?;
    serde_json::to_value(found).ok()
}

/// The scheduler's complaint, copied while it stands.
fn unscheduled(pod: &Pod) -> Option<Value> {
    pod_condition(pod, "PodScheduled").filter(|condition| condition["status"] == "False")
}

fn image_failure(pod: &Pod) -> Option<Failure> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    statuses.iter().find_map(|status| {
        let waiting = status.state.as_ref()?.waiting.as_ref()?;
        let known = ["ErrImagePull", "ImagePullBackOff"];
        let reason = known.into_iter().find(|known| waiting.reason.as_deref() == Some(known))?;
        Some(Failure { reason, message: waiting.message.clone().unwrap_or_default() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vmi(phase: &str, deleting: bool) -> DynamicObject {
        let deleted = deleting.then_some("2026-01-01T00:00:00Z");
        let finalizers = [VM_CONTROLLER_FINALIZER, FOREGROUND_FINALIZER];
        serde_json::from_value(json!({
            "metadata": { "uid": "v", "finalizers": finalizers, "deletionTimestamp": deleted },
            "spec": { "networks": [{ "name": "default" }] },
            "status": { "phase": phase },
        }))
        .expect("a VMI")
    }

    fn pods(status: Value, deleting: bool) -> Vec<Arc<Pod>> {
        let deleted = deleting.then_some("2026-01-01T00:00:00Z");
        let pod = json!({ "metadata": { "uid": "p", "deletionTimestamp": deleted }, "spec": { "nodeName": "n", "containers": [] },
            "status": status });
        vec![Arc::new(serde_json::from_value(pod).expect("a pod"))]
    }

    #[test]
    fn phases_follow_the_pod_up_to_scheduled() {
        let ready = || json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] });
        let table = [
            ("Pending", false, vec![], "Pending", "PodNotExists"),
            ("Pending", false, pods(json!({}), false), "Scheduling", "GuestNotRunning"),
            ("Pending", true, vec![], "Failed", "PodNotExists"),
            ("Scheduling", false, pods(json!({}), false), "Scheduling", "GuestNotRunning"),
            ("Scheduling", false, pods(ready(), false), "Scheduled", "GuestNotRunning"),
            ("Scheduling", true, pods(ready(), false), "Scheduling", "GuestNotRunning"),
            ("Scheduling", true, pods(ready(), true), "Failed", "PodTerminating"),
            ("Scheduling", true, vec![], "Failed", "PodNotExists"),
            ("Scheduled", false, vec![], "Failed", "PodNotExists"),
            ("Running", false, vec![], "Failed", "PodNotExists"),
            ("Running", true, pods(ready(), true), "Running", "PodTerminating"),
            ("Succeeded", false, pods(json!({ "phase": "Succeeded" }), false), "Succeeded", "PodTerminating"),
        ];
        for (before, deleting, pods, after, reason) in table {
            let next = update(&vmi(before, deleting), &pods, None, true, Timestamp::UNIX_EPOCH);
            let status = &next.data["status"];
            assert_eq!(
                (phase(&next), status["conditions"][0]["reason"].as_str()),
                (after, Some(reason)),
                "{before}, {deleting}"
            );
            let again = update(&next, &pods, None, true, Timestamp::MAX);
            let (seen, written) = (&again.data["status"], &next.data["status"]);
            assert!(phase(&again) != phase(&next) || seen == written, "{before}: the same look again writes nothing");
        }
    }

    #[test]
    fn the_last_finalizers_wait_for_pods_and_for_the_vm() {
        let held = |pods: &[Arc<Pod>], owner| {
            let next = update(&vmi("Succeeded", true), pods, None, owner, Timestamp::UNIX_EPOCH);
            next.metadata.finalizers.unwrap_or_default()
        };
        assert_eq!(held(&pods(json!({}), true), true), [VM_CONTROLLER_FINALIZER, FOREGROUND_FINALIZER]);
        assert_eq!(held(&[], true), [VM_CONTROLLER_FINALIZER]);
        assert_eq!(held(&pods(json!({}), true), false), [FOREGROUND_FINALIZER]);
    }
}
