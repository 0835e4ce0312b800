//! Secrets that came too late. A Secret is not watched, for that would mean to read it: one that a call of a leader
//! now dead brings after the last look at its desktop is found by nothing. So those of desktops that are over are
//! removed once more, by label, without a look.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::sleep;
use tracing::debug;

use super::Operator;
use crate::database::bond;
use crate::names::secrets_of_rows;
use crate::telemetry::chain;

/// First after a term has begun, when the calls of the leader before have landed, and how often then.
const SWEEP: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(600));
/// Of desktops that were over no longer ago than this: what lands later was no call but a ghost.
const BACK: Duration = Duration::from_secs(3600);
/// Desktops in one call: their ids are in its URL.
const AT_ONCE: usize = 100;

impl Operator {
    /// Removes the Secrets of desktops that are over, again and again.
    pub(super) async fn sweep_secrets(&self) -> Infallible {
        sleep(SWEEP.0).await;
        loop {
            if let Err(error) = self.sweep_once().await {
                debug!(error = %chain(error.as_ref()), "cannot remove the Secrets of desktops that are over");
            }
            sleep(SWEEP.1).await;
        }
    }

    async fn sweep_once(&self) -> anyhow::Result<()> {
        self.pair_is_right().await;
        for ids in bond::ended_within(&self.pool, BACK).await?.chunks(AT_ONCE) {
            self.leadership.tenure.while_held(self.cluster.sweep_secrets(&secrets_of_rows(ids))).await.transpose()?;
        }
        Ok(())
    }
}
