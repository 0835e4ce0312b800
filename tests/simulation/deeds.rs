//! What daemons do: each effect of an action, and the write-back.

use std::collections::BTreeSet;

use cyberdesk_operator::model::{Now, RowStatus};
use cyberdesk_operator::names::{Key, Owner};
use cyberdesk_operator::plan::Action;
use tokio::time::Instant;
use uuid::Uuid;

use crate::daemon::{FAILED, Pair};
use crate::planted::Bug;
use crate::processes::{HOLDS, term};
use crate::world::{Told, World, person, short};

impl World {
    pub(crate) fn acts(&mut self, at: usize, which: u32, how: u32) -> Result<Option<String>, String> {
        let (now, silence) = (self.now(), self.silence());
        let Some(daemon) = self.processes[at].runs() else { return Ok(None) };
        if daemon.turns.is_empty() {
            return Ok(None);
        }
        let turn = which as usize % daemon.turns.len();
        let (key, held, waits) = (daemon.turns[turn].key.clone(), daemon.turns[turn].held, daemon.turns[turn].waits);
        let Some(action) = daemon.turns[turn].actions.pop_front() else { return Ok(None) };
        let words = format!("{} for {}: {}", person(at), short(&key), words(&action));
        let is_local = matches!(action, Action::Report(_) | Action::Expire(_) | Action::Forget);
        if !is_local && (!daemon.leads() || self.api_away || how % 32 == 1) {
            daemon.end(turn, FAILED);
            return Ok(Some(format!("{words}, in vain")));
        }
        let Some(action) = self.with_bug(&key, action) else { return Ok(Some(format!("{words}: forgotten"))) };
        if held && !matches!(action, Action::WriteCrStatus { .. }) {
            return Err(format!("{} is paused, and it {}", short(&key), verb(&action)));
        }
        if waits && matches!(action, Action::CreateVm { .. }) {
            return Err(format!("{} is made, though new desktops wait", short(&key)));
        }
        self.judge(&key, &action)?;
        if let Action::WriteCrStatus { status, .. } = &action {
            self.judge_end(&key, status)?;
        }
        self.witness_end(&key, &action);
        self.count(verb(&action));
        let answer_lost = !is_local && how % 32 == 2;
        let overtaken = !self.perform(at, turn, &key, action);
        let Some(daemon) = self.processes[at].runs() else { return Ok(None) };
        if answer_lost {
            daemon.end(turn, FAILED);
            return Ok(Some(format!("{words}, and hears no answer")));
        }
        if daemon.turns.get(turn).is_some_and(|turn| turn.key == key && (overtaken || turn.actions.is_empty())) {
            let database = (self.database_away.is_none() && daemon.trusts(&self.database)).then_some(&self.database);
            daemon.silence = silence;
            daemon.round_done(turn, database, &self.templates, now);
        }
        Ok(Some(words))
    }

    /// What a planted bug makes of an action.
    pub(crate) fn with_bug(&self, key: &Key, action: Action) -> Option<Action> {
        match (self.bug, &action) {
            (Some(Bug::TimeoutNotTold), Action::Report(report)) if report.reason.as_deref() == Some("timeout") => None,
            (Some(Bug::FailureNotTold), Action::Report(report)) if report.status == Some(RowStatus::Error) => None,
            (Some(Bug::SecretLeft), Action::DeleteSecrets { .. }) => None,
            (Some(Bug::NotInStatusNotDeleted), Action::DeleteVm { .. }) => {
                let named = self.cluster.crs.get(key).is_some_and(|cr| cr.status.virtual_machine_ref.is_some());
                named.then_some(action)
            }
            _ => Some(action),
        }
    }

    /// The effect of an action. False: what it was meant for is gone.
    pub(crate) fn perform(&mut self, at: usize, turn: usize, key: &Key, action: Action) -> bool {
        let now = self.now();
        let database = self.processes[at].database();
        let landed = self.land(key, &action, database, now);
        let Some(daemon) = self.processes[at].runs() else { return true };
        match action {
            Action::CreateCr { .. }
            | Action::ApplyCr { .. }
            | Action::WriteCrStatus { .. }
            | Action::DeleteCr { .. } => {
                daemon.crs.learn(&self.cluster.crs, key);
            }
            Action::CreateVm { .. } => {
                daemon.failures.remove(key);
                daemon.vms.learn(&self.cluster.vms, key);
            }
            Action::DeleteVm { .. } => drop(daemon.vms.learn(&self.cluster.vms, key)),
            Action::DeleteVmi { .. } => drop(daemon.vmis.learn(&self.cluster.vmis, key)),
            Action::DeleteSecrets { .. } => (),
            Action::LookLive => {
                let live = daemon.look_live(&self.cluster, key);
                daemon.turns[turn].live = Some(live);
            }
            Action::Expire(id) => {
                daemon.outbox.expire(id);
                daemon.turns[turn].told = true;
            }
            Action::Report(report) => {
                daemon.outbox.report(report);
                daemon.turns[turn].told = true;
            }
            Action::Forget => {
                daemon.failures.remove(key);
                if let Some(id) = key.row_id() {
                    daemon.store.forget(id);
                }
                daemon.end(turn, cyberdesk_operator::queue::Outcome::Settled(None));
            }
        }
        landed
    }

    /// What a call does to the cluster when it lands. False: what it was meant for is not there.
    pub(crate) fn land(&mut self, key: &Key, action: &Action, database: Uuid, now: Now) -> bool {
        match action {
            Action::CreateCr { owner: (id, _), spec } => {
                self.cluster.create_cr(key, (Some(Owner::Row(*id)), Some(database)), spec.clone(), now.cluster);
                true
            }
            Action::ApplyCr { uid, owner: (id, _), spec } => self.cluster.change_cr(key, uid, |cr| {
                (cr.owner, cr.database) = (Some(Owner::Row(*id)), Some(database));
                if cr.spec.as_ref() != Ok(spec) {
                    (cr.spec, cr.generation) = (Ok(spec.clone()), cr.generation + 1);
                }
            }),
            Action::WriteCrStatus { uid, version, status } => {
                let is_meant = self.cluster.crs.get(key).is_some_and(|cr| cr.version == *version);
                (is_meant || self.bug == Some(Bug::StatusOverAnyVersion))
                    && self.cluster.change_cr(key, uid, |cr| cr.status = status.as_ref().clone())
            }
            Action::DeleteCr { uid } => {
                self.cluster.delete_cr(key, Some(uid));
                true
            }
            Action::CreateVm { owner, .. } => {
                self.cluster.secrets.insert(owner.id());
                let of_row = matches!(owner, Owner::Row(_)).then_some(database);
                self.cluster.create_vm(key, (Some(owner.clone()), of_row), self.run_strategy, self.now().cluster);
                true
            }
            Action::DeleteVm { uid, .. } => {
                self.cluster.delete_vm(key, Some(uid));
                true
            }
            Action::DeleteVmi { uid } => {
                self.cluster.delete_vmi(key, Some(uid));
                true
            }
            Action::DeleteSecrets { selector } => {
                if self.bug == Some(Bug::SecretsOfAll) {
                    self.cluster.secrets.clear();
                }
                let of_row = key.row_id().map(|id| id.hyphenated().to_string());
                self.cluster.secrets.retain(|owner| match &of_row {
                    Some(id) if selector.contains("origin=hand") => owner.starts_with("cr-") || owner != id,
                    Some(id) => owner != id,
                    None => !owner.starts_with("cr-"),
                });
                true
            }
            Action::LookLive | Action::Expire(_) | Action::Report(_) | Action::Forget => true,
        }
    }

    pub(crate) fn writes_back(&mut self, at: usize) -> Told {
        let before = self.database.clone();
        let told = self.writes(at);
        if before == self.database {
            return Ok(told);
        }
        if self.lease.holder != Some(at) {
            return Err("the database is written by one whose Lease is another's".to_owned());
        }
        // Until somebody has confirmed it, which takes `aside` away.
        let row = before.rows != self.database.rows || before.desktops != self.database.desktops;
        if row && self.aside.is_some() {
            return Err("a row of the wrong database is written".to_owned());
        }
        Ok(told)
    }

    pub(crate) fn writes(&mut self, at: usize) -> Option<String> {
        let now = self.now();
        let locked = self.locked.clone();
        let database = &self.database;
        let daemon =
            self.processes[at].runs().filter(|daemon| self.database_away.is_none() && daemon.admits(database))?;
        // Nothing is sent unless the Lease is held just then.
        let holds = daemon.leads() || self.bug == Some(Bug::WritesWithoutTheLease);
        if !holds || matches!(daemon.pair, Pair::Unjudged | Pair::Braked(_)) {
            return None;
        }
        if let (Some((term, _)), Pair::Agreed { confirmed, .. }, true) =
            (daemon.term, daemon.pair.clone(), daemon.fenced_in)
        {
            return self.binds(at, term, confirmed);
        }
        if self.bug == Some(Bug::UnguardedStatus) {
            for report in daemon.outbox.next_reports(Instant::now()) {
                self.database.write_unguarded(&report);
            }
        }
        let known = self.database.fence;
        if !daemon.write_back(&mut self.database, now, |id| locked.contains(&id)) {
            // The database knows a later epoch: the Lease is raised above it, if it is ours.
            let behind = daemon
                .term
                .is_some_and(|(term, _)| known.is_some_and(|known| known.epoch >= term.epoch && known != term));
            if behind && daemon.leads() && !daemon.fenced_in && self.lease.holder == Some(at) {
                let epoch = known.map_or(0, |known| known.epoch).max(self.lease.epoch) + 1;
                (self.lease.epoch, self.lease.renewed) = (epoch, Instant::now());
                daemon.term = Some((term(at, epoch), Instant::now() + HOLDS));
                return Some(format!("{} raises the Lease to {epoch}", person(at)));
            }
            return None;
        }
        Some(format!("{} writes back", person(at)))
    }

    /// Removes the Secrets of desktops that are over.
    pub(crate) fn sweeps(&mut self, at: usize) {
        let database = &self.database;
        let away = self.database_away.is_some() || self.api_away;
        let away = away || self.bug == Some(Bug::NeverSweeps);
        if self.processes[at].runs().is_some_and(|daemon| !away && daemon.leads() && daemon.trusts(database)) {
            let over: BTreeSet<String> =
                self.database.all().filter(|row| row.ended).map(|row| Owner::Row(row.id).id()).collect();
            self.cluster.secrets.retain(|owner| !over.contains(owner));
        }
    }
}

fn verb(action: &Action) -> &'static str {
    match action {
        Action::CreateCr { .. } => "creates the CR",
        Action::ApplyCr { .. } => "applies the CR's spec",
        Action::WriteCrStatus { .. } => "writes the CR's status",
        Action::DeleteCr { .. } => "deletes the CR",
        Action::CreateVm { .. } => "creates the VM",
        Action::DeleteVm { .. } => "deletes the VM",
        Action::DeleteVmi { .. } => "deletes the VMI",
        Action::DeleteSecrets { .. } => "deletes the Secret",
        Action::LookLive => "looks for VM and VMI live",
        Action::Expire(_) => "asks for the deadline's end",
        Action::Report(_) => "tells the row",
        Action::Forget => "forgets it",
    }
}

pub(crate) fn words(action: &Action) -> String {
    let verb = verb(action);
    match action {
        Action::WriteCrStatus { status, .. } => format!("{verb} {:?}, {:?}", status.phase, status.reason),
        Action::Report(report) => {
            format!("{verb} {:?}, {:?}, VM {:?}, over: {}", report.status, report.reason, report.vm_uid, report.ended)
        }
        _ => verb.to_owned(),
    }
}
