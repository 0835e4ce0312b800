//! LISTEN on a connection of its own, and the heartbeat that proves it.
//!
//! A notification says only "look". That it can still arrive is proven by sending one from another
//! connection: behind a transaction pooler LISTEN succeeds and stays silent for ever, and a connection
//! whose peer is gone looks alive for hours. Without it the daemon goes on by polling, and tries again: the way to
//! the database may have become a direct one.
//!
//! A pooler hands what a server notifies to whoever has that server at the moment. So a heartbeat names the
//! connection that it is for, and holds nothing that anybody may not read.

use std::collections::HashSet;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use deadpool_postgres::Pool;
use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::connect::{Param, Target, query, share_a_server};
use crate::telemetry::chain;

const CHANNEL: &str = "cyberdesk";
const HEARTBEAT_CHANNEL: &str = "cyberdesk_heartbeat";
/// How often a heartbeat is sent, and how long it may take.
const HEARTBEAT: Duration = Duration::from_secs(10);
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to find out why none came.
const DIAGNOSIS_LIMIT: Duration = Duration::from_secs(2);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// Most causes that are told until notifications arrive again.
const MOST_TOLD: usize = 5;

/// What the listener tells the rest.
#[derive(Debug, Default)]
pub(crate) struct Wakeups {
    /// Look for work: something was notified, or notifications may have been missed.
    pub(crate) look: Notify,
    /// Whether notifications are proven to arrive.
    pub(crate) alive: AtomicBool,
}

/// Listens for as long as the daemon runs.
pub(crate) async fn run(target: &Target, pool: &Pool, wakeups: &Arc<Wakeups>, round_trips: &Histogram) {
    let mut backoff = BACKOFF.0;
    let mut told = Told::default();
    loop {
        let error = match listen(target, pool, wakeups, round_trips).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        if wakeups.alive.swap(false, Ordering::Relaxed) {
            backoff = BACKOFF.0;
            told = Told::default();
        }
        let error = chain(error.as_ref()).to_string();
        if told.is_news(&error) {
            warn!(error, "cannot hear notifications; looking every second meanwhile, will listen again");
        } else {
            debug!(error, "still cannot hear notifications");
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
}

/// What was told since notifications last arrived.
#[derive(Debug, Default)]
struct Told(HashSet<String>);

impl Told {
    /// Whether this is to be told. What was need not be every few seconds, nor what says the same in ever other words.
    fn is_news(&mut self, error: &str) -> bool {
        self.0.len() < MOST_TOLD && self.0.insert(error.to_owned())
    }
}

enum Never {}

async fn listen(
    target: &Target,
    pool: &Pool,
    wakeups: &Arc<Wakeups>,
    round_trips: &Histogram,
) -> anyhow::Result<Never> {
    let mut ear = Ear::open(target, wakeups.clone()).await?;
    // What was committed before the LISTEN took effect told nobody.
    wakeups.look.notify_one();
    let mut proven = false;
    loop {
        let round_trip = ear.prove(pool).await?;
        round_trips.observe(round_trip.as_secs_f64());
        debug!(round_trip_ms = round_trip.as_secs_f64() * 1e3, "heartbeat arrived");
        wakeups.alive.store(true, Ordering::Relaxed);
        if !std::mem::replace(&mut proven, true) {
            info!("notifications of the database arrive");
        }
        tokio::select! {
            () = tokio::time::sleep(HEARTBEAT) => (),
            error = &mut ear.driver => return Err(error.unwrap_or_else(anyhow::Error::new)),
        }
    }
}

/// A connection that listens.
pub(crate) struct Ear {
    client: Client,
    driver: AbortOnDropHandle<anyhow::Error>,
    /// Names this connection in its heartbeats: all daemons hear those of all.
    name: String,
    sent: u64,
    heard: watch::Receiver<u64>,
}

impl Ear {
    /// Connects and listens. Whether anything can be heard is still to be proven.
    pub(crate) async fn open(target: &Target, wakeups: Arc<Wakeups>) -> anyhow::Result<Self> {
        let (client, mut connection) = timeout(target.connects_within(), target.connect())
            .await
            .context("connect to the database to listen: no answer")?
            .context("connect to the database to listen")?;
        let name = Uuid::new_v4().to_string();
        let (say, heard) = watch::channel(0);
        let prefix = format!("{name} ");
        // Nothing but the connection is awaited here: a listener that stops reading holds up VACUUM and
        // fills the database's notification queue.
        let driver = AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                match poll_fn(|cx| connection.poll_message(cx)).await {
                    Some(Ok(AsyncMessage::Notification(note))) if note.channel() == CHANNEL => {
                        wakeups.look.notify_one();
                    }
                    Some(Ok(AsyncMessage::Notification(note))) => {
                        let beat = note.payload().strip_prefix(&prefix).and_then(|beat| beat.parse().ok());
                        if let Some(beat) = beat {
                            say.send_replace(beat);
                        }
                    }
                    Some(Ok(_)) => (),
                    Some(Err(error)) => {
                        return anyhow::Error::new(error).context("the listening connection broke");
                    }
                    None => return anyhow::anyhow!("the listening connection was closed"),
                }
            }
        }));
        timeout(HEARTBEAT_LIMIT, client.batch_execute(&format!("listen {CHANNEL}; listen {HEARTBEAT_CHANNEL}")))
            .await
            .context("listen: no answer")?
            .context("listen")?;
        Ok(Self { client, driver, name, sent: 0, heard })
    }

    /// Sends a heartbeat from another connection and waits for it. Answers how long it took.
    ///
    /// # Errors
    ///
    /// If it does not arrive. The error says why, as far as that can be found out, and what to do.
    pub(crate) async fn prove(&mut self, pool: &Pool) -> anyhow::Result<Duration> {
        self.sent += 1;
        let (sent, began) = (self.sent, Instant::now());
        let payload = format!("{} {sent}", self.name);
        let heard = &mut self.heard;
        let beat = async move {
            let params: [Param<'_>; 2] = [(&HEARTBEAT_CHANNEL, Type::TEXT), (&payload, Type::TEXT)];
            query(pool, "select pg_notify($1, $2)", &params).await.context("send the heartbeat")?;
            heard.wait_for(|beat| *beat >= sent).await.context("the listening connection ended")?;
            anyhow::Ok(())
        };
        match timeout(HEARTBEAT_LIMIT, beat).await {
            Ok(Ok(())) => Ok(began.elapsed()),
            // The reason why the connection's driver ended says more than what failed because of it.
            Ok(Err(error)) if self.driver.is_finished() => Err((&mut self.driver).await.unwrap_or(error)),
            Ok(Err(error)) => Err(error),
            Err(_) => bail!(self.why_silent(pool).await),
        }
    }

    async fn why_silent(&self, pool: &Pool) -> &'static str {
        let shared = async {
            let other = pool.get().await.ok()?;
            share_a_server(&self.client, &other).await.ok()
        };
        match timeout(DIAGNOSIS_LIMIT, shared).await {
            Ok(Some(true)) => {
                "DATABASE_URL leads through a transaction pooler (it gave one server to two of our connections), where \
                 LISTEN succeeds and stays silent: use the direct connection or the session pooler (on Supabase both on \
                 port 5432)"
            }
            Ok(Some(false)) => {
                "the heartbeat did not arrive in 5 s, though the listening connection answers: what is between here and \
                 the database does not pass notifications on; use the direct connection"
            }
            Ok(None) | Err(_) => "the heartbeat did not arrive in 5 s, and the listening connection is silent",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_that_says_its_cause_in_turns_in_two_ways_is_told_twice() {
        let mut told = Told::default();
        let words = ["connection reset by peer", "the listening connection was closed"];
        let news = words.iter().cycle().take(10_000).filter(|words| told.is_news(words)).count();
        assert_eq!(news, 2);
        assert!(told.is_news("password authentication failed"), "another cause is told");
    }

    #[test]
    fn an_outage_that_says_its_cause_in_ever_other_words_is_told_a_few_times() {
        let mut told = Told::default();
        let news = (0..10_000).filter(|port| told.is_news(&format!("connect from port {port}: refused"))).count();
        assert_eq!((news, told.0.len()), (MOST_TOLD, MOST_TOLD), "nor is more kept of it");
    }
}
