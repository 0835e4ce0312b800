//! Whether the database answers, as those see it who ask it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::SignedDuration;
use tokio::time::Instant;

/// Since when something has been asked and nothing answered. A refusal to connect is no answer, nor is a connection
/// that is accepted and stays silent.
#[derive(Debug, Default)]
pub(crate) struct Contact(Mutex<Option<Instant>>);

impl Contact {
    fn waiting_since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is being asked.
    pub(crate) fn asked(&self) {
        self.waiting_since().get_or_insert_with(Instant::now);
    }

    /// Something was answered. `more`: other things are still being asked.
    pub(crate) fn answered(&self, more: bool) {
        *self.waiting_since() = more.then(Instant::now);
    }

    /// For how long it has been silent. Zero: it answers, or nobody has asked.
    pub(crate) fn silence(&self) -> SignedDuration {
        let since = *self.waiting_since();
        let silence = since.map(|since| SignedDuration::try_from(since.elapsed()).unwrap_or(SignedDuration::MAX));
        silence.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_counts_from_the_first_question_since_the_last_answer() {
        let contact = Contact::default();
        let seconds = SignedDuration::from_secs;
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(contact.silence(), seconds(0), "nobody has asked");
        contact.asked();
        tokio::time::advance(Duration::from_secs(2)).await;
        contact.asked();
        assert_eq!(contact.silence(), seconds(2), "from the first question");
        contact.answered(true);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(contact.silence(), seconds(1), "there is more to answer");
        contact.answered(false);
        assert_eq!(contact.silence(), seconds(0));
    }
}
