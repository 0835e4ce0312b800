//! How long this process may write, and the gate that every write of either side goes through.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::Term;

/// The lease, while it is ours.
#[derive(Debug, Default)]
pub struct Tenure(pub(super) watch::Sender<Option<Held>>);

/// A lease that is ours.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) term: Term,
    /// Nothing may be written after this.
    pub(super) until: Instant,
    /// As the API server last answered: a write to any other version is refused.
    pub(super) lease: Lease,
}

impl Tenure {
    /// One that nobody renews.
    pub fn of(term: Term, lasts: Duration) -> Self {
        let held = Held { term, until: Instant::now() + lasts, lease: Lease::default() };
        Self(watch::Sender::new(Some(held)))
    }

    /// What is left of the lease. `None`: this process does not lead, and may write nothing.
    pub fn rest(&self) -> Option<Duration> {
        let until = self.0.borrow().as_ref()?.until;
        until.checked_duration_since(Instant::now()).filter(|rest| !rest.is_zero())
    }

    /// Does something that writes, for as long as the lease is held: after that another may lead. `None`: it was not
    /// held, or not for long enough, and what was begun may have been done all the same.
    pub(crate) async fn while_held<T>(&self, call: impl Future<Output = T>) -> Option<T> {
        let (mut call, mut lost) = (pin!(call), pin!(self.lost()));
        poll_fn(|context| {
            // The clock is asked before each step: in a process that was frozen, timers go off only after others woke.
            if self.rest().is_none() || lost.as_mut().poll(context).is_ready() {
                return Poll::Ready(None);
            }
            call.as_mut().poll(context).map(Some)
        })
        .await
    }

    /// Waits until it is held.
    pub(crate) async fn held(&self) {
        let is_held = |held: &Option<Held>| held.as_ref().is_some_and(|held| Instant::now() < held.until);
        // The sender is here, so it is not gone.
        let _ = self.0.subscribe().wait_for(is_held).await;
    }

    async fn lost(&self) {
        let mut held = self.0.subscribe();
        while let Some(rest) = self.rest() {
            // A renewal moves the end.
            let _ = timeout(rest, held.changed()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::pending;

    use tokio::time::{advance, sleep};
    use uuid::Uuid;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn tenure() -> Tenure {
        Tenure::of(Term { epoch: 1, token: Uuid::nil() }, SECOND * 10)
    }

    fn renew(tenure: &Tenure) {
        tenure.0.send_modify(|held| held.as_mut().expect("it is held").until = Instant::now() + SECOND * 10);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_done_in_time_is_done() {
        let tenure = tenure();
        assert_eq!(tenure.while_held(sleep(SECOND * 9)).await, Some(()));
        assert_eq!(tenure.while_held(sleep(SECOND * 9)).await, None, "and given up when the lease runs out");
        assert_eq!(tenure.rest(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_gives_what_is_under_way_more_time_and_a_loss_gives_it_up() {
        let tenure = tenure();
        let renewals = async {
            sleep(SECOND * 8).await;
            renew(&tenure);
            pending().await
        };
        tokio::select! {
            done = tenure.while_held(sleep(SECOND * 15)) => assert_eq!(done, Some(())),
            () = renewals => (),
        }
        let loss = async {
            tenure.0.send_replace(None);
        };
        let (done, ()) = tokio::join!(tenure.while_held(pending::<()>()), loss);
        assert_eq!(done, None);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_wakes_up_after_its_time_does_not_take_another_step() {
        let tenure = tenure();
        let sent = Cell::new(false);
        let mut steps = pin!(tenure.while_held(async {
            tokio::task::yield_now().await;
            sent.set(true);
        }));
        assert!(futures::poll!(steps.as_mut()).is_pending());
        // As in a process that was stopped: time has passed, and no timer has gone off yet.
        assert!(futures::poll!(pin!(advance(SECOND * 10))).is_pending());
        assert_eq!(futures::poll!(steps.as_mut()), Poll::Ready(None));
        assert!(!sent.get(), "nothing was sent");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_lease_goes_on_when_it_is_held_again() {
        let tenure = tenure();
        advance(SECOND * 10).await;
        let mut waits = pin!(tenure.held());
        assert!(futures::poll!(waits.as_mut()).is_pending());
        renew(&tenure);
        assert!(futures::poll!(waits.as_mut()).is_ready());
    }
}
