//! What a fleet costs: many desktops that live, made beforehand by the bare client, and one operator over them.
//!
//! Nobody plays KubeVirt: the desktops run, and nothing happens to them but what the operator does.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cyberdesk_operator::cluster::{CrObject, VmObject, VmiObject};
use cyberdesk_operator::names::{Key, Owner};
use cyberdesk_testbed::kubevirt;
use cyberdesk_testbed::players::KubeVirt;
use cyberdesk_testbed::supervise::Supervised;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kube::Resource;
use kube::api::{Api, ListParams, PostParams};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::Arguments;
use crate::bare::{Bare, WIDTH};
use crate::counted::Counted;
use crate::place::{Place, until};
use crate::report::{Figure, Goal};
use crate::sights::{Sight, Sights};

/// How many of a fleet fall due in the same minute: this part of it.
const DUE: usize = 10;
/// From so many desktops on, a start has a goal.
const LARGE: usize = 10_000;
/// How long the operator is watched doing nothing.
const IDLE: Duration = Duration::from_secs(60);
/// What an idle operator does all the same, however many desktops there are: the Lease, the clock, each watch that the
/// API server ends after some minutes, and every ten minutes the sweep of Secrets that came too late, a call for each
/// hundred desktops that ended within the hour.
const IDLE_CALLS: [&str; 8] = [
    "deletecollection secrets",
    "get leases",
    "get version",
    "update leases",
    "watch configmaps",
    "watch cyberdesks",
    "watch virtualmachineinstances",
    "watch virtualmachines",
];
/// The poll, the heartbeat and the clock (which call no function of the schema), the sign of life, the warnings, the pause,
/// the sweep and the trimming.
const IDLE_STATEMENTS: [&str; 7] =
    ["dirty_desktops", "ended_within", "other", "paused", "sign_of_life", "trim", "warn"];
/// What PostgreSQL and the API server call a page.
const PAGE: u32 = 500;

/// What was measured of one fleet.
#[derive(Clone, Debug)]
pub(crate) struct Costs {
    pub(crate) desktops: usize,
    pub(crate) list: f64,
    pub(crate) first_served: f64,
    pub(crate) verified: f64,
    /// Calls to the API server and SQL statements in an idle minute.
    pub(crate) idle_calls: BTreeMap<String, f64>,
    pub(crate) idle_statements: BTreeMap<String, f64>,
    pub(crate) memory: f64,
    pub(crate) idle_cpu: f64,
    pub(crate) lateness: f64,
}

pub(crate) async fn measure(arguments: &Arguments) -> Result<Vec<Figure>> {
    let mut all = vec![];
    for desktops in &arguments.fleet {
        all.push(costs(*desktops, arguments).await.with_context(|| format!("a fleet of {desktops}"))?);
    }
    if let Some(file) = &arguments.plot {
        crate::plot::draw(file, &all)?;
    }
    Ok(all.iter().flat_map(Costs::figures).collect())
}

impl Costs {
    fn figures(&self) -> Vec<Figure> {
        let figure = |what: &str, value: f64, unit: &'static str, limit: Option<(f64, &'static str)>, goal: Goal| {
            Figure { name: format!("{} desktops: {what}", self.desktops), value, unit, limit, goal }
        };
        let list = Some((self.list, "a bare LIST of the same CRs, VMs and VMIs"));
        // What does not depend on the fleet is the most of a small one's start.
        let quick = if self.desktops < LARGE { Goal::Told } else { Goal::RatioAtMost(2.0) };
        let mut figures = vec![
            figure("start -> first new row served", self.first_served, "ms", list, quick),
            figure("start -> all verified", self.verified, "ms", list, Goal::Told),
            figure("lateness of deadlines, p99", self.lateness, "ms", None, Goal::ValueAtMost(100.0)),
            figure("memory after churn", self.memory, "MB", None, Goal::ValueAtMost(60.0)),
            figure("idle, part of a core", self.idle_cpu, "%", None, Goal::ValueAtMost(0.2)),
        ];
        for (what, calls, expected) in [
            ("API calls", &self.idle_calls, IDLE_CALLS.as_slice()),
            ("SQL statements", &self.idle_statements, IDLE_STATEMENTS.as_slice()),
        ] {
            let told = |what: &str, value: f64, goal: Goal| figure(&format!("idle, {what}"), value, "/min", None, goal);
            for (call, count) in calls {
                figures.push(told(&format!("{what}: {call}"), *count, Goal::Told));
            }
            let others = calls.iter().filter(|(call, _)| !expected.contains(&call.as_str()));
            figures.push(told(
                &format!("{what}, others"),
                others.map(|(_, count)| count).sum(),
                Goal::ValueAtMost(0.0),
            ));
        }
        figures
    }
}

async fn costs(desktops: usize, arguments: &Arguments) -> Result<Costs> {
    let place = Place::start(KubeVirt::None).await?;
    let began = Instant::now();
    build(&place, desktops).await?;
    eprintln!("fleet of {desktops}: made in {:.0} s", began.elapsed().as_secs_f64());
    let operator = place.launch("bench")?;
    until("all desktops run", async || {
        Ok(place.count("select count(*) from cyberdesk_instances where status <> 'running'").await? == 0)
    })
    .await?;
    eprintln!("fleet of {desktops}: taken over after {:.0} s", began.elapsed().as_secs_f64());

    operator.kill9().await?;
    let list = list_all(&place).await?;
    let (first_served, verified) = start(&place, &operator, desktops).await?;
    churn(&place, arguments.churn).await?;
    let pid = operator.running().await?;
    let (idle_cpu, counted) = idle(pid, &operator).await?;
    let minutes = IDLE.as_secs_f64() / 60.0;
    let a_minute =
        |calls: BTreeMap<String, f64>| calls.into_iter().map(|(call, count)| (call, count / minutes)).collect();
    let (idle_calls, idle_statements) = (a_minute(counted.api_calls()), a_minute(counted.statements()));
    let memory = resident(pid)?;
    let lateness = lateness(&place, desktops / DUE).await?;
    Ok(Costs { desktops, list, first_served, verified, memory, idle_cpu, idle_calls, idle_statements, lateness })
}

/// Rows whose desktops run already.
async fn build(place: &Place, desktops: usize) -> Result<()> {
    let ids = place.insert_many(desktops).await?;
    let database = place.app.query_one("select database_id from cyberdesk.database_identity", &[]).await?.get(0);
    let bare = Bare::new(&place.client, place.namespace()).of_database(database);
    let vmis = kubevirt::vmis(&place.client, place.namespace());
    let (bare, vmis) = (&bare, &vmis);
    stream::iter(ids)
        .map(async |id| {
            bare.make(id, place.user).await?;
            vmis.create(&PostParams::default(), &serde_json::from_value(vmi(id, place.user))?).await?;
            anyhow::Ok(())
        })
        .buffer_unordered(WIDTH)
        .try_collect()
        .await
}

/// An instance that runs, as virt-handler leaves it.
fn vmi(id: Uuid, user: Uuid) -> Value {
    let key = Key::of_row(id);
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": { "name": key.vm_name(), "labels": Owner::Row(id).labels(&key, Some(user)) },
        "spec": { "domain": { "devices": {}, "memory": { "guest": "4Gi" } } },
        "status": {
            "phase": "Running",
            "nodeName": "node01",
            "interfaces": [{ "ipAddress": "10.0.0.1" }],
            "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z" }],
        },
    })
}

/// Milliseconds to list everything that the operator watches.
async fn list_all(place: &Place) -> Result<f64> {
    let began = Instant::now();
    tokio::try_join!(list::<CrObject>(place), list::<VmObject>(place), list::<VmiObject>(place))?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

async fn list<K>(place: &Place) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let api = Api::<K>::namespaced(place.client.clone(), place.namespace());
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let objects = api.list(&page).await?;
        match objects.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(()),
        }
    }
}

/// Milliseconds from the start of the process until a row that is there already has its VM, and until no desktop waits to
/// be looked at any more, nor to be told of.
async fn start(place: &Place, operator: &Supervised, desktops: usize) -> Result<(f64, f64)> {
    let sights = Sights::of(&place.client, place.namespace());
    let id = place.insert().await?;
    std::fs::write(operator.log(), "")?;
    let began = Instant::now();
    operator.start().await?;
    let made = sights.when(Sight::Made, &Key::of_row(id).vm_name()).await?;
    until("all desktops have been looked at", async || {
        let figures = Counted::of(operator).await?;
        let waiting = figures.sum("cyberdesk_queue_depth") + figures.sum("cyberdesk_write_back_entries");
        Ok(figures.sum("cyberdesk_desktops") > desktops as f64 && waiting == 0.0)
    })
    .await?;
    let verified = began.elapsed();
    place.app.execute("select request_shutdown($1)", &[&id]).await?;
    Ok((made.duration_since(began).as_secs_f64() * 1e3, verified.as_secs_f64() * 1e3))
}

/// So many desktops come and go, some at a time.
async fn churn(place: &Place, lives: usize) -> Result<()> {
    const AT_ONCE: usize = 100;
    for _ in 0..lives.div_ceil(AT_ONCE) {
        let ids = place.insert_many(AT_ONCE).await?;
        let made = "select count(*) from cyberdesk.desktop where id = any($1) and vm_uid is not null";
        until("they have their VMs", async || {
            Ok(place.app.query_one(made, &[&ids]).await?.get::<_, i64>(0) == AT_ONCE as i64)
        })
        .await?;
        place.app.execute("select request_shutdown(id) from unnest($1::uuid[]) id", &[&ids]).await?;
        let left = "select count(*) from cyberdesk_instances where id = any($1) and ended_at is null";
        until("they are over", async || Ok(place.app.query_one(left, &[&ids]).await?.get::<_, i64>(0) == 0)).await?;
    }
    Ok(())
}

/// Percent of a core that the process takes while nothing happens, and what it calls meanwhile.
async fn idle(pid: u32, operator: &Supervised) -> Result<(f64, Counted)> {
    // What the churn left behind is done by then.
    sleep(Duration::from_secs(5)).await;
    let (counted, before) = (Counted::of(operator).await?, processor_time(pid)?);
    sleep(IDLE).await;
    let took = processor_time(pid)? - before;
    Ok((took / IDLE.as_secs_f64() * 100.0, Counted::of(operator).await?.since(&counted)))
}

/// Seconds of a core that a process has taken (proc(5): `utime` and `stime`, in hundredths of a second on Linux).
fn processor_time(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("this figure needs Linux's /proc")?;
    let after_name = stat.rsplit_once(") ").context("a stat file has a name in brackets")?.1;
    let ticks = after_name.split(' ').skip(11).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    Ok(ticks / 100.0)
}

/// Resident memory in MB.
fn resident(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("this figure needs Linux's /proc")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("it has no resident memory")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1e3)
}

/// Milliseconds that 99 of 100 desktops are ended within after their deadlines, all in the same minute.
async fn lateness(place: &Place, due: usize) -> Result<f64> {
    let marked = place
        .app
        .execute(
            "update cyberdesk_instances c set timeout_at = now() + interval '20 seconds' + d.n * interval '60 seconds' / $1::float8
               from (select id, row_number() over () as n from cyberdesk_instances where status = 'running' limit $2) d
              where c.id = d.id",
            &[&(due as f64), &i64::try_from(due)?],
        )
        .await?;
    ensure!(marked == due as u64, "{marked} of {due} rows were given a deadline");
    until("all that are due have ended", async || {
        let open = "select count(*) from cyberdesk_instances where timeout_at < now() + interval '1 hour' and reason is distinct from 'timeout'";
        Ok(place.count(open).await? == 0)
    })
    .await?;
    let late = "select percentile_cont(0.99) within group (order by extract(epoch from shutdown_requested_at - timeout_at at time zone 'utc'))::float8
                  from cyberdesk_instances where reason = 'timeout'";
    Ok(place.app.query_one(late, &[]).await?.get::<_, f64>(0) * 1e3)
}
