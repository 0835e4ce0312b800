//! Postgres is away, in each way that there is: desktops live on, deadlines and ends are kept, and told when it is back.
//!
//! The operator reaches its database by a wire that is cut; the story, as the app, goes straight there.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cyberdesk_testbed::api_proxy::ApiProxy;
use cyberdesk_testbed::pgbouncer::{Mode, PgBouncer};
use cyberdesk_testbed::postgres::{self, SUPERUSER};
use cyberdesk_testbed::wire::{Condition, Wire};
use cyberdesk_testbed::{Postgres, Progress};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use rustix::process::Signal;
use serde_json::json;
use uuid::Uuid;

use crate::tools::Tool;
use crate::wakeups::a_life;
use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("Postgres half-open: a deadline is kept by the CR, and an extension comes too late", half_open),
        story("Postgres refuses: a deadline is kept by the CR, and an extension comes too late", refused),
        story("Postgres away at start: ends are kept by the CRs, CRs by hand are served", away_at_start),
        story("Postgres away and the leader killed: the other keeps the deadline by the CR", away_and_killed),
        story("Postgres killed, stopped, and out of connections: each time all is caught up", restarted),
        story("Postgres slow: a desktop lives and ends", slow),
        story("Postgres locked by somebody: a deadline is kept, and told when it is free", locked),
        story("Postgres has not heard of a VM yet: it is not made again, whatever becomes of it and its CR", unheard),
        story(
            "Postgres read-only, as after a failover: a deadline is kept, and told when it is written again",
            read_only,
        ),
        story("a pooler that is restarted costs a moment", pooler_restarted).needs(Tool::PgBouncer),
        story("a query whose answer never comes is cut, and asked again", cut_off),
        story("what gathers in an outage is told in one round", gathered),
        story("app and GoTrue never fail on the locks of the write-back", never_the_victim),
        story("in a storm of cuts an operator holds four connections, and loses nothing", storm),
    ]
}

/// The operator's database at the end of a wire.
pub(crate) async fn wired(world: &World) -> Result<(Wire, String)> {
    let url = world.database.url("cyberdesk_daemon");
    let port: u16 =
        url.split_once("127.0.0.1:").and_then(|(_, rest)| rest.split('/').next()?.parse().ok()).context("a port")?;
    let wire = Wire::to(port).await?;
    let url = url.replace(&format!(":{port}/"), &format!(":{}/", wire.port()));
    Ok((wire, url))
}

/// Gives it so many seconds to live, and waits until its CR has them.
async fn gets(world: &World, id: &str, seconds: u32) -> Result<Timestamp> {
    let deadline =
        format!("update cyberdesk_instances set timeout_at = now() + interval '{seconds} seconds' where id = $1");
    world.app(&deadline, id).await?;
    let at = world.row(id).await?.timeout_at;
    let shown = async || {
        let spec = world.crs().get(id).await?.data["spec"]["expiresAt"].as_str().map(str::parse::<Timestamp>);
        Ok(spec.and_then(Result::ok) == Some(at))
    };
    world.until("its CR has the deadline", shown).await?;
    Ok(at)
}

/// Waits until its VM is gone by an end that its CR has, and answers the reason.
async fn until_ended_in_the_cr(world: &World, id: &str) -> Result<String> {
    let gone = async || Ok(world.vms().get_opt(&vm_name(id)).await?.is_none());
    world.until("its VM is gone", gone).await?;
    let end = world.crs().get(id).await?.data["status"]["end"].clone();
    end["reason"].as_str().map(str::to_owned).with_context(|| format!("the CR has no end: {end}"))
}

/// It is ended by its deadline: not before, and no later than this. Two seconds are promised while somebody leads, on a
/// machine that has nothing else to do.
async fn ends_by(world: &World, id: &str, deadline: Timestamp, latest: i64) -> Result<()> {
    ensure!(until_ended_in_the_cr(world, id).await? == "timeout");
    let end = world.crs().get(id).await?.data["status"]["end"]["at"].as_str().map(str::parse::<Timestamp>);
    let late = end.context("it says when")??.duration_since(deadline);
    // The API server tells whole seconds, and after a start it takes a while to know where in between it is.
    println!("a deadline without Postgres: ended {late:#} after it");
    ensure!((-1..=latest).contains(&late.as_secs()), "{late:#} after its deadline");
    Ok(())
}

async fn deadline_in(world: &World, cut: Condition) -> Result<()> {
    let (wire, url) = wired(world).await?;
    world.start_operator(&[("DATABASE_URL", &url)]).await?;
    let (id, other) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    let deadline = gets(world, &id, 12).await?;
    wire.set(cut);
    world.app("update cyberdesk_instances set timeout_at = now() + interval '1 hour' where id = $1", &id).await?;
    ends_by(world, &id, deadline, 10).await?;
    ensure!(world.row(&id).await?.status == "running", "nobody could tell the row");
    ensure!(world.crs().get_opt(&id).await?.is_some(), "its CR stays until the row has it");
    wire.set(Condition::Passes);
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("timeout")), "{row:?}");
    ensure!(
        row.message.as_deref().is_some_and(|words| words.contains("did not answer")),
        "its owner is told why: {row:?}"
    );
    ensure!(world.row(&other).await?.status == "running" && world.left().await?.len() == 4, "the other lives on");
    a_life(world).await
}

async fn half_open(world: &World) -> Result<()> {
    deadline_in(world, Condition::Swallows).await
}

async fn refused(world: &World) -> Result<()> {
    deadline_in(world, Condition::Refuses).await
}

async fn away_at_start(world: &World) -> Result<()> {
    let (wire, url) = wired(world).await?;
    world.start_operator(&[("DATABASE_URL", &url)]).await?;
    let (due, crashing, living) = (
        world.running_desktop("1 hour").await?,
        world.running_desktop("1 hour").await?,
        world.running_desktop("1 hour").await?,
    );
    let uid = world.vms().get(&vm_name(&living)).await?.metadata.uid;
    let deadline = gets(world, &due, 15).await?;
    let leases = Api::<Lease>::namespaced(world.parts.client.clone(), &world.namespace);
    let recalled = async || {
        let lease = leases.get("cyberdesk-operator").await?;
        let offset = lease
            .metadata
            .annotations
            .and_then(|all| all.get("cyberdesk.io/database-clock-offset-ms")?.parse::<i64>().ok());
        Ok(offset.is_some_and(|offset| offset.abs() < 2000))
    };
    world.until("the Lease has how far the two clocks are apart", recalled).await?;
    wire.set(Condition::Refuses);
    world.crash_operator().await?;
    world.apply_cr("my-desk", json!({ "timeoutMs": 3_600_000 })).await?;
    world.guest(&crashing, "crash").await?;
    ensure!(until_ended_in_the_cr(world, &crashing).await? == "guest-crashed");
    ends_by(world, &due, deadline, 10).await?;
    let phase = |name: String| async move { world.cr_status(&name, "phase").await };
    world
        .until("the CR by hand is served", async || Ok(phase("my-desk".into()).await?.as_deref() == Some("Running")))
        .await?;
    for (id, said) in [(&due, "Terminated"), (&crashing, "Error"), (&living, "Running")] {
        world.until("the CRs tell it", async || Ok(phase(id.clone()).await?.as_deref() == Some(said))).await?;
    }
    wire.set(Condition::Passes);
    for (id, status, reason) in [(due, "terminated", "timeout"), (crashing, "error", "guest-crashed")] {
        let row = world.until_over(&id).await?;
        ensure!((row.status.as_str(), row.reason.as_deref()) == (status, Some(reason)), "{row:?}");
    }
    ensure!(world.vms().get(&vm_name(&living)).await?.metadata.uid == uid, "the third lives on");
    world.request_shutdown(&living).await?;
    world.until_over(&living).await.map(drop)
}

async fn away_and_killed(world: &World) -> Result<()> {
    let (wire, url) = wired(world).await?;
    let settings = |name| [("DATABASE_URL", url.as_str()), ("CYBERDESK_IDENTITY", name)];
    let leader = world.start_daemon("a", &settings("a")).await?;
    let id = world.running_desktop("1 hour").await?;
    let _standby = world.start_daemon("b", &settings("b")).await?;
    world.daemon_says("b", "listed").await?;
    let deadline = gets(world, &id, 12).await?;
    wire.set(Condition::Swallows);
    leader.kill9().await?;
    ends_by(world, &id, deadline, 30).await?;
    wire.set(Condition::Passes);
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("timeout")), "{row:?}");
    Ok(())
}

/// A server of this story alone.
async fn own_server(world: &World) -> Result<Postgres> {
    let part = Progress::quiet().part("a postgres of its own");
    Postgres::start(&postgres::Options::default(), world.parts.testbed.scratch(), &part).await
}

async fn restarted(world: &World) -> Result<()> {
    let postgres = own_server(world).await?;
    let world = World::on(Arc::clone(&world.parts), postgres.database().await?).await?;
    let told = through_restarts(&world, &postgres).await;
    if let Err(error) = told {
        anyhow::bail!("{error:#}\n{}", world.autopsy().await);
    }
    Ok(())
}

async fn through_restarts(world: &World, postgres: &Postgres) -> Result<()> {
    world.start_operator(&[]).await?;
    let mut ids = vec![];
    for _ in 0..4 {
        ids.push(world.running_desktop("1 hour").await?);
    }
    let living = ids.remove(0);
    for (signal, guest, status, reason) in
        [(Signal::KILL, "crash", "error", "guest-crashed"), (Signal::INT, "power-off", "terminated", "guest-shutdown")]
    {
        match signal {
            Signal::KILL => postgres.server().kill9().await?,
            signal => {
                postgres.server().signal(signal)?;
                postgres.server().ended().await?;
            }
        }
        let id = ids.remove(0);
        world.guest(&id, guest).await?;
        ensure!(until_ended_in_the_cr(world, &id).await? == reason);
        postgres.restart().await?;
        told_again(world, &id, status, reason).await?;
    }
    let id = ids.remove(0);
    let admin = world.database.connect_as(SUPERUSER).await?;
    let limit = async |limit: i32| {
        admin
            .batch_execute(&format!(
                "alter role cyberdesk_daemon connection limit {limit};
             select pg_terminate_backend(pid) from pg_stat_activity where usename = 'cyberdesk_daemon'"
            ))
            .await
    };
    limit(0).await?;
    world.operator_says("too many connections").await?;
    world.guest(&id, "crash").await?;
    ensure!(until_ended_in_the_cr(world, &id).await? == "guest-crashed");
    limit(-1).await?;
    told_again(world, &id, "error", "guest-crashed").await?;
    ensure!(world.vms().get_opt(&vm_name(&living)).await?.is_some(), "the one that nothing befell lives on");
    let states = "select count(*) from cyberdesk_instances where status = 'running'";
    ensure!(admin.query_one(states, &[]).await?.get::<_, i64>(0) == 1);
    Ok(())
}

/// The world's own connection to the app's database went with the server.
async fn told_again(world: &World, id: &str, status: &str, reason: &str) -> Result<()> {
    let app = world.database.connect_as("postgres").await?;
    let told = "select 1 from cyberdesk_instances
                 where id = $1 and status::text = $2 and reason = $3 and ended_at is not null";
    let row = id.parse::<Uuid>()?;
    let has = async || Ok(app.query_opt(told, &[&row, &status, &reason]).await?.is_some());
    world.until(&format!("the row tells {reason}"), has).await?;
    world.until("its CR is released", async || Ok(world.crs().get_opt(id).await?.is_none())).await
}

async fn slow(world: &World) -> Result<()> {
    let (wire, url) = wired(world).await?;
    wire.set(Condition::Delays(Duration::from_millis(300)));
    world.start_operator(&[("DATABASE_URL", &url)]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.app("update cyberdesk_instances set timeout_at = now() + interval '3 seconds' where id = $1", &id).await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("timeout")), "{row:?}");
    a_life(world).await
}

async fn cut_off(world: &World) -> Result<()> {
    // Three seconds of each that it looks for changed rows in.
    world
        .sql(
            "create schema at_ease;
             alter function cyberdesk.dirty_desktops(int) set schema at_ease;
             create function cyberdesk.dirty_desktops(max int) returns setof cyberdesk.desktop_state
               language sql security definer as
               $$ select from pg_sleep(3); select * from at_ease.dirty_desktops(max) $$;
             grant execute on function cyberdesk.dirty_desktops(int) to cyberdesk_daemon;",
        )
        .await?;
    let (wire, url) = wired(world).await?;
    world.start_operator(&[("DATABASE_URL", &url), ("CYBERDESK_POLL_INTERVAL", "10ms")]).await?;
    world.operator_says("notifications of the database arrive").await?;
    let looks = "select count(*) from pg_stat_activity where datname = current_database() and query like '%dirty_desktops%' and state = 'active' and usename = 'cyberdesk_daemon' and query_start > clock_timestamp() - interval '1 second'";
    let observer = world.database.connect_as(SUPERUSER).await?;
    world.until("it looks", async || Ok(observer.query_one(looks, &[]).await?.get::<_, i64>(0) == 1)).await?;
    wire.set(Condition::Swallows);
    world.operator_says("no answer within 15 s").await?;
    wire.set(Condition::Passes);
    a_life(world).await
}

async fn locked(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let deadline = gets(world, &id, 10).await?;
    let somebody = world.database.connect_as("postgres").await?;
    somebody.batch_execute("begin; lock table cyberdesk.desktop, cyberdesk.fence in access exclusive mode").await?;
    ends_by(world, &id, deadline, 10).await?;
    somebody.batch_execute("rollback").await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("timeout")), "{row:?}");
    a_life(world).await
}

async fn unheard(world: &World) -> Result<()> {
    let proxy = ApiProxy::start(&world.parts.testbed.control_plane).await?;
    world.sql("update cyberdesk.settings set paused = true").await?;
    world.start_operator(&[("KUBECONFIG", &world.through(&proxy)?)]).await?;
    let id = world.insert("1 hour").await?;
    world.until("its CR is made", async || Ok(world.crs().get_opt(&id).await?.is_some())).await?;
    let somebody = world.database.connect_as(SUPERUSER).await?;
    somebody
        .batch_execute("begin; select from cyberdesk_instances for update; select from cyberdesk.desktop for update")
        .await?;
    world.sql("update cyberdesk.settings set paused = false").await?;
    world
        .until("its guest runs", async || Ok(world.cr_status(&id, "phase").await?.as_deref() == Some("Running")))
        .await?;

    world.delete(world.vms(), &vm_name(&id)).await?;
    let gone = async || Ok(world.vmis().get_opt(&vm_name(&id)).await?.is_none() && world.left().await?.len() == 1);
    world.until("VM, VMI and Secret are gone", gone).await?;
    let first = world.crs().get(&id).await?.metadata.uid;
    world.delete(world.crs(), &id).await?;
    let back = async || Ok(world.crs().get_opt(&id).await?.is_some_and(|cr| cr.metadata.uid != first));
    world.until("its CR is back", back).await?;
    let told = async || Ok(world.cr_status(&id, "reason").await?.as_deref() == Some("vm-deleted"));
    world.until("and tells of the end", told).await?;
    somebody.batch_execute("rollback").await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("vm-deleted")), "{row:?}");
    let made = proxy.done("create", "virtualmachines", &vm_name(&id));
    ensure!(made == 1, "{made} VMs were made");
    Ok(())
}

async fn read_only(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let (id, other) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    let deadline = gets(world, &id, 12).await?;
    let admin = world.database.connect_as(SUPERUSER).await?;
    let writable = async |writable: bool| {
        let name = world.database.name();
        let off = if writable { "off" } else { "on" };
        admin.batch_execute(&format!("alter database {name} set default_transaction_read_only = {off}")).await?;
        let cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = $1 and usename = 'cyberdesk_daemon'";
        admin.query_one(cut, &[&name]).await.map(drop)
    };
    writable(false).await?;
    ends_by(world, &id, deadline, 10).await?;
    world.operator_says("read-only").await?;
    writable(true).await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("timeout")), "{row:?}");
    ensure!(world.row(&other).await?.status == "running", "the other lives on");
    a_life(world).await
}

async fn pooler_restarted(world: &World) -> Result<()> {
    let binary = Tool::PgBouncer.find().context(Tool::PgBouncer.remedy())?;
    let testbed = &world.parts.testbed;
    let pooler = PgBouncer::start(&binary, &testbed.postgres, Mode::Session, testbed.scratch()).await?;
    let url = pooler.url("cyberdesk_daemon", world.database.name());
    world.start_operator(&[("DATABASE_URL", &url)]).await?;
    let id = world.running_desktop("1 hour").await?;
    // It is killed, and started anew.
    pooler.switch(Mode::Session).await?;
    a_life(world).await?;
    ensure!(world.row(&id).await?.status == "running", "who was there lives on");
    Ok(())
}

async fn storm(world: &World) -> Result<()> {
    let (wire, url) = wired(world).await?;
    world.start_operator(&[("DATABASE_URL", &url)]).await?;
    tokio::select! {
        told = through_a_storm(world, &wire) => told,
        open = too_many(&wire) => anyhow::bail!("{open} connections, and for long"),
    }
}

/// Resolves when more than four were open for longer than it takes to hear that they were closed.
async fn too_many(wire: &Wire) -> usize {
    let mut looks = 0;
    loop {
        let open = wire.open();
        looks = if open > 4 { looks + 1 } else { 0 };
        // Three seconds, and as many as the machine may have stood still for on top.
        if looks > 300 {
            return open;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn through_a_storm(world: &World, wire: &Wire) -> Result<()> {
    let (ending, living) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    for round in 0..4 {
        wire.set(if round % 2 == 0 { Condition::Refuses } else { Condition::Swallows });
        world.insert_many(3).await?;
        let before = wire.made();
        world.until("it tries again", async || Ok(wire.made() > before)).await?;
        wire.set(Condition::Passes);
        let running = "select count(*) from cyberdesk_instances where status = 'running'";
        world.until("all run", async || Ok(world.count(running).await? == 2 + 3 * (round + 1))).await?;
    }
    world.request_shutdown(&ending).await?;
    world.until_over(&ending).await?;
    ensure!(world.row(&living).await?.status == "running", "who was there lives on");
    Ok(())
}

async fn gathered(world: &World) -> Result<()> {
    let counted = "
        create schema counted;
        create sequence counted.reports;
        grant usage on schema counted to cyberdesk_daemon;
        grant usage on sequence counted.reports to cyberdesk_daemon;
        alter function cyberdesk.report(bigint, uuid, uuid[], bigint[], text[], text[], text[], text[], text[], boolean[]) set schema counted;
        create function cyberdesk.report(
          epoch bigint, token uuid, ids uuid[], generations bigint[], vm_uids text[], statuses text[], reasons text[],
          messages text[], stream_urls text[], ended boolean[]) returns table (id uuid, answer text)
          language sql security definer as $$
            with told as materialized (
              select * from counted.report(epoch, token, ids, generations, vm_uids, statuses, reasons, messages, stream_urls, ended)),
            -- What was read just before it was told is told once more, and is the same then.
            counted as materialized (
              select nextval('counted.reports') where exists (select from told where told.answer = 'written'))
            select told.* from told left join counted on true
          $$;
        grant execute on function cyberdesk.report(bigint, uuid, uuid[], bigint[], text[], text[], text[], text[], text[], boolean[]) to cyberdesk_daemon;";
    world.sql(counted).await?;
    let (wire, url) = wired(world).await?;
    world.start_operator(&[("DATABASE_URL", &url), ("CYBERDESK_LOG", "debug")]).await?;
    world.insert_many(12).await?;
    let running = "select count(*) from cyberdesk_instances where status = 'running'";
    world.until("all run", async || Ok(world.count(running).await? == 12)).await?;
    let crs = world.crs().list(&Default::default()).await?.items;
    wire.set(Condition::Refuses);
    for cr in &crs {
        world.guest(cr.metadata.name.as_deref().context("a name")?, "crash").await?;
    }
    let none_left = async || Ok(world.vmis().list(&Default::default()).await?.items.is_empty());
    world.until("all have crashed and are gone", none_left).await?;
    let told = async || {
        Ok(world.operator_log()?.lines().any(|line| line.contains("cannot write back") && line.contains("waiting=12")))
    };
    world.until("all is to be told", told).await?;
    let before = world.count("select last_value from counted.reports").await?;
    wire.set(Condition::Passes);
    let over = "select count(*) from cyberdesk_instances where ended_at is not null and reason = 'guest-crashed' and status = 'error'";
    world.until("all are over", async || Ok(world.count(over).await? == 12)).await?;
    let statements = world.count("select last_value from counted.reports").await? - before;
    ensure!((1..=2).contains(&statements), "{statements} statements for what one can tell");
    world.until("nothing is left", async || Ok(world.left().await?.is_empty())).await
}

/// One app, whose statements come one after the other, so that only the operator can be in their way.
async fn never_the_victim(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let app = world.database.connect_as("postgres").await?;
    let mut users = std::collections::VecDeque::new();
    for round in 0..10 {
        let user = world.database.sign_up().await?;
        users.push_back(user);
        let insert = "insert into cyberdesk_instances (user_id) select $1 from generate_series(1, 4)";
        app.execute(insert, &[&user]).await.context("the app inserts")?;
        let seen = async || Ok(world.crs().list(&Default::default()).await?.items.len() >= 4);
        world.until("some are served", seen).await?;
        for order in ["asc", "desc"] {
            app.batch_execute("begin").await?;
            let ids = app.query(&format!("select id from cyberdesk_instances order by id {order}"), &[]).await?;
            for id in ids {
                let touch = "update cyberdesk_instances set updated_at = now() where id = $1";
                app.execute(touch, &[&id.get::<_, Uuid>(0)])
                    .await
                    .with_context(|| format!("round {round}: the app updates one by one"))?;
            }
            app.batch_execute("commit").await?;
            let all = "update cyberdesk_instances set timeout_at = timeout_at + interval '1 second'";
            app.execute(all, &[]).await.with_context(|| format!("round {round}: the app updates all"))?;
        }
        let stop = "update cyberdesk_instances set status = 'terminated' where user_id = $1";
        if let Some(one) = users.get(users.len().saturating_sub(2)) {
            app.execute(stop, &[one]).await.with_context(|| format!("round {round}: the app stops some"))?;
        }
        if users.len() > 3
            && let Some(gone) = users.pop_front()
        {
            world.database.delete_user(gone).await.with_context(|| format!("round {round}: GoTrue deletes a user"))?;
        }
    }
    for user in users {
        world.database.delete_user(user).await?;
    }
    world.until("nothing is left", async || Ok(world.left().await?.is_empty())).await?;
    let live = "select count(*) from cyberdesk.desktop where ended_at is null";
    world.until("all are over", async || Ok(world.count(live).await? == 0)).await
}
