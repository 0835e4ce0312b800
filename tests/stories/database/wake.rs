//! The wake-up: one hint per commit that brings work, none for the operator's own writes, and nobody waits for it.

use std::time::Duration;

use anyhow::{Context as _, Result};
use cyberdesk_testbed::{Database, Postgres};
use futures::{StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, Client, NoTls};

use super::Story;
use super::fixture::{Entry, Fixture};

pub(super) const STORIES: &[Story] = &[
    ("each commit that brings work wakes once, without data", |p| Box::pin(once_per_commit(p))),
    ("what brings no work wakes nobody", |p| Box::pin(silence(p))),
    ("a commit never waits for another's wake-up", |p| Box::pin(gate(p))),
];

/// Hears what is notified, and can tell "nothing came" from "nothing came yet" by a marker of its own.
struct Ear {
    client: Client,
    heard: mpsc::UnboundedReceiver<(String, String)>,
}

impl Ear {
    async fn new(database: &Database) -> Result<Self> {
        let (client, mut connection) = tokio_postgres::connect(&database.url("cyberdesk_daemon"), NoTls).await?;
        let (say, heard) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut messages = stream::poll_fn(move |cx| connection.poll_message(cx));
            while let Some(Ok(message)) = messages.next().await {
                if let AsyncMessage::Notification(note) = message
                    && say.send((note.channel().to_owned(), note.payload().to_owned())).is_err()
                {
                    return;
                }
            }
        });
        client.batch_execute("listen cyberdesk; listen story_marker").await?;
        Ok(Self { client, heard })
    }

    /// Everything since the last call. Notifications arrive in the order of commits, so the marker comes last.
    async fn since(&mut self) -> Result<Vec<String>> {
        self.client.batch_execute("notify story_marker").await?;
        let mut payloads = Vec::new();
        loop {
            let next = tokio::time::timeout(Duration::from_secs(60), self.heard.recv());
            let (channel, payload) =
                next.await.context("wait for the marker's notification")?.context("stay connected")?;
            if channel == "story_marker" {
                return Ok(payloads);
            }
            payloads.push(payload);
        }
    }
}

const INSERT_MANY: &str =
    "insert into public.cyberdesk_instances (user_id) select $1 from generate_series(1, 50) returning id";

async fn once_per_commit(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let mut ear = Ear::new(&fixture.database).await?;
    let once = vec![String::new()];

    let ids: Vec<uuid::Uuid> =
        fixture.app.query(INSERT_MANY, &[&fixture.user]).await?.iter().map(|row| row.get(0)).collect();
    assert_eq!(ear.since().await?, once, "fifty rows, one statement");

    fixture
        .app
        .execute("update public.cyberdesk_instances set status = 'terminated' where id = any($1)", &[&&ids[..10]])
        .await?;
    assert_eq!(ear.since().await?, once, "ten ends, one statement");

    fixture.execute("select public.request_shutdown($1)", ids[10]).await?;
    assert_eq!(ear.since().await?, once, "a shutdown");

    fixture
        .execute("update public.cyberdesk_instances set timeout_at = now() + interval '1 hour' where id = $1", ids[11])
        .await?;
    assert_eq!(ear.since().await?, once, "a new deadline");

    fixture.execute("delete from public.cyberdesk_instances where id = $1", ids[12]).await?;
    assert_eq!(ear.since().await?, once, "a row deleted");

    fixture.database.delete_user(fixture.user).await?;
    assert_eq!(ear.since().await?, once, "a user deleted, with all their desktops");
    Ok(())
}

async fn silence(postgres: &Postgres) -> Result<()> {
    let mut fixture = Fixture::new(postgres).await?;
    let id = fixture.insert().await?;
    let mut ear = Ear::new(&fixture.database).await?;
    let none = Vec::<String>::new();

    fixture.operator.report(Entry::running(id)).await?;
    fixture
        .execute(
            "update public.cyberdesk_instances set stream_url = 'https://x.example', status = 'running' where id = $1",
            id,
        )
        .await?;
    fixture.operator.report(Entry { message: Some("a note"), ..Entry::of(id) }).await?;
    assert_eq!(ear.since().await?, none, "reports and addresses");

    let user = fixture.user;
    let undone = fixture.app.transaction().await?;
    undone.execute(INSERT_MANY, &[&user]).await?;
    undone.rollback().await?;
    assert_eq!(ear.since().await?, none, "what was rolled back");

    fixture
        .app
        .execute("insert into public.cyberdesk_instances (user_id, status) values ($1, 'terminated')", &[&user])
        .await?;
    assert_eq!(ear.since().await?, none, "a row that is over from the start");

    fixture.operator.report(Entry::ended(id, "terminated", "guest-shutdown", "")).await?;
    fixture
        .execute("update public.cyberdesk_instances set status = 'running', timeout_at = now() where id = $1", id)
        .await?;
    fixture.execute("delete from public.cyberdesk_instances where id = $1", id).await?;
    assert_eq!(ear.since().await?, none, "whatever happens to a desktop that is over");
    Ok(())
}

async fn gate(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let mut ear = Ear::new(&fixture.database).await?;
    let mut other = fixture.database.connect_as("postgres").await?;
    let notifying = other.transaction().await?;
    notifying.execute("select pg_advisory_xact_lock(1128481604, 1)", &[]).await?;

    tokio::time::timeout(Duration::from_secs(60), fixture.insert())
        .await
        .context("commit beside another's wake-up")??;
    assert_eq!(ear.since().await?, Vec::<String>::new(), "the other's wake-up, or the next look, serves this one too");
    notifying.rollback().await?;

    // An app's open transaction does not hold the gate: it is taken at commit only.
    let open = other.transaction().await?;
    open.execute(INSERT_MANY, &[&fixture.user]).await?;
    open.execute("update public.cyberdesk_instances set status = 'terminated'", &[]).await?;
    fixture.insert().await?;
    assert_eq!(ear.since().await?, vec![String::new()]);
    open.commit().await?;
    assert_eq!(ear.since().await?, vec![String::new()]);
    Ok(())
}
