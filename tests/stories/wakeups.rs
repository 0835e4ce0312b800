//! What wakes the operator: NOTIFY alone, and the poll alone.

use anyhow::Result;

use crate::world::World;
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("NOTIFY alone serves a whole life", notify_alone),
        story("the poll alone serves a whole life", poll_alone),
        story("what was committed while nobody ran is served at start", committed_before),
        story("the listening connection is cut and comes back", the_listener_is_cut),
    ]
}

async fn a_life(world: &World) -> Result<()> {
    let id = world.running_desktop("1 hour").await?;
    world.request_shutdown(&id).await?;
    world.until_over(&id).await.map(drop)
}

async fn notify_alone(world: &World) -> Result<()> {
    world.start_operator(&[("CYBERDESK_POLL_INTERVAL", "1h"), ("CYBERDESK_RESYNC_INTERVAL", "1h")]).await?;
    world.operator_says("notifications of the database arrive").await?;
    a_life(world).await
}

async fn poll_alone(world: &World) -> Result<()> {
    world
        .sql("create or replace function cyberdesk.wake() returns trigger language plpgsql as 'begin return null; end'")
        .await?;
    world.start_operator(&[("CYBERDESK_POLL_INTERVAL", "300ms"), ("CYBERDESK_RESYNC_INTERVAL", "1h")]).await?;
    world.operator_says("notifications of the database arrive").await?;
    a_life(world).await
}

async fn committed_before(world: &World) -> Result<()> {
    let living = world.insert("1 hour").await?;
    let late = world.insert("1 millisecond").await?;
    let stopped = world.insert("1 hour").await?;
    world.request_shutdown(&stopped).await?;
    world.start_operator(&[]).await?;
    world.until_status(&living, "running").await?;
    world.until_over(&late).await?;
    world.until_over(&stopped).await.map(drop)
}

async fn the_listener_is_cut(world: &World) -> Result<()> {
    world.start_operator(&[("CYBERDESK_POLL_INTERVAL", "1h"), ("CYBERDESK_RESYNC_INTERVAL", "1h")]).await?;
    world.operator_says("notifications of the database arrive").await?;
    let database = world.database.name().to_owned();
    let admin = world.database.connect_as("supabase_admin").await?;
    let cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = $1 and usename = 'cyberdesk_daemon'";
    admin.query_one(cut, &[&database]).await?;
    a_life(world).await
}
