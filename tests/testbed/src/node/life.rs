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
    /// The kubelet says that the pod runs and is ready.
    Ready,
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
    let at_once = |act| {
        Some(Step {
            after: Duration::ZERO,
            act,
        })
    };
    let Some(vmi) = view.vmi else {
        // Not in the cache (yet). Only a deletion is acted on: nothing may end a pod because its VMI was not seen.
        return if is_deleting(view.pod) {
            at_once(Act::RemovePod)
        } else {
            None
        };
    };
    let deleting = is_deleting(vmi) || is_deleting(view.pod);
    match phase(vmi) {
        "Succeeded" | "Failed" => after_the_guest(view),
        "Running" | "Scheduled" if elsewhere(view.pod, vmi) => {
            // The other pod of a migration: the guest is not in it (any more).
            if is_deleting(view.pod) {
                at_once(Act::RemovePod)
            } else {
                None
            }
        }
        "Running" if deleting => Some(shut_down(view, vmi)),
        "Running" => live(view, vmi),
        "Scheduled" if deleting => at_once(Act::Finish { well: false }),
        "Scheduled" => match view.script.due(vmi) {
            Some(Command::FailBeforeRunning) => Some(Step {
                after: boot(view) / 2,
                act: Act::Finish { well: false },
            }),
            _ => Some(Step {
                after: boot(view),
                act: Act::Run,
            }),
        },
        _ if is_deleting(view.pod) => Some(Step {
            after: view.speed.pod_end,
            act: Act::RemovePod,
        }),
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
        _ if is_ready(view.pod) => None,
        _ => step(view.speed.pod_ready, Act::Ready),
    }
}

fn hold_up(view: &View<'_>, reason: &'static str) -> Option<Step> {
    let waits_already = waiting_reason(view.pod) == Some(reason);
    (!waits_already).then_some(Step {
        after: view.speed.pod_ready,
        act: Act::HoldUp(reason),
    })
}

/// A running guest that nobody wants to end.
fn live(view: &View<'_>, vmi: &DynamicObject) -> Option<Step> {
    if let Some(command) = view.script.due(vmi) {
        let act = match command {
            Command::PowerOff => Act::Finish { well: true },
            Command::Crash => Act::Finish { well: false },
            // It runs: too late for that one, which is noted without an effect.
            other => Act::Obey(other),
        };
        return Some(Step {
            after: Duration::ZERO,
            act,
        });
    }
    let connected = condition(&vmi.data["status"], "AgentConnected").is_some();
    let after = view
        .script
        .agent
        .filter(|_| !connected && view.script.command.is_none())?;
    Some(Step {
        after,
        act: Act::Obey(Command::AgentConnect),
    })
}

/// The power button has been pressed: the guest obeys in its own time, or is killed when its grace ends.
fn shut_down(view: &View<'_>, vmi: &DynamicObject) -> Step {
    let seconds = vmi.data["spec"]["terminationGracePeriodSeconds"]
        .as_i64()
        .unwrap_or(DEFAULT_GRACE_SECONDS);
    let grace = Duration::from_secs(seconds.max(0).unsigned_abs());
    let takes = view.script.shutdown.unwrap_or(view.speed.shutdown);
    if grace.is_zero() {
        // Killed at once by wish: KubeVirt calls that a success.
        Step {
            after: Duration::ZERO,
            act: Act::Finish { well: true },
        }
    } else if view.script.ignores_acpi || takes > grace {
        Step {
            after: grace,
            act: Act::Finish { well: false },
        }
    } else {
        Step {
            after: takes,
            act: Act::Finish { well: true },
        }
    }
}

/// The guest has ended; the pod follows.
fn after_the_guest(view: &View<'_>) -> Option<Step> {
    let ended = matches!(pod_phase(view.pod), "Succeeded" | "Failed");
    match (ended, is_deleting(view.pod)) {
        (false, _) => Some(Step {
            after: view.speed.pod_end,
            act: Act::EndPod,
        }),
        (true, true) => Some(Step {
            after: Duration::ZERO,
            act: Act::RemovePod,
        }),
        (true, false) => None,
    }
}

fn elsewhere(pod: &Pod, vmi: &DynamicObject) -> bool {
    vmi.data["status"]["nodeName"]
        .as_str()
        .is_some_and(|node| node_name(pod) != Some(node))
}

/// The node that the pod is bound to.
pub(super) fn node_name(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

fn pod_phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
        .unwrap_or_default()
}

fn pod_condition(pod: &Pod, kind: &str) -> Option<&'static str> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let found = conditions
        .iter()
        .find(|condition| condition.type_ == kind)?;
    Some(if found.status == "True" {
        "True"
    } else {
        "False"
    })
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
    statuses
        .iter()
        .find_map(|status| status.state.as_ref()?.waiting.as_ref()?.reason.as_deref())
}
