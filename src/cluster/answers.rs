//! What became of a call to the API server, and what can be read from its refusal.

use std::time::Duration;

use super::CALL_DEADLINE;
use crate::plan::{Fault, is_quota};
use crate::telemetry::chain;

/// What became of a create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Created {
    /// It is there: made now, or already.
    There,
    /// The API server will never take this manifest, and says why.
    Refused(String),
}

/// What the API server says to a VM that it is shown and does not make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tried {
    /// It would take it, and warns of this.
    Taken(Vec<String>),
    /// It will never take it, and says why.
    Refused(String),
}

/// What became of a write to one object, meant by its UID or its version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It was written.
    There,
    /// It is not there any more, though another may have its name, or another version of it is there: nothing was
    /// written.
    Overtaken,
}

/// A call that was not done. The next look decides anew.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused it, or did not answer.
    #[error("{verb} {object}")]
    Call {
        /// What was tried.
        verb: &'static str,
        /// On what.
        object: String,
        /// Why not.
        #[source]
        source: Box<kube::Error>,
    },
    /// The API server will not take it as it is.
    #[error("{verb} {object}: {words}")]
    Refused {
        /// What was tried.
        verb: &'static str,
        /// On what.
        object: String,
        /// The API server's words.
        words: String,
    },
    /// This process does not lead, or no longer did before there was an answer: then it may have been done all the
    /// same.
    #[error("not done: this daemon does not lead")]
    NotLeading,
    /// No answer in time. It may have been done all the same.
    #[error("{verb} {object}: no answer within {} s", CALL_DEADLINE.as_secs())]
    Deadline {
        /// What was tried.
        verb: &'static str,
        /// On what.
        object: String,
    },
}

impl Error {
    /// How long the API server asks to be left alone (429 with Retry-After).
    pub fn retry_after(&self) -> Duration {
        let seconds = match self {
            Self::Call { source, .. } => match &**source {
                kube::Error::Api(status) => status.details.as_ref().map_or(0, |details| details.retry_after_seconds),
                _ => 0,
            },
            Self::Refused { .. } | Self::NotLeading | Self::Deadline { .. } => 0,
        };
        Duration::from_secs(u64::from(seconds))
    }

    fn status(&self) -> Option<(u16, &str)> {
        match self {
            Self::Call { source, .. } => match &**source {
                kube::Error::Api(status) => Some((status.code, status.message.as_str())),
                _ => None,
            },
            Self::Refused { .. } | Self::NotLeading | Self::Deadline { .. } => None,
        }
    }

    /// The API server's words, if it will never take what it was given.
    pub(super) fn refusal(&self) -> Option<String> {
        self.status().filter(|(code, _)| matches!(code, 400 | 413 | 422)).map(|(_, words)| words.to_owned())
    }

    /// Why a VM could not be made, in the words of whoever says so, and whose fault it is.
    pub fn fault(&self) -> (String, Fault) {
        match self.status() {
            Some((403, words)) if is_quota(words) => (words.to_owned(), Fault::Quota),
            Some((403, words)) => (words.to_owned(), Fault::Forbidden),
            // 404: the kind is not served, so KubeVirt is not there. 409: something of that name was there a moment ago.
            Some((_, words)) => (words.to_owned(), Fault::Outage),
            None => (chain(self).to_string(), Fault::Outage),
        }
    }

    pub(super) fn is(&self, code: u16) -> bool {
        self.status().is_some_and(|(found, _)| found == code)
    }

    /// Whether it says that there is no object of this name. Where its kind is not served, as before KubeVirt is
    /// installed, the answer is 404 too, and names none: that is no word about any object.
    pub(super) fn is_absent(&self, name: &str) -> bool {
        let Self::Call { source, .. } = self else { return false };
        let kube::Error::Api(status) = &**source else { return false };
        status.code == 404 && status.details.as_ref().is_some_and(|details| details.name == name)
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;
    use serde_json::{Value, json};

    use super::*;

    fn answered(status: Value) -> Error {
        let status: Status = serde_json::from_value(status).expect("it is a Status");
        Error::Call { verb: "get", object: "desk".to_owned(), source: Box::new(kube::Error::Api(status.boxed())) }
    }

    #[test]
    fn only_an_answer_that_names_the_object_says_that_it_is_not_there() {
        let named =
            json!({ "code": 404, "reason": "NotFound", "details": { "name": "vm", "kind": "virtualmachines" } });
        assert!(answered(named.clone()).is_absent("vm"));
        assert!(!answered(named).is_absent("other"));
        // The kind is not served: as bare text, which kube makes a Status of, and as a Status.
        assert!(!answered(json!({ "code": 404, "message": "404 page not found" })).is_absent("vm"));
        assert!(!answered(json!({ "code": 404, "reason": "NotFound", "details": {} })).is_absent("vm"));
        assert!(!answered(json!({ "code": 410, "details": { "name": "vm" } })).is_absent("vm"));
    }
}
