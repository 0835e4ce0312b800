//! How the daemon fares at the moment: for `/livez` and `/readyz`, and the figures that are taken when asked for.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::Operator;
use crate::health::{self, Check, Vitals, Watch};
use crate::http::Served;
use crate::metrics::whole;
use crate::plan::says_paused;
use crate::queue::Lane;

/// The watches, and the checks of `/readyz` that tell of them.
const WATCHES: [(&str, &str); 3] = [("crs", "watch-crs"), ("vms", "watch-vms"), ("vmis", "watch-vmis")];

impl Served for Operator {
    fn live(&self) -> Vec<Check> {
        health::liveness(&self.vitals())
    }

    fn ready(&self) -> Vec<Check> {
        health::readiness(&self.vitals())
    }

    fn figures(&self) -> String {
        self.take_figures();
        self.metrics.show()
    }
}

impl Operator {
    fn vitals(&self) -> Vitals {
        let [database, cluster] = self.clock.ages();
        let (scanning, rows_read) = (self.pulses.scan.age(), self.pulses.rows.age());
        let queued = Lane::ALL.map(|lane| age(self.queue.waiting(lane).1));
        Vitals {
            notified: self.wakeups.alive.load(Ordering::Relaxed),
            rows_read,
            poll: self.poll_interval,
            watches: WATCHES.map(|(kind, check)| (check, self.watch(kind))),
            leads: self.leadership.tenure.rest().is_some(),
            lease_seen: self.leadership.seen.age(),
            lag: (self.write_back.lag(), age(self.write_back.oldest())),
            answered: self.write_back.answered.age(),
            clocks: [("the database's", database), ("the API server's", cluster)],
            scanning,
            election: self.leadership.moved.age(),
            turn: self.pulses.turn.age(),
            queued: queued.into_iter().max().unwrap_or_default(),
        }
    }

    fn watch(&self, kind: &str) -> Watch {
        let listed = match kind {
            "crs" => self.cluster.cr_cache.is_complete(),
            "vms" => self.cluster.vm_cache.is_complete(),
            _ => self.cluster.vmi_cache.is_complete(),
        };
        let cut = self.cuts.lock().unwrap_or_else(PoisonError::into_inner).get(kind).map(Instant::elapsed);
        match (listed, cut) {
            (false, _) => Watch::Unlisted,
            (true, None) => Watch::Up,
            (true, Some(since)) => Watch::Cut(since),
        }
    }

    fn take_figures(&self) {
        let (vitals, metrics) = (self.vitals(), &self.metrics);
        metrics.phases(&self.cluster.cr_cache.map(|cr| cr.status.phase));
        let paused = self.cluster.cr_cache.map(|cr| says_paused(&cr.status));
        metrics.desktops_paused.set(whole(paused.into_iter().filter(|paused| *paused).count()));
        for lane in Lane::ALL {
            let (depth, oldest) = self.queue.waiting(lane);
            metrics.queue(lane, depth, age(oldest).as_secs_f64());
        }
        WATCHES.iter().zip(vitals.watches).for_each(|((kind, _), (_, watch))| metrics.watch(kind, watch == Watch::Up));
        metrics.leader.set(vitals.leads.into());
        metrics.paused.set(self.paused.load(Ordering::Relaxed).into());
        metrics.notified.set(vitals.notified.into());
        // Rows are the leader's to read.
        let rows_age = vitals.rows_read.map_or(f64::INFINITY, |age| age.as_secs_f64());
        metrics.rows_age.set(if vitals.leads { rows_age } else { 0.0 });
        metrics.lag.set(whole(vitals.lag.0));
        metrics.lag_oldest.set(vitals.lag.1.as_secs_f64());
    }
}

fn age(since: Option<Instant>) -> Duration {
    since.map(|since| since.elapsed()).unwrap_or_default()
}
