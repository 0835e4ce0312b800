//! Whether the database answers, as those see it who ask it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::SignedDuration;

/// How often the silence is counted.
pub(crate) const TICK: Duration = Duration::from_millis(250);

/// For how long something has been asked and nothing answered. A refusal to connect is no answer, nor is a connection
/// that is accepted and stays silent.
///
/// It is counted and not timed, so that only time counts in which an answer could have been heard: a daemon that stood
/// still for a minute, as in a cgroup that has used up its quota, finds on waking that the database has been silent for
/// one tick.
#[derive(Debug, Default)]
pub(crate) struct Contact(Mutex<Option<u32>>);

impl Contact {
    /// How many ticks have passed since something was asked.
    fn unanswered(&self) -> MutexGuard<'_, Option<u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is being asked.
    pub(crate) fn asked(&self) {
        self.unanswered().get_or_insert(0);
    }

    /// Something was answered. `more`: other things are still being asked.
    pub(crate) fn answered(&self, more: bool) {
        *self.unanswered() = more.then_some(0);
    }

    /// [`TICK`] has passed, or more.
    pub(crate) fn tick(&self) {
        if let Some(ticks) = self.unanswered().as_mut() {
            *ticks = ticks.saturating_add(1);
        }
    }

    /// For how long it has been silent, or for up to two [`TICK`]s longer. Zero: it answers, or nobody has asked.
    pub(crate) fn silence(&self) -> SignedDuration {
        // The first tick may have come as soon as it was asked.
        let whole = self.unanswered().unwrap_or_default().saturating_sub(1);
        SignedDuration::try_from(TICK.saturating_mul(whole)).unwrap_or(SignedDuration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_from_the_first_question_since_the_last_answer() {
        let contact = Contact::default();
        let ticks = |count: i32| (0..count).for_each(|_| contact.tick());
        let seconds = SignedDuration::from_secs;
        ticks(20);
        assert_eq!(contact.silence(), seconds(0), "nobody has asked");
        contact.asked();
        ticks(1);
        assert_eq!(contact.silence(), seconds(0), "it may have been asked just now");
        ticks(8);
        contact.asked();
        assert_eq!(contact.silence(), seconds(2), "from the first question");
        contact.answered(true);
        ticks(5);
        assert_eq!(contact.silence(), seconds(1), "there is more to answer");
        contact.answered(false);
        assert_eq!(contact.silence(), seconds(0));
    }
}
