//! Processes that start, die, freeze and lead; and the network between them and what they call.

use std::time::Duration;

use cyberdesk_operator::brake::{self, ClusterSide};
use cyberdesk_operator::lease::Term;
use cyberdesk_operator::names::{Key, Owner};
use cyberdesk_operator::plan::Action;
use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;

use crate::daemon::Daemon;
use crate::deeds::words;
use crate::world::{World, person, short};

/// How long a lease lasts, and how long its holder may write.
const LASTS: Duration = Duration::from_secs(12);
pub(crate) const HOLDS: Duration = Duration::from_secs(10);

/// A process: running, frozen or dead.
pub(crate) enum Process {
    Runs(Box<Daemon>),
    Frozen(Box<Daemon>),
    Dead,
}

impl Process {
    pub(crate) fn runs(&mut self) -> Option<&mut Daemon> {
        match self {
            Self::Runs(daemon) => Some(daemon),
            Self::Frozen(_) | Self::Dead => None,
        }
    }

    /// The database that it marks objects as of.
    pub(crate) fn database(&self) -> Uuid {
        match self {
            Self::Runs(daemon) | Self::Frozen(daemon) => {
                daemon.expected.as_ref().map_or(Uuid::nil(), |(known, _)| known.id)
            }
            Self::Dead => Uuid::nil(),
        }
    }
}

/// UID of the namespace.
pub(crate) const CLUSTER: &str = "cluster";

pub(crate) struct Lease {
    pub(crate) epoch: i64,
    pub(crate) holder: Option<usize>,
    pub(crate) renewed: Instant,
    pub(crate) bond: Option<(brake::Database, i64)>,
    pub(crate) confirmation: Option<String>,
    pub(crate) confirmed_at: Option<Timestamp>,
}

impl Lease {
    pub(crate) fn side(&self, term: Term) -> ClusterSide {
        ClusterSide {
            id: CLUSTER.to_owned(),
            term: term.epoch,
            bond: self.bond.clone(),
            confirmation: self.confirmation.clone(),
            confirmed_at: self.confirmed_at,
            sign_of_life: None,
        }
    }
}

impl World {
    pub(crate) fn starts_or_dies(&mut self, at: usize, how: u32) -> Option<String> {
        match &mut self.processes[at] {
            Process::Dead => {
                self.processes[at] = Process::Runs(Box::new(Daemon::start(self.bug)));
                Some(format!("{} starts", person(at)))
            }
            Process::Runs(daemon) | Process::Frozen(daemon) if how.is_multiple_of(4) => {
                self.limbo.extend(calls(daemon));
                self.processes[at] = Process::Dead;
                Some(format!("{} is killed", person(at)))
            }
            Process::Runs(_) | Process::Frozen(_) => None,
        }
    }

    pub(crate) fn freezes_or_wakes(&mut self, at: usize, how: u32) -> Option<String> {
        let process = std::mem::replace(&mut self.processes[at], Process::Dead);
        let (process, what) = match process {
            Process::Runs(mut daemon) if how.is_multiple_of(4) => {
                // What it was about to call may be on its way.
                if how & 8 == 0 {
                    self.limbo.extend(calls(&mut daemon));
                }
                (Process::Frozen(daemon), Some("freezes"))
            }
            Process::Frozen(daemon) => (Process::Runs(daemon), Some("wakes up")),
            process => (process, None),
        };
        self.processes[at] = process;
        what.map(|what| format!("{} {what}", person(at)))
    }

    /// Takes or renews the Lease, or finds that it is another's.
    pub(crate) fn leads(&mut self, at: usize) -> Option<String> {
        let daemon = self.processes[at].runs().filter(|_| !self.api_away)?;
        let now = Instant::now();
        let ours = daemon.term.filter(|(term, _)| self.lease.holder == Some(at) && self.lease.epoch == term.epoch);
        match ours {
            Some((term, until)) if now < until => {
                self.lease.renewed = now;
                daemon.term = Some((term, now + HOLDS));
                None
            }
            _ if daemon.term.is_some() => {
                daemon.lose();
                Some(format!("{} leads no longer", person(at)))
            }
            _ if self.lease.holder.is_none() || self.lease.renewed + LASTS <= now || self.lease.holder == Some(at) => {
                (self.lease.epoch, self.lease.holder, self.lease.renewed) = (self.lease.epoch + 1, Some(at), now);
                let bound_to = self.lease.bond.as_ref().map(|(database, _)| database.id);
                daemon.begin(term(at, self.lease.epoch), now + HOLDS, bound_to);
                Some(format!("{} leads, in term {}", person(at), self.lease.epoch))
            }
            _ => None,
        }
    }

    pub(crate) fn lands_late(&mut self, which: u32) -> Option<String> {
        if self.limbo.is_empty() {
            return None;
        }
        let (key, action, database) = self.limbo.remove(which as usize % self.limbo.len());
        if which & 256 != 0 {
            if let Action::CreateVm { owner: owner @ Owner::Row(_), .. } = &action {
                self.late_secrets.insert(owner.id());
                self.ghosts.insert(owner.id());
            }
            return Some(format!("lost, for {}: {}", short(&key), words(&action)));
        }
        let before = self.cluster.vms.get(&key).map(|vm| vm.uid.clone());
        let now = self.now();
        if let Action::CreateVm { owner, .. } = &action {
            self.late_secrets.insert(owner.id());
            // It is two calls, of which the second may be lost.
            if which & 128 != 0 {
                self.cluster.secrets.insert(owner.id());
                return Some(format!("lands late, for {}: creates the Secret, and no VM", short(&key)));
            }
        }
        self.land(&key, &action, database, now);
        let after = self.cluster.vms.get(&key).map(|vm| vm.uid.clone());
        self.seen.late.extend(after.filter(|_| before.is_none()));
        Some(format!("lands late, for {}: {}", short(&key), words(&action)))
    }

    pub(crate) fn cuts(&mut self, how: u32) -> Option<String> {
        let (was_away, side) = match how & 1 {
            0 => (self.database_away.is_some(), "the database"),
            _ => (self.api_away, "the API server"),
        };
        if !was_away && how % 8 > 1 {
            return None;
        }
        match how & 1 {
            0 => self.database_away = (!was_away).then(Instant::now),
            _ => self.api_away = !was_away,
        }
        Some(format!("{side} is {}", if was_away { "back" } else { "away" }))
    }
}

/// The calls that a process had begun.
fn calls(daemon: &mut Daemon) -> Vec<(Key, Action, Uuid)> {
    let database = daemon.expected.as_ref().map_or(Uuid::nil(), |(known, _)| known.id);
    let is_call =
        |action: &Action| !matches!(action, Action::LookLive | Action::Expire(_) | Action::Report(_) | Action::Forget);
    let begun = daemon.turns.iter().filter_map(|turn| Some((turn.key.clone(), turn.actions.front()?.clone())));
    begun.filter(|(_, action)| is_call(action)).map(|(key, action)| (key, action, database)).collect()
}

pub(crate) fn term(at: usize, epoch: i64) -> Term {
    Term { epoch, token: Uuid::from_u128(((at as u128 + 1) << 64) + u128::from(epoch.unsigned_abs())) }
}
