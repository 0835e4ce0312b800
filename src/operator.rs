//! The daemon: sources wake keys, workers look, plan and act on them, one desktop at a time each.

mod orphans;
mod pair;
mod secrets;
mod sources;
mod vitals;
mod work;

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use deadpool_postgres::Pool;
use kube::{Api, Client};
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::clock::Clock;
use crate::cluster::{self, Cluster, Keeper};
use crate::config::Config;
use crate::database::bond::Expected;
use crate::database::contact::Contact;
use crate::database::housekeeping;
use crate::database::listen::{self, Wakeups};
use crate::database::store::Store;
use crate::database::writeback::{self, WriteBack};
use crate::database::writer::Writer;
use crate::events::Events;
use crate::fleet::Fleet;
use crate::health::Pulse;
use crate::http;
use crate::lease::{Leadership, Term};
use crate::metrics::Metrics;
use crate::names::{Key, Owner};
use crate::plan::{CreateFailure, Fault};
use crate::queue::Queue;
use crate::telemetry::chain;
use crate::template::{self, Templates};
use orphans::Orphans;
use pair::Pair;

/// First and longest wait before another term, while another daemon keeps taking the database from us.
const DEPOSED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Longest time to give the Lease back when told to stop.
const RELEASE: Duration = Duration::from_secs(2);
/// Time to finish what is in flight when told to stop. What is abandoned, the next look finds.
const GRACE: Duration = Duration::from_millis(800);

/// All that the daemon knows and holds.
#[derive(Debug)]
pub struct Operator {
    pub(crate) cluster: Cluster,
    pub(crate) store: Store,
    pub(crate) write_back: WriteBack,
    pub(crate) leadership: Leadership,
    pub(crate) queue: Queue,
    pub(crate) clock: Arc<Clock>,
    pulses: Pulses,
    /// The watches that are cut, and since when.
    cuts: Mutex<HashMap<&'static str, Instant>>,
    wakeups: Arc<Wakeups>,
    poll_interval: Duration,
    /// Whether the database answers what is read.
    reads: Contact,
    /// All rows are to be read: a term has begun.
    resync: Notify,
    /// Nothing is made before they were read.
    pub(crate) templates: watch::Sender<Option<Arc<Templates>>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) events: Events,
    failures: Mutex<HashMap<Key, CreateFailure>>,
    fleet: Mutex<Fleet>,
    database_id: Mutex<Option<Uuid>>,
    /// Whether database and cluster belong together.
    pair: watch::Sender<Pair>,
    expected: Arc<Expected>,
    orphans: Mutex<Orphans>,
    orphan_grace: Duration,
    /// An administrator wants new desktops to wait.
    paused: AtomicBool,
    pool: Pool,
    in_flight: work::InFlight,
}

/// What moves, for `/livez` and `/readyz`.
#[derive(Debug, Default)]
struct Pulses {
    /// A look for changed rows begins; it rests between two.
    scan: Pulse,
    /// The rows that changed were read.
    rows: Pulse,
    /// A worker takes a desktop; it rests while there are none.
    turn: Pulse,
}

/// Runs the daemon until `shutdown` resolves.
///
/// Neither side needs to be there: what is away is tried again, and what the other side alone needs is
/// done meanwhile.
///
/// # Errors
///
/// If a setting cannot be used at all, or `/livez`, `/readyz` and `/metrics` can no longer be served.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let client = cluster::connect().await.context("read how to reach the Kubernetes API server")?;
    let expected = Arc::<Expected>::default();
    let pool = config.database.pool(&expected)?;
    let folder = config.templates.as_deref().map(templates_of).transpose()?;
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listen on {}, as CYBERDESK_LISTEN says", config.listen))?;
    let address = listener.local_addr()?.to_string();
    let (metrics, clock) = (Arc::<Metrics>::default(), Arc::<Clock>::default());
    let operator = Arc::new(Operator {
        cluster: Cluster::new(&client, &config.namespace, &config.vm_namespace),
        store: Store::default(),
        write_back: WriteBack::new(metrics.clone(), clock.clone()),
        leadership: Leadership::new(
            Api::namespaced(cluster::connect().await?, &config.namespace),
            config.identity.clone(),
            expected.clone(),
        ),
        queue: Queue::default(),
        clock,
        pulses: Pulses::default(),
        cuts: Mutex::default(),
        wakeups: Arc::default(),
        poll_interval: config.poll_interval,
        reads: Contact::default(),
        resync: Notify::new(),
        templates: watch::Sender::new(None),
        metrics,
        events: Events::new(client.clone(), &config.identity),
        failures: Mutex::default(),
        fleet: Mutex::new(Fleet::new(config.max_unstarted)),
        database_id: Mutex::default(),
        pair: watch::Sender::default(),
        expected,
        orphans: Mutex::default(),
        orphan_grace: config.orphan_grace,
        paused: AtomicBool::default(),
        pool,
        in_flight: work::InFlight::default(),
    });
    info!(namespace = config.namespace, vm_namespace = config.vm_namespace, address, "started");

    let (crs, vms, vmis) = operator.cluster.apis();
    // They end with this function.
    let mut watches = JoinSet::new();
    watches.spawn(sources::watch(operator.clone(), "crs", crs, |cluster| &cluster.cr_cache, config.resync_interval));
    watches.spawn(sources::watch(operator.clone(), "vms", vms, |cluster| &cluster.vm_cache, config.resync_interval));
    watches.spawn(sources::watch(operator.clone(), "vmis", vmis, |cluster| &cluster.vmi_cache, config.resync_interval));
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
        () = operator.scan(&config) => unreachable!("the scan goes on for ever"),
        () = listen::run(&config.database, &operator.pool, &operator.wakeups, &operator.metrics.heartbeat) => unreachable!("the listener goes on for ever"),
        () = operator.read_the_databases_clock() => unreachable!("the clocks are read for ever"),
        () = operator.count_silence() => unreachable!("silence is counted for ever"),
        () = operator.read_the_api_servers_clock(&client) => unreachable!("the clocks are read for ever"),
        ended = watches.join_next() => unreachable!("a watch goes on for ever: {ended:?}"),
        served = http::serve(listener, operator.clone()) => served?,
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
        operator.orphans().begin();
        operator.pair.send_replace(Pair::default());
        // Whose desktops are kept by their CRs for as long as it cannot be asked itself.
        let known = operator.leadership.bound_to().or(*operator.database_id());
        *operator.database_id() = known;
        operator.store.reset();
        operator.queue.open();
        operator.wake_cluster();
        operator.resync.notify_one();
        // Another daemon may have accepted others meanwhile.
        operator.templates.send_replace(None);
        let keeper = Keeper::new(operator, config, client);
        tokio::select! {
            () = keeper.run(folder.clone()) => unreachable!("a watch goes on for ever"),
            () = work::work(operator, config.concurrency, stopping) => return,
            never = operator.write(config) => match never {},
            never = operator.sweep_secrets() => match never {},
            () = operator.leadership.ended() => operator.queue.close(),
        }
        operator.pulses.turn.rest();
        operator.metrics.templates(std::iter::empty());
        operator.metrics.braked.set(0);
        operator.metrics.orphans.set(0);
        operator.metrics.strangers.set(0);
        operator.pair.send_replace(Pair::default());
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

impl Operator {
    /// Writes back, in the term that is and in those that follow.
    async fn write(&self, config: &Config) -> Infallible {
        let (mut pause, mut trouble) = (DEPOSED.0, false);
        loop {
            let term = self.leadership.begun().await;
            let agreed = self.agree(term, config).await;
            let term = tokio::select! {
                term = self.take_fence(term, &config.identity) => term,
                () = self.expected.differs() => continue,
            };
            if let Err(error) = self.bind(term, &agreed).await {
                if !std::mem::replace(&mut trouble, true) {
                    warn!(error = %chain(error.as_ref()), "cannot bind database and cluster; will try again");
                }
                sleep(DEPOSED.0).await;
                continue;
            }
            trouble = false;
            info!(epoch = term.epoch, "writing to the database");
            let began = Instant::now();
            tokio::select! {
                () = self.doubt(term, config) => continue,
                () = self.write_back.run(self.writer(term), &self.store, &self.queue) => (),
                () = housekeeping::run(self.writer(term), config.resync_interval, &self.expected) => (),
                never = self.heed_pause() => match never {},
            }
            if self.leadership.tenure.rest().is_none() {
                return std::future::pending().await;
            }
            error!(
                epoch = term.epoch,
                "another daemon has taken over the database; if this comes again, it does not share our Lease: see that only one cluster uses this database"
            );
            if began.elapsed() > DEPOSED.1 {
                pause = DEPOSED.0;
            }
            // Whoever has it now may be another cluster's, and the rows with it.
            self.forget_rows(Pair::Unjudged);
            sleep(pause).await;
            pause = (pause * 2).min(DEPOSED.1);
        }
    }

    /// Takes the database's fence for this term, or for a later one where the database knows a later epoch: of a
    /// Lease that somebody deleted, or of another cluster.
    async fn take_fence(&self, mut term: Term, holder: &str) -> Term {
        let (mut backoff, mut trouble) = (Duration::from_millis(250), false);
        loop {
            match writeback::acquire(self.writer(term), holder).await {
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
                    if !std::mem::replace(&mut trouble, true) {
                        warn!(error = %chain(error.as_ref()), "cannot begin to write to the database; will try again");
                    }
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(Duration::from_secs(5));
                }
            }
        }
    }

    /// The database, as it is written to in this term.
    fn writer(&self, term: Term) -> Writer<'_> {
        Writer::new(&self.pool, &self.leadership.tenure, term)
    }

    /// The identity of the database that the rows are of, once it was judged to be the right one.
    pub(crate) fn database_id(&self) -> MutexGuard<'_, Option<Uuid>> {
        self.database_id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn orphans(&self) -> MutexGuard<'_, Orphans> {
        self.orphans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
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
