//! What the app, its gateway and its web page send is answered as before, and nothing they write undoes an end.

use anyhow::{Context as _, Result};
use cyberdesk_testbed::{Caller, Postgres};
use futures::SinkExt as _;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::Story;
use super::fixture::{Entry, Fixture, code};

pub(super) const STORIES: &[Story] = &[
    ("the app's own statements are answered as before", |p| Box::pin(own_statements(p))),
    ("a deadline may be any that the app can write", |p| Box::pin(deadlines(p))),
    ("every status that can be written leads where it should", |p| Box::pin(guard_table(p))),
    ("a late write of the gateway is absorbed", |p| Box::pin(late_running(p))),
    ("an upsert of a row that is there obeys the rules of an update", |p| Box::pin(upsert(p))),
    ("old rows can be copied in, and those that were over stay over", |p| Box::pin(copy(p))),
    ("another trigger cannot bring an ended desktop back", |p| Box::pin(other_triggers(p))),
    ("another trigger may write to a row as it is inserted", |p| Box::pin(written_at_once(p))),
    ("another trigger may end what a statement inserts", |p| Box::pin(ended_at_once(p))),
    ("an id once used is refused, whoever asks", |p| Box::pin(id_reuse(p))),
    ("an id is refused also while its delete is still open", |p| Box::pin(id_reuse_race(p))),
    ("the operator's columns and the fixed ones cannot be written by others", |p| Box::pin(foreign_writes(p))),
    ("request_shutdown stops what is yours, once", |p| Box::pin(request_shutdown(p))),
    ("an end once asked for beats a later deadline", |p| Box::pin(no_extension(p))),
    ("deleting a row or its user leaves a tombstone", |p| Box::pin(deletes(p))),
    ("the table cannot be truncated", |p| Box::pin(truncate(p))),
];

async fn own_statements(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert().await?;

    // The gateway, by PostgREST with the service key.
    let rows = fixture
        .database
        .request(
            Caller::Service,
            "update public.cyberdesk_instances set status = 'running', stream_url = $1 where id = $2 returning status::text, stream_url",
            &[&"https://gateway.example/vnc/1", &id],
        )
        .await?;
    assert_eq!(rows[0].get::<_, &str>(0), "running");
    assert_eq!(rows[0].get::<_, &str>(1), "https://gateway.example/vnc/1");

    // The API.
    let row = fixture
        .app
        .query_one(
            r#"select "id", "status"::text, "created_at"::text, "timeout_at"::text, "stream_url" from "cyberdesk_instances"
               where "id" = $1 and "user_id" = $2 limit 1"#,
            &[&id, &fixture.user],
        )
        .await?;
    assert_eq!(row.get::<_, &str>(1), "running");

    // The web page: one's own rows, nobody else's, and nothing without signing in.
    let page = "select * from public.cyberdesk_instances where user_id = $1 order by created_at desc";
    let own = fixture.database.request(Caller::User(fixture.user), page, &[&fixture.user]).await?;
    assert_eq!(own.len(), 1);
    let stranger = fixture.database.sign_up().await?;
    let others = fixture.database.request(Caller::User(stranger), page, &[&fixture.user]).await?;
    assert!(others.is_empty(), "row-level security hides other people's desktops");
    assert_eq!(code(fixture.database.request(Caller::Anon, page, &[&fixture.user]).await), "42501");

    // The API's stop, in any state: it returns the row each time.
    for status in ["error", "terminated", "error", "terminated"] {
        let stopped = fixture
            .app
            .query_one(
                r#"update "cyberdesk_instances" set "status" = $1::text::public.instance_status, "updated_at" = $2::text::timestamp
                   where "id" = $3 and "user_id" = $4 returning "id", "status"::text"#,
                &[&status, &"2026-11-23T12:00:00.000Z", &id, &fixture.user],
            )
            .await
            .with_context(|| format!("write {status}"))?;
        assert_eq!(stopped.get::<_, Uuid>(0), id);
    }
    assert_eq!(fixture.row(id).await?.brief(), "terminated requested");
    Ok(())
}

async fn deadlines(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    for (deadline, seconds) in [
        ("now() + interval '0 milliseconds'", "0"),
        ("now() + interval '-5000 milliseconds'", "-5"),
        ("now() + interval '24 hours'", "86400"),
        ("now() + interval '8640000000000000 milliseconds'", "far"),
        ("'infinity'", "far"),
        ("'-infinity'", "past"),
    ] {
        let row = fixture
            .app
            .query_one(
                &format!(
                    "insert into public.cyberdesk_instances (user_id, status, timeout_at) values ($1, 'pending', {deadline})
                     returning id, case
                       when timeout_at = '9000-01-01' then 'far'
                       when timeout_at = '1970-01-01' then 'past'
                       else round(extract(epoch from timeout_at - now()::timestamp))::text end"
                ),
                &[&fixture.user],
            )
            .await
            .context(deadline)?;
        assert_eq!(row.get::<_, &str>(1), seconds, "{deadline}");
        let same: bool = fixture
            .private(
                "expires_at = (select timeout_at at time zone 'utc' from public.cyberdesk_instances c where c.id = desktop.id)",
                row.get(0),
            )
            .await?;
        assert!(same, "{deadline}: the private deadline is the public one");
    }
    let null = fixture
        .app
        .execute("insert into public.cyberdesk_instances (user_id, timeout_at) values ($1, null)", &[&fixture.user])
        .await;
    assert_eq!(code(null), "23502", "the table's own not null speaks");
    Ok(())
}

async fn guard_table(postgres: &Postgres) -> Result<()> {
    const WRITTEN: [&str; 5] = ["pending", "running", "completed", "error", "terminated"];
    let cases: &[(&str, bool, [&str; 5])] = &[
        ("pending", false, ["pending", "running", "completed", "error", "terminated"]),
        ("running", false, ["running", "running", "completed", "error", "terminated"]),
        ("pending", true, ["pending", "pending", "completed", "error", "terminated"]),
        ("running", true, ["running", "running", "completed", "error", "terminated"]),
        ("completed", false, ["completed", "completed", "completed", "completed", "terminated"]),
        ("error", false, ["error", "error", "error", "error", "terminated"]),
        ("terminated", false, ["terminated"; 5]),
    ];
    let fixture = Fixture::new(postgres).await?;
    let set = "update public.cyberdesk_instances set status = $2::text::public.instance_status where id = $1 returning status::text";
    for (old, asked, leads_to) in cases {
        for over in [false, true] {
            for (written, expected) in WRITTEN.iter().zip(leads_to) {
                let id = fixture.insert().await?;
                fixture.app.query_one(set, &[&id, old]).await?;
                if *asked {
                    fixture.execute("select public.request_shutdown($1)", id).await?;
                }
                let mut expected = *expected;
                if over {
                    fixture.operator.report(Entry::ended(id, "terminated", "requested", "")).await?;
                    // Over means terminal, and the operator changes no status that is terminal already.
                    expected = match (*old, *written) {
                        ("completed" | "error", "terminated") => "terminated",
                        ("completed" | "error", _) => old,
                        _ => "terminated",
                    };
                }
                let row = fixture.app.query_one(set, &[&id, written]).await?;
                let case = format!("{old}, shutdown requested: {asked}, over: {over}, {written} written");
                assert_eq!(row.get::<_, &str>(0), expected, "{case}");

                let seen = fixture.row(id).await?;
                let live = matches!(expected, "pending" | "running");
                // Whoever writes a terminal status asks for the end by it; an end that nobody asked for is the operator's.
                let asked_by_status = !matches!(*old, "pending" | "running") || !over && !live;
                assert_eq!(seen.requested, *asked || asked_by_status, "{case}");
                assert_eq!(seen.ended, over, "{case}");
                let desired: String = fixture.private("desired", id).await?;
                assert_eq!(desired == "present", live && !*asked && !over, "{case}: {desired}");
            }
        }
    }
    Ok(())
}

async fn late_running(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let gateway = "update public.cyberdesk_instances set status = 'running', stream_url = 'https://late.example' where id = $1 returning status::text";
    let stop = "update public.cyberdesk_instances set status = 'terminated' where id = $1";
    let ask = "select public.request_shutdown($1)";
    for (end, status) in [(stop, "terminated"), (ask, "pending")] {
        let id = fixture.insert().await?;
        fixture.execute(end, id).await?;
        let before = fixture.row(id).await?;
        let rows = fixture.database.request(Caller::Service, gateway, &[&id]).await?;
        assert_eq!(rows[0].get::<_, &str>(0), status);
        assert_eq!(fixture.row(id).await?, before, "the row is as it was, its address too");
    }
    Ok(())
}

async fn upsert(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let upsert =
        "insert into public.cyberdesk_instances (id, user_id, status) values ($1, $2, $3::text::public.instance_status)
         on conflict (id) do update set id = excluded.id, user_id = excluded.user_id, status = excluded.status
         returning status::text";
    let id = fixture.insert_running().await?;
    for (written, expected) in
        [("pending", "running"), ("running", "running"), ("terminated", "terminated"), ("running", "terminated")]
    {
        let rows = fixture.database.request(Caller::Service, upsert, &[&id, &fixture.user, &written]).await?;
        assert_eq!(rows[0].get::<_, &str>(0), expected, "{written} upserted");
        assert!(!fixture.row(id).await?.ended, "only the operator ends it");
    }
    // The gateway's news by upsert are an update's too.
    let id = fixture.insert().await?;
    let rows = fixture.database.request(Caller::Service, upsert, &[&id, &fixture.user, &"running"]).await?;
    assert_eq!(rows[0].get::<_, &str>(0), "running");
    // A new id by the same statement is an insert.
    let rows = fixture.database.request(Caller::Service, upsert, &[&Uuid::new_v4(), &fixture.user, &"running"]).await?;
    assert_eq!(rows[0].get::<_, &str>(0), "pending");
    Ok(())
}

async fn copy(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let mut lines = String::new();
    let mut ids = Vec::new();
    for status in ["pending", "running", "completed", "error", "terminated"] {
        let id = Uuid::new_v4();
        ids.push(id);
        lines.push_str(&format!(
            "{id}\t{}\t2025-01-01 00:00:00\t2025-01-02 00:00:00\t{status}\t2025-01-03 00:00:00\thttps://old.example\n",
            fixture.user
        ));
    }
    let sink = fixture
        .app
        .copy_in("copy public.cyberdesk_instances (id, user_id, created_at, updated_at, status, timeout_at, stream_url) from stdin")
        .await?;
    tokio::pin!(sink);
    sink.send(bytes(lines)).await?;
    assert_eq!(sink.finish().await?, 5);

    let expected = ["pending", "pending", "completed.", "error.", "terminated."];
    for (id, expected) in ids.iter().zip(expected) {
        assert_eq!(fixture.row(*id).await?.brief(), expected);
    }
    let mut work = fixture.operator.dirty().await?;
    work.sort();
    let mut live = ids[..2].to_vec();
    live.sort();
    assert_eq!(work, live, "what was over gets no VM and no look");
    Ok(())
}

fn bytes(text: String) -> std::io::Cursor<Vec<u8>> {
    std::io::Cursor::new(text.into_bytes())
}

async fn other_triggers(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert_running().await?;
    fixture
        .app
        .batch_execute(
            "create function public.revive() returns trigger language plpgsql set search_path = '' as
               $$ begin new.status := 'running'; new.ended_at := null; new.timeout_at := now() + interval '1 year'; return new; end $$;
             create trigger zz_revive before update on public.cyberdesk_instances for each row execute function public.revive();
             create function public.revive_again() returns trigger language plpgsql set search_path = '' as
               $$ begin
                 update public.cyberdesk_instances set status = 'running' where id = new.id and status <> 'running' and pg_trigger_depth() < 3;
                 return null;
               end $$;
             create trigger zz_revive_again after update on public.cyberdesk_instances for each row execute function public.revive_again();",
        )
        .await?;
    fixture.operator.report(Entry::ended(id, "terminated", "guest-shutdown", "")).await?;
    assert_eq!(fixture.row(id).await?.brief(), "terminated guest-shutdown.");
    fixture.execute("update public.cyberdesk_instances set stream_url = null where id = $1", id).await?;
    assert_eq!(fixture.row(id).await?.brief(), "terminated guest-shutdown.");
    assert_eq!(fixture.operator.look(id, &["desired", "status"]).await?, "absent terminated");
    Ok(())
}

async fn ended_at_once(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    fixture
        .app
        .batch_execute(
            "create function public.refuse() returns trigger language plpgsql set search_path = '' as
               $$ begin perform public.request_shutdown(i.id) from refused i; return null; end $$;
             create trigger refuse after insert on public.cyberdesk_instances
               referencing new table as refused for each statement execute function public.refuse()",
        )
        .await?;
    let id = fixture.insert().await?;
    assert_eq!(fixture.operator.look(id, &["desired", "reason"]).await?, "absent requested");
    assert_eq!(fixture.operator.dirty().await?, [id]);
    // Before we have heard of the row at all.
    fixture
        .app
        .batch_execute(
            "create function public.refuse_row() returns trigger language plpgsql set search_path = '' as
               $$ begin perform public.request_shutdown(new.id); return null; end $$;
             drop trigger refuse on public.cyberdesk_instances;
             create trigger refuse after insert on public.cyberdesk_instances for each row execute function public.refuse_row()",
        )
        .await?;
    let id = fixture.insert().await?;
    assert_eq!(fixture.operator.look(id, &["desired", "reason"]).await?, "absent requested");
    Ok(())
}

async fn written_at_once(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    fixture
        .app
        .batch_execute(
            "create function public.decorate() returns trigger language plpgsql set search_path = '' as
               $$ begin update public.cyberdesk_instances set stream_url = 'https://soon.example' where id = new.id; return null; end $$;
             create trigger decorate after insert on public.cyberdesk_instances for each row execute function public.decorate()",
        )
        .await?;
    let id = fixture.insert().await?;
    assert_eq!(fixture.row(id).await?.stream_url.as_deref(), Some("https://soon.example"));
    assert_eq!(fixture.operator.dirty().await?, [id]);
    // A function of the app's that handles exceptions inserts in a subtransaction.
    let insert = format!(
        "insert into public.cyberdesk_instances (user_id, status) values ('{0}', 'pending'), ('{0}', 'error')",
        fixture.user
    );
    let handled = format!("do $$ begin {insert}; exception when division_by_zero then null; end $$");
    fixture.app.batch_execute(&handled).await?;
    assert_eq!(fixture.operator.dirty().await?.len(), 2);
    // Within one transaction, too, a desktop that is gone does not come back.
    let again = fixture
        .app
        .batch_execute(&format!(
            "begin; delete from public.cyberdesk_instances where id = '{id}';
             insert into public.cyberdesk_instances (id, user_id) values ('{id}', '{}')",
            fixture.user
        ))
        .await;
    assert_eq!(code(again), "23505");
    for status in ["pending", "error"] {
        let insert = format!(
            "insert into public.cyberdesk_instances (id, user_id, status) values ('{}', '{}', '{status}')",
            Uuid::from_u128(7),
            fixture.user
        );
        let twice =
            format!("{insert}; delete from public.cyberdesk_instances where id = '{}'; {insert}", Uuid::from_u128(7));
        assert_eq!(code(fixture.app.batch_execute(&format!("rollback; begin; {twice}")).await), "23505", "{status}");
    }
    Ok(())
}

async fn id_reuse(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let insert = "insert into public.cyberdesk_instances (id, user_id) values ($1, $2)";
    let stranger = fixture.database.sign_up().await?;
    for over in [false, true] {
        let id = fixture.insert_running().await?;
        if over {
            fixture.operator.report(Entry::ended(id, "error", "guest-crashed", "")).await?;
        }
        fixture.execute("delete from public.cyberdesk_instances where id = $1", id).await?;
        for user in [fixture.user, stranger] {
            let error = fixture.app.execute(insert, &[&id, &user]).await.expect_err("the id has been used");
            let error = error.as_db_error().context("the database refuses")?;
            assert_eq!(error.code().code(), "23505");
            assert!(error.hint().is_some_and(|hint| hint.contains("leave id out")), "{error:?}");
        }
        let owner: Uuid = fixture.private("user_id", id).await?;
        assert_eq!(owner, fixture.user, "the tombstone is still the first one's");
    }
    let twice = fixture.insert().await?;
    assert_eq!(code(fixture.app.execute(insert, &[&twice, &fixture.user]).await), "23505");
    Ok(())
}

async fn id_reuse_race(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert().await?;
    let mut deleter = fixture.database.connect_as("postgres").await?;
    let delete = deleter.transaction().await?;
    delete.execute("delete from public.cyberdesk_instances where id = $1", &[&id]).await?;
    // The insert still sees the row, so the guard leaves it to the primary key, which waits for the delete.
    let insert = async {
        fixture
            .app
            .execute(
                "insert into public.cyberdesk_instances (id, user_id, status) values ($1, $2, 'running')",
                &[&id, &fixture.user],
            )
            .await
    };
    let commit = async {
        fixture.until_somebody_waits_for_a_lock().await?;
        anyhow::Ok(delete.commit().await?)
    };
    let (inserted, committed) = tokio::join!(insert, commit);
    committed?;
    assert_eq!(code(inserted), "23505");
    Ok(())
}

async fn foreign_writes(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let row = fixture
        .app
        .query_one(
            r#"insert into public.cyberdesk_instances (user_id, reason, message, shutdown_requested_at, ended_at, params)
               values ($1, 'timeout', 'x', now(), now(), '{"size": "small"}') returning id"#,
            &[&fixture.user],
        )
        .await?;
    let id: Uuid = row.get(0);
    assert_eq!(fixture.row(id).await?.brief(), "pending");
    fixture
        .execute(
            r#"update public.cyberdesk_instances
                  set reason = 'timeout', message = 'x', shutdown_requested_at = now(), ended_at = now(), params = '{"size": "large"}',
                      id = gen_random_uuid(), user_id = gen_random_uuid(), created_at = '2000-01-01', updated_at = '2000-01-01'
                where id = $1"#,
            id,
        )
        .await?;
    assert_eq!(fixture.row(id).await?.brief(), "pending");
    let kept: bool = fixture
        .app
        .query_one(
            r#"select params = '{"size": "small"}' and user_id = $2 and created_at > '2020-01-01' and updated_at > '2020-01-01'
                 from public.cyberdesk_instances where id = $1"#,
            &[&id, &fixture.user],
        )
        .await?
        .get(0);
    assert!(kept);
    assert_eq!(
        fixture.operator.look(id, &["desired", "generation", "params"]).await?,
        r#"present 1 {"size": "small"}"#
    );
    Ok(())
}

async fn request_shutdown(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let stranger = fixture.database.sign_up().await?;
    let ask = "select (r.desktop).id, (r.desktop).status::text, r.changed from public.request_shutdown($1, $2) r";
    let request = async |caller, id: Uuid| -> Result<Option<bool>, tokio_postgres::Error> {
        let rows = fixture.database.request(caller, ask, &[&id, &"enough for today"]).await?;
        Ok(rows.first().map(|row| {
            assert_eq!(row.get::<_, Uuid>(0), id);
            row.get(2)
        }))
    };

    let id = fixture.insert_running().await?;
    assert_eq!(code(request(Caller::Anon, id).await), "42501");
    assert_eq!(request(Caller::User(stranger), id).await?, None, "a stranger's call finds nothing");
    assert_eq!(request(Caller::User(stranger), Uuid::new_v4()).await?, None, "as if it did not exist");
    assert_eq!(fixture.row(id).await?.brief(), "running");

    assert_eq!(request(Caller::User(fixture.user), id).await?, Some(true));
    assert_eq!(request(Caller::User(fixture.user), id).await?, Some(false));
    assert_eq!(request(Caller::Service, id).await?, Some(false));
    let seen = fixture.row(id).await?;
    assert_eq!((seen.brief().as_str(), seen.requested), ("running requested", true), "it is stopping");
    assert_eq!(seen.message.as_deref(), Some("enough for today"));
    assert_eq!(fixture.operator.look(id, &["desired", "reason", "generation"]).await?, "absent requested 2");

    let other = fixture.insert().await?;
    assert_eq!(request(Caller::Service, other).await?, Some(true));
    // By hand: the reason may be left out, and an ended desktop stays as it is.
    let third = fixture.insert().await?;
    let changed: bool =
        fixture.app.query_one("select changed from public.request_shutdown($1)", &[&third]).await?.get(0);
    assert!(changed);
    fixture.operator.report(Entry::ended(third, "terminated", "requested", "")).await?;
    let before = fixture.row(third).await?;
    assert_eq!(request(Caller::Service, third).await?, Some(false));
    assert_eq!(fixture.row(third).await?, before);

    // The privileged half, called directly by a browser user, still knows its caller.
    let own = fixture.insert().await?;
    let half = "select cyberdesk.request_shutdown($1, null)";
    let rows = fixture.database.request(Caller::User(stranger), half, &[&own]).await?;
    assert!(!rows[0].get::<_, bool>(0));
    assert_eq!(fixture.row(own).await?.brief(), "pending");
    Ok(())
}

async fn no_extension(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let extend =
        "update public.cyberdesk_instances set timeout_at = now() + interval '48 hours' where id = $1 returning id";
    let id = fixture.insert().await?;
    assert_eq!(fixture.execute(extend, id).await?, 1);
    assert_eq!(fixture.operator.look(id, &["generation", "desired"]).await?, "2 present", "a new deadline is news");
    fixture.execute("select public.request_shutdown($1)", id).await?;
    let deadline = fixture.operator.look(id, &["expires_at"]).await?;
    assert_eq!(fixture.execute(extend, id).await?, 1, "the statement finds its row");
    assert_eq!(fixture.operator.look(id, &["generation", "desired"]).await?, "3 absent");
    assert_eq!(fixture.operator.look(id, &["expires_at"]).await?, deadline);
    // The latch holds even where the private row has lost its cause.
    fixture.execute("update cyberdesk.desktop set shutdown_requested_at = null where id = $1", id).await?;
    fixture.execute(extend, id).await?;
    assert_eq!(fixture.operator.look(id, &["desired"]).await?, "absent");
    // What is not wanted differently is no news.
    let quiet = fixture.insert_running().await?;
    fixture
        .execute("update public.cyberdesk_instances set stream_url = 'https://x.example' where id = $1", quiet)
        .await?;
    assert_eq!(fixture.operator.look(quiet, &["generation"]).await?, "1");
    Ok(())
}

async fn deletes(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let (row, asked, users) =
        (fixture.insert_running().await?, fixture.insert_running().await?, fixture.insert_running().await?);
    fixture.execute("delete from public.cyberdesk_instances where id = $1", row).await?;
    fixture.execute("select public.request_shutdown($1)", asked).await?;
    // GoTrue's role executes the triggers of the cascade on some versions.
    assert_eq!(fixture.database.delete_user(fixture.user).await?, 1);

    let columns = ["desired", "reason", "status", "row_exists", "ended_at", "generation"];
    assert_eq!(fixture.operator.look(row, &columns).await?, "absent row-deleted running false - 2");
    assert_eq!(fixture.operator.look(users, &columns).await?, "absent row-deleted running false - 2");
    assert_eq!(fixture.operator.look(asked, &columns).await?, "absent requested running false - 2");
    assert_eq!(fixture.operator.dirty().await?.len(), 3);

    // The tombstone stays until the cluster is clean, and then says so.
    for answer in ["written", "same"] {
        assert_eq!(fixture.operator.report(Entry::ended(row, "terminated", "row-deleted", "")).await?, answer);
    }
    assert_eq!(fixture.operator.live().await?.len(), 2);
    assert_eq!(fixture.operator.look(row, &["desired", "reason", "status"]).await?, "absent row-deleted terminated");
    Ok(())
}

async fn truncate(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert().await?;
    let statement = fixture.app.prepare_typed("truncate public.cyberdesk_instances", &[] as &[Type]).await?;
    assert_eq!(code(fixture.app.execute(&statement, &[]).await), "0A000");
    let admin = fixture.database.connect_as(cyberdesk_testbed::postgres::SUPERUSER).await?;
    assert_eq!(code(admin.execute("truncate auth.users cascade", &[]).await), "0A000");
    assert_eq!(fixture.row(id).await?.brief(), "pending");
    Ok(())
}
