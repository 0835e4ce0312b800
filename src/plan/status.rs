//! The CR's status as a projection of what was seen, for people with kubectl.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::View;
use crate::crd::{CyberdeskStatus, End, Phase, VirtualMachineRef};
use crate::model::{Cr, Vmi, VmiPhase};
use crate::names::Owner;
use crate::reason;

/// Why a desktop waits while an administrator has set `cyberdesk.settings.paused`.
const MAKING_PAUSED: &str = "an administrator has paused the making of new desktops";

/// Where a desktop is on its way.
#[derive(Clone, Copy, Debug)]
pub(super) enum Course<'a> {
    /// It lives, or comes to be.
    Lives,
    /// Its end is decided, and something of it may be left.
    Ends(&'a End),
    /// It is over: someone looked, and nothing of it is left.
    Over(&'a End),
}

/// Whether the guest can be used. KubeVirt leaves `Ready` as it was on a VMI that has ended or is being deleted.
pub(super) fn is_ready(vmi: &Vmi) -> bool {
    vmi.ready && vmi.phase == VmiPhase::Running && !vmi.deleting
}

/// Whether a CR has said its last word.
pub(super) fn is_over(status: &CyberdeskStatus) -> bool {
    status.end.is_some() && matches!(status.phase, Some(Phase::Terminated | Phase::Error))
}

/// The status that a CR should have. `now` is by the clock that its deadline is judged by.
pub(super) fn project(
    view: &View<'_>,
    cr: &Cr,
    course: Course<'_>,
    expires_at: Timestamp,
    now: Timestamp,
    owner: &Owner,
) -> CyberdeskStatus {
    let before = &cr.status;
    let vm = view.vm.present().filter(|vm| vm.owner.as_ref() == Some(owner));
    let vmi = view.vmi.present().filter(|_| vm.is_some());
    let ready = vmi.is_some_and(is_ready);
    let phase = match course {
        Course::Over(end) => end.phase,
        Course::Ends(_) => Phase::Stopping,
        Course::Lives if ready => Phase::Running,
        Course::Lives if vm.is_some() => Phase::Starting,
        Course::Lives => Phase::Pending,
    };
    let (over, end) = match course {
        Course::Lives => (false, None),
        Course::Ends(end) => (false, Some(end)),
        Course::Over(end) => (true, Some(end)),
    };
    // Until the guest runs, KubeVirt's own words for what it waits for are all there is to say.
    let not_made = view.failure.filter(|failure| failure.owner == *owner && vm.is_none());
    let held_up = not_made
        .map(|failure| ("NotCreated".to_owned(), reason::cut(failure.words.clone())))
        .or_else(|| (view.paused && vm.is_none()).then(|| ("MakingPaused".to_owned(), MAKING_PAUSED.to_owned())))
        .or_else(|| vm.and_then(|vm| vm.failure.clone().map(|words| ("FailedCreate".to_owned(), reason::cut(words)))))
        .or_else(|| vmi.and_then(|vmi| vmi.waiting.clone()).map(|(why, words)| (why, reason::cut(words))))
        .filter(|_| !ready);
    let (why, message) = match (end, held_up) {
        (Some(end), _) => (Some(end.reason.clone()), end.message.clone()),
        (None, Some((why, words))) => (Some(why), Some(words)),
        (None, None) => (None, None),
    };
    // Node and address are news once the guest is ready; before, they would cost a write of their own.
    let placed = vmi.filter(|_| ready || before.start_time.is_some());
    let condition = |kind: &str, holds: bool| {
        let state = if holds { "True" } else { "False" };
        let reason = why.clone().unwrap_or_else(|| format!("{phase:?}"));
        let last = before.conditions.iter().flatten().find(|c| c.type_ == kind);
        let since = last
            .filter(|last| last.status == state)
            .map_or_else(|| Time(whole_seconds(now)), |last| last.last_transition_time.clone());
        Condition {
            type_: kind.to_owned(),
            status: state.to_owned(),
            reason,
            message: message.clone().unwrap_or_default(),
            observed_generation: Some(cr.generation),
            last_transition_time: since,
        }
    };
    CyberdeskStatus {
        phase: Some(phase),
        conditions: Some(vec![condition("Ready", ready && end.is_none()), condition("Ended", over)]),
        reason: why.clone(),
        message: message.clone(),
        observed_generation: Some(cr.generation),
        virtual_machine_ref: vm
            .map(|vm| VirtualMachineRef { name: view.key.vm_name(), uid: vm.uid.clone() })
            .or_else(|| before.virtual_machine_ref.clone()),
        start_time: before.start_time.or_else(|| ready.then(|| whole_seconds(now))),
        expiry_time: Some(whole_seconds(expires_at)),
        node: placed.map_or_else(|| before.node.clone(), |vmi| vmi.node.clone()),
        ip: placed.map_or_else(|| before.ip.clone(), |vmi| vmi.ip.clone()),
        end: end.cloned(),
    }
}

/// Times that people read in kubectl need no fractions.
fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).expect("a whole second of a timestamp is a timestamp")
}
