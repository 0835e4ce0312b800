//! Kubernetes Events: what happened, told beside the object that it happened to (`kubectl describe`).

use std::sync::Arc;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::Semaphore;
use tracing::debug;

use crate::cluster::CALL_DEADLINE;
use crate::crd::{CyberdeskStatus, Phase};
use crate::names::MANAGER;
use crate::telemetry::chain;

/// Longest note that the API server takes, in bytes (`events.k8s.io/v1`).
const LONGEST_NOTE: usize = 1024;
/// Most Events on their way at once. What comes on top, while the API server does not keep up, is lost.
const AT_ONCE: usize = 256;

/// Tells what happened.
#[derive(Clone)]
pub struct Events {
    client: Client,
    reporter: Reporter,
    room: Arc<Semaphore>,
}

/// What is told of an object: one Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// Whether somebody may have to do something.
    pub kind: EventType,
    /// A stable word: a desktop's is its reason, or where there is none its phase.
    pub reason: String,
    /// A sentence.
    pub note: String,
}

impl News {
    /// What a desktop's CR tells when its status becomes another: once for each phase and reason.
    pub fn of_desktop(before: &CyberdeskStatus, after: &CyberdeskStatus) -> Option<Self> {
        let phase = after.phase?;
        if (before.phase, &before.reason) == (after.phase, &after.reason) {
            return None;
        }
        let words = after.message.clone().unwrap_or_default();
        let Some(reason) = after.reason.clone() else {
            let note = match (phase, &after.node) {
                (Phase::Running, Some(node)) => format!("its guest is ready, on node {node}"),
                (Phase::Running, None) => "its guest is ready".to_owned(),
                (Phase::Starting, _) => "its VirtualMachine is made, and the guest starts".to_owned(),
                _ => "what held it up is gone".to_owned(),
            };
            return Some(Self { kind: EventType::Normal, reason: format!("{phase:?}"), note });
        };
        let failed = after.end.as_ref().is_none_or(|end| end.phase == Phase::Error);
        let kind = if failed { EventType::Warning } else { EventType::Normal };
        let note = match phase {
            Phase::Stopping => format!("{words}; it is being ended"),
            Phase::Terminated | Phase::Error => format!("{words}; it is over"),
            Phase::Pending | Phase::Starting | Phase::Running => words,
        };
        Some(Self { kind, reason, note })
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("reporter", &self.reporter).finish_non_exhaustive()
    }
}

impl Events {
    /// Events reported by this instance of the operator, such as its pod's name.
    pub fn new(client: Client, instance: &str) -> Self {
        let reporter = Reporter { controller: MANAGER.to_owned(), instance: Some(instance.to_owned()) };
        Self { client, reporter, room: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Tells of one thing that happened to an object while `action` was done. An Event that cannot be written is
    /// lost: the object's own status is what counts.
    pub async fn tell(&self, about: &ObjectReference, action: &str, news: News) {
        let News { kind, reason, note } = news;
        let event = Event {
            type_: kind,
            reason: reason.clone(),
            action: action.to_owned(),
            note: Some(cut(&note).to_owned()),
            secondary: None,
        };
        // A recorder that lives on would take an event of the same reason for the first one again, and repeat that
        // one's note.
        let recorder = Recorder::new(self.client.clone(), self.reporter.clone());
        match tokio::time::timeout(CALL_DEADLINE, recorder.publish(&event, about)).await {
            Ok(Ok(())) => (),
            Ok(Err(error)) => debug!(reason, error = %chain(&error), "cannot write an Event"),
            Err(_) => debug!(reason, "cannot write an Event: no answer"),
        }
    }

    /// The same, without having anyone wait for it.
    pub fn tell_aside(&self, about: ObjectReference, action: &'static str, news: News) {
        let Ok(place) = self.room.clone().try_acquire_owned() else {
            return debug!(reason = news.reason, "an Event is lost: too many are on their way");
        };
        let events = self.clone();
        tokio::spawn(async move {
            events.tell(&about, action, news).await;
            drop(place);
        });
    }
}

fn cut(note: &str) -> &str {
    &note[..note.floor_char_boundary(LONGEST_NOTE)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_and_reason_of_a_desktop_is_told_once() {
        use crate::crd::End;
        let at = jiff::Timestamp::UNIX_EPOCH;
        let status = |phase, reason: Option<&str>| CyberdeskStatus {
            phase: Some(phase),
            reason: reason.map(str::to_owned),
            message: reason.map(|reason| format!("words of {reason}")),
            ..CyberdeskStatus::default()
        };
        let ends = |phase, end, reason: &str| CyberdeskStatus {
            end: Some(End { phase: end, reason: reason.to_owned(), message: None, at }),
            ..status(phase, Some(reason))
        };
        let life = [
            (status(Phase::Starting, None), Some((EventType::Normal, "Starting"))),
            (status(Phase::Starting, Some("unschedulable")), Some((EventType::Warning, "unschedulable"))),
            (status(Phase::Starting, Some("unschedulable")), None),
            (status(Phase::Running, None), Some((EventType::Normal, "Running"))),
            (CyberdeskStatus { node: Some("n".into()), ..status(Phase::Running, None) }, None),
            (ends(Phase::Stopping, Phase::Terminated, "timeout"), Some((EventType::Normal, "timeout"))),
            (ends(Phase::Terminated, Phase::Terminated, "timeout"), Some((EventType::Normal, "timeout"))),
            (ends(Phase::Stopping, Phase::Error, "guest-crashed"), Some((EventType::Warning, "guest-crashed"))),
        ];
        let mut before = CyberdeskStatus::default();
        for (after, told) in life {
            let news = News::of_desktop(&before, &after);
            let seen = news.as_ref().map(|news| (news.kind, news.reason.as_str()));
            assert_eq!(seen, told, "{before:?} -> {after:?}");
            before = after;
        }
    }

    #[test]
    fn a_note_is_cut_between_characters() {
        assert_eq!(cut("short"), "short");
        let long = "é".repeat(LONGEST_NOTE);
        assert_eq!(cut(&long).len(), LONGEST_NOTE);
        assert_eq!(cut(&format!("a{long}")).len(), LONGEST_NOTE - 1);
    }
}
