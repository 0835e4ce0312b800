//! Two clocks, neither of them this machine's: the database's judges rows, the API server's judges what
//! people apply by hand. Each is a reading and the time that has passed since, by the monotonic clock:
//! setting this machine's clock changes nothing.

use std::sync::{Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use crate::model::Now;

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
        let passed = SignedDuration::try_from(now.saturating_duration_since(self.at))
            .unwrap_or(SignedDuration::ZERO);
        self.time.checked_add(passed).unwrap_or(Timestamp::MAX)
    }
}

/// The last readings.
#[derive(Debug, Default)]
pub struct Clock(Mutex<(Option<Reading>, Option<Reading>)>);

impl Clock {
    /// Takes in a reading of the database's clock.
    pub fn database(&self, reading: Reading) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0 = Some(reading);
    }

    /// Takes in a reading of the API server's clock.
    pub fn cluster(&self, reading: Reading) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1 = Some(reading);
    }

    /// The time by both. `None` until one of them was read; then the one stands in for the other.
    pub fn now(&self) -> Option<Now> {
        let (database, cluster) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let (database, cluster) = (database.map(|r| r.now(now)), cluster.map(|r| r.now(now)));
        Some(Now {
            database: database.or(cluster)?,
            cluster: cluster.or(database)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_clock_goes_on_from_its_last_reading_and_stands_in_for_the_other() {
        let clock = Clock::default();
        assert_eq!(clock.now(), None);
        let noon: Timestamp = "2026-11-23T12:00:00Z".parse().expect("a time");
        clock.cluster(Reading {
            time: noon,
            at: Instant::now(),
        });
        tokio::time::advance(Duration::from_secs(5)).await;
        let later = noon + SignedDuration::from_secs(5);
        assert_eq!(
            clock.now(),
            Some(Now {
                database: later,
                cluster: later
            })
        );
        let skewed = noon + SignedDuration::from_hours(2);
        clock.database(Reading {
            time: skewed,
            at: Instant::now(),
        });
        assert_eq!(
            clock.now(),
            Some(Now {
                database: skewed,
                cluster: later
            })
        );
    }
}
