//! What is left in the cluster of a row that nobody remembers, what is another database's, and Secrets that came late.

use anyhow::{Context, Result, ensure};
use cyberdesk_testbed::postgres::SUPERUSER;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a desktop whose row and tombstone are gone is told of, and collected after its grace", orphaned),
        story("another database's desktop is told of and never touched", strangers),
        story("a Secret that comes when its desktop is over is removed", late_secret),
    ]
}

/// Removes every trace of a row, as nothing but a superuser can.
async fn wipe(world: &World, id: &str) -> Result<()> {
    let wipe = format!(
        "set session_replication_role = replica;
         delete from public.cyberdesk_instances where id = '{id}';
         delete from cyberdesk.desktop where id = '{id}'"
    );
    Ok(world.database.connect_as(SUPERUSER).await?.batch_execute(&wipe).await?)
}

async fn until_told(world: &World, id: &str, reason: &str) -> Result<()> {
    let events: Api<Event> = Api::namespaced(world.parts.client.clone(), &world.namespace);
    world
        .until(&format!("an Event {reason} of {id}"), async || {
            let told = events.list(&ListParams::default()).await?;
            Ok(told.iter().any(|event| {
                event.reason.as_deref() == Some(reason)
                    && event.regarding.as_ref().is_some_and(|about| about.name.as_deref() == Some(id))
            }))
        })
        .await
}

async fn orphaned(world: &World) -> Result<()> {
    world.start_operator(&[("CYBERDESK_ORPHAN_GRACE", "10s"), ("CYBERDESK_RESYNC_INTERVAL", "1s")]).await?;
    let (orphan, other) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    wipe(world, &orphan).await?;
    until_told(world, &orphan, "Orphaned").await?;
    ensure!(world.vms().get(&vm_name(&orphan)).await?.metadata.deletion_timestamp.is_none(), "it has its grace first");
    let gone = async || Ok(!world.left().await?.iter().any(|object| object.contains(&orphan)));
    world.until("CR, VM, VMI and Secret of it are gone", gone).await?;
    ensure!(world.row(&other).await?.status == "running");
    ensure!(!world.operator_said("braked")?, "one is no lost table");
    Ok(())
}

async fn strangers(world: &World) -> Result<()> {
    world.start_operator(&[("CYBERDESK_ORPHAN_GRACE", "10s"), ("CYBERDESK_RESYNC_INTERVAL", "1s")]).await?;
    let (stranger, orphan) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    let of_another = json!({ "metadata": { "annotations": { "cyberdesk.io/database": uuid::Uuid::new_v4() } } });
    let params = PatchParams::default();
    let name = vm_name(&stranger);
    let uids = async || {
        let (vm, vmi) = (world.vms().get(&name).await?.metadata, world.vmis().get(&name).await?.metadata);
        ensure!(vm.deletion_timestamp.is_none() && vmi.deletion_timestamp.is_none(), "it is not touched");
        Ok([vm.uid.context("it has a UID")?, vmi.uid.context("so has its guest")?])
    };
    let before = uids().await?;
    let its_guests = json!({ "spec": { "template": of_another } });
    for part in [&of_another, &its_guests] {
        world.vms().patch(&name, &params, &Patch::Merge(part)).await?;
    }
    world.vmis().patch(&name, &params, &Patch::Merge(&of_another)).await?;
    world.crs().patch(&stranger, &params, &Patch::Merge(&of_another)).await?;
    wipe(world, &stranger).await?;
    until_told(world, &stranger, "Stranger").await?;
    // One that is collected has had its grace; this one had it too.
    wipe(world, &orphan).await?;
    let gone = async || Ok(!world.left().await?.iter().any(|object| object.contains(&orphan)));
    world.until("an orphan is gone", gone).await?;
    ensure!(uids().await? == before, "never touched");
    ensure!(world.crs().get_opt(&stranger).await?.is_some());
    Ok(())
}

async fn late_secret(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let (over, runs) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    let name = format!("cyberdesk-{over}-user-data");
    let mut secret: Secret = world.secrets().get(&name).await?;
    world.request_shutdown(&over).await?;
    world.until_over(&over).await?;
    // What a leader now dead had sent arrives.
    secret.metadata.resource_version = None;
    secret.metadata.uid = None;
    world.secrets().create(&PostParams::default(), &secret).await?;
    // A term sweeps soon after its begin, and then every ten minutes.
    world.crash_operator().await?;
    world.until("it is removed", async || Ok(world.secrets().get_opt(&name).await?.is_none())).await?;
    ensure!(world.secrets().get_opt(&format!("cyberdesk-{runs}-user-data")).await?.is_some(), "others' stay");
    Ok(())
}
