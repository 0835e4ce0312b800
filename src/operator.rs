//! The daemon: sources wake keys, workers look, plan and act on them, one desktop at a time each.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use deadpool_postgres::Pool;
use kube::{Api, Client};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use crate::act::Acted;
use crate::clock::{Clock, Reading};
use crate::cluster::{self, Cluster, Keeper, follow};
use crate::config::Config;
use crate::database::housekeeping;
use crate::database::listen::{self, Wakeups};
use crate::database::rows;
use crate::database::store::{Remembered, Store};
use crate::database::writeback::{self, WriteBack};
use crate::events::Events;
use crate::fleet::Fleet;
use crate::lease::{Leadership, Term};
use crate::metrics::{self, Metrics};
use crate::model::{Row, Seen, Vm, Vmi};
use crate::names::{Key, Owner};
use crate::plan::{CreateFailure, Fault, Plan, View, plan};
use crate::queue::{Lane, Outcome, Queue};
use crate::telemetry::chain;
use crate::template::{self, Templates};

/// Most rounds of look, plan and act before a desktop waits for its turn again. A life takes one to
/// three at a time; one that needs more is going in circles.
const ROUNDS: usize = 8;
/// Part of the concurrency that only ends may use, so that a burst of new desktops delays no shutdown.
const KEPT_FOR_ENDS: usize = 4;
/// After a notification the rows are looked at again: of committers at the same time only one notifies.
const AGAIN_AFTER_WAKE: [Duration; 2] = [Duration::from_millis(25), Duration::from_millis(25)];
/// Least time between two looks for changed rows, under a storm of notifications.
const LEAST_GAP: Duration = Duration::from_millis(5);
/// While notifications are not proven to arrive, rows are looked at this often at least.
const DEAF_POLL: Duration = Duration::from_secs(1);
/// While more rows have changed than one look reads, all are read this often: a look at all costs far more.
const BACKLOG_RESYNC: Duration = Duration::from_secs(1);
/// First and longest wait before another term, while another daemon keeps taking the database from us.
const DEPOSED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Longest time to give the Lease back when told to stop.
const RELEASE: Duration = Duration::from_millis(500);
/// How often it is read whether new desktops shall wait.
const PAUSE_INTERVAL: Duration = Duration::from_secs(10);
/// How often the clocks are read.
const CLOCK_INTERVAL: Duration = Duration::from_secs(10);
/// How often they are read in quick succession at first.
const SETTLING_READINGS: u32 = 11;
/// Longest wait for a deadline; one that is further away is looked at again then.
const LONGEST_WAIT: Duration = Duration::from_secs(86_400);
/// Time to finish what is in flight when told to stop. What is abandoned, the next look finds.
const GRACE: Duration = Duration::from_millis(800);

/// All that the daemon knows and holds.
#[derive(Debug)]
pub struct Operator {
    pub(crate) cluster: Cluster,
    pub(crate) store: Store,
    pub(crate) write_back: WriteBack,
    pub(crate) leadership: Leadership,
    queue: Queue,
    clock: Clock,
    /// All rows are to be read: a term has begun.
    resync: Notify,
    /// Nothing is made before they were read.
    pub(crate) templates: watch::Sender<Option<Arc<Templates>>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) events: Events,
    failures: Mutex<HashMap<Key, CreateFailure>>,
    fleet: Mutex<Fleet>,
    database_id: Mutex<Option<Uuid>>,
    /// An administrator wants new desktops to wait.
    paused: AtomicBool,
    pool: Pool,
    makes_in_flight: AtomicUsize,
}

/// Runs the daemon until `shutdown` resolves.
///
/// Neither side needs to be there: what is away is tried again, and what the other side alone needs is
/// done meanwhile.
///
/// # Errors
///
/// If a setting cannot be used at all, or `/metrics` can no longer be served.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let client = cluster::connect().await.context("read how to reach the Kubernetes API server")?;
    let pool = config.database.pool()?;
    let folder = config.templates.as_deref().map(templates_of).transpose()?;
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listen on {}, as CYBERDESK_LISTEN says", config.listen))?;
    let address = listener.local_addr()?.to_string();
    let operator = Arc::new(Operator {
        cluster: Cluster::new(&client, &config.namespace, &config.vm_namespace),
        store: Store::default(),
        write_back: WriteBack::default(),
        leadership: Leadership::new(
            Api::namespaced(cluster::connect().await?, &config.namespace),
            config.identity.clone(),
        ),
        queue: Queue::default(),
        clock: Clock::default(),
        resync: Notify::new(),
        templates: watch::Sender::new(None),
        metrics: Arc::default(),
        events: Events::new(client.clone(), &config.identity),
        failures: Mutex::default(),
        fleet: Mutex::new(Fleet::new(config.max_unstarted)),
        database_id: Mutex::default(),
        paused: AtomicBool::default(),
        pool,
        makes_in_flight: AtomicUsize::new(0),
    });
    let wakeups = Arc::new(Wakeups::default());
    info!(namespace = config.namespace, vm_namespace = config.vm_namespace, address, "started");

    let (crs, vms, vmis) = operator.cluster.apis();
    let stopping = CancellationToken::new();
    let told_to_stop = async {
        shutdown.await;
        info!("told to stop: finishing what is in flight");
        stopping.cancel();
        sleep(GRACE).await;
    };
    tokio::select! {
        () = told_to_stop => (),
        () = lead(&operator, &config, &client, folder, &stopping) => (),
        () = operator.leadership.run(&operator.clock) => unreachable!("there is always another election"),
        () = operator.scan(&config, &wakeups) => unreachable!("the scan goes on for ever"),
        () = listen::run(&config.database, &operator.pool, &wakeups) => unreachable!("the listener goes on for ever"),
        () = operator.read_clocks(&client) => unreachable!("the clocks are read for ever"),
        () = follow(crs, &operator.cluster.cr_cache, &operator.queue, |well| operator.watched("crs", well)) => unreachable!("a watch goes on for ever"),
        () = follow(vms, &operator.cluster.vm_cache, &operator.queue, |well| operator.watched("vms", well)) => unreachable!("a watch goes on for ever"),
        () = follow(vmis, &operator.cluster.vmi_cache, &operator.queue, |well| operator.watched("vmis", well)) => unreachable!("a watch goes on for ever"),
        served = metrics::serve(listener, operator.metrics.clone()) => served?,
    }
    if tokio::time::timeout(RELEASE, operator.leadership.release()).await.is_err() {
        warn!("the API server does not answer: the Lease runs out by itself");
    }
    info!("stopped");
    Ok(())
}

/// Works while this daemon leads, and stands by with warm caches while it does not. Returns when told to stop,
/// with what was begun done and written back.
async fn lead(
    operator: &Arc<Operator>,
    config: &Config,
    client: &Client,
    folder: Option<template::Sources>,
    stopping: &CancellationToken,
) {
    while stopping.run_until_cancelled(operator.leadership.begun()).await.is_some() {
        // What was noted in an earlier term is another leader's past by now.
        operator.fleet().begin();
        operator.failures().clear();
        operator.store.reset();
        operator.queue.open();
        operator.wake_cluster();
        operator.resync.notify_one();
        // Another daemon may have accepted others meanwhile.
        operator.templates.send_replace(None);
        let keeper = Keeper::new(operator, config, client);
        tokio::select! {
            () = keeper.run(folder.clone()) => unreachable!("a watch goes on for ever"),
            () = work(operator, config.concurrency, stopping) => return,
            never = operator.write(config) => match never {},
            () = operator.leadership.ended() => operator.queue.close(),
        }
        operator.metrics.templates(std::iter::empty());
    }
}

/// The files of a folder with templates.
///
/// # Errors
///
/// If it or one of its files cannot be read.
pub(crate) fn templates_of(folder: &std::path::Path) -> anyhow::Result<template::Sources> {
    let mut files = vec![];
    for entry in std::fs::read_dir(folder).with_context(|| format!("read the templates in {}", folder.display()))? {
        let path = entry?.path();
        let is_template = path.extension().is_some_and(|extension| extension == "yaml" || extension == "user-data");
        if let (true, Some(name)) = (is_template && path.is_file(), path.file_name().and_then(|name| name.to_str())) {
            let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            files.push((name.to_owned(), text));
        }
    }
    Ok(template::sources(files))
}

/// Takes keys as they come due and works on them, at most `concurrency` at once. When told to stop it
/// takes no more, and returns when all that was begun is done and written back.
async fn work(operator: &Arc<Operator>, concurrency: usize, stopping: &CancellationToken) {
    // What has not been listed yet would be taken for unknown, and nothing would wake it again.
    let listed = async {
        let mut templates = operator.templates.subscribe();
        let (_, (), (), ()) = tokio::join!(
            templates.wait_for(Option::is_some),
            operator.cluster.cr_cache.completed(),
            operator.cluster.vm_cache.completed(),
            operator.cluster.vmi_cache.completed(),
        );
    };
    if stopping.run_until_cancelled(listed).await.is_none() {
        return;
    }
    let slots = Arc::new(Semaphore::new(concurrency));
    let most_makes = concurrency - KEPT_FOR_ENDS.min(concurrency - 1);
    let mut steps = JoinSet::new();
    loop {
        let slot = slots.clone().acquire_owned().await.expect("the slots are never closed");
        let room = || operator.makes_in_flight.load(Ordering::Relaxed) < most_makes;
        let Some((key, lane)) = stopping.run_until_cancelled(operator.queue.next(room)).await else {
            break;
        };
        let mut turn = Turn::begin(operator.clone(), key, lane);
        steps.spawn(async move {
            turn.outcome = turn.operator.step(&turn.key).await;
            drop((turn, slot));
        });
        while let Some(ended) = steps.try_join_next() {
            report_panic(ended);
        }
    }
    while let Some(ended) = steps.join_next().await {
        report_panic(ended);
    }
    operator.write_back.drained().await;
}

/// One key's turn. However it ends, the queue hears of it: a key that is never done is never looked at again.
struct Turn {
    operator: Arc<Operator>,
    key: Key,
    lane: Lane,
    outcome: Outcome,
}

impl Turn {
    fn begin(operator: Arc<Operator>, key: Key, lane: Lane) -> Self {
        if lane == Lane::Makes {
            operator.makes_in_flight.fetch_add(1, Ordering::Relaxed);
        }
        Self { operator, key, lane, outcome: FAILED }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.lane == Lane::Makes {
            self.operator.makes_in_flight.fetch_sub(1, Ordering::Relaxed);
        }
        self.operator.queue.done(&self.key, self.lane, self.outcome);
    }
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        error!(%error, "a look at a desktop ended in a panic: this is a bug; it will be looked at again");
    }
}

/// To be tried again after the back-off.
const FAILED: Outcome = Outcome::Failed { at_least: Duration::ZERO, deadline: None };

impl Operator {
    /// Looks, plans and acts on one desktop until nothing is left to do, or something must be waited for.
    async fn step(&self, key: &Key) -> Outcome {
        let mut live = None;
        for _ in 0..ROUNDS {
            // Neither side has told the time yet, or the row cannot be read.
            let Some(Plan { actions, wait, .. }) = self.look(key, live.take()).await else { return FAILED };
            let deadline = wait.map(|wait| Instant::now() + wait.min(LONGEST_WAIT));
            if actions.is_empty() {
                return Outcome::Settled(deadline);
            }
            let mut told = false;
            for action in actions {
                match self.act(key, action).await {
                    Ok(Acted::Done) => (),
                    Ok(Acted::Told) => told = true,
                    Ok(Acted::Overtaken) => break,
                    Ok(Acted::Looked(seen)) => live = Some(*seen),
                    Ok(Acted::Forgotten) => return Outcome::Settled(None),
                    Err(error) => {
                        warn!(desktop = %key, error = %chain(&error), "not done; the next look decides anew");
                        return Outcome::Failed { at_least: error.retry_after(), deadline };
                    }
                }
            }
            if told {
                return Outcome::Settled(deadline);
            }
        }
        warn!(desktop = %key, "not settled after {ROUNDS} rounds; will look again");
        FAILED
    }

    /// Collects what is known of a desktop, and what follows from it. `None`: too little is known to decide.
    async fn look(&self, key: &Key, live: Option<(Seen<Vm>, Seen<Vmi>)>) -> Option<Plan> {
        let now = self.clock.now()?;
        let templates = self.templates.borrow().clone()?;
        let cr = self.cluster.cr_cache.get(key);
        let is_live = live.is_some();
        let (vm, vmi) = live.unwrap_or_else(|| (self.cluster.vm_cache.get(key), self.cluster.vmi_cache.get(key)));
        let known = !matches!((&cr, &vm, &vmi), (Seen::Absent, Seen::Absent, Seen::Absent));
        let row = match self.row(key, known).await {
            Ok(row) => row,
            Err(error) => {
                warn!(desktop = %key, error = %chain(error.as_ref()), "cannot read the row; will try again");
                return None;
            }
        };
        let failure = self.failures().get(key).cloned();
        let fleet = self.fleet().standing(key, now.cluster);
        let paused = self.paused.load(Ordering::Relaxed);
        let failure = failure.as_ref();
        let view = View { key, row, cr, vm, vmi, live: is_live, failure, fleet: &fleet, paused, templates: &templates };
        let mut plan = plan(&view, now);
        let others = self.fleet().note(key, plan.progress.take(), plan.ready, now.cluster);
        others.iter().for_each(|other| self.queue.wake(other, Lane::Makes));
        debug!(desktop = %key, cr = ?view.cr, vm = ?view.vm, vmi = ?view.vmi, actions = ?plan.actions, "looked");
        Some(plan)
    }

    /// The row of a key. It is asked for only if something in the cluster has its name.
    async fn row(&self, key: &Key, known_in_cluster: bool) -> anyhow::Result<Seen<Row>> {
        Ok(match self.store.get(key) {
            Remembered::Row(row) => Seen::Present(*row),
            Remembered::NotARow => Seen::Absent,
            // The list wakes all when it is there.
            Remembered::Nothing(_) if !self.store.is_complete() => Seen::Unknown,
            Remembered::Nothing(_) if !known_in_cluster => Seen::Absent,
            Remembered::Nothing(id) => {
                let found = rows::by_id(&self.pool, &[id]).await?.into_iter().next();
                self.store.found(id, found)
            }
        })
    }

    /// Writes back, in the term that is and in those that follow.
    async fn write(&self, config: &Config) -> Infallible {
        let mut term = self.leadership.begun().await;
        let mut pause = DEPOSED.0;
        loop {
            term = self.take_fence(term, &config.identity).await;
            info!(epoch = term.epoch, "writing to the database");
            let began = Instant::now();
            tokio::select! {
                () = self.write_back.run(&self.pool, term, &self.store, &self.queue) => (),
                () = housekeeping::run(&self.pool, term, config.resync_interval) => (),
                never = self.heed_pause() => match never {},
            }
            if self.leadership.rest().is_none() {
                return std::future::pending().await;
            }
            error!(
                epoch = term.epoch,
                "another daemon has taken over the database; if this comes again, it does not share our Lease: see that only one cluster uses this database"
            );
            if began.elapsed() > DEPOSED.1 {
                pause = DEPOSED.0;
            }
            sleep(pause).await;
            pause = (pause * 2).min(DEPOSED.1);
        }
    }

    /// Takes the database's fence for this term, or for a later one where the database knows a later epoch: of a
    /// Lease that somebody deleted, or of another cluster.
    async fn take_fence(&self, mut term: Term, holder: &str) -> Term {
        let mut backoff = Duration::from_millis(250);
        loop {
            match writeback::acquire(&self.pool, term, holder).await {
                Ok(None) => return term,
                Ok(Some(epoch)) => {
                    warn!(
                        ours = term.epoch,
                        its = epoch,
                        "the database knows a later epoch than our Lease: raising it"
                    );
                    term = self.leadership.raise_above(epoch, term).await;
                }
                Err(error) => {
                    warn!(error = %chain(error.as_ref()), "cannot begin to write to the database; will try again");
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(Duration::from_secs(5));
                }
            }
        }
    }

    /// Looks for changed rows: at once when notified, and every so often in any case.
    async fn scan(&self, config: &Config, wakeups: &Wakeups) {
        let mut next_resync = Instant::now();
        let mut trouble = false;
        let mut again: &[Duration] = &[];
        loop {
            let resync = Instant::now() >= next_resync;
            let began = Instant::now();
            let result = if resync { self.resync().await.map(|()| true) } else { self.read_changes().await };
            match result {
                Ok(all) => {
                    if resync {
                        next_resync = Instant::now() + config.resync_interval;
                    } else if !all {
                        // The newest changes are at the end of the queue; a shutdown may be among them.
                        next_resync = next_resync.min(Instant::now() + BACKLOG_RESYNC);
                    }
                    trouble = false;
                }
                Err(error) => {
                    if !std::mem::replace(&mut trouble, true) {
                        warn!(error = %chain(error.as_ref()), "cannot read the database; will try again");
                    }
                    next_resync = Instant::now();
                    again = &[];
                }
            }
            let hears = wakeups.alive.load(Ordering::Relaxed) && !trouble;
            let poll = if hears { config.poll_interval } else { config.poll_interval.min(DEAF_POLL) };
            let (pause, rest) = again.split_first().map_or((poll, again), |(pause, rest)| (*pause, rest));
            tokio::select! {
                () = wakeups.look.notified() => again = &AGAIN_AFTER_WAKE,
                () = self.resync.notified() => next_resync = Instant::now(),
                () = sleep(pause) => again = rest,
                () = sleep_until(next_resync), if !trouble => again = rest,
            }
            sleep_until(began + LEAST_GAP).await;
        }
    }

    /// Reads the rows that changed, oldest change first. Tells whether these were all.
    async fn read_changes(&self) -> anyhow::Result<bool> {
        let changed = rows::dirty(&self.pool).await?;
        let all = usize::try_from(rows::SCAN).is_ok_and(|most| changed.len() < most);
        self.store.take_in(changed, &self.queue);
        Ok(all)
    }

    /// Reads every so often whether new desktops shall wait; once they need not any more, all are looked at.
    async fn heed_pause(&self) -> Infallible {
        loop {
            sleep(PAUSE_INTERVAL).await;
            let waited = self.paused.load(Ordering::Relaxed);
            let again = async {
                self.read_pause().await?;
                if waited && !self.paused.load(Ordering::Relaxed) { self.resync().await } else { Ok(()) }
            };
            if let Err(error) = again.await {
                debug!(error = %chain(error.as_ref()), "cannot read whether new desktops shall wait");
            }
        }
    }

    async fn read_pause(&self) -> anyhow::Result<()> {
        let paused = rows::paused(&self.pool).await?;
        if self.paused.swap(paused, Ordering::Relaxed) != paused {
            info!(paused, "an administrator has paused the making of new desktops, or has it go on");
        }
        Ok(())
    }

    /// Reads all rows that are not over, and looks at everything in the cluster that has our name.
    async fn resync(&self) -> anyhow::Result<()> {
        // Before the rows, so that none is made that should wait.
        self.read_pause().await?;
        if self.database_id().is_none() {
            let id = rows::identity(&self.pool).await?;
            *self.database_id.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
        }
        if self.leadership.rest().is_none() {
            self.store.forget_over();
        }
        let gone = self.store.take_in_all(rows::live(&self.pool).await?, &self.queue);
        if !gone.is_empty() {
            self.store.take_in(rows::by_id(&self.pool, &gone).await?, &self.queue);
        }
        self.wake_cluster();
        Ok(())
    }

    /// Wakes everything in the cluster that has our name.
    fn wake_cluster(&self) {
        let known = [self.cluster.cr_cache.keys(), self.cluster.vm_cache.keys(), self.cluster.vmi_cache.keys()];
        for key in known.into_iter().flatten() {
            self.queue.wake(&key, Lane::Makes);
        }
    }

    async fn read_clocks(&self, client: &Client) {
        let mut readings = 0_u32;
        loop {
            let (database, cluster) = tokio::join!(rows::time(&self.pool), cluster::server_time(client));
            match database {
                Ok(reading) => self.clock.database(reading),
                Err(error) => debug!(error = %chain(error.as_ref()), "cannot read the database's clock"),
            }
            match cluster {
                Ok((time, at)) => self.clock.cluster(Reading { time, at }),
                Err(error) => debug!(error = %chain(error.as_ref()), "cannot read the API server's clock"),
            }
            // The API server tells whole seconds: where between two of them it is takes some readings.
            let settling = readings < SETTLING_READINGS;
            readings = readings.saturating_add(1);
            sleep(if settling { Duration::from_millis(90) } else { CLOCK_INTERVAL }).await;
        }
    }

    /// The identity of the database, once it was read.
    pub(crate) fn database_id(&self) -> Option<String> {
        self.database_id.lock().unwrap_or_else(PoisonError::into_inner).map(|id| id.to_string())
    }

    fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A watch is cut, or goes on.
    fn watched(&self, kind: &str, well: bool) {
        let Some(now) = self.clock.now() else { return };
        let others = self.fleet().watched(kind, well, now.cluster);
        others.iter().for_each(|other| self.queue.wake(other, Lane::Makes));
    }

    /// A VM could not be made. The first time is remembered for as long as it is the same fault.
    pub(crate) fn remember_failure(&self, key: &Key, owner: Owner, words: String, fault: Fault) {
        let mut failures = self.failures();
        let known = failures.get(key).filter(|known| known.owner == owner && known.fault == fault);
        let now = self.clock.now().map(|now| now.cluster);
        let Some(since) = known.map(|known| known.since).or(now) else { return };
        failures.insert(key.clone(), CreateFailure { owner, words, fault, since });
    }

    /// What became of the last try to make a VM, where it was not made.
    pub(crate) fn failures(&self) -> MutexGuard<'_, HashMap<Key, CreateFailure>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
