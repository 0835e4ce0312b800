//! Desktops of rows while the database is away: what is not asked of it is read from the CR.
//!
//! The CR has the row's deadline, the VM that was recorded, and the end that was decided. That is enough to bring a
//! desktop to an end that the cluster or its deadline has decided: neither asks for anything that only the row
//! knows, and the end stands in the CR until the row has it. It is not enough to make anything.
//!
//! How long the database must have been silent is weighed against an extension that it has and we have not seen, for
//! an end decided so beats it. A leader that has read the rows misses one of the last second at most. One that starts
//! has only the CRs, and those may be older: it first lets a connection time out.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::{Action, Desktop, Plan, View};
use crate::crd::End;
use crate::model::{Cr, Now, Row, Seen, Vm};
use crate::names::Owner;
use crate::reason::{self, Reason};

/// A database is away when none of what it is told was answered for so long.
const UNANSWERED: SignedDuration = SignedDuration::from_secs(1);
/// To a leader that has yet to read the rows, it is away when it could not be read for so long.
const UNREAD: SignedDuration = SignedDuration::from_secs(5);

/// What the owner is told who has extended a desktop in the meantime.
const WORDS: &str = "the deadline of the desktop came while the database did not answer";

/// The row of this CR could not be read.
pub(super) fn plan(view: &View<'_>, cr: &Cr, now: Now) -> Plan {
    let left = UNREAD - view.silence.reads;
    if left.is_positive() {
        return Plan { wait: Some(left.unsigned_abs()), ..Plan::default() };
    }
    // Of a CR that nobody has marked, only what we have made for it tells that there is no row.
    let its = |vm: &Vm| vm.owner == Some(Owner::Hand(cr.uid.clone()));
    let was_served = cr.status.virtual_machine_ref.is_some() && view.vm.present().is_none_or(its);
    match (&cr.owner, view.key.row_id()) {
        _ if !cr.status_readable => Plan::nothing(),
        // Another database's is left alone, whether or not ours can be read.
        (Some(Owner::Row(id)), Some(key)) if *id == key && cr.database.is_some() && cr.database == view.database => {
            of_row(view, cr, key, now)
        }
        (None, _) if was_served && !cr.deleting => {
            Desktop::by_hand(cr).map_or_else(|_| Plan::nothing(), |desktop| desktop.plan(view, now))
        }
        _ => Plan::nothing(),
    }
}

fn of_row(view: &View<'_>, cr: &Cr, id: Uuid, now: Now) -> Plan {
    let Some(expires_at) = deadline_of(cr) else { return Plan::nothing() };
    let owner = Owner::Row(id);
    let desktop = Desktop { owner, row: None, cr: Some(cr), params: None, due_at: expires_at, expires_at };
    // Whether a VM is still to be made is the row's to say.
    let was_made = view.vm != Seen::Absent || desktop.recorded_vm().is_some() || cr.status.end.is_some();
    if was_made { desktop.plan(view, now) } else { Plan::nothing() }
}

/// The row's deadline, as its CR has it.
fn deadline_of(cr: &Cr) -> Option<Timestamp> {
    cr.spec.as_ref().ok().and_then(|spec| spec.expires_at).or(cr.status.expiry_time)
}

impl Desktop<'_> {
    /// Its row is due. The database ends it, where its row lock decides against an extension; if it does not answer,
    /// the deadline that the row had does. An idle timeout is not that: who knows whether it was touched.
    pub(super) fn expire(&self, view: &View<'_>, row: &Row, now: Now) -> Plan {
        let left = self.expires_at.duration_since(now.database);
        let ask = |wait: Option<Duration>| Plan { actions: vec![Action::Expire(row.id)], wait, ..Plan::default() };
        if left.is_positive() {
            return ask(Some(left.unsigned_abs()));
        }
        let patience = UNANSWERED - view.silence.writes;
        if patience.is_positive() {
            return ask(Some(patience.unsigned_abs()));
        }
        let was_made = view.vm != Seen::Absent || self.recorded_vm().is_some();
        match self.cr {
            // There is nothing that a deadline could save.
            _ if !was_made => ask(None),
            // The end must have a place to stand in.
            None => Plan { actions: self.project(), ..Plan::default() },
            Some(_) => self.end(view, &self.timeout(now), now),
        }
    }

    /// The end of a desktop whose deadline has come.
    pub(super) fn timeout(&self, now: Now) -> End {
        let words = matches!(self.owner, Owner::Row(_)).then(|| WORDS.to_owned());
        reason::end(Reason::Timeout, words, now.cluster)
    }
}
