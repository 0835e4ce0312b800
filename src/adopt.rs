//! Taking over what the Kopf operator before this one made: what is whose, and what has to be written for it. Pure.
//!
//! That operator named its VMs by the bare id, or took them from a warm pool; it held its `Cyberdesk`s by a finalizer,
//! and wrote neither a provenance mark nor a UID anywhere. Here each of its desktops gets what one of ours has: the mark
//! on the VM, and the VM in the status of its `Cyberdesk`. All else follows from that, by the rules that hold for every
//! desktop. No VM is restarted, and nothing is deleted.
//!
//! What must stay true: a desktop that has had a VM never gets a second one. One whose VM is gone has it recorded all
//! the same, so that it ends.

use jiff::Timestamp;
use kube::api::DynamicObject;
use serde_json::Value;
use uuid::Uuid;

use crate::crd::{CyberdeskSpec, CyberdeskStatus, KopfStatus, StartClock, VirtualMachineRef};
use crate::model::{Cr, Desired, Row, RowStatus, StartRules, later};
use crate::names::{Key, Owner, adopted_name};
use crate::plan::deadline_by_hand;
use crate::survey::whole;

/// Label with which Kopf's operator named the desktop of a VM, or of its template.
const INSTANCE: &str = "cyberdesk-instance";
/// Stands for the UID of a VM that is gone, and that nobody wrote down.
const UNKNOWN_UID: &str = "unknown";

/// A VM that may be one of that operator's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FoundVm {
    pub(crate) name: String,
    pub(crate) uid: String,
    /// The desktop that it says it is of; else its name may tell.
    pub(crate) desktop: Option<Key>,
    /// Whether it was adopted before.
    pub(crate) adopted: bool,
}

impl FoundVm {
    /// Reads a VM. `None`: it is one that we made.
    pub(crate) fn of(vm: &DynamicObject) -> Option<Self> {
        let adopted = adopted_name(&vm.metadata).is_some() && Owner::of(&vm.metadata).is_some();
        if !adopted && Owner::of(&vm.metadata).is_some() {
            return None;
        }
        let named = |labels: &Value| labels[INSTANCE].as_str().map(Key::new);
        let of_vm = || vm.metadata.labels.as_ref()?.get(INSTANCE).map(|key| Key::new(key));
        let of_template = || named(&vm.data["spec"]["template"]["metadata"]["labels"]);
        let marked = adopted.then(|| Key::of_vm(&vm.metadata)).flatten();
        Some(Self {
            name: vm.metadata.name.clone()?,
            uid: vm.metadata.uid.clone()?,
            desktop: marked.or_else(of_vm).or_else(of_template),
            adopted,
        })
    }

    /// The desktop that it is of, as far as it says so.
    pub(crate) fn key(&self) -> Key {
        self.desktop.clone().unwrap_or_else(|| Key::new(&self.name))
    }
}

/// All that was found of one desktop.
#[derive(Clone, Debug)]
pub(crate) struct Found<'a> {
    pub(crate) key: &'a Key,
    pub(crate) row: Option<&'a Row>,
    pub(crate) cr: Option<&'a Cr>,
    /// Those that are not of our making.
    pub(crate) vms: &'a [FoundVm],
    /// Whether there is a VM of the name that we would give.
    pub(crate) is_made: bool,
}

/// What is to be done about a desktop.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Verdict {
    /// There is nothing of that operator about it.
    Nothing,
    /// A person must look at it, and why.
    Leave(String),
    /// It is taken over.
    Adopt(Box<Adoption>),
}

/// How a desktop is taken over.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Adoption {
    pub(crate) owner: Owner,
    /// Of a row: whose.
    pub(crate) user: Option<Uuid>,
    /// To be marked, with its VMI and Secret.
    pub(crate) vm: Option<FoundVm>,
    /// To be made, as Kopf would have: until its finalizer is taken off, nothing is done on account of it. It cannot be
    /// made in one call with `record`, as the API server takes no status with a create; and one without both would be
    /// taken for that of a new desktop, which gets a VM. A run that is cut short in between leaves it held, until the
    /// next.
    pub(crate) cr: Option<CyberdeskSpec>,
    /// To be written into the CR's status. It may be that of a VM that is gone.
    pub(crate) record: Option<VirtualMachineRef>,
    /// Its deadline.
    pub(crate) expires_at: Timestamp,
    /// Whether its guest was ready before.
    pub(crate) ran: bool,
    /// Whether Kopf's finalizer is to be taken off.
    pub(crate) release: bool,
}

impl Adoption {
    /// Whether its VM is gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.record.is_some() && self.vm.is_none()
    }

    /// The CR's status with what is to be recorded. A guest that is not ready gets the time of a start anew.
    pub(crate) fn status(&self, before: CyberdeskStatus, now: Timestamp) -> CyberdeskStatus {
        let clock =
            StartClock { since: now, deadline: Some(later(now, StartRules::default().deadline)), seconds_left: None };
        let legacy = self.record.as_ref().map(|vm| KopfStatus::of(&vm.name, self.expires_at));
        CyberdeskStatus {
            virtual_machine_ref: self.record.clone(),
            cyberdesk_create: legacy,
            start_clock: (self.vm.is_some() && !self.ran).then_some(clock),
            ..before
        }
    }

    /// What is done, in words.
    pub(crate) fn words(&self, row: Option<&Row>) -> String {
        let over = row.is_some_and(|row| row.ended || row.desired == Desired::Absent);
        let until = whole(self.expires_at);
        match &self.vm {
            Some(vm) if over => format!("VirtualMachine {}: left behind, the daemon ends it", vm.name),
            Some(vm) => format!("VirtualMachine {}: taken over, until {until}", vm.name),
            None if over => "Kopf's finalizer is taken off what is left".to_owned(),
            None if self.is_gone() => "its VirtualMachine is gone: the daemon ends it".to_owned(),
            None => format!("its Cyberdesk is taken over, until {until}"),
        }
    }
}

/// Decides about one desktop.
pub(crate) fn decide(found: &Found<'_>, now: Timestamp) -> Verdict {
    let Found { key, row, cr, vms, is_made } = *found;
    let held = cr.is_some_and(|cr| cr.held_by_kopf);
    let named = cr.and_then(|cr| cr.status.cyberdesk_create.as_ref()?.virtual_machine_ref.as_deref());
    let vm = match vms {
        [] => None,
        [vm] => Some(vm),
        several => match several.iter().find(|vm| Some(vm.name.as_str()) == named) {
            Some(vm) => Some(vm),
            None => {
                let names: Vec<&str> = several.iter().map(|vm| vm.name.as_str()).collect();
                return Verdict::Leave(format!("several VirtualMachines say that they are its: {}", names.join(", ")));
            }
        },
    };
    if let Some(vm) = vm.filter(|_| is_made) {
        return Verdict::Leave(format!("it has two VirtualMachines, {} and {}", vm.name, key.vm_name()));
    }
    if let Some((vm, uid)) = vm.zip(row.and_then(|row| row.vm_uid.as_ref())).filter(|(vm, uid)| vm.uid != **uid) {
        return Verdict::Leave(format!("its row has had another VirtualMachine ({uid}) than {}", vm.name));
    }
    let (owner, user) = match (row, cr) {
        (Some(row), _) if row.desired == Desired::Present && !row.exists => {
            return Verdict::Leave("its row has gone without a word".to_owned());
        }
        (Some(row), _) => (Owner::Row(row.id), Some(row.user_id)),
        (None, Some(cr)) => (Owner::Hand(cr.uid.clone()), None),
        (None, None) => {
            let Some(vm) = vm.filter(|vm| !vm.adopted) else { return Verdict::Nothing };
            return Verdict::Leave(format!("VirtualMachine {} has neither a row nor a Cyberdesk", vm.name));
        }
    };
    let lives = match row {
        Some(row) => !row.ended && row.desired == Desired::Present,
        None => cr.is_some_and(|cr| !cr.deleting),
    };
    let recorded = cr.filter(|cr| !cr.deleting).and_then(|cr| cr.status.virtual_machine_ref.as_ref());
    let known = recorded.is_some() || row.is_some_and(|row| row.vm_uid.is_some());
    let ran = row.is_some_and(|row| row.status == RowStatus::Running);
    // A row that is due ends by itself, and gets no VM before.
    let has_had = named.is_some() || ran && row.is_some_and(|row| row.expires_at > now);
    let record = match vm {
        _ if !lives || known || is_made => None,
        Some(vm) => Some(VirtualMachineRef { name: vm.name.clone(), uid: vm.uid.clone() }),
        None if has_had => {
            let name = named.map_or_else(|| key.to_string(), str::to_owned);
            Some(VirtualMachineRef { name, uid: UNKNOWN_UID.to_owned() })
        }
        None => None,
    };
    let spec = |row: &Row| CyberdeskSpec {
        timeout_ms: None,
        expires_at: Some(row.timeout_at),
        params: row.params.as_ref().and_then(Value::as_object).cloned(),
    };
    let make = record.is_some() && cr.is_none_or(|cr| cr.deleting);
    let vm = vm.filter(|vm| !vm.adopted || record.is_some()).cloned();
    if vm.is_none() && record.is_none() && !held {
        return Verdict::Nothing;
    }
    Verdict::Adopt(Box::new(Adoption {
        owner,
        user,
        vm,
        cr: row.filter(|_| make).map(spec),
        record,
        expires_at: row.map_or_else(|| cr.map_or(now, deadline_by_hand), |row| row.timeout_at),
        ran,
        release: held || make,
    }))
}

#[cfg(test)]
mod tests;
