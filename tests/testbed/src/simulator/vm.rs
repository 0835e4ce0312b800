//! What virt-controller does about one VirtualMachine: pure functions of VM, VMI and time.
//!
//! A pass over a VM is `sync` (at most one thing done to the world) and then `status` (what the VM says of itself). As
//! in KubeVirt the status is computed from the VMI as it was *before* the sync: a VM that has just made its VMI still
//! says that there is none, and one whose VMI has just ended still says that it is ready. Watchers must cope with
//! that; do not "fix" it.

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use std::time::Duration;

use super::admission::with_defaults;
use crate::kubevirt::{
    VM_CONTROLLER_FINALIZER, condition, has_finalizer, is_deleting, is_final, new_condition, phase, seconds,
    set_condition,
};

/// The longest pause between two starts that fail.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// The one thing to do about a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sync {
    /// Nothing.
    Rest,
    /// Let the VM go: its VMI is gone, or is meant to outlive it.
    Release,
    /// Delete the VMI.
    Stop,
    /// Delete the VMI, and note that another is to follow.
    Restart,
    /// Make a VMI.
    Start,
    /// Make a VMI, but not before this time has passed: the last starts have failed.
    StartIn(Duration),
}

/// How a VM is to be kept running. `running` is the old way to say `Always` or `Halted`.
pub(super) fn run_strategy(vm: &DynamicObject) -> &str {
    let spec = &vm.data["spec"];
    match spec["runStrategy"].as_str() {
        Some(strategy) => strategy,
        None if spec["running"] == true => "Always",
        None => "Halted",
    }
}

/// What to do, given the VM's own VMI if there is one.
pub(super) fn sync(vm: &DynamicObject, vmi: Option<&DynamicObject>, now: Timestamp) -> Sync {
    let stop = |vmi: &DynamicObject| {
        if is_deleting(vmi) { Sync::Rest } else { Sync::Stop }
    };
    if is_deleting(vm) {
        return match vmi {
            Some(vmi) if !has_finalizer(vm, "orphan") => stop(vmi),
            _ if has_finalizer(vm, VM_CONTROLLER_FINALIZER) => Sync::Release,
            _ => Sync::Rest,
        };
    }
    let request = &vm.data["status"]["stateChangeRequests"][0];
    let wants_start = request["action"] == "Start";
    let wants_stop =
        |vmi: &DynamicObject| request["action"] == "Stop" && request["uid"].as_str() == vmi.uid().as_deref();
    let strategy = run_strategy(vm);
    match (strategy, vmi) {
        ("Always", Some(vmi)) if is_final(vmi) || wants_stop(vmi) => stop(vmi),
        ("Always", None) => start_after_pause(vm, now),
        ("RerunOnFailure", Some(vmi)) if is_deleting(vmi) => Sync::Rest,
        ("RerunOnFailure", Some(vmi)) if phase(vmi) == "Failed" => Sync::Restart,
        ("RerunOnFailure", Some(vmi)) if is_final(vmi) || wants_stop(vmi) => Sync::Stop,
        // Has run under this strategy before: only a request starts it again.
        ("RerunOnFailure", None) if !wants_start && vm.data["status"]["runStrategy"] == strategy => Sync::Rest,
        ("RerunOnFailure", None) => start_after_pause(vm, now),
        ("Once", None) => Sync::Start,
        ("Manual", Some(vmi)) if wants_stop(vmi) => stop(vmi),
        ("Manual", None) if wants_start => Sync::Start,
        ("Halted", Some(vmi)) => stop(vmi),
        _ => Sync::Rest,
    }
}

fn start_after_pause(vm: &DynamicObject, now: Timestamp) -> Sync {
    let retry_after = vm.data["status"]["startFailure"]["retryAfterTimestamp"].as_str();
    let left = retry_after.and_then(|time| time.parse::<Timestamp>().ok()).map(|time| time.duration_since(now));
    match left.and_then(|left| Duration::try_from(left).ok()) {
        Some(left) if !left.is_zero() => Sync::StartIn(left),
        _ => Sync::Start,
    }
}

/// The pause after this many failed starts: it grows with the square, and `jitter` (0 to 1) adds up to a half.
fn pause(failures: u64, base: Duration, jitter: f64) -> Duration {
    let squared = u32::try_from(failures * failures).unwrap_or(u32::MAX);
    base.saturating_mul(squared).mul_f64(1.0 + jitter / 2.0).min(LONGEST_PAUSE)
}

/// What is needed besides the objects to write a VM's status.
pub(super) struct Circumstances<'a> {
    /// Why the sync failed, if it did.
    pub(super) failure: Option<&'a str>,
    /// Whether the sync has made a VMI, which is not seen yet.
    pub(super) made_one: bool,
    /// Now.
    pub(super) now: Timestamp,
    /// The pause after the first failed start.
    pub(super) back_off: Duration,
    /// 0 to 1.
    pub(super) jitter: f64,
}

/// The VM's next status.
pub(super) fn status(vm: &DynamicObject, vmi: Option<&DynamicObject>, around: &Circumstances<'_>) -> Value {
    let mut status = match &vm.data["status"] {
        Value::Object(old) => Value::Object(old.clone()),
        _ => json!({}),
    };
    let ready = vmi.and_then(|vmi| condition(&vmi.data["status"], "Ready")).filter(|ready| ready["status"] == "True");
    // Absent when false, as Go's `omitempty` has it.
    set_flag(&mut status, "created", vmi.is_some());
    set_flag(&mut status, "ready", ready.is_some());
    if vmi.is_some() || status["runStrategy"].is_string() {
        status["runStrategy"] = json!(run_strategy(vm));
    }
    if request_is_done(&status, vmi) {
        drop_first_request(&mut status);
    }
    sync_start_failure(&mut status, vm, vmi, around);
    sync_conditions(&mut status, vmi, around);
    sync_restart_required(&mut status, vm, vmi, around);
    status["printableStatus"] = json!(printable(vm, vmi, &status, around.made_one));
    status
}

fn set_flag(status: &mut Value, key: &str, value: bool) {
    if value {
        status[key] = json!(true);
    } else if let Some(fields) = status.as_object_mut() {
        fields.remove(key);
    }
}

fn request_is_done(status: &Value, vmi: Option<&DynamicObject>) -> bool {
    let request = &status["stateChangeRequests"][0];
    match (request["action"].as_str(), vmi) {
        (Some("Start"), Some(vmi)) => !is_deleting(vmi) && !is_final(vmi),
        (Some("Stop"), Some(vmi)) => request["uid"].as_str() != vmi.uid().as_deref(),
        (Some("Stop"), None) => true,
        _ => false,
    }
}

fn drop_first_request(status: &mut Value) {
    let left: Vec<Value> = status["stateChangeRequests"].as_array().into_iter().flatten().skip(1).cloned().collect();
    match status.as_object_mut() {
        Some(fields) if left.is_empty() => drop(fields.remove("stateChangeRequests")),
        Some(fields) => drop(fields.insert("stateChangeRequests".into(), Value::Array(left))),
        None => {}
    }
}

/// Only a VMI that ends without ever having run counts as a failed start; one that runs clears the count.
fn sync_start_failure(status: &mut Value, vm: &DynamicObject, vmi: Option<&DynamicObject>, around: &Circumstances<'_>) {
    let counts = matches!(run_strategy(vm), "Always" | "RerunOnFailure" | "Once");
    if !counts || vmi.is_some_and(has_run) {
        if let Some(fields) = status.as_object_mut() {
            fields.remove("startFailure");
        }
    } else if let Some(vmi) = vmi.filter(|vmi| is_final(vmi)) {
        let last = &status["startFailure"];
        if last["lastFailedVMIUID"].as_str() == vmi.uid().as_deref() {
            return;
        }
        let failures = last["consecutiveFailCount"].as_u64().unwrap_or(0) + 1;
        let pause = pause(failures, around.back_off, around.jitter);
        status["startFailure"] = json!({
            "consecutiveFailCount": failures,
            "lastFailedVMIUID": vmi.uid(),
            "retryAfterTimestamp": seconds(around.now + pause),
        });
    }
}

fn has_run(vmi: &DynamicObject) -> bool {
    let times = vmi.data["status"]["phaseTransitionTimestamps"].as_array();
    times.into_iter().flatten().any(|entry| entry["phase"] == "Running")
}

fn sync_conditions(status: &mut Value, vmi: Option<&DynamicObject>, around: &Circumstances<'_>) {
    let now = around.now;
    let ready = match vmi.map(|vmi| condition(&vmi.data["status"], "Ready")) {
        Some(Some(ready)) => ready.clone(),
        Some(None) => new_condition("Ready", false, "VMIConditionMissing", "VMI is missing the Ready condition", now),
        None => new_condition("Ready", false, "VMINotExists", "VMI does not exist", now),
    };
    set_condition(status, "Ready", Some(ready));
    let failure = around.failure.map(|message| new_condition("Failure", true, "FailedCreate", message, now));
    set_condition(status, "Failure", failure);
    let Some(vmi) = vmi else { return };

    let own = ["Ready", "Failure", "RestartRequired"];
    let copied: Vec<Value> = vmi.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let kind = |condition: &Value| condition["type"].as_str().unwrap_or_default().to_owned();
    for old in status["conditions"].as_array().cloned().unwrap_or_default().iter().map(kind) {
        if !own.contains(&old.as_str()) && !copied.iter().any(|new| new["type"] == old.as_str()) {
            set_condition(status, &old, None);
        }
    }
    for new in copied {
        let kind = kind(&new);
        if !own.contains(&kind.as_str()) {
            set_condition(status, &kind, Some(new));
        }
    }
}

/// Set while the VMI is not the one that the template would make now; it stays until another is made.
///
/// KubeVirt compares with its record of the template at the start; here the VMI itself is that record.
fn sync_restart_required(
    status: &mut Value,
    vm: &DynamicObject,
    vmi: Option<&DynamicObject>,
    around: &Circumstances<'_>,
) {
    const WORDS: &str = "a non-live-updatable field was changed in the template spec";
    let required = match vmi {
        _ if is_deleting(vm) => return,
        Some(vmi) => !is_made_from(vmi, &vm.data["spec"]["template"]["spec"]),
        None if around.made_one => false,
        None => return,
    };
    set_condition(
        status,
        "RestartRequired",
        required.then(|| new_condition("RestartRequired", true, "", WORDS, around.now)),
    );
}

fn is_made_from(vmi: &DynamicObject, template: &Value) -> bool {
    let (spec, mut template) = (&vmi.data["spec"], template.clone());
    let uuid = &spec["domain"]["firmware"]["uuid"];
    if template["domain"]["firmware"]["uuid"].is_null() && uuid.is_string() {
        template["domain"]["firmware"]["uuid"] = uuid.clone();
    }
    template == *spec || with_defaults(template) == *spec
}

/// The word that `kubectl get vm` shows. First match wins.
fn printable(vm: &DynamicObject, vmi: Option<&DynamicObject>, status: &Value, made_one: bool) -> &'static str {
    if is_deleting(vm) {
        return "Terminating";
    }
    let failed_starts = status["startFailure"]["consecutiveFailCount"].as_u64().unwrap_or(0);
    let at_rest = match failed_starts {
        _ if vmi.is_none() && made_one => "Starting",
        0 => "Stopped",
        _ => "CrashLoopBackOff",
    };
    let Some(vmi) = vmi.filter(|vmi| !is_final(vmi)) else {
        return at_rest;
    };
    let said = |kind: &str, reason: &str| {
        condition(&vmi.data["status"], kind).is_some_and(|it| it["status"] == "False" && it["reason"] == reason)
    };
    let paused = condition(&vmi.data["status"], "Paused").is_some_and(|paused| paused["status"] == "True");
    match phase(vmi) {
        _ if is_deleting(vmi) => "Stopping",
        "Running" if paused => "Paused",
        "Running" => "Running",
        _ if said("PodScheduled", "Unschedulable") => "ErrorUnschedulable",
        _ if said("Synchronized", "ErrImagePull") => "ErrImagePull",
        _ if said("Synchronized", "ImagePullBackOff") => "ImagePullBackOff",
        "Pending" | "Scheduling" | "Scheduled" => "Starting",
        _ => "Unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).expect("an object")
    }

    /// Rows of KubeVirt's table: strategy, the VMI's end (or none yet), what was there before, what is done.
    #[test]
    fn each_strategy_treats_each_end_in_its_own_way() {
        let vmi = |phase: &str| Some(object(json!({ "metadata": { "uid": "v" }, "status": { "phase": phase } })));
        let started = json!({ "runStrategy": "RerunOnFailure" });
        let asked = json!({ "runStrategy": "RerunOnFailure", "stateChangeRequests": [{ "action": "Start" }] });
        let table = [
            ("Always", json!({}), None, Sync::Start),
            ("Always", json!({}), vmi("Succeeded"), Sync::Stop),
            ("Always", json!({}), vmi("Failed"), Sync::Stop),
            ("Always", json!({}), vmi("Running"), Sync::Rest),
            ("RerunOnFailure", json!({}), None, Sync::Start),
            ("RerunOnFailure", started.clone(), None, Sync::Rest),
            ("RerunOnFailure", asked, None, Sync::Start),
            ("RerunOnFailure", started.clone(), vmi("Succeeded"), Sync::Stop),
            ("RerunOnFailure", started, vmi("Failed"), Sync::Restart),
            ("Once", json!({}), None, Sync::Start),
            ("Once", json!({}), vmi("Succeeded"), Sync::Rest),
            ("Once", json!({}), vmi("Failed"), Sync::Rest),
            ("Manual", json!({}), None, Sync::Rest),
            ("Manual", json!({ "stateChangeRequests": [{ "action": "Start" }] }), None, Sync::Start),
            (
                "Manual",
                json!({ "stateChangeRequests": [{ "action": "Stop", "uid": "v" }] }),
                vmi("Running"),
                Sync::Stop,
            ),
            (
                "Manual",
                json!({ "stateChangeRequests": [{ "action": "Stop", "uid": "w" }] }),
                vmi("Running"),
                Sync::Rest,
            ),
            ("Halted", json!({}), vmi("Running"), Sync::Stop),
            ("Halted", json!({}), None, Sync::Rest),
        ];
        for (strategy, status, vmi, expected) in table {
            let vm = object(json!({ "metadata": {}, "spec": { "runStrategy": strategy }, "status": status }));
            let done = sync(&vm, vmi.as_ref(), Timestamp::UNIX_EPOCH);
            assert_eq!(done, expected, "{strategy}, {}, {:?}", vm.data["status"], vmi.as_ref().map(phase));
        }
    }

    #[test]
    fn an_edit_requires_a_restart_until_another_vmi_is_made() {
        let vm = |grace: u64, status: &Value| {
            let template = json!({ "spec": { "domain": { "firmware": { "uuid": "u" } }, "terminationGracePeriodSeconds": grace } });
            object(
                json!({ "metadata": {}, "spec": { "runStrategy": "Always", "template": template }, "status": status }),
            )
        };
        let started = vm(30, &json!({}));
        let made = with_defaults(started.data["spec"]["template"]["spec"].clone());
        let vmi = object(json!({ "metadata": { "uid": "v" }, "spec": made, "status": { "phase": "Running" } }));
        let after = |vm: &DynamicObject, vmi, made_one| {
            let back_off = Duration::from_secs(10);
            let around = Circumstances { failure: None, made_one, now: Timestamp::UNIX_EPOCH, back_off, jitter: 0.0 };
            status(vm, vmi, &around)
        };
        let required = |status: &Value| condition(status, "RestartRequired").is_some();
        assert!(!required(&after(&started, Some(&vmi), false)));
        let edited = after(&vm(20, &json!({})), Some(&vmi), false);
        assert!(required(&edited));
        assert!(!required(&after(&vm(30, &edited), Some(&vmi), false)), "an edit that is taken back");
        assert!(required(&after(&vm(20, &edited), None, false)), "stopped");
        assert!(!required(&after(&vm(20, &edited), None, true)), "started anew");
    }

    #[test]
    fn the_pause_grows_with_the_square_up_to_five_minutes() {
        let base = Duration::from_secs(10);
        let pauses: Vec<u64> = (1..=6).map(|failures| pause(failures, base, 0.0).as_secs()).collect();
        assert_eq!(pauses, [10, 40, 90, 160, 250, 300]);
        assert_eq!(pause(1, base, 1.0).as_secs(), 15);
    }
}
