//! What is read of CRs, VMs and VMIs: a handful of fields, so that caches stay small. An object that does not
//! decode would fail the list of all: of a CR, which people write, spec and status are decoded apart; of VM
//! and VMI only fields are read whose type KubeVirt's CRDs enforce.

use std::borrow::Cow;
use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Resource;
use kube::api::ObjectMeta;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::crd::{CyberdeskSpec, CyberdeskStatus, KopfStatus};
use crate::model::{Cr, RunStrategy, StartRules, Vm, Vmi, VmiPhase, later};
use crate::names::{KOPF_FINALIZER, Key, Owner, adopted_name, database_of, is_paused};
use crate::queue::Lane;

/// Seconds of grace of a VMI that does not say (KubeVirt's `DefaultGracePeriodSeconds`).
const DEFAULT_GRACE: i64 = 30;
/// What KubeVirt gives the pod beyond its guest's grace (`pkg/virt-controller/services/template.go`).
const POD_GRACE: SignedDuration = SignedDuration::from_secs(30);

/// An object that a desktop is seen by.
pub trait Observed: Resource<DynamicType = ()> {
    /// What the decision reads of it.
    type Seen: Clone + PartialEq + Send + 'static;
    /// The desktop it belongs to, by its name or as adopted. `None`: it cannot be one of ours.
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

/// What is read of an object's metadata. The rest is passed over as it comes: its managed fields alone would be most of
/// what a list takes in memory.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    finalizers: Option<Vec<String>>,
}

fn metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let read = Metadata::deserialize(deserializer)?;
    Ok(ObjectMeta {
        name: read.name,
        uid: read.uid,
        resource_version: read.resource_version,
        generation: read.generation,
        creation_timestamp: read.creation_timestamp,
        deletion_timestamp: read.deletion_timestamp,
        labels: read.labels,
        annotations: read.annotations,
        finalizers: read.finalizers,
        ..ObjectMeta::default()
    })
}

/// A `Cyberdesk`. Spec and status are decoded apart: one that does not decode says so on itself.
#[derive(Clone, Debug, Deserialize)]
pub struct CrObject {
    #[serde(deserialize_with = "metadata")]
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
            version: self.metadata.resource_version.clone().unwrap_or_default(),
            generation: self.metadata.generation.unwrap_or_default(),
            created: created(&self.metadata),
            owner: Owner::of(&self.metadata),
            database: database_of(&self.metadata),
            deleting: self.metadata.deletion_timestamp.is_some(),
            held_by_kopf: self.metadata.finalizers.iter().flatten().any(|name| name == KOPF_FINALIZER),
            paused: is_paused(&self.metadata),
            spec,
            status_readable: status.is_some(),
            status: status.unwrap_or_else(|| CyberdeskStatus {
                cyberdesk_create: kopf_status(&self.status),
                ..Default::default()
            }),
        }
    }

    fn lane(seen: &Cr) -> Lane {
        if seen.deleting { Lane::Ends } else { Lane::Makes }
    }
}

/// What the Kopf operator left in a status that cannot be read as ours: its first version wrote the same fields to the
/// status itself.
fn kopf_status(status: &Value) -> Option<KopfStatus> {
    [&status["cyberdesk_create"], status]
        .into_iter()
        .filter_map(|told| KopfStatus::deserialize(told).ok())
        .find(|told| told.virtual_machine_ref.is_some())
}

fn created(meta: &ObjectMeta) -> Timestamp {
    meta.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0)
}

/// A KubeVirt `VirtualMachine`.
#[derive(Clone, Debug, Deserialize)]
pub struct VmObject {
    #[serde(deserialize_with = "metadata")]
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
    start_failure: StartFailure,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct StartFailure {
    consecutive_fail_count: i64,
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
        Key::of_vm(&self.metadata)
    }

    fn seen(&self) -> Vm {
        let failure = self.status.conditions.iter().find(|condition| condition.is("Failure", "True"));
        let held = self.metadata.finalizers.iter().flatten().next().is_some();
        Vm {
            uid: self.metadata.uid.clone().unwrap_or_default(),
            adopted_name: adopted_name(&self.metadata).map(str::to_owned),
            owner: Owner::of(&self.metadata),
            database: database_of(&self.metadata),
            created: created(&self.metadata),
            start: self.metadata.annotations.as_ref().map(StartRules::read).unwrap_or_default(),
            noticed: held || !self.status.conditions.is_empty(),
            unheld: self.metadata.resource_version.clone().filter(|_| !held),
            deleting: self.metadata.deletion_timestamp.is_some(),
            run_strategy: match (self.spec.run_strategy.as_deref(), self.spec.running) {
                (Some("Always"), _) | (None, Some(true)) => RunStrategy::Always,
                (Some("RerunOnFailure"), _) => RunStrategy::RerunOnFailure,
                (Some("Once"), _) => RunStrategy::Once,
                (Some("Manual"), _) => RunStrategy::Manual,
                (Some("Halted"), _) | (None, Some(false)) => RunStrategy::Halted,
                _ => RunStrategy::Other,
            },
            restart_pending: !self.status.state_change_requests.is_empty(),
            failure: failure.map(|condition| condition.message.clone()),
            failed_starts: self.status.start_failure.consecutive_fail_count,
        }
    }

    fn lane(seen: &Vm) -> Lane {
        if seen.deleting { Lane::Ends } else { Lane::Makes }
    }
}

/// A KubeVirt `VirtualMachineInstance`.
#[derive(Clone, Debug, Deserialize)]
pub struct VmiObject {
    #[serde(deserialize_with = "metadata")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: VmiSpec,
    #[serde(default)]
    status: VmiStatus,
}
resource!(VmiObject, "VirtualMachineInstance", "kubevirt.io", "v1", "virtualmachineinstances");

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct VmiSpec {
    termination_grace_period_seconds: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct VmiStatus {
    phase: String,
    reason: String,
    conditions: Vec<KubevirtCondition>,
    interfaces: Vec<Interface>,
    node_name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Interface {
    ip_address: Option<String>,
}

impl VmiObject {
    /// Reason and message of a condition that does not hold.
    fn fault(&self, kind: &str) -> Option<(String, String)> {
        let condition = self.status.conditions.iter().find(|condition| condition.is(kind, "False"))?;
        Some((condition.reason.clone(), condition.message.clone()))
    }
}

impl Observed for VmiObject {
    type Seen = Vmi;

    fn key(&self) -> Option<Key> {
        Key::of_vm(&self.metadata)
    }

    fn seen(&self) -> Vmi {
        let holds = |kind: &str| self.status.conditions.iter().any(|condition| condition.is(kind, "True"));
        // These appear only as False, with the error; `PodScheduled` is the pod's, copied while False.
        let waiting = ["Synchronized", "PodScheduled", "DataVolumesReady"].iter().find_map(|kind| self.fault(kind));
        let deleting = self.metadata.deletion_timestamp.as_ref().map(|time| time.0);
        let grace = self.spec.termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE).max(0);
        Vmi {
            uid: self.metadata.uid.clone().unwrap_or_default(),
            adopted_name: adopted_name(&self.metadata).map(str::to_owned),
            owner: Owner::of(&self.metadata),
            database: database_of(&self.metadata),
            created: created(&self.metadata),
            deleting: deleting.is_some(),
            gone_by: deleting.map(|at| later(later(at, SignedDuration::from_secs(grace)), POD_GRACE)),
            phase: match self.status.phase.as_str() {
                "" | "Pending" => VmiPhase::Pending,
                "Scheduling" => VmiPhase::Scheduling,
                "Scheduled" => VmiPhase::Scheduled,
                "Running" => VmiPhase::Running,
                "Succeeded" => VmiPhase::Succeeded,
                "Failed" => VmiPhase::Failed,
                _ => VmiPhase::Other,
            },
            ready: holds("Ready"),
            unready: self.fault("Ready").filter(|_| self.status.phase == "Running"),
            agent: holds("AgentConnected"),
            paused: holds("Paused"),
            evicted: holds("EvictionRequested"),
            node_lost: self.status.reason == "NodeUnresponsive",
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn of_the_metadata_only_what_is_looked_at_is_kept() {
        let managed = json!([{ "manager": "kubectl", "fieldsType": "FieldsV1", "fieldsV1": { "f:spec": {} } }]);
        let meta = json!({ "name": "desk", "uid": "u", "resourceVersion": "7", "managedFields": managed });
        let cr: CrObject = serde_json::from_value(json!({ "metadata": meta })).expect("an object");
        let meta = cr.meta();
        assert_eq!((cr.key(), version(meta), meta.uid.as_deref()), (Some(Key::new("desk")), 7, Some("u")));
        assert_eq!(meta.managed_fields, None);
    }

    #[test]
    fn of_a_status_that_is_not_ours_what_kopf_recorded_is_read() {
        let read = |status: Value| {
            let cr = json!({ "metadata": { "name": "desk" }, "spec": {}, "status": status });
            let cr: CrObject = serde_json::from_value(cr).expect("an object");
            let seen = cr.seen();
            (seen.status_readable, seen.status.cyberdesk_create.and_then(|told| told.virtual_machine_ref))
        };
        let handler =
            json!({ "virtualMachineRef": "a", "expiryTime": "2025-04-22T10:00:00.123", "lastPhase": "Cloned" });
        assert_eq!(read(json!({ "cyberdesk_create": handler })), (true, Some("a".to_owned())));
        let both =
            json!({ "cyberdesk_create": handler, "virtualMachineRef": "b", "expiryTime": "2025-04-22T10:00:00" });
        assert_eq!(read(both), (false, Some("a".to_owned())));
        assert_eq!(read(json!({ "virtualMachineRef": "b" })), (false, Some("b".to_owned())));
        assert_eq!(read(json!({ "phase": "Odd" })), (false, None));
    }
}
