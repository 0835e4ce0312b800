//! What must hold: of each deed, after each step, and when all is quiet.

use std::collections::BTreeMap;
use std::time::Duration;

use cyberdesk_operator::model::{Desired, RowStatus};
use cyberdesk_operator::names::{Key, Owner};
use cyberdesk_operator::plan::Action;
use tokio::time::advance;
use uuid::Uuid;

use crate::database::{Database, is_live};
use crate::world::{World, name, short};

impl World {
    /// The database that counts, wherever connections lead.
    pub(crate) fn right(&self) -> &Database {
        self.aside.as_ref().map_or(&self.database, |(right, _)| right)
    }

    /// Whether this may be done, as the world is.
    pub(crate) fn judge(&self, key: &Key, action: &Action) -> Result<(), String> {
        let vm = self.cluster.vms.get(key);
        // Until a confirmation stands in the Lease, the next leader goes by the database that this names.
        let named = self.lease.bond.as_ref().map(|(database, _)| database.id);
        let of_another =
            |database: Option<Uuid>| database.is_some_and(|id| id != self.right().itself.id && Some(id) != named);
        let stranger = match action {
            Action::DeleteVm { uid, .. } => vm.is_some_and(|vm| vm.uid == *uid && of_another(vm.database)),
            Action::DeleteCr { uid } => {
                self.cluster.crs.get(key).is_some_and(|cr| cr.uid == *uid && of_another(cr.database))
            }
            _ => false,
        };
        if stranger {
            return Err("another database's desktop is touched".to_owned());
        }
        match action {
            Action::DeleteCr { .. } => {
                let row = key.row_id().and_then(|id| self.right().row(id));
                let lives = row.is_some_and(|row| !row.ended);
                if lives { Err("the CR of a desktop that is not over is deleted".to_owned()) } else { Ok(()) }
            }
            Action::DeleteVm { uid, .. } if vm.is_some_and(|vm| vm.uid == *uid && vm.owner.is_none()) => {
                Err("a VM that is not ours is deleted".to_owned())
            }
            Action::DeleteVm { uid, .. } => {
                let doomed = vm.filter(|vm| vm.uid == *uid && !vm.deleting);
                match doomed.and_then(|vm| vm.owner.as_ref()) {
                    Some(Owner::Row(id)) => self.may_end(key, *id),
                    _ => Ok(()),
                }
            }
            Action::CreateVm { owner: Owner::Row(id), .. } => {
                let Some(row) = self.right().row(*id) else { return Err("a VM is made without a row".to_owned()) };
                let by_cr = self.cluster.crs.get(key).is_some_and(|cr| cr.status.virtual_machine_ref.is_some());
                if vm.is_none() && (row.vm_uid.is_some() || by_cr) {
                    return Err("a VM that was recorded and went is made again".to_owned());
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A VM of a row that wants one is deleted only if something has happened to it, and the CR says what. Who takes the
    /// CR away when it has said so, and before the VM is deleted, takes its word along.
    pub(crate) fn may_end(&self, key: &Key, id: Uuid) -> Result<(), String> {
        let wanted = self.right().row(id).is_some_and(|row| row.desired == Desired::Present);
        let recorded = match self.cluster.crs.get(key) {
            Some(cr) => cr.status.end.is_some(),
            None => self.seen.ended_crs.values().any(|ended| ended == key),
        };
        if wanted && !recorded {
            Err("the VM of a row that wants it is deleted, and nothing says why".to_owned())
        } else {
            Ok(())
        }
    }

    pub(crate) fn check(&mut self) -> Result<(), String> {
        self.recorded_ends_stand()?;
        for row in self.database.all().collect::<Vec<_>>() {
            let (id, key) = (row.id, Key::of_row(row.id));
            if let Some(before) = self.seen.statuses.insert(id, row.status).filter(|before| !is_live(*before)) {
                let kept = before == row.status || row.status == RowStatus::Terminated;
                if !kept {
                    return Err(format!("{} was {}, and is {} again", name(id), before.as_str(), row.status.as_str()));
                }
            }
            if row.desired == Desired::Absent {
                self.seen.absent.insert(id);
            } else if self.seen.absent.contains(&id) {
                return Err(format!("{} was to end, and is wanted again", name(id)));
            }
            let ours = |owner: &Option<Owner>| *owner == Some(Owner::Row(id));
            let vm = self.cluster.vms.get(&key).filter(|vm| ours(&vm.owner) && !self.seen.late.contains(&vm.uid));
            if row.ended && vm.is_some() && self.aside.is_none() {
                return Err(format!("{} is said to be over, and has a VM", name(id)));
            }
            let secret = Owner::Row(id).id();
            let has_secret = self.cluster.secrets.contains(&secret);
            if row.ended && has_secret && !self.late_secrets.contains(&secret) && self.aside.is_none() {
                return Err(format!("{} is said to be over, and has a Secret", name(id)));
            }
            if row.desired == Desired::Present && vm.is_some_and(|vm| !vm.deleting) && !has_secret {
                return Err(format!("{} has a VM, and no Secret for it", name(id)));
            }
        }
        Ok(())
    }

    /// While everything goes well, what is paused stays as it is.
    pub(crate) async fn rests(&mut self) -> Result<(), String> {
        if self.aside.is_some() || self.paused().is_empty() {
            return Ok(());
        }
        let mut before = None;
        // Until a new term has begun, and everybody has heard; and until deadlines are over that came meanwhile.
        for round in 0..60 {
            self.quiet_round().await?;
            if round < 30 {
                continue;
            }
            let now = self.paused();
            let held = before.get_or_insert_with(|| now.clone());
            if *held != now {
                return Err(format!("what is paused is not left as it is: it was {held:?}, and is {now:?}"));
            }
            advance(Duration::from_secs(4)).await;
            (0..2).for_each(|at| drop(self.leads(at)));
        }
        Ok(())
    }

    /// What there is of the desktops that are paused: CR, VM that is not being deleted, and whether it is over.
    fn paused(&self) -> BTreeMap<Uuid, (Option<String>, Option<String>, bool)> {
        let held = self.database.all().filter_map(|row| {
            let key = Key::of_row(row.id);
            let (cr, vm) = (self.cluster.crs.get(&key), self.cluster.vms.get(&key));
            let paused = !row.ended && (row.paused || cr.is_some_and(|cr| cr.paused));
            let vm = vm.filter(|vm| !vm.deleting).map(|vm| vm.uid.clone());
            paused.then(|| (row.id, (cr.map(|cr| cr.uid.clone()), vm, row.ended)))
        });
        held.collect()
    }

    /// Whether all is as it should be when nothing happens any more.
    pub(crate) fn is_settled(&self) -> Result<(), String> {
        self.ends_are_final()?;
        for row in self.database.all() {
            let key = Key::of_row(row.id);
            let (cr, vm, vmi) = (self.cluster.crs.get(&key), self.cluster.vms.get(&key), self.cluster.vmis.get(&key));
            let ours = vm.filter(|vm| vm.owner == Some(Owner::Row(row.id)));
            let what = format!("{} ({:?}, {})", name(row.id), row.desired, row.status.as_str());
            match row.desired {
                Desired::Present if cr.is_none() => return Err(format!("{what} has no CR")),
                Desired::Present if ours.is_none() => return Err(format!("{what} has no VM")),
                Desired::Present if vmi.is_some_and(|vmi| vmi.ready) && row.status != RowStatus::Running => {
                    return Err(format!("{what} is ready, and does not say so"));
                }
                Desired::Present if row.generation > row.observed_generation => {
                    return Err(format!("{what} was not acted on"));
                }
                Desired::Present => (),
                Desired::Absent if !row.ended => return Err(format!("{what} does not end")),
                Desired::Absent if ours.is_some() => return Err(format!("{what} is over, and has a VM")),
                Desired::Absent if cr.is_some() => return Err(format!("{what} is over, and has a CR")),
                Desired::Absent if self.cluster.secrets.contains(&row.id.hyphenated().to_string()) => {
                    return Err(format!("{what} is over, and has a Secret"));
                }
                Desired::Absent => (),
            }
        }
        if self.aside.is_some() {
            return Err("the brake still holds".to_owned());
        }
        let ours = |id: &Uuid| *id == self.database.itself.id;
        for (key, (_, cr)) in &self.cluster.crs.objects {
            let lost = key.row_id().is_none_or(|id| self.database.row(id).is_none());
            if cr.owner.is_some() && cr.database.as_ref().is_some_and(ours) && lost {
                return Err(format!("the CR of {} has no row, and stays", short(key)));
            }
        }
        for (key, (_, vm)) in &self.cluster.vms.objects {
            let lost = key.row_id().is_none_or(|id| self.database.row(id).is_none());
            if vm.database.as_ref().is_some_and(ours) && lost {
                return Err(format!("the VM of {} has no row, and stays", short(key)));
            }
            let cr = self.cluster.crs.get(key);
            if let Some(Owner::Hand(uid)) = &vm.owner
                && cr.is_none_or(|cr| cr.uid != *uid)
            {
                return Err(format!("the VM of {} has no CR any more", short(key)));
            }
        }
        Ok(())
    }
}
