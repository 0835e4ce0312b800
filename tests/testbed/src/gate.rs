//! Holds what is on its way, so that its sender can be killed in between, and then lets it land or not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::watch;

/// What becomes of what is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on its way, whoever sent it and whether they still live.
    Lands,
    /// It never arrives.
    Lost,
}

/// A gate that is closed until somebody opens it. Clones are the same gate.
#[derive(Clone, Debug)]
pub struct Gate(Arc<State>);

#[derive(Debug)]
struct State {
    held: watch::Sender<Vec<String>>,
    verdict: watch::Sender<Option<Verdict>>,
    landed: AtomicUsize,
}

impl Default for Gate {
    fn default() -> Self {
        let (held, verdict) = (watch::Sender::new(vec![]), watch::Sender::new(None));
        Self(Arc::new(State { held, verdict, landed: AtomicUsize::new(0) }))
    }
}

impl Gate {
    /// Arrives under this name, and waits for the verdict.
    pub(crate) async fn pass(&self, name: &str) -> Verdict {
        self.0.held.send_modify(|held| held.push(name.to_owned()));
        let mut verdict = self.0.verdict.subscribe();
        let verdict = verdict.wait_for(Option::is_some).await.ok().and_then(|verdict| *verdict);
        verdict.unwrap_or(Verdict::Lost)
    }

    /// Who has arrived so far, in this order; one that tries again arrives again.
    pub fn held(&self) -> Vec<String> {
        self.0.held.borrow().clone()
    }

    /// One that was let through is done.
    pub(crate) fn land(&self) {
        self.0.landed.fetch_add(1, Ordering::Relaxed);
    }

    /// How many of those that were let through are done.
    pub fn landed(&self) -> usize {
        self.0.landed.load(Ordering::Relaxed)
    }

    /// Decides on all that is held, and all that will still come.
    pub fn open(&self, verdict: Verdict) {
        self.0.verdict.send_replace(Some(verdict));
    }
}
