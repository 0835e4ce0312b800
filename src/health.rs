//! Whether the daemon is well: `/livez` and `/readyz`, in the API server's own format.
//!
//! Ready is a daemon that serves desktops, or would at once if the leader went: a standby with warm caches is ready.
//! Not live is only what a restart mends, a task that has stopped moving; never that Postgres or the API server is
//! away, for then a restart would only cost the caches. What was measured is plain data, and what follows from it pure.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// What is done every few seconds is missed after this.
const MISSED: Duration = Duration::from_secs(15);
/// A watch that was cut for less is no trouble: it is made anew every so often.
const CUT: Duration = Duration::from_secs(5);
/// Entries wait longer than this only if something is wrong.
const LAG: Duration = Duration::from_secs(30);
/// The clocks are read every ten seconds.
const CLOCKS: Duration = Duration::from_secs(60);
/// Nothing that a task waits for is without a deadline, and all deadlines of one round together are less.
const STUCK: Duration = Duration::from_secs(300);

/// When something was last done, or begun.
#[derive(Debug, Default)]
pub struct Pulse(Mutex<Option<Instant>>);

impl Pulse {
    /// It is done, or begins, now.
    pub fn beat(&self) {
        self.set(Some(Instant::now()));
    }

    /// Nothing is expected of it until the next beat.
    pub fn rest(&self) {
        self.set(None);
    }

    fn set(&self, at: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }

    /// How long ago it was. `None`: never, or it rests.
    pub fn age(&self) -> Option<Duration> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).map(|at| at.elapsed())
    }
}

/// How a watch fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Its first list is not complete.
    Unlisted,
    /// It goes on.
    Up,
    /// It is cut, for this long.
    Cut(Duration),
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Vitals {
    /// Whether notifications are proven to arrive.
    pub notified: bool,
    /// How long ago the rows that changed were last read, and how often that is done at least.
    pub rows_read: Option<Duration>,
    /// How often they are read even if nothing is notified.
    pub poll: Duration,
    /// The watch of each kind of object.
    pub watches: [(&'static str, Watch); 3],
    /// Whether this daemon leads.
    pub leads: bool,
    /// How long ago the Lease was last read or written.
    pub lease_seen: Option<Duration>,
    /// Entries that wait to be told to the database, and how long the first has.
    pub lag: (usize, Duration),
    /// How long ago the database last took what it was told.
    pub answered: Option<Duration>,
    /// How long ago each clock was read: the database's and the API server's.
    pub clocks: [(&'static str, Option<Duration>); 2],
    /// How long the look for changed rows under way has taken.
    pub scanning: Option<Duration>,
    /// How long ago the election last moved.
    pub election: Option<Duration>,
    /// How long ago a worker last took a desktop. `None`: none works, as on a standby.
    pub turn: Option<Duration>,
    /// How long the first desktop in the queue has been ready.
    pub queued: Duration,
}

/// What came of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// As it should be.
    Ok,
    /// Worse than it should be, but it is served.
    Warning(String),
    /// Not as it must be.
    Failed(String),
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Its name, which stays.
    pub name: &'static str,
    /// What came of it.
    pub state: State,
}

impl Check {
    fn new(name: &'static str, state: State) -> Self {
        Self { name, state }
    }

    fn failed_if(name: &'static str, failed: bool, why: impl FnOnce() -> String) -> Self {
        Self::new(name, if failed { State::Failed(why()) } else { State::Ok })
    }

    /// Whether it did not fail.
    pub fn passed(&self) -> bool {
        !matches!(self.state, State::Failed(_))
    }
}

/// The line of `?verbose`.
impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.state {
            State::Ok => write!(f, "[+]{} ok", self.name),
            State::Warning(why) => write!(f, "[+]{} ok: warning: {why}", self.name),
            State::Failed(why) => write!(f, "[-]{} failed: {why}", self.name),
        }
    }
}

/// Whether a restart would help.
pub fn liveness(vitals: &Vitals) -> Vec<Check> {
    let stuck = |for_how_long: Option<Duration>| for_how_long.is_some_and(|it| it > STUCK);
    let seconds = |age: Option<Duration>| age.unwrap_or_default().as_secs();
    vec![
        Check::failed_if("scan", stuck(vitals.scanning), || {
            format!("a look for changed rows has not ended for {} s", seconds(vitals.scanning))
        }),
        Check::failed_if("election", stuck(vitals.election), || {
            format!("the election has not moved for {} s", seconds(vitals.election))
        }),
        Check::failed_if("workers", stuck(vitals.turn) && vitals.queued > STUCK, || {
            format!("no desktop was taken from the queue for {} s, and some wait", seconds(vitals.turn))
        }),
    ]
}

/// Whether desktops are served, or would be if the leader went.
pub fn readiness(vitals: &Vitals) -> Vec<Check> {
    let mut checks = vec![listen(vitals), rows(vitals)];
    checks.extend(vitals.watches.map(|(kind, watch)| {
        let state = match watch {
            Watch::Unlisted => State::Failed("the API server has not listed them yet".to_owned()),
            Watch::Cut(since) if since > CUT => {
                State::Failed(format!("the API server could not be watched for {} s", since.as_secs()))
            }
            Watch::Up | Watch::Cut(_) => State::Ok,
        };
        Check::new(kind, state)
    }));
    checks.extend([leadership(vitals), write_back(vitals), clocks(vitals)]);
    checks
}

fn listen(vitals: &Vitals) -> Check {
    let deaf = || State::Warning("notifications do not arrive: rows are looked at every second meanwhile".to_owned());
    Check::new("listen", if vitals.notified { State::Ok } else { deaf() })
}

fn rows(vitals: &Vitals) -> Check {
    let limit = (vitals.poll * 3).max(MISSED);
    // A standby reads them when its term begins.
    Check::failed_if("rows", vitals.leads && vitals.rows_read.is_none_or(|age| age > limit), || {
        match vitals.rows_read {
            None => "the rows were not read yet".to_owned(),
            Some(age) => format!("the rows were last read {} s ago: the database does not answer", age.as_secs()),
        }
    })
}

fn leadership(vitals: &Vitals) -> Check {
    Check::failed_if("leadership", !vitals.leads && vitals.lease_seen.is_none_or(|age| age > MISSED), || {
        match vitals.lease_seen {
            None => "this daemon does not lead, and has not seen the Lease yet".to_owned(),
            Some(age) => format!("this daemon does not lead, and last saw the Lease {} s ago", age.as_secs()),
        }
    })
}

fn write_back(vitals: &Vitals) -> Check {
    let (entries, oldest) = vitals.lag;
    let words = || format!("{entries} entries wait to be told to the database, the first for {} s", oldest.as_secs());
    let state = match vitals.answered {
        // A row that the app holds locked keeps its own entry waiting, and no other.
        _ if oldest <= LAG => State::Ok,
        Some(age) if age <= LAG => State::Warning(words()),
        _ => State::Failed(words()),
    };
    Check::new("write-back", state)
}

fn clocks(vitals: &Vitals) -> Check {
    let old = |(_, age): &&(&str, Option<Duration>)| age.is_none_or(|age| age > CLOCKS);
    let state = match vitals.clocks.iter().filter(old).collect::<Vec<_>>().as_slice() {
        [] => State::Ok,
        [(whose, age)] => {
            let since = age.map_or("yet".to_owned(), |age| format!("for {} s", age.as_secs()));
            State::Warning(format!("{whose} clock was not read {since}: the other stands in for it"))
        }
        _ => State::Failed("neither the database's nor the API server's clock can be read".to_owned()),
    };
    Check::new("clocks", state)
}

/// All checks, a line each, and what follows.
pub fn told(name: &str, checks: &[Check]) -> String {
    let passed = if checks.iter().all(Check::passed) { "passed" } else { "failed" };
    let lines: String = checks.iter().map(|check| format!("{check}\n")).collect();
    format!("{lines}{name} check {passed}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn well() -> Vitals {
        Vitals {
            notified: true,
            rows_read: Some(SECOND),
            poll: SECOND * 5,
            watches: [("watch-crs", Watch::Up), ("watch-vms", Watch::Up), ("watch-vmis", Watch::Up)],
            leads: true,
            lease_seen: Some(SECOND),
            lag: (0, Duration::ZERO),
            answered: None,
            clocks: [("the database's", Some(SECOND)), ("the API server's", Some(SECOND))],
            scanning: None,
            election: Some(SECOND),
            turn: Some(SECOND),
            queued: Duration::ZERO,
        }
    }

    fn failed(checks: &[Check]) -> Vec<&str> {
        checks.iter().filter(|check| !check.passed()).map(|check| check.name).collect()
    }

    #[test]
    fn each_trouble_fails_its_own_check_and_no_restart_is_asked_for() {
        let long = SECOND * 3600;
        let cases = [
            ("all is well", well(), vec![]),
            ("a standby with warm caches is ready", Vitals { leads: false, turn: None, ..well() }, vec![]),
            ("deaf, but polling", Vitals { notified: false, ..well() }, vec![]),
            ("the database is away", Vitals { notified: false, rows_read: Some(long), ..well() }, vec!["rows"]),
            ("it was never there", Vitals { rows_read: None, ..well() }, vec!["rows"]),
            ("rows are read seldom, as set", Vitals { rows_read: Some(long), poll: long, ..well() }, vec![]),
            (
                "a watch is cut",
                Vitals { watches: [("a", Watch::Cut(CUT)), ("b", Watch::Cut(long)), ("c", Watch::Unlisted)], ..well() },
                vec!["b", "c"],
            ),
            ("nobody can be elected", Vitals { leads: false, lease_seen: Some(long), ..well() }, vec!["leadership"]),
            ("nothing is written", Vitals { lag: (3, long), answered: Some(long), ..well() }, vec!["write-back"]),
            ("one row is locked", Vitals { lag: (1, long), answered: Some(SECOND), ..well() }, vec![]),
            ("one clock is away", Vitals { clocks: [("a", None), ("b", Some(SECOND))], ..well() }, vec![]),
            ("both are", Vitals { clocks: [("a", None), ("b", Some(long))], ..well() }, vec!["clocks"]),
        ];
        for (case, vitals, unready) in cases {
            assert_eq!(failed(&readiness(&vitals)), unready, "{case}");
            assert_eq!(failed(&liveness(&vitals)), [""; 0], "{case}");
        }
    }

    #[test]
    fn only_a_task_that_has_stopped_moving_asks_for_a_restart() {
        let long = SECOND * 3600;
        let cases = [
            ("an idle queue", Vitals { turn: Some(long), ..well() }, vec![]),
            ("a long queue that moves", Vitals { queued: long, ..well() }, vec![]),
            ("a standby takes nothing", Vitals { turn: None, queued: long, ..well() }, vec![]),
            ("no worker takes what waits", Vitals { turn: Some(long), queued: long, ..well() }, vec!["workers"]),
            ("the scan hangs", Vitals { scanning: Some(long), ..well() }, vec!["scan"]),
            ("the election hangs", Vitals { election: Some(long), ..well() }, vec!["election"]),
        ];
        for (case, vitals, dead) in cases {
            assert_eq!(failed(&liveness(&vitals)), dead, "{case}");
        }
    }

    #[test]
    fn it_is_told_as_the_api_server_tells_it() {
        let vitals = Vitals { notified: false, rows_read: None, ..well() };
        let told = told("readyz", &readiness(&vitals)[..3]);
        let wanted = "[+]listen ok: warning: notifications do not arrive: rows are looked at every second meanwhile\n\
                      [-]rows failed: the rows were not read yet\n[+]watch-crs ok\nreadyz check failed\n";
        assert_eq!(told, wanted);
    }

    #[test]
    fn a_clock_that_was_never_read_is_told_from_one_that_cannot_be_read_any_more() {
        for (age, since) in [(None, "yet"), (Some(SECOND * 61), "for 61 s")] {
            let told = readiness(&Vitals { clocks: [("mine", age), ("yours", Some(SECOND))], ..well() }).pop();
            let wanted = format!("[+]clocks ok: warning: mine clock was not read {since}: the other stands in for it");
            assert_eq!(told.map(|check| check.to_string()), Some(wanted));
        }
    }
}
