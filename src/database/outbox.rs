//! What waits to be told to the database: pure, with time as an argument.
//!
//! At most one entry per desktop, the newest. Each stays until its answer is final, and none waits behind others
//! that do not move.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::model::{Report, Row};

/// Most entries in one statement: 500 is where a statement takes some 10 ms (measured on 1 M rows).
const BATCH: usize = 500;
/// Wait before a report that the database refused is tried again, or for a new one of the same desktop.
const REFUSED: Duration = Duration::from_secs(60);

/// Reports and expiries without a final answer.
#[derive(Debug, Default)]
pub struct Outbox {
    reports: BTreeMap<Uuid, Report>,
    expiries: BTreeSet<Uuid>,
    /// What each waits since: what it was woken for.
    since: BTreeMap<Uuid, Instant>,
    /// The last entries sent. The next are those after them, so that none waits behind others that do not move.
    sent: Sent,
    /// Reports that the database refuses, by themselves, and when to try them again.
    refused: BTreeMap<Uuid, Instant>,
    /// Expiries that it refuses, by themselves: since when, and when to try them again.
    refused_expiries: BTreeMap<Uuid, (Instant, Instant)>,
}

#[derive(Debug, Default)]
struct Sent {
    report: Uuid,
    expiry: Uuid,
    /// Half of what was sent when the database refused a batch, until batches are taken again.
    size: Option<usize>,
    /// The same of expiries.
    expiry_size: Option<usize>,
}

/// One entry that the database refuses by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Its desktop.
    pub id: Uuid,
    /// Whether this is the first time since it last was answered.
    pub is_news: bool,
}

/// The database's answer to one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It stands, now or since before; or there is nothing that it could change.
    Final,
    /// The row was locked by somebody else.
    Busy,
    /// What was acted on is not what the database has: it must be read anew.
    Stale,
}

impl Answer {
    /// Reads a word of `cyberdesk.report` or `cyberdesk.expire`.
    pub fn of(word: &str) -> Self {
        match word {
            "written" | "same" | "missing" | "expired" | "touched" => Self::Final,
            "busy" => Self::Busy,
            _ => Self::Stale,
        }
    }
}

impl Outbox {
    /// Entries that have no final answer yet.
    pub fn len(&self) -> usize {
        self.reports.len() + self.expiries.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A report to tell. A later word of the same desktop takes the place of an earlier one.
    pub fn report(&mut self, report: Report) {
        self.reports.insert(report.id, report);
    }

    /// The row, with the VM that it is still to be told of: one that was made is not made again, whether or not the
    /// database has heard of it.
    pub fn with_its_vm(&self, row: Row) -> Row {
        let told = || self.reports.get(&row.id)?.vm_uid.clone();
        Row { vm_uid: row.vm_uid.clone().or_else(told), ..row }
    }

    /// A row to end at its deadline.
    pub fn expire(&mut self, id: Uuid) {
        self.expiries.insert(id);
    }

    /// What is to be told of this desktop has waited since then, if not since earlier.
    pub fn waits_since(&mut self, id: Uuid, at: Instant) {
        let since = self.since.entry(id).or_insert(at);
        *since = at.min(*since);
    }

    /// Since when this desktop's entry has waited.
    pub fn since(&self, id: Uuid) -> Option<Instant> {
        self.since.get(&id).copied()
    }

    /// Since when the first of the entries has waited.
    pub fn oldest(&self) -> Option<Instant> {
        self.since.values().min().copied()
    }

    /// The reports of the next statement.
    pub fn next_reports(&mut self, now: Instant) -> Vec<Report> {
        let (after, size) = (self.sent.report, self.sent.size.unwrap_or(BATCH));
        let round = self.reports.range((Excluded(after), Unbounded)).chain(self.reports.range(..=after));
        let due = |id: &Uuid| self.refused.get(id).is_none_or(|until| *until <= now);
        let next: Vec<Report> = round.filter(|(id, _)| due(id)).take(size).map(|(_, report)| report.clone()).collect();
        self.sent.report = next.last().map_or(after, |report| report.id);
        next
    }

    /// The expiries of the next statement.
    pub fn next_expiries(&mut self, now: Instant) -> Vec<Uuid> {
        let (after, size) = (self.sent.expiry, self.sent.expiry_size.unwrap_or(BATCH));
        let due = |id: &&Uuid| self.refused_expiries.get(id).is_none_or(|(_, until)| *until <= now);
        let round = self.expiries.range((Excluded(after), Unbounded)).chain(self.expiries.range(..=after));
        let next: Vec<Uuid> = round.filter(due).take(size).copied().collect();
        self.sent.expiry = next.last().copied().unwrap_or(after);
        next
    }

    /// The database has answered a report. Whether it is done with: a later word that came meanwhile stays.
    pub fn answered(&mut self, report: &Report, answer: Answer) -> bool {
        if answer == Answer::Busy {
            return false;
        }
        self.refused.remove(&report.id);
        if self.reports.get(&report.id) == Some(report) {
            self.reports.remove(&report.id);
        }
        self.settle(report.id);
        true
    }

    /// The database has answered an expiry. Whether it is done with.
    pub fn expiry_answered(&mut self, id: Uuid, answer: Answer) -> bool {
        let done = answer != Answer::Busy;
        if done {
            self.expiries.remove(&id);
            self.refused_expiries.remove(&id);
            self.settle(id);
        }
        done
    }

    fn settle(&mut self, id: Uuid) {
        if !self.reports.contains_key(&id) && !self.expiries.contains(&id) {
            self.since.remove(&id);
        }
    }

    /// The database takes batches again: they grow back to their full size.
    pub fn accepted(&mut self) {
        self.sent.size = grown(self.sent.size);
    }

    /// The same of expiries.
    pub fn expiries_accepted(&mut self) {
        self.sent.expiry_size = grown(self.sent.expiry_size);
    }

    /// Since when the database refuses to end this desktop at its deadline.
    pub fn refused_since(&self, id: Uuid) -> Option<Instant> {
        self.refused_expiries.get(&id).map(|(since, _)| *since)
    }

    /// The database refuses to end one of these: as with reports, halving them leads to it.
    pub fn refuse_expiries(&mut self, batch: &[Uuid], now: Instant) -> Option<Refusal> {
        match batch {
            [one] => {
                let since = self.refused_expiries.get(one).map(|(since, _)| *since);
                self.refused_expiries.insert(*one, (since.unwrap_or(now), now + REFUSED));
                Some(Refusal { id: *one, is_news: since.is_none() })
            }
            batch => {
                self.sent.expiry_size = Some(batch.len().div_ceil(2).max(1));
                self.sent.expiry = batch.first().map_or(Uuid::nil(), before);
                None
            }
        }
    }

    /// The database refuses one of these. Halving them leads to it; the others go on.
    pub fn refuse(&mut self, batch: &[Report], now: Instant) -> Option<Refusal> {
        match batch {
            [one] => {
                let before = self.refused.insert(one.id, now + REFUSED);
                Some(Refusal { id: one.id, is_news: before.is_none() })
            }
            batch => {
                self.sent.size = Some(batch.len().div_ceil(2).max(1));
                // The same again, from before the first of them.
                self.sent.report = batch.first().map_or(Uuid::nil(), |first| before(&first.id));
                None
            }
        }
    }
}

fn before(id: &Uuid) -> Uuid {
    Uuid::from_u128(id.as_u128().wrapping_sub(1))
}

fn grown(size: Option<usize>) -> Option<usize> {
    size.map(|size| size * 2).filter(|size| *size < BATCH)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One without news.
    pub(in crate::database) fn report(id: u128) -> Report {
        Report {
            id: Uuid::from_u128(id),
            generation: 1,
            vm_uid: None,
            status: None,
            reason: None,
            message: None,
            stream_url: None,
            ended: false,
        }
    }

    fn outbox_of(ids: impl IntoIterator<Item = u128>) -> Outbox {
        let reports = ids.into_iter().map(|id| (Uuid::from_u128(id), report(id))).collect();
        Outbox { reports, ..Outbox::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn entries_that_do_not_move_hold_up_no_others() {
        let mut outbox = outbox_of(1..=1200);
        let now = Instant::now();
        let mut sent: Vec<u128> = (0..3).flat_map(|_| outbox.next_reports(now)).map(|r| r.id.as_u128()).collect();
        sent.sort_unstable();
        sent.dedup();
        assert_eq!(sent.len(), 1200, "in three batches of 500 each was sent, though none was answered");
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_waits_since_it_was_first_to_be_told_until_all_of_its_desktop_is_answered() {
        let mut outbox = outbox_of(1..=1);
        let (now, id) = (Instant::now(), Uuid::from_u128(1));
        outbox.waits_since(id, now + REFUSED);
        outbox.waits_since(id, now);
        outbox.expire(id);
        let told = outbox.next_reports(now).remove(0);
        assert!(!outbox.answered(&told, Answer::Busy));
        assert!(outbox.answered(&told, Answer::Final));
        assert_eq!((outbox.oldest(), outbox.since(id)), (Some(now), Some(now)), "its expiry is not answered");
        assert!(outbox.expiry_answered(id, Answer::Final));
        assert_eq!((outbox.oldest(), outbox.since(id)), (None, None));
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_that_the_database_refuses_ends_up_alone_and_the_others_pass_it_by() {
        let mut outbox = outbox_of(1..=700);
        let now = Instant::now();
        let poison = Uuid::from_u128(333);
        let mut statements = 0;
        while outbox.reports.len() > 1 {
            statements += 1;
            assert!(statements < 40, "{} are left", outbox.reports.len());
            let batch = outbox.next_reports(now);
            if batch.iter().any(|report| report.id == poison) {
                outbox.refuse(&batch, now);
            } else {
                outbox.accepted();
                batch.iter().for_each(|report| assert!(outbox.answered(report, Answer::Final)));
            }
        }
        assert!(outbox.reports.contains_key(&poison));
        if let [last] = outbox.next_reports(now).as_slice() {
            outbox.refuse(std::slice::from_ref(last), now);
        }
        assert_eq!(outbox.next_reports(now), [], "it is left alone for a while");
        assert_eq!(outbox.next_reports(now + REFUSED).len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_expiry_that_the_database_refuses_holds_up_no_other_and_is_remembered() {
        let mut outbox = Outbox { expiries: (1..=700).map(Uuid::from_u128).collect(), ..Outbox::default() };
        let (now, poison) = (Instant::now(), Uuid::from_u128(333));
        for _ in 0..40 {
            let batch = outbox.next_expiries(now);
            if batch.contains(&poison) {
                outbox.refuse_expiries(&batch, now);
            } else {
                outbox.expiries_accepted();
                batch.iter().for_each(|id| assert!(outbox.expiry_answered(*id, Answer::Final)));
            }
        }
        assert!(outbox.next_expiries(now).is_empty(), "all others are done, and it is left alone for a while");
        assert_eq!(outbox.refused_since(poison), Some(now));
        assert_eq!(outbox.next_expiries(now + REFUSED), [poison]);
        outbox.refuse_expiries(&[poison], now + REFUSED);
        assert_eq!(outbox.refused_since(poison), Some(now), "since the first time");
    }

    /// The database is there, and refuses all that it is told, for a day in which the desktops go on changing.
    #[tokio::test(start_paused = true)]
    async fn a_day_of_refusals_costs_each_entry_a_try_a_minute_and_one_line() {
        const DESKTOPS: usize = 10;
        let (mut outbox, start, day) = (Outbox::default(), Instant::now(), Duration::from_secs(86_400));
        let (mut now, mut generation, mut tries, mut news) = (start, 0, [0, 0], [0, 0]);
        while now < start + day {
            generation += 1;
            for id in (1..).take(DESKTOPS) {
                outbox.report(Report { generation, ..report(id) });
                outbox.expire(Uuid::from_u128(id));
                outbox.waits_since(Uuid::from_u128(id), now);
            }
            // Until none is due.
            for _ in 0..2 * DESKTOPS {
                let (reports, expiries) = (outbox.next_reports(now), outbox.next_expiries(now));
                tries[0] += usize::from(!reports.is_empty());
                tries[1] += usize::from(!expiries.is_empty());
                let is_news = |refusal: Option<Refusal>| usize::from(refusal.is_some_and(|refusal| refusal.is_news));
                news[0] += if reports.is_empty() { 0 } else { is_news(outbox.refuse(&reports, now)) };
                news[1] += if expiries.is_empty() { 0 } else { is_news(outbox.refuse_expiries(&expiries, now)) };
            }
            assert!(outbox.next_reports(now).is_empty() && outbox.next_expiries(now).is_empty());
            assert_eq!((outbox.len(), outbox.since.len()), (2 * DESKTOPS, DESKTOPS));
            assert_eq!((outbox.refused.len(), outbox.refused_expiries.len()), (DESKTOPS, DESKTOPS));
            now += REFUSED / 6;
        }
        assert_eq!(news, [DESKTOPS; 2], "each is told once");
        let least = 24 * 60 * DESKTOPS;
        assert!(tries.iter().all(|tries| (least..least + 10).contains(tries)), "{tries:?} tries in a day");
        now += REFUSED;
        let mut statements = 0;
        while !outbox.is_empty() {
            statements += 1;
            let (reports, expiries) = (outbox.next_reports(now), outbox.next_expiries(now));
            outbox.accepted();
            outbox.expiries_accepted();
            for report in &reports {
                assert_eq!(report.generation, generation, "the last word");
                outbox.answered(report, Answer::Final);
            }
            expiries.iter().for_each(|id| assert!(outbox.expiry_answered(*id, Answer::Final)));
        }
        assert!(statements <= 5, "it is caught up in {statements} statements of each kind");
        assert!(outbox.refused.is_empty() && outbox.refused_expiries.is_empty() && outbox.since.is_empty());
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { cases: 64, ..Default::default() })]

        /// For as long as the database does not answer, however much there is to tell: one entry per desktop. When it
        /// answers all, nothing is left of anything.
        #[test]
        fn whatever_is_told_of_some_desktops_keeps_one_entry_of_each(
            told in proptest::collection::vec((1..8_u128, 0..5_u8), 1..300),
        ) {
            let (mut outbox, now) = (Outbox::default(), Instant::now());
            for (number, (id, what)) in told.into_iter().enumerate() {
                let later = now + REFUSED * u32::try_from(number).expect("it is small");
                let id = Uuid::from_u128(id);
                outbox.waits_since(id, later);
                match what {
                    0 => outbox.expire(id),
                    1 => {
                        let batch = outbox.next_reports(later);
                        outbox.refuse(&batch, later);
                    }
                    2 => {
                        let batch = outbox.next_expiries(later);
                        outbox.refuse_expiries(&batch, later);
                    }
                    _ => outbox.report(Report { generation: i64::from(what), ..report(id.as_u128()) }),
                }
                assert!(outbox.reports.len() <= 7 && outbox.expiries.len() <= 7 && outbox.since.len() <= 7);
                assert!(outbox.refused.len() <= 7 && outbox.refused_expiries.len() <= 7);
            }
            let later = now + REFUSED * 1000;
            for _ in 0..20 {
                let (reports, expiries) = (outbox.next_reports(later), outbox.next_expiries(later));
                reports.iter().for_each(|report| assert!(outbox.answered(report, Answer::Final)));
                expiries.iter().for_each(|id| assert!(outbox.expiry_answered(*id, Answer::Final)));
            }
            assert!(outbox.is_empty() && outbox.refused.is_empty() && outbox.refused_expiries.is_empty());
        }
    }
}
