//! An outage that goes on and on. How long it lasts makes no difference once the longest back-off of each who tries
//! again has been reached, which takes a quarter of a minute: what is counted from then on, a day has just more of.
//! (The tests of the queue let the day itself pass, in virtual time.)

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cyberdesk_testbed::api_proxy::ApiProxy;
use cyberdesk_testbed::supervise::Supervised;
use cyberdesk_testbed::wire::{Condition, Wire};
use tokio::time::{Instant, sleep};

use crate::health;
use crate::outages::wired;
use crate::world::{World, vm_name};

/// Until each has come to its longest back-off, and as long again.
const GROWS: Duration = Duration::from_secs(20);
const STEADY: Duration = Duration::from_secs(20);
/// How closely time is watched.
const STEP: Duration = Duration::from_millis(200);
/// Most connections that may be tried in a second of it.
const TRIES: usize = 5;
/// Most lines that its beginning may cost, beside those of desktops; and most in as long again.
const LINES: (usize, usize) = (12, 1);
/// What the memory may differ by.
const RESIDENT_KIB: usize = 4096;

/// What an operator has taken so far of everything.
#[derive(Debug)]
struct Footprint {
    at: Instant,
    lines: usize,
    tried: usize,
    /// Entries of queue and write-back.
    kept: usize,
    files: usize,
    resident_kib: usize,
}

impl Footprint {
    async fn of(world: &World, operator: &Supervised, wire: &Wire) -> Result<Self> {
        let process = format!("/proc/{}", operator.running().await?);
        let status = std::fs::read_to_string(format!("{process}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("it has a size")?;
        let counts = ["cyberdesk_queue_depth{", "cyberdesk_write_back_entries "];
        let mut kept = 0;
        // A desktop that is just being worked on is not in the queue.
        for _ in 0..5 {
            let (_, figures) = health::get(world, "operator", "/metrics").await?;
            let counted = figures.lines().filter(|line| counts.iter().any(|count| line.starts_with(count)));
            kept = kept.max(counted.filter_map(|line| line.rsplit_once(' ')?.1.parse::<usize>().ok()).sum());
            sleep(STEP).await;
        }
        Ok(Self {
            at: Instant::now(),
            lines: world.operator_log()?.lines().count(),
            tried: wire.made(),
            kept,
            files: std::fs::read_dir(format!("{process}/fd"))?.count(),
            resident_kib: resident.trim().trim_end_matches(" kB").parse()?,
        })
    }
}

/// Lets so much time pass in which the operator could do something: not what a machine stands still in.
async fn passes(time: Duration) {
    let mut left = time;
    while !left.is_zero() {
        let began = Instant::now();
        sleep(STEP).await;
        left = left.saturating_sub(began.elapsed().min(2 * STEP));
    }
}

/// Lets the outage go on, and counts what it costs.
async fn goes_on(world: &World, operator: &Supervised, wire: &Wire, desktops: usize) -> Result<()> {
    let before = Footprint::of(world, operator, wire).await?;
    passes(GROWS).await;
    let grown = Footprint::of(world, operator, wire).await?;
    passes(STEADY).await;
    let after = Footprint::of(world, operator, wire).await?;
    println!("an outage, at its begin, after {GROWS:?} and after {STEADY:?} more:\n{before:?}\n{grown:?}\n{after:?}");

    let (first, then) = (grown.lines - before.lines, after.lines - grown.lines);
    let log = world.operator_log()?;
    let tail = log.lines().skip(before.lines).collect::<Vec<_>>().join("\n");
    ensure!(first <= LINES.0 + desktops && then <= LINES.1, "{first} lines of the log, and {then} more:\n{tail}");
    let (grew_for, steady_for) = (grown.at - before.at, after.at - grown.at);
    let seconds = usize::try_from(steady_for.as_secs())? + 1;
    let (tried_before, tried) = (grown.tried - before.tried, after.tried - grown.tried);
    ensure!((1..=TRIES * seconds).contains(&tried), "{tried} connections were tried in {seconds} s");
    // By time, for the machine may stand still in one of them.
    let (rate_before, rate) = (rate(tried_before + TRIES, grew_for), rate(tried, steady_for));
    ensure!(rate <= rate_before, "{rate} tries a second, and {rate_before} in the time before");
    ensure!(after.kept <= 2 * desktops && after.kept == grown.kept, "queue and write-back keep {}", after.kept);
    let files = before.files.min(grown.files);
    ensure!(after.files <= files + 4, "{} files and sockets are open", after.files);
    let grew = after.resident_kib.saturating_sub(grown.resident_kib);
    ensure!(grew <= RESIDENT_KIB, "its memory has grown by {grew} KiB");
    Ok(())
}

fn rate(tries: usize, time: Duration) -> f64 {
    tries as f64 / time.as_secs_f64()
}

async fn count_until(world: &World, what: &str, condition: &str, wanted: i64) -> Result<()> {
    let statement = format!("select count(*) from cyberdesk_instances where {condition}");
    world.until(what, async || Ok(world.count(&statement).await? == wanted)).await
}

/// Rows of the one user, in thirds.
async fn thirds(world: &World) -> Result<[Vec<String>; 3]> {
    world.insert_many(12).await?;
    count_until(world, "all run", "status = 'running'", 12).await?;
    let mut ids: Vec<String> = vec![];
    for cr in world.crs().list(&Default::default()).await? {
        ids.push(cr.metadata.name.context("a name")?);
    }
    Ok([ids[..4].to_vec(), ids[4..8].to_vec(), ids[8..].to_vec()])
}

pub(super) async fn without_postgres(world: &World) -> Result<()> {
    let (wire, url) = wired(world).await?;
    let operator = world.start_daemon("operator", &[("DATABASE_URL", &url)]).await?;
    let [crashing, due, living] = thirds(world).await?;
    let soon = "update cyberdesk_instances set timeout_at = now() + interval '10 seconds' where id = $1";
    for id in &due {
        world.app(soon, id).await?;
        let shown = async || Ok(world.crs().get(id).await?.metadata.generation == Some(2));
        world.until("its CR has the deadline", shown).await?;
    }
    wire.set(Condition::Refuses);
    for id in &crashing {
        world.guest(id, "crash").await?;
    }
    let ended = async || Ok(world.vmis().list(&Default::default()).await?.items.len() == living.len());
    world.until("what was to end has ended", ended).await?;
    goes_on(world, &operator, &wire, 12).await?;

    let (tried, lines) = (wire.made(), world.operator_log()?.lines().count());
    wire.set(Condition::Passes);
    count_until(world, "all that ended is told", "ended_at is not null", 8).await?;
    let released = async || Ok(world.crs().list(&Default::default()).await?.items.len() == living.len());
    world.until("their CRs are released", released).await?;
    // What was read just before it was told is told once more, and changes nothing then.
    let wrote =
        world.count("select count(distinct xmin::text) from cyberdesk.desktop where ended_at is not null").await?;
    ensure!((1..=3).contains(&wrote), "{wrote} statements for what one or two can tell");
    let (tried, lines) = (wire.made() - tried, world.operator_log()?.lines().count() - lines);
    ensure!(tried <= 12, "{tried} connections, where four are held");
    ensure!(wire.open() <= 5 && lines <= LINES.0 + 4 * 8, "{} connections, {lines} lines", wire.open());
    count_until(world, "the others live on", "status = 'running'", 4).await?;
    for (ids, reason) in [(crashing, "guest-crashed"), (due, "timeout")] {
        for id in ids {
            let row = world.row(&id).await?;
            ensure!(row.reason.as_deref() == Some(reason), "{row:?}");
        }
    }
    Ok(())
}

pub(super) async fn without_the_api_server(world: &World) -> Result<()> {
    let proxy = ApiProxy::start(&world.parts.testbed.control_plane).await?;
    let kubeconfig = world.through(&proxy)?;
    let text = std::fs::read_to_string(&kubeconfig)?;
    let (_, rest) = text.split_once("https://127.0.0.1:").context("a server")?;
    let port = rest.split(|c: char| !c.is_ascii_digit()).next().context("its port")?;
    let wire = Wire::to(port.parse()?).await?;
    std::fs::write(&kubeconfig, text.replace(&format!(":{port}"), &format!(":{}", wire.port())))?;
    let operator = world.start_daemon("operator", &[("KUBECONFIG", &kubeconfig)]).await?;
    let [stopping, crashing, living] = thirds(world).await?;
    wire.set(Condition::Refuses);
    for id in &stopping {
        world.request_shutdown(id).await?;
    }
    for id in &crashing {
        world.guest(id, "crash").await?;
    }
    world.insert_many(4).await?;
    goes_on(world, &operator, &wire, 16).await?;

    count_until(world, "nobody was told of an end", "ended_at is null and status <> 'error'", 16).await?;
    let (calls, tried, lines) = (proxy.log().len(), wire.made(), world.operator_log()?.lines().count());
    wire.set(Condition::Passes);
    count_until(world, "all that was to end has ended", "ended_at is not null", 8).await?;
    count_until(world, "the others run", "status = 'running'", 8).await?;
    let (tried, lines) = (wire.made() - tried, world.operator_log()?.lines().count() - lines);
    ensure!(tried <= 40, "{tried} connections, for 12 desktops and 6 watches");
    ensure!(lines <= LINES.0 + 4 * 12, "{lines} lines");
    let log = proxy.log().split_off(calls);
    let writes = log.iter().filter(|passed| passed.call.writes() && !passed.call.resource.contains("leases")).count();
    ensure!(writes <= 12 * 12, "{writes} writes for 12 desktops");
    let made: BTreeSet<_> =
        world.vms().list(&Default::default()).await?.into_iter().map(|vm| vm.metadata.name).collect();
    ensure!(made.len() == 8 && living.iter().all(|id| made.contains(&Some(vm_name(id)))), "{made:?}");
    for id in stopping.iter().chain(&crashing) {
        let deleted = proxy.done("delete", "virtualmachines", &vm_name(id));
        ensure!(deleted == 1, "the VM of {id} was deleted {deleted} times");
    }
    Ok(())
}
