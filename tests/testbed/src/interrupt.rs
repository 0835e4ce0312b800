//! Being told to end: Ctrl-C, SIGTERM, or a terminal that was closed.

use anyhow::{Context as _, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// From the moment it listens, these signals no longer kill us: we end in order, and take everything with us.
pub(crate) struct Interrupt([Signal; 3]);

impl Interrupt {
    /// What a shell reports of a program that Ctrl-C ended.
    pub(crate) const EXIT_CODE: u8 = 130;

    pub(crate) fn listen() -> Result<Self> {
        let on = |kind| signal(kind).context("listen for signals");
        Ok(Self([on(SignalKind::interrupt())?, on(SignalKind::terminate())?, on(SignalKind::hangup())?]))
    }

    /// Resolves when told to end.
    pub(crate) async fn came(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => (),
            _ = terminate.recv() => (),
            _ = hangup.recv() => (),
        }
    }
}
