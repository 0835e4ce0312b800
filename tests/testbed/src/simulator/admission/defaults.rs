//! What virt-api writes into the objects it admits.

use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::quantity::milli;
use crate::kubevirt::enter_phase;

fn set_if_absent(parent: &mut Value, key: &str, value: impl FnOnce() -> Value) {
    if parent[key].is_null() || parent[key] == "" {
        parent[key] = value();
    }
}

/// A new VM's identity, kept for all its VMIs.
pub(super) fn firmware(spec: &mut Value) {
    let firmware = &mut spec["domain"]["firmware"];
    set_if_absent(firmware, "uuid", || json!(Uuid::new_v4()));
    set_if_absent(firmware, "serial", || json!(Uuid::new_v4()));
}

/// The note on which PCI layout a new VM or VMI has.
pub(super) fn pci_topology(metadata: &mut Value) {
    set_if_absent(&mut metadata["annotations"], "kubevirt.io/pci-topology-version", || json!("v3"));
}

/// The two that a VM gets at each write.
pub(super) fn architecture_and_machine(spec: &mut Value) {
    set_if_absent(spec, "architecture", || json!("amd64"));
    set_if_absent(&mut spec["domain"]["machine"], "type", || json!("q35"));
}

/// What the rules see of a VM's template; not stored.
pub(super) fn before_rules(spec: &mut Value) {
    architecture_and_machine(spec);
    guest_memory(spec);
    cpu_request(spec);
    cpu_topology(spec);
    pull_policies(spec);
    network(spec);
    disks_for_volumes(spec);
}

/// Everything that a new VMI gets.
pub(super) fn instance(spec: &mut Value) {
    before_rules(spec);
    set_if_absent(spec, "evictionStrategy", || json!("None"));
    let domain = &mut spec["domain"];
    set_if_absent(&mut domain["firmware"], "uuid", || json!(Uuid::new_v4()));
    set_if_absent(&mut domain["features"]["acpi"], "enabled", || json!(true));
    set_if_absent(&mut domain["cpu"], "model", || json!("host-model"));
    let sockets = domain["cpu"]["sockets"].as_i64().unwrap_or(1);
    set_if_absent(&mut domain["cpu"], "maxSockets", || json!(sockets * 4));
    if let Some(guest) = milli(&domain["memory"]["guest"]).filter(|_| domain["memory"]["maxGuest"].is_null()) {
        // In bytes: a quantity that reads the same, if not the same way.
        domain["memory"]["maxGuest"] = json!((guest * 4 / 1000).to_string());
    }
    if let Some(disks) = domain.pointer_mut("/devices/disks").and_then(Value::as_array_mut) {
        for disk in disks {
            if ["disk", "cdrom", "lun"].iter().all(|target| disk[*target].is_null()) {
                disk["disk"] = json!({});
            }
            for target in ["disk", "cdrom", "lun"] {
                if disk[target].is_object() {
                    set_if_absent(&mut disk[target], "bus", || json!("sata"));
                }
            }
        }
    }
}

/// The status with which a VMI begins.
pub(super) fn initial_status(status: &mut Value, spec: &Value, now: Timestamp) {
    enter_phase(status, "Pending", now);
    status["runtimeUser"] = json!(107);
    let cpu = &spec["domain"]["cpu"];
    status["currentCPUTopology"] =
        json!({ "sockets": cpu["sockets"], "cores": cpu["cores"], "threads": cpu["threads"] });
    let guest = &spec["domain"]["memory"]["guest"];
    if !guest.is_null() {
        status["memory"] = json!({ "guestAtBoot": guest, "guestCurrent": guest, "guestRequested": guest });
    }
}

fn guest_memory(spec: &mut Value) {
    let resources = &spec["domain"]["resources"];
    let known = [
        &resources["requests"]["memory"],
        &resources["limits"]["memory"],
        &spec["domain"]["memory"]["hugepages"]["pageSize"],
    ];
    let first = known.into_iter().find(|amount| milli(amount).unwrap_or(0) != 0).cloned();
    if let Some(amount) = first {
        set_if_absent(&mut spec["domain"]["memory"], "guest", || amount);
    }
}

/// Who names only a limit asks for as much.
fn cpu_request(spec: &mut Value) {
    let limit = spec["domain"]["resources"]["limits"]["cpu"].clone();
    if !limit.is_null() {
        set_if_absent(&mut spec["domain"]["resources"]["requests"], "cpu", || limit);
    }
}

fn cpu_topology(spec: &mut Value) {
    let cpu = &spec["domain"]["cpu"];
    if ["cores", "sockets", "threads"].iter().any(|part| cpu[*part].as_i64().unwrap_or(0) != 0) {
        return;
    }
    let resources = &spec["domain"]["resources"];
    let whole = |amount: &Value| milli(amount).map(|milli| (milli + 999) / 1000);
    let sockets = whole(&resources["limits"]["cpu"]).or_else(|| whole(&resources["requests"]["cpu"])).unwrap_or(1);
    let cpu = &mut spec["domain"]["cpu"];
    cpu["sockets"] = json!(i64::try_from(sockets).unwrap_or(1));
    cpu["cores"] = json!(1);
    cpu["threads"] = json!(1);
}

fn pull_policies(spec: &mut Value) {
    let Some(volumes) = spec.get_mut("volumes").and_then(Value::as_array_mut) else {
        return;
    };
    for volume in volumes.iter_mut().filter(|volume| volume["containerDisk"].is_object()) {
        let image = volume["containerDisk"]["image"].as_str().unwrap_or_default();
        let floats = image.ends_with(":latest") || !image.contains([':', '@']);
        let policy = if floats { "Always" } else { "IfNotPresent" };
        set_if_absent(&mut volume["containerDisk"], "imagePullPolicy", || json!(policy));
    }
}

/// A guest that names neither network nor interface gets the pod's.
fn network(spec: &mut Value) {
    let devices = &mut spec["domain"]["devices"];
    let none = |list: &Value| list.as_array().is_none_or(Vec::is_empty);
    if devices["autoattachPodInterface"] == false || !none(&devices["interfaces"]) || !none(&spec["networks"]) {
        return;
    }
    spec["domain"]["devices"]["interfaces"] = json!([{ "name": "default", "bridge": {} }]);
    spec["networks"] = json!([{ "name": "default", "pod": {} }]);
}

fn disks_for_volumes(spec: &mut Value) {
    let devices = &spec["domain"]["devices"];
    let names = |list: &Value| -> Vec<Value> {
        list.as_array().into_iter().flatten().map(|item| item["name"].clone()).collect()
    };
    let used: Vec<Value> = [names(&devices["disks"]), names(&devices["filesystems"])].concat();
    let missing: Vec<Value> = names(&spec["volumes"]).into_iter().filter(|name| !used.contains(name)).collect();
    if missing.is_empty() {
        return;
    }
    let disks = &mut spec["domain"]["devices"]["disks"];
    let mut all = disks.as_array().cloned().unwrap_or_default();
    all.extend(missing.into_iter().map(|name| json!({ "name": name })));
    *disks = Value::Array(all);
}
