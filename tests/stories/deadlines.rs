//! Deadlines: many at once, and across a change of leaders. By the database's clock alone: that this machine's is never
//! asked, `.clippy.toml` sees to.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use rustix::process::Signal;

use crate::world::World;
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("hundreds of deadlines within seconds: each is kept, none early, one after the other", hundreds).alone(),
        story("the leader killed before a deadline: the other keeps it", leader_killed),
        story("a deadline that is extended while the leader stands still is the later one", extended_unseen),
    ]
}

async fn hundreds(world: &World) -> Result<()> {
    // Their VMs would take the time of others, and change nothing here.
    world.sql("update cyberdesk.settings set paused = true").await?;
    world.start_operator(&[("CYBERDESK_LOG", "warn")]).await?;
    world.insert_many(300).await?;
    let served = async || Ok(world.crs().list(&Default::default()).await?.items.len() == 300);
    world.until_within(Duration::from_secs(120), "each has its CR", served).await?;
    world
        .sql(
            "with one as (select id, row_number() over (order by id) as nth from cyberdesk_instances)
             update cyberdesk_instances c set timeout_at = now() + interval '2 seconds' + one.nth * interval '20 milliseconds'
               from one where one.id = c.id",
        )
        .await?;
    let over = "select count(*) from cyberdesk_instances where ended_at is not null and reason = 'timeout' and status = 'terminated'";
    world
        .until_within(Duration::from_secs(120), "each has ended", async || Ok(world.count(over).await? == 300))
        .await?;
    let early = "select count(*) from cyberdesk_instances where shutdown_requested_at < timeout_at at time zone 'utc'";
    ensure!(world.count(early).await? == 0, "none before its time");
    let late = "select ceil(extract(epoch from max(shutdown_requested_at - timeout_at at time zone 'utc')) * 1000)::bigint from cyberdesk_instances";
    println!("300 deadlines within 6 s: the latest {} ms late", world.count(late).await?);
    // Those that one statement ended are in no order.
    let overtaken = "with asked as (select c.*, h.xmin::text as by from cyberdesk_instances c
                       join cyberdesk.history h on h.desktop_id = c.id and h.event = 'shutdown-requested')
                     select count(*) from asked one join asked other
                         on one.timeout_at + interval '2 seconds' < other.timeout_at
                            and one.shutdown_requested_at > other.shutdown_requested_at and one.by <> other.by";
    ensure!(world.count(overtaken).await? == 0, "none waits behind one that is due two seconds later");
    Ok(())
}

async fn leader_killed(world: &World) -> Result<()> {
    let leader = world.start_daemon("a", &[("CYBERDESK_IDENTITY", "a")]).await?;
    let id = world.running_desktop("1 hour").await?;
    let _standby = world.start_daemon("b", &[("CYBERDESK_IDENTITY", "b")]).await?;
    world.daemon_says("b", "listed").await?;
    world.app("update cyberdesk_instances set timeout_at = now() + interval '2 seconds' where id = $1", &id).await?;
    leader.kill9().await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("timeout")), "{row:?}");
    let kept_by_cr = row.message.as_deref().is_some_and(|words| words.ends_with("while the database did not answer"));
    ensure!(kept_by_cr || row.shutdown_requested_at.is_some_and(|at| at >= row.timeout_at), "{row:?}");
    Ok(())
}

async fn extended_unseen(world: &World) -> Result<()> {
    let leader = world.start_daemon("operator", &[]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.app("update cyberdesk_instances set timeout_at = now() + interval '10 seconds' where id = $1", &id).await?;
    // As the row is locked, the leader asks again and again, and is stopped while a question is open.
    let app = world.database.connect_as("postgres").await?;
    app.batch_execute("begin; update cyberdesk_instances set timeout_at = timeout_at + interval '1 hour'").await?;
    let past = async |seconds: u32| {
        let past = format!(
            "select count(*) from cyberdesk_instances where timeout_at at time zone 'utc' + interval '{seconds} seconds' < clock_timestamp()"
        );
        world.until(&format!("the old deadline is {seconds} s past"), async || Ok(world.count(&past).await? == 1)).await
    };
    past(1).await?;
    leader.signal(Signal::STOP)?;
    past(4).await?;
    app.batch_execute("commit").await?;
    leader.signal(Signal::CONT)?;
    let later = world.row(&id).await?.timeout_at;
    let shown = async || {
        let cr = world.crs().get(&id).await?.data;
        ensure!(cr["status"]["end"].is_null(), "it was ended: {cr}");
        let deadline = cr["spec"]["expiresAt"].as_str().context("it has a deadline")?;
        Ok(deadline.parse::<Timestamp>()? == later)
    };
    world.until("the CR has the later deadline", shown).await?;
    let row = world.row(&id).await?;
    ensure!(row.status == "running" && row.reason.is_none(), "{row:?}");
    Ok(())
}
