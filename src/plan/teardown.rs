//! The way to an end that is decided, and what is left of desktops that are over.

use std::time::Duration;

use super::status::Course;
use super::{Action, Desktop, Plan, View};
use crate::crd::{End, Phase};
use crate::model::{Cr, Now, Report, Row, RowStatus, Seen};
use crate::names::{Owner, secrets_by_hand};

impl Desktop<'_> {
    /// Brings a desktop whose end is decided to it: VM first, then the word that it is over, CR last.
    pub(super) fn end(&self, view: &View<'_>, end: &End, now: Now) -> Plan {
        let mut actions: Vec<Action> = self.status(view, Course::Ends(end), now).into_iter().collect();
        let ours = |owner: &Option<Owner>| owner.as_ref() == Some(&self.owner) || self.is_predecessors(owner);
        match (&view.vm, &view.vmi) {
            (Seen::Unknown, _) | (_, Seen::Unknown) => (),
            (Seen::Present(vm), _) if ours(&vm.owner) => {
                if !vm.deleting {
                    actions.push(Action::delete(vm));
                }
            }
            (_, Seen::Present(vmi)) if ours(&vmi.owner) => {
                if !vmi.deleting {
                    actions.push(Action::DeleteVmi { uid: vmi.uid.clone() });
                }
            }
            // A CR by hand whose last word is written has nothing more to be looked for.
            _ if self.row.is_none() && self.status(view, Course::Over(end), now).is_none() => return Plan::nothing(),
            _ if !view.live => actions.push(Action::LookLive),
            _ => {
                let secrets = Action::DeleteSecrets { selector: self.owner.secret_selector(view.key) };
                match self.row {
                    Some(row) => {
                        // Where the end is recorded already, its last word is the row's.
                        if self.cr.is_some_and(|cr| cr.status.end.is_some()) {
                            actions.clear();
                        }
                        actions.extend([secrets, Action::Report(last_word(row, end, self.recorded_vm()))]);
                    }
                    None => {
                        actions = vec![secrets];
                        actions.extend(self.status(view, Course::Over(end), now));
                    }
                }
            }
        }
        Plan { actions, wait: self.until_stuck(view, now), ..Plan::default() }
    }

    /// Time until a VMI that is being deleted should be gone.
    fn until_stuck(&self, view: &View<'_>, now: Now) -> Option<Duration> {
        let left = view.vmi.present()?.gone_by?.duration_since(now.cluster);
        left.is_positive().then(|| left.unsigned_abs())
    }
}

fn last_word(row: &Row, end: &End, vm_uid: Option<&str>) -> Report {
    let status = if end.phase == Phase::Error { RowStatus::Error } else { RowStatus::Terminated };
    Report {
        id: row.id,
        generation: row.generation,
        vm_uid: vm_uid.map(str::to_owned),
        status: Some(status),
        reason: Some(end.reason.clone()),
        message: end.message.clone(),
        stream_url: None,
        ended: true,
    }
}

/// The row is over: nothing of it may be left. A create that landed late is found here too.
pub(super) fn clear_away(view: &View<'_>, row: &Row, cr: Option<&Cr>) -> Plan {
    let ours = |owner: &Option<Owner>| owner.as_ref() == Some(&Owner::Row(row.id));
    let actions = match (&view.vm, &view.vmi) {
        (Seen::Unknown, _) | (_, Seen::Unknown) => vec![],
        (Seen::Present(vm), _) if ours(&vm.owner) && vm.deleting => vec![],
        (Seen::Present(vm), _) if ours(&vm.owner) => {
            let selector = Owner::Row(row.id).secret_selector(view.key);
            vec![Action::DeleteSecrets { selector }, Action::delete(vm)]
        }
        (_, Seen::Present(vmi)) if ours(&vmi.owner) && vmi.deleting => vec![],
        (_, Seen::Present(vmi)) if ours(&vmi.owner) => vec![Action::DeleteVmi { uid: vmi.uid.clone() }],
        _ => match cr {
            Some(cr) if cr.deleting => vec![],
            Some(cr) => vec![Action::DeleteCr { uid: cr.uid.clone() }],
            None => vec![Action::Forget],
        },
    };
    Plan { actions, ..Plan::default() }
}

/// Neither row nor CR: what a desktop by hand left behind when its CR was deleted goes too.
pub(super) fn collect_leftovers(view: &View<'_>) -> Plan {
    let by_hand = |owner: &Option<Owner>| matches!(owner, Some(Owner::Hand(_)));
    let actions = match (&view.vm, &view.vmi) {
        (Seen::Unknown, _) | (_, Seen::Unknown) => vec![],
        (Seen::Present(vm), _) if by_hand(&vm.owner) && !vm.deleting => {
            let selector = secrets_by_hand(view.key);
            vec![Action::DeleteSecrets { selector }, Action::delete(vm)]
        }
        (Seen::Absent, Seen::Present(vmi)) if by_hand(&vmi.owner) && !vmi.deleting => {
            vec![Action::DeleteVmi { uid: vmi.uid.clone() }]
        }
        (Seen::Present(_), _) | (_, Seen::Present(_)) => vec![],
        // A row's Secret went before its row was over.
        (Seen::Absent, Seen::Absent) if view.key.row_id().is_some() => vec![Action::Forget],
        (Seen::Absent, Seen::Absent) => {
            vec![Action::DeleteSecrets { selector: secrets_by_hand(view.key) }, Action::Forget]
        }
    };
    Plan { actions, ..Plan::default() }
}
