//! A database that is away for longer than deadlines last: they are kept by the CRs, and what is decided so is final.

use std::time::Duration;

use cyberdesk_operator::crd::CyberdeskStatus;
use cyberdesk_operator::database::store::Remembered;
use cyberdesk_operator::model::{Cr, Desired, Silence};
use cyberdesk_operator::names::{Key, Owner};
use cyberdesk_operator::plan::Action;
use cyberdesk_operator::reason::Reason;
use jiff::{SignedDuration, Timestamp};
use tokio::time::{Instant, advance};

use crate::daemon::Daemon;
use crate::planted::Bug;
use crate::processes::Process;
use crate::world::{World, name, short};

/// How long a daemon may take to find that the database is away, and to act on a deadline.
const FOUND_OUT: Duration = Duration::from_secs(6);
const IN_TIME: SignedDuration = SignedDuration::from_secs(2);

impl World {
    /// For how long the database has not answered.
    pub(crate) fn silence(&self) -> Silence {
        let since = self.database_away.filter(|_| self.bug != Some(Bug::WaitsForTheDatabase));
        let since = since.map(|since| since.elapsed()).unwrap_or_default();
        let silence = SignedDuration::try_from(since).unwrap_or(SignedDuration::MAX);
        Silence { reads: silence, writes: silence }
    }

    /// The database goes, and does not come back, while a daemon leads, unbraked, and the API server answers: no VM outlives its
    /// CR's deadline by more than two seconds.
    pub(crate) async fn outlasts(&mut self) -> Result<(), String> {
        self.all_but_the_database_come_back();
        self.database_away.get_or_insert_with(Instant::now);
        let mut served_since = None;
        for _ in 0..160 {
            self.quiet_round().await?;
            if self.is_served() {
                served_since.get_or_insert_with(Instant::now);
            } else {
                served_since = None;
            }
            if served_since.is_some_and(|since| since.elapsed() > FOUND_OUT) {
                self.nothing_is_overdue()?;
            }
        }
        // A day later.
        advance(Duration::from_secs(86_400)).await;
        Ok(())
    }

    fn nothing_is_overdue(&self) -> Result<(), String> {
        let now = self.now().database;
        for (key, (_, cr)) in &self.cluster.crs.objects {
            let (Some(Owner::Row(id)), Ok(spec)) = (&cr.owner, &cr.spec) else { continue };
            if cr.database != Some(self.right().itself.id) {
                continue;
            }
            // One that the database has never heard of is an orphan, and is left its grace.
            let Some(row) = self.right().row(*id) else { continue };
            let held = cr.paused || row.paused || self.was_paused(key, cr);
            let lives = !held && self.cluster.vms.get(key).is_some_and(|vm| vm.owner == cr.owner && !vm.deleting);
            let late = spec.expires_at.map(|at| now.duration_since(at)).filter(|late| *late > IN_TIME);
            if let Some(late) = late.filter(|_| lives && cr.status_readable) {
                return Err(format!("{} lives on {late:#} after its deadline, as the database is away", name(*id)));
            }
        }
        Ok(())
    }

    /// Whether the database said last that it is paused: that holds while it is away.
    fn was_paused(&self, key: &Key, cr: &Cr) -> bool {
        let remembers = |daemon: &Daemon| matches!(daemon.store.get(key), Remembered::Row(row) if row.paused);
        let says = cr.status.conditions.iter().flatten().any(|told| told.type_ == "Paused" && told.status == "True");
        says || self.processes.iter().any(|process| matches!(process, Process::Runs(daemon) if remembers(daemon)))
    }

    /// An end that the database has not decided is by a deadline that has come: the CR's, or the row's as it was when
    /// it was last read.
    pub(crate) fn judge_end(&self, key: &Key, status: &CyberdeskStatus) -> Result<(), String> {
        let Some(id) = key.row_id() else { return Ok(()) };
        let cr = self.cluster.crs.get(key).filter(|cr| cr.owner == Some(Owner::Row(id)) && cr.status.end.is_none());
        let (Some(cr), Some(end)) = (cr, &status.end) else { return Ok(()) };
        let wanted = self.right().row(id).is_some_and(|row| row.desired == Desired::Present);
        if !wanted || end.reason != Reason::Timeout.as_str() {
            return Ok(());
        }
        let by_cr = cr.spec.as_ref().ok().and_then(|spec| spec.expires_at);
        let had_come = |at: &Timestamp| *at <= self.now().database;
        if by_cr.iter().chain(self.earliest_deadlines.get(&id)).any(had_come) {
            Ok(())
        } else {
            Err(format!("{} is ended by a deadline that it never had", name(id)))
        }
    }

    /// The app gives a row this deadline.
    pub(crate) fn note_deadline(&mut self, id: uuid::Uuid, at: Timestamp) {
        let earliest = self.earliest_deadlines.entry(id).or_insert(at);
        *earliest = at.min(*earliest);
    }

    /// An end that was decided stands in the CR, and a VM was deleted for it: there is no way back.
    pub(crate) fn witness_end(&mut self, key: &Key, action: &Action) {
        let ended = self.cluster.crs.get(key).is_some_and(|cr| cr.status.end.is_some());
        if let (Action::DeleteVm { .. }, Some(id), true) = (action, key.row_id(), ended) {
            self.ended_by_the_cr.insert(id);
        }
    }

    /// An end that a CR tells of is told for as long as that CR is there.
    pub(crate) fn recorded_ends_stand(&mut self) -> Result<(), String> {
        for (key, (_, cr)) in &self.cluster.crs.objects {
            if cr.status.end.is_some() {
                self.seen.ended_crs.insert(cr.uid.clone(), key.clone());
            } else if self.seen.ended_crs.contains_key(&cr.uid) {
                return Err(format!("the CR of {} told of its end, and tells no more", short(key)));
            }
        }
        Ok(())
    }

    /// What was decided while the database was away is the end, whatever the app has done in between.
    pub(crate) fn ends_are_final(&self) -> Result<(), String> {
        for id in &self.ended_by_the_cr {
            if self.database.row(*id).is_some_and(|row| row.desired == Desired::Present) {
                return Err(format!("{} was ended by its CR, and is wanted again", name(*id)));
            }
        }
        Ok(())
    }
}
