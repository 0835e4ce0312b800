//! The `Cyberdesk` custom resource: the projection of a desktop for people with kubectl.
//!
//! A row's CR is written by us and kept as the row wants it. One that a person applies is theirs: its
//! spec is never written by us, and it gets its VM, status, deadline and cleanup without any row.

use jiff::Timestamp;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, CustomResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is wanted of a desktop.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq)]
#[kube(
    group = "cyberdesk.io",
    version = "v1alpha1",
    kind = "Cyberdesk",
    plural = "cyberdesks",
    shortname = "cd",
    shortname = "cds",
    category = "all",
    namespaced,
    doc = "A virtual desktop: one KubeVirt virtual machine with a deadline.",
    status = "CyberdeskStatus",
    validation = Rule::new("self.metadata.name.size() <= 49 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')")
        .message("the name must be a DNS label of at most 49 characters: the VM is named cyberdesk-NAME"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "VM", type_ = "string", json_path = ".status.virtualMachineRef.name"),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.node"),
    printcolumn(name = "IP", type_ = "string", json_path = ".status.ip"),
    printcolumn(name = "Expires", type_ = "string", json_path = ".status.expiryTime"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1),
    printcolumn(name = "User", type_ = "string", json_path = ".metadata.labels.cyberdesk\\.io/user", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct CyberdeskSpec {
    /// How long the desktop lives, in milliseconds from the creation of this object.
    ///
    /// Of this and expiresAt the earlier counts; with neither it lives for 24 hours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1000))]
    pub timeout_ms: Option<i64>,
    /// When the desktop ends. On the desktop of a database row this is the row's timeout_at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub expires_at: Option<Timestamp>,
    /// Choices that the VM template offers, such as which template to use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub params: Option<serde_json::Map<String, serde_json::Value>>,
}

/// What has become of a desktop.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct CyberdeskStatus {
    /// Where the desktop is in its life.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Why it is in this phase: one stable word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same for people; KubeVirt's own words where it has some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// `Ready`: the desktop can be used. `Started`: it was ready once; until then, what it waits for and until
    /// when. `Ended`: it is over, and nothing of it is left. `Paused`, while somebody has it left as it is: the rest of
    /// the status stays as it was then.
    #[schemars(schema_with = "conditions")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conditions: Option<Vec<Condition>>,
    /// The generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The virtual machine made for it. Once this is set, a vanished VM is never made again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_machine_ref: Option<VirtualMachineRef>,
    /// The same for gateways of the operator before this one, which read it here.
    #[serde(rename = "cyberdesk_create", skip_serializing_if = "Option::is_none")]
    pub cyberdesk_create: Option<KopfStatus>,
    /// How long its start, or its restart, may still take. Not there while none is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_clock: Option<StartClock>,
    /// When it was first ready.
    #[schemars(with = "Option<Time>")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Timestamp>,
    /// The VirtualMachineInstance that was last ready. Another UID is a restart; a live migration keeps it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmi_uid: Option<String>,
    /// How often its guest was started anew and became ready again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restarts: Option<i64>,
    /// When its deadline is.
    #[schemars(with = "Option<Time>")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expiry_time: Option<Timestamp>,
    /// The node that it runs on. A live migration changes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The address of its first interface that has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// How and why it ends, written before its VM is deleted: what was decided survives the operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
}

/// Where a desktop is in its life.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq, Hash)]
pub enum Phase {
    /// It waits for its VM.
    Pending,
    /// Its VM is there, the guest is not ready.
    Starting,
    /// The guest is ready.
    Running,
    /// It ends; its VM is being shut down.
    Stopping,
    /// It is over as somebody or its deadline wanted.
    Terminated,
    /// It is over, or was never started, because something went wrong.
    Error,
}

/// The clock of a start: it runs towards a deadline, or stands still because the cluster as a whole is the trouble.
///
/// All times are the API server's.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct StartClock {
    /// Since when it runs, or stands still, as it does now.
    #[schemars(with = "Time")]
    pub since: Timestamp,
    /// When the start is given up. Not there while the clock stands still.
    #[schemars(with = "Option<Time>")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// The seconds that are left while the clock stands still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<i64>,
}

/// The virtual machine of a desktop.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub struct VirtualMachineRef {
    /// Its name, which is also the name of its VirtualMachineInstance.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

/// What the handler `cyberdesk_create` of the operator before this one left in the status, as far as others read it.
/// All is text, for it has written times in more than one way.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct KopfStatus {
    /// The name of the virtual machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_machine_ref: Option<String>,
    /// When its deadline is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expiry_time: Option<String>,
}

impl KopfStatus {
    /// The same of a desktop of ours.
    pub(crate) fn of(vm: &str, expires_at: Timestamp) -> Self {
        let expiry_time = expires_at.strftime("%Y-%m-%dT%H:%M:%S+00:00").to_string();
        Self { virtual_machine_ref: Some(vm.to_owned()), expiry_time: Some(expiry_time) }
    }
}

/// A decided end.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub struct End {
    /// `Terminated` or `Error`.
    pub phase: Phase,
    /// Why: one stable word.
    pub reason: String,
    /// The same for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When it was decided.
    #[schemars(with = "Time")]
    pub at: Timestamp,
}

/// The CRD, as `deploy/crd` holds it.
pub fn definition() -> CustomResourceDefinition {
    Cyberdesk::crd()
}

fn any_object(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "type": "object", "nullable": true, "x-kubernetes-preserve-unknown-fields": true })
}

fn conditions(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    let text = |max: u32| serde_json::json!({ "type": "string", "maxLength": max });
    schemars::json_schema!({
        "type": "array",
        "nullable": true,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
            "properties": {
                "type": text(316),
                "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                "reason": text(1024),
                "message": text(32768),
                "observedGeneration": { "type": "integer", "format": "int64", "minimum": 0 },
                "lastTransitionTime": { "type": "string", "format": "date-time" },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// People apply the file without having the binary.
    #[test]
    fn the_shipped_manifest_is_what_the_binary_prints() {
        let shipped = include_str!("../deploy/crd/crd.yaml");
        let printed = serde_saphyr::to_string(&definition()).expect("a CRD is YAML");
        assert!(
            shipped == printed,
            "deploy/crd/crd.yaml is out of date; write it anew with:\n\
             cargo run --quiet --bin cyberdesk-operator -- crd > deploy/crd/crd.yaml"
        );
    }
}
