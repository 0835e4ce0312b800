//! What the app and its users can call: answers, faults of arguments, and whose desktop it is.

use anyhow::{Context as _, Result, ensure};
use cyberdesk_operator::database::migrate::{Error, migrate};
use cyberdesk_testbed::{Caller, Postgres};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::Story;
use super::fixture::{Entry, Fixture, connect};

pub(super) const STORIES: &[Story] = &[
    ("extend_desktop and set_desktop_timeout move a deadline as far as it can move", |p| Box::pin(deadlines(p))),
    ("no function moves a desktop that is asked to end or is over", |p| Box::pin(ending(p))),
    ("faults of arguments are told with SQLSTATE and hint", |p| Box::pin(faults(p))),
    ("a desktop of somebody else looks like one that is not there", |p| Box::pin(foreign(p))),
    ("request_shutdown_all ends what is yours, once", |p| Box::pin(shutdown_all(p))),
    ("of those who end the same desktops at once, one ends each", |p| Box::pin(shutdown_all_twice(p))),
    ("desktop_service_state tells why nothing starts", |p| Box::pin(service_state(p))),
    ("functions of our names that are not ours are refused", |p| Box::pin(foreign_functions(p))),
];

/// Calls a function as PostgREST does: its arguments by name, taken from the body.
pub(super) async fn rpc(
    fixture: &Fixture,
    caller: Caller,
    function: &str,
    arguments: Value,
) -> Result<Vec<Value>, tokio_postgres::Error> {
    const TYPES: [(&str, &str); 5] = [
        ("desktop_id", "uuid"),
        ("owner_id", "uuid"),
        ("reason", "text"),
        ("by_interval", "interval"),
        ("at", "timestamp with time zone"),
    ];
    let given = TYPES.iter().filter(|(name, _)| arguments.get(name).is_some());
    let types: Vec<String> = given.clone().map(|(name, kind)| format!(r#""{name}" {kind}"#)).collect();
    let names: Vec<String> = given.map(|(name, _)| format!(r#""{name}" := a."{name}""#)).collect();
    let arguments_of = if types.is_empty() {
        String::new()
    } else {
        format!("lateral json_to_record(b.body) as a({}), ", types.join(", "))
    };
    let statement = format!(
        r#"with call as (select r.* from (select $1::text::json as body) b, {arguments_of}lateral "public"."{function}"({}) r)
           select coalesce(json_agg(call), '[]')::text from call"#,
        names.join(", ")
    );
    let body = arguments.to_string();
    let rows = fixture.database.request(caller, &statement, &[&body]).await?;
    let answer: Value = serde_json::from_str(rows[0].get(0)).expect("the server makes JSON");
    Ok(answer.as_array().expect("a function's answer is a table").clone())
}

/// Whether a call changed anything; `None`: it found no row.
async fn changed(
    fixture: &Fixture,
    caller: Caller,
    function: &str,
    arguments: Value,
) -> Result<Option<bool>, tokio_postgres::Error> {
    let rows = rpc(fixture, caller, function, arguments).await?;
    assert!(rows.len() <= 1, "{rows:?}");
    Ok(rows.first().map(|row| row["changed"].as_bool().expect("changed is a boolean")))
}

async fn deadlines(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert().await?;
    let owner = Caller::User(fixture.user);
    let set =
        async |at: &str| changed(&fixture, owner, "set_desktop_timeout", json!({ "desktop_id": id, "at": at })).await;
    let extend = async |by: &str| {
        changed(&fixture, owner, "extend_desktop", json!({ "desktop_id": id, "by_interval": by })).await
    };
    let deadline = async || -> Result<String> {
        let statement =
            "select to_char(timeout_at, 'YYYY-MM-DD HH24:MI') from public.cyberdesk_instances where id = $1";
        let public: String = fixture.app.query_one(statement, &[&id]).await?.get(0);
        let private: String =
            fixture.private("to_char(expires_at at time zone 'utc', 'YYYY-MM-DD HH24:MI')", id).await?;
        ensure!(public == private, "row and private row agree: {public}, {private}");
        Ok(public)
    };
    // A time with a zone is that instant, whatever the session's zone.
    for (at, moved, to) in [
        ("2100-01-01T12:00:00Z", true, "2100-01-01 12:00"),
        ("2100-01-01T12:00:00Z", false, "2100-01-01 12:00"),
        ("2100-01-01T12:00:00+05:30", true, "2100-01-01 06:30"),
        ("infinity", true, "9000-01-01 00:00"),
        ("294000-01-01T00:00:00Z", false, "9000-01-01 00:00"),
        ("2100-01-01T12:00:00Z", true, "2100-01-01 12:00"),
    ] {
        ensure!(set(at).await? == Some(moved), "{at}");
        ensure!(deadline().await? == to, "{at}");
    }
    for (by, moved, to) in [
        ("1 hour", true, "2100-01-01 13:00"),
        ("PT30M", true, "2100-01-01 13:30"),
        ("90000 years", true, "9000-01-01 00:00"),
        ("1 hour", false, "9000-01-01 00:00"),
    ] {
        ensure!(extend(by).await? == Some(moved), "{by}");
        ensure!(deadline().await? == to, "{by}");
    }
    let generation: i64 = fixture.private("generation", id).await?;
    ensure!(generation == 8, "each move is news to the operator, and nothing else is: {generation}");

    // A time that has passed ends it now.
    ensure!(set("-infinity").await? == Some(true));
    ensure!(fixture.operator.expire(&[id]).await? == ["expired"]);
    ensure!(fixture.row(id).await?.brief() == "pending timeout");

    // A row from before the triggers.
    let old = fixture.insert().await?;
    fixture.app.execute("delete from cyberdesk.desktop where id = $1", &[&old]).await?;
    let arguments = json!({ "desktop_id": old, "by_interval": "1 hour" });
    ensure!(changed(&fixture, Caller::Service, "extend_desktop", arguments).await? == Some(true));
    Ok(())
}

async fn ending(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let asked = fixture.insert_running().await?;
    fixture.execute("select public.request_shutdown($1)", asked).await?;
    let completed = fixture.insert_running().await?;
    fixture.execute("update public.cyberdesk_instances set status = 'completed' where id = $1", completed).await?;
    let over = fixture.insert_running().await?;
    fixture.operator.report(Entry::ended(over, "error", "guest-crashed", "")).await?;
    for id in [asked, completed, over] {
        let before = fixture.row(id).await?;
        for (function, more) in [
            ("extend_desktop", json!({ "by_interval": "1 hour" })),
            ("set_desktop_timeout", json!({ "at": "2100-01-01T00:00:00Z" })),
            ("touch_desktop", json!({})),
            ("request_shutdown", json!({})),
        ] {
            let mut arguments = more;
            arguments["desktop_id"] = json!(id);
            let rows = rpc(&fixture, Caller::User(fixture.user), function, arguments).await?;
            ensure!(rows.len() == 1 && rows[0]["changed"] == false, "{function}: {rows:?}");
            ensure!(rows[0]["desktop"]["id"] == json!(id), "the row says why: {rows:?}");
        }
        ensure!(fixture.row(id).await? == before);
    }
    Ok(())
}

async fn faults(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert().await?;
    let cases = [
        ("extend_desktop", json!({ "desktop_id": id, "by_interval": null }), "22004", "by_interval is missing"),
        ("extend_desktop", json!({ "desktop_id": id, "by_interval": "0" }), "22023", "more than nothing"),
        ("extend_desktop", json!({ "desktop_id": id, "by_interval": "-1 hour" }), "22023", "more than nothing"),
        ("set_desktop_timeout", json!({ "desktop_id": id, "at": null }), "22004", "at is missing"),
        ("request_shutdown_all", json!({}), "22004", "owner_id is missing"),
        ("request_shutdown_all", json!({ "owner_id": null }), "22004", "owner_id is missing"),
    ];
    for (function, arguments, code, words) in cases {
        let error = rpc(&fixture, Caller::Service, function, arguments.clone()).await.expect_err("a fault");
        let error = error.as_db_error().context("the database tells it")?;
        ensure!(error.code().code() == code, "{function} {arguments}: {error:?}");
        ensure!(error.message().contains(words), "{function} {arguments}: {error:?}");
        ensure!(error.hint().is_some(), "{function} {arguments} says what to do");
    }
    for function in ["request_shutdown", "touch_desktop"] {
        ensure!(changed(&fixture, Caller::Service, function, json!({ "desktop_id": null })).await?.is_none());
    }
    ensure!(fixture.row(id).await?.brief() == "pending");
    Ok(())
}

async fn foreign(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let stranger = Caller::User(fixture.database.sign_up().await?);
    let id = fixture.insert_running().await?;
    let before = fixture.row(id).await?;
    for (function, more) in [
        ("request_shutdown", json!({})),
        ("extend_desktop", json!({ "by_interval": "1 hour" })),
        ("set_desktop_timeout", json!({ "at": "2100-01-01T00:00:00Z" })),
        ("touch_desktop", json!({})),
    ] {
        let on = |id: Uuid| {
            let mut arguments = more.clone();
            arguments["desktop_id"] = json!(id);
            arguments
        };
        let theirs = rpc(&fixture, stranger, function, on(id)).await?;
        let nobodys = rpc(&fixture, stranger, function, on(Uuid::new_v4())).await?;
        ensure!(theirs.is_empty() && nobodys.is_empty(), "{function}: {theirs:?} {nobodys:?}");
        let anonymous = rpc(&fixture, Caller::Anon, function, on(id)).await;
        ensure!(super::fixture::code(anonymous) == "42501", "{function}");
    }
    // Nor by the privileged halves, whatever policy the app has made beside ours.
    fixture
        .app
        .batch_execute(
            "create policy all_see_all on public.cyberdesk_instances for select to authenticated using (true)",
        )
        .await?;
    for half in [
        "select cyberdesk.request_shutdown($1, null)",
        "select cyberdesk.set_desktop_timeout($1, now(), null)",
        "select cyberdesk.touch_desktop($1)",
        "select (public.extend_desktop($1, '1 hour')).changed",
    ] {
        let rows = fixture.database.request(stranger, half, &[&id]).await?;
        ensure!(!rows[0].get::<_, bool>(0), "{half}");
    }
    let all = fixture.database.request(stranger, "select cyberdesk.request_shutdown_all($1)", &[&fixture.user]).await?;
    ensure!(all.is_empty());
    ensure!(fixture.row(id).await? == before);
    Ok(())
}

async fn shutdown_all(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let stranger = fixture.database.sign_up().await?;
    let ids = [fixture.insert_running().await?, fixture.insert().await?, fixture.insert_running().await?];
    fixture.execute("select public.request_shutdown($1, 'by itself')", ids[2]).await?;
    let over = fixture.insert_running().await?;
    fixture.operator.report(Entry::ended(over, "terminated", "guest-shutdown", "")).await?;
    let others: Uuid = fixture
        .app
        .query_one("insert into public.cyberdesk_instances (user_id) values ($1) returning id", &[&stranger])
        .await?
        .get(0);

    let call = async |caller, arguments: Value| -> Result<String> {
        let rows = rpc(&fixture, caller, "request_shutdown_all", arguments).await?;
        Ok(rows.iter().map(|row| if row["changed"] == true { 'x' } else { '-' }).collect())
    };
    let theirs = json!({ "owner_id": fixture.user });
    ensure!(call(Caller::User(stranger), theirs.clone()).await?.is_empty(), "a stranger finds nothing");
    ensure!(call(Caller::User(fixture.user), json!({})).await? == "xx-", "what is over is left out, what ends is told");
    ensure!(call(Caller::User(fixture.user), theirs.clone()).await? == "---");
    ensure!(call(Caller::Service, theirs).await? == "---");
    for id in &ids[..2] {
        let seen = fixture.row(*id).await?;
        ensure!(seen.requested && seen.reason.as_deref() == Some("requested"), "{seen:?}");
    }
    ensure!(fixture.row(ids[2]).await?.message.as_deref() == Some("by itself"), "the first cause stands");
    ensure!(fixture.row(others).await?.brief() == "pending");
    ensure!(call(Caller::Service, json!({ "owner_id": Uuid::new_v4() })).await?.is_empty(), "nobody has nothing");

    let direct = fixture.app.query("select changed from public.request_shutdown_all($1)", &[&stranger]).await?;
    ensure!(direct.len() == 1 && direct[0].get::<_, bool>(0));
    Ok(())
}

async fn shutdown_all_twice(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let many = "insert into public.cyberdesk_instances (user_id) select $1 from generate_series(1, 40)";
    for _ in 0..5 {
        fixture.app.execute(many, &[&fixture.user]).await?;
        let all = || rpc(&fixture, Caller::User(fixture.user), "request_shutdown_all", json!({}));
        let (first, second, third) = tokio::try_join!(all(), all(), all())?;
        let ended = [first, second, third].into_iter().flatten().filter(|row| row["changed"] == true).count();
        ensure!(ended == 40, "each was ended by one of them: {ended}");
    }
    Ok(())
}

async fn service_state(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let state = async |caller| -> Result<Value> {
        let mut rows = rpc(&fixture, caller, "desktop_service_state", json!({})).await?;
        ensure!(rows.len() == 1, "always one row: {rows:?}");
        Ok(rows.remove(0))
    };
    let user = Caller::User(fixture.user);
    let never = state(user).await?;
    ensure!(never["state"] == "away" && never["served"] == false && never["seen_at"].is_null(), "{never}");

    let alive = "select cyberdesk.sign_of_life($1, $2)";
    fixture.operator.client.execute(alive, &[&fixture.operator.epoch, &fixture.operator.token]).await?;
    for caller in [user, Caller::Service] {
        let serving = state(caller).await?;
        ensure!(serving["state"] == "serving" && serving["served"] == true, "{serving}");
    }
    fixture.app.batch_execute("update cyberdesk.settings set paused = true").await?;
    let paused = state(user).await?;
    ensure!(paused["state"] == "paused" && paused["paused"] == true && paused["served"] == true, "{paused}");
    fixture.app.batch_execute("update cyberdesk.service set braked_because = 'the database is a copy'").await?;
    let braked = state(user).await?;
    ensure!(braked["state"] == "braked" && braked["braked"] == true, "{braked}");
    ensure!(braked["message"].as_str().is_some_and(|words| words.contains("the database is a copy")), "{braked}");
    fixture.app.batch_execute("update cyberdesk.service set seen_at = seen_at - interval '46 seconds'").await?;
    let away = state(user).await?;
    ensure!(away["state"] == "away" && away["served"] == false, "{away}");
    ensure!(away["message"].as_str().is_some_and(|words| words.contains("since 20")), "it says since when: {away}");

    let anonymous = rpc(&fixture, Caller::Anon, "desktop_service_state", json!({})).await;
    ensure!(super::fixture::code(anonymous) == "42501");
    let (client, parameters): (_, [&(dyn ToSql + Sync); 2]) =
        (&fixture.operator.client, [&fixture.operator.epoch, &fixture.operator.token]);
    let told: Timestamp = client.query_one(alive, &parameters).await?.get(0);
    fixture.app.batch_execute("update cyberdesk.service set seen_at = now() + interval '1 hour'").await?;
    let last: Timestamp = client.query_one("select cyberdesk.last_sign_of_life()", &[]).await?.get(0);
    ensure!(last == told, "what it was told, whatever has been told of a brake since");
    let deposed = fixture.operator.client.execute(alive, &[&0_i64, &fixture.operator.token]).await;
    ensure!(super::fixture::code(deposed) == "CD001", "only who may write shows that it lives");
    Ok(())
}

async fn foreign_functions(postgres: &Postgres) -> Result<()> {
    for name in
        ["request_shutdown_all", "extend_desktop", "set_desktop_timeout", "touch_desktop", "desktop_service_state"]
    {
        let database = postgres.supabase_database().await?;
        let app = database.connect_as("postgres").await?;
        app.batch_execute(&format!(
            "create function public.{name}(theirs text) returns text language sql as 'select 1::text'"
        ))
        .await?;
        let mut client = connect(&database.url("postgres")).await?;
        let error = migrate(&mut client, None).await.expect_err("it is not ours");
        ensure!(matches!(&error, Error::Refused(words) if words.contains(name)), "{error}");
        let theirs: i64 = app.query_one("select count(*) from pg_proc where proname = $1", &[&name]).await?.get(0);
        ensure!(theirs == 1, "it is left as it was, and alone");
    }
    Ok(())
}
