//! The brake: a database or a cluster that is not the one it was makes and ends nothing until a person confirms; what
//! only looks like it does not brake.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cyberdesk_testbed::Database;
use cyberdesk_testbed::postgres::SUPERUSER;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::{Resource, ResourceExt};
use serde_json::json;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::scale::many;
use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a cloned database stops all that is of a row until the original is back", cloned),
        story("a copy from before is confirmed by kubectl, and what it does not know is collected", copied_before),
        story("an empty database is confirmed by SQL, and another database's desktops stay", emptied),
        story("a table emptied round its triggers ends nothing until a person confirms", truncated),
        story("a database that has gone back brakes, and a confirmation holds for that once", gone_back),
        story("a database restored in place within the term brakes, also for the next leader", restored_in_place),
        story("a second cluster on the same database stands still until a person confirms", another_cluster),
        story("a database that was only away does not brake", failed_over),
        story("an app that deletes all its desktops at once does not brake", all_at_once).alone(),
    ]
}

// ----- databases that take each other's place

/// Ends all sessions of a database that lets nobody in any more.
async fn cut(admin: &Client, database: &str) -> Result<()> {
    let cut =
        format!("select count(pg_terminate_backend(pid, 10000)) from pg_stat_activity where datname = '{database}'");
    // Who was just being let in is seen by a later look.
    while admin.query_one(&cut, &[]).await?.get::<_, i64>(0) > 0 {}
    Ok(())
}

/// Does something that bears no session of a database, then lets them in again.
async fn without_sessions(databases: &[&str], world: &World, statements: &str) -> Result<()> {
    let aside = world.parts.testbed.postgres.database().await?;
    let admin = aside.connect_as(SUPERUSER).await?;
    for name in databases {
        admin.batch_execute(&format!("alter database {name} allow_connections false")).await?;
    }
    // Each by itself: some bear no transaction.
    for statement in statements.split(';').filter(|statement| !statement.trim().is_empty()) {
        let done = async || {
            for name in databases {
                cut(&admin, name).await?;
            }
            match admin.batch_execute(statement).await {
                Ok(()) => Ok(true),
                // One got in before the door was shut, and was not to be seen yet.
                Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) => Ok(false),
                Err(error) => Err(error).context(statement.to_owned()),
            }
        };
        world.until(statement, done).await?;
    }
    Ok(())
}

/// Has what is behind the world's URL be this database from now on, and the other way round.
async fn swap(world: &World, other: &Database) -> Result<()> {
    let (here, there) = (world.database.name(), other.name());
    let statements = format!(
        "alter database {here} rename to {here}_aside; alter database {there} rename to {here};
         alter database {here}_aside rename to {there};
         alter database {there} allow_connections true; alter database {here} allow_connections true"
    );
    without_sessions(&[here, there], world, &statements).await?;
    world.reconnect().await
}

/// A copy of the world's database as it is now, in the place of this one.
async fn copy_into(world: &World, other: &Database) -> Result<()> {
    let (here, there) = (world.database.name(), other.name());
    let statements = format!(
        "drop database {there}; create database {there} template {here} owner postgres;
         alter database {here} allow_connections true"
    );
    without_sessions(&[here, there], world, &statements).await?;
    world.reconnect().await
}

/// Keeps what is in the database now.
const KEEP: &str = "
    create schema kept;
    do $$
    declare
      its record;
    begin
      for its in select schemaname, tablename from pg_tables where schemaname in ('cyberdesk', 'public') loop
        execute format('create table kept.%I as table %I.%I', its.tablename, its.schemaname, its.tablename);
      end loop;
    end $$";

/// Puts it back, as of an hour ago.
const PUT_BACK: &str = "
    set session_replication_role = replica;
    do $$
    declare
      its record;
    begin
      for its in select schemaname, tablename from pg_tables where schemaname in ('cyberdesk', 'public') loop
        execute format('delete from %I.%I', its.schemaname, its.tablename);
        execute format('insert into %I.%I overriding system value table kept.%I', its.schemaname, its.tablename, its.tablename);
      end loop;
    end $$;
    update cyberdesk.service set seen_at = seen_at - interval '1 hour', last_sign_of_life = last_sign_of_life - interval '1 hour'";

/// Has the database be in the state that was kept: same server, same oid, same epoch. As a restore does, it bears no
/// session.
async fn restore_in_place(world: &World) -> Result<()> {
    let here = world.database.name();
    let aside = world.parts.testbed.postgres.database().await?;
    let admin = aside.connect_as(SUPERUSER).await?;
    // Superusers are let in all the same.
    admin.batch_execute(&format!("alter database {here} connection limit 0")).await?;
    cut(&admin, here).await?;
    as_superuser(world, PUT_BACK).await?;
    admin.batch_execute(&format!("alter database {here} connection limit -1")).await?;
    world.reconnect().await
}

async fn as_superuser(world: &World, statements: &str) -> Result<()> {
    Ok(world.database.connect_as(SUPERUSER).await?.batch_execute(statements).await?)
}

// ----- what is seen

fn leases(world: &World) -> Api<Lease> {
    Api::namespaced(world.parts.client.clone(), &world.namespace)
}

/// Waits until the operator says that it is braked for this cause, and answers the confirmation that it asks for.
async fn until_braked(world: &World, cause: &str) -> Result<String> {
    world.operator_says(&format!("{cause}-")).await?;
    let log = world.operator_log()?;
    let message = log.lines().rev().find(|line| line.contains("braked: ")).context("it says that it is braked")?;
    let (_, rest) = message.split_once("confirm_pair('").context("the message says how to confirm")?;
    let (value, _) = rest.split_once('\'').context("and with what")?;
    ensure!(value.starts_with(cause), "{message}");
    ensure!(message.contains(&format!("cyberdesk.io/confirm={value} --overwrite")), "by kubectl too: {message}");
    Ok(value.to_owned())
}

async fn until_released(world: &World) -> Result<()> {
    world.operator_says("the brake is off").await
}

/// As `kubectl annotate lease … --overwrite` does.
async fn confirm_by_kubectl(world: &World, value: &str) -> Result<()> {
    let patch = json!({ "metadata": { "annotations": { "cyberdesk.io/confirm": value } } });
    leases(world).patch("cyberdesk-operator", &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(())
}

async fn service_state(world: &World) -> Result<String> {
    let client = world.database.connect_as("postgres").await?;
    Ok(client.query_one("select state from desktop_service_state()", &[]).await?.get(0))
}

/// All objects of desktops with their UIDs, and whether they are being deleted.
async fn objects(world: &World) -> Result<BTreeMap<String, bool>> {
    let mut all = BTreeMap::new();
    for (kind, api) in [("CR", world.crs()), ("VM", world.vms()), ("VMI", world.vmis())] {
        for object in api.list(&ListParams::default()).await? {
            let name = format!("{kind} {} {}", object.name_any(), object.uid().unwrap_or_default());
            all.insert(name, object.meta().deletion_timestamp.is_some());
        }
    }
    Ok(all)
}

/// A desktop by hand comes, runs and goes, which takes the daemon several rounds: what it would do wrong meanwhile, it
/// has had the time to do.
async fn a_life_by_hand(world: &World, name: &str) -> Result<()> {
    world.apply_cr(name, json!({ "timeoutMs": 3_600_000 })).await?;
    world
        .until("a desktop by hand runs", async || {
            Ok(world.cr_status(name, "phase").await?.as_deref() == Some("Running"))
        })
        .await?;
    world.delete(world.crs(), name).await?;
    world.until("it is gone", async || Ok(world.vms().get_opt(&vm_name(name)).await?.is_none())).await
}

// ----- the stories

async fn cloned(world: &World) -> Result<()> {
    let clone = world.parts.testbed.postgres.database().await?;
    world.start_operator(&[]).await?;
    let (kept, stopped, deleted) = (
        world.running_desktop("1 hour").await?,
        world.running_desktop("1 hour").await?,
        world.running_desktop("1 hour").await?,
    );
    copy_into(world, &clone).await?;
    let before = objects(world).await?;
    swap(world, &clone).await?;
    until_braked(world, "copy").await?;

    world.request_shutdown(&stopped).await?;
    world.app("delete from cyberdesk_instances where id = $1", &deleted).await?;
    world.app("update cyberdesk_instances set timeout_at = now() where id = $1", &kept).await?;
    let new = world.insert("1 hour").await?;
    a_life_by_hand(world, "by-hand").await?;
    ensure!(
        objects(world).await? == before,
        "nothing of a row is made or deleted:\n{before:#?}\n{:#?}",
        objects(world).await?
    );
    ensure!(world.row(&new).await?.status == "pending" && world.row(&kept).await?.shutdown_requested_at.is_none());
    ensure!(world.row(&stopped).await?.ended_at.is_none(), "no row is ended");
    ensure!(service_state(world).await? == "braked", "the app is told");
    let events: Api<Event> = Api::namespaced(world.parts.client.clone(), &world.namespace);
    world
        .until("the Lease has an Event", async || {
            let told = events.list(&ListParams::default()).await?;
            Ok(told.iter().any(|event| {
                event.reason.as_deref() == Some("Braked")
                    && event
                        .note
                        .as_deref()
                        .is_some_and(|note| note.contains("kubectl annotate lease cyberdesk-operator"))
                    && event.regarding.as_ref().is_some_and(|about| about.kind.as_deref() == Some("Lease"))
            }))
        })
        .await?;

    swap(world, &clone).await?;
    until_released(world).await?;
    world.request_shutdown(&stopped).await?;
    world.until_over(&stopped).await?;
    ensure!(world.row(&kept).await?.status == "running" && world.row(&deleted).await?.status == "running");
    world.running_desktop("1 hour").await.map(drop)
}

async fn copied_before(world: &World) -> Result<()> {
    let copy = world.parts.testbed.postgres.database().await?;
    world.start_operator(&[("CYBERDESK_ORPHAN_GRACE", "10s")]).await?;
    let known = world.running_desktop("1 hour").await?;
    copy_into(world, &copy).await?;
    let unknown = world.running_desktop("1 hour").await?;
    swap(world, &copy).await?;
    let value = until_braked(world, "copy").await?;
    a_life_by_hand(world, "by-hand").await?;
    confirm_by_kubectl(world, "copy-000000000000").await?;
    a_life_by_hand(world, "by-hand-again").await?;
    ensure!(!world.operator_said("the brake is off")?, "another value confirms nothing");

    confirm_by_kubectl(world, &value).await?;
    until_released(world).await?;
    let lease = leases(world).get("cyberdesk-operator").await?;
    ensure!(!lease.annotations().contains_key("cyberdesk.io/confirm"), "the confirmation is used up");
    world
        .until("what the copy does not know is gone", async || {
            Ok(!world.left().await?.iter().any(|object| object.contains(&unknown)))
        })
        .await?;
    ensure!(world.operator_said("no row of this desktop")?, "it was told of first");
    ensure!(world.row(&known).await?.status == "running");
    world.request_shutdown(&known).await?;
    world.until_over(&known).await?;
    ensure!(service_state(world).await? == "serving");
    Ok(())
}

async fn emptied(world: &World) -> Result<()> {
    let empty = world.parts.testbed.postgres.database().await?;
    // All test databases are copies of one.
    empty
        .connect_as(SUPERUSER)
        .await?
        .batch_execute("update cyberdesk.database_identity set database_id = gen_random_uuid()")
        .await?;
    world.start_operator(&[("CYBERDESK_ORPHAN_GRACE", "10s"), ("CYBERDESK_RESYNC_INTERVAL", "1s")]).await?;
    let theirs = world.running_desktop("1 hour").await?;
    let before = objects(world).await?;
    swap(world, &empty).await?;
    let value = until_braked(world, "other-database").await?;
    let user = world.database.sign_up().await?;
    let app = world.database.connect_as("postgres").await?;
    app.execute("insert into cyberdesk_instances (user_id) values ($1)", &[&user]).await?;
    a_life_by_hand(world, "by-hand").await?;
    ensure!(objects(world).await? == before, "nothing is made or deleted");

    world.sql(&format!("select cyberdesk.confirm_pair('{value}')")).await?;
    until_released(world).await?;
    let running = "select count(*) from cyberdesk_instances where status = 'running'";
    world.until("the new database's row is served", async || Ok(world.count(running).await? == 1)).await?;
    world.operator_says("of another database").await?;
    // Longer than the grace of what is ours.
    let later = tokio::time::Instant::now() + Duration::from_secs(12);
    world.until("time passes", async || Ok(tokio::time::Instant::now() > later)).await?;
    ensure!(before.keys().all(|object| object.contains(&theirs)));
    let now = objects(world).await?;
    ensure!(before.iter().all(|(object, deleting)| now.get(object) == Some(deleting)), "strangers are never touched");
    Ok(())
}

async fn truncated(world: &World) -> Result<()> {
    world.start_operator(&[("CYBERDESK_RESYNC_INTERVAL", "1s")]).await?;
    world.insert_many(12).await?;
    let running = "select count(*) from cyberdesk_instances where status = 'running'";
    world.until("all run", async || Ok(world.count(running).await? == 12)).await?;
    let before = objects(world).await?;
    as_superuser(world, "set session_replication_role = replica; truncate public.cyberdesk_instances").await?;
    let value = until_braked(world, "rows-lost").await?;
    world.insert("1 hour").await?;
    a_life_by_hand(world, "by-hand").await?;
    ensure!(objects(world).await? == before, "nothing is made or deleted");
    world.sql(&format!("select cyberdesk.confirm_pair('{value}')")).await?;
    until_released(world).await?;
    let over = "select count(*) from cyberdesk.desktop where ended_at is not null and reason = 'row-deleted'";
    world.until("those whose rows are gone are over", async || Ok(world.count(over).await? == 12)).await?;
    world.until("the new one runs", async || Ok(world.count(running).await? == 1)).await
}

async fn gone_back(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    // As after a restore in place: same server, same oid, and an epoch from before.
    as_superuser(world, "update cyberdesk.fence set epoch = epoch - 1, token = gen_random_uuid()").await?;
    let here = world.database.name();
    without_sessions(&[here], world, &format!("alter database {here} allow_connections true")).await?;
    world.reconnect().await?;
    let value = until_braked(world, "database-went-back").await?;
    world.request_shutdown(&id).await?;
    a_life_by_hand(world, "by-hand").await?;
    ensure!(world.row(&id).await?.ended_at.is_none());
    confirm_by_kubectl(world, &value).await?;
    until_released(world).await?;
    world.until_over(&id).await?;

    confirm_by_kubectl(world, &value).await?;
    as_superuser(world, "update cyberdesk.fence set epoch = epoch - 2").await?;
    world
        .until("it brakes again, and asks for something else", async || {
            let log = world.operator_log()?;
            let asked: std::collections::BTreeSet<&str> =
                log.split("confirm_pair('").skip(1).filter_map(|rest| rest.split('\'').next()).collect();
            Ok(asked.len() == 2)
        })
        .await?;
    Ok(())
}

async fn restored_in_place(world: &World) -> Result<()> {
    world.start_operator(&[("CYBERDESK_ORPHAN_GRACE", "10s")]).await?;
    let (known, brought_back) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    as_superuser(world, KEEP).await?;
    let unknown = world.running_desktop("1 hour").await?;
    world.request_shutdown(&brought_back).await?;
    world.until_over(&brought_back).await?;
    let before = objects(world).await?;
    restore_in_place(world).await?;
    let value = until_braked(world, "database-went-back").await?;
    ensure!(world.operator_log()?.contains("had acknowledged one of"), "it says by what it knows");
    a_life_by_hand(world, "by-hand").await?;

    // What the leader before had been told is in the Lease: not in a renewal that was on its way, but in the next.
    let renewed_at =
        async || anyhow::Ok(leases(world).get("cyberdesk-operator").await?.spec.and_then(|it| it.renew_time));
    for _ in 0..2 {
        let before = renewed_at().await?;
        world.until("the Lease is renewed", async || Ok(renewed_at().await? != before)).await?;
    }
    let operator = world.kill_operator().await?;
    let told_before = world.operator_log()?.matches("braked: ").count();
    world.revive_operator(operator).await?;
    world
        .until("the next leader brakes too", async || {
            Ok(world.operator_log()?.matches("braked: ").count() > told_before)
        })
        .await?;
    a_life_by_hand(world, "by-hand-again").await?;
    ensure!(until_braked(world, "database-went-back").await? == value, "it asks for the same");
    let now = objects(world).await?;
    ensure!(now == before, "nothing is made or deleted:\n{before:#?}\n{now:#?}");
    ensure!(world.row(&brought_back).await?.ended_at.is_none(), "no row is ended");

    world.sql(&format!("select cyberdesk.confirm_pair('{value}')")).await?;
    until_released(world).await?;
    world.until_over(&brought_back).await?;
    ensure!(world.row(&brought_back).await?.reason.as_deref() == Some("vm-deleted"));
    let of_unknown = async || Ok(!world.left().await?.iter().any(|object| object.contains(&unknown)));
    world.until("what it does not know any more is gone", of_unknown).await?;
    ensure!(world.row(&known).await?.status == "running" && service_state(world).await? == "serving");
    Ok(())
}

async fn another_cluster(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let other = World::new(world.parts.clone()).await?;
    let url = world.database.url("cyberdesk_daemon");
    other.start_operator(&[("DATABASE_URL", &url)]).await?;
    let value = until_braked(&other, "other-cluster").await?;
    let second = world.running_desktop("1 hour").await?;
    a_life_by_hand(&other, "by-hand").await?;
    ensure!(objects(&other).await?.is_empty(), "the second cluster has nothing of it");
    ensure!(service_state(world).await? == "serving", "the first one's app is told nothing");
    ensure!(!world.operator_said("braked")? && world.row(&id).await?.status == "running");

    confirm_by_kubectl(&other, &value).await?;
    until_released(&other).await?;
    until_braked(world, "other-cluster").await?;
    let third = world.insert("1 hour").await?;
    world.until("the other serves now", async || Ok(other.crs().get_opt(&third).await?.is_some())).await?;
    world.until_status(&third, "running").await?;
    ensure!(world.vms().get_opt(&vm_name(&second)).await?.is_some(), "what the first has stays");
    Ok(())
}

async fn failed_over(world: &World) -> Result<()> {
    world.start_operator(&[("CYBERDESK_RESYNC_INTERVAL", "1s")]).await?;
    let id = world.running_desktop("1 hour").await?;
    for _ in 0..3 {
        // A standby that takes over has the same identity and all that was committed.
        let here = world.database.name();
        without_sessions(&[here], world, &format!("alter database {here} allow_connections true")).await?;
        world.reconnect().await?;
        world.running_desktop("1 hour").await?;
    }
    world.crash_operator().await?;
    world.request_shutdown(&id).await?;
    world.until_over(&id).await?;
    ensure!(!world.operator_said("braked")?);
    Ok(())
}

async fn all_at_once(world: &World) -> Result<()> {
    world.start_operator(&[("CYBERDESK_LOG", "warn"), ("CYBERDESK_RESYNC_INTERVAL", "1s")]).await?;
    let many = many()?;
    world.insert_many(i32::try_from(many)?).await?;
    let running = "select count(*) from cyberdesk_instances where status = 'running'";
    world.until_within(Duration::from_secs(300), "all run", async || Ok(world.count(running).await? == many)).await?;
    world.sql("delete from cyberdesk_instances").await?;
    let left = async || Ok(world.left().await?.is_empty());
    world.until_within(Duration::from_secs(300), "nothing is left in the cluster", left).await?;
    ensure!(!world.operator_said("braked")?);
    Ok(())
}
