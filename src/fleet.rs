//! The starts of all desktops together: whether one that does not get on is alone with it, or the cluster is the
//! trouble, and whether KubeVirt keeps up.
//!
//! A start passes through [`Stage`]s. One that waits at a stage for something that the cluster as a whole must do
//! (answer, admit, take notice) is held up by it for as long as no other start gets past that stage; once another
//! does, it is alone with its trouble. While any start is held up so, or the API server cannot be watched, no start
//! clock runs. All times are the API server's. Nothing here reads a clock or waits.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use jiff::{SignedDuration, Timestamp};

use crate::names::Key;

/// How far a start has come, as far as the cluster as a whole has a part in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// No VM yet.
    Wanted,
    /// The VM is made.
    Made,
    /// KubeVirt has taken notice of it.
    Noticed,
    /// The VMI is made.
    Instance,
    /// The pod is made. From here on it is about one node, one image, one guest.
    Pod,
}

/// How one start stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// How far it has come.
    pub stage: Stage,
    /// What the cluster as a whole keeps it waiting with.
    pub trouble: Option<Trouble>,
    /// Whether KubeVirt has yet to make its VMI, so that it counts against the cap.
    pub unstarted: bool,
    /// Whether it waits because too many others do.
    pub throttled: bool,
}

/// Something that the cluster as a whole does not do for a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Since when.
    pub since: Timestamp,
    /// The stage that it cannot reach.
    pub before: Stage,
    /// What is wrong, for people.
    pub words: String,
}

/// A time in which the cluster was the trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outage {
    /// Its beginning.
    pub from: Timestamp,
    /// Its end.
    pub until: Timestamp,
}

/// What the fleet tells one desktop.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    /// When a start last got past each stage.
    pub passed: BTreeMap<Stage, Timestamp>,
    /// The trouble of the cluster now: since when, and what it is.
    pub trouble: Option<(Timestamp, String)>,
    /// Those that are over, oldest first, apart from each other.
    pub outages: Vec<Outage>,
    /// Since when it waits because KubeVirt has enough to do. `None`: there is room for its VM.
    pub throttled: Option<Timestamp>,
}

impl Standing {
    /// Whether a trouble is the cluster's and not one start's own.
    pub fn is_shared(&self, trouble: &Trouble) -> bool {
        self.passed.get(&trouble.before).is_none_or(|passed| *passed < trouble.since)
    }

    /// How long the cluster was the trouble between these two instants, the present trouble included.
    pub fn stood_still(&self, from: Timestamp, until: Timestamp) -> SignedDuration {
        let open = self.trouble.as_ref().map_or(until, |(since, _)| *since);
        let past = self.outages.iter().map(|past| Outage { until: past.until.min(open), ..*past });
        past.chain([Outage { from: open, until }])
            .map(|span| span.until.min(until).duration_since(span.from.max(from)))
            .filter(SignedDuration::is_positive)
            .fold(SignedDuration::ZERO, |sum, span| sum + span)
    }
}

/// Outages that are remembered. One that is older has been told to every start that it held up.
const REMEMBERED: usize = 64;
/// A watch that was cut for less is no trouble: it is made anew every so often.
const CUT: SignedDuration = SignedDuration::from_secs(5);

/// The starts of all desktops that are on their way.
#[derive(Debug)]
pub struct Fleet {
    most_unstarted: usize,
    starts: HashMap<Key, Progress>,
    unstarted: usize,
    passed: BTreeMap<Stage, Timestamp>,
    troubles: BTreeSet<(Timestamp, Key)>,
    outages: Vec<Outage>,
    /// The watches that are cut, and since when.
    cut: BTreeMap<String, Timestamp>,
    /// Who waits for room, by ticket: first come, first served.
    tickets: HashMap<Key, (u64, Timestamp)>,
    line: BTreeMap<u64, Key>,
    last_ticket: u64,
}

impl Fleet {
    /// A fleet of which at most so many VMs at a time are waiting for their VMI.
    pub fn new(most_unstarted: usize) -> Self {
        Self {
            most_unstarted,
            starts: HashMap::new(),
            unstarted: 0,
            passed: BTreeMap::new(),
            troubles: BTreeSet::new(),
            outages: vec![],
            cut: BTreeMap::new(),
            tickets: HashMap::new(),
            line: BTreeMap::new(),
            last_ticket: 0,
        }
    }

    /// Forgets all starts, for each is about to be looked at anew. What is known of the cluster stays.
    pub fn begin(&mut self) {
        let fresh = Self::new(self.most_unstarted);
        let (cut, outages) = (std::mem::take(&mut self.cut), std::mem::take(&mut self.outages));
        *self = Self { cut, outages, ..fresh };
    }

    /// How things stand for this desktop.
    pub fn standing(&self, key: &Key, now: Timestamp) -> Standing {
        let watch = self.cut.values().min().filter(|since| now.duration_since(**since) >= CUT);
        let watch = watch.map(|since| (*since, "the API server cannot be watched".to_owned()));
        Standing {
            passed: self.passed.clone(),
            trouble: self.trouble().into_iter().chain(watch).min(),
            outages: self.outages.clone(),
            throttled: (!self.has_room(key)).then(|| self.tickets.get(key).map_or(now, |(_, since)| *since)),
        }
    }

    fn trouble(&self) -> Option<(Timestamp, String)> {
        let (since, key) = self.troubles.first()?;
        let words = self.starts.get(key)?.trouble.as_ref()?.words.clone();
        Some((*since, words))
    }

    fn has_room(&self, key: &Key) -> bool {
        let own = usize::from(self.starts.get(key).is_some_and(|start| start.unstarted));
        let free = self.most_unstarted.saturating_sub(self.unstarted - own);
        match self.tickets.get(key) {
            Some((ticket, _)) => self.line.keys().take(free).any(|first| first == ticket),
            None => self.line.len() < free,
        }
    }

    /// Takes in how a start stands; `None`: it is ready, over, or was none. Returns who should be looked at again.
    pub fn note(&mut self, key: &Key, progress: Option<Progress>, ready: bool, now: Timestamp) -> Vec<Key> {
        let before = self.starts.get(key).cloned();
        if before == progress && !ready {
            return vec![];
        }
        let stood = self.trouble().map(|(since, _)| since);
        let was_full = self.unstarted >= self.most_unstarted;
        self.replace(key, before.as_ref(), progress.as_ref(), now);
        let reached = if ready { Some(Stage::Pod) } else { progress.as_ref().map(|progress| progress.stage) };
        let mut wake = match (&before, reached) {
            (Some(before), Some(reached)) => self.pass(before.stage, reached, now),
            _ => vec![],
        };
        let stands = self.trouble();
        if stood.is_some() != stands.is_some() {
            wake.extend(self.starts.keys().filter(|other| *other != key).cloned());
        }
        if let (Some(from), None) = (stood, &stands) {
            self.remember(Outage { from, until: now });
        }
        let free = self.most_unstarted.saturating_sub(self.unstarted);
        if was_full || before.is_some_and(|before| before.throttled || before.unstarted) {
            wake.extend(self.line.values().take(free).filter(|other| *other != key).cloned());
        }
        wake
    }

    fn replace(&mut self, key: &Key, before: Option<&Progress>, progress: Option<&Progress>, now: Timestamp) {
        if let Some(trouble) = before.and_then(|before| before.trouble.as_ref()) {
            self.troubles.remove(&(trouble.since, key.clone()));
        }
        if let Some(trouble) = progress.and_then(|progress| progress.trouble.as_ref()) {
            self.troubles.insert((trouble.since, key.clone()));
        }
        let unstarted = |progress: Option<&Progress>| usize::from(progress.is_some_and(|it| it.unstarted));
        self.unstarted = self.unstarted + unstarted(progress) - unstarted(before);
        if !progress.is_some_and(|progress| progress.throttled) {
            if let Some((ticket, _)) = self.tickets.remove(key) {
                self.line.remove(&ticket);
            }
        } else if !self.tickets.contains_key(key) {
            self.last_ticket += 1;
            self.tickets.insert(key.clone(), (self.last_ticket, now));
            self.line.insert(self.last_ticket, key.clone());
        }
        match progress {
            Some(progress) => drop(self.starts.insert(key.clone(), progress.clone())),
            None => drop(self.starts.remove(key)),
        }
    }

    /// A start got from one stage to another: whoever waits for one between is alone with it, and is returned.
    fn pass(&mut self, from: Stage, to: Stage, now: Timestamp) -> Vec<Key> {
        for stage in [Stage::Made, Stage::Noticed, Stage::Instance, Stage::Pod] {
            if from < stage && stage <= to {
                self.passed.insert(stage, now);
            }
        }
        let is_passed = |(since, key): &&(Timestamp, Key)| {
            let trouble = self.starts.get(key).and_then(|start| start.trouble.as_ref());
            let passed = trouble.and_then(|trouble| self.passed.get(&trouble.before));
            passed.is_some_and(|passed| passed >= since)
        };
        let alone: Vec<(Timestamp, Key)> = self.troubles.iter().filter(is_passed).cloned().collect();
        self.troubles.retain(|trouble| !alone.contains(trouble));
        alone.into_iter().map(|(_, key)| key).collect()
    }

    fn remember(&mut self, outage: Outage) {
        let mut whole = outage;
        while let Some(last) = self.outages.pop_if(|last| last.until >= whole.from) {
            whole = Outage { from: last.from.min(whole.from), until: last.until.max(whole.until) };
        }
        self.outages.push(whole);
        if self.outages.len() > REMEMBERED {
            self.outages.remove(0);
        }
    }

    /// A watch is cut, or goes on. Returns who should be looked at again.
    pub fn watched(&mut self, kind: &str, well: bool, now: Timestamp) -> Vec<Key> {
        if !well {
            self.cut.entry(kind.to_owned()).or_insert(now);
            return vec![];
        }
        let Some(since) = self.cut.remove(kind) else { return vec![] };
        if !self.cut.is_empty() {
            self.cut.values_mut().for_each(|other| *other = since.min(*other));
            return vec![];
        }
        if now.duration_since(since) < CUT {
            return vec![];
        }
        self.remember(Outage { from: since, until: now });
        self.starts.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests;
