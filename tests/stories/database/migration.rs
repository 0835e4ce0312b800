//! How `migrate` meets a database: empty, the app's, one that is being written to, one that a person has changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use cyberdesk_operator::database::export::export;
use cyberdesk_operator::database::migrate::{Error, MIGRATIONS, Report, migrate};
use cyberdesk_testbed::postgres::{Options, SUPERUSER};
use cyberdesk_testbed::scratch::Scratch;
use cyberdesk_testbed::{Database, Postgres};
use tokio::time::Instant;
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
    ("two processes that migrate at once take turns", |p| Box::pin(processes(p))),
    ("an app that holds its table holds up the migration, and the migration nobody", |p| Box::pin(held_up(p))),
    ("an index that an interrupted run left behind is made anew", |p| Box::pin(interrupted_index(p))),
    ("what Supabase's tools have applied, migrate leaves alone, and the other way round", |p| Box::pin(exported(p))),
    ("on a server that has seen nothing of us, whoever made the role", |p| Box::pin(bare_server(p))),
];

pub(super) async fn run(database: &Database) -> Result<Report, Error> {
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
    orm_table(&app, 100_000).await?;
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

    let invented: i64 = app.query_one("select count(*) from cyberdesk_desktop_history", &[]).await?.get(0);
    assert_eq!(invented, 0, "what was before us has no history");
    let unusable: i64 = app.query_one("select count(*) from pg_index where not indisvalid", &[]).await?.get(0);
    assert_eq!(unusable, 0, "each index is complete");

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

/// The app's sessions fail when they wait for a lock for longer: a migration waits for one a fifth of a second at a time.
const BRIEFLY: &str = "set lock_timeout = '3s'";

async fn live_takeover(postgres: &Postgres) -> Result<()> {
    let database = postgres.supabase_database().await?;
    let app = database.connect_as("postgres").await?;
    let user = orm_table(&app, 100_000).await?;
    let done = Arc::new(AtomicBool::new(false));
    let writing = |order: &'static str| {
        let (done, database) = (Arc::clone(&done), &database);
        async move {
            let app = database.connect_as("postgres").await?;
            app.batch_execute(BRIEFLY).await?;
            let (mut round, mut longest) = (0, Duration::ZERO);
            while !done.load(Ordering::Relaxed) {
                round += 1;
                let began = Instant::now();
                let id: Uuid = app
                    .query_one("insert into cyberdesk_instances (user_id) values ($1) returning id", &[&user])
                    .await
                    .context("insert")?
                    .get(0);
                longest = longest.max(began.elapsed());
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
            anyhow::Ok((round, longest))
        }
    };
    let migrating = async {
        let report = run(&database).await;
        done.store(true, Ordering::Relaxed);
        report.context("migrate")
    };
    let (report, first, second) = tokio::join!(migrating, writing("asc"), writing("desc"));
    report?;
    for (rounds, longest) in [first?, second?] {
        assert!(rounds > 1, "the app went on");
        // On an idle machine it is tens of milliseconds; this one may be busy with other tests.
        println!("the longest insert during the takeover of 100,000 rows took {} ms", longest.as_millis());
    }

    let fixture = Fixture::on(database).await?;
    while fixture.operator.reconcile().await? > 0 {}
    let lost: i64 = fixture
        .app
        .query_one(
            "select count(*) from cyberdesk_instances c full join cyberdesk.desktop d using (id)
              where (c.id is null and d.desired = 'present')
                 or (c.id is not null and d.id is null and c.ended_at is null)
                 or (c.id is not null and d.id is not null and (
                     (d.desired = 'present') <> (c.status in ('pending', 'running') and c.shutdown_requested_at is null)
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

/// The program itself, as people run it. What it says.
async fn process(database: &Database, arguments: &[&str]) -> Result<String> {
    let program = env!("CARGO_BIN_EXE_cyberdesk-operator");
    let mut command = tokio::process::Command::new(program);
    command.arg("migrate").args(arguments).env("DATABASE_URL", database.url("postgres"));
    let output = command.output().await.context("run the program")?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    anyhow::ensure!(output.status.success(), "migrate fails: {}", said(&output.stderr));
    Ok(said(&output.stdout))
}

async fn processes(postgres: &Postgres) -> Result<()> {
    let database = postgres.supabase_database().await?;
    orm_table(&database.connect_as("postgres").await?, 1000).await?;
    let said = tokio::try_join!(process(&database, &[]), process(&database, &[]))?;
    let last =
        MIGRATIONS.last().map(|(version, name, _)| format!("{version}_{name}")).context("there are migrations")?;
    let appliers = [&said.0, &said.1].iter().filter(|said| said.contains(&last)).count();
    assert_eq!(appliers, 1, "{said:?}");
    assert_eq!(run(&database).await?, Report::default());
    Ok(())
}

async fn held_up(postgres: &Postgres) -> Result<()> {
    let database = postgres.supabase_database().await?;
    let user = orm_table(&database.connect_as("postgres").await?, 1000).await?;
    let insert = "insert into public.cyberdesk_instances (user_id) values ($1)";

    // A transaction of the app that does not end, such as one that waits for somebody's answer.
    let holder = database.connect_as("postgres").await?;
    holder.batch_execute("begin").await?;
    holder.execute(insert, &[&user]).await?;
    let report = {
        let (done, waiting) = (AtomicBool::new(false), AtomicBool::new(false));
        let migrating = async {
            let report = run(&database).await;
            done.store(true, Ordering::Relaxed);
            report
        };
        let others = async {
            let (app, watcher) = (database.connect_as("postgres").await?, database.connect_as("postgres").await?);
            let waits = "select exists (select from pg_locks l where not l.granted and l.mode = 'AccessExclusiveLock'
                and l.database = (select oid from pg_database where datname = current_database()))";
            app.batch_execute(BRIEFLY).await?;
            let mut beside = 0;
            while !done.load(Ordering::Relaxed) {
                let waits: bool = watcher.query_one(waits, &[]).await?.get(0);
                app.execute(insert, &[&user]).await.context("insert beside the migration")?;
                if waits {
                    waiting.store(true, Ordering::Relaxed);
                    beside += 1;
                }
                // Held until the migration has given way some times.
                if beside == 3 {
                    holder.batch_execute("commit").await?;
                }
            }
            anyhow::Ok(())
        };
        let (report, passed) = tokio::join!(migrating, others);
        passed?;
        assert!(waiting.load(Ordering::Relaxed), "the migration had to wait");
        report?
    };
    assert_eq!(report.applied.len(), MIGRATIONS.len());
    Ok(())
}

async fn interrupted_index(postgres: &Postgres) -> Result<()> {
    let database = postgres.supabase_database().await?;
    let app = database.connect_as("postgres").await?;
    orm_table(&app, 1000).await?;
    // Each user has many desktops: it fails when it is half made, and stays.
    let failed = app
        .batch_execute(
            "create unique index concurrently cyberdesk_instances_user_created_idx on cyberdesk_instances (user_id)",
        )
        .await;
    assert_eq!(code(failed), "23505");
    run(&database).await?;
    let index: String = app
        .query_one(
            "select pg_get_indexdef(indexrelid) from pg_index where indexrelid = 'cyberdesk_instances_user_created_idx'::regclass and indisvalid",
            &[],
        )
        .await
        .context("the index is there, and usable")?
        .get(0);
    assert!(index.ends_with("(user_id, created_at DESC)"), "{index}");
    Ok(())
}

/// All that a schema is, as text.
async fn fingerprint(database: &Database) -> Result<Vec<String>> {
    let client = database.connect_as("postgres").await?;
    client.batch_execute("set search_path = ''").await?;
    let rows = client
        .query(
            "with ours as (select unnest(array['public', 'cyberdesk'])::regnamespace as oid)
             select concat_ws(' ', 'schema', n.nspname, n.nspacl, obj_description(n.oid, 'pg_namespace')) as line
               from pg_namespace n join ours using (oid)
             union all
             select concat_ws(' ', c.relkind, c.oid::regclass, c.relacl, c.reloptions, c.relrowsecurity, c.relowner::regrole,
                              obj_description(c.oid, 'pg_class'), case c.relkind when 'v' then pg_get_viewdef(c.oid) when 'i' then pg_get_indexdef(c.oid) end)
               from pg_class c join ours on ours.oid = c.relnamespace where c.relkind <> 'c'
             union all
             select concat_ws(' ', a.attrelid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attacl, pg_get_expr(d.adbin, d.adrelid),
                              col_description(a.attrelid, a.attnum))
               from pg_attribute a join pg_class c on c.oid = a.attrelid join ours on ours.oid = c.relnamespace
               left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
              where a.attnum > 0 and c.relkind in ('r', 'v')
             union all
             select concat_ws(' ', pg_get_functiondef(p.oid), p.proacl, p.proowner::regrole, obj_description(p.oid, 'pg_proc'))
               from pg_proc p join ours on ours.oid = p.pronamespace
             union all
             select concat_ws(' ', t.tgrelid::regclass, pg_get_triggerdef(t.oid), obj_description(t.oid, 'pg_trigger'))
               from pg_trigger t join pg_class c on c.oid = t.tgrelid where not t.tgisinternal
             union all
             select concat_ws(' ', k.conrelid::regclass, k.conname, pg_get_constraintdef(k.oid)) from pg_constraint k join ours on ours.oid = k.connamespace
             union all
             select concat_ws(' ', p.tablename, p.policyname, p.permissive, p.roles, p.cmd, p.qual, p.with_check) from pg_policies p
             union all
             select concat_ws(' ', p.pubname, p.tablename) from pg_publication_tables p
             union all
             select concat_ws(' ', h.version, h.name, h.checksum) from cyberdesk.refinery_schema_history h
             order by line",
            &[],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn exported(postgres: &Postgres) -> Result<()> {
    let scratch = Scratch::new()?;
    let folder = scratch.path().join("supabase/migrations");
    let files = export(&folder)?;
    let names: Vec<_> = files.iter().filter_map(|file| file.file_name()?.to_str()?.split_once('_')).collect();
    assert!(
        names.iter().all(|(version, _)| version.len() == 14 && version.bytes().all(|b| b.is_ascii_digit())),
        "{names:?}"
    );
    let push = async |database: &Database| {
        // As Supabase's tools do: one statement after the other, on the project's search path.
        let client = database.connect_as("postgres").await?;
        for file in &files {
            client.execute(&std::fs::read_to_string(file)?, &[]).await.with_context(|| file.display().to_string())?;
        }
        anyhow::Ok(())
    };
    let migrated = postgres.supabase_database().await?;
    run(&migrated).await?;
    let before = fingerprint(&migrated).await?;
    push(&migrated).await.context("push after migrate")?;
    assert_eq!(fingerprint(&migrated).await?, before, "nothing is left to push after migrate");

    let pushed = postgres.supabase_database().await?;
    let user = orm_table(&pushed.connect_as("postgres").await?, 1000).await?;
    push(&pushed).await.context("push")?;
    assert_eq!(run(&pushed).await?, Report::default(), "nothing is left to migrate after a push");
    push(&pushed).await.context("push again")?;
    let fixture = Fixture::on(pushed).await?;
    assert_eq!(fixture.operator.dirty().await?.len(), 4, "the live rows of {user} are adopted");

    // Made from nothing by either, it is the same schema.
    let empty = postgres.supabase_database().await?;
    push(&empty).await?;
    assert_eq!(fingerprint(&empty).await?, before, "both make the same schema");
    std::fs::remove_dir_all(scratch.path())?;
    Ok(())
}

async fn bare_server(postgres: &Postgres) -> Result<()> {
    let scratch = Scratch::new()?;
    let part = cyberdesk_testbed::Progress::quiet().part("postgres");
    let options = Options { version: Some(postgres.major()?), migrate: None, ..Options::default() };
    let server = Postgres::start(&options, &scratch, &part).await?;
    let admin = server.supabase_database().await?.kept().connect_as(SUPERUSER).await?;

    // The hosted administrator, who is no superuser, makes the role; two databases at once.
    let (one, two) = (server.supabase_database().await?, server.supabase_database().await?);
    let with_password = async |database: &Database, password: &str| {
        let mut client = connect(&database.url("postgres")).await.expect("the administrator is let in");
        migrate(&mut client, Some(password)).await
    };
    tokio::try_join!(with_password(&one, "one"), with_password(&two, "one"))?;
    let role = admin
        .query_one(
            "select concat_ws(' ', rolcanlogin, rolinherit, rolsuper, rolcreaterole, rolcreatedb, rolbypassrls, rolconnlimit)
               from pg_roles where rolname = 'cyberdesk_daemon'",
            &[],
        )
        .await?;
    assert_eq!(role.get::<_, &str>(0), "t f f f f f 20", "it may log in, and nothing else");

    // Somebody else has made it: on 16 and later only they may alter it.
    admin
        .batch_execute(
            "alter role cyberdesk_daemon rename to once_cyberdesk_daemon; create role cyberdesk_daemon login",
        )
        .await?;
    let foreign = server.supabase_database().await?;
    match with_password(&foreign, "two").await {
        Ok(_) => assert_eq!(server.major()?, 15, "only there createrole is enough"),
        Err(Error::Refused(message)) => {
            assert!(message.contains("another administrator made that role; all else is done"), "{message}");
        }
        Err(error) => return Err(error.into()),
    }
    assert_eq!(run(&foreign).await?, Report::default(), "all else is done");
    let fixture = Fixture::on(foreign).await?;
    let id = fixture.insert().await?;
    assert_eq!(fixture.operator.dirty().await?, [id]);

    // Plain PostgreSQL, where none of Supabase's roles is.
    admin
        .batch_execute(
            "alter role anon rename to once_anon; alter role authenticated rename to once_authenticated;
             alter role service_role rename to once_service_role",
        )
        .await?;
    let plain = server.plain_database().await?;
    run(&plain).await?;
    let made: i64 = admin
        .query_one("select count(*) from pg_roles where rolname in ('anon', 'authenticated', 'service_role') and not rolcanlogin", &[])
        .await?
        .get(0);
    assert_eq!(made, 3);
    Ok(())
}
