//! Kubernetes Events: what happened, told beside the object that it happened to (`kubectl describe`).

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tracing::debug;

use crate::cluster::CALL_DEADLINE;
use crate::names::MANAGER;
use crate::telemetry::chain;

/// Longest note that the API server takes, in bytes (`events.k8s.io/v1`).
const LONGEST_NOTE: usize = 1024;

/// Tells what happened.
pub struct Events {
    client: Client,
    reporter: Reporter,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("reporter", &self.reporter).finish_non_exhaustive()
    }
}

impl Events {
    /// Events reported by this instance of the operator, such as its pod's name.
    pub fn new(client: Client, instance: &str) -> Self {
        Self { client, reporter: Reporter { controller: MANAGER.to_owned(), instance: Some(instance.to_owned()) } }
    }

    /// Tells of one thing that happened to an object. `reason` and `action` are single words for machines, `note`
    /// is a sentence. An Event that cannot be written is lost: the object's own status is what counts.
    pub async fn tell(&self, kind: EventType, about: &ObjectReference, reason: &str, action: &str, note: &str) {
        let event = Event {
            type_: kind,
            reason: reason.to_owned(),
            action: action.to_owned(),
            note: Some(cut(note).to_owned()),
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
}

fn cut(note: &str) -> &str {
    &note[..note.floor_char_boundary(LONGEST_NOTE)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_cut_between_characters() {
        assert_eq!(cut("short"), "short");
        let long = "é".repeat(LONGEST_NOTE);
        assert_eq!(cut(&long).len(), LONGEST_NOTE);
        assert_eq!(cut(&format!("a{long}")).len(), LONGEST_NOTE - 1);
    }
}
