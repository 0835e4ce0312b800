//! Rules about volumes, cloud-init, disks and networks; part of the table in [`super::rules`].

use k8s_openapi::ByteString;
use serde_json::{Value, json};
use std::collections::HashMap;

use super::rules::{Causes, dns_label_faults};

/// Above this, user data and network data must be in a Secret.
const CLOUD_INIT_LIMIT: usize = 2048;

fn list(value: &Value) -> impl Iterator<Item = (usize, &Value)> {
    value.as_array().into_iter().flatten().enumerate()
}

fn name(value: &Value) -> &str {
    value["name"].as_str().unwrap_or_default()
}

fn text(value: &Value) -> Option<&str> {
    value.as_str().filter(|text| !text.is_empty())
}

/// A second one of the same name, and the first one's index.
fn twins(items: &Value) -> Vec<(usize, usize)> {
    let mut first: HashMap<&str, usize> = HashMap::new();
    let mut twins = Vec::new();
    for (index, item) in list(items) {
        match first.get(name(item)) {
            Some(other) => twins.push((index, *other)),
            None => drop(first.insert(name(item), index)),
        }
    }
    twins
}

/// Volumes: their names and sources.
pub(super) fn volumes(at: &str, spec: &Value, causes: &mut Causes) {
    let at = format!("{at}.volumes");
    for (index, other) in twins(&spec["volumes"]) {
        let words = format!("{at}[{index}] and {at}[{other}] must not have the same Name.");
        causes.invalid(&format!("{at}[{index}].name"), &words);
    }
    let sources = [
        "persistentVolumeClaim",
        "sysprep",
        "cloudInitNoCloud",
        "cloudInitConfigDrive",
        "containerDisk",
        "ephemeral",
        "emptyDisk",
        "hostDisk",
        "dataVolume",
        "configMap",
        "secret",
        "downwardAPI",
        "serviceAccount",
        "downwardMetrics",
        "memoryDump",
        "containerPath",
    ];
    for (index, volume) in list(&spec["volumes"]) {
        let at = format!("{at}[{index}]");
        if sources.iter().filter(|source| volume[**source].is_object()).count() != 1 {
            causes.invalid(&at, &format!("{at} must have exactly one source type set"));
        }
        if volume["downwardMetrics"].is_object() {
            causes.invalid(&at, "downwardMetrics disks are not allowed: DownwardMetrics feature gate is not enabled.");
        }
        if volume["hostDisk"].is_object() {
            causes.invalid(&at, "HostDisk feature gate is not enabled");
        }
        for (source, key) in [("configMap", "name"), ("secret", "secretName"), ("serviceAccount", "serviceAccountName")]
        {
            if volume[source].is_object() && text(&volume[source][key]).is_none() {
                let field = format!("{at}.{source}.{key}");
                causes.invalid(&field, &format!("{field} is a required field"));
            }
        }
    }
}

/// Cloud-init volumes: one source of user data, one of network data, neither above the limit.
pub(super) fn cloud_init(at: &str, spec: &Value, causes: &mut Causes) {
    for (index, volume) in list(&spec["volumes"]) {
        for source in ["cloudInitNoCloud", "cloudInitConfigDrive"] {
            if volume[source].is_object() {
                cloud_init_source(&format!("{at}.volumes[{index}].{source}"), source, &volume[source], causes);
                break;
            }
        }
    }
}

fn cloud_init_source(at: &str, source: &str, data: &Value, causes: &mut Causes) {
    let mut sources = 0;
    // KubeVirt's words differ by a blank between the two kinds.
    let kinds = [
        ("user", "secretRef", "UserDataSecretRef", "userdatasource"),
        ("network", "networkDataSecretRef", "NetworkDataSecretRef", "networkdata source"),
    ];
    for (kind, reference, advice, noun) in kinds {
        let (mut count, mut length) = (0, 0);
        if text(&data[reference]["name"]).is_some() {
            count += 1;
        }
        if let Some(encoded) = text(&data[format!("{kind}DataBase64")]) {
            count += 1;
            match serde_json::from_value::<ByteString>(json!(encoded)) {
                Ok(decoded) => length = decoded.0.len(),
                Err(_) => {
                    let field = format!("{at}.{kind}DataBase64");
                    causes.invalid(&field, &format!("{field}.{source}.{kind}DataBase64 is not a valid base64 value."));
                }
            }
        }
        if let Some(plain) = text(&data[format!("{kind}Data")]) {
            count += 1;
            length = plain.len();
        }
        if count > 1 {
            causes.invalid(at, &format!("{at} must have only one {noun} set."));
        }
        if length > CLOUD_INIT_LIMIT {
            let words =
                format!("{at} {kind}data exceeds {CLOUD_INIT_LIMIT} byte limit. Should use {advice} for larger data.");
            causes.invalid(at, &words);
        }
        sources += count;
    }
    if sources == 0 {
        causes.invalid(at, &format!("{at} must have at least one userdatasource or one networkdatasource set."));
    }
}

/// Only of a VMI: each volume is used by a disk.
pub(super) fn volumes_have_disks(at: &str, spec: &Value, causes: &mut Causes) {
    let devices = &spec["domain"]["devices"];
    for (index, volume) in list(&spec["volumes"]) {
        let used = |kind: &str| list(&devices[kind]).any(|(_, device)| name(device) == name(volume));
        if volume["memoryDump"].is_null() && !used("disks") && !used("filesystems") {
            let field = format!("{at}.domain.volumes[{index}].name");
            causes.invalid(&field, &format!("{field} '{}' not found.", name(volume)));
        }
    }
}

/// Each disk has its volume; no two devices have the same place in the boot order.
pub(super) fn boot_order(at: &str, spec: &Value, causes: &mut Causes) {
    let devices = &spec["domain"]["devices"];
    let mut taken: Vec<i64> = Vec::new();
    let mut place = |field: &str, order: &Value, causes: &mut Causes| {
        let Some(order) = order.as_i64() else { return };
        if taken.contains(&order) {
            causes.invalid(field, &format!("Boot order for {field} already set for a different device."));
        }
        taken.push(order);
    };
    for (index, disk) in list(&devices["disks"]) {
        let at = format!("{at}.domain.devices.disks[{index}]");
        let has_volume = list(&spec["volumes"]).any(|(_, volume)| name(volume) == name(disk));
        if !has_volume && disk["cdrom"].is_null() {
            causes.invalid(&format!("{at}.name"), &format!("{at}.Name '{}' not found.", name(disk)));
        } else if !has_volume {
            let words = "DeclarativeHotplugVolumes feature gate not enabled, cannot define an empty CD-ROM disk";
            causes.invalid(&format!("{at}.name"), words);
        }
        if has_volume && disk["lun"].is_object() {
            let field = format!("{at}.lun");
            causes.invalid(
                &field,
                &format!("{field} can only be mapped to a DataVolume or PersistentVolumeClaim volume."),
            );
        }
        let metrics = list(&spec["volumes"]).any(|(_, it)| name(it) == name(disk) && it["downwardMetrics"].is_object());
        if metrics && disk["disk"].is_null() {
            let field = format!("{at}.disk");
            let words = format!("DownwardMetrics volume must be mapped to a disk, but disk is not set on {field}.");
            causes.add("FieldValueRequired", &field, &words);
        }
        place(&format!("{at}.bootOrder"), &disk["bootOrder"], causes);
    }
    for (index, interface) in list(&devices["interfaces"]) {
        if interface["bootOrder"].as_i64().is_some_and(|order| order < 1) {
            let at = format!("{at}[{index}]");
            causes.invalid(&format!("{at}.bootOrder"), &format!("{at} must have a boot order > 0, if supplied"));
        } else {
            place(&format!("{at}.domain.devices.interfaces[{index}].bootOrder"), &interface["bootOrder"], causes);
        }
    }
}

/// Input devices: tablets only.
pub(super) fn inputs(at: &str, spec: &Value, causes: &mut Causes) {
    for (index, input) in list(&spec["domain"]["devices"]["inputs"]) {
        let at = format!("{at}.domain.devices.inputs[{index}]");
        if text(&input["bus"]).is_some_and(|bus| !["virtio", "usb"].contains(&bus)) {
            causes.invalid(&format!("{at}.bus"), "Input device can have only virtio or usb bus.");
        }
        if input["type"] != "tablet" {
            causes.invalid(&format!("{at}.type"), "Input device can have only tablet type.");
        }
    }
}

/// Disks: names, targets, buses.
pub(super) fn disks(at: &str, spec: &Value, causes: &mut Causes) {
    let at = format!("{at}.domain.devices.disks");
    let items = &spec["domain"]["devices"]["disks"];
    let twins = twins(items);
    for (index, disk) in list(items) {
        let here = format!("{at}[{index}]");
        for (_, other) in twins.iter().filter(|(twin, _)| *twin == index) {
            causes.invalid(&format!("{here}.name"), &format!("{here} and {at}[{other}] must not have the same Name."));
        }
        if ["disk", "lun", "cdrom"].iter().filter(|target| disk[**target].is_object()).count() > 1 {
            causes.invalid(&here, &format!("{here} can only have a single target type defined"));
        }
        if disk["bootOrder"].as_i64().is_some_and(|order| order < 1) {
            causes.invalid(&format!("{here}.bootOrder"), &format!("{here} must have a boot order > 0, if supplied"));
        }
        disk_bus(&here, disk, causes);
        let plain = |c: char| c.is_ascii_alphanumeric() || "_.+-".contains(c);
        if text(&disk["serial"]).is_some_and(|serial| !serial.chars().all(plain)) {
            let words = format!("{here} must be made up of the following characters [A-Za-z0-9_.+-], if specified");
            causes.invalid(&format!("{here}.serial"), &words);
        }
        if text(&disk["cache"]).is_some_and(|cache| !["none", "writethrough", "writeback"].contains(&cache)) {
            let field = format!("{here}.cache");
            causes
                .invalid(&field, &format!("{field} has invalid value {}", disk["cache"].as_str().unwrap_or_default()));
        }
        // KubeVirt names these fields with the path twice.
        if text(&disk["io"]).is_some_and(|mode| !["native", "threads"].contains(&mode)) {
            let words = format!("Disk IO mode for {at} is not supported. Supported modes are: native, threads.");
            causes.add("FieldValueNotSupported", &format!("{at}.domain.devices.disks[{index}].io"), &words);
        }
        for fault in dns_label_faults(name(disk)) {
            causes.invalid(&format!("{at}.domain.devices.disks[{index}].name"), fault);
        }
    }
}

fn disk_bus(here: &str, disk: &Value, causes: &mut Causes) {
    let Some(target) = ["disk", "lun", "cdrom"].into_iter().find(|target| disk[*target].is_object()) else {
        return;
    };
    let Some(bus) = text(&disk[target]["bus"]) else {
        return;
    };
    let field = format!("{here}.{target}.bus");
    match bus {
        "ide" => causes.invalid(&field, "IDE bus is not supported"),
        "virtio" if target == "cdrom" => causes.invalid(&field, "Bus type virtio is invalid for CD-ROM device"),
        "sata" if target == "disk" && disk["disk"]["readonly"] == true => {
            causes.invalid(&field, "sata hard-disks do not support read-only.");
        }
        "virtio" | "sata" | "scsi" | "usb" => {}
        other => {
            let words =
                format!("{here} is set with an unrecognized bus {other}, must be one of: [virtio scsi sata usb]");
            causes.invalid(&field, &words);
        }
    }
}

/// Networks and interfaces: one for each of the other, by name.
pub(super) fn networks(at: &str, spec: &Value, causes: &mut Causes) {
    let (networks, interfaces) = (&spec["networks"], &spec["domain"]["devices"]["interfaces"]);
    let device = |index: usize| format!("{at}.domain.devices.interfaces[{index}]");
    if list(networks).filter(|(_, network)| network["pod"].is_object()).count() > 1 {
        let field = format!("{at}.interfaces");
        causes.add(
            "FieldValueDuplicate",
            &field,
            &format!("more than one interface is connected to a pod network in {field}"),
        );
    }
    for (index, network) in list(networks) {
        let field = format!("{at}.networks[{index}]");
        match ["pod", "multus", "resourceClaim"].iter().filter(|kind| network[**kind].is_object()).count() {
            0 => causes.add("FieldValueRequired", &field, "should have a network type"),
            1 => {}
            _ => causes.add("FieldValueRequired", &field, "should have only one network type"),
        }
    }
    let network_of =
        |interface: &Value| list(networks).map(|(_, network)| network).find(|network| name(network) == name(interface));
    for (index, interface) in list(interfaces) {
        let methods = ["bridge", "masquerade", "sriov", "passtBinding"];
        if interface["binding"].is_object() && methods.iter().any(|method| interface[*method].is_object()) {
            let words = format!(
                "logical {} interface cannot have both binding plugin and interface binding method",
                name(interface)
            );
            causes.invalid(&format!("{}.binding", device(index)), &words);
        }
        if interface["masquerade"].is_object()
            && !network_of(interface).is_some_and(|network| network["pod"].is_object())
        {
            causes
                .invalid(&format!("{}.name", device(index)), "Masquerade interface only implemented with pod network");
        }
    }
    for (index, _) in twins(networks) {
        let twin = name(&networks[index]);
        let words = format!("Network with name {twin:?} already exists, every network must have a unique name");
        causes.add("FieldValueDuplicate", &format!("{at}.networks[{index}].name"), &words);
    }
    for (index, network) in list(networks) {
        if !list(interfaces).any(|(_, interface)| name(interface) == name(network)) {
            let field = format!("{at}.networks[{index}].name");
            causes.add("FieldValueRequired", &field, &format!("{field} '{}' not found.", name(network)));
        }
    }
    for (index, _) in twins(interfaces) {
        let words = "Only one interface can be connected to one specific network";
        causes.add("FieldValueDuplicate", &format!("{}.name", device(index)), words);
    }
    for (index, interface) in list(interfaces) {
        let field = format!("{}.name", device(index));
        if network_of(interface).is_none() {
            causes.invalid(&field, &format!("{field} '{}' not found.", name(interface)));
        }
        let known = ["e1000", "e1000e", "igb", "ne2k_pci", "pcnet", "rtl8139", "virtio"];
        if let Some(model) = text(&interface["model"]).filter(|model| !known.contains(model)) {
            let words = format!("interface {field} uses model {model} that is not supported.");
            causes.add("FieldValueNotSupported", &format!("{}.model", device(index)), &words);
        }
        if let Some(address) = text(&interface["macAddress"]).filter(|address| !is_mac_address(address)) {
            let words = format!("interface {field} has malformed MAC address ({address}).");
            causes.invalid(&format!("{}.macAddress", device(index)), &words);
        }
        for (at, port) in list(&interface["ports"]) {
            let field = format!("{}.ports[{at}]", device(index));
            match port["port"].as_i64().unwrap_or(0) {
                0 => causes.add("FieldValueRequired", &field, "Port field is mandatory."),
                1..=65536 => {}
                _ => causes.invalid(&field, "Port field must be in range 0 < x < 65536."),
            }
        }
    }
}

/// Six bytes in hexadecimal, with colons or dashes between them.
fn is_mac_address(text: &str) -> bool {
    let byte = |part: &str| part.len() == 2 && part.chars().all(|c| c.is_ascii_hexdigit());
    [':', '-'].iter().any(|between| text.split(*between).count() == 6 && text.split(*between).all(byte))
}

/// Only of a VM's creation: bindings that KubeVirt no longer has.
pub(super) fn discontinued_bindings(at: &str, spec: &Value, causes: &mut Causes) {
    let gone = [
        ("slirp", "Slirp interface support has been discontinued since v1.3"),
        ("passt", "Passt network binding has been discontinued since v1.3"),
        ("macvtap", "Macvtap network binding has been discontinued since v1.3"),
    ];
    for (index, interface) in list(&spec["domain"]["devices"]["interfaces"]) {
        for (binding, words) in gone {
            if interface[binding].is_object() {
                causes.invalid(&format!("{at}.domain.devices.interfaces[{index}].{binding}"), words);
            }
        }
    }
}
