//! The write-back under a storm: distinct reports told to the database, each row's first `running`.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use cyberdesk_operator::database::connect::Target;
use cyberdesk_operator::database::store::Store;
use cyberdesk_operator::database::writeback::{WriteBack, acquire};
use cyberdesk_operator::database::writer::Writer;
use cyberdesk_operator::lease::{Tenure, Term};
use cyberdesk_operator::model::{Report, RowStatus};
use cyberdesk_operator::queue::Queue;
use cyberdesk_testbed::postgres::ADMINISTRATOR;
use tokio::time::Instant;
use uuid::Uuid;

use crate::report::{Figure, Goal, median};
use crate::{Arguments, server};

/// Reports of one storm.
const REPORTS: i32 = 10_000;
/// As many as the write-back has in one statement.
const BATCH: usize = 500;
/// What nobody could do without: the rows say so.
const BARE: &str = "update public.cyberdesk_instances set status = 'running', updated_at = now() where id = any($1)";

pub(crate) async fn measure(arguments: &Arguments) -> Result<Vec<Figure>> {
    let (server, _scratch) = server(&[]).await?;
    let mut rounds = vec![];
    for _ in 0..arguments.repetitions {
        rounds.push((storm(&server).await?, bare(&server).await?));
    }
    let ratio = median(rounds.iter().map(|(ours, bare)| ours / bare));
    let limit = median(rounds.iter().map(|(_, bare)| *bare));
    Ok(vec![Figure {
        name: format!("write-back, storm of {REPORTS} distinct reports"),
        value: ratio * limit,
        unit: "rows/s",
        limit: Some((limit, "one update of the app's table per 500 rows, our triggers included")),
        goal: Goal::ValueAtLeast(5000.0),
    }])
}

async fn pending(app: &tokio_postgres::Client, user: Uuid) -> Result<Vec<Uuid>> {
    let insert = "insert into cyberdesk_instances (user_id) select $1 from generate_series(1, $2) returning id";
    let rows = app.query(insert, &[&user, &REPORTS]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn storm(server: &cyberdesk_testbed::Postgres) -> Result<f64> {
    let database = server.database().await?;
    let app = database.connect_as(ADMINISTRATOR).await?;
    let ids = pending(&app, database.sign_up().await?).await?;
    let pool = Target::from_url(&database.url("cyberdesk_daemon"), None)?.pool(&Arc::default())?;
    let term = Term { epoch: 1, token: Uuid::new_v4() };
    let tenure = Tenure::of(term, Duration::from_secs(3600));
    let writer = Writer::new(&pool, &tenure, term);
    ensure!(acquire(writer, "bench").await?.is_none(), "the fence of a fresh database is free");
    let (write_back, store, queue) = (WriteBack::default(), Store::default(), Queue::default());
    let began = Instant::now();
    for id in ids {
        let report = Report {
            id,
            generation: 1,
            vm_uid: Some(id.to_string()),
            status: Some(RowStatus::Running),
            reason: None,
            message: None,
            stream_url: None,
            ended: false,
        };
        write_back.report(report, None);
    }
    tokio::select! {
        () = write_back.run(writer, &store, &queue) => anyhow::bail!("somebody else took the fence"),
        () = write_back.drained() => (),
    }
    let took = began.elapsed();
    let written: i64 =
        app.query_one("select count(*) from cyberdesk_instances where status = 'running'", &[]).await?.get(0);
    ensure!(written == i64::from(REPORTS), "{written} of {REPORTS} rows say running");
    Ok(f64::from(REPORTS) / took.as_secs_f64())
}

async fn bare(server: &cyberdesk_testbed::Postgres) -> Result<f64> {
    let database = server.database().await?;
    let app = database.connect_as(ADMINISTRATOR).await?;
    let ids = pending(&app, database.sign_up().await?).await?;
    let update = app.prepare(BARE).await?;
    let began = Instant::now();
    for batch in ids.chunks(BATCH) {
        app.execute(&update, &[&batch]).await?;
    }
    Ok(f64::from(REPORTS) / began.elapsed().as_secs_f64())
}
