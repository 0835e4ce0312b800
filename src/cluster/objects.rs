//! What is read of CRs, VMs and VMIs: a handful of fields, so that caches stay small. An object that does not
//! decode would fail the list of all: of a CR, which people write, spec and status are decoded apart; of VM
//! and VMI only fields are read whose type KubeVirt's CRDs enforce.

use std::borrow::Cow;

use jiff::Timestamp;
use kube::Resource;
use kube::api::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use crate::crd::{CyberdeskSpec, CyberdeskStatus};
use crate::model::{Cr, RunStrategy, Vm, Vmi, VmiPhase};
use crate::names::{Key, Owner};
use crate::queue::Lane;

/// An object that a desktop is seen by.
pub trait Observed: Resource<DynamicType = ()> {
    /// What the decision reads of it.
    type Seen: Clone + PartialEq + Send + 'static;
    /// The desktop it belongs to, by its name. `None`: the name cannot be one of ours.
    fn key(&self) -> Option<Key>;
    /// What the decision reads of it.
    fn seen(&self) -> Self::Seen;
    /// Whether a desktop that is seen so is more likely to end than to be made.
    fn lane(seen: &Self::Seen) -> Lane;
}

macro_rules! resource {
    ($type:ty, $kind:literal, $group:literal, $version:literal, $plural:literal) => {
        impl Resource for $type {
            type DynamicType = ();
            type Scope = kube::core::NamespaceResourceScope;
            fn kind(_: &()) -> Cow<'_, str> {
                $kind.into()
            }
            fn group(_: &()) -> Cow<'_, str> {
                $group.into()
            }
            fn version(_: &()) -> Cow<'_, str> {
                $version.into()
            }
            fn plural(_: &()) -> Cow<'_, str> {
                $plural.into()
            }
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

/// A `Cyberdesk`. Spec and status are decoded apart: one that does not decode says so on itself.
#[derive(Clone, Debug, Deserialize)]
pub struct CrObject {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
    #[serde(default)]
    status: Value,
}
resource!(CrObject, "Cyberdesk", "cyberdesk.io", "v1alpha1", "cyberdesks");

impl Observed for CrObject {
    type Seen = Cr;

    fn key(&self) -> Option<Key> {
        self.metadata.name.as_deref().map(Key::new)
    }

    fn seen(&self) -> Cr {
        let spec = match &self.spec {
            Value::Null => Err("there is no spec".to_owned()),
            spec => CyberdeskSpec::deserialize(spec).map_err(|error| format!("spec: {error}")),
        };
        let status = match &self.status {
            Value::Null => Some(CyberdeskStatus::default()),
            status => CyberdeskStatus::deserialize(status).ok(),
        };
        Cr {
            uid: self.metadata.uid.clone().unwrap_or_default(),
            generation: self.metadata.generation.unwrap_or_default(),
            created: self.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0),
            owner: Owner::of(&self.metadata),
            deleting: self.metadata.deletion_timestamp.is_some(),
            spec,
            status_readable: status.is_some(),
            status: status.unwrap_or_default(),
        }
    }

    fn lane(seen: &Cr) -> Lane {
        if seen.deleting { Lane::Ends } else { Lane::Makes }
    }
}

/// A KubeVirt `VirtualMachine`.
#[derive(Clone, Debug, Deserialize)]
pub struct VmObject {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: VmSpec,
    #[serde(default)]
    status: VmStatus,
}
resource!(VmObject, "VirtualMachine", "kubevirt.io", "v1", "virtualmachines");

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct VmSpec {
    running: Option<bool>,
    run_strategy: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct VmStatus {
    conditions: Vec<KubevirtCondition>,
    state_change_requests: Vec<Value>,
}

/// A condition as KubeVirt writes them: unlike Kubernetes' own, most of its fields may be missing.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct KubevirtCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
    message: String,
}

impl KubevirtCondition {
    fn is(&self, kind: &str, status: &str) -> bool {
        self.kind == kind && self.status == status
    }
}

impl Observed for VmObject {
    type Seen = Vm;

    fn key(&self) -> Option<Key> {
        self.metadata.name.as_deref().and_then(Key::from_vm_name)
    }

    fn seen(&self) -> Vm {
        let failure = self.status.conditions.iter().find(|condition| condition.is("Failure", "True"));
        Vm {
            uid: self.metadata.uid.clone().unwrap_or_default(),
            owner: Owner::of(&self.metadata),
            deleting: self.metadata.deletion_timestamp.is_some(),
            run_strategy: match (self.spec.run_strategy.as_deref(), self.spec.running) {
                (Some("Always"), _) | (None, Some(true)) => RunStrategy::Always,
                (Some("RerunOnFailure"), _) => RunStrategy::RerunOnFailure,
                (Some("Once"), _) => RunStrategy::Once,
                _ => RunStrategy::Other,
            },
            restart_pending: !self.status.state_change_requests.is_empty(),
            failure: failure.map(|condition| condition.message.clone()),
        }
    }

    fn lane(seen: &Vm) -> Lane {
        if seen.deleting { Lane::Ends } else { Lane::Makes }
    }
}

/// A KubeVirt `VirtualMachineInstance`.
#[derive(Clone, Debug, Deserialize)]
pub struct VmiObject {
    metadata: ObjectMeta,
    #[serde(default)]
    status: VmiStatus,
}
resource!(VmiObject, "VirtualMachineInstance", "kubevirt.io", "v1", "virtualmachineinstances");

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct VmiStatus {
    phase: String,
    conditions: Vec<KubevirtCondition>,
    interfaces: Vec<Interface>,
    node_name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Interface {
    ip_address: Option<String>,
}

impl Observed for VmiObject {
    type Seen = Vmi;

    fn key(&self) -> Option<Key> {
        self.metadata.name.as_deref().and_then(Key::from_vm_name)
    }

    fn seen(&self) -> Vmi {
        let conditions = &self.status.conditions;
        // `Synchronized` appears only as False, with the error; `PodScheduled` is copied while False.
        let waiting = ["Synchronized", "PodScheduled"]
            .iter()
            .find_map(|kind| conditions.iter().find(|condition| condition.is(kind, "False")))
            .map(|condition| (condition.reason.clone(), condition.message.clone()));
        Vmi {
            uid: self.metadata.uid.clone().unwrap_or_default(),
            owner: Owner::of(&self.metadata),
            deleting: self.metadata.deletion_timestamp.is_some(),
            phase: match self.status.phase.as_str() {
                "" | "Pending" => VmiPhase::Pending,
                "Scheduling" => VmiPhase::Scheduling,
                "Scheduled" => VmiPhase::Scheduled,
                "Running" => VmiPhase::Running,
                "Succeeded" => VmiPhase::Succeeded,
                "Failed" => VmiPhase::Failed,
                _ => VmiPhase::Other,
            },
            ready: conditions.iter().any(|condition| condition.is("Ready", "True")),
            node: self.status.node_name.clone(),
            ip: self.status.interfaces.iter().find_map(|interface| interface.ip_address.clone()),
            waiting,
        }
    }

    fn lane(seen: &Vmi) -> Lane {
        if seen.deleting || matches!(seen.phase, VmiPhase::Succeeded | VmiPhase::Failed) {
            Lane::Ends
        } else {
            Lane::Makes
        }
    }
}

/// The number behind a resourceVersion: later writes of one kind have greater ones.
///
/// Kubernetes documents them as comparable since 1.35 (KEP-5504); etcd has always given them so. What
/// does not parse counts as newest, so that nothing is ever withheld on account of it.
pub(super) fn version(meta: &ObjectMeta) -> u64 {
    meta.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(u64::MAX)
}
