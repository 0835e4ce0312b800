//! What goes wrong with which request.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::Call;
use crate::gate::Gate;

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It is not passed on; this is the answer.
    Answer(Answer),
    /// It is passed on only after so long.
    Late(Duration),
    /// It is passed on, and nobody ever answers.
    Unanswered,
    /// It is passed on, and the connection breaks in the middle of the answer's body.
    CutAnswer,
    /// It waits at a gate, and so before anything has come of it.
    HeldBefore(Gate),
    /// It is passed on, and the answer waits at a gate that it never gets through.
    HeldAfter(Gate),
    /// A watch, also one that is on already, says nothing more: the socket lives, and nobody ends it.
    Silent,
    /// A watch, also one that is on already, tells bookmarks and loses everything else.
    BookmarksOnly,
    /// A watch, also one that is on already, is told in the stream that its version is too old (410), and ends.
    Expired,
    /// A watch, also one that is on already, breaks off.
    CutWatch,
}

impl Fault {
    pub(super) fn is_of_a_stream(&self) -> bool {
        matches!(self, Self::Silent | Self::BookmarksOnly | Self::Expired | Self::CutWatch)
    }
}

/// An answer in the API server's place.
#[derive(Clone, Debug)]
pub struct Answer {
    pub(super) code: u16,
    pub(super) reason: &'static str,
    pub(super) text: Option<&'static str>,
    pub(super) retry_after: Option<u32>,
}

impl Answer {
    /// A `Status`, as the API server answers a request that it has understood.
    pub fn status(code: u16, reason: &'static str) -> Self {
        Self { code, reason, text: None, retry_after: None }
    }

    /// Bare text, as it answers where no kind is served, and where it has too much to do.
    pub fn text(code: u16, text: &'static str) -> Self {
        Self { code, reason: "", text: Some(text), retry_after: None }
    }

    /// With a wish to be left alone for some seconds, in the header and, in a `Status`, in its details.
    pub fn retry_after(self, seconds: u32) -> Self {
        Self { retry_after: Some(seconds), ..self }
    }
}

type Applies = Box<dyn Fn(&Call) -> bool + Send + Sync>;

struct Rule {
    id: usize,
    left: Option<usize>,
    struck: usize,
    fault: Fault,
    applies: Applies,
}

/// All rules. The first that applies strikes.
pub(super) struct Rules {
    rules: Mutex<(usize, Vec<Rule>)>,
    changed: watch::Sender<()>,
}

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults: Vec<_> = self.rules().1.iter().map(|rule| (rule.id, rule.left, rule.fault.clone())).collect();
        f.debug_list().entries(faults).finish()
    }
}

impl Default for Rules {
    fn default() -> Self {
        Self { rules: Mutex::default(), changed: watch::Sender::new(()) }
    }
}

impl Rules {
    fn rules(&self) -> MutexGuard<'_, (usize, Vec<Rule>)> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, times: Option<usize>, fault: Fault, applies: Applies) -> usize {
        let mut rules = self.rules();
        rules.0 += 1;
        let id = rules.0;
        rules.1.push(Rule { id, left: times, struck: 0, fault, applies });
        drop(rules);
        self.changed.send_replace(());
        id
    }

    pub(super) fn remove(&self, id: usize) {
        self.rules().1.retain(|rule| rule.id != id);
        self.changed.send_replace(());
    }

    pub(super) fn struck(&self, id: usize) -> usize {
        self.rules().1.iter().find(|rule| rule.id == id).map_or(0, |rule| rule.struck)
    }

    pub(super) fn clear(&self) {
        self.rules().1.clear();
        self.changed.send_replace(());
    }

    /// The fault that strikes a request, or a watch that is on.
    pub(super) fn strike(&self, call: &Call, streaming: bool) -> Option<Fault> {
        let mut rules = self.rules();
        let rule = rules
            .1
            .iter_mut()
            .find(|rule| rule.left != Some(0) && rule.fault.is_of_a_stream() == streaming && (rule.applies)(call))?;
        rule.left = rule.left.map(|left| left - 1);
        rule.struck += 1;
        Some(rule.fault.clone())
    }

    /// Wakes the watches that are on, when the rules change.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}
