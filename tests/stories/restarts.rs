//! The operator is killed between any two steps of a life, and comes back: the end is the same.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::world::{World, timed, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("killed after every step of a life, it goes on where it was", killed_after_every_step),
        story("killed while a guest shuts down, it finishes", killed_while_stopping),
        story("killed at every moment of a burst, each row has one VM", killed_during_a_burst),
        story("ends that came while nobody ran are told afterwards", ends_while_nobody_ran),
        story("told to stop, it ends in time and leaves the desktops alone", told_to_stop),
    ]
}

async fn killed_after_every_step(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.insert("1 hour").await?;
    let vm = vm_name(&id);
    world.until("the CR is there", async || Ok(world.crs().get_opt(&id).await?.is_some())).await?;
    world.crash_operator().await?;
    world.until("the VM is there", async || Ok(world.vms().get_opt(&vm).await?.is_some())).await?;
    world.crash_operator().await?;
    let uid = world.vms().get(&vm).await?.metadata.uid;
    world.until("the VMI is there", async || Ok(world.vmis().get_opt(&vm).await?.is_some())).await?;
    world.crash_operator().await?;
    world.until_status(&id, "running").await?;
    world.crash_operator().await?;
    world.request_shutdown(&id).await?;
    world.crash_operator().await?;
    let deleting =
        async || Ok(world.vms().get_opt(&vm).await?.is_none_or(|vm| vm.metadata.deletion_timestamp.is_some()));
    world.until("the VM is being deleted", deleting).await?;
    ensure!(world.vms().get_opt(&vm).await?.is_none_or(|vm| vm.metadata.uid == uid), "there was never another VM");
    world.crash_operator().await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("requested")), "{row:?}");
    world.crash_operator().await?;
    world.until("nothing is left", async || Ok(world.left().await?.is_empty())).await
}

async fn killed_while_stopping(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.guest(&id, "crash").await?;
    world
        .until("the end is in the CR", async || {
            Ok(world.crs().get_opt(&id).await?.is_none_or(|cr| cr.data["status"]["end"].is_object()))
        })
        .await?;
    world.crash_operator().await?;
    let row = world.until_over(&id).await?;
    ensure!(
        (row.status.as_str(), row.reason.as_deref()) == ("error", Some("guest-crashed")),
        "the cause outlives the operator: {row:?}"
    );
    Ok(())
}

async fn killed_during_a_burst(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    world.insert_many(40).await?;
    for made in [1, 10, 20, 30] {
        let so_many = async || Ok(world.vms().list(&Default::default()).await?.items.len() >= made);
        world.until(&format!("{made} VMs are there"), so_many).await?;
        world.crash_operator().await?;
    }
    let running = "select count(*) from cyberdesk_instances where status = 'running'";
    world.until("all run", async || Ok(world.count(running).await? == 40)).await?;
    ensure!(world.left().await?.len() == 4 * 40, "one CR, VM, VMI and Secret each");
    Ok(())
}

async fn ends_while_nobody_ran(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let (crashed, deleted, late) = (
        world.running_desktop("1 hour").await?,
        world.running_desktop("1 hour").await?,
        world.running_desktop("1 hour").await?,
    );
    world.stop_operator().await?;
    world.guest(&crashed, "crash").await?;
    world.delete(world.vms(), &vm_name(&deleted)).await?;
    world.app("update cyberdesk_instances set timeout_at = now() where id = $1", &late).await?;
    let gone = async || Ok(world.vms().get_opt(&vm_name(&deleted)).await?.is_none());
    world.until("the VM deleted by hand is gone", gone).await?;
    let failed = async || Ok(world.vmis().get(&vm_name(&crashed)).await?.data["status"]["phase"] == "Failed");
    world.until("the guest has crashed", failed).await?;
    world.start_operator(&[]).await?;
    for (id, status, reason) in
        [(crashed, "error", "guest-crashed"), (deleted, "terminated", "vm-deleted"), (late, "terminated", "timeout")]
    {
        let row = world.until_over(&id).await?;
        ensure!((row.status.as_str(), row.reason.as_deref()) == (status, Some(reason)), "{row:?}");
    }
    Ok(())
}

async fn told_to_stop(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let took = timed(world.stop_operator()).await?;
    ensure!(took < Duration::from_secs(3), "it took {took:?}");
    ensure!(world.row(&id).await?.status == "running" && world.left().await?.len() == 4, "the desktop lives on");
    Ok(())
}
