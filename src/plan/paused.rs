//! Desktops that a person has paused, by annotation of the CR or in SQL: nothing of them is made, changed or deleted,
//! neither a deadline nor a guest nor a shutdown request ends them, and the CR says so. Once resumed, all that has come
//! due meanwhile is done. The clock of a start stands still until then.

use jiff::SignedDuration;

use super::start::tick;
use super::status::{condition, is_over};
use super::{Action, Plan, View};
use crate::crd::{CyberdeskStatus, Phase};
use crate::model::{Now, Seen};
use crate::reason::Reason;

/// The condition of a CR that is paused. There is none on one that is not.
const CONDITION: &str = "Paused";

const BY_ROW: &str = "an administrator has paused the desktop, by cyberdesk.pause_desktop";
const BY_ANNOTATION: &str = "somebody has paused the desktop, by the annotation cyberdesk.io/paused";

/// Whether a CR says that it is paused.
pub(crate) fn says_paused(status: &CyberdeskStatus) -> bool {
    words_of(status).is_some()
}

fn words_of(status: &CyberdeskStatus) -> Option<&str> {
    let told = status.conditions.iter().flatten().find(|told| told.type_ == CONDITION && told.status == "True");
    told.map(|told| told.message.as_str())
}

/// Who has paused it, in words. `None`: it goes on.
pub(super) fn why<'v>(view: &'v View<'_>) -> Option<&'v str> {
    let cr = view.cr.present();
    match &view.row {
        // Once it is over, its row has nothing to hold.
        Seen::Present(row) if row.paused && !row.ended => Some(BY_ROW),
        _ if cr.is_some_and(|cr| cr.paused) => Some(BY_ANNOTATION),
        // While the database is away, what it said last holds.
        Seen::Unknown => cr.and_then(|cr| words_of(&cr.status)).filter(|words| *words == BY_ROW),
        Seen::Present(_) | Seen::Absent => None,
    }
}

/// Says that it is paused, on a CR that is ours to write and has not said its last word.
pub(super) fn plan(view: &View<'_>, words: &str, now: Now) -> Plan {
    let ours = |owned: bool, same_database: bool| !owned || same_database || view.row.present().is_some();
    let cr = view.cr.present().filter(|cr| ours(cr.owner.is_some(), cr.database == view.database));
    let Some(cr) = cr.filter(|cr| cr.status_readable && !is_over(&cr.status)) else { return Plan::nothing() };
    let reason = Reason::DesktopPaused.to_string();
    let told = condition(cr, (CONDITION, true, (reason.clone(), words.to_owned())), now.cluster);
    let others = cr.status.conditions.iter().flatten().filter(|other| other.type_ != CONDITION).cloned();
    let clock = cr.status.start_clock.as_ref();
    let status = CyberdeskStatus {
        phase: cr.status.phase.or(Some(Phase::Pending)),
        reason: Some(reason),
        message: Some(words.to_owned()),
        conditions: Some(others.chain([told]).collect()),
        start_clock: clock.map(|clock| tick(clock, SignedDuration::ZERO, true, now.cluster)),
        ..cr.status.clone()
    };
    let (uid, version) = (cr.uid.clone(), cr.version.clone());
    let changed = status != cr.status;
    let write = || Action::WriteCrStatus { uid, version, status: Box::new(status) };
    Plan { actions: changed.then(write).into_iter().collect(), ..Plan::default() }
}
