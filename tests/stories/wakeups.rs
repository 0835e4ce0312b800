//! What wakes the operator: NOTIFY alone, and the poll alone.

use anyhow::Result;

use crate::world::World;
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("NOTIFY alone serves a whole life", notify_alone),
        story("the poll alone serves a whole life", poll_alone),
        story("what was committed while nobody ran is served at start", committed_before),
        story("a deadline that comes early by the operator's clock is kept by the database's", a_fast_clock),
        story("the listening connection is cut and comes back", the_listener_is_cut),
    ]
}

/// A desktop from its row to its end.
pub(crate) async fn a_life(world: &World) -> Result<()> {
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

/// As if the operator's clock were a second fast: until then the database finds nothing due.
async fn a_fast_clock(world: &World) -> Result<()> {
    let a_second_later = "
        create schema in_time;
        alter function cyberdesk.expire(bigint, uuid, uuid[]) set schema in_time;
        create function cyberdesk.expire(epoch bigint, token uuid, ids uuid[]) returns table (id uuid, answer text)
          language sql security definer as $$
            with asked as (
              select d.id, d.expires_at + interval '1 second' <= clock_timestamp() as due
                from cyberdesk.desktop d where d.id = any (ids))
            select asked.id, 'extended' from asked where not due
            union all
            select * from in_time.expire(epoch, token, array(select asked.id from asked where due))
          $$;
        grant execute on function cyberdesk.expire(bigint, uuid, uuid[]) to cyberdesk_daemon;";
    world.sql(a_second_later).await?;
    world.start_operator(&[("CYBERDESK_RESYNC_INTERVAL", "1h")]).await?;
    let id = world.insert("3 seconds").await?;
    world.until_over(&id).await.map(drop)
}
