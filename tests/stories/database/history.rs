//! What became of each desktop: told once for each change that matters, to its owner alone, for as long as it is kept.

use anyhow::{Context as _, Result, ensure};
use cyberdesk_testbed::{Caller, Postgres};
use uuid::Uuid;

use super::Story;
use super::fixture::{Entry, Fixture, code};
use super::functions::rpc;

pub(super) const STORIES: &[Story] = &[
    ("the history tells a whole life, change by change", |p| Box::pin(a_life(p))),
    ("each way to end is told with its cause", |p| Box::pin(ends(p))),
    ("what does not change is not told", |p| Box::pin(silence(p))),
    ("the history tells who acted", |p| Box::pin(actors(p))),
    ("owners read their history, also of rows that are gone, and nobody else's", |p| Box::pin(owners(p))),
    ("the history of a user is erased with them", |p| Box::pin(erased(p))),
    ("the history is trimmed by age, in batches", |p| Box::pin(trimmed(p))),
    ("no history is invented for rows from before", |p| Box::pin(not_invented(p))),
];

/// What the history tells of a desktop, a line for each entry.
async fn told(fixture: &Fixture, id: Uuid) -> Result<Vec<String>> {
    let statement =
        "select event || ': ' || coalesce(from_status::text, '-') || ' > ' || coalesce(to_status::text, '-')
                            || coalesce(' ' || reason, '')
                       from public.cyberdesk_desktop_history where desktop_id = $1 order by id";
    Ok(fixture.app.query(statement, &[&id]).await?.iter().map(|row| row.get(0)).collect())
}

async fn a_life(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert_running().await?;
    fixture
        .execute("update public.cyberdesk_instances set timeout_at = timeout_at + interval '1 hour' where id = $1", id)
        .await?;
    fixture.execute("select public.request_shutdown($1)", id).await?;
    fixture.operator.report(Entry { generation: 3, ..Entry::ended(id, "terminated", "requested", "") }).await?;
    fixture.execute("delete from public.cyberdesk_instances where id = $1", id).await?;
    assert_eq!(
        told(&fixture, id).await?,
        [
            "created: - > pending",
            "status: pending > running",
            "deadline: running > running",
            "shutdown-requested: running > running requested",
            "ended: running > terminated requested",
            "deleted: terminated > - requested",
        ]
    );
    // In the order of time, each with the deadline as of then.
    let ordered = "select bool_and(in_order), count(distinct timeout_at) from (
                     select at >= lag(at) over (order by id) is not false as in_order, timeout_at
                       from public.cyberdesk_desktop_history where desktop_id = $1) h";
    let row = fixture.app.query_one(ordered, &[&id]).await?;
    ensure!(row.get::<_, bool>(0) && row.get::<_, i64>(1) == 2);
    Ok(())
}

async fn ends(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let last = async |id| -> Result<Vec<String>> { Ok(told(&fixture, id).await?.split_off(2)) };

    let crashed = fixture.insert_running().await?;
    fixture.operator.report(Entry::ended(crashed, "error", "guest-crashed", "boom")).await?;
    assert_eq!(last(crashed).await?, ["ended: running > error guest-crashed"]);

    let written = fixture.insert_running().await?;
    for status in ["error", "terminated"] {
        let write = format!("update public.cyberdesk_instances set status = '{status}' where id = $1");
        fixture.execute(&write, written).await?;
    }
    fixture.operator.report(Entry::ended(written, "terminated", "requested", "")).await?;
    assert_eq!(
        last(written).await?,
        [
            "shutdown-requested: running > error requested",
            "status: error > terminated requested",
            "ended: terminated > terminated requested"
        ]
    );

    let late = fixture.insert_running().await?;
    fixture.execute("update public.cyberdesk_instances set timeout_at = now() where id = $1", late).await?;
    fixture.operator.expire(&[late]).await?;
    assert_eq!(last(late).await?, ["deadline: running > running", "shutdown-requested: running > running timeout"]);

    let deleted = fixture.insert_running().await?;
    fixture.execute("delete from public.cyberdesk_instances where id = $1", deleted).await?;
    assert_eq!(last(deleted).await?, ["deleted: running > - row-deleted"]);

    let insert = "insert into public.cyberdesk_instances (user_id, status) values ($1, 'completed') returning id";
    let old: Uuid = fixture.app.query_one(insert, &[&fixture.user]).await?.get(0);
    assert_eq!(told(&fixture, old).await?, ["created: - > completed"]);
    Ok(())
}

async fn silence(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert_running().await?;
    let before = told(&fixture, id).await?;
    fixture.operator.report(Entry::running(id)).await?;
    fixture.operator.report(Entry { message: Some("a note"), vm_uid: Some("vm-1"), ..Entry::of(id) }).await?;
    fixture.operator.reconcile().await?;
    for change in
        ["stream_url = 'https://x.example'", "status = 'pending'", "updated_at = now()", "user_id = gen_random_uuid()"]
    {
        fixture.execute(&format!("update public.cyberdesk_instances set {change} where id = $1"), id).await?;
    }
    assert_eq!(told(&fixture, id).await?, before);
    Ok(())
}

async fn actors(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert_running().await?;
    let service = "update public.cyberdesk_instances set timeout_at = timeout_at + interval '1 hour' where id = $1";
    fixture.database.request(Caller::Service, service, &[&id]).await?;
    rpc(&fixture, Caller::User(fixture.user), "request_shutdown", serde_json::json!({ "desktop_id": id })).await?;
    let who = "select concat_ws(' ', actor, actor_role, actor_sub) from public.cyberdesk_desktop_history where desktop_id = $1 order by id";
    let who: Vec<String> = fixture.app.query(who, &[&id]).await?.iter().map(|row| row.get(0)).collect();
    let owner = format!("authenticator authenticated {}", fixture.user);
    assert_eq!(who, ["postgres", "cyberdesk_daemon", "authenticator service_role", owner.as_str()]);

    // Claims that somebody sets by hand to anything make no statement fail.
    for claims in ["no json", "", "[]", "7", r#"{"sub": 7, "role": {}}"#, r#"{"sub": "auth0|somebody"}"#] {
        let client = fixture.database.connect_as("postgres").await?;
        client.execute("select set_config('request.jwt.claims', $1, false)", &[&claims]).await?;
        let insert = "insert into public.cyberdesk_instances (user_id) values ($1)";
        client.execute(insert, &[&fixture.user]).await.with_context(|| format!("claims {claims:?}"))?;
    }
    Ok(())
}

async fn owners(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let stranger = Caller::User(fixture.database.sign_up().await?);
    let id = fixture.insert_running().await?;
    fixture.execute("delete from public.cyberdesk_instances where id = $1", id).await?;
    let read = "select * from public.cyberdesk_desktop_history where desktop_id = $1 order by id";
    let count =
        async |caller| Ok::<_, tokio_postgres::Error>(fixture.database.request(caller, read, &[&id]).await?.len());
    ensure!(count(Caller::User(fixture.user)).await? == 3);
    ensure!(count(Caller::Service).await? == 3);
    ensure!(count(stranger).await? == 0);
    ensure!(code(count(Caller::Anon).await) == "42501");
    for caller in [Caller::Anon, stranger, Caller::User(fixture.user), Caller::Service] {
        for relation in ["public.cyberdesk_desktop_history", "cyberdesk.history"] {
            for write in [
                format!("delete from {relation}"),
                format!("update {relation} set reason = null"),
                format!("insert into {relation} (desktop_id, event) values (gen_random_uuid(), 'created')"),
            ] {
                ensure!(code(fixture.database.request(caller, &write, &[]).await) == "42501", "{caller:?}: {write}");
            }
        }
    }
    Ok(())
}

async fn erased(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let helper = fixture.database.sign_up().await?;
    let (gone, living) = (fixture.insert_running().await?, fixture.insert_running().await?);
    fixture.execute("delete from public.cyberdesk_instances where id = $1", gone).await?;
    // Somebody whom the app lets act for its users.
    fixture
        .app
        .batch_execute(
            "grant update on public.cyberdesk_instances to authenticated;
             create policy helpers_see on public.cyberdesk_instances for select to authenticated using (true);
             create policy helpers_write on public.cyberdesk_instances for update to authenticated using (true)",
        )
        .await?;
    let helps =
        "update public.cyberdesk_instances set timeout_at = timeout_at + interval '1 hour' where id = $1 returning id";
    ensure!(fixture.database.request(Caller::User(helper), helps, &[&living]).await?.len() == 1);
    let named = async || -> Result<i64> {
        let statement = "select count(*) from cyberdesk.history where actor_sub = $1";
        Ok(fixture.app.query_one(statement, &[&helper.to_string()]).await?.get(0))
    };
    ensure!(named().await? == 1);
    fixture.database.delete_user(helper).await?;
    ensure!(named().await? == 0, "whoever acted is named no more");
    ensure!(told(&fixture, living).await?.len() == 3, "what was done stays");

    fixture.database.delete_user(fixture.user).await?;
    let left: i64 = fixture.app.query_one("select count(*) from cyberdesk.history", &[]).await?.get(0);
    ensure!(left == 0);
    // What the operator still has to clear away tells nothing any more.
    fixture.operator.report(Entry::ended(living, "terminated", "row-deleted", "")).await?;
    let left: i64 = fixture.app.query_one("select count(*) from cyberdesk.history", &[]).await?.get(0);
    ensure!(left == 0);
    Ok(())
}

async fn trimmed(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let many = "insert into public.cyberdesk_instances (user_id) select $1 from generate_series(1, 1500)";
    fixture.app.execute(many, &[&fixture.user]).await?;
    let trim = async || -> Result<i64, tokio_postgres::Error> {
        let operator = &fixture.operator;
        let row =
            operator.client.query_one("select cyberdesk.trim($1, $2)", &[&operator.epoch, &operator.token]).await?;
        Ok(row.get(0))
    };
    ensure!(trim().await? == 0, "none of it is old");
    fixture.app.batch_execute("update cyberdesk.history set at = at - interval '90 days 1 hour'").await?;
    let young = fixture.insert_running().await?;
    ensure!(trim().await? == 1000);
    ensure!(trim().await? == 500);
    ensure!(trim().await? == 0);
    assert_eq!(told(&fixture, young).await?.len(), 2, "what is young stays");
    fixture.app.batch_execute("update cyberdesk.settings set history_retention = '1 day'").await?;
    fixture.app.batch_execute("update cyberdesk.history set at = at - interval '25 hours'").await?;
    ensure!(trim().await? == 2, "the setting decides");
    let deposed = fixture.operator.client.query("select cyberdesk.trim(0, $1)", &[&fixture.operator.token]).await;
    ensure!(code(deposed) == "CD001");
    Ok(())
}

async fn not_invented(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let admin = fixture.database.connect_as(cyberdesk_testbed::postgres::SUPERUSER).await?;
    admin.batch_execute("set session_replication_role = replica").await?;
    let insert = "insert into public.cyberdesk_instances (user_id, status) values ($1, 'running') returning id";
    let id: Uuid = admin.query_one(insert, &[&fixture.user]).await?.get(0);
    ensure!(fixture.operator.reconcile().await? == 1, "it is adopted");
    ensure!(told(&fixture, id).await?.is_empty());
    fixture.execute("select public.request_shutdown($1)", id).await?;
    assert_eq!(told(&fixture, id).await?, ["shutdown-requested: running > running requested"]);
    Ok(())
}
