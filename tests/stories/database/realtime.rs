//! What Realtime hears: one event for each change that is seen, counted from a logical slot, and none for bookkeeping.

use anyhow::{Context as _, Result, ensure};
use cyberdesk_testbed::{Caller, Postgres, postgres::SUPERUSER};
use serde_json::json;
use tokio_postgres::Client;

use super::Story;
use super::fixture::{Entry, Fixture};
use super::functions::rpc;

pub(super) const STORIES: &[Story] = &[
    ("one visible change is one event of Realtime", |p| Box::pin(one_event(p))),
    ("what is not seen is no event of Realtime", |p| Box::pin(no_event(p))),
    ("whatever is published, rows and users can be deleted", |p| Box::pin(published_whole(p))),
];

/// A subscriber to the publication, as Realtime is one.
struct Slot(Client);

impl Slot {
    async fn new(fixture: &Fixture) -> Result<Self> {
        // The hosted administrator may replicate. A temporary slot goes with its session.
        let client = fixture.database.connect_as("postgres").await?;
        let slot = "select pg_create_logical_replication_slot('slot_' || pg_backend_pid(), 'pgoutput', true)";
        client.execute(slot, &[]).await.context("make a slot")?;
        Ok(Self(client))
    }

    /// The changes since the last call: `I`, `U` and `D` for each insert, update and delete of a row.
    async fn heard(&self) -> Result<String> {
        let changes = "select data from pg_logical_slot_get_binary_changes('slot_' || pg_backend_pid(), null, null,
                         'proto_version', '1', 'publication_names', 'supabase_realtime')";
        let rows = self.0.query(changes, &[]).await.context("read the slot")?;
        Ok(rows
            .iter()
            .filter_map(|row| row.get::<_, &[u8]>(0).first())
            .map(|kind| char::from(*kind))
            .filter(|kind| "IUDT".contains(*kind))
            .collect())
    }
}

async fn one_event(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    fixture.app.batch_execute("update cyberdesk.settings set warn_before = '2 days', desktops_per_user = 100").await?;
    let slot = Slot::new(&fixture).await?;
    let operator = &fixture.operator;
    let owner = Caller::User(fixture.user);
    let warn = "select * from cyberdesk.warn($1, $2, 100)";

    let id = fixture.insert().await?;
    assert_eq!(slot.heard().await?, "I", "inserted");
    operator.report(Entry { stream_url: Some("https://x.example"), ..Entry::running(id) }).await?;
    assert_eq!(slot.heard().await?, "U", "running, with its address");
    operator.client.query(warn, &[&operator.epoch, &operator.token]).await?;
    assert_eq!(slot.heard().await?, "U", "warned");
    rpc(&fixture, owner, "extend_desktop", json!({ "desktop_id": id, "by_interval": "10 days" })).await?;
    assert_eq!(slot.heard().await?, "U", "extended, the warning taken back");
    operator.report(Entry { generation: 2, message: Some("a note"), ..Entry::of(id) }).await?;
    assert_eq!(slot.heard().await?, "U", "a note for the owner");
    rpc(&fixture, owner, "request_shutdown", json!({ "desktop_id": id, "reason": "done" })).await?;
    assert_eq!(slot.heard().await?, "U", "asked to end");
    operator.report(Entry { generation: 3, ..Entry::ended(id, "terminated", "requested", "") }).await?;
    assert_eq!(slot.heard().await?, "U", "over: status, reason and time together");
    fixture.execute("delete from public.cyberdesk_instances where id = $1", id).await?;
    assert_eq!(slot.heard().await?, "D", "deleted");

    let gateway = fixture.insert().await?;
    let ready = "update public.cyberdesk_instances set status = 'running', stream_url = 'x' where id = $1";
    fixture.database.request(Caller::Service, ready, &[&gateway]).await?;
    assert_eq!(slot.heard().await?, "IU", "the gateway of old");
    let crashed = fixture.insert_running().await?;
    operator.report(Entry::ended(crashed, "error", "guest-crashed", "boom")).await?;
    assert_eq!(slot.heard().await?, "IUU", "crashed");
    let late = fixture.insert().await?;
    fixture.execute("update public.cyberdesk_instances set timeout_at = now() where id = $1", late).await?;
    operator.expire(&[late]).await?;
    assert_eq!(slot.heard().await?, "IUU", "due");
    fixture.insert().await?;
    fixture.insert().await?;
    rpc(&fixture, owner, "request_shutdown_all", json!({})).await?;
    assert_eq!(slot.heard().await?, "IIUUU", "all that were not asked to end before");
    fixture.database.delete_user(fixture.user).await?;
    assert_eq!(slot.heard().await?, "DDDDD", "a user deleted with their five rows");
    Ok(())
}

async fn no_event(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    fixture
        .app
        .batch_execute("update cyberdesk.settings set warn_before = '5 minutes', idle_timeout = '1 hour'")
        .await?;
    let ids = [fixture.insert_running().await?, fixture.insert_running().await?];
    let slot = Slot::new(&fixture).await?;
    let operator = &fixture.operator;
    for round in 0..3 {
        for statement in [
            "select cyberdesk.sign_of_life($1, $2)",
            "select * from cyberdesk.warn($1, $2, 100)",
            "select cyberdesk.trim($1, $2)",
            "select cyberdesk.reconcile_projection($1, $2)",
        ] {
            operator.client.query(statement, &[&operator.epoch, &operator.token]).await?;
        }
        operator.report_all(&ids.map(|id| Entry { generation: 2, ..Entry::running(id) })).await?;
        for id in ids {
            let past = "update cyberdesk.desktop set touched_at = touched_at - interval '30 minutes' where id = $1";
            fixture.execute(past, id).await?;
            let rows = rpc(&fixture, Caller::User(fixture.user), "touch_desktop", json!({ "desktop_id": id })).await?;
            ensure!(rows[0]["changed"] == true, "it is written, in round {round}");
            rpc(&fixture, Caller::Service, "desktop_service_state", json!({})).await?;
            let due = "update cyberdesk.desktop set expires_at = now() where id = $1";
            fixture.execute(due, id).await?;
        }
        ensure!(operator.expire(&ids).await? == ["touched", "touched"]);
    }
    assert_eq!(slot.heard().await?, "");
    let published = "select string_agg(schemaname || '.' || tablename, ' ') from pg_publication_tables where pubname = 'supabase_realtime'";
    let published: String = fixture.app.query_one(published, &[]).await?.get(0);
    assert_eq!(published, "public.cyberdesk_instances");
    Ok(())
}

async fn published_whole(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let admin = fixture.database.connect_as(SUPERUSER).await?;
    admin
        .batch_execute("drop publication supabase_realtime; create publication supabase_realtime for all tables")
        .await?;
    let bare = "select string_agg(c.oid::regclass::text, ' ') from pg_class c
                 where c.relkind = 'r' and c.relnamespace in ('cyberdesk'::regnamespace, 'public'::regnamespace)
                   and not exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary)";
    let bare: Option<String> = fixture.app.query_one(bare, &[]).await?.get(0);
    ensure!(bare.is_none(), "a published table without primary key refuses update and delete: {bare:?}");
    let id = fixture.insert_running().await?;
    fixture.insert_running().await?;
    fixture.execute("select public.request_shutdown($1)", id).await?;
    fixture.execute("delete from public.cyberdesk_instances where id = $1", id).await?;
    ensure!(
        fixture.operator.report(Entry { generation: 2, ..Entry::ended(id, "terminated", "requested", "") }).await?
            == "written"
    );
    ensure!(fixture.database.delete_user(fixture.user).await? == 1);
    Ok(())
}
