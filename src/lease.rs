//! Leadership: of several daemons one works, and none goes on after its time.
//!
//! A Lease in our namespace says who leads. Its counter (`leaseTransitions`) is raised by compare-and-swap by
//! whoever takes it, and is the epoch of the term: the database refuses a lesser one. Either side is written only
//! while the lease is held ([`Tenure`]).
//!
//! What must stay true:
//!
//! - A leader counts its lease from before it asked for the renewal, a candidate from after it saw it, both by
//!   their own monotonic clocks: the leader's is over first. Nobody's wall clock matters.
//! - A term has an epoch greater than every one that this process has seen, of Lease or database. So a Lease
//!   that somebody deletes, or a database that knows a later epoch, costs a new term and nothing more.
//! - Holder names are for people, but for one thing: a container that starts anew in its pod finds its own name
//!   in the Lease. Its predecessor is dead, so it need not wait.

mod candidate;
mod tenure;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use futures::{Stream, StreamExt, pin_mut};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Api;
use kube::api::{ObjectMeta, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tracing::{info, warn};
use uuid::Uuid;

use crate::brake::{BOUND, Database, SIGN_OF_LIFE};
use crate::clock::Clock;
use crate::cluster::server_time;
use crate::database::bond::Expected;
use crate::health::Pulse;
use crate::telemetry::chain;
use candidate::{Candidate, Next};
use tenure::Held;
pub use tenure::Tenure;

/// The Lease's name, in the namespace of the CRs.
pub(crate) const NAME: &str = "cyberdesk-operator";
/// How far the database's clock is ahead of the API server's, in milliseconds, kept for a leader that starts while
/// the database is away.
const DATABASE_CLOCK: &str = "cyberdesk.io/database-clock-offset-ms";
/// How long a lease lasts after it was last renewed: a killed leader's successor begins within this.
const LASTS: Duration = Duration::from_secs(12);
/// The leader gives up this long before the others may begin: clocks do not run at one speed, and what was sent
/// needs time to land.
const MARGIN: Duration = Duration::from_secs(2);
/// How often the leader renews it. Five renewals must fail in a row before it is lost.
const RENEWAL: Duration = Duration::from_secs(2);
/// Wait after a call to the API server failed.
const RETRY: Duration = Duration::from_millis(500);
/// Longest time for one call: one that nobody answers must leave time for another.
const ANSWER: Duration = Duration::from_secs(4);

const _: () = assert!(RENEWAL.as_secs() * 4 < LASTS.as_secs() - MARGIN.as_secs());
const _: () = assert!(RENEWAL.as_secs() + 2 * ANSWER.as_secs() <= LASTS.as_secs() - MARGIN.as_secs());

/// The right to write, for as long as nobody has a later one. The database checks it in every writing function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// Greater than that of every leader before.
    pub epoch: i64,
    /// Tells two leaders apart that came by the same epoch: of two clusters, or of a copied database.
    pub token: Uuid,
}

/// Who leads, as far as this process knows and may act on.
#[derive(Debug)]
pub struct Leadership {
    api: Api<Lease>,
    identity: String,
    /// What the database acknowledged is kept in the Lease, for the next leader.
    expected: Arc<Expected>,
    pub(crate) tenure: Tenure,
    /// The greatest epoch seen anywhere.
    floor: AtomicI64,
    /// The database knows an epoch that is not below ours.
    behind: Notify,
    /// The Lease was read or written.
    pub(crate) seen: Pulse,
    /// The election goes on, whatever came of its calls.
    pub(crate) moved: Pulse,
}

impl Leadership {
    /// `identity` names this process in the Lease: in a pod, the pod's name.
    pub fn new(api: Api<Lease>, identity: String, expected: Arc<Expected>) -> Self {
        let (tenure, seen, moved) = Default::default();
        Self { api, identity, expected, tenure, floor: AtomicI64::new(0), behind: Notify::new(), seen, moved }
    }

    /// The Lease as it is now, if it is still of this term. What was read of it at its last renewal may lack what
    /// was annotated since.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub(crate) async fn read(&self, term: Term) -> kube::Result<Option<Lease>> {
        Ok(self.api.get_opt(NAME).await?.filter(|lease| self.is_of(lease, term)))
    }

    /// Sets or takes out annotations of the Lease, if it is still of this term. Tells whether it is.
    ///
    /// # Errors
    ///
    /// If it may not have been done.
    pub(crate) async fn annotate(&self, term: Term, changes: &[(&str, Option<String>)]) -> kube::Result<bool> {
        loop {
            let Some(mut lease) = self.read(term).await? else { return Ok(false) };
            let annotations = lease.metadata.annotations.get_or_insert_default();
            let before = annotations.clone();
            for (name, value) in changes {
                match value {
                    Some(value) => drop(annotations.insert((*name).to_owned(), value.clone())),
                    None => drop(annotations.remove(*name)),
                }
            }
            if *annotations == before {
                return Ok(true);
            }
            lease.metadata.managed_fields = None;
            match self.api.replace(NAME, &PostParams::default(), &lease).await {
                // The next renewal finds a later version than it knows, and takes it in.
                Ok(_) => return Ok(true),
                Err(error) if is_conflict(&error) => (),
                Err(error) => return Err(error),
            }
        }
    }

    /// The database that the Lease was bound to when it was last written.
    pub fn bound_to(&self) -> Option<Uuid> {
        let held = self.tenure.0.borrow();
        let bound = held.as_ref()?.lease.metadata.annotations.as_ref()?.get(BOUND)?;
        Some(Database::parse(bound)?.id)
    }

    /// Waits until this process leads.
    pub async fn begun(&self) -> Term {
        self.other_than(None).await
    }

    /// Waits until this process does not lead.
    pub async fn ended(&self) {
        // The sender is here, so it is not gone.
        let _ = self.tenure.0.subscribe().wait_for(Option::is_none).await;
    }

    /// Tells that the database knows this epoch and so refuses ours. Answers the next term, which is above it.
    pub async fn raise_above(&self, epoch: i64, refused: Term) -> Term {
        self.floor.fetch_max(epoch, Ordering::Relaxed);
        self.behind.notify_one();
        self.other_than(Some(refused)).await
    }

    async fn other_than(&self, refused: Option<Term>) -> Term {
        let mut held = self.tenure.0.subscribe();
        let held = held.wait_for(|held| held.as_ref().is_some_and(|held| Some(held.term) != refused)).await;
        held.ok().and_then(|held| Some(held.as_ref()?.term)).expect("the sender is here, and waits for a term")
    }

    /// Stands for election, leads, and stands again, for as long as the daemon runs.
    pub(crate) async fn run(&self, clock: &Clock) {
        let mut first = true;
        loop {
            let held = self.campaign(std::mem::take(&mut first), clock).await;
            info!(epoch = held.term.epoch, "leading");
            let lost = self.keep(held, clock).await;
            self.tenure.0.send_replace(None);
            warn!(why = lost, "no longer leading; standing by");
        }
    }

    /// Gives the Lease back, so that another begins at once. One that is not ours any more is left alone.
    pub(crate) async fn release(&self) {
        let Some(held) = self.tenure.0.send_replace(None) else { return };
        let mut lease = held.lease;
        for _ in 0..2 {
            let spec = lease.spec.get_or_insert_default();
            spec.holder_identity = None;
            spec.lease_duration_seconds = Some(1);
            match self.api.replace(NAME, &PostParams::default(), &lease).await {
                Ok(_) => return info!("gave the Lease back"),
                // A renewal was under way when we stopped.
                Err(error) if is_conflict(&error) => match self.api.get(NAME).await {
                    Ok(now) if self.is_of(&now, held.term) => lease = now,
                    _ => return,
                },
                Err(error) => return warn!(error = %chain(&error), "cannot give the Lease back: it runs out by itself"),
            }
        }
    }

    /// Waits for its turn and takes the Lease.
    async fn campaign(&self, first: bool, clock: &Clock) -> Held {
        let mut candidate = Candidate::new(self.identity.clone(), first);
        let watch = watch_object(self.api.clone(), NAME).default_backoff();
        pin_mut!(watch);
        loop {
            self.moved.beat();
            match candidate.next(Instant::now()) {
                Next::Wait(until) => self.observe(&mut watch, &mut candidate, until).await,
                Next::Take => {
                    self.know_the_time(clock).await;
                    let began = Instant::now();
                    match self.take(&candidate, clock).await {
                        Ok(lease) => return self.hold(began, lease),
                        // Somebody was quicker, or the watch has been silent.
                        Err(error) if is_conflict(&error) => match in_time(self.api.get_opt(NAME)).await {
                            Ok(lease) => self.sees(&mut candidate, lease),
                            Err(_) => sleep(RETRY).await,
                        },
                        Err(error) => {
                            candidate.warn_once(&error, "cannot take the Lease; will try again");
                            sleep(RETRY).await;
                        }
                    }
                }
            }
        }
    }

    async fn observe(
        &self,
        watch: &mut (impl Stream<Item = Result<Option<Lease>, kube::runtime::watcher::Error>> + Unpin),
        candidate: &mut Candidate,
        until: Option<Instant>,
    ) {
        let due = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            seen = watch.next() => match seen {
                Some(Ok(lease)) => self.sees(candidate, lease),
                // It goes on after its back-off; when the lease is due, the take itself finds out.
                Some(Err(error)) => candidate.warn_once(&error, "cannot watch the Lease; will try again"),
                None => sleep(RETRY).await,
            },
            () = due => (),
        }
    }

    fn sees(&self, candidate: &mut Candidate, lease: Option<Lease>) {
        self.seen.beat();
        candidate.observe(lease, Instant::now());
    }

    /// A Lease that is taken without the time would look, to people and programs, as if it had run out long ago.
    async fn know_the_time(&self, clock: &Clock) {
        if clock.now().is_none()
            && let Ok(Ok(reading)) = timeout(ANSWER, server_time(&self.api.clone().into_client())).await
        {
            clock.cluster(reading);
        }
    }

    /// One try. It succeeds only on the version that was seen.
    async fn take(&self, candidate: &Candidate, clock: &Clock) -> kube::Result<Lease> {
        let seen = candidate.lease();
        if let Some(offset) = seen.and_then(database_clock) {
            clock.recall(offset);
        }
        self.expected.acknowledged(seen.and_then(sign_of_life));
        let last = seen.map_or(0, epoch_of);
        self.floor.fetch_max(last, Ordering::Relaxed);
        let lease = self.written(seen.cloned().unwrap_or_default(), self.next_epoch(), clock);
        match seen {
            Some(_) => in_time(self.api.replace(NAME, &PostParams::default(), &lease)).await,
            None => in_time(self.api.create(&PostParams::default(), &lease)).await,
        }
    }

    /// Renews for as long as that can be done. Answers why it ended.
    async fn keep(&self, mut held: Held, clock: &Clock) -> &'static str {
        loop {
            self.moved.beat();
            let behind = tokio::select! {
                () = sleep(RENEWAL) => false,
                () = self.behind.notified() => true,
            };
            let epoch = if behind { self.next_epoch() } else { held.term.epoch };
            let mut trouble = false;
            held = loop {
                let began = Instant::now();
                let lease = self.written(held.lease.clone(), epoch, clock);
                match timeout_at(held.until, in_time(self.api.replace(NAME, &PostParams::default(), &lease))).await {
                    Ok(Ok(lease)) if behind => break self.hold(began, lease),
                    Ok(Ok(lease)) => break self.renewed(&held, began, lease),
                    Ok(Err(error)) if is_conflict(&error) => {
                        match timeout_at(held.until, in_time(self.api.get_opt(NAME))).await {
                            // Only what is none of ours was written: somebody's annotation.
                            Ok(Ok(Some(now))) if self.is_of(&now, held.term) => held.lease = now,
                            Ok(Ok(Some(_))) => return "another daemon has taken the Lease",
                            Ok(Ok(None)) => return "somebody deleted the Lease",
                            Ok(Err(_)) => sleep(RETRY).await,
                            Err(_) => return "the Lease ran out before it could be renewed",
                        }
                    }
                    Ok(Err(error)) => {
                        if !std::mem::replace(&mut trouble, true) {
                            warn!(error = %chain(&error), "cannot renew the Lease; will try again");
                        }
                        sleep(RETRY).await;
                    }
                    Err(_) => return "the Lease ran out before it could be renewed",
                }
            };
        }
    }

    fn hold(&self, began: Instant, lease: Lease) -> Held {
        let term = Term { epoch: epoch_of(&lease), token: Uuid::new_v4() };
        self.renewed(&Held { term, until: began, lease: Lease::default() }, began, lease)
    }

    fn renewed(&self, held: &Held, began: Instant, lease: Lease) -> Held {
        let held = Held { term: held.term, until: began + LASTS - MARGIN, lease };
        self.tenure.0.send_replace(Some(held.clone()));
        self.seen.beat();
        held
    }

    fn next_epoch(&self) -> i64 {
        self.floor.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The Lease as this process writes it. What others keep in it stays.
    fn written(&self, mut lease: Lease, epoch: i64, clock: &Clock) -> Lease {
        lease.metadata = ObjectMeta { name: Some(NAME.to_owned()), managed_fields: None, ..lease.metadata };
        if let Some(offset) = clock.offset() {
            let annotations = lease.metadata.annotations.get_or_insert_default();
            annotations.insert(DATABASE_CLOCK.to_owned(), offset.as_millis().to_string());
        }
        if let Some(at) = self.expected.sign_of_life() {
            let annotations = lease.metadata.annotations.get_or_insert_default();
            annotations.insert(SIGN_OF_LIFE.to_owned(), at.to_string());
        }
        let now = clock.now().map(|now| MicroTime(now.cluster));
        let spec = lease.spec.get_or_insert_default();
        let anew = spec.lease_transitions.map(i64::from) != Some(epoch);
        *spec = LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(LASTS.as_secs()).ok(),
            lease_transitions: i32::try_from(epoch).ok(),
            acquire_time: if anew { now.clone() } else { spec.acquire_time.clone() },
            renew_time: now.or_else(|| spec.renew_time.clone()).or(Some(MicroTime(Timestamp::UNIX_EPOCH))),
            ..spec.clone()
        };
        lease
    }

    fn is_of(&self, lease: &Lease, term: Term) -> bool {
        holder(lease) == Some(&self.identity) && epoch_of(lease) == term.epoch
    }
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref().filter(|holder| !holder.is_empty())
}

fn epoch_of(lease: &Lease) -> i64 {
    lease.spec.as_ref().and_then(|spec| spec.lease_transitions).map_or(0, i64::from)
}

/// How far the database's clock was ahead of the API server's when a leader last read both.
fn database_clock(lease: &Lease) -> Option<SignedDuration> {
    let milliseconds = lease.metadata.annotations.as_ref()?.get(DATABASE_CLOCK)?.parse().ok()?;
    Some(SignedDuration::from_millis(milliseconds))
}

/// The last sign of life that the database acknowledged to the leader before.
fn sign_of_life(lease: &Lease) -> Option<Timestamp> {
    lease.metadata.annotations.as_ref()?.get(SIGN_OF_LIFE)?.parse().ok()
}

/// One call that is given up when nobody answers. It may have been done all the same.
async fn in_time<T>(call: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    let unanswered = |_| kube::Error::Service(format!("no answer within {} s", ANSWER.as_secs()).into());
    timeout(ANSWER, call).await.map_err(unanswered)?
}

/// The Lease is another by now, or gone, or there already.
fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 404 | 409))
}
