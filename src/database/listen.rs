//! LISTEN on a connection of its own, and the heartbeat that proves it.
//!
//! A notification says only "look". That it can still arrive is proven by sending one from another
//! connection: behind a transaction pooler LISTEN succeeds and stays silent for ever, and a connection
//! whose peer is gone looks alive for hours. Without it the daemon goes on by polling.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use deadpool_postgres::Pool;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_postgres::AsyncMessage;
use tokio_postgres::types::Type;
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::connect::{Param, Target, query};

const CHANNEL: &str = "cyberdesk";
const HEARTBEAT_CHANNEL: &str = "cyberdesk_heartbeat";
/// How often a heartbeat is sent, and how long it may take.
const HEARTBEAT: Duration = Duration::from_secs(10);
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(5);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// What the listener tells the rest.
#[derive(Debug, Default)]
pub(crate) struct Wakeups {
    /// Look for work: something was notified, or notifications may have been missed.
    pub(crate) look: Notify,
    /// Whether notifications are proven to arrive.
    pub(crate) alive: AtomicBool,
}

/// Listens for as long as the daemon runs.
pub(crate) async fn run(target: &Target, pool: &Pool, wakeups: &Arc<Wakeups>) {
    let mut backoff = BACKOFF.0;
    loop {
        let began = Instant::now();
        let error = match listen(target, pool, wakeups).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        wakeups.alive.store(false, Ordering::Relaxed);
        warn!(error = %crate::telemetry::chain(error.as_ref()), "cannot hear notifications; polling meanwhile, will listen again");
        if began.elapsed() > HEARTBEAT * 2 {
            backoff = BACKOFF.0;
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
}

enum Never {}

async fn listen(target: &Target, pool: &Pool, wakeups: &Arc<Wakeups>) -> anyhow::Result<Never> {
    let (client, mut connection) = timeout(HEARTBEAT_LIMIT * 2, target.connect())
        .await
        .context("connect to the database to listen: no answer")?
        .context("connect to the database to listen")?;
    let (heard, mut heartbeats) = tokio::sync::watch::channel(String::new());
    let flags = wakeups.clone();
    // Nothing but the connection is awaited here: a listener that stops reading holds up VACUUM and
    // fills the database's notification queue.
    let driver = tokio::spawn(async move {
        loop {
            match poll_fn(|cx| connection.poll_message(cx)).await {
                Some(Ok(AsyncMessage::Notification(note))) if note.channel() == CHANNEL => flags.look.notify_one(),
                Some(Ok(AsyncMessage::Notification(note))) => drop(heard.send(note.payload().to_owned())),
                Some(Ok(_)) => (),
                Some(Err(error)) => {
                    return anyhow::Error::new(error).context("the listening connection broke");
                }
                None => return anyhow::anyhow!("the listening connection was closed"),
            }
        }
    });
    let mut driver = AbortOnDrop(driver);
    timeout(HEARTBEAT_LIMIT, client.batch_execute(&format!("listen {CHANNEL}; listen {HEARTBEAT_CHANNEL}")))
        .await
        .context("listen: no answer")?
        .context("listen")?;
    // What was committed before the LISTEN took effect told nobody.
    wakeups.look.notify_one();
    let mut proven = false;
    loop {
        let nonce = Uuid::new_v4().to_string();
        let sent = Instant::now();
        let beat = async {
            let params: [Param<'_>; 2] = [(&HEARTBEAT_CHANNEL, Type::TEXT), (&nonce, Type::TEXT)];
            query(pool, "select pg_notify($1, $2)", &params).await.context("send the heartbeat")?;
            heartbeats.wait_for(|payload| *payload == nonce).await.context("the listening connection ended")?;
            anyhow::Ok(())
        };
        match timeout(HEARTBEAT_LIMIT, beat).await {
            Ok(Ok(())) => (),
            Ok(Err(error)) if driver.0.is_finished() => return Err(ended(driver, error).await),
            Ok(Err(error)) => return Err(error),
            Err(_) => bail!(
                "the heartbeat did not arrive within {} s; if DATABASE_URL goes through a transaction pooler (port 6543), use the direct connection or the session pooler: a transaction pooler cannot LISTEN",
                HEARTBEAT_LIMIT.as_secs()
            ),
        }
        debug!(round_trip_ms = sent.elapsed().as_secs_f64() * 1e3, "heartbeat arrived");
        wakeups.alive.store(true, Ordering::Relaxed);
        if !std::mem::replace(&mut proven, true) {
            info!("notifications of the database arrive");
        }
        tokio::select! {
            () = tokio::time::sleep(HEARTBEAT) => (),
            error = &mut driver.0 => return Err(error.unwrap_or_else(anyhow::Error::new)),
        }
    }
}

struct AbortOnDrop(tokio::task::JoinHandle<anyhow::Error>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The reason why the connection's driver ended says more than what failed because of it.
async fn ended(mut driver: AbortOnDrop, error: anyhow::Error) -> anyhow::Error {
    (&mut driver.0).await.unwrap_or(error)
}
