//! The CR's status as a projection of what was seen, for people with kubectl.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::View;
use super::start::Start;
use crate::crd::{CyberdeskStatus, End, KopfStatus, Phase, StartClock, VirtualMachineRef};
use crate::model::{Cr, Now, Vmi};
use crate::names::Owner;
use crate::reason::{self, Reason};

/// Where a desktop is on its way.
#[derive(Clone, Copy, Debug)]
pub(super) enum Course<'a> {
    /// It lives, or comes to be.
    Lives(&'a Start),
    /// Its end is decided, and something of it may be left.
    Ends(&'a End),
    /// It is over: someone looked, and nothing of it is left.
    Over(&'a End),
}

/// Whether a CR has said its last word.
pub(super) fn is_over(status: &CyberdeskStatus) -> bool {
    status.end.is_some() && matches!(status.phase, Some(Phase::Terminated | Phase::Error))
}

/// The status that a CR should have. `judge` is the time by the clock that its deadline is judged by.
pub(super) fn project(
    view: &View<'_>,
    cr: &Cr,
    course: Course<'_>,
    expires_at: Timestamp,
    (judge, now): (Timestamp, Now),
    owner: &Owner,
) -> CyberdeskStatus {
    let before = &cr.status;
    let vm = view.vm.present().filter(|vm| vm.owner.as_ref() == Some(owner));
    let vmi = view.vmi.present().filter(|_| vm.is_some());
    let (start, over, end) = match course {
        Course::Lives(start) => (Some(start), false, None),
        Course::Ends(end) => (None, false, Some(end)),
        Course::Over(end) => (None, true, Some(end)),
    };
    let ready = start.is_some_and(|start| start.ready);
    let phase = match course {
        Course::Over(end) => end.phase,
        Course::Ends(_) => Phase::Stopping,
        Course::Lives(_) if ready => Phase::Running,
        Course::Lives(_) if vm.is_some() => Phase::Starting,
        Course::Lives(_) => Phase::Pending,
    };
    let obstacle = start.and_then(|start| start.obstacle.as_ref());
    let (reason, message) = match (end, obstacle) {
        (Some(end), _) => (Some(end.reason.clone()), end.message.clone()),
        (None, Some(cause)) => (Some(cause.reason.to_string()), Some(reason::cut(cause.words.clone()))),
        (None, None) => (None, None),
    };
    let clock = start.and_then(|start| start.clock.clone());
    let started = ready || before.start_time.is_some();
    // Node, address and UID are news once the guest is ready; before, they would cost a write of their own.
    let placed = vmi.filter(|_| started);
    let restarted = vmi.filter(|_| ready).is_some_and(|vmi| before.vmi_uid.as_ref().is_some_and(|uid| *uid != vmi.uid));

    let why = reason.clone().unwrap_or_else(|| format!("{phase:?}"));
    let words = message.clone().unwrap_or_default();
    let stuck = stuck(view, owner, course, now).map(|words| (Reason::TeardownStuck.to_string(), words));
    let until = clock.as_ref().map(|clock| with_clock(&words, clock)).unwrap_or_else(|| words.clone());
    let conditions = [
        ("Ready", ready, (why.clone(), words.clone())),
        ("Started", started, (why.clone(), until)),
        ("Ended", over, stuck.unwrap_or((why, words))),
    ];
    let made = vm
        .map(|vm| VirtualMachineRef { name: vm.name(view.key), uid: vm.uid.clone() })
        .or_else(|| before.virtual_machine_ref.clone());
    CyberdeskStatus {
        phase: Some(phase),
        conditions: Some(conditions.into_iter().map(|told| condition(cr, told, judge)).collect()),
        reason,
        message,
        observed_generation: Some(cr.generation),
        cyberdesk_create: made.as_ref().map(|vm| KopfStatus::of(&vm.name, expires_at)),
        virtual_machine_ref: made,
        start_clock: clock,
        start_time: before.start_time.or_else(|| ready.then(|| whole_seconds(judge))),
        vmi_uid: vmi.filter(|_| ready).map(|vmi| vmi.uid.clone()).or_else(|| before.vmi_uid.clone()),
        restarts: if restarted { Some(before.restarts.unwrap_or_default() + 1) } else { before.restarts },
        expiry_time: Some(whole_seconds(expires_at)),
        node: placed.map_or_else(|| before.node.clone(), |vmi| vmi.node.clone()),
        ip: placed.map_or_else(|| before.ip.clone(), |vmi| vmi.ip.clone()),
        end: end.cloned(),
    }
}

pub(super) fn condition(
    cr: &Cr,
    (kind, holds, (reason, message)): (&str, bool, (String, String)),
    now: Timestamp,
) -> Condition {
    let state = if holds { "True" } else { "False" };
    let last = cr.status.conditions.iter().flatten().find(|last| last.type_ == kind && last.status == state);
    Condition {
        type_: kind.to_owned(),
        status: state.to_owned(),
        reason,
        message,
        observed_generation: Some(cr.generation),
        last_transition_time: last.map_or_else(|| Time(whole_seconds(now)), |last| last.last_transition_time.clone()),
    }
}

/// What a start waits for, and for how long.
fn with_clock(words: &str, clock: &StartClock) -> String {
    let until = match (clock.deadline, clock.seconds_left) {
        (Some(deadline), _) => format!("given up at {deadline} if it is not ready by then"),
        (None, left) => format!("its start clock stands still, with {} s left", left.unwrap_or_default()),
    };
    if words.is_empty() { until } else { format!("{words}; {until}") }
}

/// What to say of a VMI that is still there though its grace is over.
fn stuck(view: &View<'_>, owner: &Owner, course: Course<'_>, now: Now) -> Option<String> {
    let late = |vmi: &&Vmi| vmi.owner.as_ref() == Some(owner) && vmi.gone_by.is_some_and(|by| by <= now.cluster);
    let vmi = view.vmi.present().filter(late).filter(|_| matches!(course, Course::Ends(_)))?;
    let node = vmi.node.as_deref().map(|node| format!(" on node {node}")).unwrap_or_default();
    let by = vmi.gone_by?;
    Some(format!("its VirtualMachineInstance{node} should have been gone by {by} and is still there"))
}

/// Times that people read in kubectl need no fractions.
pub(super) fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).expect("a whole second of a timestamp is a timestamp")
}
