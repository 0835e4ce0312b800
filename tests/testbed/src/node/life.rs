//! What the node does next for one virt-launcher pod: a pure function of what is known of pod and guest.
//!
//! The node waits before most steps, as a scheduler, a kubelet and a guest would; whatever changes meanwhile (a
//! deletion above all) leads to a fresh decision. A step that is still the right one keeps the time at which it first
//! became so (`node/mod.rs` sees to that), so that unrelated changes do not put it off.

use k8s_openapi::api::core::v1::Pod;
use kube::api::DynamicObject;
use std::time::Duration;

use super::Speed;
use super::script::{Command, Script, Stuck};
use crate::kubevirt::{DEFAULT_GRACE_SECONDS, condition, is_deleting, phase};

/// One write of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// The scheduler says that no node fits.
    CallUnschedulable,
    /// The scheduler binds the pod.
    Bind,
    /// The kubelet waits: for an image, or to create the container.
    HoldUp(&'static str),
    /// The kubelet says that the pod runs, but is not ready.
    Unready,
    /// The kubelet says that the pod runs and is ready.
    Ready,
    /// Somebody has the API server evict the pod.
    Drain,
    /// The kubelet ends the pod, for want of room.
    Evict,
    /// Nobody hears of the kubelet any more.
    LoseContact,
    /// virt-handler says that the guest runs.
    Run,
    /// virt-handler says that the guest has ended, well or badly.
    Finish { well: bool },
    /// Something happens to a running guest.
    Obey(Command),
    /// The kubelet says that the pod has ended.
    EndPod,
    /// The kubelet lets a deleted pod go.
    RemovePod,
}

/// A write, and how long after it has become the right one it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) after: Duration,
    pub(super) act: Act,
}

/// What is known.
pub(super) struct View<'a> {
    pub(super) pod: &'a Pod,
    /// The VMI that the pod was made for, if the node knows of it.
    pub(super) vmi: Option<&'a DynamicObject>,
    pub(super) script: &'a Script,
    pub(super) speed: &'a Speed,
}

/// The next step, or none until something changes.
pub(super) fn next(view: &View<'_>) -> Option<Step> {
    let at_once = |act| Some(Step { after: Duration::ZERO, act });
    // virt-handler takes a moment to see that there is nothing to run.
    let noticed = |act| Some(Step { after: view.speed.pod_end, act });
    let Some(vmi) = view.vmi else {
        // Not in the cache (yet). Only a deletion is acted on: nothing may end a pod because its VMI was not seen.
        return if is_deleting(view.pod) { at_once(Act::RemovePod) } else { None };
    };
    if view.script.due(vmi) == Some(Command::GiveUpNode) {
        return at_once(Act::Obey(Command::GiveUpNode));
    }
    if view.script.node_is_lost(vmi) && !matches!(phase(vmi), "Succeeded" | "Failed") {
        return None;
    }
    let deleting = is_deleting(vmi) || is_deleting(view.pod);
    match phase(vmi) {
        "Succeeded" | "Failed" => after_the_guest(view),
        "Running" | "Scheduled" if elsewhere(view.pod, vmi) => {
            // The other pod of a migration: the guest is not in it (any more).
            if is_deleting(view.pod) { at_once(Act::RemovePod) } else { None }
        }
        "Running" if pod_phase(view.pod) == "Failed" => noticed(Act::Finish { well: false }),
        "Running" if deleting => Some(shut_down(view, vmi)),
        "Running" => live(view, vmi),
        "Scheduled" if deleting => noticed(Act::Finish { well: false }),
        "Scheduled" if view.script.never_ready && is_ready(view.pod) => at_once(Act::Unready),
        "Scheduled" => match view.script.due(vmi) {
            Some(Command::FailBeforeRunning) => Some(Step { after: boot(view) / 2, act: Act::Finish { well: false } }),
            _ => Some(Step { after: boot(view), act: Act::Run }),
        },
        _ if is_deleting(view.pod) => Some(Step { after: view.speed.pod_end, act: Act::RemovePod }),
        _ => start(view),
    }
}

fn boot(view: &View<'_>) -> Duration {
    view.script.boot.unwrap_or(view.speed.boot)
}

/// Scheduler and kubelet, up to a ready pod.
fn start(view: &View<'_>) -> Option<Step> {
    let bound = node_name(view.pod).is_some();
    let step = |after, act| Some(Step { after, act });
    match view.script.stuck {
        Some(Stuck::Unschedulable) if called_unschedulable(view.pod) => None,
        Some(Stuck::Unschedulable) => step(view.speed.bind, Act::CallUnschedulable),
        _ if !bound => step(view.speed.bind, Act::Bind),
        Some(Stuck::ImagePull) => hold_up(view, "ImagePullBackOff"),
        Some(Stuck::MissingSecret) => hold_up(view, "ContainerCreating"),
        Some(Stuck::NotReady) if pod_phase(view.pod) == "Running" => None,
        Some(Stuck::NotReady) => step(view.speed.pod_ready, Act::Unready),
        _ if is_ready(view.pod) => None,
        _ => step(view.speed.pod_ready, Act::Ready),
    }
}

fn hold_up(view: &View<'_>, reason: &'static str) -> Option<Step> {
    let waits_already = waiting_reason(view.pod) == Some(reason);
    (!waits_already).then_some(Step { after: view.speed.pod_ready, act: Act::HoldUp(reason) })
}

/// A running guest that nobody wants to end.
fn live(view: &View<'_>, vmi: &DynamicObject) -> Option<Step> {
    if let Some(command) = view.script.due(vmi) {
        let act = match command {
            Command::PowerOff => Act::Finish { well: true },
            Command::Crash => Act::Finish { well: false },
            Command::Drain => Act::Drain,
            Command::Evict => Act::Evict,
            Command::LosePod if is_ready(view.pod) => Act::LoseContact,
            Command::LosePod => return Some(Step { after: view.speed.pod_end, act: Act::RemovePod }),
            // It runs: too late for that one, which is noted without an effect.
            other => Act::Obey(other),
        };
        return Some(Step { after: Duration::ZERO, act });
    }
    let connected = condition(&vmi.data["status"], "AgentConnected").is_some();
    let after = view.script.agent.filter(|_| !connected && view.script.command.is_none())?;
    Some(Step { after, act: Act::Obey(Command::AgentConnect) })
}

/// The power button has been pressed: the guest obeys in its own time, or is killed when its grace ends.
fn shut_down(view: &View<'_>, vmi: &DynamicObject) -> Step {
    let seconds = vmi.data["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(DEFAULT_GRACE_SECONDS);
    let grace = Duration::from_secs(seconds.max(0).unsigned_abs());
    let takes = view.script.shutdown.unwrap_or(view.speed.shutdown);
    if grace.is_zero() {
        // Killed by wish, as quickly as a process can be: KubeVirt calls that a success.
        Step { after: view.speed.pod_end, act: Act::Finish { well: true } }
    } else if view.script.ignores_acpi || takes > grace {
        Step { after: grace, act: Act::Finish { well: false } }
    } else {
        Step { after: takes, act: Act::Finish { well: true } }
    }
}

/// The guest has ended; the pod follows.
fn after_the_guest(view: &View<'_>) -> Option<Step> {
    let ended = matches!(pod_phase(view.pod), "Succeeded" | "Failed");
    match (ended, is_deleting(view.pod)) {
        (false, _) => Some(Step { after: view.speed.pod_end, act: Act::EndPod }),
        (true, true) => Some(Step { after: Duration::ZERO, act: Act::RemovePod }),
        (true, false) => None,
    }
}

fn elsewhere(pod: &Pod, vmi: &DynamicObject) -> bool {
    vmi.data["status"]["nodeName"].as_str().is_some_and(|node| node_name(pod) != Some(node))
}

/// The node that the pod is bound to.
pub(super) fn node_name(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

fn pod_phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

fn pod_condition(pod: &Pod, kind: &str) -> Option<&'static str> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let found = conditions.iter().find(|condition| condition.type_ == kind)?;
    Some(if found.status == "True" { "True" } else { "False" })
}

fn called_unschedulable(pod: &Pod) -> bool {
    pod_condition(pod, "PodScheduled") == Some("False")
}

fn is_ready(pod: &Pod) -> bool {
    pod_condition(pod, "Ready") == Some("True")
}

/// Why the pod's container has not started.
pub(super) fn waiting_reason(pod: &Pod) -> Option<&str> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    statuses.iter().find_map(|status| status.state.as_ref()?.waiting.as_ref()?.reason.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const BOUND: &str = r#"{"spec":{"nodeName":"n","containers":[]}}"#;

    fn pod(text: &str) -> Pod {
        serde_json::from_str(text).expect("a pod")
    }

    fn vmi(phase: &str, more: Value) -> DynamicObject {
        let mut vmi = json!({ "metadata": {}, "spec": {}, "status": { "phase": phase, "nodeName": "n" } });
        for (path, value) in more.as_object().expect("paths and values") {
            let (parent, key) = path.rsplit_once('/').expect("a path");
            vmi.pointer_mut(parent).expect("a parent")[key] = value.clone();
        }
        serde_json::from_value(vmi).expect("a VMI")
    }

    fn step(pod: &Pod, vmi: &DynamicObject) -> Option<(u128, Act)> {
        let script = Script::of(vmi).expect("a script");
        let view = View { pod, vmi: Some(vmi), script: &script, speed: &Speed::RECORDED };
        next(&view).map(|step| (step.after.as_millis(), step.act))
    }

    #[test]
    fn a_guest_ends_as_its_grace_and_its_script_have_it() {
        let deleted = json!({ "/metadata/deletionTimestamp": "2026-01-01T00:00:00Z" });
        let deleted_with = |more: Value| {
            let mut all = deleted.clone();
            all.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
            all
        };
        let script = |key: &str, value: &str| json!({ format!("guest.testbed/{key}"): value });
        let well = |after: u128| Some((after, Act::Finish { well: true }));
        let badly = |after: u128| Some((after, Act::Finish { well: false }));
        let table = [
            ("Running", json!({}), None),
            ("Running", deleted.clone(), well(2000)),
            ("Running", deleted_with(json!({ "/spec/terminationGracePeriodSeconds": 0 })), well(250)),
            ("Running", deleted_with(json!({ "/spec/terminationGracePeriodSeconds": 1 })), badly(1000)),
            (
                "Running",
                deleted_with(json!({ "/metadata/annotations": script("ignores-acpi", "true") })),
                badly(30_000),
            ),
            ("Running", deleted_with(json!({ "/metadata/annotations": script("shutdown", "5s") })), well(5000)),
            ("Running", json!({ "/metadata/annotations": script("do", "power-off") }), well(0)),
            ("Running", json!({ "/metadata/annotations": script("do", "crash") }), badly(0)),
            ("Scheduled", json!({}), Some((1000, Act::Run))),
            ("Scheduled", json!({ "/metadata/annotations": script("boot", "9s") }), Some((9000, Act::Run))),
            ("Scheduled", json!({ "/metadata/annotations": script("do", "fail-before-running") }), badly(500)),
            ("Scheduled", deleted, badly(250)),
            ("Succeeded", json!({}), Some((250, Act::EndPod))),
        ];
        for (phase, more, expected) in table {
            assert_eq!(step(&pod(BOUND), &vmi(phase, more.clone())), expected, "{phase} {more}");
        }
    }

    #[test]
    fn a_command_is_obeyed_once() {
        let told = |done: &str| json!({ "/metadata/annotations": { "guest.testbed/do": "pause 2", "guest.testbed/done": done } });
        let obeyed = Some((0, Act::Obey(Command::Pause)));
        assert_eq!(step(&pod(BOUND), &vmi("Running", told("pause"))), obeyed);
        assert_eq!(step(&pod(BOUND), &vmi("Running", told("pause 2"))), None);
    }

    #[test]
    fn a_pod_starts_step_by_step_unless_it_is_stuck() {
        let free = r#"{"spec":{"containers":[]}}"#;
        let ready =
            r#"{"spec":{"nodeName":"n","containers":[]},"status":{"conditions":[{"type":"Ready","status":"True"}]}}"#;
        let stuck = |why: &str| json!({ "/metadata/annotations": { "guest.testbed/never-schedules": why } });
        let table = [
            (free, json!({}), Some((300, Act::Bind))),
            (BOUND, json!({}), Some((500, Act::Ready))),
            (ready, json!({}), None),
            (free, stuck("unschedulable"), Some((300, Act::CallUnschedulable))),
            (free, stuck("image-pull"), Some((300, Act::Bind))),
            (BOUND, stuck("image-pull"), Some((500, Act::HoldUp("ImagePullBackOff")))),
            (BOUND, stuck("missing-secret"), Some((500, Act::HoldUp("ContainerCreating")))),
        ];
        for (text, more, expected) in table {
            assert_eq!(step(&pod(text), &vmi("Scheduling", more.clone())), expected, "{text} {more}");
        }
    }

    #[test]
    fn a_pod_is_not_ended_because_its_vmi_was_not_seen() {
        let script = Script::default();
        let step = |pod: &Pod| next(&View { pod, vmi: None, script: &script, speed: &Speed::FAST });
        assert_eq!(step(&pod(BOUND)), None);
        let deleted = pod(r#"{"metadata":{"deletionTimestamp":"2026-01-01T00:00:00Z"}}"#);
        assert_eq!(step(&deleted).map(|step| step.act), Some(Act::RemovePod));
    }
}
