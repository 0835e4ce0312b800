//! The write-back: what became of desktops, told to the database in batches until it has answered.
//!
//! One statement at a time takes all that has gathered meanwhile, at most one entry per desktop, the
//! newest. Each entry is answered for itself, and stays here until its answer is final: a row that the
//! app holds locked is `busy` and comes again; without the database, everything waits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use deadpool_postgres::Pool;
use tokio::sync::Notify;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tracing::{debug, warn};
use uuid::Uuid;

use super::store::Store;
use crate::model::{Report, RowStatus};
use crate::names::Key;
use crate::queue::{Lane, Queue};

/// Most entries in one statement: 500 is where a statement takes some 10 ms (measured on 1 M rows).
const BATCH: usize = 500;
/// Time to gather before a statement, so that a burst is not written row by row.
const GATHER: Duration = Duration::from_millis(5);
/// Wait before a row that the app had locked is tried again.
const BUSY: Duration = Duration::from_millis(50);
/// First and longest wait after the database did not answer.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// The right to write: a term of leadership, which the database checks in every writing function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// Greater than that of every leader before.
    pub epoch: i64,
    /// Tells two leaders apart that came by the same epoch.
    pub token: Uuid,
}

/// Raised by the database for a term that is over (`CD001`).
pub fn is_fenced(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<tokio_postgres::Error>())
        .any(|error| error.code() == Some(&SqlState::from_code("CD001")))
}

/// What waits to be told.
#[derive(Debug, Default)]
pub struct WriteBack {
    state: Mutex<State>,
    changed: Notify,
    written: Notify,
}

#[derive(Debug, Default)]
struct State {
    reports: BTreeMap<Uuid, Report>,
    expiries: BTreeSet<Uuid>,
}

/// The database's answer to one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It stands, now or since before; or there is nothing that it could change.
    Final,
    /// The row was locked by somebody else.
    Busy,
    /// What was acted on is not what the database has: it must be read anew.
    Stale,
}

impl Answer {
    fn of(word: &str) -> Self {
        match word {
            "written" | "same" | "missing" | "expired" => Self::Final,
            "busy" => Self::Busy,
            _ => Self::Stale,
        }
    }
}

impl WriteBack {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the database of a desktop. A later word of the same desktop takes the place of an earlier one.
    pub fn report(&self, report: Report) {
        self.state().reports.insert(report.id, report);
        self.changed.notify_one();
    }

    /// Asks the database to end a row at its deadline.
    pub fn expire(&self, id: Uuid) {
        self.state().expiries.insert(id);
        self.changed.notify_one();
    }

    /// Entries that have no final answer yet.
    pub fn lag(&self) -> usize {
        let state = self.state();
        state.reports.len() + state.expiries.len()
    }

    /// Waits until nothing waits to be told.
    pub async fn drained(&self) {
        while self.lag() > 0 {
            self.written.notified().await;
        }
    }

    /// Writes for as long as this term lasts.
    ///
    /// # Errors
    ///
    /// Only if the database says that the term is over.
    pub async fn run(&self, pool: &Pool, term: Term, store: &Store, queue: &Queue) -> anyhow::Result<()> {
        let mut backoff = BACKOFF.0;
        loop {
            if self.lag() == 0 {
                self.changed.notified().await;
                tokio::time::sleep(GATHER).await;
            }
            match self.write(pool, term, store, queue).await {
                Ok(busy) => {
                    backoff = BACKOFF.0;
                    self.written.notify_one();
                    if busy {
                        tokio::time::sleep(BUSY).await;
                    }
                }
                Err(error) if is_fenced(&error) => return Err(error),
                Err(error) => {
                    warn!(waiting = self.lag(), error = %crate::telemetry::chain(error.as_ref()), "cannot write back; will try again");
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
    }

    /// Writes one batch of each kind. Tells whether only busy rows are left.
    async fn write(&self, pool: &Pool, term: Term, store: &Store, queue: &Queue) -> anyhow::Result<bool> {
        let (due, reports) = {
            let state = self.state();
            let due: Vec<Uuid> = state.expiries.iter().take(BATCH).copied().collect();
            let reports: Vec<Report> = state.reports.values().take(BATCH).cloned().collect();
            (due, reports)
        };
        let (mut done, mut busy) = (0, 0);
        if !due.is_empty() {
            for (id, answer) in expire(pool, term, &due).await? {
                if answer == Answer::Busy {
                    busy += 1;
                    continue;
                }
                done += 1;
                self.state().expiries.remove(&id);
            }
            // What the database decided is read from it, like everything else.
            store.take_in(super::rows::by_id(pool, &due).await?, queue);
        }
        if !reports.is_empty() {
            let answers = write_reports(pool, term, &reports).await?;
            let mut stale = vec![];
            for report in &reports {
                match answers.get(&report.id) {
                    None | Some(Answer::Busy) => {
                        busy += 1;
                        continue;
                    }
                    Some(Answer::Final) => store.confirmed(report, queue),
                    Some(Answer::Stale) => stale.push(report.id),
                }
                done += 1;
                let mut state = self.state();
                // A later word that came meanwhile stays.
                if state.reports.get(&report.id) == Some(report) {
                    state.reports.remove(&report.id);
                }
            }
            if !stale.is_empty() {
                warn!(desktops = ?stale, "the database has gone back behind what was acted on; reading anew");
                store.take_in(super::rows::by_id(pool, &stale).await?, queue);
                for id in stale {
                    queue.wake(&Key::of_row(id), Lane::Makes);
                }
            }
        }
        debug!(done, busy, "written back");
        Ok(done == 0 && busy > 0)
    }
}

/// Begins a term that is greater than any that the database has seen.
pub async fn begin_term(pool: &Pool, holder: &str) -> anyhow::Result<Term> {
    let client = pool.get().await?;
    let rows = client.query_typed("select cyberdesk.fence_epoch()", &[]).await.context("read the fence")?;
    let last: i64 = rows.first().context("the fence has no epoch")?.try_get(0)?;
    let term = Term { epoch: last + 1, token: Uuid::new_v4() };
    let taken = client
        .query_typed(
            "select cyberdesk.acquire($1, $2, $3)",
            &[(&term.epoch, Type::INT8), (&term.token, Type::UUID), (&holder, Type::TEXT)],
        )
        .await
        .context("take the fence")?;
    let taken: bool = taken.first().context("the fence gave no answer")?.try_get(0)?;
    anyhow::ensure!(taken, "another daemon took the fence at the same time");
    Ok(term)
}

async fn expire(pool: &Pool, term: Term, ids: &[Uuid]) -> anyhow::Result<Vec<(Uuid, Answer)>> {
    let client = pool.get().await?;
    let rows = client
        .query_typed(
            "select id, answer from cyberdesk.expire($1, $2, $3)",
            &[(&term.epoch, Type::INT8), (&term.token, Type::UUID), (&ids, Type::UUID_ARRAY)],
        )
        .await
        .context("end desktops at their deadline")?;
    rows.iter().map(|row| Ok((row.try_get(0)?, Answer::of(row.try_get(1)?)))).collect()
}

async fn write_reports(pool: &Pool, term: Term, reports: &[Report]) -> anyhow::Result<BTreeMap<Uuid, Answer>> {
    let client = pool.get().await?;
    let ids: Vec<Uuid> = reports.iter().map(|r| r.id).collect();
    let generations: Vec<i64> = reports.iter().map(|r| r.generation).collect();
    let vm_uids: Vec<Option<&str>> = reports.iter().map(|r| r.vm_uid.as_deref()).collect();
    let statuses: Vec<Option<&str>> = reports.iter().map(|r| r.status.map(RowStatus::as_str)).collect();
    let reasons: Vec<Option<&str>> = reports.iter().map(|r| r.reason.as_deref()).collect();
    let messages: Vec<Option<&str>> = reports.iter().map(|r| r.message.as_deref()).collect();
    let stream_urls: Vec<Option<&str>> = reports.iter().map(|_| None).collect();
    let ended: Vec<bool> = reports.iter().map(|r| r.ended).collect();
    let rows = client
        .query_typed(
            "select id, answer from cyberdesk.report($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            &[
                (&term.epoch, Type::INT8),
                (&term.token, Type::UUID),
                (&ids, Type::UUID_ARRAY),
                (&generations, Type::INT8_ARRAY),
                (&vm_uids, Type::TEXT_ARRAY),
                (&statuses, Type::TEXT_ARRAY),
                (&reasons, Type::TEXT_ARRAY),
                (&messages, Type::TEXT_ARRAY),
                (&stream_urls, Type::TEXT_ARRAY),
                (&ended, Type::BOOL_ARRAY),
            ],
        )
        .await
        .context("write back what became of desktops")?;
    rows.iter().map(|row| Ok((row.try_get(0)?, Answer::of(row.try_get(1)?)))).collect()
}
