//! What comes between the start and the end of a guest, and what a desktop makes of each.

use anyhow::{Result, ensure};
use kube::api::{DeleteParams, Patch, PatchParams, PropagationPolicy};
use serde_json::{Value, json};

use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a guest whose node is drained ends its row with that reason", drained),
        story("a guest whose node is lost ends its row when KubeVirt gives it up", node_lost),
        story("a desktop on a lost node is over only when its VMI is gone", ends_on_a_lost_node),
        story("a VMI that its VM left behind goes with the desktop", left_behind),
        story("a VM that somebody stops lives on and says so, and runs again", stopped_by_hand),
        story("a VM that somebody edits is left as it is", edited_by_hand),
        story("a guest that is paused says so and is not ended", paused),
        story("a crashed guest is restarted if its template wants it, and counted", restarted),
    ]
}

fn template(guest: Value, run_strategy: &str) -> String {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": { "annotations": { "cyberdesk.io/start-deadline": "60" } },
        "spec": {
            "runStrategy": run_strategy,
            "template": {
                "metadata": { "annotations": guest },
                "spec": { "domain": { "memory": { "guest": "64Mi" }, "devices": {} } },
            },
        },
    })
    .to_string()
}

async fn a_desktop(world: &World, guest: Value, run_strategy: &str) -> Result<String> {
    world.templates(&[("default.yaml", &template(guest, run_strategy))]).await?;
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let runs = async || Ok(world.cr_status(&id, "phase").await?.as_deref() == Some("Running"));
    world.until("the CR says Running", runs).await?;
    Ok(id)
}

/// Waits until CR and row say what keeps a running desktop from being used.
async fn until_told(world: &World, id: &str, reason: &str) -> Result<()> {
    let told = async || {
        let row = world.row(id).await?.message.is_some_and(|message| message.starts_with(&format!("{reason}: ")));
        Ok(row && world.cr_status(id, "reason").await?.as_deref() == Some(reason))
    };
    world.until(&format!("CR and row of {id} say {reason}"), told).await
}

async fn until_it_runs_again(world: &World, id: &str) -> Result<()> {
    let runs = async || {
        let row = world.row(id).await?;
        let phase = world.cr_status(id, "phase").await?;
        Ok(phase.as_deref() == Some("Running") && row.status == "running" && row.message.is_none())
    };
    world.until(&format!("{id} runs again, and nothing is said against it"), runs).await
}

async fn drained(world: &World) -> Result<()> {
    let id = a_desktop(world, json!({ "guest.testbed/shutdown": "1m" }), "Once").await?;
    world.guest(&id, "drain").await?;
    until_told(world, &id, "evicted").await?;
    let soon = json!({ "metadata": { "annotations": { "guest.testbed/shutdown": "1s" } } });
    world.vmis().patch(&vm_name(&id), &PatchParams::default(), &Patch::Merge(soon)).await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("error", Some("evicted")), "{row:?}");
    Ok(())
}

async fn node_lost(world: &World) -> Result<()> {
    let id = a_desktop(world, json!({}), "Once").await?;
    world.guest(&id, "lose-node").await?;
    until_told(world, &id, "node-lost").await?;
    ensure!(world.row(&id).await?.status == "running", "the node may come back");
    world.guest(&id, "give-up-node").await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("error", Some("node-lost")), "{row:?}");
    Ok(())
}

async fn ends_on_a_lost_node(world: &World) -> Result<()> {
    let id = a_desktop(world, json!({}), "Once").await?;
    world.guest(&id, "lose-node").await?;
    until_told(world, &id, "node-lost").await?;
    world.request_shutdown(&id).await?;
    let deleting = async || Ok(world.vmis().get(&vm_name(&id)).await?.metadata.deletion_timestamp.is_some());
    world.until("its VMI is being deleted", deleting).await?;
    // Another one comes and goes meanwhile.
    let another = world.running_desktop("1 hour").await?;
    world.request_shutdown(&another).await?;
    world.until_over(&another).await?;
    let row = world.row(&id).await?;
    ensure!(row.ended_at.is_none() && row.shutdown_requested_at.is_some(), "its guest may still run: {row:?}");
    ensure!(world.cr_status(&id, "phase").await?.as_deref() == Some("Stopping"));
    world.guest(&id, "give-up-node").await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("requested")), "{row:?}");
    Ok(())
}

async fn left_behind(world: &World) -> Result<()> {
    let id = a_desktop(world, json!({}), "Once").await?;
    let name = vm_name(&id);
    // `kubectl delete vm --cascade=orphan`, and what the garbage collector does then, which does not run here.
    let orphan = DeleteParams { propagation_policy: Some(PropagationPolicy::Orphan), ..DeleteParams::default() };
    world.vms().delete(&name, &orphan).await?;
    for (api, field) in [(world.vmis(), "ownerReferences"), (world.vms(), "finalizers")] {
        let gone = Patch::Merge(json!({ "metadata": { field: null } }));
        api.patch(&name, &PatchParams::default(), &gone).await?;
    }
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("vm-deleted")), "{row:?}");
    Ok(())
}

async fn change_vm(world: &World, id: &str, change: Value) -> Result<()> {
    world.vms().patch(&vm_name(id), &PatchParams::default(), &Patch::Merge(change)).await.map(drop)?;
    Ok(())
}

async fn stopped_by_hand(world: &World) -> Result<()> {
    let id = a_desktop(world, json!({}), "Once").await?;
    let vm = world.vms().get(&vm_name(&id)).await?.metadata.uid;
    // As `virtctl stop` does, and `virtctl start`, which does not go back to Once.
    change_vm(world, &id, json!({ "spec": { "runStrategy": "Halted" } })).await?;
    until_told(world, &id, "vm-stopped").await?;
    world.until("its VMI is gone", async || Ok(world.vmis().get_opt(&vm_name(&id)).await?.is_none())).await?;
    ensure!(world.row(&id).await?.status == "running", "{:?}", world.row(&id).await?);
    ensure!(world.crs().get(&id).await?.data["status"]["startClock"].is_null(), "nobody gives it up");
    change_vm(world, &id, json!({ "spec": { "runStrategy": "Always" } })).await?;
    until_it_runs_again(world, &id).await?;
    ensure!(world.vms().get(&vm_name(&id)).await?.metadata.uid == vm, "with its disks");
    world.request_shutdown(&id).await?;
    world.until_over(&id).await.map(drop)
}

async fn edited_by_hand(world: &World) -> Result<()> {
    let id = a_desktop(world, json!({}), "Once").await?;
    let edit = json!({ "metadata": { "labels": { "team": "a" }, "annotations": { "note": "b" } },
        "spec": { "runStrategy": "RerunOnFailure" } });
    change_vm(world, &id, edit).await?;
    world.crash_operator().await?;
    // Its deadline moves, so it is looked at.
    world.app("update cyberdesk_instances set timeout_at = now() + interval '2 hours' where id = $1", &id).await?;
    let looked_at = "select count(*) from cyberdesk.desktop where observed_generation = generation and generation > 1";
    world.until("it was looked at", async || Ok(world.count(looked_at).await? == 1)).await?;
    let vm = world.vms().get(&vm_name(&id)).await?;
    let labels = vm.metadata.labels.unwrap_or_default();
    ensure!(labels.get("team").map(String::as_str) == Some("a"), "{labels:?}");
    ensure!(vm.data["spec"]["runStrategy"] == "RerunOnFailure", "{}", vm.data["spec"]);
    ensure!(world.row(&id).await?.status == "running");
    Ok(())
}

async fn paused(world: &World) -> Result<()> {
    let id = a_desktop(world, json!({}), "Once").await?;
    world.guest(&id, "pause").await?;
    until_told(world, &id, "paused").await?;
    ensure!(world.row(&id).await?.status == "running", "it never goes back");
    world.guest(&id, "unpause").await?;
    until_it_runs_again(world, &id).await?;
    ensure!(world.crs().get(&id).await?.data["status"]["restarts"].is_null(), "that was no restart");
    Ok(())
}

async fn restarted(world: &World) -> Result<()> {
    let id = a_desktop(world, json!({}), "RerunOnFailure").await?;
    let first = world.cr_status(&id, "vmiUid").await?;
    world.guest(&id, "crash").await?;
    let again = async || {
        let status = world.crs().get(&id).await?.data["status"].clone();
        Ok(status["restarts"] == 1 && status["phase"] == "Running" && status["vmiUid"].as_str() != first.as_deref())
    };
    world.until("its guest runs in another VMI", again).await?;
    let row = world.row(&id).await?;
    ensure!(row.status == "running" && row.shutdown_requested_at.is_none(), "{row:?}");
    world.guest(&id, "power-off").await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("guest-shutdown")), "{row:?}");
    Ok(())
}
