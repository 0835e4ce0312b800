//! A desktop that a person has paused: nothing becomes of it until it is resumed.

use anyhow::{Result, ensure};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a desktop paused by annotation outlives its deadline until it is resumed", by_annotation),
        story("a desktop paused in SQL is neither made nor ended until it is resumed", by_row),
    ]
}

async fn annotate(world: &World, name: &str, paused: Value) -> Result<()> {
    let patch = json!({ "metadata": { "annotations": { "cyberdesk.io/paused": paused } } });
    world.crs().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(())
}

async fn pause(world: &World, id: &str, paused: bool) -> Result<()> {
    world.app(&format!("select from cyberdesk.pause_desktop($1, {paused})"), id).await?;
    Ok(())
}

async fn until_it_says_so(world: &World, name: &str) -> Result<()> {
    let says_so = async || Ok(world.cr_status(name, "reason").await?.as_deref() == Some("desktop-paused"));
    world.until("its CR says that it is paused", says_so).await
}

async fn by_annotation(world: &World) -> Result<()> {
    world.start_operator(&[("CYBERDESK_RESYNC_INTERVAL", "1h")]).await?;
    let (held, other) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    world.apply_cr("by-hand", json!({ "timeoutMs": 3_600_000 })).await?;
    for name in [held.as_str(), "by-hand"] {
        annotate(world, name, json!("true")).await?;
        until_it_says_so(world, name).await?;
    }
    let due = "select from set_desktop_timeout($1, now() - interval '1 minute')";
    world.app(due, &held).await?;
    world.app(due, &other).await?;
    world.until_over(&other).await?;
    // The other was told later and is over.
    let row = world.row(&held).await?;
    ensure!(row.status == "running" && row.shutdown_requested_at.is_none(), "its deadline does not end it: {row:?}");
    let vm = world.vms().get(&vm_name(&held)).await?;
    ensure!(vm.metadata.deletion_timestamp.is_none(), "its VM lives on");
    let cr = world.crs().get(&held).await?;
    let conditions = cr.data["status"]["conditions"].to_string();
    ensure!(conditions.contains("\"Paused\""), "kubectl wait --for=condition=Paused: {conditions}");

    annotate(world, &held, Value::Null).await?;
    let row = world.until_over(&held).await?;
    ensure!(row.reason.as_deref() == Some("timeout"), "{row:?}");
    annotate(world, "by-hand", Value::Null).await?;
    let ready = async || Ok(world.cr_status("by-hand", "phase").await?.as_deref() == Some("Running"));
    world.until("the one by hand runs", ready).await
}

async fn by_row(world: &World) -> Result<()> {
    let (new, other) = (world.insert("1 hour").await?, world.insert("1 hour").await?);
    pause(world, &new, true).await?;
    world.start_operator(&[("CYBERDESK_RESYNC_INTERVAL", "1h")]).await?;
    world.until_status(&other, "running").await?;
    let held = world.running_desktop("1 hour").await?;
    ensure!(world.crs().get_opt(&new).await?.is_none(), "nothing is made for a paused row");
    let (_, screen) = world.command(&["status"], &[]).await?;
    let told =
        screen.contains("1 paused") && screen.contains("2 running") && screen.contains("every change was acted on");
    ensure!(told && !screen.contains("LONGEST PENDING"), "status says so, though it has no Cyberdesk:\n{screen}");

    pause(world, &held, true).await?;
    until_it_says_so(world, &held).await?;
    world.request_shutdown(&held).await?;
    world.request_shutdown(&other).await?;
    world.until_over(&other).await?;
    let row = world.row(&held).await?;
    ensure!(row.shutdown_requested_at.is_some() && row.ended_at.is_none(), "it is asked for, and waits: {row:?}");
    ensure!(world.vms().get(&vm_name(&held)).await?.metadata.deletion_timestamp.is_none(), "its VM lives on");

    pause(world, &held, false).await?;
    let row = world.until_over(&held).await?;
    ensure!(row.reason.as_deref() == Some("requested"), "{row:?}");
    pause(world, &new, false).await?;
    world.until_status(&new, "running").await
}
