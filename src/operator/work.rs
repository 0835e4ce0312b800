//! The workers: each looks at one desktop at a time, plans and acts until nothing is left to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::Operator;
use crate::act::Acted;
use crate::database::rows;
use crate::database::store::Remembered;
use crate::model::{Row, Seen, Silence, Vm, Vmi};
use crate::names::Key;
use crate::plan::{Plan, View, plan};
use crate::queue::{Lane, Outcome};
use crate::telemetry::chain;
use crate::template::Templates;

/// Most rounds of look, plan and act before a desktop waits for its turn again. A life takes one to
/// three at a time; one that needs more is going in circles.
const ROUNDS: usize = 8;
/// Part of the concurrency that only ends and deadlines may use, so that a burst of new desktops delays no shutdown.
const KEPT_FOR_ENDS: usize = 6;
/// Part of that which only deadlines may use: an end takes as long as the API server does, and they wait for none.
const KEPT_FOR_DEADLINES: usize = 2;
/// Longest wait for the templates before others are served than those that need one.
const TEMPLATES_UNREAD: Duration = Duration::from_secs(5);
/// Longest wait for a deadline; one that is further away is looked at again then.
const LONGEST_WAIT: Duration = Duration::from_secs(86_400);

/// Takes keys as they come due and works on them, at most `concurrency` at once. When told to stop it
/// takes no more, and returns when all that was begun is done and written back.
pub(super) async fn work(operator: &Arc<Operator>, concurrency: usize, stopping: &CancellationToken) {
    // What has not been listed yet would be taken for unknown, and nothing would wake it again.
    let listed = async {
        let ((), (), (), ()) = tokio::join!(
            operator.templates_are_read(),
            operator.cluster.cr_cache.completed(),
            operator.cluster.vm_cache.completed(),
            operator.cluster.vmi_cache.completed(),
        );
    };
    if stopping.run_until_cancelled(listed).await.is_none() {
        return;
    }
    operator.pulses.turn.beat();
    let slots = Arc::new(Semaphore::new(concurrency));
    let mut steps = JoinSet::new();
    loop {
        let slot = slots.clone().acquire_owned().await.expect("the slots are never closed");
        let room = || operator.in_flight.room(concurrency);
        let Some((key, lane)) = stopping.run_until_cancelled(operator.queue.next(room)).await else {
            break;
        };
        operator.pulses.turn.beat();
        let mut turn = Turn::begin(operator.clone(), key, lane);
        steps.spawn(async move {
            turn.outcome = turn.operator.step(&turn.key, turn.lane).await;
            drop((turn, slot));
        });
        while let Some(ended) = steps.try_join_next() {
            report_panic(ended);
        }
    }
    while let Some(ended) = steps.join_next().await {
        report_panic(ended);
    }
    operator.write_back.drained().await;
}

/// How many desktops are being worked on. Those that are due are not counted: they take a moment.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    ends: AtomicUsize,
    makes: AtomicUsize,
}

impl InFlight {
    fn of(&self, lane: Lane) -> Option<&AtomicUsize> {
        match lane {
            Lane::Due => None,
            Lane::Ends => Some(&self.ends),
            Lane::Makes | Lane::Looks => Some(&self.makes),
        }
    }

    /// The last lane that there is room for.
    fn room(&self, concurrency: usize) -> Lane {
        let (ends, makes) = (self.ends.load(Ordering::Relaxed), self.makes.load(Ordering::Relaxed));
        let most = |kept: usize| concurrency - kept.min(concurrency - 1);
        if ends + makes >= most(KEPT_FOR_DEADLINES) {
            Lane::Due
        } else if makes >= most(KEPT_FOR_ENDS) {
            Lane::Ends
        } else {
            Lane::Looks
        }
    }
}

/// One key's turn. However it ends, the queue hears of it: a key that is never done is never looked at again.
struct Turn {
    operator: Arc<Operator>,
    key: Key,
    lane: Lane,
    outcome: Outcome,
}

impl Turn {
    fn begin(operator: Arc<Operator>, key: Key, lane: Lane) -> Self {
        if let Some(count) = operator.in_flight.of(lane) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        Self { operator, key, lane, outcome: FAILED }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(count) = self.operator.in_flight.of(self.lane) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
        self.operator.queue.done(&self.key, self.lane, self.outcome);
    }
}

/// What a look has led to.
struct Look {
    plan: Plan,
    /// The row should have been read, and could not be: there is to be another look, and nothing else brings it.
    unread: bool,
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        error!(%error, "a look at a desktop ended in a panic: this is a bug; it will be looked at again");
    }
}

/// To be tried again after the back-off.
const FAILED: Outcome = Outcome::Failed { at_least: Duration::ZERO, deadline: None };

impl Operator {
    /// Waits for the templates, but not for long: what ends needs none, and what is to be made can wait by itself.
    async fn templates_are_read(&self) {
        let mut templates = self.templates.subscribe();
        // What it answers locks the templates: kept while others are waited for, it would stop whoever replaces them,
        // and with them the whole daemon.
        let read = async { drop(templates.wait_for(Option::is_some).await) };
        if timeout(TEMPLATES_UNREAD, read).await.is_err() {
            self.templates.send_if_modified(|templates| {
                let unread = templates.is_none();
                if unread {
                    *templates = Some(Arc::new(Templates::unread()));
                }
                unread
            });
        }
    }

    /// Looks, plans and acts on one desktop until nothing is left to do, or something must be waited for.
    async fn step(&self, key: &Key, lane: Lane) -> Outcome {
        let mut live = None;
        for _ in 0..ROUNDS {
            // Neither side has told the time yet.
            let Some(Look { plan: Plan { actions, wait, .. }, unread }) = self.look(key, lane, live.take()).await
            else {
                return FAILED;
            };
            let deadline = wait.map(|wait| Instant::now() + wait.min(LONGEST_WAIT));
            match (actions.is_empty(), unread) {
                (true, true) => return Outcome::Failed { at_least: Duration::ZERO, deadline },
                (true, false) => return Outcome::Settled(deadline),
                (false, _) => (),
            }
            let mut told = false;
            for action in actions {
                match self.act(key, action).await {
                    Ok(Acted::Done) => (),
                    Ok(Acted::Told) => told = true,
                    Ok(Acted::Overtaken) => break,
                    Ok(Acted::Looked(seen)) => live = Some(*seen),
                    Ok(Acted::Forgotten) => return Outcome::Settled(None),
                    Err(error) => {
                        let why = chain(&error);
                        // Once per trouble: the back-off repeats it for as long as it lasts.
                        match self.queue.has_failed(key) {
                            false => warn!(desktop = %key, error = %why, "not done; the next look decides anew"),
                            true => debug!(desktop = %key, error = %why, "still not done"),
                        }
                        return Outcome::Failed { at_least: error.retry_after(), deadline };
                    }
                }
            }
            if told || !self.queue.another_look(key, lane) {
                return Outcome::Settled(deadline);
            }
        }
        if !self.queue.has_failed(key) {
            warn!(desktop = %key, "not settled after {ROUNDS} rounds; will look again");
        }
        FAILED
    }

    /// Collects what is known of a desktop, and what follows from it. `None`: too little is known to decide.
    async fn look(&self, key: &Key, lane: Lane, live: Option<(Seen<Vm>, Seen<Vmi>)>) -> Option<Look> {
        let now = self.clock.now()?;
        let templates = self.templates.borrow().clone()?;
        let cr = self.cluster.cr_cache.get(key);
        let is_live = live.is_some();
        let (vm, vmi) = live.unwrap_or_else(|| (self.cluster.vm_cache.get(key), self.cluster.vmi_cache.get(key)));
        let known = !matches!((&cr, &vm, &vmi), (Seen::Absent, Seen::Absent, Seen::Absent));
        let row = self.row(key, known).await.inspect_err(|error| {
            if !self.queue.has_failed(key) {
                warn!(desktop = %key, error = %chain(error.as_ref()), "cannot read the row; will try again");
            }
        });
        let unread = row.is_err();
        let row = row.unwrap_or(Seen::Unknown).map(|row| self.write_back.with_its_vm(row));
        let silence = Silence { reads: self.reads.silence(), writes: self.write_back.silence(key.row_id()) };
        let failure = self.failures().get(key).cloned();
        let fleet = self.fleet().standing(key, now.cluster);
        let paused = self.paused.load(Ordering::Relaxed);
        let failure = failure.as_ref();
        let view = View {
            key,
            row,
            cr,
            vm,
            vmi,
            live: is_live,
            silence,
            failure,
            fleet: &fleet,
            paused,
            braked: self.is_braked(),
            database: *self.database_id(),
            orphan_rest: self.orphans().rest(key, self.orphan_grace),
            templates: &templates,
        };
        let mut plan = plan(&view, now);
        self.note_orphan(&view, plan.orphan);
        let others = self.fleet().note(key, plan.progress.take(), plan.ready, now.cluster);
        others.iter().for_each(|other| self.queue.wake(other, Lane::Makes));
        let lane = lane.as_str();
        debug!(desktop = %key, lane, cr = ?view.cr, vm = ?view.vm, vmi = ?view.vmi, actions = ?plan.actions, "looked");
        Some(Look { plan, unread })
    }

    /// The row of a key. It is asked for only if something in the cluster has its name.
    async fn row(&self, key: &Key, known_in_cluster: bool) -> anyhow::Result<Seen<Row>> {
        Ok(match self.store.get(key) {
            Remembered::Row(row) => Seen::Present(*row),
            Remembered::NotARow => Seen::Absent,
            // The list wakes all when it is there.
            Remembered::Nothing(_) if !self.store.is_complete() => Seen::Unknown,
            Remembered::Nothing(_) if !known_in_cluster => Seen::Absent,
            Remembered::Nothing(id) => {
                let found = rows::by_id(&self.pool, &[id], &self.store.unreadable).await?;
                let row = found.rows.into_iter().next();
                anyhow::ensure!(row.is_some() || !found.missing.is_empty(), "it is there, and cannot be read");
                self.store.found(id, row)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_are_made_and_ended_there_is_room_for_those_that_are_due() {
        for (concurrency, ends, makes, last) in [
            (64, 0, 57, Lane::Looks),
            (64, 0, 58, Lane::Ends),
            (64, 3, 58, Lane::Ends),
            (64, 4, 58, Lane::Due),
            (64, 62, 0, Lane::Due),
            (64, 61, 0, Lane::Looks),
            (4, 0, 0, Lane::Looks),
            (4, 0, 1, Lane::Ends),
            (4, 1, 1, Lane::Due),
        ] {
            let in_flight = InFlight { ends: ends.into(), makes: makes.into() };
            assert_eq!(in_flight.room(concurrency), last, "{ends} ends and {makes} makes of {concurrency}");
        }
    }
}
