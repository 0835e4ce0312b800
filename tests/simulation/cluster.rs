//! The cluster as a model: objects by name with UIDs and versions, their watch events, and KubeVirt's steps.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use cyberdesk_operator::crd::{CyberdeskSpec, CyberdeskStatus};
use cyberdesk_operator::model::{Cr, RunStrategy, StartRules, Vm, Vmi, VmiPhase};
use cyberdesk_operator::names::{Key, Owner};
use jiff::Timestamp;
use uuid::Uuid;

/// One change of one object, as a watch tells it. `None`: it is gone.
pub(crate) struct Change<T> {
    pub(crate) version: u64,
    pub(crate) key: Key,
    pub(crate) object: Option<T>,
}

/// All objects of one kind, and all that ever happened to them.
pub(crate) struct Kind<T> {
    pub(crate) objects: BTreeMap<Key, (u64, T)>,
    pub(crate) changes: Vec<Change<T>>,
}

impl<T> Default for Kind<T> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), changes: vec![] }
    }
}

impl<T: Clone + PartialEq> Kind<T> {
    pub(crate) fn get(&self, key: &Key) -> Option<&T> {
        self.objects.get(key).map(|(_, object)| object)
    }

    /// Writes an object; one that stays as it was is no change.
    pub(crate) fn put(&mut self, version: &mut u64, key: &Key, object: T) {
        if self.get(key) != Some(&object) {
            *version += 1;
            self.objects.insert(key.clone(), (*version, object.clone()));
            self.changes.push(Change { version: *version, key: key.clone(), object: Some(object) });
        }
    }

    pub(crate) fn remove(&mut self, version: &mut u64, key: &Key) -> bool {
        let there = self.objects.remove(key).is_some();
        if there {
            *version += 1;
            self.changes.push(Change { version: *version, key: key.clone(), object: None });
        }
        there
    }
}

/// Whom an object was made for, and the database that this is a row of.
pub(crate) type Mark = (Option<Owner>, Option<Uuid>);

#[derive(Default)]
pub(crate) struct Cluster {
    pub(crate) version: u64,
    pub(crate) crs: Kind<Cr>,
    pub(crate) vms: Kind<Vm>,
    pub(crate) vmis: Kind<Vmi>,
    /// By owner.
    pub(crate) secrets: BTreeSet<String>,
    /// VMs whose VMI was made once: under `Once` there is no other.
    started: BTreeSet<String>,
    uids: u64,
}

impl Cluster {
    pub(crate) fn uid(&mut self, what: &str) -> String {
        self.uids += 1;
        format!("{what}-{}", self.uids)
    }

    // ----- the API server

    /// POST of a CR: false if the name is taken.
    pub(crate) fn create_cr(&mut self, key: &Key, mark: Mark, spec: CyberdeskSpec, now: Timestamp) -> bool {
        let (owner, database) = mark;
        if self.crs.get(key).is_some() {
            return false;
        }
        let cr = Cr {
            uid: self.uid("cr"),
            version: (self.version + 1).to_string(),
            generation: 1,
            created: now,
            owner,
            database,
            deleting: false,
            held_by_kopf: false,
            paused: false,
            spec: Ok(spec),
            status_readable: true,
            status: CyberdeskStatus::default(),
        };
        self.crs.put(&mut self.version, key, cr);
        true
    }

    /// Changes the CR of this UID: false if it is not there.
    pub(crate) fn change_cr(&mut self, key: &Key, uid: &str, change: impl FnOnce(&mut Cr)) -> bool {
        let Some(mut cr) = self.crs.get(key).filter(|cr| cr.uid == uid).cloned() else { return false };
        let before = cr.clone();
        change(&mut cr);
        if cr != before {
            cr.version = (self.version + 1).to_string();
        }
        self.crs.put(&mut self.version, key, cr);
        true
    }

    pub(crate) fn delete_cr(&mut self, key: &Key, uid: Option<&str>) -> bool {
        self.crs.get(key).is_some_and(|cr| uid.is_none_or(|uid| uid == cr.uid))
            && self.crs.remove(&mut self.version, key)
    }

    /// POST of a VM: false if the name is taken.
    pub(crate) fn create_vm(
        &mut self,
        key: &Key,
        (owner, database): Mark,
        run_strategy: RunStrategy,
        now: Timestamp,
    ) -> bool {
        if self.vms.get(key).is_some() {
            return false;
        }
        let vm = Vm {
            uid: self.uid("vm"),
            adopted_name: None,
            owner,
            database,
            created: now,
            start: StartRules::default(),
            noticed: false,
            unheld: None,
            deleting: false,
            run_strategy,
            restart_pending: false,
            failure: None,
            failed_starts: 0,
        };
        self.vms.put(&mut self.version, key, vm);
        true
    }

    pub(crate) fn delete_vm(&mut self, key: &Key, uid: Option<&str>) -> bool {
        let vm = self.vms.get(key).filter(|vm| uid.is_none_or(|uid| uid == vm.uid)).cloned();
        let found = vm.is_some();
        if let Some(vm) = vm {
            self.vms.put(&mut self.version, key, Vm { deleting: true, ..vm });
        }
        found
    }

    pub(crate) fn delete_vmi(&mut self, key: &Key, uid: Option<&str>) -> bool {
        let vmi = self.vmis.get(key).filter(|vmi| uid.is_none_or(|uid| uid == vmi.uid)).cloned();
        let found = vmi.is_some();
        if let Some(vmi) = vmi {
            self.vmis.put(&mut self.version, key, Vmi { deleting: true, ..vmi });
        }
        found
    }

    // ----- KubeVirt and the guest

    /// KubeVirt takes the next step for this VM, towards `Running` or towards its end. What it did, if anything.
    pub(crate) fn kubevirt(&mut self, key: &Key, in_time: bool, now: Timestamp) -> Option<&'static str> {
        let vm = self.vms.get(key).cloned();
        let vmi = self.vmis.get(key).cloned();
        match (vm, vmi) {
            (Some(vm), None) if vm.deleting => {
                self.vms.remove(&mut self.version, key);
                Some("lets the VM go")
            }
            (Some(vm), None) if vm.run_strategy == RunStrategy::Once && self.started.contains(&vm.uid) => None,
            (Some(vm), None) if vm.run_strategy == RunStrategy::RerunOnFailure && self.stopped(&vm) => None,
            (Some(vm), None) => {
                self.started.insert(vm.uid.clone());
                let vmi = Vmi {
                    uid: self.uid("vmi"),
                    adopted_name: None,
                    owner: vm.owner.clone(),
                    database: vm.database,
                    created: now,
                    deleting: false,
                    gone_by: None,
                    phase: VmiPhase::Pending,
                    ready: false,
                    unready: None,
                    agent: false,
                    paused: false,
                    evicted: false,
                    node_lost: false,
                    node: None,
                    ip: None,
                    waiting: None,
                };
                self.vms.put(&mut self.version, key, Vm { restart_pending: false, noticed: true, ..vm });
                self.vmis.put(&mut self.version, key, vmi);
                Some("makes the VMI")
            }
            (Some(vm), Some(vmi)) if vm.deleting && !vmi.deleting => {
                self.vmis.put(&mut self.version, key, Vmi { deleting: true, ..vmi });
                Some("shuts the guest down")
            }
            (vm, Some(vmi)) => self.move_vmi(key, vm, vmi, in_time),
            (None, None) => None,
        }
    }

    fn move_vmi(&mut self, key: &Key, vm: Option<Vm>, vmi: Vmi, in_time: bool) -> Option<&'static str> {
        let over = matches!(vmi.phase, VmiPhase::Succeeded | VmiPhase::Failed);
        if vmi.deleting && over {
            self.vmis.remove(&mut self.version, key);
            return Some("lets the VMI go");
        }
        if vmi.deleting {
            let phase = if in_time && vmi.phase == VmiPhase::Running { VmiPhase::Succeeded } else { VmiPhase::Failed };
            self.vmis.put(&mut self.version, key, Vmi { phase, ..vmi });
            return Some("sees the guest down");
        }
        let next = match vmi.phase {
            VmiPhase::Pending => VmiPhase::Scheduling,
            VmiPhase::Scheduling => VmiPhase::Scheduled,
            VmiPhase::Scheduled => VmiPhase::Running,
            VmiPhase::Running if !vmi.ready => {
                let address = Some("10.0.0.1".to_owned());
                self.vmis.put(&mut self.version, key, Vmi { ready: true, ip: address, ..vmi });
                return Some("finds the guest ready");
            }
            // A guest that ended is deleted, unless its VM runs once.
            VmiPhase::Succeeded | VmiPhase::Failed
                if vm.as_ref().is_some_and(|vm| vm.run_strategy != RunStrategy::Once) =>
            {
                let vm = vm.expect("it was just seen");
                let again = vm.run_strategy == RunStrategy::Always || vmi.phase == VmiPhase::Failed;
                if !again {
                    self.started.insert(format!("{} stopped", vm.uid));
                }
                self.vms.put(&mut self.version, key, Vm { restart_pending: again, ..vm });
                self.vmis.put(&mut self.version, key, Vmi { deleting: true, ..vmi });
                return Some("clears the guest away");
            }
            _ => return None,
        };
        self.vmis.put(&mut self.version, key, Vmi { phase: next, ..vmi });
        Some("moves the VMI on")
    }

    fn stopped(&self, vm: &Vm) -> bool {
        self.started.contains(&format!("{} stopped", vm.uid))
    }

    /// The guest ends by itself, if it runs.
    pub(crate) fn guest_ends(&mut self, key: &Key, phase: VmiPhase) -> bool {
        let vmi = self.vmis.get(key).filter(|vmi| vmi.phase == VmiPhase::Running && !vmi.deleting).cloned();
        let runs = vmi.is_some();
        if let Some(vmi) = vmi {
            self.vmis.put(&mut self.version, key, Vmi { phase, ..vmi });
        }
        runs
    }

    /// All names that anything has.
    pub(crate) fn keys(&self) -> BTreeSet<Key> {
        let kinds = [self.crs.objects.keys()];
        kinds.into_iter().flatten().chain(self.vms.objects.keys()).chain(self.vmis.objects.keys()).cloned().collect()
    }
}
