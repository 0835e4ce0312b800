//! The write-back: what became of desktops, told to the database in batches until it has answered.
//!
//! One statement at a time takes all that has gathered meanwhile, at most one entry per desktop, the
//! newest. Each entry is answered for itself, and stays here until its answer is final: a row that the
//! app holds locked is `busy` and comes again; without the database, everything waits.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use jiff::SignedDuration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tracing::{debug, warn};
use uuid::Uuid;

use super::connect::{Param, query};
use super::contact::Contact;
use super::outbox::{Answer, Outbox, Refusal};
use super::store::{Remembered, Store};
use super::writer::Writer;
use crate::clock::Clock;
use crate::health::Pulse;
use crate::metrics::Metrics;
use crate::model::{Report, Row, RowStatus};
use crate::names::Key;
use crate::queue::{Lane, Queue};
use crate::telemetry::chain;

/// Time to gather before a statement, so that a burst is not written row by row.
const GATHER: Duration = Duration::from_millis(5);
/// Longest wait before a row that the app had locked is tried again.
const BUSY: Duration = Duration::from_millis(50);
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
    outbox: Mutex<Outbox>,
    contact: Contact,
    metrics: Arc<Metrics>,
    clock: Arc<Clock>,
    /// The database last took what it was told.
    pub(crate) answered: Pulse,
    changed: Notify,
    written: Notify,
}

impl WriteBack {
    /// One that counts what it writes.
    pub(crate) fn new(metrics: Arc<Metrics>, clock: Arc<Clock>) -> Self {
        Self { metrics, clock, ..Self::default() }
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the database of a desktop, which was woken for it at that time. A later word of the same desktop takes
    /// the place of an earlier one.
    pub fn report(&self, report: Report, woken: Option<Instant>) {
        let mut outbox = self.outbox();
        outbox.waits_since(report.id, woken.unwrap_or_else(Instant::now));
        outbox.report(report);
        self.contact.asked();
        drop(outbox);
        self.changed.notify_one();
    }

    /// Asks the database to end a row at its deadline.
    pub fn expire(&self, id: Uuid) {
        let mut outbox = self.outbox();
        outbox.waits_since(id, Instant::now());
        outbox.expire(id);
        self.contact.asked();
        drop(outbox);
        self.changed.notify_one();
    }

    /// The row, with the VM that it is still to be told of.
    pub(crate) fn with_its_vm(&self, row: Row) -> Row {
        self.outbox().with_its_vm(row)
    }

    /// Entries that have no final answer yet.
    pub fn lag(&self) -> usize {
        self.outbox().len()
    }

    /// For how long nothing was answered of what waits, or this desktop was refused its end. That somebody has locked
    /// a row is an answer.
    pub(crate) fn silence(&self, id: Option<Uuid>) -> SignedDuration {
        let refused = id.and_then(|id| self.outbox().refused_since(id)).map(|since| since.elapsed());
        let refused = refused.map(|refused| SignedDuration::try_from(refused).unwrap_or(SignedDuration::MAX));
        self.contact.silence().max(refused.unwrap_or_default())
    }

    /// Counts how long the database is silent, every [`TICK`](super::contact::TICK).
    pub(crate) fn tick(&self) {
        self.contact.tick();
    }

    /// Since when the first of them has waited.
    pub fn oldest(&self) -> Option<Instant> {
        self.outbox().oldest()
    }

    /// Waits until nothing waits to be told.
    pub async fn drained(&self) {
        while self.lag() > 0 {
            self.written.notified().await;
        }
    }

    /// The database has answered. Nothing can be added meanwhile, so that no question counts as answered unasked.
    fn note_answer(&self) {
        let outbox = self.outbox();
        self.contact.answered(!outbox.is_empty());
    }

    /// Writes until the database says that the term is over. What waits is told in the next.
    pub async fn run(&self, writer: Writer<'_>, store: &Store, queue: &Queue) {
        // Before, it could not be asked.
        self.note_answer();
        self.run_by(async || self.write(writer, store, queue).await).await;
    }

    /// Writes by one try after the other, each of which tells whether it moved anything.
    async fn run_by(&self, write: impl AsyncFn() -> anyhow::Result<bool>) {
        let (mut backoff, mut trouble) = (BACKOFF.0, false);
        loop {
            if self.lag() == 0 {
                self.changed.notified().await;
                // It may have been told with what was before it.
                if self.lag() == 0 {
                    continue;
                }
                sleep(GATHER).await;
            }
            match write().await {
                Ok(moved) => {
                    self.note_answer();
                    (backoff, trouble) = (BACKOFF.0, false);
                    self.answered.beat();
                    self.written.notify_one();
                    // What is new waits for no lock on another row.
                    if !moved && timeout(BUSY, self.changed.notified()).await.is_ok() {
                        sleep(GATHER).await;
                    }
                }
                Err(error) if is_fenced(&error) => return self.note_answer(),
                Err(error) => {
                    // All may have been told, and what was to be read after it not be there.
                    if self.lag() == 0 {
                        self.note_answer();
                        self.written.notify_one();
                    }
                    let (waiting, error) = (self.lag(), chain(error.as_ref()));
                    match std::mem::replace(&mut trouble, true) {
                        false => warn!(waiting, %error, "cannot write back; will try again"),
                        true => debug!(waiting, %error, "still cannot write back"),
                    }
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
    }

    /// Writes one batch of each kind. Tells whether that moved anything.
    async fn write(&self, writer: Writer<'_>, store: &Store, queue: &Queue) -> anyhow::Result<bool> {
        let due = self.outbox().next_expiries(Instant::now());
        self.count_batch(due.len());
        let mut moved = false;
        if !due.is_empty() {
            match self.write_expiries(writer, store, queue, &due).await {
                Ok(done) => moved = done,
                Err(error) if is_refusal(&error) => {
                    if let Some(Refusal { id, is_news }) = self.outbox().refuse_expiries(&due, Instant::now()) {
                        if is_news {
                            let error = chain(error.as_ref());
                            warn!(desktop = %id, %error, "the database refuses to end a desktop at its deadline; will try again");
                        }
                        queue.wake(&Key::of_row(id), Lane::Ends);
                    }
                    moved = true;
                }
                Err(error) => return Err(error),
            }
        }
        let reports = self.outbox().next_reports(Instant::now());
        if reports.is_empty() {
            return Ok(moved);
        }
        self.count_batch(reports.len());
        match report(writer, &reports).await {
            Ok(answers) => moved |= self.take_answers(writer, store, queue, &reports, &answers).await?,
            Err(error) if is_refusal(&error) => {
                let alone = self.outbox().refuse(&reports, Instant::now());
                if let Some(Refusal { id, is_news: true }) = alone {
                    let error = chain(error.as_ref());
                    warn!(desktop = %id, %error, "the database refuses what became of a desktop; will try again");
                }
                moved = true;
            }
            Err(error) => {
                self.metrics.retries.inc_by(reports.len() as u64);
                return Err(error);
            }
        }
        Ok(moved)
    }

    fn count_batch(&self, entries: usize) {
        if entries > 0 {
            self.metrics.batch.observe(entries as f64);
        }
    }

    /// A report was taken.
    fn count_report(&self, store: &Store, report: &Report) {
        if let Some(woken) = self.outbox().since(report.id) {
            self.metrics.change_to_row.observe(woken.elapsed().as_secs_f64());
        }
        let row = store.get(&Key::of_row(report.id));
        if let (Remembered::Row(row), Some(RowStatus::Running), Some(now)) = (row, report.status, self.clock.now())
            && row.status == RowStatus::Pending
        {
            self.metrics.insert_to_running.observe(now.database.duration_since(row.created_at).as_secs_f64());
        }
    }

    async fn write_expiries(
        &self,
        writer: Writer<'_>,
        store: &Store,
        queue: &Queue,
        due: &[Uuid],
    ) -> anyhow::Result<bool> {
        let (mut decided, mut expired) = (vec![], vec![]);
        let mut too_early = false;
        let answers = expire(writer, due).await?;
        self.outbox().expiries_accepted();
        for (id, word) in answers {
            let answer = Answer::of(&word);
            if word == "expired" {
                expired.push(id);
            }
            if self.outbox().expiry_answered(id, answer) {
                decided.push(id);
            } else {
                self.metrics.retries.inc();
            }
            too_early |= answer == Answer::Stale;
        }
        // What the database decided is read from it, like everything else.
        let read = super::rows::by_id(writer.pool, &decided, &store.unreadable).await.map(|found| {
            for row in found.rows.iter().filter(|row| expired.contains(&row.id)) {
                let late = row.changed_at.duration_since(row.expires_at);
                self.metrics.deadline_lateness.observe(late.as_secs_f64());
            }
            store.take_in(found.rows, queue);
        });
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
        writer: Writer<'_>,
        store: &Store,
        queue: &Queue,
        reports: &[Report],
        answers: &BTreeMap<Uuid, Answer>,
    ) -> anyhow::Result<bool> {
        let mut stale = vec![];
        let mut done = 0;
        self.outbox().accepted();
        for report in reports {
            let Some(answer) = answers.get(&report.id) else { continue };
            match answer {
                Answer::Busy => drop(self.metrics.retries.inc()),
                Answer::Final => {
                    self.count_report(store, report);
                    store.confirmed(report, queue);
                }
                Answer::Stale => stale.push(report.id),
            }
            done += usize::from(self.outbox().answered(report, *answer));
        }
        debug!(done, of = reports.len(), "written back");
        if !stale.is_empty() {
            warn!(desktops = ?stale, "the database has gone back behind what was acted on; reading anew");
            sleep(BUSY).await;
            stale.iter().for_each(|id| store.forget(*id));
            let read = super::rows::by_id(writer.pool, &stale, &store.unreadable)
                .await
                .map(|found| store.take_in(found.rows, queue));
            stale.iter().for_each(|id| queue.wake(&Key::of_row(*id), Lane::Makes));
            read?;
        }
        Ok(done > 0)
    }
}

/// Whether the database refuses something in the batch, and not the batch.
fn is_refusal(error: &anyhow::Error) -> bool {
    let told = error.chain().find_map(|cause| cause.downcast_ref::<tokio_postgres::Error>()?.as_db_error());
    told.is_some_and(|told| refuses(told.code().code(), told.where_().unwrap_or_default()))
}

/// Whether an error of this code and context is about something in the batch: bad data, a constraint (classes 22 and
/// 23), or whatever a trigger of the app's raises, which may be of any class that says nothing of connection, session,
/// transaction, locks or server. PostgreSQL's context names the functions that it came from, the innermost first.
fn refuses(code: &str, context: &str) -> bool {
    const OF_ALL: [&str; 11] = ["08", "25", "28", "3D", "3F", "40", "53", "55", "57", "58", "CD"];
    let of = |classes: &[&str]| classes.iter().any(|class| code.starts_with(class));
    let raised_by = context.lines().find(|line| line.starts_with("PL/"));
    of(&["22", "23", "P0"]) || raised_by.is_some_and(|function| !function.contains("cyberdesk.")) && !of(&OF_ALL)
}

/// Takes the fence for a term. Answers the epoch that the database has, if that is not below the term's.
///
/// # Errors
///
/// If the database does not answer.
pub async fn acquire(writer: Writer<'_>, holder: &str) -> anyhow::Result<Option<i64>> {
    let params: [Param<'_>; 1] = [(&holder, Type::TEXT)];
    let taken = writer.query("select cyberdesk.acquire($1, $2, $3)", &params).await.context("take the fence")?;
    if taken.first().context("the fence gave no answer")?.try_get(0)? {
        return Ok(None);
    }
    let rows = query(writer.pool, "select cyberdesk.fence_epoch()", &[]).await.context("read the fence")?;
    Ok(Some(rows.first().context("the fence has no epoch")?.try_get(0)?))
}

async fn expire(writer: Writer<'_>, ids: &[Uuid]) -> anyhow::Result<Vec<(Uuid, String)>> {
    let params: [Param<'_>; 1] = [(&ids, Type::UUID_ARRAY)];
    let rows = writer
        .query("select id, answer from cyberdesk.expire($1, $2, $3)", &params)
        .await
        .context("end desktops at their deadline")?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

async fn report(writer: Writer<'_>, reports: &[Report]) -> anyhow::Result<BTreeMap<Uuid, Answer>> {
    let ids: Vec<Uuid> = reports.iter().map(|r| r.id).collect();
    let generations: Vec<i64> = reports.iter().map(|r| r.generation).collect();
    let vm_uids: Vec<Option<&str>> = reports.iter().map(|r| r.vm_uid.as_deref()).collect();
    let statuses: Vec<Option<&str>> = reports.iter().map(|r| r.status.map(RowStatus::as_str)).collect();
    let reasons: Vec<Option<&str>> = reports.iter().map(|r| r.reason.as_deref()).collect();
    let messages: Vec<Option<&str>> = reports.iter().map(|r| r.message.as_deref()).collect();
    let stream_urls: Vec<Option<&str>> = reports.iter().map(|r| r.stream_url.as_deref()).collect();
    let ended: Vec<bool> = reports.iter().map(|r| r.ended).collect();
    let params: [Param<'_>; 8] = [
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
    let rows = writer.query(statement, &params).await.context("write back what became of desktops")?;
    rows.iter().map(|row| Ok((row.try_get(0)?, Answer::of(row.try_get(1)?)))).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use anyhow::bail;

    use super::*;
    use crate::database::contact::TICK;
    use crate::database::outbox::tests::report;

    const DAY: Duration = Duration::from_secs(86_400);
    const DESKTOPS: u128 = 200;

    #[test]
    fn what_a_trigger_of_the_app_raises_is_of_one_desktop_whatever_its_code() {
        let ours = "PL/pgSQL function cyberdesk.report(bigint,uuid) line 40 at SQL statement";
        let theirs = format!(
            "SQL statement \"select\"\nPL/pgSQL function no_end() line 1 at RAISE\nSQL statement \"update\"\n{ours}"
        );
        let cases = [
            ("22P02", "", true),
            ("23514", ours, true),
            ("P0001", &theirs, true),
            ("PT409", &theirs, true),
            ("45000", &theirs, true),
            ("42703", &theirs, true),
            ("42703", ours, false),
            ("42883", "", false),
            ("0A000", "", false),
            ("40001", &theirs, false),
            ("55P03", &theirs, false),
            ("57014", &theirs, false),
            ("CD001", ours, false),
            ("XX000", ours, false),
        ];
        for (code, context, refused) in cases {
            assert_eq!(refuses(code, context), refused, "{code}: {context}");
        }
    }

    /// How long the report of another desktop waits after this was done to the first, whose row is locked or is not.
    async fn wait_of_another(locked: bool, first: impl AsyncFn(&WriteBack)) -> Duration {
        let write_back = WriteBack::default();
        let is_told = |report: &Report| !locked || report.id != Uuid::from_u128(1);
        let write = async || {
            let reports = write_back.outbox().next_reports(Instant::now());
            let mut moved = false;
            for report in &reports {
                let answer = if is_told(report) { Answer::Final } else { Answer::Busy };
                moved |= write_back.outbox().answered(report, answer);
            }
            Ok(moved)
        };
        let told = async {
            first(&write_back).await;
            let began = Instant::now();
            write_back.report(report(2), None);
            while write_back.outbox().since(Uuid::from_u128(2)).is_some() {
                sleep(Duration::from_millis(1)).await;
            }
            began.elapsed()
        };
        tokio::select! {
            () = write_back.run_by(write) => unreachable!("the term is not over"),
            waited = told => waited,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_desktop_told_of_twice_keeps_no_other_waiting() {
        let waited = wait_of_another(false, async |write_back| {
            write_back.report(report(1), None);
            sleep(GATHER / 2).await;
            write_back.report(report(1), None);
            write_back.drained().await;
            sleep(GATHER).await;
        });
        assert!(waited.await <= GATHER + Duration::from_millis(1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_desktop_whose_row_is_locked_keeps_no_other_waiting() {
        let waited = wait_of_another(true, async |write_back| {
            write_back.report(report(1), None);
            sleep(GATHER + Duration::from_millis(1)).await;
        });
        assert!(waited.await <= GATHER + Duration::from_millis(1));
    }

    /// What the database decided is read anew after a batch, and that may fail when all was told.
    #[tokio::test(start_paused = true)]
    async fn once_all_is_told_nobody_waits_though_what_follows_fails() {
        let write_back = WriteBack::default();
        let write = async || {
            let reports = write_back.outbox().next_reports(Instant::now());
            reports.iter().for_each(|report| assert!(write_back.outbox().answered(report, Answer::Final)));
            bail!("connection refused")
        };
        write_back.report(report(1), None);
        tokio::select! {
            () = write_back.run_by(write) => unreachable!("the term is not over"),
            drained = timeout(DAY, write_back.drained()) => drained.expect("nothing waits to be told"),
        }
        (0..100).for_each(|_| write_back.tick());
        assert!(write_back.silence(None).is_zero(), "it was asked nothing");
    }

    /// Desktops change all day long, and half of them come to their deadline; the database is away until the evening.
    #[tokio::test(start_paused = true)]
    async fn a_day_without_the_database_costs_a_try_in_five_seconds_one_line_and_one_round_to_catch_up() {
        let log = tempfile::NamedTempFile::new().expect("a file");
        let subscriber = tracing_subscriber::fmt().with_writer(log.reopen().expect("the file"));
        let logging = tracing::subscriber::set_default(subscriber.finish());
        let (write_back, start) = (WriteBack::default(), Instant::now());
        let (tries, told) = (Cell::new(0), Mutex::new(vec![]));
        let write = async || {
            tries.set(tries.get() + 1);
            if start.elapsed() < DAY {
                bail!("connection refused");
            }
            let (mut outbox, mut told) = (write_back.outbox(), told.lock().expect("nobody panics with it"));
            for id in outbox.next_expiries(Instant::now()) {
                assert!(outbox.expiry_answered(id, Answer::Final));
            }
            for report in outbox.next_reports(Instant::now()) {
                assert!(outbox.answered(&report, Answer::Final));
                told.push(report.generation);
            }
            Ok(true)
        };
        let (mut minute, minutes) = (0, 24 * 60);
        let day = async {
            while minute < minutes {
                minute += 1;
                for id in 1..=DESKTOPS {
                    write_back.report(Report { generation: minute, ..report(id) }, None);
                    if id % 2 == 0 {
                        write_back.expire(Uuid::from_u128(id));
                    }
                }
                assert_eq!(write_back.lag(), 300, "one report of each, and one expiry of every other");
                sleep(Duration::from_secs(60) - Duration::from_millis(1)).await;
                write_back.tick();
            }
            assert_eq!(write_back.oldest(), Some(start), "it is known since when");
            assert_eq!(write_back.silence(None), SignedDuration::try_from(TICK * (24 * 60 - 1)).expect("a time"));
            let by_then = tries.get();
            write_back.drained().await;
            by_then
        };
        let by_then = tokio::select! {
            () = write_back.run_by(write) => unreachable!("the term is not over"),
            by_then = day => by_then,
        };
        drop(logging);
        let at_most = DAY.as_secs() / BACKOFF.1.as_secs() + 10;
        assert!((at_most - 20..=at_most).contains(&by_then), "{by_then} tries");
        let told = told.into_inner().expect("nobody panics with it");
        assert_eq!(told, vec![minutes; 200], "the last of each, and nothing twice");
        assert!(tries.get() - by_then <= 2 && write_back.silence(None).is_zero(), "in the next try");
        let lines = std::fs::read_to_string(log.path()).expect("it is text");
        assert_eq!(lines.lines().count(), 1, "{lines}");
        assert!(lines.contains("cannot write back; will try again"), "{lines}");
    }
}
