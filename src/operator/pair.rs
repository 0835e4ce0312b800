//! The bound pair: judged at the begin of each term, whenever a connection leads elsewhere, and every so often; until
//! it is right, no row is read and nothing of a row is made or deleted.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, ensure};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::ResourceExt;
use kube::runtime::events::EventType;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use super::Operator;
use crate::brake::{ACCEPTED, BOUND, CONFIRM, CONFIRMED_AT, Cause, ClusterSide, Database, DatabaseSide, Missing};
use crate::brake::{SIGN_OF_LIFE, Verdict, judge};
use crate::cluster::CALL_DEADLINE;
use crate::config::Config;
use crate::database::bond;
use crate::events::News;
use crate::lease::{self, Term};
use crate::model::Cr;
use crate::names::Owner;
use crate::telemetry::chain;

/// How often a person's confirmation is looked for.
const LOOK_FOR_CONFIRMATION: Duration = Duration::from_secs(1);
/// How often the database is told that the brake still holds. It takes the operator for away after 45 s.
const TELL: Duration = Duration::from_secs(10);
/// First and longest wait after either side did not answer.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// How database and cluster stand to each other, as far as this daemon knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Pair {
    /// Nobody has judged it in this term: rows are not read, and so nothing is known of any.
    #[default]
    Unjudged,
    /// The rows are the ones that count.
    Right,
    /// A person must say so first.
    Braked,
}

/// Both sides as they were found.
#[derive(Debug)]
struct Sides {
    database: DatabaseSide,
    cluster: ClusterSide,
    missing: Missing,
    lease: ObjectReference,
}

/// What was agreed on, and is still to be written down on both sides.
#[derive(Debug)]
pub(super) struct Agreed {
    database: Database,
    cluster: String,
    confirmed: bool,
}

impl Operator {
    /// Whether nothing may be done on a row's account until a person confirms.
    pub(super) fn is_braked(&self) -> bool {
        *self.pair.borrow() == Pair::Braked
    }

    /// Waits until the rows are the ones that count. Tells whether that took any time.
    pub(super) async fn pair_is_right(&self) -> bool {
        let waits = *self.pair.borrow() != Pair::Right;
        // The sender is here, so it is not gone.
        let _ = self.pair.subscribe().wait_for(|pair| *pair == Pair::Right).await;
        waits
    }

    /// Judges until database and cluster belong together, or a person has said so.
    pub(super) async fn agree(&self, term: Term, config: &Config) -> Agreed {
        tokio::join!(self.cluster.cr_cache.completed(), self.cluster.vm_cache.completed());
        let (mut backoff, mut trouble) = (BACKOFF.0, false);
        let mut told: Option<(String, Instant)> = None;
        loop {
            // Not of the pool, which knows only the database that was right before; and one in its place.
            self.pool.retain(|_, _| false);
            let looked = async {
                let connected = timeout(config.database.connects_within(), config.database.connect()).await;
                let (client, connection) = connected.context("connect to the database: no answer")??;
                // It ends with its client, also while that waits for an answer.
                let driver = AbortOnDropHandle::new(tokio::spawn(connection));
                let sides = self.sides(&client, term).await?;
                anyhow::Ok((sides, client, driver))
            };
            match looked.await {
                Ok((sides, client, _driver)) => {
                    (backoff, trouble) = (BACKOFF.0, false);
                    let Sides { database, cluster, missing, lease } = &sides;
                    match judge(database, cluster, *missing) {
                        Verdict::Braked(cause) => {
                            let message = cause.message(database, cluster, *missing, &config.namespace);
                            let news = told.as_ref().is_none_or(|(known, _)| *known != message);
                            if news {
                                self.pull_brake(cause, &message, lease);
                            }
                            if news || told.as_ref().is_some_and(|(_, at)| at.elapsed() > TELL) {
                                let telling = bond::brake(&client, &cluster.id, &message);
                                if let Some(Err(error)) = self.leadership.tenure.while_held(telling).await {
                                    debug!(error = %chain(error.as_ref()), "cannot tell the database of the brake");
                                }
                                told = Some((message, Instant::now()));
                            }
                            sleep(LOOK_FOR_CONFIRMATION).await;
                        }
                        verdict => return self.accept(sides, verdict),
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut trouble, true) {
                        warn!(error = %chain(error.as_ref()), "cannot tell whether the database is the right one; will try again");
                    }
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
    }

    fn pull_brake(&self, cause: Cause, message: &str, lease: &ObjectReference) {
        error!(cause = cause.as_str(), "braked: {message}");
        self.forget_rows(Pair::Braked);
        self.metrics.braked.set(1);
        let news = News { kind: EventType::Warning, reason: "Braked".to_owned(), note: message.to_owned() };
        self.events.tell_aside(lease.clone(), "Lead", news);
    }

    /// The rows may not be the ones that count: nothing is known of any until they were read anew.
    pub(super) fn forget_rows(&self, pair: Pair) {
        self.pair.send_replace(pair);
        self.store.reset();
    }

    fn accept(&self, sides: Sides, verdict: Verdict) -> Agreed {
        let Sides { database, cluster, .. } = sides;
        self.expected.set(database.itself.clone(), database.epoch);
        self.expected.acknowledged(database.sign_of_life);
        // Connections from before may lead elsewhere.
        self.pool.retain(|_, _| false);
        *self.database_id() = Some(database.itself.id);
        let confirmed = verdict == Verdict::Bind { confirmed: true };
        if confirmed {
            info!(database = %database.itself, "a person has confirmed that database and cluster belong together");
        }
        // The first of two clusters to write it down on both sides wins. Until then nothing is made of the rows.
        if verdict == Verdict::Bound {
            self.release_brake();
        }
        Agreed { database: database.itself, cluster: cluster.id, confirmed }
    }

    fn release_brake(&self) {
        self.metrics.braked.set(0);
        let before = self.pair.send_replace(Pair::Right);
        if before == Pair::Braked {
            info!("the brake is off: database and cluster belong together");
            // What was looked at meanwhile waits for nothing, and if the database goes before its rows are read, nobody
            // else wakes it: its CR has a deadline to keep.
            self.wake_cluster();
        }
        if before != Pair::Right {
            self.resync.notify_one();
        }
    }

    /// Writes down on both sides what was agreed on. The database has accepted this term.
    pub(super) async fn bind(&self, term: Term, agreed: &Agreed) -> anyhow::Result<()> {
        bond::bind(self.writer(term), &agreed.cluster, agreed.confirmed).await?;
        let now = self.clock.now().map(|now| now.cluster);
        // One that was given, and not needed any more when the right database came back, must not hold for later.
        let mut changes = vec![
            (BOUND, Some(agreed.database.to_string())),
            (ACCEPTED, Some(term.epoch.to_string())),
            (SIGN_OF_LIFE, self.expected.sign_of_life().map(|at| at.to_string())),
            (CONFIRM, None),
        ];
        if agreed.confirmed {
            changes.push((CONFIRMED_AT, now.map(|now| now.to_string())));
        }
        let written = timeout(CALL_DEADLINE, self.leadership.annotate(term, &changes)).await;
        ensure!(written.context("write to the Lease")?.context("write to the Lease")?, "the Lease is another's by now");
        self.expected.reached(term.epoch);
        self.release_brake();
        Ok(())
    }

    /// Returns when the pair must be judged anew: a connection leads elsewhere, or rows are missing.
    pub(super) async fn doubt(&self, term: Term, config: &Config) {
        loop {
            tokio::select! {
                () = self.expected.differs() => return warn!("the database is another one than before, or has gone back"),
                () = sleep(config.resync_interval) => (),
            }
            let looked = async {
                let client = self.pool.get().await?;
                self.sides(&client, term).await
            };
            match looked.await {
                Ok(Sides { database, cluster, missing, .. }) => {
                    if judge(&database, &cluster, missing) != Verdict::Bound {
                        return;
                    }
                }
                Err(error) => debug!(error = %chain(error.as_ref()), "cannot tell whether rows are missing"),
            }
        }
    }

    async fn sides(&self, client: &tokio_postgres::Client, term: Term) -> anyhow::Result<Sides> {
        let id = self.cluster.namespace_id().await.context("read the UID of our namespace")?;
        let lease = timeout(CALL_DEADLINE, self.leadership.read(term)).await;
        let lease = lease.context("read the Lease")?.context("read the Lease")?;
        let lease = lease.context("the Lease is another's by now")?;
        let sign_of_life = self.expected.sign_of_life();
        let cluster = ClusterSide { sign_of_life, ..cluster_side(id, term, &lease) };
        let marks = self.marks(cluster.confirmed_at);
        let ids: Vec<Uuid> = marks.iter().map(|(id, _)| *id).collect();
        let (database, lost) = bond::look(client, &ids).await?;
        let (ours, strangers): (Vec<_>, Vec<_>) =
            marks.into_iter().partition(|(_, database_id)| *database_id == Some(database.itself.id));
        let unknown: HashSet<Uuid> = lost.unknown.into_iter().collect();
        let missing = Missing {
            marked: ours.len(),
            unknown: ours.iter().filter(|(id, _)| unknown.contains(id)).count(),
            strangers: strangers.len(),
            live: usize::try_from(lost.live)?,
            vanished: usize::try_from(lost.vanished)?,
        };
        Ok(Sides { database, cluster, missing, lease: reference(&lease) })
    }

    /// The desktops in the cluster that are marked as of a row, each with the database that it is marked as of.
    /// Those from before a confirmation are known to have none, where they have none.
    fn marks(&self, confirmed_at: Option<Timestamp>) -> Vec<(Uuid, Option<Uuid>)> {
        let mark = |owner: &Option<Owner>, database: Option<Uuid>, created: Timestamp| match owner {
            Some(Owner::Row(id)) if confirmed_at.is_none_or(|at| at < created) => Some((*id, database)),
            _ => None,
        };
        let mut marks = self.cluster.cr_cache.each(|_, cr: &Cr| mark(&cr.owner, cr.database, cr.created));
        marks.extend(self.cluster.vm_cache.each(|_, vm| mark(&vm.owner, vm.database, vm.created)));
        marks.sort_unstable();
        marks.dedup();
        marks
    }
}

fn cluster_side(id: String, term: Term, lease: &Lease) -> ClusterSide {
    let annotation = |name: &str| lease.annotations().get(name);
    let database = annotation(BOUND).and_then(|text| Database::parse(text));
    let accepted = annotation(ACCEPTED).and_then(|text| text.parse().ok());
    ClusterSide {
        id,
        term: term.epoch,
        bond: database.zip(accepted),
        confirmation: annotation(CONFIRM).cloned(),
        confirmed_at: annotation(CONFIRMED_AT).and_then(|text| text.parse().ok()),
        sign_of_life: None,
    }
}

fn reference(lease: &Lease) -> ObjectReference {
    ObjectReference {
        api_version: Some("coordination.k8s.io/v1".to_owned()),
        kind: Some("Lease".to_owned()),
        name: Some(lease::NAME.to_owned()),
        namespace: lease.namespace(),
        uid: lease.uid(),
        ..ObjectReference::default()
    }
}
