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
    /// When the answer was there, by our monotonic clock.
    pub at: Instant,
    /// How much later than shown it may have been by then: the answer was on its way, or shows whole seconds only.
    pub slack: Duration,
}

impl Reading {
    fn now(&self, now: Instant) -> Timestamp {
        let passed = SignedDuration::try_from(now.saturating_duration_since(self.at)).unwrap_or(SignedDuration::ZERO);
        later(self.time, passed)
    }

    /// The better of what was known and a new reading. Each shows the time or an earlier one, so what was known stays
    /// as long as it can be right: one that was long on its way would have every deadline come as much too late.
    fn or_known(self, known: Option<Self>) -> Self {
        let time = |known: &Self| known.now(self.at);
        let latest = later(self.time, SignedDuration::try_from(self.slack).unwrap_or(SignedDuration::MAX));
        known.filter(|known| (self.time..=latest).contains(&time(known))).unwrap_or(self)
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
        readings.database_read = Some(reading.at);
        readings.database = Some(reading.or_known(readings.database));
    }

    /// Takes in a reading of the API server's clock.
    pub fn cluster(&self, reading: Reading) {
        let mut readings = self.readings();
        readings.cluster_read = Some(reading.at);
        readings.cluster = Some(reading.or_known(readings.cluster));
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

    const SECOND: Duration = Duration::from_secs(1);

    fn reading(time: Timestamp, slack: Duration) -> Reading {
        Reading { time, at: Instant::now(), slack }
    }

    #[tokio::test(start_paused = true)]
    async fn a_reading_that_was_long_on_its_way_makes_no_deadline_late() {
        let clock = Clock::default();
        let noon: Timestamp = "2026-11-23T12:00:00Z".parse().expect("a time");
        let shown = || clock.now().expect("it was read").database;
        clock.database(reading(noon, Duration::from_millis(2)));
        tokio::time::advance(SECOND * 10).await;
        let late = noon + SignedDuration::from_millis(9300);
        clock.database(reading(late, Duration::from_millis(750)));
        assert_eq!(shown(), noon + SignedDuration::from_secs(10));
        clock.database(reading(late, Duration::from_millis(699)));
        assert_eq!(shown(), late, "the clock was set back: nothing else explains it");
        clock.database(reading(noon + SignedDuration::from_secs(11), SECOND));
        assert_eq!(shown(), noon + SignedDuration::from_secs(11), "it was set forward, or goes faster than ours");
    }

    #[tokio::test(start_paused = true)]
    async fn each_clock_goes_on_from_its_last_reading_and_stands_in_for_the_other() {
        let clock = Clock::default();
        assert_eq!(clock.now(), None);
        let noon: Timestamp = "2026-11-23T12:00:00Z".parse().expect("a time");
        clock.cluster(reading(noon, SECOND));
        tokio::time::advance(Duration::from_secs(5)).await;
        let later = noon + SignedDuration::from_secs(5);
        assert_eq!(clock.now(), Some(Now { database: later, cluster: later }));
        let skewed = noon + SignedDuration::from_hours(2);
        clock.database(reading(skewed, Duration::ZERO));
        assert_eq!(clock.now(), Some(Now { database: skewed, cluster: later }));
    }

    #[tokio::test(start_paused = true)]
    async fn the_database_s_time_is_told_by_what_is_recalled_until_it_is_read() {
        let clock = Clock::default();
        let noon: Timestamp = "2026-11-23T12:00:00Z".parse().expect("a time");
        let seconds = SignedDuration::from_secs;
        clock.recall(seconds(-7));
        clock.cluster(reading(noon, SECOND));
        assert_eq!(clock.now(), Some(Now { database: noon - seconds(7), cluster: noon }));
        assert_eq!(clock.offset(), None, "it is not this process that knows it");
        clock.database(reading(noon - seconds(3), Duration::ZERO));
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
        clock.cluster(reading(noon, SECOND));
        tokio::time::advance(Duration::from_millis(200)).await;
        clock.cluster(reading(noon + SignedDuration::from_secs(1), SECOND));
        assert_eq!(cluster(), noon + SignedDuration::from_secs(1));
        tokio::time::advance(Duration::from_millis(800)).await;
        clock.cluster(reading(noon + SignedDuration::from_secs(1), SECOND));
        assert_eq!(cluster(), noon + SignedDuration::from_millis(1800), "a later, worse one does not set it back");
    }
}
