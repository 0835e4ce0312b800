//! Reading rows.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use deadpool_postgres::Pool;
use jiff::Timestamp;
use serde_json::Value;
use tokio::time::Instant;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::connect::{Param, query};
use crate::clock::Reading;
use crate::model::{Desired, Row, RowStatus};

/// Most rows that one scan for changes reads: the oldest. What is longer wants a look at all rows.
pub(crate) const SCAN: i32 = 5000;

/// All rows that are not over.
pub(crate) async fn live(pool: &Pool, unreadable: &Unreadable) -> anyhow::Result<Vec<Row>> {
    let statement = "select * from cyberdesk.live_desktops()";
    let answer = query(pool, statement, &[]).await.context("list the desktops that are not over")?;
    let there: HashSet<Option<Uuid>> = answer.iter().map(id_of).collect();
    unreadable.keep(|id| there.contains(&id));
    Ok(unreadable.decode(&answer))
}

/// The rows whose present generation nobody has acted on, oldest change first.
pub(crate) async fn dirty(pool: &Pool, unreadable: &Unreadable) -> anyhow::Result<Vec<Row>> {
    let statement = "select * from cyberdesk.dirty_desktops($1)";
    let answer = query(pool, statement, &[(&SCAN, Type::INT4)]).await.context("look for desktops that changed")?;
    Ok(unreadable.decode(&answer))
}

/// The answer to a question for certain rows. One that is there and cannot be read is neither found nor missing.
#[derive(Debug)]
pub(crate) struct Found {
    /// Those that are there.
    pub(crate) rows: Vec<Row>,
    /// Those that the database does not have.
    pub(crate) missing: Vec<Uuid>,
}

/// Rows by id, those that are over and those whose app row was deleted included.
pub(crate) async fn by_id(pool: &Pool, ids: &[Uuid], unreadable: &Unreadable) -> anyhow::Result<Found> {
    let statement = "select * from cyberdesk.desktops_by_id($1)";
    let params: [Param<'_>; 1] = [(&ids, Type::UUID_ARRAY)];
    let answer = query(pool, statement, &params).await.context("read desktops by id")?;
    let there: HashSet<Uuid> = answer.iter().map(|row| row.try_get("id")).collect::<Result<_, _>>()?;
    let missing = ids.iter().filter(|id| !there.contains(id)).copied().collect();
    Ok(Found { rows: unreadable.decode(&answer), missing })
}

/// The rows that cannot be read, and why: each is told of once, and again when it is for another reason.
#[derive(Debug, Default)]
pub(crate) struct Unreadable(Mutex<HashMap<Option<Uuid>, String>>);

impl Unreadable {
    /// A row that cannot be decoded is told of and left out: the others go on.
    fn decode(&self, answer: &[tokio_postgres::Row]) -> Vec<Row> {
        let decoded = |row| {
            let id = id_of(row);
            try_decode(row)
                .inspect(|_| drop(self.known().remove(&id)))
                .inspect_err(|error| {
                    let error = crate::telemetry::chain(error.as_ref()).to_string();
                    if self.is_news(id, &error) {
                        let desktop = id.map(tracing::field::display);
                        tracing::error!(desktop, error, "cannot read a desktop's row; is the schema of this version?");
                    }
                })
                .ok()
        };
        answer.iter().filter_map(decoded).collect()
    }

    fn is_news(&self, id: Option<Uuid>, error: &str) -> bool {
        let before = self.known().insert(id, error.to_owned());
        before.is_none_or(|before| before != error)
    }

    /// Forgets the others: they are not there any more.
    fn keep(&self, those: impl Fn(Option<Uuid>) -> bool) {
        self.known().retain(|id, _| those(*id));
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Option<Uuid>, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn id_of(row: &tokio_postgres::Row) -> Option<Uuid> {
    row.try_get("id").ok()
}

fn try_decode(row: &tokio_postgres::Row) -> anyhow::Result<Row> {
    let desired: &str = row.try_get("desired")?;
    let status: &str = row.try_get("status")?;
    // Postgres takes numbers and depths that this program does not. No template takes a text for params, so the
    // row is told what is wrong with it.
    let unreadable = |error| Some(Value::String(format!("unreadable: {}", crate::telemetry::chain(&error))));
    Ok(Row {
        id: row.try_get("id")?,
        exists: row.try_get("row_exists")?,
        user_id: row.try_get("user_id")?,
        desired: match desired {
            "present" => Desired::Present,
            "absent" => Desired::Absent,
            other => anyhow::bail!("unknown desired {other:?}"),
        },
        reason: row.try_get("reason")?,
        message: row.try_get("message")?,
        expires_at: row.try_get("expires_at")?,
        timeout_at: row.try_get("timeout_at")?,
        created_at: row.try_get("created_at")?,
        changed_at: row.try_get("changed_at")?,
        generation: row.try_get("generation")?,
        observed_generation: row.try_get("observed_generation")?,
        params: row.try_get::<_, Option<Value>>("params").unwrap_or_else(unreadable),
        status: RowStatus::parse(status).with_context(|| format!("unknown status {status:?}"))?,
        vm_uid: row.try_get("vm_uid")?,
        ended: row.try_get::<_, Option<Timestamp>>("ended_at")?.is_some(),
        paused: row.try_get("paused")?,
    })
}

/// Whether an administrator wants new desktops to wait.
pub(crate) async fn paused(pool: &Pool) -> anyhow::Result<bool> {
    let rows = query(pool, "select cyberdesk.paused()", &[]).await.context("read whether new desktops shall wait")?;
    Ok(rows.first().context("the database does not say whether new desktops shall wait")?.try_get(0)?)
}

/// Reads the database's clock.
pub(crate) async fn time(pool: &Pool) -> anyhow::Result<Reading> {
    let asked = Instant::now();
    let rows = query(pool, "select clock_timestamp()", &[]).await?;
    let time = rows.first().context("the database's clock gave no time")?.try_get(0)?;
    // It was read before the answer came: taken so, it is never ahead, and no deadline comes early.
    let at = Instant::now();
    Ok(Reading { time, at, slack: at - asked })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_cannot_be_read_is_news_once_for_each_reason() {
        let (rows, id) = (Unreadable::default(), Some(Uuid::from_u128(1)));
        let told: Vec<bool> = ["a", "a", "b", "b", "a"].iter().map(|why| rows.is_news(id, why)).collect();
        assert_eq!(told, [true, false, true, false, true]);
        assert!(rows.is_news(None, "a"), "another is another's news");
        rows.keep(|other| other == id);
        assert!(!rows.is_news(id, "a") && rows.is_news(None, "a"), "one that went and comes again is news");
    }
}
