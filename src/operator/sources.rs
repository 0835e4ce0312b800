//! What wakes desktops: changed rows, cut watches, the clocks and the pause.

use std::convert::Infallible;
use std::fmt::Debug;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use kube::{Api, Client};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};

use super::Operator;
use crate::cluster::{self, Cache, Cluster, Observed, follow};
use crate::config::Config;
use crate::database::contact::TICK;
use crate::database::rows;
use crate::model::{Desired, Row};
use crate::names::Key;
use crate::queue::Lane;
use crate::telemetry::chain;

/// After a notification the rows are looked at again: of committers at the same time only one notifies.
const AGAIN_AFTER_WAKE: [Duration; 2] = [Duration::from_millis(25), Duration::from_millis(25)];
/// Least time between two looks for changed rows, under a storm of notifications.
const LEAST_GAP: Duration = Duration::from_millis(5);
/// While notifications are not proven to arrive, rows are looked at this often at least.
const DEAF_POLL: Duration = Duration::from_secs(1);
/// While more rows have changed than one look reads, all are read this often: a look at all costs far more.
const BACKLOG_RESYNC: Duration = Duration::from_secs(1);
/// How often it is read whether new desktops shall wait.
const PAUSE_INTERVAL: Duration = Duration::from_secs(10);
/// How often the clocks are read.
const CLOCK_INTERVAL: Duration = Duration::from_secs(10);
/// How often the database's is, while it is not known whether the database answers.
const DOUBT_INTERVAL: Duration = Duration::from_millis(500);
/// How often the API server's is read in quick succession at first.
const SETTLING_READINGS: u32 = 11;

/// Watches one kind of object, in a task of its own: while it reads a list of all there are, the others go on.
pub(super) async fn watch<K>(
    operator: Arc<Operator>,
    kind: &'static str,
    api: Api<K>,
    cache: fn(&Cluster) -> &Cache<K::Seen>,
    relist: Duration,
) where
    K: Observed + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let tell = |well| operator.watched(kind, well);
    follow(api, cache(&operator.cluster), &operator.queue, relist, tell).await;
}

impl Operator {
    /// Looks for changed rows: at once when notified, and every so often in any case.
    pub(super) async fn scan(&self, config: &Config) {
        let wakeups = &self.wakeups;
        let mut next_resync = Instant::now();
        let mut trouble = false;
        let mut again: &[Duration] = &[];
        loop {
            // Nothing is read of rows that may not be the right ones.
            self.pulses.scan.rest();
            if self.pair_is_right().await {
                next_resync = Instant::now();
            }
            let resync = Instant::now() >= next_resync;
            let began = Instant::now();
            self.reads.asked();
            self.pulses.scan.beat();
            let result = if resync { self.resync().await.map(|()| true) } else { self.read_changes().await };
            match result {
                Ok(all) => {
                    self.reads.answered(false);
                    self.pulses.rows.beat();
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
            self.pulses.scan.rest();
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
        let changed = rows::dirty(&self.pool, &self.store.unreadable).await?;
        let all = usize::try_from(rows::SCAN).is_ok_and(|most| changed.len() < most);
        self.arm(&changed);
        self.store.take_in(changed, &self.queue);
        Ok(all)
    }

    /// Sees to it that each is looked at when it is due, though many others may wait to be.
    fn arm(&self, rows: &[Row]) {
        for row in rows.iter().filter(|row| row.desired == Desired::Present) {
            if let Some(due) = self.clock.when(row.expires_at) {
                self.queue.due_by(&Key::of_row(row.id), due);
            }
        }
    }

    /// Reads every so often whether new desktops shall wait; once they need not any more, all are looked at.
    pub(super) async fn heed_pause(&self) -> Infallible {
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
        let all = rows::live(&self.pool, &self.store.unreadable).await?;
        self.arm(&all);
        let doubtful = self.store.take_in_all(all, &self.queue);
        if !doubtful.is_empty() {
            let ids: Vec<_> = doubtful.iter().map(|(id, _)| *id).collect();
            let found = rows::by_id(&self.pool, &ids, &self.store.unreadable).await?;
            self.arm(&found.rows);
            self.store.take_in_doubtful(found.rows, &doubtful, &self.queue);
            found.missing.into_iter().for_each(|id| self.store.forget(id));
        }
        self.wake_cluster();
        Ok(())
    }

    /// Wakes everything in the cluster that has our name.
    pub(crate) fn wake_cluster(&self) {
        let known = [self.cluster.cr_cache.keys(), self.cluster.vm_cache.keys(), self.cluster.vmi_cache.keys()];
        for key in known.into_iter().flatten() {
            self.queue.wake(&key, Lane::Looks);
        }
    }

    /// Reads the database's clock: every so often, and again and again while it is not known whether the database
    /// answers, as it is the one question that nothing in the database can hold up.
    pub(super) async fn read_the_databases_clock(&self) {
        let mut last = None::<Instant>;
        loop {
            let doubtful = !self.store.is_complete() || self.reads.silence().is_positive();
            if doubtful || last.is_none_or(|last| last.elapsed() >= CLOCK_INTERVAL) {
                self.reads.asked();
                match rows::time(&self.pool).await {
                    Ok(reading) => {
                        self.clock.database(reading);
                        self.reads.answered(false);
                        last = Some(Instant::now());
                    }
                    Err(error) => debug!(error = %chain(error.as_ref()), "cannot read the database's clock"),
                }
            }
            sleep(DOUBT_INTERVAL).await;
        }
    }

    /// Counts how long the database leaves unanswered what it is asked.
    pub(super) async fn count_silence(&self) {
        loop {
            sleep(TICK).await;
            self.reads.tick();
            self.write_back.tick();
        }
    }

    /// Reads the API server's clock. It tells whole seconds: where between two of them it is takes some readings.
    pub(super) async fn read_the_api_servers_clock(&self, client: &Client) {
        let mut readings = 0_u32;
        loop {
            match cluster::server_time(client).await {
                Ok(reading) => self.clock.cluster(reading),
                Err(error) => debug!(error = %chain(error.as_ref()), "cannot read the API server's clock"),
            }
            let settling = readings < SETTLING_READINGS;
            readings = readings.saturating_add(1);
            sleep(if settling { Duration::from_millis(90) } else { CLOCK_INTERVAL }).await;
        }
    }

    /// A watch is cut, or goes on.
    fn watched(&self, kind: &'static str, well: bool) {
        let mut cuts = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        match well {
            true => drop(cuts.remove(kind)),
            false => drop(cuts.entry(kind).or_insert_with(Instant::now)),
        }
        drop(cuts);
        let Some(now) = self.clock.now() else { return };
        let others = self.fleet().watched(kind, well, now.cluster);
        others.iter().for_each(|other| self.queue.wake(other, Lane::Makes));
    }
}
