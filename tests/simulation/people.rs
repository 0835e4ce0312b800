//! What befalls desktops from outside: the app, people, KubeVirt and guests.

use cyberdesk_operator::crd::CyberdeskSpec;
use cyberdesk_operator::model::{RowStatus, RunStrategy, VmiPhase};
use cyberdesk_operator::names::Key;
use jiff::SignedDuration;
use uuid::Uuid;

use crate::world::{BY_HAND, World, name, pick, short};

impl World {
    pub(crate) fn app_inserts(&mut self, id: Uuid, how: u32) -> Option<String> {
        let status = match how % 16 {
            0 => RowStatus::Terminated,
            1 => RowStatus::Running,
            _ => RowStatus::Pending,
        };
        let seconds = [0, 20, 60, 3600][(how / 16 % 4) as usize];
        let at = self.now().database + SignedDuration::from_secs(seconds);
        let done = self.database.insert(id, status, at);
        self.note_deadline(id, at);
        done.then(|| format!("the app inserts {} as {} for {seconds} s", name(id), status.as_str()))
    }

    pub(crate) fn app_writes(&mut self, id: Uuid, how: u32) -> Option<String> {
        use RowStatus::{Completed, Error, Pending, Running, Terminated};
        let status = [Pending, Running, Completed, Error, Terminated][(how % 5) as usize];
        let done = self.database.write_status(id, status);
        done.then(|| format!("the app writes {} to {}", status.as_str(), name(id)))
    }

    pub(crate) fn app_moves_deadline(&mut self, id: Uuid, how: u32) -> Option<String> {
        let seconds = [0, 5, 60, 3600][(how % 4) as usize];
        let at = self.now().database + SignedDuration::from_secs(seconds);
        self.note_deadline(id, at);
        self.database.set_timeout(id, at).then(|| format!("the app gives {} {seconds} s", name(id)))
    }

    pub(crate) fn app_locks(&mut self, id: Uuid) -> Option<String> {
        if self.locked.remove(&id) {
            return Some(format!("the app commits, and unlocks {}", name(id)));
        }
        self.locked.insert(id).then(|| format!("the app locks {}", name(id)))
    }

    pub(crate) fn person(&mut self, id: Uuid, how: u32) -> Option<String> {
        let key = if how & 1 == 0 { Key::of_row(id) } else { Key::new(BY_HAND[0]) };
        let now = self.now();
        let what = match how / 2 % 8 {
            0 => self.cluster.delete_cr(&key, None).then_some("deletes the CR"),
            1 => self.cluster.delete_vm(&key, None).then_some("deletes the VM"),
            2 => self.cluster.delete_vmi(&key, None).then_some("deletes the VMI"),
            3 if self.cluster.crs.get(&key).is_none() && self.cluster.vms.get(&key).is_none() => self
                .cluster
                .create_vm(&key, (None, None), RunStrategy::Once, now.cluster)
                .then_some("makes a VM of that name"),
            _ => {
                let spec = CyberdeskSpec { timeout_ms: Some(60_000), ..CyberdeskSpec::default() };
                let by_hand = key.row_id().is_none();
                (by_hand && self.cluster.create_cr(&key, (None, None), spec, now.cluster)).then_some("applies a CR")
            }
        };
        what.map(|what| format!("a person {what}: {}", short(&key)))
    }

    /// An administrator pauses the making of desktops, or one desktop, or a person annotates its CR; or has it go on.
    pub(crate) fn pauses(&mut self, id: Uuid, how: u32) -> Option<String> {
        // What is paused goes on more often than it came to be.
        let rarely = how & 64 == 0;
        let (whom, paused) = match how % 4 {
            0 if self.database.paused || rarely => {
                self.database.paused = !self.database.paused;
                ("new desktops".to_owned(), self.database.paused)
            }
            1 => {
                let paused = !self.database.desktops.get(&id)?.paused;
                let done = (!paused || rarely) && self.database.pause(id, paused);
                (format!("{} in SQL", name(id)), done.then_some(paused)?)
            }
            2 | 3 => {
                let key = if how & 8 == 0 { Key::of_row(id) } else { Key::new(BY_HAND[0]) };
                let cr = self.cluster.crs.get(&key).filter(|cr| cr.paused || rarely)?;
                let (uid, paused) = (cr.uid.clone(), !cr.paused);
                self.cluster.change_cr(&key, &uid, |cr| cr.paused = paused);
                (format!("{} by annotation", short(&key)), paused)
            }
            _ => return None,
        };
        let what = if paused { "pauses" } else { "resumes" };
        self.count(format!("{what} {}", ["all", "a row", "a CR", "a CR"][(how % 4) as usize]));
        Some(format!("a person {what} {whom}"))
    }

    /// Everything that was paused goes on.
    pub(crate) fn resumes(&mut self) {
        for database in std::iter::once(&mut self.database).chain(self.aside.as_mut().map(|(right, _)| right)) {
            database.paused = false;
            let ids: Vec<Uuid> = database.desktops.keys().copied().collect();
            for id in ids {
                database.pause(id, false);
            }
        }
        for key in self.cluster.keys() {
            if let Some(uid) = self.cluster.crs.get(&key).map(|cr| cr.uid.clone()) {
                self.cluster.change_cr(&key, &uid, |cr| cr.paused = false);
            }
        }
    }

    pub(crate) fn kubevirt(&mut self, which: u32, how: u32) -> Option<String> {
        let key = pick(&self.cluster.keys(), which)?;
        let now = self.now().cluster;
        let what = self.cluster.kubevirt(&key, !how.is_multiple_of(4), now)?;
        Some(format!("KubeVirt {what}: {}", short(&key)))
    }

    pub(crate) fn guest(&mut self, which: u32, how: u32) -> Option<String> {
        let key = pick(&self.cluster.keys(), which)?;
        let (phase, what) =
            if how & 1 == 0 { (VmiPhase::Failed, "crashes") } else { (VmiPhase::Succeeded, "powers off") };
        self.cluster.guest_ends(&key, phase).then(|| format!("the guest {what}: {}", short(&key)))
    }
}
