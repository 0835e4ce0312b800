//! Desktops in the cluster whose row the database does not know: since when, told once each.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::EventType;
use tokio::time::Instant;
use tracing::warn;

use super::Operator;
use crate::events::News;
use crate::names::Key;
use crate::plan::{Orphan, View};

/// Since when each was seen without a row, by this leader: a new one counts anew, which can only be late.
#[derive(Debug, Default)]
pub(super) struct Orphans(HashMap<Key, (Orphan, Instant)>);

impl Orphans {
    /// How much longer this one is left alone.
    pub(super) fn rest(&self, key: &Key, grace: Duration) -> Duration {
        self.0.get(key).map_or(grace, |(_, since)| grace.saturating_sub(since.elapsed()))
    }

    /// Takes in what one was found to be. Tells whether that is news.
    fn note(&mut self, key: &Key, found: Option<Orphan>) -> bool {
        match found {
            Some(orphan) if self.0.get(key).is_some_and(|(known, _)| *known == orphan) => false,
            Some(orphan) => {
                self.0.insert(key.clone(), (orphan, Instant::now())).is_none_or(|(known, _)| known != orphan)
            }
            None => self.0.remove(key).is_some(),
        }
    }

    fn count(&self, of: Orphan) -> i64 {
        i64::try_from(self.0.values().filter(|(orphan, _)| *orphan == of).count()).unwrap_or(i64::MAX)
    }

    /// A new term: what was seen before is another leader's past.
    pub(super) fn begin(&mut self) {
        self.0.clear();
    }
}

impl Operator {
    /// Tells of an orphan or stranger, once, and counts them.
    pub(super) fn note_orphan(&self, view: &View<'_>, found: Option<Orphan>) {
        let mut orphans = self.orphans();
        if !orphans.note(view.key, found) {
            return;
        }
        self.metrics.orphans.set(orphans.count(Orphan::Ours));
        self.metrics.strangers.set(orphans.count(Orphan::Stranger));
        drop(orphans);
        let (reason, note) = match found {
            None => return,
            Some(Orphan::Ours) => {
                let rest = humane(self.orphan_grace);
                (
                    "Orphaned",
                    format!("the database knows no row of this desktop, and no tombstone: it is removed in {rest}"),
                )
            }
            Some(Orphan::Stranger) => {
                ("Stranger", "it was made for a row of another database: it is left as it is".to_owned())
            }
        };
        warn!(desktop = %view.key, "{note}");
        if let Some(about) = self.about(view) {
            let news = News { kind: EventType::Warning, reason: reason.to_owned(), note };
            self.events.tell_aside(about, "Reconcile", news);
        }
    }

    /// What is there of a desktop to tell of.
    fn about(&self, view: &View<'_>) -> Option<ObjectReference> {
        let cr = view.cr.present().map(|cr| self.cluster.reference_to(view.key, &cr.uid));
        cr.or_else(|| view.vm.present().map(|vm| self.cluster.reference_to_vm(view.key, &vm.uid)))
    }
}

/// A time in words that a person reads at a glance.
fn humane(time: Duration) -> String {
    match time.as_secs() {
        seconds if seconds % 3600 == 0 => format!("{} h", seconds / 3600),
        seconds if seconds % 60 == 0 => format!("{} min", seconds / 60),
        seconds => format!("{seconds} s"),
    }
}
