//! A thousand desktops at once.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::world::World;
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "1,000 rows in one statement each get one VM, and all end together",
            a_thousand,
        )
        .alone(),
    ]
}

const MANY: i64 = 1000;

async fn a_thousand(world: &World) -> Result<()> {
    world.start_operator(&[("CYBERDESK_LOG", "warn")]).await?;
    world.insert_many(MANY as i32).await?;
    let running = "select count(*) from cyberdesk_instances where status = 'running'";
    world
        .until_within(Duration::from_secs(300), "all run", async || {
            Ok(world.count(running).await? == MANY)
        })
        .await?;
    let left = world.left().await?;
    for kind in ["CR", "VM", "VMI", "Secret"] {
        let found = left
            .iter()
            .filter(|object| object.starts_with(&format!("{kind} ")))
            .count();
        ensure!(found == MANY as usize, "{found} of {kind}");
    }
    let vms = "select count(distinct vm_uid) from cyberdesk.desktop";
    ensure!(
        world.count(vms).await? == MANY,
        "each row has a VM of its own"
    );
    world
        .sql("update cyberdesk_instances set status = 'terminated'")
        .await?;
    let over = "select count(*) from cyberdesk_instances where ended_at is not null";
    world
        .until_within(Duration::from_secs(300), "all are over", async || {
            Ok(world.count(over).await? == MANY)
        })
        .await?;
    world
        .until("nothing is left in the cluster", async || {
            Ok(world.left().await?.is_empty())
        })
        .await
}
