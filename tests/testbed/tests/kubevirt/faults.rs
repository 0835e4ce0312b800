//! Bad manifests: each a fault in a good VM, by what is wrong.

use anyhow::Result;
use http::HeaderValue;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

/// A fault: what it is, and how it is put into the spec of a good VM.
pub(crate) struct Fault {
    pub(crate) name: &'static str,
    put: fn(&mut Value),
}

impl Fault {
    /// A VM of this name with the fault.
    pub(crate) fn vm(&self, name: &str) -> Value {
        let mut vm = good(name);
        (self.put)(&mut vm["spec"]);
        vm
    }
}

/// A VM that is admitted.
pub(crate) fn good(name: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": name },
        "spec": { "runStrategy": "Once", "template": { "spec": {
            "domain": { "memory": { "guest": "64Mi" }, "devices": { "disks": [{ "name": "root", "disk": { "bus": "virtio" } }] } },
            "volumes": [{ "name": "root", "containerDisk": { "image": "example.com/disk:1" } }],
        } } },
    })
}

fn volume(spec: &mut Value, source: Value) {
    let mut volume = json!({ "name": "more" });
    volume.as_object_mut().expect("an object").extend(source.as_object().cloned().unwrap_or_default());
    spec["template"]["spec"]["volumes"].as_array_mut().expect("a list").push(volume);
}

fn disk(spec: &mut Value, disk: Value) {
    spec["template"]["spec"]["domain"]["devices"]["disks"].as_array_mut().expect("a list").push(disk);
}

/// A second disk, with its volume.
fn more(spec: &mut Value, mut target: Value) {
    volume(spec, json!({ "emptyDisk": { "capacity": "1Gi" } }));
    target["name"] = json!("more");
    disk(spec, target);
}

fn network(spec: &mut Value, interfaces: Value, networks: Value) {
    spec["template"]["spec"]["domain"]["devices"]["interfaces"] = interfaces;
    spec["template"]["spec"]["networks"] = networks;
}

/// All that a template's author may trip over.
pub(crate) fn faults() -> Vec<Fault> {
    macro_rules! fault {
        ($name:literal, |$spec:ident| $put:expr) => {
            Fault {
                name: $name,
                put: |$spec| {
                    $put;
                },
            }
        };
    }
    vec![
        fault!("running and runStrategy at once", |spec| spec["running"] = json!(true)),
        fault!("neither running nor runStrategy", |spec| spec["runStrategy"] = json!(null)),
        fault!("an unknown runStrategy", |spec| spec["runStrategy"] = json!("Sometimes")),
        fault!("running alone, which is deprecated", |spec| {
            spec["runStrategy"] = json!(null);
            spec["running"] = json!(false)
        }),
        fault!("no template", |spec| spec["template"] = json!(null)),
        fault!("a host name that is no label", |spec| spec["template"]["spec"]["hostname"] = json!("Not_A_Label")),
        fault!("a host name of 64 characters", |spec| spec["template"]["spec"]["hostname"] = json!("x".repeat(64))),
        fault!("a subdomain that is none", |spec| spec["template"]["spec"]["subdomain"] = json!("a..b")),
        fault!("the reserved label kubevirt.io/created-by", |spec| spec["template"]["metadata"] =
            json!({ "labels": { "kubevirt.io/created-by": "me" } })),
        fault!("the reserved label kubevirt.io/migrationJobUID", |spec| spec["template"]["metadata"] =
            json!({ "labels": { "kubevirt.io/migrationJobUID": "me" } })),
        fault!("the reserved label kubevirt.io/nodeName", |spec| spec["template"]["metadata"] =
            json!({ "labels": { "kubevirt.io/nodeName": "me" } })),
        fault!("the reserved label kubevirt.io/migrationTargetNodeName", |spec| spec["template"]["metadata"] =
            json!({ "labels": { "kubevirt.io/migrationTargetNodeName": "me" } })),
        fault!("the reserved label kubevirt.io/schedulable", |spec| spec["template"]["metadata"] =
            json!({ "labels": { "kubevirt.io/schedulable": "me" } })),
        fault!("the reserved label kubevirt.io/install-strategy", |spec| spec["template"]["metadata"] =
            json!({ "labels": { "kubevirt.io/install-strategy": "me" } })),
        fault!("a template label that is no text", |spec| spec["template"]["metadata"] =
            json!({ "labels": { "owner": true } })),
        fault!("a memory request below 1M", |spec| spec["template"]["spec"]["domain"]["resources"] =
            json!({ "requests": { "memory": "1k" } })),
        fault!("a negative memory request", |spec| spec["template"]["spec"]["domain"]["resources"] =
            json!({ "requests": { "memory": "-1Gi" } })),
        fault!("a negative memory limit", |spec| spec["template"]["spec"]["domain"]["resources"] =
            json!({ "limits": { "memory": "-1Gi" } })),
        fault!("a memory request above its limit", |spec| spec["template"]["spec"]["domain"]["resources"] =
            json!({ "requests": { "memory": "2Gi" }, "limits": { "memory": "1Gi" } })),
        fault!("a CPU request above its limit", |spec| spec["template"]["spec"]["domain"]["resources"] =
            json!({ "requests": { "cpu": "2" }, "limits": { "cpu": "1" } })),
        fault!("a negative CPU request", |spec| spec["template"]["spec"]["domain"]["resources"] =
            json!({ "requests": { "cpu": "-1" } })),
        fault!("a negative CPU limit", |spec| spec["template"]["spec"]["domain"]["resources"] =
            json!({ "limits": { "cpu": "-1" } })),
        fault!("a quantity that is none", |spec| spec["template"]["spec"]["domain"]["resources"] =
            json!({ "requests": { "memory": "much" } })),
        fault!("a guest above its memory limit", |spec| spec["template"]["spec"]["domain"]["resources"] =
            json!({ "limits": { "memory": "32Mi" } })),
        fault!("no memory at all", |spec| spec["template"]["spec"]["domain"]["memory"] = json!(null)),
        fault!("hugepages of a size that is none", |spec| spec["template"]["spec"]["domain"]["memory"]["hugepages"] =
            json!({ "pageSize": "big" })),
        fault!("hugepages above the memory", |spec| spec["template"]["spec"]["domain"]["memory"]["hugepages"] =
            json!({ "pageSize": "1Gi" })),
        fault!("memory that is no multiple of its hugepages", |spec| spec["template"]["spec"]["domain"]["memory"] =
            json!({ "guest": "65Mi", "hugepages": { "pageSize": "2Mi" } })),
        fault!("more sockets than the most", |spec| spec["template"]["spec"]["domain"]["cpu"] =
            json!({ "sockets": 4, "maxSockets": 2 })),
        fault!("cores that are no number", |spec| spec["template"]["spec"]["domain"]["cpu"] =
            json!({ "cores": "two" })),
        fault!("machine type pc", |spec| spec["template"]["spec"]["domain"]["machine"] = json!({ "type": "pc" })),
        fault!("an unknown architecture", |spec| spec["template"]["spec"]["architecture"] = json!("vax")),
        fault!("secure boot without SMM", |spec| spec["template"]["spec"]["domain"]["firmware"] =
            json!({ "bootloader": { "efi": {} } })),
        fault!("an unknown evictionStrategy", |spec| spec["template"]["spec"]["evictionStrategy"] = json!("Never")),
        fault!("an unknown startStrategy", |spec| spec["template"]["spec"]["startStrategy"] = json!("Slowly")),
        fault!("an unknown DNS policy", |spec| spec["template"]["spec"]["dnsPolicy"] = json!("Sometimes")),
        fault!("DNS policy None without servers", |spec| spec["template"]["spec"]["dnsPolicy"] = json!("None")),
        fault!("an input device that is no tablet", |spec| spec["template"]["spec"]["domain"]["devices"]["inputs"] =
            json!([{ "name": "i", "type": "keyboard", "bus": "usb" }])),
        fault!("an input device on PS/2", |spec| spec["template"]["spec"]["domain"]["devices"]["inputs"] =
            json!([{ "name": "i", "type": "tablet", "bus": "ps2" }])),
        fault!("a negative grace period", |spec| spec["template"]["spec"]["terminationGracePeriodSeconds"] = json!(-1)),
        fault!("cloudInitNoCloud with user data of 2,049 bytes", |spec| volume(
            spec,
            json!({ "cloudInitNoCloud": { "userData": "x".repeat(2049) } })
        )),
        fault!("cloudInitNoCloud with network data of 2,049 bytes", |spec| volume(
            spec,
            json!({ "cloudInitNoCloud": { "userData": "x", "networkData": "x".repeat(2049) } })
        )),
        fault!("cloudInitNoCloud without a source", |spec| volume(spec, json!({ "cloudInitNoCloud": {} }))),
        fault!("cloudInitNoCloud with two sources of user data", |spec| volume(
            spec,
            json!({ "cloudInitNoCloud": { "userData": "x", "userDataBase64": "eA==" } })
        )),
        fault!("cloudInitNoCloud with base64 that is none", |spec| volume(
            spec,
            json!({ "cloudInitNoCloud": { "userDataBase64": "?" } })
        )),
        fault!("cloudInitConfigDrive with user data of 2,049 bytes", |spec| volume(
            spec,
            json!({ "cloudInitConfigDrive": { "userData": "x".repeat(2049) } })
        )),
        fault!("cloudInitConfigDrive with network data of 2,049 bytes", |spec| volume(
            spec,
            json!({ "cloudInitConfigDrive": { "userData": "x", "networkData": "x".repeat(2049) } })
        )),
        fault!("cloudInitConfigDrive without a source", |spec| volume(spec, json!({ "cloudInitConfigDrive": {} }))),
        fault!("cloudInitConfigDrive with two sources of user data", |spec| volume(
            spec,
            json!({ "cloudInitConfigDrive": { "userData": "x", "userDataBase64": "eA==" } })
        )),
        fault!("cloudInitConfigDrive with base64 that is none", |spec| volume(
            spec,
            json!({ "cloudInitConfigDrive": { "userDataBase64": "?" } })
        )),
        fault!("user data of 2,048 characters and more bytes", |spec| volume(
            spec,
            json!({ "cloudInitNoCloud": { "userData": "ü".repeat(2048) } })
        )),
        fault!("user data of 2,049 bytes in base64", |spec| volume(
            spec,
            json!({ "cloudInitNoCloud": { "userDataBase64": "eHh4".repeat(683) } })
        )),
        fault!("user data that is empty", |spec| volume(spec, json!({ "cloudInitNoCloud": { "userData": "" } }))),
        fault!("user data beside a Secret", |spec| volume(
            spec,
            json!({ "cloudInitNoCloud": { "userData": "x", "secretRef": { "name": "s" } } })
        )),
        fault!("a Secret under the name that Go has for it", |spec| volume(
            spec,
            json!({ "cloudInitNoCloud": { "userDataSecretRef": { "name": "s" } } })
        )),
        fault!("two sources of network data", |spec| volume(
            spec,
            json!({ "cloudInitNoCloud": { "userData": "x", "networkData": "x", "networkDataBase64": "eA==" } })
        )),
        fault!("two cloud-init volumes", |spec| volume(
            spec,
            json!({ "cloudInitNoCloud": { "userData": "x" }, "cloudInitConfigDrive": { "userData": "x" } })
        )),
        fault!("a volume without a source", |spec| volume(spec, json!({}))),
        fault!("a volume with two sources", |spec| volume(
            spec,
            json!({ "emptyDisk": { "capacity": "1Gi" }, "containerDisk": { "image": "x" } })
        )),
        fault!("two volumes of one name", |spec| volume(
            spec,
            json!({ "name": "root", "emptyDisk": { "capacity": "1Gi" } })
        )),
        fault!("a ConfigMap without a name", |spec| volume(spec, json!({ "configMap": {} }))),
        fault!("a Secret without a name", |spec| volume(spec, json!({ "secret": {} }))),
        fault!("a ServiceAccount without a name", |spec| volume(spec, json!({ "serviceAccount": {} }))),
        fault!("a host disk", |spec| volume(spec, json!({ "hostDisk": { "path": "/d", "type": "Disk" } }))),
        fault!("downward metrics", |spec| volume(spec, json!({ "downwardMetrics": {} }))),
        fault!("a disk without its volume", |spec| disk(spec, json!({ "name": "ghost", "disk": {} }))),
        fault!("two disks of one name", |spec| disk(spec, json!({ "name": "root", "disk": {} }))),
        fault!("a CD-ROM without its volume", |spec| disk(spec, json!({ "name": "ghost", "cdrom": {} }))),
        fault!("a disk with two targets", |spec| more(spec, json!({ "disk": {}, "cdrom": {} }))),
        fault!("a LUN of a container disk", |spec| more(spec, json!({ "lun": {} }))),
        fault!("a CD-ROM on virtio", |spec| more(spec, json!({ "cdrom": { "bus": "virtio" } }))),
        fault!("a read-only disk on SATA", |spec| more(spec, json!({ "disk": { "bus": "sata", "readonly": true } }))),
        fault!("a disk on an unknown bus", |spec| more(spec, json!({ "disk": { "bus": "pigeon" } }))),
        fault!("a disk in place 0 of the boot order", |spec| more(spec, json!({ "disk": {}, "bootOrder": 0 }))),
        fault!("a disk with an unknown cache", |spec| more(spec, json!({ "disk": {}, "cache": "sometimes" }))),
        fault!("a disk with an unknown IO mode", |spec| more(spec, json!({ "disk": {}, "io": "sometimes" }))),
        fault!("a disk whose serial has a blank", |spec| more(spec, json!({ "disk": {}, "serial": "a b" }))),
        fault!("a disk on IDE", |spec| spec["template"]["spec"]["domain"]["devices"]["disks"][0]["disk"]["bus"] =
            json!("ide")),
        fault!("a disk whose name is no label", |spec| {
            volume(spec, json!({ "name": "Not_A_Label", "emptyDisk": { "capacity": "1Gi" } }));
            disk(spec, json!({ "name": "Not_A_Label", "disk": {} }))
        }),
        fault!("two disks in one place of the boot order", |spec| {
            spec["template"]["spec"]["domain"]["devices"]["disks"][0]["bootOrder"] = json!(1);
            more(spec, json!({ "disk": {}, "bootOrder": 1 }))
        }),
        fault!("a network without an interface", |spec| network(spec, json!([]), json!([{ "name": "n", "pod": {} }]))),
        fault!("an interface without a network", |spec| network(
            spec,
            json!([{ "name": "n", "bridge": {} }]),
            json!([])
        )),
        fault!("a network of no type", |spec| network(
            spec,
            json!([{ "name": "n", "bridge": {} }]),
            json!([{ "name": "n" }])
        )),
        fault!("a network of two types", |spec| network(
            spec,
            json!([{ "name": "n", "bridge": {} }]),
            json!([{ "name": "n", "pod": {}, "multus": { "networkName": "m" } }])
        )),
        fault!("two networks of one name", |spec| network(
            spec,
            json!([{ "name": "n", "bridge": {} }]),
            json!([{ "name": "n", "pod": {} }, { "name": "n", "multus": { "networkName": "m" } }])
        )),
        fault!("two interfaces of one name", |spec| network(
            spec,
            json!([{ "name": "n", "bridge": {} }, { "name": "n", "bridge": {} }]),
            json!([{ "name": "n", "pod": {} }])
        )),
        fault!("two pod networks", |spec| network(
            spec,
            json!([{ "name": "n", "bridge": {} }, { "name": "o", "bridge": {} }]),
            json!([{ "name": "n", "pod": {} }, { "name": "o", "pod": {} }])
        )),
        fault!("masquerade on a Multus network", |spec| network(
            spec,
            json!([{ "name": "n", "masquerade": {} }]),
            json!([{ "name": "n", "multus": { "networkName": "m" } }])
        )),
        fault!("an interface with two bindings", |spec| network(
            spec,
            json!([{ "name": "n", "bridge": {}, "masquerade": {} }]),
            json!([{ "name": "n", "pod": {} }])
        )),
        fault!("a binding beside a plugin", |spec| network(
            spec,
            json!([{ "name": "n", "bridge": {}, "binding": { "name": "p" } }]),
            json!([{ "name": "n", "pod": {} }])
        )),
        fault!("an unknown network card", |spec| network(
            spec,
            json!([{ "name": "n", "bridge": {}, "model": "abacus" }]),
            json!([{ "name": "n", "pod": {} }])
        )),
        fault!("an interface in place 0 of the boot order", |spec| network(
            spec,
            json!([{ "name": "n", "bridge": {}, "bootOrder": 0 }]),
            json!([{ "name": "n", "pod": {} }])
        )),
        fault!("a MAC address that is none", |spec| network(
            spec,
            json!([{ "name": "n", "bridge": {}, "macAddress": "home" }]),
            json!([{ "name": "n", "pod": {} }])
        )),
        fault!("a port out of range", |spec| network(
            spec,
            json!([{ "name": "n", "masquerade": {}, "ports": [{ "port": 70000 }] }]),
            json!([{ "name": "n", "pod": {} }])
        )),
        fault!("slirp, which is no more", |spec| network(
            spec,
            json!([{ "name": "n", "slirp": {} }]),
            json!([{ "name": "n", "pod": {} }])
        )),
        fault!("passt, which is no more", |spec| network(
            spec,
            json!([{ "name": "n", "passt": {} }]),
            json!([{ "name": "n", "pod": {} }])
        )),
        fault!("macvtap, which is no more", |spec| network(
            spec,
            json!([{ "name": "n", "macvtap": {} }]),
            json!([{ "name": "n", "pod": {} }])
        )),
        fault!("two faults at once", |spec| {
            spec["runStrategy"] = json!("Sometimes");
            spec["template"]["spec"]["hostname"] = json!("Not_A_Label")
        }),
    ]
}

/// The answers of the real one, by fault.
pub(crate) const RECORDED: &str = include_str!("refusals.json");

/// What comes of creating this VM, as far as its author sees it: admitted and with which warnings, or refused and why.
pub(crate) async fn answer(client: &Client, vm: &Value) -> Result<Value> {
    judged(client, "/apis/kubevirt.io/v1/namespaces/default/virtualmachines?fieldValidation=Warn", vm).await
}

/// The same of any object that would be posted there, with a query in the path.
pub(crate) async fn judged(client: &Client, path: &str, object: &Value) -> Result<Value> {
    let request = http::Request::post(format!("{path}&dryRun=All"))
        .header("content-type", "application/json")
        .body(Body::from(object.to_string().into_bytes()))?;
    let answer = client.send(request).await?;
    let warning = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
    let warnings: Vec<String> = answer.headers().get_all("warning").iter().map(warning).collect();
    let body: Value = serde_json::from_slice(&answer.into_body().collect_bytes().await?)?;
    if body["kind"] == object["kind"] {
        return Ok(json!({ "admitted": true, "warnings": warnings }));
    }
    let mut answer = json!({ "code": body["code"], "reason": body["reason"], "message": body["message"] });
    if body["details"]["causes"].is_array() {
        answer["causes"] = body["details"]["causes"].clone();
    }
    Ok(answer)
}
