//! Nothing grows without limit: what one desktop, many bad rows or a long outage cost is bounded by what there is, and
//! by time.

mod outages;

use std::cell::Cell;
use std::time::Duration;

use anyhow::{Result, ensure};
use cyberdesk_testbed::api_proxy::ApiProxy;
use cyberdesk_testbed::kubevirt;
use cyberdesk_testbed::postgres::SUPERUSER;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::time::{Instant, interval};

use outages::{without_postgres, without_the_api_server};

use crate::lives::stubborn;
use crate::scale::many;
use crate::world::{World, timed, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("bounded: a VMI that changes 50 times a second costs a look a second and delays nobody", a_hot_desktop)
            .alone(),
        story("bounded: a VMI that changes 50 times a second as it is deleted does so too, and ends", a_hot_end)
            .alone(),
        story("bounded: without Postgres for ever so long, nothing grows, and all is caught up", without_postgres)
            .alone(),
        story(
            "bounded: without the API server for ever so long, nothing grows, and all is caught up",
            without_the_api_server,
        )
        .alone(),
        story("bounded: many bad rows each say why once, and a good one among them runs", many_bad_rows).alone(),
    ]
}

/// Changes of a VMI in a second, and how many there are at the least: enough to tell them from looks, however slow the
/// machine.
const CHANGES: (u32, usize) = (50, 250);
/// Looks at one desktop in one lane that may follow one another at once (`queue::BURST`), before there is one a second.
const BURST: usize = 40;
/// What others do takes at most so many times as long beside it: machines and moments differ.
const DELAY: u32 = 5;

async fn a_hot_desktop(world: &World) -> Result<()> {
    let proxy = ApiProxy::start(&world.parts.testbed.control_plane).await?;
    world.start_operator(&[("KUBECONFIG", &world.through(&proxy)?)]).await?;
    let hot = world.running_desktop("1 hour").await?;
    let lines = || anyhow::Ok(world.operator_log()?.lines().filter(|line| line.contains(&hot)).count());
    let writes = || proxy.done("patch", "cyberdesks/status", &hot);
    let versions = format!(
        "select concat_ws(' ', c.xmin, d.xmin) from cyberdesk_instances c join cyberdesk.desktop d using (id) where id = '{hot}'"
    );
    let observer = world.database.connect_as(SUPERUSER).await?;
    let written_to = async || anyhow::Ok(observer.query_one(&versions, &[]).await?.get::<_, String>(0));
    let another = async || {
        timed(async {
            let id = world.running_desktop("1 hour").await?;
            world.request_shutdown(&id).await?;
            world.until_over(&id).await
        })
        .await
    };
    let quiet = another().await?;
    let (lines_before, writes_before, row_before) = (lines()?, writes(), written_to().await?);

    let began = Instant::now();
    let (changes, beside) = flap(world, &hot, least_of_three(another)).await?;
    ensure!(beside < DELAY * quiet, "another desktop's life took {beside:?}, and {quiet:?} before");
    let last = address(changes);
    let settled = async || Ok(world.cr_status(&hot, "ip").await?.as_deref() == Some(last.as_str()));
    world.until("the CR tells the last address", settled).await?;

    let seconds = usize::try_from(began.elapsed().as_secs())? + 1;
    let (written, logged) = (writes() - writes_before, lines()? - lines_before);
    let most = BURST + seconds;
    ensure!(changes > 2 * most, "{changes} changes are not many enough to tell");
    ensure!(written <= most, "{written} writes of its status for {changes} changes in {seconds} s");
    ensure!(logged <= most + 2, "{logged} lines of the log for {changes} changes in {seconds} s");
    ensure!(written_to().await? == row_before, "its row is not touched");
    world.request_shutdown(&hot).await?;
    world.until_over(&hot).await.map(drop)
}

/// The shortest of three in a row: a moment in which the machine stands still is in one of them.
async fn least_of_three(time: impl AsyncFn() -> Result<Duration>) -> Result<Duration> {
    Ok(time().await?.min(time().await?).min(time().await?))
}

/// Changes its VMI again and again for as long as others are at work, and answers how often, and what they answer.
async fn flap<T>(world: &World, id: &str, others: impl Future<Output = Result<T>>) -> Result<(usize, T)> {
    let vmis = kubevirt::vmis(&kubevirt::as_kubevirt(&world.parts.client), &world.namespace);
    let at_work = Cell::new(true);
    let others = async {
        let done = others.await?;
        at_work.set(false);
        Ok(done)
    };
    let flapping = async {
        let mut ticks = interval(Duration::from_secs(1) / CHANGES.0);
        let mut changes = 0;
        while at_work.get() || changes < CHANGES.1 {
            ticks.tick().await;
            changes += 1;
            let status = json!({ "interfaces": [{ "name": "default", "ipAddress": address(changes) }] });
            let status = Patch::Merge(json!({ "status": status }));
            vmis.patch(&vm_name(id), &PatchParams::default(), &status).await?;
        }
        anyhow::Ok(changes)
    };
    tokio::try_join!(flapping, others)
}

async fn a_hot_end(world: &World) -> Result<()> {
    // Longer than it is restless.
    world.templates(&[("default.yaml", &stubborn(60))]).await?;
    world.start_operator(&[("CYBERDESK_LOG", "warn,cyberdesk_operator::operator=debug")]).await?;
    let hot = world.running_desktop("1 hour").await?;
    let until_deleted = async |id: &str| {
        world.request_shutdown(id).await?;
        let deleted = async || Ok(world.vmis().get(&vm_name(id)).await?.metadata.deletion_timestamp.is_some());
        world.until(&format!("the VMI of {id} is being deleted"), deleted).await
    };
    let another = async || timed(async { until_deleted(&world.running_desktop("1 hour").await?).await }).await;
    let quiet = another().await?;
    until_deleted(&hot).await?;
    // Each lane has a bound of its own: what its end writes into its CR, it is looked at for as for any change.
    let looks = || {
        let log = world.operator_log()?;
        let of = |lane| format!("looked desktop={hot} lane=\"{lane}\"");
        anyhow::Ok(["ends", "makes"].map(|lane| log.matches(&of(lane)).count()))
    };
    let (began, before) = (Instant::now(), looks()?);
    let (changes, beside) = flap(world, &hot, least_of_three(another)).await?;
    ensure!(beside < DELAY * quiet, "others took {beside:?}, and {quiet:?} before");
    let after = looks()?;
    let looked = [after[0] - before[0], after[1] - before[1]];
    let seconds = usize::try_from(began.elapsed().as_secs())? + 1;
    let most = BURST + seconds;
    ensure!(changes > 2 * most, "{changes} changes are not many enough to tell");
    ensure!(looked[0] > seconds / 2, "{looked:?} looks: they are not counted");
    ensure!(looked.into_iter().all(|looked| looked <= most), "{looked:?} looks for {changes} changes in {seconds} s");
    let row = world.until_over(&hot).await?;
    ensure!(row.reason.as_deref() == Some("requested"), "{row:?}");
    Ok(())
}

/// Its address after so many changes.
fn address(changes: usize) -> String {
    format!("10.9.{}.{}", changes / 250, changes % 250)
}

async fn many_bad_rows(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let many = many()?;
    let half = format!(
        "insert into cyberdesk_instances (user_id, params) select '{}', '{{\"gpus\": 8}}' from generate_series(1, {})",
        world.user(),
        many / 2
    );
    world.sql(&half).await?;
    let huge = world.insert_with("1 hour", Some(json!({ "gpus": "8".repeat(5_000_000) }))).await?;
    let good = world.insert("1 hour").await?;
    world.sql(&half).await?;
    world.until_status(&good, "running").await?;
    let row = world.until_over(&huge).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("error", Some("bad-params")), "{row:?}");
    ensure!(row.message.as_deref().is_some_and(|words| words.contains("65536 are allowed")), "{row:?}");
    let over = "select count(*) from cyberdesk_instances
                 where status = 'error' and reason = 'bad-params' and message like '%gpus%' and ended_at is not null";
    let bad = many / 2 * 2;
    world
        .until_within(Duration::from_secs(300), "each bad row says why", async || Ok(world.count(over).await? == bad))
        .await?;
    ensure!(world.row(&good).await?.status == "running", "and the good one runs on");
    let log = world.operator_log()?;
    let (lines, warnings) = (log.lines().count(), log.lines().filter(|line| line.contains(" WARN ")).count());
    ensure!(lines <= usize::try_from(bad)? * 4 + 100, "{lines} lines of the log for {bad} bad rows");
    ensure!(warnings <= 20, "{warnings} warnings: a bad row is its owner's trouble, and no other's");
    Ok(())
}
