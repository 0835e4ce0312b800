//! Bad manifests are refused with KubeVirt's status, fields and words.

use anyhow::{Result, bail, ensure};
use cyberdesk_testbed::kubevirt::{vmis, vms};
use kube::Client;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

/// A fault in a good VM: where it is put, and the field and the words of the refusal.
struct Fault {
    put: fn(&mut Value),
    field: &'static str,
    words: &'static str,
}

fn faults() -> Vec<Fault> {
    macro_rules! fault {
        (|$spec:ident| $put:expr, $field:literal, $words:literal) => {
            Fault {
                put: |vm| {
                    let $spec = &mut vm["spec"];
                    $put;
                },
                field: $field,
                words: $words,
            }
        };
    }
    vec![
        fault!(|spec| spec["running"] = json!(true), "spec.running", "Running and RunStrategy are mutually exclusive"),
        fault!(|spec| spec["runStrategy"] = json!(null), "spec.running", "RunStrategy must be specified"),
        fault!(|spec| spec["runStrategy"] = json!("Sometimes"), "spec.runStrategy", "Invalid RunStrategy (Sometimes)"),
        fault!(
            |spec| spec["template"]["spec"]["hostname"] = json!("Not_A_Label"),
            "spec.template.spec.hostname",
            "does not conform to the kubernetes DNS_LABEL rules"
        ),
        fault!(
            |spec| spec["template"]["metadata"] = json!({ "labels": { "kubevirt.io/created-by": "me" } }),
            "spec.template.metadata.labels",
            "creation of the following reserved kubevirt.io/ labels on a VMI object is prohibited"
        ),
        fault!(
            |spec| spec["template"]["spec"]["domain"]["resources"] = json!({ "requests": { "memory": "1k" } }),
            "spec.template.spec.domain.resources.requests.memory",
            "must be greater than or equal to 1M."
        ),
        fault!(
            |spec| spec["template"]["spec"]["domain"]["resources"] =
                json!({ "requests": { "cpu": "2" }, "limits": { "cpu": "1" } }),
            "spec.template.spec.domain.resources.requests.cpu",
            "is greater than"
        ),
        fault!(
            |spec| spec["template"]["spec"]["domain"]["machine"] = json!({ "type": "pc" }),
            "spec.template.spec.domain.machine.type",
            "is not supported: pc (allowed values: [q35* pc-q35*])"
        ),
        fault!(
            |spec| spec["template"]["spec"]["domain"]["firmware"] = json!({ "bootloader": { "efi": {} } }),
            "spec.template.spec.domain",
            "has EFI SecureBoot enabled"
        ),
        fault!(
            |spec| volume(spec, json!({ "cloudInitNoCloud": { "userData": "x".repeat(2049) } })),
            "spec.template.spec.volumes[1].cloudInitNoCloud",
            "userdata exceeds 2048 byte limit. Should use UserDataSecretRef for larger data."
        ),
        fault!(
            |spec| volume(spec, json!({ "cloudInitNoCloud": { "userData": "" } })),
            "spec.template.spec.volumes[1].cloudInitNoCloud",
            "must have at least one userdatasource or one networkdatasource set."
        ),
        fault!(
            |spec| volume(spec, json!({ "cloudInitNoCloud": { "userData": "x", "userDataBase64": "eA==" } })),
            "spec.template.spec.volumes[1].cloudInitNoCloud",
            "must have only one userdatasource set."
        ),
        fault!(
            |spec| volume(spec, json!({ "cloudInitNoCloud": { "userDataBase64": "?" } })),
            "spec.template.spec.volumes[1].cloudInitNoCloud.userDataBase64",
            "is not a valid base64 value."
        ),
        fault!(
            |spec| volume(spec, json!({ "emptyDisk": { "capacity": "1Gi" }, "containerDisk": { "image": "x" } })),
            "spec.template.spec.volumes[1]",
            "must have exactly one source type set"
        ),
        fault!(
            |spec| volume(spec, json!({ "name": "root", "emptyDisk": { "capacity": "1Gi" } })),
            "spec.template.spec.volumes[1].name",
            "must not have the same Name."
        ),
        fault!(
            |spec| disk(spec, json!({ "name": "ghost", "disk": {} })),
            "spec.template.spec.domain.devices.disks[1].name",
            "'ghost' not found."
        ),
        fault!(
            |spec| disk(spec, json!({ "name": "root", "disk": {} })),
            "spec.template.spec.domain.devices.disks[1].name",
            "must not have the same Name."
        ),
        fault!(
            |spec| spec["template"]["spec"]["domain"]["devices"]["disks"][0]["disk"]["bus"] = json!("ide"),
            "spec.template.spec.domain.devices.disks[0].disk.bus",
            "IDE bus is not supported"
        ),
        fault!(
            |spec| spec["template"]["spec"]["networks"] = json!([{ "name": "n", "pod": {} }]),
            "spec.template.spec.networks[0].name",
            "'n' not found."
        ),
        fault!(
            |spec| spec["template"]["spec"]["domain"]["devices"]["interfaces"] = json!([{ "name": "n", "bridge": {} }]),
            "spec.template.spec.domain.devices.interfaces[0].name",
            "'n' not found."
        ),
        fault!(
            |spec| spec["template"]["spec"]["evictionStrategy"] = json!("Never"),
            "spec.template.spec.evictionStrategy",
            "is set with an unrecognized option: Never"
        ),
        fault!(
            |spec| spec["instancetype"] = json!({ "name": "small" }),
            "",
            "the simulator does not play instancetype"
        ),
        fault!(
            |spec| spec["template"]["metadata"] = json!({ "annotations": { "guest.testbed/do": "dance" } }),
            "spec.template.metadata.annotations",
            "no such command"
        ),
    ]
}

fn volume(spec: &mut Value, source: Value) {
    let mut volume = json!({ "name": "more" });
    volume.as_object_mut().expect("an object").extend(source.as_object().cloned().unwrap_or_default());
    spec["template"]["spec"]["volumes"].as_array_mut().expect("a list").push(volume);
}

fn disk(spec: &mut Value, disk: Value) {
    spec["template"]["spec"]["domain"]["devices"]["disks"].as_array_mut().expect("a list").push(disk);
}

fn good(name: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": name },
        "spec": { "runStrategy": "Once", "template": { "spec": {
            "domain": { "memory": { "guest": "64Mi" }, "devices": { "disks": [{ "name": "root", "disk": { "bus": "virtio" } }] } },
            "volumes": [{ "name": "root", "containerDisk": { "image": "example.com/disk:1" } }],
        } } },
    })
}

/// Each fault is refused, a good VM is given its defaults, and a VMI is protected from strangers.
pub(crate) async fn refuses_as_kubevirt_does(client: Client) -> Result<()> {
    let api = vms(&client, "default");
    for Fault { put, field, words } in faults() {
        let mut vm = good("bad");
        put(&mut vm);
        let created = api.create(&PostParams::default(), &serde_json::from_value(vm)?).await;
        let Err(kube::Error::Api(status)) = created else { bail!("{words}: not refused: {created:?}") };
        let prefix = "admission webhook \"virtualmachine-validator.kubevirt.io\" denied the request: ";
        ensure!(status.message.starts_with(prefix) && status.message.contains(words), "{words}: {}", status.message);
        ensure!((status.code, status.reason.as_str()) == (422, "Invalid"), "{words}: {status:?}");
        let causes = status.details.map(|details| details.causes).unwrap_or_default();
        let found = causes.iter().any(|cause| cause.field == field && cause.message.contains(words));
        ensure!(found, "{words}: causes are {causes:?}");
    }

    let vm = api.create(&PostParams::default(), &serde_json::from_value(good("good"))?).await?;
    let template = &vm.data["spec"]["template"];
    ensure!(template["spec"]["domain"]["firmware"]["uuid"].is_string(), "no firmware: {template}");
    ensure!(template["spec"]["domain"]["machine"]["type"] == "q35", "no machine: {template}");
    ensure!(template["metadata"]["annotations"]["kubevirt.io/pci-topology-version"] == "v3", "no note: {template}");

    let instances = vmis(&client, "default");
    let vmi = loop {
        if let Some(vmi) = instances.get_opt("good").await? {
            break vmi;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    let merge = |patch: Value| {
        let instances = instances.clone();
        async move { instances.patch("good", &PatchParams::default(), &Patch::Merge(patch)).await }
    };
    let written = merge(json!({ "status": { "phase": "Succeeded" } })).await?;
    ensure!(written.data["status"]["phase"] != "Succeeded", "a stranger wrote the status");
    let edited = merge(json!({ "spec": { "hostname": "other" } })).await;
    let Err(kube::Error::Api(status)) = edited else { bail!("a stranger edited the spec") };
    ensure!(status.code == 422 && status.message.contains("update of VMI object is restricted"), "{status:?}");
    let labelled = merge(json!({ "metadata": { "labels": { "kubevirt.io/schedulable": "x" } } })).await;
    ensure!(labelled.is_err(), "a stranger set a reserved label");
    merge(json!({ "metadata": { "labels": { "owner": "x" } } })).await?;
    ensure!(vmi.data["spec"]["domain"]["cpu"]["maxSockets"] == 4, "no defaults: {}", vmi.data["spec"]);
    api.delete("good", &Default::default()).await?;
    Ok(())
}
