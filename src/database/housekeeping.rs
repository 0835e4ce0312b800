//! What the operator does for the database itself, once it may write: it shows that it lives, warns of ends that are
//! near, deletes what is kept for a time only, and repairs what went round the triggers.
//!
//! Each is one fenced function that decides by the database's clock; here is only how often they are called. None of
//! them is urgent: what fails is tried again at its next turn.

use std::time::Duration;

use anyhow::Context;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use tracing::{info, warn};

use super::bond::Expected;
use super::connect::Param;
use super::writeback::is_fenced;
use super::writer::Writer;
use crate::telemetry::chain;

/// How often the operator shows that it lives. `desktop_service_state` takes it for away after 45 s.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);
/// Least time between two looks for ends that are near.
const LEAST_WARNING_GAP: Duration = Duration::from_millis(250);
/// Most desktops warned in one statement.
const WARN: i32 = 500;
/// How often the history is trimmed, and the pause between two batches of that.
const TRIM: (Duration, Duration) = (Duration::from_secs(600), Duration::from_millis(100));

/// Keeps house until the database says that the term is over. What it acknowledges is `expected` of it from then on.
pub(crate) async fn run(writer: Writer<'_>, repair_interval: Duration, expected: &Expected) {
    // One chore at a time: together they hold one of the few connections.
    let turn = &Mutex::new(());
    tokio::select! {
        () = every(turn, "show a sign of life", async || {
            let at = call(writer, "select cyberdesk.sign_of_life($1, $2)").await?.try_get(0)?;
            expected.acknowledged(Some(at));
            Ok(SIGN_OF_LIFE)
        }) => (),
        () = every(turn, "warn of ends that are near", async || warn_of_ends(writer).await) => (),
        () = every(turn, "trim the history", async || {
            let trimmed: i64 = call(writer, "select cyberdesk.trim($1, $2)").await?.try_get(0)?;
            Ok(if trimmed == 0 { TRIM.0 } else { TRIM.1 })
        }) => (),
        () = every(turn, "repair what went round the triggers", async || {
            let repaired: i64 = call(writer, "select cyberdesk.reconcile_projection($1, $2)").await?.try_get(0)?;
            if repaired > 0 {
                warn!(rows = repaired, "repaired rows that went round the database's triggers");
            }
            Ok(repair_interval)
        }) => (),
    }
}

/// Does something again and again, after the time that it says itself, until the term is over. Trouble is told once,
/// until it is over.
async fn every(turn: &Mutex<()>, doing: &'static str, chore: impl AsyncFn() -> anyhow::Result<Duration>) {
    let mut trouble = false;
    loop {
        let ours = turn.lock().await;
        let done = chore().await;
        drop(ours);
        let pause = match done {
            Ok(pause) => {
                trouble = false;
                pause
            }
            Err(error) if is_fenced(&error) => return,
            Err(error) => {
                if !std::mem::replace(&mut trouble, true) {
                    warn!(error = %chain(error.as_ref()), "cannot {doing}; will try again");
                }
                SIGN_OF_LIFE
            }
        };
        sleep(pause).await;
    }
}

/// Warns of what is near, and says when to look again: at the next that the database knows of, or soon enough for
/// those that it does not know of yet.
async fn warn_of_ends(writer: Writer<'_>) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let params: [Param<'_>; 1] = [(&WARN, Type::INT4)];
    let rows = writer.query("select warned, next_in_seconds from cyberdesk.warn($1, $2, $3)", &params).await?;
    let row = rows.first().context("the database gave no answer")?;
    let (warned, next): (i64, Option<f64>) = (row.try_get(0)?, row.try_get(1)?);
    if warned > 0 {
        info!(desktops = warned, "warned of ends that are near");
    }
    let next = next.and_then(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).ok()).unwrap_or(SIGN_OF_LIFE);
    Ok(next.clamp(LEAST_WARNING_GAP, SIGN_OF_LIFE).saturating_sub(began.elapsed()))
}

async fn call(writer: Writer<'_>, statement: &str) -> anyhow::Result<Row> {
    writer.query(statement, &[]).await?.into_iter().next().context("the database gave no answer")
}
