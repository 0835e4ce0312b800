//! The database's half of the bound pair: what it says of itself, and the watch over where connections lead.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use deadpool_postgres::{Hook, HookError, Pool};
use futures::FutureExt;
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio_postgres::Client;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::connect::{Param, ask, query};
use super::writer::Writer;
use crate::brake::{Database, DatabaseSide, has_gone_back};

/// Longest wait for a new connection to say where it leads.
const PATIENCE: Duration = Duration::from_secs(5);

/// Which database the connections of a pool must lead to. The name behind a URL may come to be another server's at
/// any time, and a database be restored, but a connection stays with the database that it was made to, and a restore
/// cuts all: so each is asked once, before its first use.
#[derive(Debug, Default)]
pub struct Expected {
    known: Mutex<Known>,
    differs: Notify,
}

/// What a connection must lead to.
#[derive(Clone, Debug, Default)]
struct Known {
    /// This database, in no earlier state than at this epoch.
    database: Option<(Database, i64)>,
    /// When that was said.
    since: Option<Instant>,
    /// Nor, but for what a standby may lack, than at this sign of life.
    sign_of_life: Option<Timestamp>,
}

impl Expected {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last sign of life that the database acknowledged, to this leader or to the one before.
    pub(crate) fn sign_of_life(&self) -> Option<Timestamp> {
        self.known().sign_of_life
    }

    /// The last that the database acknowledged is this one.
    pub(crate) fn acknowledged(&self, sign_of_life: Option<Timestamp>) {
        self.known().sign_of_life = sign_of_life;
    }

    /// From now on only this database will do, in no earlier state than at this epoch.
    pub(crate) fn set(&self, database: Database, epoch: i64) {
        let mut known = self.known();
        known.database = Some((database, epoch));
        known.since = Some(Instant::now());
        drop(known);
        // What led elsewhere was told, and judged.
        let _ = self.differs.notified().now_or_never();
    }

    /// It has come to this epoch.
    pub(crate) fn reached(&self, epoch: i64) {
        if let Some((_, known)) = &mut self.known().database {
            *known = epoch;
        }
        let _ = self.differs.notified().now_or_never();
    }

    /// Waits until a connection has led elsewhere.
    pub(crate) async fn differs(&self) {
        self.differs.notified().await;
    }

    /// Uses no connection again that was made before what is expected was last said: one that was in use then may
    /// lead elsewhere.
    pub(super) fn no_older(self: &Arc<Self>) -> Hook {
        let expected = self.clone();
        Hook::sync_fn(move |_, metrics| match expected.known().since {
            Some(since) if metrics.created < since => {
                Err(HookError::message("it is of before the database was judged"))
            }
            _ => Ok(()),
        })
    }

    /// Asks each new connection.
    pub(super) fn hook(self: &Arc<Self>) -> Hook {
        let expected = self.clone();
        Hook::async_fn(move |client, _| {
            let expected = expected.clone();
            Box::pin(async move {
                let Known { database: Some((database, epoch)), sign_of_life, .. } = expected.known().clone() else {
                    return Ok(());
                };
                let statement = "select database_id, system_identifier, database_oid, epoch, \
                                 cyberdesk.last_sign_of_life() from cyberdesk.identity()";
                let answer = tokio::time::timeout(PATIENCE, client.query_typed(statement, &[])).await;
                let answer = answer.map_err(|_| HookError::message("it does not say which database it is"))?;
                let answer = answer.map_err(HookError::Backend)?;
                let is_it = |row: &tokio_postgres::Row| {
                    let (seen, at): (_, i64) = (identity(row)?, row.try_get(3)?);
                    let gone_back = at < epoch || has_gone_back(row.try_get(4)?, sign_of_life);
                    Ok::<_, tokio_postgres::Error>(seen == database && !gone_back)
                };
                if answer.first().is_some_and(|row| is_it(row).unwrap_or(false)) {
                    return Ok(());
                }
                expected.differs.notify_one();
                Err(HookError::message("it leads to another database than before, or to an earlier state of it"))
            })
        })
    }
}

fn identity(row: &tokio_postgres::Row) -> Result<Database, tokio_postgres::Error> {
    Ok(Database { id: row.try_get(0)?, system: row.try_get(1)?, oid: row.try_get(2)? })
}

/// What is missing in the database.
#[derive(Debug, Default)]
pub(crate) struct Lost {
    /// Its desktops that are not over.
    pub(crate) live: i64,
    /// Those of them whose row is gone without a word.
    pub(crate) vanished: i64,
    /// Ids that it has never heard of.
    pub(crate) unknown: Vec<Uuid>,
}

/// Asks the database who it is, and which of these ids it has never heard of.
pub(crate) async fn look(client: &Client, ids: &[Uuid]) -> anyhow::Result<(DatabaseSide, Lost)> {
    let statement = "select database_id, system_identifier, database_oid, epoch, cluster_id, bound_system_identifier, \
                     bound_database_oid, confirmation, cyberdesk.last_sign_of_life() from cyberdesk.pair()";
    let rows = ask(client, statement, &[]).await.context("read which database it is")?;
    let row = rows.first().context("the database has no identity")?;
    let (cluster, system, oid): (Option<String>, Option<String>, Option<i64>) =
        (row.try_get(4)?, row.try_get(5)?, row.try_get(6)?);
    let bond = cluster.zip(system.zip(oid));
    let side = DatabaseSide {
        itself: identity(row)?,
        epoch: row.try_get(3)?,
        bond,
        confirmation: row.try_get(7)?,
        sign_of_life: row.try_get(8)?,
    };
    let statement = "select live, vanished, unknown from cyberdesk.lost($1)";
    let rows = ask(client, statement, &[(&ids, Type::UUID_ARRAY)]).await.context("look for rows that are missing")?;
    let row = rows.first().context("the database does not say what is missing")?;
    Ok((side, Lost { live: row.try_get(0)?, vanished: row.try_get(1)?, unknown: row.try_get(2)? }))
}

/// Binds the database to this cluster.
pub(crate) async fn bind(writer: Writer<'_>, cluster: &str, confirmed: bool) -> anyhow::Result<()> {
    let params: [Param<'_>; 2] = [(&cluster, Type::TEXT), (&confirmed, Type::BOOL)];
    writer.query("select cyberdesk.bind($1, $2, $3, $4)", &params).await.context("bind the database").map(drop)
}

/// Has the database tell its users why nothing is done, unless it is another cluster's.
pub(crate) async fn brake(client: &Client, cluster: &str, because: &str) -> anyhow::Result<()> {
    let params: [Param<'_>; 2] = [(&cluster, Type::TEXT), (&because, Type::TEXT)];
    ask(client, "select cyberdesk.brake($1, $2)", &params).await.context("tell the database of the brake").map(drop)
}

/// Desktops that were over no longer ago than this.
pub(crate) async fn ended_within(pool: &Pool, time: Duration) -> anyhow::Result<Vec<Uuid>> {
    let seconds = time.as_secs_f64();
    let rows = query(pool, "select * from cyberdesk.ended_within($1)", &[(&seconds, Type::FLOAT8)])
        .await
        .context("look for desktops that are over")?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}
