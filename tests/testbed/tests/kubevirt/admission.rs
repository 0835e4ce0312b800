//! Manifests are answered with KubeVirt's status, fields and words.

use anyhow::{Result, bail, ensure};
use cyberdesk_testbed::kubevirt::{vmis, vms};
use kube::Client;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::faults::{RECORDED, answer, faults, good};

/// Each bad manifest is answered as the real one answered it.
pub(crate) async fn answers_as_recorded(client: Client) -> Result<()> {
    let recorded: Value = serde_json::from_str(RECORDED)?;
    let mut complaints = Vec::new();
    for fault in faults() {
        let (seen, recorded) = (answer(&client, &fault.vm("bad")).await?, &recorded[fault.name]);
        if seen != *recorded {
            complaints.push(format!("{}\n  recorded {recorded}\n  seen     {seen}", fault.name));
        }
    }
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

/// What the simulator does not play is refused in so many words, not passed over in silence.
pub(crate) async fn refuses_what_it_does_not_play(client: Client) -> Result<()> {
    type Put = fn(&mut Value);
    let left_out: [(&str, Put); 6] = [
        ("instancetype", |spec| spec["instancetype"] = json!({ "name": "small" })),
        ("preference", |spec| spec["preference"] = json!({ "name": "small" })),
        ("dataVolumeTemplates", |spec| {
            spec["dataVolumeTemplates"] = json!([{ "metadata": { "name": "d" }, "spec": {} }])
        }),
        ("runStrategy WaitAsReceiver", |spec| spec["runStrategy"] = json!("WaitAsReceiver")),
        ("dedicated CPUs", |spec| {
            spec["template"]["spec"]["domain"]["cpu"] = json!({ "dedicatedCpuPlacement": true });
        }),
        ("no such command", |spec| {
            spec["template"]["metadata"] = json!({ "annotations": { "guest.testbed/do": "dance" } });
        }),
    ];
    for (words, put) in left_out {
        let mut vm = good("left-out");
        put(&mut vm["spec"]);
        let answer = answer(&client, &vm).await?;
        ensure!(answer["code"] == 422 && answer["message"].to_string().contains(words), "{words}: {answer}");
    }
    refuses_what_it_does_not_play_on_a_running_vm(client).await
}

async fn refuses_what_it_does_not_play_on_a_running_vm(client: Client) -> Result<()> {
    let api = vms(&client, "default");
    api.create(&PostParams::default(), &serde_json::from_value(good("runs"))?).await?;
    while api.get("runs").await?.data["status"]["created"] != true {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let resize = json!({ "spec": { "template": { "spec": { "domain": { "memory": { "guest": "2Gi" } } } } } });
    let Err(kube::Error::Api(status)) = api.patch("runs", &PatchParams::default(), &Patch::Merge(resize)).await else {
        bail!("a running VM was resized")
    };
    ensure!(status.code == 422 && status.message.contains("does not play live updates"), "{status:?}");

    let path = "/apis/subresources.kubevirt.io/v1/namespaces/default/virtualmachines/runs/stop";
    let request = http::Request::put(path).body(br#"{"gracePeriod":1}"#.to_vec())?;
    let Err(kube::Error::Api(status)) = client.request::<Value>(request).await else { bail!("an option was accepted") };
    ensure!(status.code == 400 && status.message.contains("does not play options"), "{status:?}");
    api.delete("runs", &Default::default()).await?;
    Ok(())
}

/// A good VM is given its defaults, and a VMI is protected from strangers.
pub(crate) async fn defaults_and_protects(client: Client) -> Result<()> {
    let api = vms(&client, "default");
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
