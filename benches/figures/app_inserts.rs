//! The app's inserts per second with all of our triggers, against the same table as its ORM made it, without anything of
//! ours: 16 writers, one row a statement and a transaction, as an API does it.
//!
//! Once with commits that take a millisecond, as they do on a cloud's block storage, and once with commits that wait for
//! no disk, where all of the triggers' own cost shows. The millisecond is PostgreSQL's own: `commit_delay`, with
//! `commit_siblings = 0`, has whoever flushes the log wait before it does, holding the lock under which commits are
//! gathered, as a slow disk would. The flush itself comes on top; what a single commit takes is told beside.

use std::time::Duration;

use anyhow::{Context as _, Result};
use cyberdesk_testbed::postgres::ADMINISTRATOR;
use cyberdesk_testbed::{Database, Postgres};
use futures::future::try_join_all;
use tokio::time::Instant;

use crate::report::{Figure, Goal, median};
use crate::{Arguments, server};

const WRITERS: usize = 16;

/// The app's table, as its ORM makes it.
const ORM: &str = r#"
create type "public"."instance_status" as enum('pending', 'running', 'completed', 'error', 'terminated');
create table "cyberdesk_instances" (
  "id" uuid primary key default gen_random_uuid() not null,
  "user_id" uuid not null references "auth"."users"("id") on delete cascade,
  "created_at" timestamp default now(),
  "updated_at" timestamp,
  "status" "instance_status" default 'pending' not null,
  "timeout_at" timestamp default now() + interval '24 hours' not null,
  "stream_url" varchar(1024)
)"#;

const INSERT: &str = "insert into public.cyberdesk_instances (user_id, status, timeout_at)
    values ($1, 'pending', now() + interval '86400000 milliseconds') returning id, status::text";

pub(crate) async fn measure(arguments: &Arguments) -> Result<Vec<Figure>> {
    let millisecond =
        [("fsync", "on"), ("synchronous_commit", "on"), ("commit_delay", "1000"), ("commit_siblings", "0")];
    let no_disk = [("fsync", "off"), ("synchronous_commit", "on")];
    let mut figures = vec![];
    for (commits, settings) in [("1 ms commit", millisecond.as_slice()), ("no disk", no_disk.as_slice())] {
        let (server, _scratch) = server(settings).await?;
        figures.push(compare(&server, commits, arguments).await.with_context(|| format!("app-inserts, {commits}"))?);
    }
    Ok(figures)
}

async fn compare(server: &Postgres, commits: &str, arguments: &Arguments) -> Result<Figure> {
    let (ours, bare) = (server.database().await?, server.supabase_database().await?);
    bare.connect_as(ADMINISTRATOR).await?.batch_execute(ORM).await?;
    // As in production, somebody listens.
    let listener = ours.connect_as("cyberdesk_daemon").await?;
    listener.batch_execute("listen cyberdesk").await?;

    let time = Duration::from_secs_f64(arguments.seconds);
    let single = write(&bare, 1, time.min(Duration::from_secs(1))).await?;
    eprintln!("app-inserts, {commits}: a single writer's statement takes {:.2} ms without us", 1e3 / single);
    let mut rounds = vec![];
    for _ in 0..arguments.repetitions {
        let round = (write(&ours, WRITERS, time).await?, write(&bare, WRITERS, time).await?);
        eprintln!("app-inserts, {commits}: {:.0}/s, without us {:.0}/s", round.0, round.1);
        rounds.push(round);
    }
    // The machine's moods take both halves of a round alike: the ratio of the middle round counts.
    let ratio = median(rounds.iter().map(|(ours, bare)| ours / bare));
    let limit = median(rounds.iter().map(|(_, bare)| *bare));
    Ok(Figure {
        name: format!("app-inserts, {WRITERS} writers, {commits}"),
        value: ratio * limit,
        unit: "/s",
        limit: Some((limit, "the ORM's table without anything of ours")),
        goal: Goal::RatioAtLeast(0.8),
    })
}

/// Inserts per second of so many writers, each with a connection and a user of its own.
async fn write(database: &Database, writers: usize, time: Duration) -> Result<f64> {
    let ready = try_join_all((0..writers).map(|_| async {
        let (user, client) = (database.sign_up().await?, database.connect_as(ADMINISTRATOR).await?);
        let insert = client.prepare(INSERT).await?;
        anyhow::Ok((user, client, insert))
    }))
    .await?;
    let began = Instant::now();
    let written = try_join_all(ready.into_iter().map(|(user, client, insert)| {
        tokio::spawn(async move {
            let mut written = 0_u32;
            while began.elapsed() < time {
                client.query_one(&insert, &[&user]).await?;
                written += 1;
            }
            anyhow::Ok(written)
        })
    }))
    .await?;
    let took = began.elapsed();
    let written: u32 = written.into_iter().sum::<Result<u32>>()?;
    Ok(f64::from(written) / took.as_secs_f64())
}
