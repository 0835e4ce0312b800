//! The database's rules as a model: what `sql/` does to one row, without locks and without SQL.
//!
//! It is held to the real SQL by a story that runs the same operations on both.

use std::collections::BTreeMap;

use cyberdesk_operator::brake;
use cyberdesk_operator::lease::Term;
use cyberdesk_operator::model::{Desired, Report, Row, RowStatus};
use jiff::Timestamp;
use uuid::Uuid;

/// Whose all rows are.
pub(crate) const USER: Uuid = Uuid::from_u128(0xa11ce);

/// `CD001`: another term may write now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fenced;

/// The private row, `cyberdesk.desktop`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Desktop {
    pub(crate) desired: Desired,
    /// The terminal status once there is one, or the last of a row that was deleted.
    pub(crate) status: Option<RowStatus>,
    pub(crate) reason: Option<String>,
    pub(crate) message: Option<String>,
    pub(crate) ended: bool,
    pub(crate) expires_at: Timestamp,
    pub(crate) generation: i64,
    pub(crate) observed_generation: i64,
    pub(crate) vm_uid: Option<String>,
    /// By `pause_desktop`.
    pub(crate) paused: bool,
}

/// Both tables, the fence and the bond.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Database {
    pub(crate) itself: brake::Database,
    pub(crate) bond: Option<(String, (String, i64))>,
    pub(crate) confirmation: Option<String>,
    /// `public.cyberdesk_instances`: the status alone; its other columns mirror the private row.
    pub(crate) rows: BTreeMap<Uuid, RowStatus>,
    pub(crate) desktops: BTreeMap<Uuid, Desktop>,
    pub(crate) fence: Option<Term>,
    /// An administrator has new desktops wait.
    pub(crate) paused: bool,
}

impl Default for Database {
    fn default() -> Self {
        let itself = brake::Database { id: Uuid::from_u128(0xdb), system: "server".to_owned(), oid: 1 };
        let (rows, desktops) = Default::default();
        Self { itself, bond: None, confirmation: None, rows, desktops, fence: None, paused: false }
    }
}

pub(crate) fn is_live(status: RowStatus) -> bool {
    matches!(status, RowStatus::Pending | RowStatus::Running)
}

/// `cyberdesk.next_status`.
pub(crate) fn next_status(was: RowStatus, written: RowStatus, stopping: bool) -> RowStatus {
    use RowStatus::{Completed, Error, Pending, Running, Terminated};
    match (was, written) {
        (Terminated, _) => was,
        (Error | Completed, Terminated) => written,
        (Error | Completed, _) => was,
        (_, Running) if stopping => was,
        (Running, Pending) => was,
        _ => written,
    }
}

impl Database {
    // ----- the app

    /// `insert … returning`; an id that was used before is refused.
    pub(crate) fn insert(&mut self, id: Uuid, written: RowStatus, timeout_at: Timestamp) -> bool {
        if self.desktops.contains_key(&id) {
            return false;
        }
        let status = if written == RowStatus::Running { RowStatus::Pending } else { written };
        let live = is_live(status);
        self.rows.insert(id, status);
        let desktop = Desktop {
            desired: if live { Desired::Present } else { Desired::Absent },
            status: (!live).then_some(status),
            reason: None,
            message: None,
            ended: !live,
            expires_at: timeout_at,
            generation: 1,
            observed_generation: i64::from(!live),
            vm_uid: None,
            paused: false,
        };
        self.desktops.insert(id, desktop);
        true
    }

    /// `update … set status = …`.
    pub(crate) fn write_status(&mut self, id: Uuid, written: RowStatus) -> bool {
        let (Some(status), Some(desktop)) = (self.rows.get_mut(&id), self.desktops.get_mut(&id)) else { return false };
        let stopping = desktop.desired == Desired::Absent;
        *status = next_status(desktop.status.unwrap_or(*status), written, stopping);
        if !is_live(*status) {
            desktop.status = Some(*status);
            if !stopping {
                desktop.stop("requested", None);
            }
        }
        true
    }

    /// `update … set timeout_at = …`.
    pub(crate) fn set_timeout(&mut self, id: Uuid, at: Timestamp) -> bool {
        if !self.rows.contains_key(&id) {
            return false;
        }
        let desktop = self.desktops.get_mut(&id).filter(|desktop| desktop.desired == Desired::Present);
        if let Some(desktop) = desktop.filter(|desktop| desktop.expires_at != at) {
            desktop.expires_at = at;
            desktop.generation += 1;
        }
        true
    }

    /// `request_shutdown`: whether there is such a row, and whether this changed anything.
    pub(crate) fn request_shutdown(&mut self, id: Uuid, words: Option<&str>) -> Option<bool> {
        self.rows.get(&id)?;
        let desktop = self.desktops.get_mut(&id).filter(|desktop| desktop.desired == Desired::Present);
        Some(desktop.map(|desktop| desktop.stop("requested", words)).is_some())
    }

    /// `delete from …`, by itself or with its user.
    pub(crate) fn delete(&mut self, id: Uuid) -> bool {
        let (Some(status), Some(desktop)) = (self.rows.remove(&id), self.desktops.get_mut(&id)) else { return false };
        desktop.status = desktop.status.or(Some(status));
        if desktop.desired == Desired::Present {
            desktop.stop("row-deleted", None);
        }
        true
    }

    /// `pause_desktop`: whether it changed anything.
    pub(crate) fn pause(&mut self, id: Uuid, paused: bool) -> bool {
        let desktop = self.desktops.get_mut(&id).filter(|desktop| !desktop.ended && desktop.paused != paused);
        desktop.map(|desktop| (desktop.paused, desktop.generation) = (paused, desktop.generation + 1)).is_some()
    }

    // ----- the operator

    pub(crate) fn acquire(&mut self, term: Term) -> bool {
        let taken = self.fence.is_none_or(|fence| fence.epoch < term.epoch || fence == term);
        if taken {
            self.fence = Some(term);
        }
        taken
    }

    /// The last epoch that it accepted.
    pub(crate) fn epoch(&self) -> i64 {
        self.fence.map_or(0, |term| term.epoch)
    }

    /// `cyberdesk.pair`.
    pub(crate) fn side(&self) -> brake::DatabaseSide {
        brake::DatabaseSide {
            itself: self.itself.clone(),
            epoch: self.epoch(),
            bond: self.bond.clone(),
            confirmation: self.confirmation.clone(),
            sign_of_life: None,
        }
    }

    /// `cyberdesk.bind`.
    pub(crate) fn bind(&mut self, term: Term, cluster: &str, confirmed: bool) -> Result<(), Fenced> {
        self.check(term)?;
        for (id, desktop) in &mut self.desktops {
            if confirmed && desktop.desired == Desired::Present && !self.rows.contains_key(id) {
                desktop.stop("row-deleted", None);
            }
        }
        self.bond = Some((cluster.to_owned(), (self.itself.system.clone(), self.itself.oid)));
        self.confirmation = None;
        Ok(())
    }

    pub(crate) fn row(&self, id: Uuid) -> Option<Row> {
        let desktop = self.desktops.get(&id)?;
        let status = self.rows.get(&id).copied();
        let absent = desktop.desired == Desired::Absent;
        Some(Row {
            id,
            exists: status.is_some(),
            user_id: USER,
            desired: desktop.desired,
            reason: absent.then(|| desktop.reason.clone().unwrap_or_else(|| "requested".to_owned())),
            message: desktop.message.clone(),
            expires_at: desktop.expires_at,
            timeout_at: desktop.expires_at,
            // Nothing is decided by these two.
            created_at: desktop.expires_at,
            changed_at: desktop.expires_at,
            generation: desktop.generation,
            observed_generation: desktop.observed_generation,
            params: None,
            status: desktop.status.or(status).expect("a tombstone keeps its last status"),
            vm_uid: desktop.vm_uid.clone(),
            ended: desktop.ended,
            paused: desktop.paused,
        })
    }

    pub(crate) fn live(&self) -> Vec<Row> {
        self.all().filter(|row| !row.ended).collect()
    }

    pub(crate) fn dirty(&self) -> Vec<Row> {
        self.all().filter(|row| row.generation > row.observed_generation).collect()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = Row> {
        self.desktops.keys().filter_map(|id| self.row(*id))
    }

    /// `cyberdesk.report`, for one entry that nobody has locked.
    pub(crate) fn report(&mut self, term: Term, report: &Report) -> Result<&'static str, Fenced> {
        self.check(term)?;
        let Some(desktop) = self.desktops.get_mut(&report.id) else { return Ok("missing") };
        if report.generation > desktop.generation {
            return Ok("ahead");
        }
        let row = self.rows.get_mut(&report.id);
        let before = (desktop.clone(), row.as_deref().copied());
        let known = desktop.status.or(row.as_deref().copied()).expect("a tombstone keeps its last status");
        let written = match report.status {
            status if report.ended && status.is_none_or(is_live) => RowStatus::Terminated,
            Some(status) => status,
            None => known,
        };
        let stopping = desktop.desired == Desired::Absent;
        let status = if is_live(known) { next_status(known, written, stopping) } else { known };
        let over = report.ended || !is_live(status);
        desktop.observed_generation = match report.ended {
            true => desktop.generation,
            false => desktop.observed_generation.max(report.generation),
        };
        desktop.vm_uid = desktop.vm_uid.take().or_else(|| report.vm_uid.clone());
        desktop.ended |= report.ended;
        let message = report.message.clone().filter(|message| !message.is_empty());
        if over || stopping {
            desktop.reason = desktop.reason.take().or_else(|| report.reason.clone());
            desktop.message = if stopping { desktop.message.take().or(message) } else { message };
        } else if report.message.is_some() {
            desktop.message = message;
        }
        if over {
            desktop.desired = Desired::Absent;
        }
        if !is_live(status) {
            desktop.status = Some(status);
        }
        if let Some(row) = row {
            let written = report.status.map_or(*row, |written| next_status(*row, written, over || stopping));
            *row = desktop.status.unwrap_or(written);
        }
        let after = (desktop.clone(), self.rows.get(&report.id).copied());
        Ok(if before == after { "same" } else { "written" })
    }

    /// `cyberdesk.expire`, for one row that nobody has locked.
    pub(crate) fn expire(&mut self, term: Term, id: Uuid, now: Timestamp) -> Result<&'static str, Fenced> {
        self.check(term)?;
        let Some(desktop) = self.desktops.get_mut(&id) else { return Ok("missing") };
        Ok(match desktop.desired {
            Desired::Absent => "same",
            Desired::Present if desktop.paused => "same",
            Desired::Present if desktop.expires_at > now => "extended",
            Desired::Present => {
                desktop.stop("timeout", None);
                "expired"
            }
        })
    }

    /// Not what `sql/` does, but what the predecessor did.
    pub(crate) fn write_unguarded(&mut self, report: &Report) {
        if let (Some(row), Some(desktop), Some(status)) =
            (self.rows.get_mut(&report.id), self.desktops.get_mut(&report.id), report.status)
        {
            *row = status;
            desktop.status = (!is_live(status)).then_some(status);
        }
    }

    fn check(&self, term: Term) -> Result<(), Fenced> {
        if self.fence == Some(term) { Ok(()) } else { Err(Fenced) }
    }
}

impl Desktop {
    /// Latches it to absent. The caller has seen that it is present.
    fn stop(&mut self, reason: &str, message: Option<&str>) {
        self.desired = Desired::Absent;
        self.reason = Some(reason.to_owned());
        self.message = message.map(str::to_owned);
        self.generation += 1;
    }
}
