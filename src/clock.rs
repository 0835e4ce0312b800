//! Two clocks, neither of them this machine's: the database's judges rows, the API server's judges what
//! people apply by hand. Each is a reading and the time that has passed since, by the monotonic clock:
//! setting this machine's clock changes nothing.
//!
//! How far the database's clock is ahead of the API server's is kept in the Lease, so that a daemon that starts
//! while the database is away can judge deadlines by its time all the same.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use crate::model::{Now, later};

/// What a clock elsewhere showed, and when we read it.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// What it showed.
    pub time: Timestamp,
    /// When, by our monotonic clock.
    pub at: Instant,
}

impl Reading {
    fn now(&self, now: Instant) -> Timestamp {
        let passed = SignedDuration::try_from(now.saturating_duration_since(self.at)).unwrap_or(SignedDuration::ZERO);
        later(self.time, passed)
    }
}

/// The last readings.
#[derive(Debug, Default)]
pub struct Clock(Mutex<Readings>);

#[derive(Debug, Default)]
struct Readings {
    database: Option<Reading>,
    cluster: Option<Reading>,
    /// How far the database's is ahead, as an earlier process has told it.
    recalled: Option<SignedDuration>,
    database_read: Option<Instant>,
    cluster_read: Option<Instant>,
}

impl Clock {
    fn readings(&self) -> MutexGuard<'_, Readings> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a reading of the database's clock.
    pub fn database(&self, reading: Reading) {
        let mut readings = self.readings();
        (readings.database, readings.database_read) = (Some(reading), Some(reading.at));
    }

    /// Takes in a reading of the API server's clock, which shows whole seconds: the time is that or up to a
    /// second later. What was known before stays if it lies in between, for it is the more exact.
    pub fn cluster(&self, reading: Reading) {
        let mut readings = self.readings();
        readings.cluster_read = Some(reading.at);
        let shown = reading.time;
        let known = readings.cluster.map(|known| known.now(reading.at));
        let agrees = known.is_some_and(|known| shown <= known && known < later(shown, SignedDuration::from_secs(1)));
        if !agrees {
            readings.cluster = Some(reading);
        }
    }

    /// How long ago each was read: the database's and the API server's.
    pub fn ages(&self) -> [Option<Duration>; 2] {
        let readings = self.readings();
        [readings.database_read, readings.cluster_read].map(|at| at.map(|at| at.elapsed()))
    }

    /// When the database's clock shows this time, by our monotonic one; at once, if it has.
    pub fn when(&self, database: Timestamp) -> Option<Instant> {
        let left = database.duration_since(self.now()?.database).max(SignedDuration::ZERO);
        Instant::now().checked_add(left.unsigned_abs())
    }

    /// How far the database's clock is ahead of the API server's, if both were read by this process.
    pub fn offset(&self) -> Option<SignedDuration> {
        let readings = self.readings();
        let now = Instant::now();
        Some(readings.database?.now(now).duration_since(readings.cluster?.now(now)))
    }

    /// How far the database's clock was ahead when an earlier process read both. Our own reading is better.
    pub fn recall(&self, offset: SignedDuration) {
        self.readings().recalled = Some(offset);
    }

    /// The time by both. `None` until one of them was read; then the one stands in for the other, the API server's
    /// by what is recalled of the database's.
    pub fn now(&self) -> Option<Now> {
        let readings = self.readings();
        let now = Instant::now();
        let database = readings.database.map(|reading| reading.now(now));
        let cluster = readings.cluster.map(|reading| reading.now(now));
        let derived = cluster.map(|cluster| later(cluster, readings.recalled.unwrap_or_default()));
        Some(Now { database: database.or(derived)?, cluster: cluster.or(database)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_clock_goes_on_from_its_last_reading_and_stands_in_for_the_other() {
        let clock = Clock::default();
        assert_eq!(clock.now(), None);
        let noon: Timestamp = "2026-11-23T12:00:00Z".parse().expect("a time");
        clock.cluster(Reading { time: noon, at: Instant::now() });
        tokio::time::advance(Duration::from_secs(5)).await;
        let later = noon + SignedDuration::from_secs(5);
        assert_eq!(clock.now(), Some(Now { database: later, cluster: later }));
        let skewed = noon + SignedDuration::from_hours(2);
        clock.database(Reading { time: skewed, at: Instant::now() });
        assert_eq!(clock.now(), Some(Now { database: skewed, cluster: later }));
    }

    #[tokio::test(start_paused = true)]
    async fn the_database_s_time_is_told_by_what_is_recalled_until_it_is_read() {
        let clock = Clock::default();
        let noon: Timestamp = "2026-11-23T12:00:00Z".parse().expect("a time");
        let seconds = SignedDuration::from_secs;
        clock.recall(seconds(-7));
        clock.cluster(Reading { time: noon, at: Instant::now() });
        assert_eq!(clock.now(), Some(Now { database: noon - seconds(7), cluster: noon }));
        assert_eq!(clock.offset(), None, "it is not this process that knows it");
        clock.database(Reading { time: noon - seconds(3), at: Instant::now() });
        tokio::time::advance(Duration::from_secs(60)).await;
        let later = noon + seconds(60);
        assert_eq!(clock.now(), Some(Now { database: later - seconds(3), cluster: later }));
        assert_eq!(clock.offset(), Some(seconds(-3)));
    }

    #[tokio::test(start_paused = true)]
    async fn of_readings_in_whole_seconds_the_latest_is_the_best() {
        let clock = Clock::default();
        let noon: Timestamp = "2026-11-23T12:00:00Z".parse().expect("a time");
        let cluster = || clock.now().expect("it was read").cluster;
        // Read at 0.9 s past noon, and again 0.2 s later: the second has turned meanwhile.
        clock.cluster(Reading { time: noon, at: Instant::now() });
        tokio::time::advance(Duration::from_millis(200)).await;
        clock.cluster(Reading { time: noon + SignedDuration::from_secs(1), at: Instant::now() });
        assert_eq!(cluster(), noon + SignedDuration::from_secs(1));
        tokio::time::advance(Duration::from_millis(800)).await;
        clock.cluster(Reading { time: noon + SignedDuration::from_secs(1), at: Instant::now() });
        assert_eq!(cluster(), noon + SignedDuration::from_millis(1800), "a later, worse one does not set it back");
    }
}
