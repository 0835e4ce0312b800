//! The keyed queue: which desktop is looked at next, and when.
//!
//! Level-triggered: a key is in it or not, however often it is woken, and is never worked on twice at
//! once. A key woken while it is being worked on is looked at again. Four FIFO lanes: a burst of new
//! desktops must not delay a shutdown, nor a burst of shutdowns a deadline, nor a look at the whole fleet a new
//! desktop. A key that failed waits for its back-off, unless an end is wanted of it. One that is looked at all the
//! time, as something of it changes all the time, cools down between two looks: what a look costs, and writes, is
//! bounded by seconds and not by changes. Its ends are counted by themselves, so that no end waits for what a desktop
//! was looked at for before. The core is pure, with time as an argument; [`Queue`] adds the waiting.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::names::Key;

/// First and longest wait after failures in a row. It doubles from the one to the other.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);

/// Looks at one key in one lane that may come as fast as it is woken, and the time after which one of them is given back.
/// A desktop that starts is looked at some ten to twenty times within a second or two, and shall not wait; one that ends,
/// less often.
const BURST: u32 = 40;
const SPACING: Duration = Duration::from_secs(1);
/// While others are made all the time, every so-manieth place is given to one that is looked at because all are.
const LOOKS_SHARE: u32 = 8;

/// What a key waits for. The first goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// Its own time has come. A deadline takes one statement, and waits for no teardown of another's.
    Due,
    /// Something is to end: a deadline, a shutdown, a deletion.
    Ends,
    /// Something has changed, or is to be made.
    Makes,
    /// Nothing is known to have changed: it is looked at because all are, at a start or when all are read anew.
    Looks,
}

impl Lane {
    /// All, the first first.
    pub const ALL: [Self; 4] = [Self::Due, Self::Ends, Self::Makes, Self::Looks];

    /// The word for it in the figures.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Due => "due",
            Self::Ends => "ends",
            Self::Makes => "makes",
            Self::Looks => "looks",
        }
    }

    /// Whether it may come to something being made, for which there must be room.
    pub fn makes(self) -> bool {
        matches!(self, Self::Makes | Self::Looks)
    }
}

/// How a look at a key went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing to do before this instant, unless something wakes it.
    Settled(Option<Instant>),
    /// Something failed: look again after the back-off, and not before this long.
    Failed {
        /// Asked for by the other side, such as Retry-After. Heeded up to the longest back-off.
        at_least: Duration,
        /// A deadline of the key's own, which does not wait for the back-off.
        deadline: Option<Instant>,
    },
}

#[derive(Debug, Default)]
struct Entry {
    /// In this lane, ready to be taken.
    ready: Option<Lane>,
    /// Since when it has been ready, or was when it was taken.
    since: Option<Instant>,
    /// Being worked on; woken meanwhile for this.
    in_flight: Option<Option<Lane>>,
    /// Due at this instant, for a timer or a back-off. One that stands in a line may be, too.
    due: Option<(Instant, Lane)>,
    /// Looks that failed in a row. While there are any, only ends come before `due`.
    failures: u32,
    /// Looked at too often in this lane: until then, only what goes before it.
    cooling: Option<(Instant, Lane)>,
}

/// The queue without waiting.
#[derive(Debug, Default)]
pub struct Core {
    /// Each for itself: a map of all holds room for twice as many.
    entries: HashMap<Key, Box<Entry>>,
    due: VecDeque<Key>,
    ends: VecDeque<Key>,
    makes: VecDeque<Key>,
    looks: VecDeque<Key>,
    /// Makes that were taken since the last look.
    makes_in_a_row: u32,
    timers: BTreeSet<(Instant, Key)>,
    cooling: BTreeSet<(Instant, Key)>,
    heat: Heat,
    open: bool,
}

impl Core {
    /// Takes keys in from now on. All that there are must be woken then.
    pub fn open(&mut self) {
        self.open = true;
    }

    /// Drops all keys, and takes none in: on a standby they would only gather.
    pub fn close(&mut self) {
        *self = Self::default();
    }

    /// Wakes a key.
    pub fn wake(&mut self, key: &Key, lane: Lane, now: Instant) {
        if !self.open {
            return;
        }
        let entry = self.entries.entry(key.clone()).or_default();
        if let Some(again) = &mut entry.in_flight {
            *again = Some(again.map_or(lane, |before| before.min(lane)));
            return;
        }
        let waits = entry.cooling.is_some_and(|(_, cooling)| cooling <= lane);
        if waits || entry.failures > 0 && lane.makes() {
            return; // its time comes, and looks at all there is to see then
        }
        self.make_ready(key, lane, now);
    }

    fn make_ready(&mut self, key: &Key, lane: Lane, now: Instant) {
        let entry = self.entries.entry(key.clone()).or_default();
        // A key that moves up stays in its last lane too; `take` passes over what is not its lane.
        if entry.ready.is_none_or(|before| lane < before) {
            if entry.ready.is_none() {
                entry.since = Some(now);
            }
            entry.ready = Some(lane);
            match lane {
                Lane::Due => self.due.push_back(key.clone()),
                Lane::Ends => self.ends.push_back(key.clone()),
                Lane::Makes => self.makes.push_back(key.clone()),
                Lane::Looks => self.looks.push_back(key.clone()),
            }
        }
    }

    /// A key is due at this instant at the latest, however long the line is that it stands in.
    pub fn due_by(&mut self, key: &Key, at: Instant) {
        let entry = self.entries.get(key);
        let is_in_flight = entry.is_some_and(|entry| entry.in_flight.is_some());
        let is_sooner = entry.and_then(|entry| entry.due).is_none_or(|(before, _)| at < before);
        if self.open && !is_in_flight && is_sooner {
            self.set_timer(key, at, Lane::Due);
        }
    }

    fn set_timer(&mut self, key: &Key, at: Instant, lane: Lane) {
        let entry = self.entries.entry(key.clone()).or_default();
        if let Some((before, _)) = entry.due.replace((at, lane)) {
            self.timers.remove(&(before, key.clone()));
        }
        self.timers.insert((at, key.clone()));
    }

    /// Takes the next key to work on, if one is due: from no lane after `last`.
    pub fn take(&mut self, now: Instant, last: Lane) -> Option<(Key, Lane)> {
        while let Some((at, key)) = self.timers.first().cloned().filter(|(at, _)| *at <= now) {
            let due = self.entries.get_mut(&key).and_then(|entry| entry.due.take());
            let lane = due.map_or(Lane::Makes, |(_, lane)| lane);
            self.timers.remove(&(at, key.clone()));
            self.make_ready(&key, lane, at);
        }
        while let Some((at, key)) = self.cooling.first().cloned().filter(|(at, _)| *at <= now) {
            let lane = self.stop_cooling(&key).unwrap_or(Lane::Makes);
            self.make_ready(&key, lane, at);
        }
        self.heat.sweep(now);
        let makes_first = self.makes_in_a_row < LOOKS_SHARE - 1;
        let (third, fourth) = if makes_first { (Lane::Makes, Lane::Looks) } else { (Lane::Looks, Lane::Makes) };
        for lane in [Lane::Due, Lane::Ends, third, fourth].into_iter().filter(|lane| *lane <= last) {
            let queue = match lane {
                Lane::Due => &mut self.due,
                Lane::Ends => &mut self.ends,
                Lane::Makes => &mut self.makes,
                Lane::Looks => &mut self.looks,
            };
            while let Some(key) = queue.pop_front() {
                let entry = self.entries.get_mut(&key).filter(|entry| entry.ready == Some(lane));
                let Some(entry) = entry else { continue };
                entry.ready = None;
                if let Err(until) = self.heat.look(&key, lane, now) {
                    if let Some((before, _)) = entry.cooling.replace((until, lane)) {
                        self.cooling.remove(&(before, key.clone()));
                    }
                    self.cooling.insert((until, key));
                    continue;
                }
                entry.in_flight = Some(None);
                if let Some((at, _)) = entry.due.take() {
                    self.timers.remove(&(at, key.clone()));
                }
                self.stop_cooling(&key);
                match lane {
                    Lane::Due | Lane::Ends => (),
                    Lane::Makes => self.makes_in_a_row = self.makes_in_a_row.saturating_add(1),
                    Lane::Looks => self.makes_in_a_row = 0,
                }
                return Some((key, lane));
            }
        }
        None
    }

    /// Whoever looks at it now sees what it was to be looked at for.
    fn stop_cooling(&mut self, key: &Key) -> Option<Lane> {
        let (until, lane) = self.entries.get_mut(key)?.cooling.take()?;
        self.cooling.remove(&(until, key.clone()));
        Some(lane)
    }

    /// Whether the key that is being worked on may be looked at once more in the same turn. It may not if it is hot:
    /// it is looked at again when it has cooled down.
    pub fn another_look(&mut self, key: &Key, lane: Lane, now: Instant) -> bool {
        let may = self.heat.look(key, lane, now).is_ok();
        if !may {
            self.wake(key, lane, now);
        }
        may
    }

    /// Ends the work on a key. `jitter` in 0..1 spreads the back-off over half of it.
    pub fn done(&mut self, key: &Key, lane: Lane, outcome: Outcome, now: Instant, jitter: f64) {
        let Some(entry) = self.entries.get_mut(key) else {
            return;
        };
        let again = entry.in_flight.take().flatten();
        match outcome {
            Outcome::Settled(at) => {
                entry.failures = 0;
                match (again, at) {
                    (None, None) => drop(self.entries.remove(key)),
                    (again, at) => {
                        // Its deadline holds while it stands in a line, or cools down.
                        at.into_iter().for_each(|at| self.set_timer(key, at, Lane::Due));
                        again.into_iter().for_each(|lane| self.make_ready(key, lane, now));
                    }
                }
            }
            Outcome::Failed { at_least, deadline } => {
                // An end that was wanted meanwhile has seen no failure of its own.
                let failures = if again == Some(Lane::Ends) { 0 } else { entry.failures };
                // Those who were asked the same shall not all come back at the same time.
                let wish = at_least.min(LONGEST_BACKOFF).mul_f64(1.0 + 0.5 * jitter.clamp(0.0, 1.0));
                let retry = now + backoff(failures, jitter).max(wish);
                entry.failures += 1;
                match deadline.filter(|deadline| *deadline <= retry) {
                    Some(deadline) => self.set_timer(key, deadline, Lane::Due),
                    None => self.set_timer(key, retry, again.unwrap_or(lane).min(lane).max(Lane::Ends)),
                }
                if again == Some(Lane::Ends) && lane.makes() {
                    self.make_ready(key, Lane::Ends, now);
                }
            }
        }
    }

    /// When the next timer is due.
    pub fn next_timer(&self) -> Option<Instant> {
        [&self.timers, &self.cooling].into_iter().filter_map(|timers| timers.first()).map(|(at, _)| *at).min()
    }

    /// Whether the last look at this key failed too.
    pub fn has_failed(&self, key: &Key) -> bool {
        self.entries.get(key).is_some_and(|entry| entry.failures > 0)
    }

    /// Keys ready to be worked on in this lane, and since when the first of them is.
    pub fn waiting(&self, lane: Lane) -> (usize, Option<Instant>) {
        let ready = self.entries.values().filter(|entry| entry.ready == Some(lane));
        ready.fold((0, None), |(depth, oldest), entry| (depth + 1, oldest.into_iter().chain(entry.since).min()))
    }

    /// When the key that is being worked on became ready.
    pub fn woken(&self, key: &Key) -> Option<Instant> {
        self.entries.get(key)?.since
    }
}

/// How often each key was looked at of late in each lane: when it will be as if it never was. Those of whom it already
/// is are forgotten.
#[derive(Debug, Default)]
struct Heat {
    cool_at: HashMap<(Key, Lane), Instant>,
    swept: Option<Instant>,
}

impl Heat {
    /// Counts a look, or says when there may be one. A deadline comes once, and waits for nothing.
    fn look(&mut self, key: &Key, lane: Lane, now: Instant) -> Result<(), Instant> {
        if lane == Lane::Due {
            return Ok(());
        }
        let cool_at = self.cool_at.entry((key.clone(), lane)).or_insert(now);
        let credit = SPACING * (BURST - 1);
        if *cool_at > now + credit {
            return Err(*cool_at - credit);
        }
        *cool_at = now.max(*cool_at) + SPACING;
        Ok(())
    }

    /// Forgets who is cool, now and then.
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_none_or(|swept| now >= swept + SPACING) {
            self.cool_at.retain(|_, cool_at| *cool_at > now);
            self.swept = Some(now);
        }
    }
}

fn backoff(failures: u32, jitter: f64) -> Duration {
    let longest = FIRST_BACKOFF.saturating_mul(2_u32.saturating_pow(failures)).min(LONGEST_BACKOFF);
    longest.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0))
}

/// The queue that the sources wake and the workers wait on.
#[derive(Debug, Default)]
pub struct Queue {
    core: Mutex<Core>,
    changed: Notify,
}

impl Queue {
    fn core(&self) -> std::sync::MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes keys in from now on. All that there are must be woken then.
    pub fn open(&self) {
        self.core().open();
    }

    /// Drops all keys, and takes none in: on a standby they would only gather.
    pub fn close(&self) {
        self.core().close();
    }

    /// Wakes a key.
    pub fn wake(&self, key: &Key, lane: Lane) {
        self.core().wake(key, lane, Instant::now());
        self.changed.notify_one();
    }

    /// A key is due at this instant at the latest, however long the line is that it stands in.
    pub fn due_by(&self, key: &Key, at: Instant) {
        self.core().due_by(key, at);
        self.changed.notify_one();
    }

    /// Waits for the next key, of no lane after the last that there is `room` for.
    pub async fn next(&self, room: impl Fn() -> Lane) -> (Key, Lane) {
        loop {
            let timer = {
                let mut core = self.core();
                if let Some(taken) = core.take(Instant::now(), room()) {
                    return taken;
                }
                core.next_timer()
            };
            let due = async {
                match timer {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            // `notify_one` keeps a wake that comes between the look above and the wait here.
            tokio::select! {
                () = self.changed.notified() => (),
                () = due => (),
            }
        }
    }

    /// Whether the key that is being worked on may be looked at once more in the same turn. If not, it comes again.
    pub fn another_look(&self, key: &Key, lane: Lane) -> bool {
        self.core().another_look(key, lane, Instant::now())
    }

    /// Ends the work on a key.
    pub fn done(&self, key: &Key, lane: Lane, outcome: Outcome) {
        // By the key, so that keys spread, and a simulation's next run goes as the last.
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let jitter = f64::from(hasher.finish() as u8) / 255.0;
        self.core().done(key, lane, outcome, Instant::now(), jitter);
        self.changed.notify_one();
    }

    /// Keys ready to be worked on in this lane, and since when the first of them is.
    pub fn waiting(&self, lane: Lane) -> (usize, Option<Instant>) {
        self.core().waiting(lane)
    }

    /// Whether the last look at this key failed too.
    pub fn has_failed(&self, key: &Key) -> bool {
        self.core().has_failed(key)
    }

    /// When the key that is being worked on became ready: what came meanwhile is later.
    pub fn woken(&self, key: &Key) -> Option<Instant> {
        self.core().woken(key)
    }
}

#[cfg(test)]
mod tests;
