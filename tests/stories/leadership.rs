//! Two daemons: one leads, the other stands by; whatever becomes of the one, it and the other never both work.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cyberdesk_testbed::api_proxy::{ApiProxy, Fault};
use cyberdesk_testbed::postgres::SUPERUSER;
use cyberdesk_testbed::supervise::Supervised;
use cyberdesk_testbed::wire::Condition;
use futures::TryStreamExt;
use jiff::SignedDuration;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, DeleteParams};
use kube::runtime::{WatchStreamExt, watcher};
use rustix::process::Signal;

use crate::outages::wired;
use crate::world::World;
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("told to stop, the leader hands over at once", handed_over),
        story("a Lease is never taken without the time at which it was", taken_in_time),
        story("when the leader is killed, the other takes over when its lease runs out", killed),
        story("a leader frozen past its lease wakes up and stands by", frozen),
        story("a leader frozen past its lease writes nothing to a database that was restored to its time", restored),
        story("a Lease deleted by hand costs a new term and nothing else", lease_deleted),
        story("a Lease that counts from the start anew is raised above what the database knows", lease_lost),
    ]
}

/// Starts a leader and a standby.
async fn two(world: &World) -> Result<(Supervised, Supervised)> {
    let leader = world.start_daemon("a", &[("CYBERDESK_IDENTITY", "a")]).await?;
    until_leads(world, "a").await?;
    let standby = world.start_daemon("b", &[("CYBERDESK_IDENTITY", "b")]).await?;
    world.daemon_says("b", "listed").await?;
    Ok((leader, standby))
}

fn leases(world: &World) -> Api<Lease> {
    Api::namespaced(world.parts.client.clone(), &world.namespace)
}

async fn lease(world: &World) -> Result<(Option<String>, i64)> {
    let spec = leases(world).get_opt("cyberdesk-operator").await?.and_then(|lease| lease.spec).unwrap_or_default();
    Ok((spec.holder_identity, spec.lease_transitions.unwrap_or_default().into()))
}

async fn until_leads(world: &World, who: &str) -> Result<()> {
    world.until(&format!("{who} leads"), async || Ok(lease(world).await?.0.as_deref() == Some(who))).await
}

/// The epoch of the Lease, once the database has the same.
async fn until_one_epoch(world: &World) -> Result<i64> {
    let same = async || Ok(world.count("select cyberdesk.fence_epoch()").await? == lease(world).await?.1);
    world.until("Lease and database have one epoch", same).await?;
    Ok(lease(world).await?.1)
}

async fn handed_over(world: &World) -> Result<()> {
    let (leader, _standby) = two(world).await?;
    let id = world.running_desktop("1 hour").await?;
    let before = until_one_epoch(world).await?;
    leader.signal(Signal::TERM)?;
    leader.ended().await?;
    let (holder, _) = lease(world).await?;
    let gave_up =
        std::fs::read_to_string(world.log("a"))?.contains("the API server does not answer: the Lease runs out");
    ensure!(holder.as_deref() != Some("a") || gave_up, "the leader gave its Lease back before it ended");
    until_leads(world, "b").await?;
    ensure!(until_one_epoch(world).await? > before, "each term has an epoch of its own");
    world.running_desktop("1 hour").await?;
    world.request_shutdown(&id).await?;
    world.until_over(&id).await.map(drop)
}

async fn taken_in_time(world: &World) -> Result<()> {
    let proxy = ApiProxy::start(&world.parts.testbed.control_plane).await?;
    // From it the time is read; the database, which could tell it too, is away.
    proxy.always(Fault::Late(Duration::from_secs(1)), |call| call.resource == "/version");
    let (wire, url) = wired(world).await?;
    wire.set(Condition::Refuses);
    world.start_operator(&[("DATABASE_URL", &url), ("KUBECONFIG", &world.through(&proxy)?)]).await?;
    let mut versions = pin!(watcher(leases(world), watcher::Config::default()).applied_objects());
    let first = versions.try_next().await?.context("the watch ended")?;
    let made = first.metadata.creation_timestamp.context("it has a time")?.0;
    let renewed = first.spec.and_then(|spec| spec.renew_time).context("so has its renewal")?.0;
    // The API server tells whole seconds, and `/version` took one.
    ensure!(renewed.duration_since(made).abs() < SignedDuration::from_secs(30), "made {made}, renewed {renewed}");
    Ok(())
}

async fn killed(world: &World) -> Result<()> {
    let (leader, _standby) = two(world).await?;
    let id = world.running_desktop("1 hour").await?;
    leader.kill9().await?;
    let other = world.insert("1 hour").await?;
    world.request_shutdown(&id).await?;
    world.until_status(&other, "running").await?;
    world.until_over(&id).await?;
    ensure!(lease(world).await?.0.as_deref() == Some("b"), "the other has served them");
    Ok(())
}

async fn frozen(world: &World) -> Result<()> {
    let (leader, _standby) = two(world).await?;
    let (kept, ended) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    leader.signal(Signal::STOP)?;
    world.request_shutdown(&ended).await?;
    world.until_over(&ended).await?;
    let epoch = until_one_epoch(world).await?;
    // Deadlines and shutdowns that the frozen one has in its queue are due when it wakes up.
    world.app("update cyberdesk_instances set timeout_at = now() where id = $1", &kept).await?;
    leader.signal(Signal::CONT)?;
    world.daemon_says("a", "standing by").await?;
    let row = world.until_over(&kept).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("timeout")), "{row:?}");
    let after = world.running_desktop("1 hour").await?;
    ensure!(until_one_epoch(world).await? == epoch, "the one that woke up took nothing back");
    ensure!(world.vms().list(&Default::default()).await?.items.len() == 1, "only {after} has a VM");
    Ok(())
}

async fn restored(world: &World) -> Result<()> {
    let (leader, standby) = two(world).await?;
    let id = world.running_desktop("1 hour").await?;
    until_one_epoch(world).await?;
    let admin = world.database.connect_as(SUPERUSER).await?;
    admin.batch_execute("create table earlier as select * from cyberdesk.fence").await?;
    let count =
        async |what: &str| anyhow::Ok(admin.query_one(&format!("select count(*) {what}"), &[]).await?.get::<_, i64>(0));

    // It is due, and as somebody has locked it, the leader asks again and again.
    let somebody = world.database.connect_as(SUPERUSER).await?;
    world.app("update cyberdesk_instances set timeout_at = now() + interval '15 seconds' where id = $1", &id).await?;
    somebody
        .batch_execute("begin; select from cyberdesk_instances for update; select from cyberdesk.desktop for update")
        .await?;
    let sessions = "from pg_stat_activity where datname = current_database() and usename = 'cyberdesk_daemon'";
    let asks = format!("{sessions} and query like '%cyberdesk.expire%'");
    world.until("the leader asks for its end", async || Ok(count(&asks).await? > 0)).await?;
    leader.signal(Signal::STOP)?;
    until_leads(world, "b").await?;
    world.daemon_says("b", "writing to the database").await?;

    // As after a restore in place to the term of the first: the fence would let it write.
    admin
        .batch_execute(
            "update cyberdesk.fence f set epoch = e.epoch, token = e.token, holder = e.holder from earlier e",
        )
        .await?;
    world.daemon_says("b", "braked").await?;
    somebody.batch_execute("rollback").await?;
    leader.signal(Signal::CONT)?;
    world.daemon_says("a", "standing by").await?;
    leader.kill9().await?;
    standby.kill9().await?;
    world.until("nothing is under way any more", async || Ok(count(sessions).await? == 0)).await?;
    let untouched =
        "from cyberdesk_instances where status = 'running' and reason is null and shutdown_requested_at is null";
    ensure!(count(untouched).await? == 1, "one that does not lead any more ended it: {:?}", world.row(&id).await?);
    Ok(())
}

async fn lease_deleted(world: &World) -> Result<()> {
    let (_leader, _standby) = two(world).await?;
    let id = world.running_desktop("1 hour").await?;
    let before = until_one_epoch(world).await?;
    leases(world).delete("cyberdesk-operator", &DeleteParams::default()).await?;
    world.until("somebody leads again", async || Ok(lease(world).await?.0.is_some())).await?;
    world.running_desktop("1 hour").await?;
    ensure!(until_one_epoch(world).await? > before, "a later term");
    world.request_shutdown(&id).await?;
    world.until_over(&id).await.map(drop)
}

async fn lease_lost(world: &World) -> Result<()> {
    for _ in 0..3 {
        world.start_operator(&[]).await?;
        world.running_desktop("1 hour").await?;
        world.stop_operator().await?;
    }
    let before = until_one_epoch(world).await?;
    leases(world).delete("cyberdesk-operator", &DeleteParams::default()).await?;
    world.start_operator(&[]).await?;
    world.running_desktop("1 hour").await?;
    ensure!(until_one_epoch(world).await? > before, "the database was not gone back on");
    Ok(())
}
