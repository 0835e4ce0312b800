//! Reading rows. Every statement is unnamed (`query_typed`), so that a pooler in between does no harm.

use anyhow::Context;
use deadpool_postgres::Pool;
use jiff::Timestamp;
use serde_json::Value;
use tokio::time::Instant;
use tokio_postgres::types::Type;
use uuid::Uuid;

use crate::clock::Reading;
use crate::model::{Desired, Row, RowStatus};

/// Most rows that one scan for news reads. A longer queue of them is read by the next scans.
const SCAN: i32 = 5000;

/// All rows that are not over.
pub(crate) async fn live(pool: &Pool) -> anyhow::Result<Vec<Row>> {
    read(pool, "select * from cyberdesk.live_desktops()", &[]).await.context("list the desktops that are not over")
}

/// The rows whose present generation nobody has acted on, oldest change first.
pub(crate) async fn dirty(pool: &Pool) -> anyhow::Result<Vec<Row>> {
    read(pool, "select * from cyberdesk.dirty_desktops($1)", &[(&SCAN, Type::INT4)])
        .await
        .context("look for desktops that changed")
}

/// Rows by id, those that are over and those whose app row was deleted included.
pub(crate) async fn by_id(pool: &Pool, ids: &[Uuid]) -> anyhow::Result<Vec<Row>> {
    read(pool, "select * from cyberdesk.desktops_by_id($1)", &[(&ids, Type::UUID_ARRAY)])
        .await
        .context("read desktops by id")
}

async fn read(
    pool: &Pool,
    statement: &str,
    params: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)],
) -> anyhow::Result<Vec<Row>> {
    let client = pool.get().await?;
    Ok(client.query_typed(statement, params).await?.iter().filter_map(decode).collect())
}

/// A row that cannot be decoded is reported and left out: the others go on.
fn decode(row: &tokio_postgres::Row) -> Option<Row> {
    try_decode(row)
        .inspect_err(|error| tracing::error!(error = %crate::telemetry::chain(error.as_ref()), "cannot read a desktop's row; is the schema of this version?"))
        .ok()
}

fn try_decode(row: &tokio_postgres::Row) -> anyhow::Result<Row> {
    let desired: &str = row.try_get("desired")?;
    let status: &str = row.try_get("status")?;
    Ok(Row {
        id: row.try_get("id")?,
        exists: row.try_get("row_exists")?,
        user_id: row.try_get("user_id")?,
        desired: match desired {
            "present" => Desired::Present,
            _ => Desired::Absent,
        },
        reason: row.try_get("reason")?,
        message: row.try_get("message")?,
        expires_at: row.try_get("expires_at")?,
        generation: row.try_get("generation")?,
        observed_generation: row.try_get("observed_generation")?,
        params: row.try_get::<_, Option<Value>>("params")?,
        status: RowStatus::parse(status).with_context(|| format!("unknown status {status:?}"))?,
        vm_uid: row.try_get("vm_uid")?,
        ended: row.try_get::<_, Option<Timestamp>>("ended_at")?.is_some(),
    })
}

/// The identity that the database keeps of itself.
pub(crate) async fn identity(pool: &Pool) -> anyhow::Result<Uuid> {
    let client = pool.get().await?;
    let rows = client
        .query_typed("select database_id from cyberdesk.identity()", &[])
        .await
        .context("read the database's identity")?;
    Ok(rows.first().context("the database has no identity")?.try_get(0)?)
}

/// Reads the database's clock.
pub(crate) async fn time(pool: &Pool) -> anyhow::Result<Reading> {
    let client = pool.get().await?;
    let asked = Instant::now();
    let rows = client.query_typed("select clock_timestamp()", &[]).await?;
    let time = rows.first().context("the database's clock gave no time")?.try_get(0)?;
    // It was read somewhere between question and answer.
    Ok(Reading { time, at: asked + asked.elapsed() / 2 })
}
