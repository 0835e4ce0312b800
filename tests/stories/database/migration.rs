//! How `migrate` meets a database: empty, the app's, one that is being written to, one that a person has changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};
use cyberdesk_operator::database::migrate::{Error, MIGRATIONS, Report, migrate};
use cyberdesk_testbed::{Database, Postgres, postgres::SUPERUSER};
use tokio_postgres::Client;
use uuid::Uuid;

use super::Story;
use super::fixture::{Entry, Fixture, code, connect};

pub(super) const STORIES: &[Story] = &[
    ("migrating twice changes nothing", |p| Box::pin(twice(p))),
    ("two migrations at once take turns", |p| Box::pin(at_once(p))),
    ("a plain PostgreSQL gets what Supabase would have brought", |p| Box::pin(plain(p))),
    ("the table that the app's ORM made is taken over, its live desktops adopted", |p| Box::pin(takeover(p))),
    ("the app goes on writing while its table is taken over", |p| Box::pin(live_takeover(p))),
    ("a table that is not as needed is refused before anything is touched", |p| Box::pin(refused(p))),
    ("a foreign function of our name is refused", |p| Box::pin(foreign_function(p))),
    ("Realtime carries the table however the publication was made", |p| Box::pin(publication(p))),
    ("a newer release's migrations do no harm", |p| Box::pin(newer(p))),
    ("the operator's role gets its limits and its password", |p| Box::pin(role(p))),
];

async fn run(database: &Database) -> Result<Report, Error> {
    let mut client = connect(&database.url("postgres")).await.expect("the administrator is let in");
    migrate(&mut client, None).await
}

/// The app's schema, as its ORM made it: no row-level security, rows of years.
async fn orm_table(app: &Client, rows: i32) -> Result<Uuid> {
    let user = Uuid::new_v4();
    app.batch_execute(&format!(
        r#"create type "public"."instance_status" as enum('pending', 'running', 'completed', 'error', 'terminated');
           create table "cyberdesk_instances" (
             "id" uuid primary key default gen_random_uuid() not null,
             "user_id" uuid not null,
             "created_at" timestamp default now(),
             "updated_at" timestamp,
             "status" "instance_status" default 'pending' not null,
             "timeout_at" timestamp default now() + interval '24 hours' not null,
             "stream_url" varchar(1024)
           );
           alter table "cyberdesk_instances" add constraint "cyberdesk_instances_user_id_users_id_fk"
             foreign key ("user_id") references "auth"."users"("id") on delete cascade on update no action;
           insert into auth.users (id) values ('{user}');
           insert into cyberdesk_instances (user_id, status)
             select '{user}', (array['completed', 'error', 'terminated'])[1 + n % 3]::instance_status from generate_series(1, {rows}) n;
           insert into cyberdesk_instances (user_id, status, timeout_at) values
             ('{user}', 'pending', now() + interval '1 hour'), ('{user}', 'running', now() + interval '1 hour'),
             ('{user}', 'running', now() - interval '1 year'), ('{user}', 'running', 'infinity');"#
    ))
    .await
    .context("make the app's table")?;
    Ok(user)
}

async fn twice(postgres: &Postgres) -> Result<()> {
    let database = postgres.supabase_database().await?;
    let first = run(&database).await?;
    let names: Vec<String> = MIGRATIONS.iter().map(|(version, name, _)| format!("{version}_{name}")).collect();
    assert_eq!(first, Report { applied: names, adopted_late: 0 });
    assert_eq!(run(&database).await?, Report::default());

    // Every object says what it is for.
    let app = database.connect_as("postgres").await?;
    let silent = app
        .query(
            "select c.oid::regclass::text from pg_class c
              where c.relnamespace = 'cyberdesk'::regnamespace and c.relkind in ('r', 'v') and c.relname <> 'refinery_schema_history'
                and obj_description(c.oid, 'pg_class') is null
             union all
             select a.attrelid::regclass || '.' || a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid
              where (c.relnamespace = 'cyberdesk'::regnamespace or c.relname = 'cyberdesk_instances') and c.relkind = 'r'
                and c.relname <> 'refinery_schema_history' and a.attnum > 0 and not a.attisdropped
                and col_description(a.attrelid, a.attnum) is null
             union all
             select p.oid::regprocedure::text from pg_proc p
              where (p.pronamespace = 'cyberdesk'::regnamespace or p.proname = 'request_shutdown')
                and obj_description(p.oid, 'pg_proc') is null",
            &[],
        )
        .await?;
    let silent: Vec<String> = silent.iter().map(|row| row.get(0)).collect();
    assert_eq!(silent, Vec::<String>::new(), "every table, column and function has its comment");
    let exposed: i64 = app
        .query_one(
            "select count(*) from pg_class where relname like 'refinery%' and relnamespace = 'public'::regnamespace",
            &[],
        )
        .await?
        .get(0);
    assert_eq!(exposed, 0, "the history is not shown to browsers");
    Ok(())
}

async fn at_once(postgres: &Postgres) -> Result<()> {
    let database = postgres.supabase_database().await?;
    let reports = tokio::try_join!(run(&database), run(&database), run(&database))?;
    let applied = reports.0.applied.len() + reports.1.applied.len() + reports.2.applied.len();
    assert_eq!(applied, MIGRATIONS.len(), "each was applied by one of them");
    Ok(())
}

async fn plain(postgres: &Postgres) -> Result<()> {
    let database = postgres.plain_database().await?;
    run(&database).await?;
    assert_eq!(run(&database).await?, Report::default());
    let app = database.connect_as("postgres").await?;
    let user: Uuid = app.query_one("insert into auth.users default values returning id", &[]).await?.get(0);
    let id: Uuid =
        app.query_one("insert into cyberdesk_instances (user_id) values ($1) returning id", &[&user]).await?.get(0);
    let changed: bool = app.query_one("select changed from request_shutdown($1)", &[&id]).await?.get(0);
    assert!(changed);
    app.execute("delete from auth.users", &[]).await?;
    let daemon = database.connect_as("cyberdesk_daemon").await?;
    let live: i64 = daemon.query_one("select count(*) from cyberdesk.live_desktops()", &[]).await?.get(0);
    assert_eq!(live, 1, "its tombstone");
    Ok(())
}

async fn takeover(postgres: &Postgres) -> Result<()> {
    let database = postgres.supabase_database().await?;
    let app = database.connect_as("postgres").await?;
    orm_table(&app, 3000).await?;
    let before: i64 =
        app.query_one("select sum(hashtext(c::text))::bigint from cyberdesk_instances c", &[]).await?.get(0);
    run(&database).await?;

    let after: i64 = app
        .query_one(
            "select sum(hashtext((id, user_id, created_at, updated_at, status, timeout_at, stream_url)::text))::bigint from cyberdesk_instances",
            &[],
        )
        .await?
        .get(0);
    assert_eq!(before, after, "the app's columns are as they were");
    let unfinished: i64 = app
        .query_one(
            "select count(*) from cyberdesk_instances where (ended_at is null) <> (status in ('pending', 'running'))",
            &[],
        )
        .await?
        .get(0);
    assert_eq!(unfinished, 0, "what was terminal is over, the rest is not");

    let fixture = Fixture::on(database).await?;
    assert_eq!(fixture.operator.dirty().await?.len(), 4, "the live ones are work");
    assert_eq!(fixture.operator.live().await?.len(), 4);
    assert_eq!(
        fixture.operator.reconcile().await?,
        1,
        "the endless deadline is brought within reach, where its owner sees it"
    );
    assert_eq!(fixture.operator.reconcile().await?, 0);

    // An old row obeys from now on: terminal for ever, its id used.
    let old: Uuid =
        app.query_one("select id from cyberdesk_instances where status = 'error' limit 1", &[]).await?.get(0);
    fixture.execute("update cyberdesk_instances set status = 'running' where id = $1", old).await?;
    assert_eq!(fixture.row(old).await?.brief(), "error.");
    fixture.execute("delete from cyberdesk_instances where id = $1", old).await?;
    let again =
        app.execute("insert into cyberdesk_instances (id, user_id) values ($1, $2)", &[&old, &fixture.user]).await;
    assert_eq!(code(again), "23505");
    let live: Uuid = app.query_one("select id from cyberdesk_instances where status = 'pending'", &[]).await?.get(0);
    assert_eq!(fixture.operator.report(Entry::running(live)).await?, "written");
    Ok(())
}

async fn live_takeover(postgres: &Postgres) -> Result<()> {
    let database = postgres.supabase_database().await?;
    let app = database.connect_as("postgres").await?;
    let user = orm_table(&app, 20_000).await?;
    let done = Arc::new(AtomicBool::new(false));
    let writing = |order: &'static str| {
        let (done, database) = (Arc::clone(&done), &database);
        async move {
            let app = database.connect_as("postgres").await?;
            let mut round = 0;
            while !done.load(Ordering::Relaxed) {
                round += 1;
                let id: Uuid = app
                    .query_one("insert into cyberdesk_instances (user_id) values ($1) returning id", &[&user])
                    .await
                    .context("insert")?
                    .get(0);
                app.execute("update cyberdesk_instances set status = 'running' where id = $1", &[&id])
                    .await
                    .context("ready")?;
                app.execute(
                    &format!(
                        "update cyberdesk_instances c set stream_url = 'https://x.example/' || $1::int from
                           (select id from cyberdesk_instances where user_id = $2 order by created_at {order} limit 5 for update skip locked) w
                          where c.id = w.id"
                    ),
                    &[&round, &user],
                )
                .await
                .context("bulk update")?;
                let end = match round % 3 {
                    0 => "update cyberdesk_instances set status = 'terminated' where id = $1",
                    1 => "delete from cyberdesk_instances where id = $1",
                    _ => continue,
                };
                app.execute(end, &[&id]).await.context(end)?;
            }
            anyhow::Ok(round)
        }
    };
    let migrating = async {
        let report = run(&database).await;
        done.store(true, Ordering::Relaxed);
        report.context("migrate")
    };
    let (report, first, second) = tokio::join!(migrating, writing("asc"), writing("desc"));
    report?;
    assert!(first? > 1 && second? > 1, "the app went on");

    let fixture = Fixture::on(database).await?;
    while fixture.operator.reconcile().await? > 0 {}
    let lost: i64 = fixture
        .app
        .query_one(
            "select count(*) from cyberdesk_instances c full join cyberdesk.desktop d using (id)
              where (c.id is null and d.desired = 'present')
                 or (c.id is not null and (d.id is null
                     or (d.desired = 'present') <> (c.status in ('pending', 'running') and c.shutdown_requested_at is null)
                     or d.ended_at is distinct from c.ended_at))",
            &[],
        )
        .await?
        .get(0);
    assert_eq!(lost, 0, "row and private row agree on every desktop");
    Ok(())
}

async fn refused(postgres: &Postgres) -> Result<()> {
    let database = postgres.supabase_database().await?;
    let app = database.connect_as("postgres").await?;
    orm_table(&app, 10).await?;
    app.batch_execute(
        "alter table cyberdesk_instances alter stream_url type text;
         alter table cyberdesk_instances drop column timeout_at;
         alter table cyberdesk_instances add column reason integer;
         alter type instance_status add value 'paused'",
    )
    .await?;
    let Err(Error::Refused(message)) = run(&database).await else {
        anyhow::bail!("such a table is refused");
    };
    for part in [
        "column stream_url must be character varying(1024), but is text",
        "column timeout_at timestamp without time zone is missing",
        "column reason must be text, but is integer",
        "terminated, paused",
        "Nothing was changed",
    ] {
        assert!(message.contains(part), "{part:?} is in {message:?}");
    }
    let touched: bool = app
        .query_one("select to_regnamespace('cyberdesk') is not null or exists (select from pg_attribute where attname = 'ended_at')", &[])
        .await?
        .get(0);
    assert!(!touched);

    // A column that is lost later is found by the next run.
    let database = postgres.database().await?;
    let app = database.connect_as("postgres").await?;
    app.batch_execute("alter table cyberdesk_instances drop column message cascade").await?;
    let Err(Error::Refused(message)) = run(&database).await else {
        anyhow::bail!("a lost column is refused");
    };
    assert!(message.contains("column message text is missing"), "{message}");
    Ok(())
}

async fn foreign_function(postgres: &Postgres) -> Result<()> {
    let database = postgres.supabase_database().await?;
    let app = database.connect_as("postgres").await?;
    let foreign = "create function public.request_shutdown(machine int) returns int language sql as 'select machine'";
    app.batch_execute(foreign).await?;
    let Err(Error::Refused(message)) = run(&database).await else {
        anyhow::bail!("a foreign function is not replaced");
    };
    assert!(message.contains("public.request_shutdown"), "{message}");
    app.batch_execute("drop function public.request_shutdown(int)").await?;
    let applied = run(&database).await?.applied;
    assert_eq!(
        applied.first().map(String::as_str),
        Some("20261123000600_app_functions"),
        "it goes on where it stopped"
    );
    Ok(())
}

async fn publication(postgres: &Postgres) -> Result<()> {
    for (made, member) in [
        ("", true),
        ("drop publication supabase_realtime", false),
        ("drop publication supabase_realtime; create publication supabase_realtime for all tables", true),
        ("drop publication supabase_realtime; create publication supabase_realtime for tables in schema public", true),
        ("alter publication supabase_realtime owner to supabase_admin", false),
    ] {
        let database = postgres.supabase_database().await?;
        let admin = database.connect_as(SUPERUSER).await?;
        admin.batch_execute(made).await.context(made)?;
        run(&database).await.context(made)?;
        let published: bool = admin
            .query_one("select exists (select from pg_publication_tables where tablename = 'cyberdesk_instances')", &[])
            .await?
            .get(0);
        assert_eq!(published, member, "{made}");
        let bookkeeping: bool = admin
            .query_one("select exists (select from pg_publication_tables where schemaname = 'cyberdesk')", &[])
            .await?
            .get(0);
        assert_eq!(bookkeeping, made.contains("all tables"), "{made}: only who publishes all publishes ours");
        let fixture = Fixture::on(database).await?;
        let id = fixture.insert().await?;
        fixture.execute("delete from cyberdesk_instances where id = $1", id).await.context(made)?;
    }
    Ok(())
}

async fn newer(postgres: &Postgres) -> Result<()> {
    let database = postgres.database().await?;
    let app = database.connect_as("postgres").await?;
    app.batch_execute(
        "insert into cyberdesk.refinery_schema_history values (29990101000000, 'from_the_future', '2026-11-23T00:00:00Z', '1')",
    )
    .await?;
    assert_eq!(run(&database).await?, Report::default());
    Ok(())
}

async fn role(postgres: &Postgres) -> Result<()> {
    let database = postgres.database().await?;
    let mut client = connect(&database.url("postgres")).await?;
    migrate(&mut client, Some("it's a secret")).await?;
    let admin = database.connect_as(SUPERUSER).await?;
    let hashed: bool = admin
        .query_one("select rolpassword like 'SCRAM-SHA-256$%' from pg_authid where rolname = 'cyberdesk_daemon'", &[])
        .await?
        .get(0);
    assert!(hashed, "the server never saw the password itself");
    let daemon = database.connect_as("cyberdesk_daemon").await?;
    for (setting, value) in [
        ("lock_timeout", "400ms"),
        ("statement_timeout", "10s"),
        ("idle_in_transaction_session_timeout", "15s"),
        ("TimeZone", "UTC"),
        ("search_path", r#""""#),
    ] {
        let row = daemon.query_one("select current_setting($1)", &[&setting]).await?;
        assert_eq!(row.get::<_, &str>(0), value, "{setting}");
    }
    Ok(())
}
