//! Two clocks, neither of them this machine's: the database's judges rows, the API server's judges what
//! people apply by hand. Each is a reading and the time that has passed since, by the monotonic clock:
//! setting this machine's clock changes nothing.

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

    /// The time by both. `None` until one of them was read; then the one stands in for the other.
    pub fn now(&self) -> Option<Now> {
        let readings = self.readings();
        let now = Instant::now();
        let database = readings.database.map(|reading| reading.now(now));
        let cluster = readings.cluster.map(|reading| reading.now(now));
        Some(Now { database: database.or(cluster)?, cluster: cluster.or(database)? })
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
