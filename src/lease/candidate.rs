//! The election without the calls: whether the Lease may be taken, by what was seen of it and since when.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use tokio::time::Instant;
use tracing::warn;

use super::{LASTS, holder};
use crate::telemetry::chain;

/// What to do next in an election.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// Try to take the Lease.
    Take,
    /// Look what becomes of it, and again at this instant.
    Wait(Option<Instant>),
}

/// The election without the calls: what the Lease was last seen to say, and since when.
#[derive(Debug)]
pub(super) struct Candidate {
    identity: String,
    seen: Option<(Option<Lease>, Instant)>,
    /// Whether the Lease could be one that this process's predecessor left.
    fresh: bool,
    /// Since it last saw the Lease it was told that something does not work.
    trouble: bool,
}

impl Candidate {
    pub(super) fn new(identity: String, fresh: bool) -> Self {
        Self { identity, seen: None, fresh, trouble: false }
    }

    pub(super) fn lease(&self) -> Option<&Lease> {
        self.seen.as_ref()?.0.as_ref()
    }

    pub(super) fn observe(&mut self, lease: Option<Lease>, now: Instant) {
        self.trouble = false;
        // From the second look on, our name in it is another process's.
        self.fresh &= self.seen.is_none();
        let version = |lease: &Option<Lease>| {
            lease.as_ref().map(|lease| (lease.metadata.uid.clone(), lease.metadata.resource_version.clone()))
        };
        match &mut self.seen {
            Some((known, _)) if version(known) == version(&lease) => (),
            seen => *seen = Some((lease, now)),
        }
    }

    /// Tells of trouble, once until the Lease is seen again.
    pub(super) fn warn_once(&mut self, error: &(dyn std::error::Error + 'static), words: &str) {
        if !std::mem::replace(&mut self.trouble, true) {
            warn!(error = %chain(error), "{words}");
        }
    }

    pub(super) fn next(&self, now: Instant) -> Next {
        let Some((lease, since)) = &self.seen else { return Next::Wait(None) };
        let Some(lease) = lease else { return Next::Take };
        match holder(lease) {
            None => Next::Take,
            Some(holder) if holder == self.identity && self.fresh => Next::Take,
            Some(_) => {
                let lasts = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
                let lasts = lasts.and_then(|seconds| u64::try_from(seconds).ok()).map_or(LASTS, Duration::from_secs);
                let until = *since + lasts;
                if until <= now { Next::Take } else { Next::Wait(Some(until)) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::coordination::v1::LeaseSpec;
    use kube::api::ObjectMeta;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn lease(version: u64, holder: &str) -> Option<Lease> {
        let metadata = ObjectMeta { resource_version: Some(version.to_string()), ..ObjectMeta::default() };
        let holder = (!holder.is_empty()).then(|| holder.to_owned());
        let spec = LeaseSpec { holder_identity: holder, lease_duration_seconds: Some(12), ..LeaseSpec::default() };
        Some(Lease { metadata, spec: Some(spec) })
    }

    /// Whether a process that has just started takes the Lease that it saw so at these seconds.
    fn takes(sights: impl IntoIterator<Item = (u32, Option<Lease>)>, seconds: u32) -> bool {
        let start = Instant::now();
        let mut candidate = Candidate::new("me".to_owned(), true);
        for (at, lease) in sights {
            candidate.observe(lease, start + SECOND * at);
        }
        candidate.next(start + SECOND * seconds) == Next::Take
    }

    #[test]
    fn nobody_takes_what_was_not_seen() {
        assert!(!takes([], 100));
    }

    #[test]
    fn a_lease_that_is_free_or_not_there_is_taken_at_once() {
        assert!(takes([(0, None)], 0));
        assert!(takes([(0, lease(1, ""))], 0));
        assert!(takes([(0, lease(1, "other")), (1, lease(2, ""))], 1), "given back");
        assert!(takes([(0, lease(1, "other")), (1, None)], 1), "deleted");
    }

    #[test]
    fn a_lease_of_another_is_waited_for_from_when_it_was_last_seen_to_change() {
        assert!(!takes([(0, lease(1, "other"))], 11));
        assert!(takes([(0, lease(1, "other"))], 12));
        assert!(!takes([(0, lease(1, "other")), (10, lease(2, "other"))], 21), "it was renewed");
        assert!(takes([(0, lease(1, "other")), (10, lease(1, "other"))], 12), "to see it again is no renewal");
    }

    #[test]
    fn a_process_takes_its_predecessors_lease_at_once_but_not_that_of_a_later_namesake() {
        assert!(takes([(0, lease(1, "me"))], 0));
        assert!(!takes([(0, lease(1, "other")), (1, lease(2, "me"))], 2));
    }
}
