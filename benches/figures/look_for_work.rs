//! How long the operator's look for changed rows takes when the tables hold years of old ones, against the same look
//! when they hold none.

use anyhow::{Context as _, Result, ensure};
use cyberdesk_testbed::Postgres;
use tokio::time::Instant;

use crate::report::{Figure, Goal, median};
use crate::{Arguments, server};

/// Desktops that live, each of them changed: all are to be looked at.
const LIVE: i64 = 300;
const LOOKS: usize = 200;
const LOOK: &str = "select * from cyberdesk.dirty_desktops(5000)";
const SCANS: &str = "
select sum(pg_stat_get_xact_numscans(c.oid))::bigint
  from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where n.nspname in ('public', 'cyberdesk') and c.relname in ('cyberdesk_instances', 'desktop')";

pub(crate) async fn measure(arguments: &Arguments) -> Result<Vec<Figure>> {
    // Room to make so many rows in; the look itself reads a few pages.
    let (server, _scratch) = server(&[
        ("shared_buffers", "1GB"),
        ("max_wal_size", "1GB"),
        ("wal_level", "minimal"),
        ("max_wal_senders", "0"),
    ])
    .await?;
    let limit = look(&server, 0, arguments.repetitions).await?;
    let began = Instant::now();
    eprintln!("look-for-work: making {} old rows", arguments.rows);
    let value = look(&server, arguments.rows, arguments.repetitions).await?;
    eprintln!("look-for-work: made and looked at in {:.0} s", began.elapsed().as_secs_f64());
    Ok(vec![Figure {
        name: format!("look-for-work, {LIVE} changed, {} old rows", arguments.rows),
        value,
        unit: "ms",
        limit: Some((limit, "the same look without old rows")),
        goal: Goal::ValueAtMost(5.0),
    }])
}

/// Milliseconds of one look, the answer read.
async fn look(server: &Postgres, old: i64, repetitions: usize) -> Result<f64> {
    let database = server.database().await?;
    database.fill_with_old_rows(old, LIVE).await?;
    let daemon = database.connect_as("cyberdesk_daemon").await?;
    let mut times = vec![];
    for _ in 0..repetitions * LOOKS {
        let began = Instant::now();
        let found = daemon.query(LOOK, &[]).await?.len();
        times.push(began.elapsed().as_secs_f64() * 1e3);
        ensure!(found == LIVE as usize, "{found} changed rows were found, and there are {LIVE}");
    }
    // A transaction sees what its session has done since it last told the collector, this transaction included.
    daemon.batch_execute("begin").await?;
    let before: i64 = daemon.query_one(SCANS, &[]).await.context("count the scans")?.get(0);
    daemon.query(LOOK, &[]).await?;
    let scans = daemon.query_one(SCANS, &[]).await?.get::<_, i64>(0) - before;
    daemon.batch_execute("rollback").await?;
    ensure!(old == 0 || scans == 0, "the look reads a whole table");
    Ok(median(times))
}
