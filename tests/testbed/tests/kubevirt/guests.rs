//! Guests follow their scripts.

use anyhow::Context;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{Api, ListParams, PostParams};
use serde_json::{Value, json};

use crate::event::{Event, Kind};
use crate::lives::{Life, life};

/// Each script by what the guest does.
pub(crate) fn lives() -> Vec<Life> {
    vec![
        life!("agent connects and goes silent", |stage| {
            stage.create("Once", annotated("agent", "2s")).await?;
            stage.until(Kind::Vm, "the agent's hello", |vm| vm.condition("AgentConnected") == Some("T()")).await?;
            stage.tell("agent-disconnect").await?;
            stage.until(Kind::Vm, "no agent", |vm| vm.condition("AgentConnected").is_none()).await?;
            stage.delete_vm().await
        }),
        life!("pause and go on", |stage| {
            stage.create("Once", |_| ()).await?;
            stage.ready().await?;
            stage.tell("pause").await?;
            stage.until(Kind::Vm, "Paused", |vm| vm.state == "Paused").await?;
            stage.until(Kind::Vmi, "a paused VMI that runs", |vmi| vmi.state == "Running").await?;
            stage.tell("unpause").await?;
            stage.until(Kind::Vm, "Running", |vm| vm.state == "Running" && vm.marked("ready")).await?;
            stage.delete_vm().await
        }),
        life!("migrate to another node", |stage| {
            stage.create("Once", |_| ()).await?;
            stage.ready().await?;
            let before = stage.vmi().await?;
            stage.tell("migrate").await?;
            let after =
                stage.vmi_when("on another node", |vmi| vmi["nodeName"] != before.data["status"]["nodeName"]).await?;
            anyhow::ensure!(before.metadata.uid == after.metadata.uid, "it is another VMI");
            let address = |vmi: &kube::api::DynamicObject| vmi.data["status"]["interfaces"][0]["ipAddress"].clone();
            anyhow::ensure!(address(&before) != address(&after), "the address is the same");
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("secret is waited for", |stage| {
            let with_secret = |vm: &mut Value| {
                let volume = json!({ "name": "data", "cloudInitNoCloud": { "secretRef": { "name": "user-data" } } });
                let volumes = &mut vm["spec"]["template"]["spec"]["volumes"];
                volumes.as_array_mut().expect("a list").push(volume);
            };
            stage.create("Once", with_secret).await?;
            let pods = Api::<Pod>::namespaced(stage.client(), "secret");
            let creating = |pod: &Pod| {
                let status = serde_json::to_value(pod).unwrap_or_default();
                status["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ContainerCreating"
            };
            stage
                .eventually("a container that waits", async || {
                    Ok(pods.list(&ListParams::default()).await?.items.iter().any(creating))
                })
                .await?;
            let secret = json!({ "metadata": { "name": "user-data" } });
            let secrets = Api::<Secret>::namespaced(stage.client(), "secret");
            secrets.create(&PostParams::default(), &serde_json::from_value(secret)?).await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("quota refuses the pod", |stage| {
            stage.create("Once", annotated("never-schedules", "quota")).await?;
            let refused =
                |vmi: &Event| vmi.state == "Pending" && vmi.condition("Synchronized") == Some("F(FailedCreate)");
            stage.until(Kind::Vmi, "a refused pod", refused).await?;
            let starts = |vm: &Event| vm.state == "Starting" && vm.condition("Synchronized") == Some("F(FailedCreate)");
            stage.until(Kind::Vm, "a VM that starts for ever", starts).await?;
            let vmi = stage.vmi().await?;
            let message = vmi.data["status"]["conditions"].to_string();
            anyhow::ensure!(message.contains("exceeded quota"), "{message}");
            stage.delete_vm().await
        }),
        life!("drain shuts the guest down", |stage| {
            stage.create("RerunOnFailure", |_| ()).await?;
            stage.ready().await?;
            stage.tell("drain").await?;
            stage.at_rest("Stopped").await?;
            stage.delete_vm().await
        }),
        life!("evicted for want of room", |stage| {
            stage.create("Once", |_| ()).await?;
            stage.ready().await?;
            stage.tell("evict").await?;
            stage.until(Kind::Vmi, "a VMI without the VM's finalizer", |vmi| vmi.finalizers == ["FG"]).await?;
            stage.delete_vm().await
        }),
        life!("lost with its node", |stage| {
            stage.create("Once", |_| ()).await?;
            stage.ready().await?;
            stage.tell("lose-pod").await?;
            let tidied = |vmi: &Event| vmi.state == "Failed" && vmi.finalizers.is_empty();
            stage.until(Kind::Vmi, "a failed VMI that nobody holds", tidied).await?;
            stage.until(Kind::Vm, "a VM that has stopped", |vm| vm.state == "Stopped").await?;
            stage.delete_vm().await
        }),
        life!("unready for ever", |stage| {
            stage.create("Once", annotated("never-schedules", "not-ready")).await?;
            stage.until(Kind::Vmi, "Scheduling", |vmi| vmi.state == "Scheduling").await?;
            stage.until(Kind::Vm, "a starting VM", |vm| vm.state == "Starting" && vm.marked("created")).await?;
            stage.delete_vm().await
        }),
        life!("no-secret ever comes", |stage| {
            stage.create("Once", annotated("never-schedules", "missing-secret")).await?;
            stage.until(Kind::Vmi, "Scheduling", |vmi| vmi.state == "Scheduling").await?;
            stage.delete_vm().await
        }),
        life!("no-grace ends at once", |stage| {
            stage
                .create("Once", |vm| vm["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = json!(0))
                .await?;
            stage.ready().await?;
            stage.delete_vmi().await?;
            stage.until(Kind::Vmi, "a VMI that starts again", |vmi| vmi.state == "Scheduling").await?;
            stage.until(Kind::Vm, "a VM that sees that", |vm| vm.state == "Starting" && vm.marked("created")).await?;
            let ends = stage.events(Kind::Vmi).into_iter().find(|vmi| vmi.is_final()).context("no end seen")?;
            anyhow::ensure!(ends.state == "Succeeded", "{ends}");
            stage.delete_vm().await
        }),
    ]
}

fn annotated(key: &'static str, value: &'static str) -> impl FnOnce(&mut Value) {
    move |vm| {
        let annotations = json!({ format!("guest.testbed/{key}"): value });
        vm["spec"]["template"]["metadata"]["annotations"] = annotations;
    }
}
