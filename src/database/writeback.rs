//! The write-back: what became of desktops, told to the database in batches until it has answered.
//!
//! One statement at a time takes all that has gathered meanwhile, at most one entry per desktop, the
//! newest. Each entry is answered for itself, and stays here until its answer is final: a row that the
//! app holds locked is `busy` and comes again; without the database, everything waits.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use deadpool_postgres::Pool;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tracing::{debug, warn};
use uuid::Uuid;

use super::connect::{Param, query};
use super::store::Store;
use crate::lease::Term;
use crate::model::{Report, RowStatus};
use crate::names::Key;
use crate::queue::{Lane, Queue};
use crate::telemetry::chain;

/// Most entries in one statement: 500 is where a statement takes some 10 ms (measured on 1 M rows).
const BATCH: usize = 500;
/// Time to gather before a statement, so that a burst is not written row by row.
const GATHER: Duration = Duration::from_millis(5);
/// Wait before a row that the app had locked is tried again.
const BUSY: Duration = Duration::from_millis(50);
/// Wait before a report that the database refused is tried again, or for a new one of the same desktop.
const REFUSED: Duration = Duration::from_secs(60);
/// First and longest wait after the database did not answer.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

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
    /// The last entries sent. The next are those after them, so that none waits behind others that do not move.
    sent: Sent,
    /// Reports that the database refuses, by themselves, and when to try them again.
    refused: BTreeMap<Uuid, Instant>,
}

#[derive(Debug, Default)]
struct Sent {
    report: Uuid,
    expiry: Uuid,
    /// Half of what was sent when the database refused a batch, until batches are taken again.
    size: Option<usize>,
}

impl State {
    fn next_reports(&mut self, now: Instant) -> Vec<Report> {
        let (after, size) = (self.sent.report, self.sent.size.unwrap_or(BATCH));
        let round = self.reports.range((Excluded(after), Unbounded)).chain(self.reports.range(..=after));
        let due = |id: &Uuid| self.refused.get(id).is_none_or(|until| *until <= now);
        let next: Vec<Report> = round.filter(|(id, _)| due(id)).take(size).map(|(_, report)| report.clone()).collect();
        self.sent.report = next.last().map_or(after, |report| report.id);
        next
    }

    fn next_expiries(&mut self) -> Vec<Uuid> {
        let after = self.sent.expiry;
        let round = self.expiries.range((Excluded(after), Unbounded)).chain(self.expiries.range(..=after));
        let next: Vec<Uuid> = round.take(BATCH).copied().collect();
        self.sent.expiry = next.last().copied().unwrap_or(after);
        next
    }

    /// The database refuses one of these. Halving them leads to it; the others go on.
    fn refuse(&mut self, batch: &[Report], now: Instant) -> Option<Uuid> {
        match batch {
            [one] => {
                self.refused.insert(one.id, now + REFUSED);
                Some(one.id)
            }
            batch => {
                self.sent.size = Some(batch.len().div_ceil(2).max(1));
                // The same again, from before the first of them.
                self.sent.report =
                    batch.first().map_or(Uuid::nil(), |first| Uuid::from_u128(first.id.as_u128().wrapping_sub(1)));
                None
            }
        }
    }
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

    /// Writes until the database says that the term is over. What waits is told in the next.
    pub(crate) async fn run(&self, pool: &Pool, term: Term, store: &Store, queue: &Queue) {
        let mut backoff = BACKOFF.0;
        loop {
            if self.lag() == 0 {
                self.changed.notified().await;
                sleep(GATHER).await;
            }
            match self.write(pool, term, store, queue).await {
                Ok(moved) => {
                    backoff = BACKOFF.0;
                    self.written.notify_one();
                    if !moved {
                        sleep(BUSY).await;
                    }
                }
                Err(error) if is_fenced(&error) => return,
                Err(error) => {
                    warn!(waiting = self.lag(), error = %chain(error.as_ref()), "cannot write back; will try again");
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
    }

    /// Writes one batch of each kind. Tells whether that moved anything.
    async fn write(&self, pool: &Pool, term: Term, store: &Store, queue: &Queue) -> anyhow::Result<bool> {
        let due = self.state().next_expiries();
        let mut moved = !due.is_empty() && self.write_expiries(pool, term, store, queue, &due).await?;
        let reports = self.state().next_reports(Instant::now());
        if reports.is_empty() {
            return Ok(moved);
        }
        match report(pool, term, &reports).await {
            Ok(answers) => moved |= self.take_answers(pool, store, queue, &reports, &answers).await?,
            Err(error) if is_refusal(&error) => {
                let alone = self.state().refuse(&reports, Instant::now());
                if let Some(id) = alone {
                    let error = chain(error.as_ref());
                    warn!(desktop = %id, %error, "the database refuses what became of a desktop; will try again");
                }
                moved = true;
            }
            Err(error) => return Err(error),
        }
        Ok(moved)
    }

    async fn write_expiries(
        &self,
        pool: &Pool,
        term: Term,
        store: &Store,
        queue: &Queue,
        due: &[Uuid],
    ) -> anyhow::Result<bool> {
        let mut decided = vec![];
        let mut too_early = false;
        for (id, answer) in expire(pool, term, due).await? {
            if answer != Answer::Busy {
                self.state().expiries.remove(&id);
                decided.push(id);
            }
            too_early |= answer == Answer::Stale;
        }
        // What the database decided is read from it, like everything else.
        let read = super::rows::by_id(pool, &decided).await.map(|rows| store.take_in(rows, queue));
        if too_early {
            // Extended, or our idea of the database's time was ahead: not again at once.
            sleep(BUSY).await;
        }
        // Each is looked at again, also where nothing was news: its deadline may still come.
        decided.iter().for_each(|id| queue.wake(&Key::of_row(*id), Lane::Ends));
        read?;
        Ok(!decided.is_empty())
    }

    async fn take_answers(
        &self,
        pool: &Pool,
        store: &Store,
        queue: &Queue,
        reports: &[Report],
        answers: &BTreeMap<Uuid, Answer>,
    ) -> anyhow::Result<bool> {
        let mut stale = vec![];
        let mut done = 0;
        {
            let mut state = self.state();
            state.sent.size = state.sent.size.map(|size| size * 2).filter(|size| *size < BATCH);
        }
        for report in reports {
            match answers.get(&report.id) {
                None | Some(Answer::Busy) => continue,
                Some(Answer::Final) => store.confirmed(report, queue),
                Some(Answer::Stale) => stale.push(report.id),
            }
            done += 1;
            let mut state = self.state();
            state.refused.remove(&report.id);
            // A later word that came meanwhile stays.
            if state.reports.get(&report.id) == Some(report) {
                state.reports.remove(&report.id);
            }
        }
        debug!(done, of = reports.len(), "written back");
        if !stale.is_empty() {
            warn!(desktops = ?stale, "the database has gone back behind what was acted on; reading anew");
            sleep(BUSY).await;
            stale.iter().for_each(|id| store.forget(*id));
            let read = super::rows::by_id(pool, &stale).await.map(|rows| store.take_in(rows, queue));
            stale.iter().for_each(|id| queue.wake(&Key::of_row(*id), Lane::Makes));
            read?;
        }
        Ok(done > 0)
    }
}

/// Whether the database refuses something in the batch, and not the batch: bad data, a constraint, a trigger of
/// the app's (classes 22, 23 and `raise`).
fn is_refusal(error: &anyhow::Error) -> bool {
    let code = error.chain().find_map(|cause| cause.downcast_ref::<tokio_postgres::Error>()?.code());
    code.is_some_and(|code| ["22", "23", "P0"].iter().any(|class| code.code().starts_with(class)))
}

/// Takes the fence for a term. Answers the epoch that the database has, if that is not below the term's.
///
/// # Errors
///
/// If the database does not answer.
pub(crate) async fn acquire(pool: &Pool, term: Term, holder: &str) -> anyhow::Result<Option<i64>> {
    let params: [Param<'_>; 3] = [(&term.epoch, Type::INT8), (&term.token, Type::UUID), (&holder, Type::TEXT)];
    let taken = query(pool, "select cyberdesk.acquire($1, $2, $3)", &params).await.context("take the fence")?;
    if taken.first().context("the fence gave no answer")?.try_get(0)? {
        return Ok(None);
    }
    let rows = query(pool, "select cyberdesk.fence_epoch()", &[]).await.context("read the fence")?;
    Ok(Some(rows.first().context("the fence has no epoch")?.try_get(0)?))
}

async fn expire(pool: &Pool, term: Term, ids: &[Uuid]) -> anyhow::Result<Vec<(Uuid, Answer)>> {
    let params: [Param<'_>; 3] = [(&term.epoch, Type::INT8), (&term.token, Type::UUID), (&ids, Type::UUID_ARRAY)];
    let rows = query(pool, "select id, answer from cyberdesk.expire($1, $2, $3)", &params)
        .await
        .context("end desktops at their deadline")?;
    rows.iter().map(|row| Ok((row.try_get(0)?, Answer::of(row.try_get(1)?)))).collect()
}

async fn report(pool: &Pool, term: Term, reports: &[Report]) -> anyhow::Result<BTreeMap<Uuid, Answer>> {
    let ids: Vec<Uuid> = reports.iter().map(|r| r.id).collect();
    let generations: Vec<i64> = reports.iter().map(|r| r.generation).collect();
    let vm_uids: Vec<Option<&str>> = reports.iter().map(|r| r.vm_uid.as_deref()).collect();
    let statuses: Vec<Option<&str>> = reports.iter().map(|r| r.status.map(RowStatus::as_str)).collect();
    let reasons: Vec<Option<&str>> = reports.iter().map(|r| r.reason.as_deref()).collect();
    let messages: Vec<Option<&str>> = reports.iter().map(|r| r.message.as_deref()).collect();
    let stream_urls: Vec<Option<&str>> = reports.iter().map(|r| r.stream_url.as_deref()).collect();
    let ended: Vec<bool> = reports.iter().map(|r| r.ended).collect();
    let params: [Param<'_>; 10] = [
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
    ];
    let statement = "select id, answer from cyberdesk.report($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)";
    let rows = query(pool, statement, &params).await.context("write back what became of desktops")?;
    rows.iter().map(|row| Ok((row.try_get(0)?, Answer::of(row.try_get(1)?)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state_of(ids: impl IntoIterator<Item = u128>) -> State {
        let report = |id| Report {
            id: Uuid::from_u128(id),
            generation: 1,
            vm_uid: None,
            status: None,
            reason: None,
            message: None,
            stream_url: None,
            ended: false,
        };
        let reports = ids.into_iter().map(|id| (Uuid::from_u128(id), report(id))).collect();
        State { reports, ..State::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn entries_that_do_not_move_hold_up_no_others() {
        let mut state = state_of(1..=1200);
        let now = Instant::now();
        let mut sent: Vec<u128> = (0..3).flat_map(|_| state.next_reports(now)).map(|r| r.id.as_u128()).collect();
        sent.sort_unstable();
        sent.dedup();
        assert_eq!(sent.len(), 1200, "in three batches of 500 each was sent, though none was answered");
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_that_the_database_refuses_ends_up_alone_and_the_others_pass_it_by() {
        let mut state = state_of(1..=700);
        let now = Instant::now();
        let poison = Uuid::from_u128(333);
        let mut statements = 0;
        while state.reports.len() > 1 {
            statements += 1;
            assert!(statements < 40, "{} are left", state.reports.len());
            let batch = state.next_reports(now);
            if batch.iter().any(|report| report.id == poison) {
                state.refuse(&batch, now);
            } else {
                state.sent.size = state.sent.size.map(|size| size * 2).filter(|size| *size < BATCH);
                batch.iter().for_each(|report| drop(state.reports.remove(&report.id)));
            }
        }
        assert!(state.reports.contains_key(&poison));
        if let [last] = state.next_reports(now).as_slice() {
            state.refuse(std::slice::from_ref(last), now);
        }
        assert_eq!(state.next_reports(now), [], "it is left alone for a while");
        assert_eq!(state.next_reports(now + REFUSED).len(), 1);
    }
}
