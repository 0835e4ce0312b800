//! What the operator's functions answer, whatever the app does meanwhile, and that only the leader is heard.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};
use cyberdesk_testbed::{Postgres, postgres::SUPERUSER};
use uuid::Uuid;

use super::Story;
use super::fixture::{Entry, Fixture, Operator, code};

pub(super) const STORIES: &[Story] = &[
    ("a report is answered per entry, and a replay changes nothing", |p| Box::pin(answers(p))),
    ("a row that the app holds is busy, and holds up no other", |p| Box::pin(busy(p))),
    ("the first cause of an end stands, with its words", |p| Box::pin(first_cause(p))),
    ("a report makes nothing live again, and reports no completed", |p| Box::pin(no_way_back(p))),
    ("a note on a living desktop comes and goes", |p| Box::pin(notes(p))),
    ("a report that contradicts itself is refused whole", |p| Box::pin(malformed(p))),
    ("each visible change is one update of the row", |p| Box::pin(one_update(p))),
    ("only the holder of the greatest epoch writes", |p| Box::pin(fence(p))),
    ("a takeover waits for the write in flight", |p| Box::pin(takeover(p))),
    ("the row's lock decides between the deadline and an extension", |p| Box::pin(expiry(p))),
    ("the app is never the victim of our writing", |p| Box::pin(no_victims(p))),
    ("looking for work and writing back scan no table", |p| Box::pin(indexes(p))),
    ("what went round the triggers is repaired", |p| Box::pin(reconcile(p))),
    ("a lost table is not taken for the app's wish", |p| Box::pin(lost_table(p))),
    ("a database knows itself, and a copy of it differs", |p| Box::pin(identity(p))),
];

async fn answers(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let operator = &fixture.operator;
    let (a, b, unknown) = (fixture.insert().await?, fixture.insert().await?, Uuid::new_v4());
    assert_eq!(operator.dirty().await?, [a, b], "oldest first");

    let batch = [
        Entry { stream_url: Some("https://a.example"), ..Entry::running(a) },
        Entry { generation: 2, ..Entry::running(b) },
        Entry::running(unknown),
    ];
    assert_eq!(operator.report_all(&batch).await?, ["written", "ahead", "missing"]);
    assert_eq!(operator.report_all(&batch).await?, ["same", "ahead", "missing"]);
    let seen = fixture.row(a).await?;
    assert_eq!((seen.status.as_str(), seen.stream_url.as_deref()), ("running", Some("https://a.example")));
    assert_eq!(fixture.row(b).await?.brief(), "pending", "an entry from a future that we never had is not believed");
    assert_eq!(operator.dirty().await?, [b]);

    // News since: the report tells what was seen, the newer generation stays work.
    fixture.execute("select public.request_shutdown($1)", a).await?;
    assert_eq!(operator.report(Entry { status: None, ..Entry::running(a) }).await?, "same");
    assert_eq!(operator.dirty().await?, [b, a]);
    assert_eq!(operator.report(Entry { generation: 2, ..Entry::of(a) }).await?, "written");
    assert_eq!(operator.report(Entry { generation: 1, ..Entry::of(a) }).await?, "same", "never backwards");
    assert_eq!(operator.look(a, &["observed_generation"]).await?, "2");

    // The VM is recorded once.
    assert_eq!(operator.report(Entry { vm_uid: Some("vm-2"), ..Entry::of(a) }).await?, "same");
    assert_eq!(operator.look(a, &["vm_uid"]).await?, "vm-1");

    // An end counts as having seen all, whatever generation it was decided at.
    fixture.execute("select public.request_shutdown($1)", b).await?;
    for answer in ["written", "same"] {
        assert_eq!(operator.report(Entry::ended(b, "terminated", "requested", "")).await?, answer);
    }
    assert_eq!(operator.look(b, &["generation", "observed_generation"]).await?, "2 2");
    assert_eq!(fixture.row(b).await?.brief(), "terminated requested.");
    assert_eq!(operator.live().await?, [a]);
    assert_eq!(operator.report_all(&[]).await?, Vec::<String>::new());
    Ok(())
}

async fn busy(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let ids = [fixture.insert().await?, fixture.insert().await?, fixture.insert().await?];
    let mut app = fixture.database.connect_as("postgres").await?;
    let holding = app.transaction().await?;
    holding.execute("update public.cyberdesk_instances set updated_at = now() where id = $1", &[&ids[0]]).await?;
    holding.execute("delete from public.cyberdesk_instances where id = $1", &[&ids[1]]).await?;

    let batch = ids.map(Entry::running);
    assert_eq!(fixture.operator.report_all(&batch).await?, ["busy", "busy", "written"]);
    assert_eq!(fixture.operator.expire(&ids).await?, ["busy", "busy", "extended"]);
    holding.commit().await?;
    assert_eq!(fixture.operator.report_all(&batch).await?, ["written", "written", "same"]);
    assert_eq!(fixture.operator.look(ids[1], &["vm_uid", "desired", "row_exists"]).await?, "vm-1 absent false");
    Ok(())
}

async fn first_cause(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let operator = &fixture.operator;

    // The guest crashes: row and cause together.
    let id = fixture.insert_running().await?;
    operator.report(Entry::ended(id, "error", "guest-crashed", "the guest panicked")).await?;
    let seen = fixture.row(id).await?;
    assert_eq!(
        (seen.brief().as_str(), seen.message.as_deref(), seen.requested),
        ("error guest-crashed.", Some("the guest panicked"), false)
    );
    operator.report(Entry::ended(id, "terminated", "vm-deleted", "later")).await?;
    assert_eq!(fixture.row(id).await?, seen);

    // A shutdown was asked for, then the guest crashes on its way down.
    let id = fixture.insert_running().await?;
    fixture.execute("select public.request_shutdown($1, 'bye')", id).await?;
    operator.report(Entry { generation: 2, ..Entry::ended(id, "terminated", "guest-crashed", "boom") }).await?;
    let seen = fixture.row(id).await?;
    assert_eq!((seen.brief().as_str(), seen.message.as_deref()), ("terminated requested.", Some("bye")));

    // The app called it completed; the operator adds only that it is over.
    let id = fixture.insert_running().await?;
    fixture.execute("update public.cyberdesk_instances set status = 'completed' where id = $1", id).await?;
    operator.report(Entry { generation: 2, ..Entry::ended(id, "terminated", "requested", "VM deleted") }).await?;
    let seen = fixture.row(id).await?;
    assert_eq!(
        (seen.brief().as_str(), seen.message.as_deref()),
        ("completed requested.", Some("VM deleted")),
        "words that were missing are filled in"
    );

    // An end without a status, or with one that is none, is `terminated`.
    for status in [None, Some("running")] {
        let id = fixture.insert_running().await?;
        operator.report(Entry { status, ..Entry::ended(id, "terminated", "guest-shutdown", "") }).await?;
        assert_eq!(fixture.row(id).await?.brief(), "terminated guest-shutdown.");
    }
    Ok(())
}

async fn no_way_back(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let operator = &fixture.operator;
    let late = |id| Entry { stream_url: Some("https://late.example"), ..Entry::running(id) };

    let running = fixture.insert_running().await?;
    assert_eq!(operator.report(Entry { status: Some("pending"), ..Entry::of(running) }).await?, "same");

    let stopping = fixture.insert().await?;
    fixture.execute("select public.request_shutdown($1)", stopping).await?;
    let before = fixture.row(stopping).await?;
    operator.report(late(stopping)).await?;
    assert_eq!(fixture.row(stopping).await?, before, "running after a shutdown request is no news");

    let terminal = fixture.insert().await?;
    fixture.execute("update public.cyberdesk_instances set status = 'error' where id = $1", terminal).await?;
    let before = fixture.row(terminal).await?;
    operator.report(late(terminal)).await?;
    assert_eq!(fixture.row(terminal).await?, before);

    operator.report(Entry { generation: 2, ..Entry::ended(terminal, "terminated", "requested", "") }).await?;
    assert_eq!(fixture.row(terminal).await?.brief(), "error requested.", "a terminal status is the app's");
    assert_eq!(operator.report(late(terminal)).await?, "same");

    // A terminal status ahead of the end latches the desktop.
    let id = fixture.insert_running().await?;
    operator
        .report(Entry { status: Some("error"), reason: Some("bad-template"), message: Some("line 3"), ..Entry::of(id) })
        .await?;
    assert_eq!(fixture.row(id).await?.brief(), "error bad-template");
    assert_eq!(
        operator.look(id, &["desired", "generation", "ended_at"]).await?,
        "absent 1 -",
        "a report raises no generation"
    );
    let completed = operator.report_all(&[Entry { status: Some("completed"), ..Entry::of(running) }]).await;
    assert_eq!(code(completed), "22023");
    Ok(())
}

async fn notes(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert().await?;
    let note = |message| Entry { message, reason: Some("refused"), ..Entry::of(id) };
    for (message, shown) in [
        (Some("waiting for a node"), Some("waiting for a node")),
        (None, Some("waiting for a node")),
        (Some("pulling the image"), Some("pulling the image")),
        (Some(""), None),
        (Some("waiting again"), Some("waiting again")),
    ] {
        fixture.operator.report(note(message)).await?;
        let seen = fixture.row(id).await?;
        assert_eq!((seen.message.as_deref(), seen.reason), (shown, None), "{message:?}: the living have no reason");
    }
    fixture.execute("update public.cyberdesk_instances set status = 'terminated' where id = $1", id).await?;
    assert_eq!(fixture.row(id).await?.message, None, "a note does not outlive its cause");
    Ok(())
}

async fn malformed(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert().await?;
    let operator = &fixture.operator;
    assert_eq!(
        code(operator.report_all(&[Entry::running(id), Entry::of(id)]).await),
        "22023",
        "two entries for one id"
    );
    let short = operator
        .client
        .query(
            "select * from cyberdesk.report($1, $2, array[$3::uuid], '{1}', '{}', '{running}', '{null}', '{null}', '{null}', '{false}')",
            &[&operator.epoch, &operator.token, &id],
        )
        .await;
    assert_eq!(code(short), "22023", "lists of different length");
    assert_eq!(fixture.row(id).await?.brief(), "pending");
    Ok(())
}

async fn one_update(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    fixture
        .app
        .batch_execute(
            "create table public.story_updates (id uuid);
             create function public.count_update() returns trigger language plpgsql security definer set search_path = '' as
               $$ begin insert into public.story_updates values (new.id); return null; end $$;
             create trigger count_update after update on public.cyberdesk_instances for each row execute function public.count_update();",
        )
        .await?;
    let id = fixture.insert().await?;
    let operator = &fixture.operator;
    let updates = async || -> Result<i64> {
        Ok(fixture.app.query_one("select count(*) from public.story_updates where id = $1", &[&id]).await?.get(0))
    };
    operator.report(Entry::running(id)).await?;
    assert_eq!(updates().await?, 1);
    operator.report(Entry::running(id)).await?;
    operator.report(Entry { vm_uid: Some("vm-1"), ..Entry::of(id) }).await?;
    assert_eq!(updates().await?, 1, "what does not show is not written there");
    fixture.execute("select public.request_shutdown($1)", id).await?;
    assert_eq!(updates().await?, 2);
    operator.report(Entry { generation: 2, ..Entry::of(id) }).await?;
    assert_eq!(updates().await?, 2);
    operator.report(Entry { generation: 2, ..Entry::ended(id, "terminated", "requested", "gone") }).await?;
    assert_eq!(updates().await?, 3, "status, message and end together");
    assert_eq!(operator.reconcile().await?, 0);
    assert_eq!(updates().await?, 3);
    Ok(())
}

async fn fence(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert().await?;
    let operator = &fixture.operator;
    let acquire = async |epoch: i64, token: Uuid| -> Result<bool> {
        Ok(operator.client.query_one("select cyberdesk.acquire($1, $2, 'x')", &[&epoch, &token]).await?.get(0))
    };
    assert!(acquire(1, operator.token).await?, "again, with the same pair");
    assert!(!acquire(1, Uuid::new_v4()).await?, "the same epoch of a copy");
    assert!(!acquire(0, operator.token).await?);

    let successor = Operator::lead(&fixture.database, 5).await?;
    assert!(!acquire(4, Uuid::new_v4()).await?, "a resumed leader cannot depose its successor");
    assert_eq!(code(operator.report_all(&[Entry::running(id)]).await), "CD001");
    assert_eq!(code(operator.expire(&[id]).await), "CD001");
    assert_eq!(code(operator.reconcile().await), "CD001");
    assert_eq!(fixture.row(id).await?.brief(), "pending");

    let copied =
        Operator { client: fixture.database.connect_as("cyberdesk_daemon").await?, epoch: 5, token: Uuid::new_v4() };
    assert_eq!(code(copied.report_all(&[Entry::running(id)]).await), "CD001", "the epoch without its token");
    assert_eq!(successor.report(Entry::running(id)).await?, "written");
    let epoch: i64 = operator.client.query_one("select cyberdesk.fence_epoch()", &[]).await?.get(0);
    assert_eq!(epoch, 5);
    Ok(())
}

async fn takeover(postgres: &Postgres) -> Result<()> {
    let mut fixture = Fixture::new(postgres).await?;
    let (epoch, token) = (fixture.operator.epoch, fixture.operator.token);
    let in_flight = fixture.operator.client.transaction().await?;
    in_flight.query("select cyberdesk.expire($1, $2, '{}')", &[&epoch, &token]).await?;
    let other = fixture.database.connect_as("cyberdesk_daemon").await?;
    let take = "select cyberdesk.acquire(2, gen_random_uuid(), 'next')";
    assert_eq!(code(other.execute(take, &[]).await), "55P03", "it waits, as long as its lock_timeout allows");
    in_flight.commit().await?;
    let taken: bool = other.query_one(take, &[]).await?.get(0);
    assert!(taken);
    Ok(())
}

async fn expiry(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let operator = &fixture.operator;
    let extend = "update public.cyberdesk_instances set timeout_at = now() + interval '1 hour' where id = $1";
    let due = async || -> Result<Uuid> {
        let id = fixture.insert_running().await?;
        fixture
            .execute("update public.cyberdesk_instances set timeout_at = now() - interval '1 second' where id = $1", id)
            .await?;
        Ok(id)
    };

    // The extension is first.
    let (id, unknown) = (due().await?, Uuid::new_v4());
    let mut app = fixture.database.connect_as("postgres").await?;
    let extending = app.transaction().await?;
    extending.execute(extend, &[&id]).await?;
    assert_eq!(operator.expire(&[id, unknown]).await?, ["busy", "missing"]);
    extending.commit().await?;
    assert_eq!(operator.expire(&[id]).await?, ["extended"]);
    assert_eq!(fixture.row(id).await?.brief(), "running");

    // The deadline is first.
    let id = due().await?;
    assert_eq!(operator.expire(&[id]).await?, ["expired"]);
    assert_eq!(fixture.execute(extend, id).await?, 1, "the app's statement finds its row");
    assert_eq!(operator.expire(&[id]).await?, ["same"]);
    let seen = fixture.row(id).await?;
    assert_eq!((seen.brief().as_str(), seen.requested), ("running timeout", true));
    assert_eq!(operator.look(id, &["desired", "reason", "generation"]).await?, "absent timeout 3");
    operator.report(Entry { generation: 3, ..Entry::ended(id, "terminated", "timeout", "") }).await?;
    assert_eq!(fixture.row(id).await?.brief(), "terminated timeout.");
    assert_eq!(operator.expire(&[id]).await?, ["same"]);

    // While Postgres was away the operator ended it itself; the end beats an extension that came later.
    let id = due().await?;
    fixture.execute(extend, id).await?;
    operator.report(Entry { generation: 2, ..Entry::ended(id, "terminated", "timeout", "") }).await?;
    assert_eq!(fixture.row(id).await?.brief(), "terminated timeout.");
    Ok(())
}

/// The app updates all rows in one statement and in any order, GoTrue deletes users with many desktops, and the
/// operator reports on all of them all the while. Nobody gets an error.
async fn no_victims(postgres: &Postgres) -> Result<()> {
    const ROUNDS: usize = 40;
    let fixture = Fixture::new(postgres).await?;
    let many = "insert into public.cyberdesk_instances (user_id) select $1 from generate_series(1, 30) returning id";
    let mut ids = Vec::new();
    let mut leavers = Vec::new();
    for leaver in 0..=10 {
        let user = if leaver == 0 { fixture.user } else { fixture.database.sign_up().await? };
        let rows = fixture.app.query(many, &[&user]).await?;
        ids.extend(rows.iter().map(|row| row.get::<_, Uuid>(0)));
        if leaver > 0 {
            leavers.push(user);
        }
    }
    let done = Arc::new(AtomicBool::new(false));
    let reporting = async {
        let mut written = 0;
        let mut round = 0;
        while !done.load(Ordering::Relaxed) {
            round += 1;
            let note = if round % 2 == 0 { "even" } else { "odd" };
            let batch: Vec<Entry> =
                ids.iter().rev().map(|id| Entry { message: Some(note), ..Entry::running(*id) }).collect();
            let answers = fixture.operator.report_all(&batch).await.context("report")?;
            written += answers.iter().filter(|answer| *answer == "written").count();
        }
        anyhow::Ok(written)
    };
    let updating = async {
        for round in 0..ROUNDS {
            let order = if round % 2 == 0 { "asc" } else { "desc" };
            let update = format!(
                "with chosen as materialized (select id from public.cyberdesk_instances where user_id = $1 order by id {order} for update)
                 update public.cyberdesk_instances c set stream_url = 'https://' || c.id from chosen where c.id = chosen.id"
            );
            fixture.app.execute(&update, &[&fixture.user]).await.context("the app's bulk update")?;
        }
        anyhow::Ok(())
    };
    let leaving = async {
        for user in &leavers {
            fixture.database.delete_user(*user).await?;
        }
        anyhow::Ok(())
    };
    let app = async {
        let both = tokio::try_join!(updating, leaving);
        done.store(true, Ordering::Relaxed);
        both
    };
    let (written, app) = tokio::join!(reporting, app);
    app?;
    assert!(written? > 0, "the operator got through too");
    Ok(())
}

async fn indexes(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    fixture
        .app
        .execute(
            "insert into public.cyberdesk_instances (user_id, status) select $1, 'terminated' from generate_series(1, 20000)",
            &[&fixture.user],
        )
        .await?;
    let ids = [fixture.insert().await?, fixture.insert().await?, fixture.insert().await?];
    fixture.app.batch_execute("analyze public.cyberdesk_instances; analyze cyberdesk.desktop").await?;
    let scans = async || -> Result<i64> {
        let row = fixture
            .app
            .query_one("select sum(seq_scan)::bigint from pg_stat_user_tables where relname in ('cyberdesk_instances', 'desktop')", &[])
            .await?;
        Ok(row.get(0))
    };
    let operator = &fixture.operator;
    for client in [&fixture.app, &operator.client] {
        client.execute("select pg_stat_force_next_flush()", &[]).await?;
    }
    let before = scans().await?;
    assert_eq!(operator.dirty().await?.len(), 3);
    assert_eq!(operator.live().await?.len(), 3);
    operator.look(ids[0], &["status"]).await?;
    operator.report_all(&ids.map(Entry::running)).await?;
    operator.expire(&ids).await?;
    operator.reconcile().await?;
    operator.client.execute("select pg_stat_force_next_flush()", &[]).await?;
    assert_eq!(scans().await? - before, 0, "20,000 rows that are over cost nothing");
    Ok(())
}

async fn reconcile(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let operator = &fixture.operator;
    let (gone, revived, stopped, moved, untouched) = (
        fixture.insert_running().await?,
        fixture.insert_running().await?,
        fixture.insert_running().await?,
        fixture.insert_running().await?,
        fixture.insert_running().await?,
    );
    operator.report(Entry::ended(revived, "terminated", "guest-shutdown", "")).await?;
    let round = fixture.database.connect_as(SUPERUSER).await?;
    round.batch_execute("set session_replication_role = replica").await?;
    round.execute("delete from public.cyberdesk_instances where id = $1", &[&gone]).await?;
    round
        .execute(
            "update public.cyberdesk_instances set status = 'running', ended_at = null, reason = null where id = $1",
            &[&revived],
        )
        .await?;
    round.execute("update public.cyberdesk_instances set status = 'terminated' where id = $1", &[&stopped]).await?;
    round.execute("update public.cyberdesk_instances set timeout_at = 'infinity' where id = $1", &[&moved]).await?;
    let made: Uuid = round
        .query_one("insert into public.cyberdesk_instances (user_id) values ($1) returning id", &[&fixture.user])
        .await?
        .get(0);

    assert_eq!(operator.reconcile().await?, 5);
    assert_eq!(operator.look(gone, &["desired", "reason", "row_exists"]).await?, "absent row-deleted false");
    assert_eq!(fixture.row(revived).await?.brief(), "terminated guest-shutdown.", "a restored row is over again");
    assert_eq!(operator.look(stopped, &["desired", "reason"]).await?, "absent requested");
    assert_eq!(operator.look(moved, &["desired", "expires_at"]).await?, "present 9000-01-01 00:00:00+00");
    assert_eq!(operator.look(made, &["desired", "generation", "observed_generation"]).await?, "present 1 0");
    assert_eq!(operator.look(untouched, &["desired", "generation"]).await?, "present 1");
    assert_eq!(operator.reconcile().await?, 0);
    Ok(())
}

async fn lost_table(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    for _ in 0..15 {
        fixture.insert_running().await?;
    }
    let round = fixture.database.connect_as(SUPERUSER).await?;
    round.batch_execute("set session_replication_role = replica; truncate public.cyberdesk_instances").await?;
    assert_eq!(fixture.operator.reconcile().await?, 0);
    let wanted: i64 = fixture
        .app
        .query_one("select count(*) from cyberdesk.desktop_state where desired = 'present' and not row_exists", &[])
        .await?
        .get(0);
    assert_eq!(wanted, 15, "a person must say that this was meant");
    Ok(())
}

async fn identity(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let sibling = postgres.database().await?;
    let identity = "select database_id, system_identifier, database_oid, epoch from cyberdesk.identity()";
    let ours = fixture.operator.client.query_one(identity, &[]).await?;
    // Both were copied from one template.
    let copy = sibling.connect_as("cyberdesk_daemon").await?.query_one(identity, &[]).await?;
    assert_eq!(ours.get::<_, Uuid>(0), copy.get::<_, Uuid>(0));
    assert_eq!(ours.get::<_, &str>(1), copy.get::<_, &str>(1));
    assert_ne!(ours.get::<_, i64>(2), copy.get::<_, i64>(2), "only the oid tells a copy within one server");
    assert_eq!((ours.get::<_, i64>(3), copy.get::<_, i64>(3)), (1, 0));
    Ok(())
}
