//! Ends that nobody asked for: what the cluster says has become of a desktop.

use super::{Desktop, Fault, View};
use crate::crd::End;
use crate::model::{Now, RunStrategy, Seen, Vm, Vmi, VmiPhase};
use crate::reason::{self, Reason};
use crate::template::{Manifests, Refusal};

use super::start::Start;

impl Desktop<'_> {
    /// What the cluster says of an end that nobody asked for.
    pub(super) fn observed_end(
        &self,
        view: &View<'_>,
        to_make: Option<&Result<Manifests, Refusal>>,
        start: &Start,
        now: Now,
    ) -> Option<End> {
        let end = |reason, message: Option<String>| Some(reason::end(reason, message, now.cluster));
        let given_up = || start.given_up.clone().and_then(|cause| end(cause.reason, Some(cause.words)));
        match (&view.vm, &view.vmi) {
            (Seen::Unknown, _) | (_, Seen::Unknown) => None,
            (Seen::Absent, _) => match (to_make, self.failure(view)) {
                (None, _) if view.live => end(Reason::VmDeleted, None),
                (None, _) => None,
                (Some(Err(refusal)), _) if refusal.is_for_now() => None,
                (Some(Err(refusal)), _) => end(refusal.reason, Some(refusal.message.clone())),
                (Some(Ok(_)), Some(failure)) if failure.fault == Fault::Refused => {
                    end(Reason::Refused, Some(failure.words.clone()))
                }
                (Some(Ok(_)), _) => given_up(),
            },
            // A CR by hand that was deleted and applied anew: the VM of the first one goes first.
            (Seen::Present(vm), _) if self.is_predecessors(&vm.owner) => None,
            (Seen::Present(vm), _) if vm.owner.as_ref() != Some(&self.owner) => {
                let name = vm.name(view.key);
                end(Reason::NameTaken, Some(format!("there is a VirtualMachine {name} that is not of this desktop")))
            }
            (Seen::Present(vm), _) if vm.deleting => end(Reason::VmDeleted, None),
            // The VM that was recorded is gone, and somebody's late create made another one.
            (Seen::Present(vm), _) if self.recorded_vm().is_some_and(|uid| uid != vm.uid) => {
                end(Reason::VmDeleted, None)
            }
            (Seen::Present(vm), vmi) => {
                // That it has become ready may have been missed.
                let unready = || given_up().filter(|_| view.live);
                self.guest_end(vm, vmi.present(), view.live).and_then(|(r, m)| end(r, m)).or_else(unready)
            }
        }
    }

    /// Whether the guest is over for good, as KubeVirt will not start it again.
    fn guest_end(&self, vm: &Vm, vmi: Option<&Vmi>, live: bool) -> Option<(Reason, Option<String>)> {
        use RunStrategy::{Manual, Once, RerunOnFailure};
        match (vm.run_strategy, vmi) {
            // Under `Once` a VMI that somebody deletes is started anew, whatever it ends as; under `Manual` it was
            // stopped.
            (Once | Manual, Some(vmi)) if vmi.deleting => None,
            (Once | Manual | RerunOnFailure, Some(vmi)) if vmi.phase == VmiPhase::Succeeded => {
                let evicted = vmi.evicted || self.was_said(Reason::Evicted);
                Some((if evicted { Reason::Evicted } else { Reason::GuestShutdown }, None))
            }
            (Once | Manual, Some(vmi)) if vmi.phase == VmiPhase::Failed => {
                let reason = if vmi.node_lost || self.was_said(Reason::NodeLost) {
                    Reason::NodeLost
                } else if vmi.evicted || self.was_said(Reason::Evicted) {
                    Reason::Evicted
                } else {
                    Reason::GuestCrashed
                };
                Some((reason, vmi.waiting.as_ref().map(|(_, words)| words.clone())))
            }
            // KubeVirt deletes the VMI of a guest that powered off: its last word may have been missed.
            (RerunOnFailure, None) if live && self.has_run() && !vm.restart_pending => {
                let evicted = self.was_said(Reason::Evicted);
                Some((if evicted { Reason::Evicted } else { Reason::GuestShutdown }, None))
            }
            _ => None,
        }
    }
}
