//! Idle timeouts and warnings: what a touch does and what it does not, and when whoever is near their end is told.

use anyhow::{Result, ensure};
use cyberdesk_testbed::postgres::SUPERUSER;
use cyberdesk_testbed::{Caller, Postgres};
use serde_json::json;
use uuid::Uuid;

use super::Story;
use super::fixture::{Entry, Fixture, code};
use super::functions::rpc;

pub(super) const STORIES: &[Story] = &[
    ("an idle desktop ends as idle, a touched one lives on, none beyond its deadline", |p| Box::pin(idle(p))),
    ("touches write little, and nothing that is seen", |p| Box::pin(touches_are_cheap(p))),
    ("params choose the idle timeout, and a bad one is refused in words", |p| Box::pin(by_params(p))),
    ("each end that is near is told once, and again after an extension", |p| Box::pin(warnings(p))),
    ("whoever idles is warned, and a touch takes the warning back", |p| Box::pin(idle_warnings(p))),
    ("a paused desktop is ended by no deadline, and only an administrator pauses it", |p| Box::pin(paused(p))),
    ("warnings pass by rows that the app holds, and obey the fence", |p| Box::pin(warnings_yield(p))),
    ("a row that the app lets nobody write holds up no warning and no repair", |p| Box::pin(refused(p))),
];

/// As if so much time had passed since the desktop was last touched and looked at.
async fn later(fixture: &Fixture, id: Uuid, by: &str) -> Result<()> {
    let statement = format!(
        "update cyberdesk.desktop set touched_at = touched_at - interval '{by}', expires_at = expires_at - interval '{by}' where id = $1"
    );
    fixture.execute(&statement, id).await.map(drop)
}

async fn touch(fixture: &Fixture, id: Uuid) -> Result<bool, tokio_postgres::Error> {
    let rows = rpc(fixture, Caller::User(fixture.user), "touch_desktop", json!({ "desktop_id": id })).await?;
    assert_eq!(rows.len(), 1, "it is the caller's");
    Ok(rows[0]["changed"] == true)
}

/// How many it warned, and in how many seconds to look again.
async fn warn(fixture: &Fixture) -> Result<(i64, Option<f64>), tokio_postgres::Error> {
    let operator = &fixture.operator;
    let statement = "select warned, next_in_seconds from cyberdesk.warn($1, $2, 100)";
    let row = operator.client.query_one(statement, &[&operator.epoch, &operator.token]).await?;
    Ok((row.get(0), row.get(1)))
}

/// Seconds until five minutes before its end.
async fn until_near(fixture: &Fixture, id: Uuid) -> Result<f64> {
    let statement = "select extract(epoch from expires_at - interval '5 minutes' - clock_timestamp())::float8
                       from cyberdesk.desktop where id = $1";
    Ok(fixture.app.query_one(statement, &[&id]).await?.get(0))
}

async fn warned(fixture: &Fixture, id: Uuid) -> Result<bool> {
    let statement = "select c.warned_at is not null, d.warned_at is not distinct from c.warned_at
                       from public.cyberdesk_instances c join cyberdesk.desktop d using (id) where id = $1";
    let row = fixture.app.query_one(statement, &[&id]).await?;
    ensure!(row.get::<_, bool>(1), "row and private row agree");
    Ok(row.get(0))
}

async fn set(fixture: &Fixture, settings: &str) -> Result<()> {
    Ok(fixture.app.batch_execute(&format!("update cyberdesk.settings set {settings}")).await?)
}

async fn due_in(fixture: &Fixture, id: Uuid) -> Result<i64> {
    fixture.private("round(extract(epoch from expires_at - clock_timestamp()) / 60)::bigint", id).await
}

async fn idle(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    set(&fixture, "idle_timeout = '10 minutes'").await?;
    let id = fixture.insert().await?;
    ensure!(due_in(&fixture, id).await? == 24 * 60, "nobody can use it before it runs");
    ensure!(!touch(&fixture, id).await?);
    fixture.operator.report(Entry::running(id)).await?;
    ensure!(due_in(&fixture, id).await? == 10);
    ensure!(fixture.operator.look(id, &["generation"]).await? == "2", "the operator hears of it");
    fixture.operator.report(Entry { generation: 2, ..Entry::of(id) }).await?;

    // It was touched: the deadline that the operator knows of comes, and has moved.
    later(&fixture, id, "6 minutes").await?;
    ensure!(touch(&fixture, id).await?);
    later(&fixture, id, "6 minutes").await?;
    ensure!(fixture.operator.look(id, &["generation"]).await? == "2", "a touch by itself is no news");
    ensure!(fixture.operator.expire(&[id]).await? == ["touched"]);
    ensure!(due_in(&fixture, id).await? == 4);
    ensure!(fixture.operator.look(id, &["desired", "generation"]).await? == "present 3");
    ensure!(fixture.operator.expire(&[id]).await? == ["extended"], "it is not due");

    // Never beyond the deadline; a later deadline gives it back what was taken.
    let deadline = "update public.cyberdesk_instances set timeout_at = now() + interval '2 minutes' where id = $1";
    fixture.execute(deadline, id).await?;
    ensure!(due_in(&fixture, id).await? == 2);
    later(&fixture, id, "0").await?;
    ensure!(touch(&fixture, id).await?);
    ensure!(fixture.operator.expire(&[id]).await? == ["extended"]);
    ensure!(due_in(&fixture, id).await? == 2, "a touch moves no deadline");
    fixture.execute(&deadline.replace("2 minutes", "1 hour"), id).await?;
    ensure!(due_in(&fixture, id).await? == 10);

    // Nobody touches it.
    later(&fixture, id, "11 minutes").await?;
    ensure!(fixture.operator.reconcile().await? == 0, "an idle deadline is nothing to repair");
    ensure!(fixture.operator.expire(&[id]).await? == ["expired"]);
    let seen = fixture.row(id).await?;
    ensure!((seen.brief().as_str(), seen.requested) == ("running idle", true), "{seen:?}");
    ensure!(!touch(&fixture, id).await?, "an end once asked for beats a touch");

    // Of two deadlines that have passed the row's own is the cause.
    let both = fixture.insert_running().await?;
    later(&fixture, both, "11 minutes").await?;
    fixture.execute("update public.cyberdesk_instances set timeout_at = now() where id = $1", both).await?;
    ensure!(fixture.operator.expire(&[both]).await? == ["expired"]);
    ensure!(fixture.row(both).await?.brief() == "running timeout");

    // The setting holds for rows inserted later.
    let before = fixture.insert_running().await?;
    set(&fixture, "idle_timeout = null").await?;
    let after = fixture.insert_running().await?;
    ensure!((due_in(&fixture, before).await?, due_in(&fixture, after).await?) == (10, 24 * 60));
    ensure!(!touch(&fixture, after).await?, "there is nothing to write");
    Ok(())
}

async fn touches_are_cheap(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    set(&fixture, "idle_timeout = '10 minutes'").await?;
    let id = fixture.insert_running().await?;
    let versions = async || -> Result<(String, String)> {
        let statement = "select c.ctid::text, d.xmin::text from public.cyberdesk_instances c join cyberdesk.desktop d using (id) where id = $1";
        let row = fixture.app.query_one(statement, &[&id]).await?;
        Ok((row.get(0), row.get(1)))
    };
    let before = versions().await?;
    for _ in 0..5 {
        ensure!(!touch(&fixture, id).await?, "it has just begun to run");
    }
    ensure!(versions().await? == before);
    // A twentieth of ten minutes is 30 s.
    let ran = "update cyberdesk.desktop set touched_at = clock_timestamp() - interval '15 seconds' where id = $1";
    fixture.execute(ran, id).await?;
    ensure!(!touch(&fixture, id).await?);
    later(&fixture, id, "16 seconds").await?;
    let before = versions().await?;
    ensure!(touch(&fixture, id).await?);
    let after = versions().await?;
    ensure!(after.0 == before.0, "the app's row is not written");
    ensure!(after.1 != before.1);
    ensure!(!touch(&fixture, id).await?);
    Ok(())
}

async fn by_params(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    set(&fixture, "idle_timeout = '10 minutes'").await?;
    let insert = "insert into public.cyberdesk_instances (user_id, params) values ($1, $2) returning id";
    for (params, minutes) in [
        (json!({ "idle_timeout": "2 hours" }), 120),
        (json!({ "idle_timeout": "PT1H" }), 60),
        (json!({ "idle_timeout": null }), 24 * 60),
        (json!({ "template": "default" }), 10),
        (json!(["idle_timeout"]), 10),
    ] {
        let id: Uuid = fixture.app.query_one(insert, &[&fixture.user, &params]).await?.get(0);
        fixture.operator.report(Entry::running(id)).await?;
        ensure!(due_in(&fixture, id).await? == minutes, "{params}");
    }
    for bad in [
        json!("soon"),
        json!(""),
        json!("0"),
        json!("-1 hour"),
        json!("3 years"),
        json!("infinity"),
        json!({}),
        json!(true),
    ] {
        let error =
            fixture.app.query_one(insert, &[&fixture.user, &json!({ "idle_timeout": bad })]).await.expect_err("bad");
        let error = error.as_db_error().expect("the database refuses");
        ensure!(error.code().code() == "22023" && error.message().contains("params.idle_timeout"), "{bad}: {error:?}");
        ensure!(error.hint().is_some(), "{bad}");
    }
    // No template is asked about it.
    let params = json!({ "idle_timeout": "2 hours", "size": "small" });
    let id: Uuid = fixture.app.query_one(insert, &[&fixture.user, &params]).await?.get(0);
    ensure!(fixture.operator.look(id, &["params"]).await? == r#"{"size": "small"}"#);
    Ok(())
}

async fn warnings(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let insert = async |lifetime: &str| -> Result<Uuid> {
        let statement = format!(
            "insert into public.cyberdesk_instances (user_id, timeout_at, warned_at) values ($1, now() + interval '{lifetime}', now()) returning id"
        );
        Ok(fixture.app.query_one(&statement, &[&fixture.user]).await?.get(0))
    };
    let (near, far, past) =
        (insert("4 minutes").await?, insert("5 minutes 50 seconds").await?, insert("-1 second").await?);
    let stopping = insert("4 minutes").await?;
    fixture.execute("select public.request_shutdown($1)", stopping).await?;
    ensure!(warn(&fixture).await? == (0, None), "off");

    set(&fixture, "warn_before = '5 minutes'").await?;
    let latest = until_near(&fixture, far).await?;
    let (count, next) = warn(&fixture).await?;
    let earliest = until_near(&fixture, far).await?;
    ensure!(count == 1 && warned(&fixture, near).await?);
    for id in [far, past, stopping] {
        ensure!(!warned(&fixture, id).await?);
    }
    ensure!(next.is_some_and(|seconds| (earliest..=latest).contains(&seconds)), "the next is the far one: {next:?}");
    ensure!(warn(&fixture).await?.0 == 0, "once");
    let generation = fixture.operator.look(near, &["generation"]).await?;
    ensure!(generation == "1", "nothing for the operator to do");

    // Nobody else writes it.
    for value in ["null", "'2020-01-01'"] {
        fixture
            .execute(&format!("update public.cyberdesk_instances set warned_at = {value} where id = $1"), near)
            .await?;
        ensure!(warned(&fixture, near).await?, "{value}");
    }
    fixture.execute("update public.cyberdesk_instances set status = 'running' where id = $1", near).await?;
    ensure!(warned(&fixture, near).await?, "it is as near as before");

    let arguments = json!({ "desktop_id": near, "by_interval": "1 hour" });
    let rows = rpc(&fixture, Caller::User(fixture.user), "extend_desktop", arguments).await?;
    ensure!(rows[0]["desktop"]["warned_at"].is_null(), "the extension takes it back at once: {rows:?}");
    ensure!(warn(&fixture).await?.0 == 0);
    fixture
        .execute("update public.cyberdesk_instances set timeout_at = now() + interval '3 minutes' where id = $1", near)
        .await?;
    ensure!(warn(&fixture).await?.0 == 1 && warned(&fixture, near).await?, "another deadline, another warning");
    let told = "select count(*) from public.cyberdesk_desktop_history where desktop_id = $1 and event = 'warned' and actor = 'cyberdesk_daemon'";
    ensure!(fixture.app.query_one(told, &[&near]).await?.get::<_, i64>(0) == 2);
    ensure!(fixture.operator.reconcile().await? == 0);
    Ok(())
}

async fn idle_warnings(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    set(&fixture, "idle_timeout = '10 minutes', warn_before = '20 minutes'").await?;
    let id = fixture.insert_running().await?;
    let latest = until_near(&fixture, id).await?;
    let (count, next) = warn(&fixture).await?;
    let earliest = until_near(&fixture, id).await?;
    ensure!(count == 0, "it has just begun to run");
    ensure!(next.is_some_and(|seconds| (earliest..=latest).contains(&seconds)), "at half the idle timeout: {next:?}");

    // Touched since the deadline was last looked at: there is nothing to warn of.
    later(&fixture, id, "6 minutes").await?;
    touch(&fixture, id).await?;
    ensure!(warn(&fixture).await?.0 == 0);
    ensure!(due_in(&fixture, id).await? == 10, "and the deadline is moved on the way");

    later(&fixture, id, "6 minutes").await?;
    ensure!(warn(&fixture).await?.0 == 1 && warned(&fixture, id).await?);
    ensure!(touch(&fixture, id).await?);
    ensure!(!warned(&fixture, id).await?, "whoever is there need not be asked");
    later(&fixture, id, "6 minutes").await?;
    ensure!(warn(&fixture).await?.0 == 1, "and is asked again the next time");

    // The deadline itself is near: a touch does not make it later.
    fixture
        .execute("update public.cyberdesk_instances set timeout_at = now() + interval '4 minutes' where id = $1", id)
        .await?;
    ensure!(warn(&fixture).await?.0 == 1);
    later(&fixture, id, "1 minute").await?;
    ensure!(touch(&fixture, id).await?);
    ensure!(warned(&fixture, id).await?);
    Ok(())
}

async fn warnings_yield(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    set(&fixture, "warn_before = '2 days'").await?;
    let (held, free) = (fixture.insert().await?, fixture.insert().await?);
    let mut app = fixture.database.connect_as("postgres").await?;
    let holding = app.transaction().await?;
    holding.execute("update public.cyberdesk_instances set stream_url = 'x' where id = $1", &[&held]).await?;
    let (count, next) = warn(&fixture).await?;
    ensure!(count == 1 && warned(&fixture, free).await?);
    ensure!(next.is_some_and(|seconds| seconds <= 0.0), "the other's turn has come: {next:?}");
    holding.commit().await?;
    ensure!(warn(&fixture).await? == (1, None) && warned(&fixture, held).await?);

    let deposed =
        fixture.operator.client.query("select * from cyberdesk.warn(0, $1, 1)", &[&fixture.operator.token]).await;
    ensure!(code(deposed) == "CD001");
    Ok(())
}

async fn paused(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert_running().await?;
    let pause = async |paused: bool| -> Result<bool> {
        let statement = "select cyberdesk.pause_desktop($1, $2)";
        Ok(fixture.app.query_one(statement, &[&id, &paused]).await?.get(0))
    };
    ensure!(pause(true).await? && !pause(true).await?, "it is so already");
    ensure!(fixture.operator.look(id, &["paused", "generation"]).await? == "true 2", "the operator hears of it");
    let due = "update public.cyberdesk_instances set timeout_at = now() - interval '1 minute' where id = $1";
    fixture.execute(due, id).await?;
    ensure!(fixture.operator.expire(&[id]).await? == ["same"]);
    ensure!(!fixture.row(id).await?.requested, "its deadline does not end it");

    // Its tombstone is resumed as well.
    fixture.execute("delete from public.cyberdesk_instances where id = $1", id).await?;
    ensure!(fixture.operator.look(id, &["desired", "paused"]).await? == "absent true");
    ensure!(pause(false).await?);
    ensure!(fixture.operator.look(id, &["paused"]).await? == "false");

    let told = "select string_agg(event, ' ' order by id) from public.cyberdesk_desktop_history where desktop_id = $1";
    let told: String = fixture.app.query_one(told, &[&id]).await?.get(0);
    ensure!(told == "created status paused deadline deleted", "what becomes of a deleted row is not told: {told}");

    let unknown = "select cyberdesk.pause_desktop(gen_random_uuid())";
    let refused = fixture.app.query_one(unknown, &[]).await;
    ensure!(
        refused.is_err_and(|error| error.as_db_error().is_some_and(|error| error.message().contains("no desktop")))
    );
    Ok(())
}

async fn refused(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    set(&fixture, "warn_before = '2 days'").await?;
    let ids = [fixture.insert_running().await?, fixture.insert_running().await?, fixture.insert_running().await?];
    let locked = ids[1];
    fixture
        .app
        .batch_execute(&format!(
            "create function public.refuse() returns trigger language plpgsql as
               $$ begin raise exception 'hands off' using errcode = 'AP001'; end $$;
             create trigger a_refuse before update on public.cyberdesk_instances for each row
               when (old.id = '{locked}') execute function public.refuse()"
        ))
        .await?;
    let shown = async |id: Uuid| {
        let statement = "select warned_at is not null from public.cyberdesk_instances where id = $1";
        anyhow::Ok(fixture.app.query_one(statement, &[&id]).await?.get::<_, bool>(0))
    };
    ensure!(warn(&fixture).await?.0 == 3);
    ensure!((shown(ids[0]).await?, shown(locked).await?, shown(ids[2]).await?) == (true, false, true));
    ensure!(warn(&fixture).await? == (0, None), "nor is it tried again at once");

    // Whatever went round the triggers is repaired beside it, and it too when the app lets it be.
    let around = fixture.database.connect_as(SUPERUSER).await?;
    around.batch_execute("set session_replication_role = replica").await?;
    around.execute("update public.cyberdesk_instances set warned_at = null where id = $1", &[&ids[2]]).await?;
    ensure!(fixture.operator.reconcile().await? == 1);
    ensure!((shown(locked).await?, shown(ids[2]).await?) == (false, true));
    fixture.app.batch_execute("drop trigger a_refuse on public.cyberdesk_instances").await?;
    ensure!(fixture.operator.reconcile().await? == 1);
    ensure!(shown(locked).await?);
    ensure!(fixture.operator.reconcile().await? == 0);
    Ok(())
}
