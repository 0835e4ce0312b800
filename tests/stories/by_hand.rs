//! A CR applied by hand, without a row: this was all that the operator before this one could do.

use anyhow::{Result, ensure};
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a CR by hand gets its VM, status, deadline and cleanup", a_life_by_hand),
        story("a CR by hand is served while Postgres cannot be reached", without_a_database),
        story("a CR by hand that is deleted takes its VM along", deleted),
        story("a CR by hand applied anew gets a VM of its own", applied_anew),
        story("a CR by hand that a finalizer holds lets its VM go", held_by_a_finalizer),
        story("a CR of the old gateway for a live row is adopted, and the row wins", adopted),
        story("a VM of another with our name is never touched", a_name_taken),
        story("the spec of a CR by hand is never written by us", the_spec_is_theirs),
    ]
}

async fn a_life_by_hand(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    lives_and_ends(world).await
}

async fn lives_and_ends(world: &World) -> Result<()> {
    // Time enough to be seen running first, also on a busy machine.
    world.apply_cr("my-desk", json!({ "timeoutMs": 3_600_000 })).await?;
    let phase = async |wanted: &str| Ok(world.cr_status("my-desk", "phase").await?.as_deref() == Some(wanted));
    world.until("it runs", async || phase("Running").await).await?;
    ensure!(world.vms().get_opt(&vm_name("my-desk")).await?.is_some());
    world.apply_cr("my-desk", json!({ "timeoutMs": 1_000 })).await?;
    world.until("it is over", async || phase("Terminated").await).await?;
    ensure!(world.cr_status("my-desk", "reason").await?.as_deref() == Some("timeout"));
    ensure!(
        world.left().await? == ["CR my-desk"],
        "the CR stays, to tell what became of it: {:?}",
        world.left().await?
    );
    Ok(())
}

async fn without_a_database(world: &World) -> Result<()> {
    // Nothing listens on port 1.
    world.start_operator(&[("DATABASE_URL", "postgres://cyberdesk_daemon@127.0.0.1:1/none")]).await?;
    lives_and_ends(world).await
}

async fn deleted(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    world.apply_cr("my-desk", json!({ "timeoutMs": 3_600_000 })).await?;
    let running = async || Ok(world.cr_status("my-desk", "phase").await?.as_deref() == Some("Running"));
    world.until("it runs", running).await?;
    world.delete(world.crs(), "my-desk").await?;
    world.until("nothing of it is left", async || Ok(world.left().await?.is_empty())).await
}

async fn applied_anew(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let running = async || Ok(world.cr_status("my-desk", "phase").await?.as_deref() == Some("Running"));
    world.apply_cr("my-desk", json!({ "timeoutMs": 3_600_000 })).await?;
    world.until("it runs", running).await?;
    let first = world.vms().get(&vm_name("my-desk")).await?.metadata.uid;
    world.delete(world.crs(), "my-desk").await?;
    world.apply_cr("my-desk", json!({ "timeoutMs": 3_600_000 })).await?;
    let another = async || Ok(running().await? && world.vms().get(&vm_name("my-desk")).await?.metadata.uid != first);
    world.until("it runs in another VM", another).await?;
    let old_one_is_gone = async || Ok(world.left().await?.len() == 4);
    world.until("nothing of the first is left", old_one_is_gone).await?;
    let cr = world.crs().get("my-desk").await?.metadata.uid;
    let secrets = world.secrets().list(&Default::default()).await?.items;
    let owner = secrets[0].metadata.labels.as_ref().and_then(|labels| labels.get("cyberdesk.io/owner"));
    ensure!(owner == cr.as_ref(), "it does not boot with its predecessor's user data");
    Ok(())
}

async fn held_by_a_finalizer(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    world.apply_cr("my-desk", json!({ "timeoutMs": 3_600_000 })).await?;
    let running = async || Ok(world.cr_status("my-desk", "phase").await?.as_deref() == Some("Running"));
    world.until("it runs", running).await?;
    let finalizers = |list: serde_json::Value| Patch::Merge(json!({ "metadata": { "finalizers": list } }));
    let held = finalizers(json!(["kopf.zalando.org/KopfFinalizerMarker"]));
    world.crs().patch("my-desk", &PatchParams::default(), &held).await?;
    world.delete(world.crs(), "my-desk").await?;
    world.until("its VM is gone", async || Ok(world.left().await? == ["CR my-desk"])).await?;
    world.crs().patch("my-desk", &PatchParams::default(), &finalizers(json!([]))).await?;
    world.until("it is gone", async || Ok(world.left().await?.is_empty())).await
}

async fn adopted(world: &World) -> Result<()> {
    let id = world.insert("1 hour").await?;
    world.apply_cr(&id, json!({ "timeoutMs": 60_000 })).await?;
    let gateways = world.crs().get(&id).await?.metadata.uid;
    world.start_operator(&[]).await?;
    world.until_status(&id, "running").await?;
    let cr = world.crs().get(&id).await?;
    ensure!(cr.metadata.uid == gateways && cr.data["spec"]["expiresAt"].is_string(), "{:?}", cr.data);
    ensure!(world.left().await?.len() == 4, "{:?}", world.left().await?);
    world.request_shutdown(&id).await?;
    world.until_over(&id).await.map(drop)
}

async fn a_name_taken(world: &World) -> Result<()> {
    let theirs = serde_json::from_value(json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": { "name": vm_name("my-desk") },
        "spec": { "runStrategy": "Halted", "template": { "spec": { "domain": { "devices": {}, "memory": { "guest": "64Mi" } } } } },
    }))?;
    world.vms().create(&Default::default(), &theirs).await?;
    world.start_operator(&[]).await?;
    world.apply_cr("my-desk", json!({ "timeoutMs": 2000 })).await?;
    let over = async || Ok(world.cr_status("my-desk", "phase").await?.as_deref() == Some("Error"));
    world.until("the CR says that it cannot be", over).await?;
    ensure!(world.cr_status("my-desk", "reason").await?.as_deref() == Some("name-taken"));
    let vm = world.vms().get(&vm_name("my-desk")).await?;
    ensure!(vm.metadata.deletion_timestamp.is_none(), "the stranger's VM stays");
    Ok(())
}

async fn the_spec_is_theirs(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    world.apply_cr("my-desk", json!({ "timeoutMs": 2000 })).await?;
    let over = async || Ok(world.cr_status("my-desk", "phase").await?.as_deref() == Some("Terminated"));
    world.until("it is over", over).await?;
    let cr = world.crs().get("my-desk").await?;
    ensure!(
        cr.metadata.generation == Some(1) && cr.metadata.finalizers.is_none() && cr.metadata.labels.is_none(),
        "{:?}",
        cr.metadata
    );
    Ok(())
}
