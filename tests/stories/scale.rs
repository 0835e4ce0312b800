//! Many desktops at once: 1,000 in CI, fewer by default, for most of the time goes to the API server and the
//! simulated KubeVirt. `CYBERDESK_TESTBED_MANY` says how many.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::world::World;
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![story("many rows in one statement each get one VM, and all end together", many_at_once).alone()]
}

#[expect(clippy::disallowed_methods, reason = "the size of a test is no setting of the operator")]
pub(crate) fn many() -> Result<i64> {
    let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    match std::env::var("CYBERDESK_TESTBED_MANY") {
        Ok(number) => number.parse().context("read CYBERDESK_TESTBED_MANY"),
        Err(_) => Ok(if ci { 1000 } else { 200 }),
    }
}

async fn many_at_once(world: &World) -> Result<()> {
    world.start_operator(&[("CYBERDESK_LOG", "warn")]).await?;
    let many = many()?;
    world.insert_many(i32::try_from(many)?).await?;
    let running = "select count(*) from cyberdesk_instances where status = 'running'";
    world.until_within(Duration::from_secs(300), "all run", async || Ok(world.count(running).await? == many)).await?;
    let left = world.left().await?;
    for kind in ["CR", "VM", "VMI", "Secret"] {
        let found = left.iter().filter(|object| object.starts_with(&format!("{kind} "))).count();
        ensure!(found == usize::try_from(many)?, "{found} of {kind}");
    }
    let vms = "select count(distinct vm_uid) from cyberdesk.desktop";
    ensure!(world.count(vms).await? == many, "each row has a VM of its own");
    world.sql("update cyberdesk_instances set status = 'terminated'").await?;
    let over = "select count(*) from cyberdesk_instances where ended_at is not null";
    world.until_within(Duration::from_secs(300), "all are over", async || Ok(world.count(over).await? == many)).await?;
    world.until("nothing is left in the cluster", async || Ok(world.left().await?.is_empty())).await
}
