//! A daemon as a model: the real caches, store, queue, outbox and decision, with every effect a step of its own,
//! so that anything may come between two of them.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use cyberdesk_operator::brake::{self, Verdict};
use cyberdesk_operator::cluster::Cache;
use cyberdesk_operator::database::outbox::{Answer, Outbox};
use cyberdesk_operator::database::store::{Remembered, Store};
use cyberdesk_operator::fleet::Fleet;
use cyberdesk_operator::lease::Term;
use cyberdesk_operator::model::{Cr, Now, Row, Seen, Silence, Vm, Vmi};
use cyberdesk_operator::names::Key;
use cyberdesk_operator::plan::{Action, CreateFailure, Plan, View, plan};
use cyberdesk_operator::queue::{Lane, Outcome, Queue};
use cyberdesk_operator::template::Templates;
use futures::FutureExt;
use tokio::time::Instant;
use uuid::Uuid;

use crate::cluster::{Cluster, Kind};
use crate::database::Database;
use crate::planted::Bug;

/// As the real one: rounds before a desktop waits for its turn again.
const ROUNDS: usize = 8;
/// VMs that KubeVirt has yet to start, so few that others have to wait.
const MOST_UNSTARTED: usize = 2;

/// To be tried again after the back-off.
pub(crate) const FAILED: Outcome = Outcome::Failed { at_least: Duration::ZERO, deadline: None };

/// What a process knows. All of it goes when it crashes.
pub(crate) struct Daemon {
    pub(crate) crs: Mirror<Cr>,
    pub(crate) vms: Mirror<Vm>,
    pub(crate) vmis: Mirror<Vmi>,
    pub(crate) store: Store,
    pub(crate) queue: Queue,
    pub(crate) outbox: Outbox,
    pub(crate) failures: HashMap<Key, CreateFailure>,
    fleet: Fleet,
    /// For how long the database has not answered it.
    pub(crate) silence: Silence,
    pub(crate) turns: Vec<Turn>,
    /// Its term, and until when it may write to the cluster.
    pub(crate) term: Option<(Term, Instant)>,
    /// The term is known to the database.
    pub(crate) fenced_in: bool,
    /// How database and cluster stand to each other.
    pub(crate) pair: Pair,
    /// The only database that connections may lead to, and no earlier state of it.
    pub(crate) expected: Option<(brake::Database, i64)>,
    /// The database whose desktops it serves.
    database_id: Option<Uuid>,
    orphans: HashMap<Key, Instant>,
    /// Whether new desktops wait, as it last read it.
    paused: bool,
    bug: Option<Bug>,
}

/// As the real one, and what of it is still to be written down.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Pair {
    #[default]
    Unjudged,
    /// To be written down on both sides; whether a person has confirmed it, whether the rows count meanwhile, and whether
    /// the brake holds until then.
    Agreed {
        confirmed: bool,
        right: bool,
        braked: bool,
    },
    Right,
    /// A person is asked for this.
    Braked(String),
}

/// How long what has no row is left alone.
const GRACE: Duration = Duration::from_secs(60);

/// A cache and how far its watch has come.
pub(crate) struct Mirror<T> {
    pub(crate) cache: Cache<T>,
    at: usize,
    listed: bool,
}

/// One key being worked on.
pub(crate) struct Turn {
    pub(crate) key: Key,
    lane: Lane,
    pub(crate) actions: VecDeque<Action>,
    /// When it is due, by the look that led to them.
    deadline: Option<Instant>,
    pub(crate) live: Option<(Seen<Vm>, Seen<Vmi>)>,
    pub(crate) told: bool,
    /// It was seen to be paused; and new ones to wait.
    pub(crate) held: bool,
    pub(crate) waits: bool,
    rounds: usize,
}

impl<T: Clone + PartialEq> Mirror<T> {
    fn new() -> Self {
        Self { cache: Cache::default(), at: 0, listed: false }
    }

    /// Lists all, and watches on from there.
    pub(crate) fn list(&mut self, kind: &Kind<T>, queue: &Queue) {
        let listed = |(key, (version, object)): (&Key, &(u64, T))| (key.clone(), (*version, Arc::new(object.clone())));
        let objects = kind.objects.iter().map(listed).collect();
        wake(self.cache.replace(objects), queue);
        (self.at, self.listed) = (kind.changes.len(), true);
    }

    /// Takes the next event of the watch.
    pub(crate) fn hear(&mut self, kind: &Kind<T>, queue: &Queue) -> bool {
        let Some(change) = kind.changes.get(self.at).filter(|_| self.listed) else { return false };
        self.at += 1;
        match &change.object {
            Some(object) => {
                if self.cache.put(&change.key, change.version, object.clone()) {
                    queue.wake(&change.key, Lane::Makes);
                }
            }
            None => {
                self.cache.remove(&change.key, change.version);
                queue.wake(&change.key, Lane::Ends);
            }
        }
        true
    }

    /// An answer to a call of our own.
    pub(crate) fn learn(&self, kind: &Kind<T>, key: &Key) -> Seen<T> {
        match kind.objects.get(key) {
            Some((version, object)) => {
                self.cache.learn(key, *version, object.clone());
                Seen::Present(object.clone())
            }
            None => {
                self.cache.forget(key);
                Seen::Absent
            }
        }
    }
}

impl Daemon {
    pub(crate) fn start(bug: Option<Bug>) -> Self {
        Self {
            bug,
            crs: Mirror::new(),
            vms: Mirror::new(),
            vmis: Mirror::new(),
            store: Store::default(),
            queue: Queue::default(),
            outbox: Outbox::default(),
            failures: HashMap::new(),
            fleet: Fleet::new(MOST_UNSTARTED),
            silence: Silence::default(),
            turns: vec![],
            term: None,
            fenced_in: false,
            pair: Pair::default(),
            expected: None,
            database_id: None,
            orphans: HashMap::new(),
            paused: false,
        }
    }

    /// Whether it may write to the cluster.
    pub(crate) fn leads(&self) -> bool {
        self.term.is_some_and(|(_, until)| Instant::now() < until)
    }

    pub(crate) fn begin(&mut self, term: Term, until: Instant, bound_to: Option<Uuid>) {
        self.database_id = bound_to.or(self.database_id);
        self.term = Some((term, until));
        self.fenced_in = false;
        self.pair = Pair::default();
        self.orphans.clear();
        self.store.reset();
        self.fleet.begin();
        self.failures.clear();
        self.queue.open();
        self.wake_cluster();
    }

    /// Whether its connections lead to this database.
    pub(crate) fn admits(&self, database: &Database) -> bool {
        self.expected.as_ref().is_none_or(|(known, epoch)| *known == database.itself && *epoch <= database.epoch())
    }

    /// Whether rows may be read of this database.
    pub(crate) fn trusts(&self, database: &Database) -> bool {
        matches!(self.pair, Pair::Right | Pair::Agreed { right: true, .. }) && self.admits(database)
    }

    /// Takes in a verdict on this database. What it holds of rows may be another's.
    pub(crate) fn judged(&mut self, verdict: Verdict, database: &Database, asked: impl Fn(brake::Cause) -> String) {
        let braked = self.is_braked();
        if braked && verdict == Verdict::Bound {
            self.wake_cluster();
        }
        self.pair = match verdict {
            Verdict::Braked(cause) => {
                self.store.reset();
                while !self.turns.is_empty() {
                    // Calls in flight are over long before a person has read what is asked.
                    self.end(0, FAILED);
                }
                Pair::Braked(asked(cause))
            }
            verdict => {
                self.expected = Some((database.itself.clone(), database.epoch()));
                self.database_id = Some(database.itself.id);
                let confirmed = verdict == Verdict::Bind { confirmed: true };
                let right = verdict == Verdict::Bound;
                Pair::Agreed { confirmed, right, braked: braked && !right }
            }
        };
        self.fenced_in = false;
    }

    pub(crate) fn is_braked(&self) -> bool {
        matches!(self.pair, Pair::Braked(_) | Pair::Agreed { braked: true, .. })
    }

    /// What was agreed on is written down on both sides.
    pub(crate) fn bound(&mut self) {
        if self.is_braked() {
            self.wake_cluster();
        }
        self.pair = Pair::Right;
    }

    fn wake_cluster(&self) {
        for keys in [self.crs.cache.keys(), self.vms.cache.keys(), self.vmis.cache.keys()] {
            wake(keys, &self.queue);
        }
    }

    pub(crate) fn lose(&mut self) {
        self.term = None;
        self.pair = Pair::default();
        self.turns.clear();
        self.queue.close();
    }

    pub(crate) fn resync(&mut self, database: &Database) {
        self.paused = database.paused;
        let mut doubtful = self.store.take_in_all(database.live(), &self.queue);
        doubtful.sort();
        for (id, known) in doubtful {
            match database.row(id) {
                Some(row) => self.store.take_in_doubtful(vec![row], &[(id, known)], &self.queue),
                None => self.store.forget(id),
            }
        }
        self.wake_cluster();
    }

    pub(crate) fn scan(&self, database: &Database) {
        self.store.take_in(database.dirty(), &self.queue);
    }

    /// Whether all that it needs to decide has been listed.
    fn ready(&self) -> bool {
        self.crs.listed && self.vms.listed && self.vmis.listed
    }

    /// Takes the next key, and looks at it.
    pub(crate) fn take(&mut self, database: Option<&Database>, templates: &Templates, now: Now) -> Option<Key> {
        if !self.leads() || !self.ready() {
            return None;
        }
        let (key, lane) = self.queue.next(|| Lane::Looks).now_or_never()?;
        let turn = Turn {
            key: key.clone(),
            lane,
            actions: VecDeque::new(),
            deadline: None,
            live: None,
            told: false,
            held: false,
            waits: false,
            rounds: 0,
        };
        self.turns.push(turn);
        self.look(self.turns.len() - 1, database, templates, now);
        Some(key)
    }

    /// One look and plan of a turn; it ends if nothing is to be done.
    pub(crate) fn look(&mut self, at: usize, database: Option<&Database>, templates: &Templates, now: Now) {
        let turn = &mut self.turns[at];
        turn.rounds += 1;
        let live = turn.live.take();
        if turn.rounds > ROUNDS {
            return self.end(at, FAILED);
        }
        let key = turn.key.clone();
        let cr = self.crs.cache.get(&key);
        let is_live = live.is_some();
        let (vm, vmi) = live.unwrap_or_else(|| (self.vms.cache.get(&key), self.vmis.cache.get(&key)));
        let known = !matches!((&cr, &vm, &vmi), (Seen::Absent, Seen::Absent, Seen::Absent));
        let mut unread = false;
        let row = match (self.store.get(&key), database) {
            (Remembered::Row(row), _) => Seen::Present(*row),
            (Remembered::NotARow, _) => Seen::Absent,
            (Remembered::Nothing(_), _) if !self.store.is_complete() => Seen::Unknown,
            (Remembered::Nothing(_), _) if !known => Seen::Absent,
            (Remembered::Nothing(id), Some(database)) => self.store.found(id, database.row(id)),
            (Remembered::Nothing(_), None) => {
                unread = true;
                Seen::Unknown
            }
        };
        let row = row.map(|row| self.outbox.with_its_vm(row));
        let by_row = row.present().is_some_and(|row| row.paused && !row.ended);
        let held = by_row || cr.present().is_some_and(|cr| cr.paused);
        let (row, cr) = match self.bug {
            Some(Bug::MadeAgain) => forgetful(row, cr),
            Some(Bug::PauseNotHeeded) => heedless(row, cr),
            _ => (row, cr),
        };
        let failure = self.failures.get(&key);
        let fleet = &self.fleet.standing(&key, now.cluster);
        let rest = self.orphans.get(&key).map_or(GRACE, |since| GRACE.saturating_sub(since.elapsed()));
        let view = View {
            key: &key,
            row,
            cr,
            vm,
            vmi,
            live: is_live,
            silence: self.silence,
            failure,
            fleet,
            paused: self.paused && self.bug != Some(Bug::NeverWaits),
            braked: self.is_braked(),
            database: self.database_id,
            orphan_rest: rest,
            templates,
        };
        let Plan { actions, wait, progress, ready, orphan } = plan(&view, now);
        match orphan {
            Some(_) => drop(self.orphans.entry(key.clone()).or_insert_with(Instant::now)),
            None => drop(self.orphans.remove(&key)),
        }
        wake(self.fleet.note(&key, progress, ready, now.cluster), &self.queue);
        let deadline = wait.map(|wait| Instant::now() + wait);
        if actions.is_empty() {
            let outcome = match unread {
                true => Outcome::Failed { at_least: Duration::ZERO, deadline },
                false => Outcome::Settled(deadline),
            };
            return self.end(at, outcome);
        }
        let turn = &mut self.turns[at];
        (turn.actions, turn.deadline) = (actions.into(), deadline);
        (turn.held, turn.waits) = (held, self.paused);
    }

    /// All actions of a round are done: either it waits for an answer, or it is looked at again.
    pub(crate) fn round_done(&mut self, at: usize, database: Option<&Database>, templates: &Templates, now: Now) {
        let turn = &self.turns[at];
        if turn.told {
            return self.end(at, Outcome::Settled(turn.deadline));
        }
        self.look(at, database, templates, now);
    }

    pub(crate) fn end(&mut self, at: usize, outcome: Outcome) {
        let turn = self.turns.remove(at);
        self.queue.done(&turn.key, turn.lane, outcome);
    }

    /// Sends what waits to be told. False: there was nothing, or it was not allowed.
    pub(crate) fn write_back(
        &mut self,
        database: &mut Database,
        now: Now,
        locked: impl Fn(uuid::Uuid) -> bool,
    ) -> bool {
        let Some((term, _)) = self.term else { return false };
        if !self.fenced_in {
            self.fenced_in = database.acquire(term);
            return self.fenced_in;
        }
        if self.pair != Pair::Right {
            return false;
        }
        if self.outbox.is_empty() {
            return false;
        }
        for id in self.outbox.next_expiries(Instant::now()) {
            let answer = if locked(id) { Ok("busy") } else { database.expire(term, id, now.database) };
            let Ok(word) = answer else { return self.fenced_off() };
            if self.outbox.expiry_answered(id, Answer::of(word)) {
                self.store.take_in(database.row(id).into_iter().collect(), &self.queue);
                self.queue.wake(&Key::of_row(id), Lane::Ends);
            }
        }
        for report in self.outbox.next_reports(Instant::now()) {
            let answer = if locked(report.id) { Ok("busy") } else { database.report(term, &report) };
            let Ok(word) = answer else { return self.fenced_off() };
            let answer = Answer::of(word);
            match answer {
                Answer::Busy => (),
                Answer::Final => self.store.confirmed(&report, &self.queue),
                Answer::Stale => {
                    self.store.forget(report.id);
                    self.store.take_in(database.row(report.id).into_iter().collect(), &self.queue);
                    self.queue.wake(&Key::of_row(report.id), Lane::Makes);
                }
            }
            self.outbox.answered(&report, answer);
        }
        true
    }

    fn fenced_off(&mut self) -> bool {
        self.fenced_in = false;
        self.pair = Pair::default();
        true
    }

    /// What a live look at VM and VMI answers.
    pub(crate) fn look_live(&self, cluster: &Cluster, key: &Key) -> (Seen<Vm>, Seen<Vmi>) {
        (self.vms.learn(&cluster.vms, key), self.vmis.learn(&cluster.vmis, key))
    }
}

/// Wakes these in an order that does not change from run to run.
fn wake(mut keys: Vec<Key>, queue: &Queue) {
    keys.sort();
    keys.iter().for_each(|key| queue.wake(key, Lane::Makes));
}

/// What a daemon sees that knows of no pause.
fn heedless(row: Seen<Row>, cr: Seen<Cr>) -> (Seen<Row>, Seen<Cr>) {
    let row = match row {
        Seen::Present(row) => Seen::Present(Row { paused: false, ..row }),
        other => other,
    };
    let cr = match cr {
        Seen::Present(cr) => Seen::Present(Cr { paused: false, ..cr }),
        other => other,
    };
    (row, cr)
}

/// What a daemon sees that remembers no VM.
fn forgetful(row: Seen<Row>, cr: Seen<Cr>) -> (Seen<Row>, Seen<Cr>) {
    let row = match row {
        Seen::Present(row) => Seen::Present(Row { vm_uid: None, ..row }),
        other => other,
    };
    let cr = match cr {
        Seen::Present(mut cr) => {
            cr.status.virtual_machine_ref = None;
            Seen::Present(cr)
        }
        other => other,
    };
    (row, cr)
}
