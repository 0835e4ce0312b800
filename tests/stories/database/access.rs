//! Who may do what: one written matrix, compared with what the database grants and with what it does.

mod matrix;

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use cyberdesk_testbed::postgres::SUPERUSER;
use cyberdesk_testbed::{Caller, Database, Postgres};
use tokio_postgres::error::SqlState;

use self::matrix::{MATRIX, ROLES, STRANGER};
use super::Story;
use super::fixture::{Fixture, code};
use super::migration::run as migrate;

pub(super) const STORIES: &[Story] = &[
    ("no object is missing from the matrix, and the administrator owns each", |p| Box::pin(complete(p))),
    ("each role is granted what the matrix says, and no more", |p| Box::pin(grants(p))),
    ("anon may do what the matrix says, and no more", |p| Box::pin(tried_by(p, "anon"))),
    ("authenticated may do what the matrix says, and no more", |p| Box::pin(tried_by(p, "authenticated"))),
    ("service_role may do what the matrix says, and no more", |p| Box::pin(tried_by(p, "service_role"))),
    ("authenticator may do what the matrix says, and no more", |p| Box::pin(tried_by(p, "authenticator"))),
    ("supabase_auth_admin may do what the matrix says, and no more", |p| Box::pin(tried_by(p, "supabase_auth_admin"))),
    ("cyberdesk_daemon may do what the matrix says, and no more", |p| Box::pin(tried_by(p, "cyberdesk_daemon"))),
    ("a role that is nobody may do what the matrix says, and no more", |p| Box::pin(tried_by(p, STRANGER))),
    ("the operator's role reaches nothing outside its schema", |p| Box::pin(operator_role(p))),
    ("browser users see and change what is theirs alone", |p| Box::pin(rows(p))),
    ("browser users insert only if the setting allows it, and never id or status", |p| Box::pin(browsers_insert(p))),
];

/// Databases that differ in what they grant by themselves: as in projects from before 2026-05-30, with all to
/// everybody; as in later ones, with nothing; and one whose ORM's table had further grants.
async fn databases(postgres: &Postgres) -> Result<Vec<(&'static str, Database)>> {
    let mut databases = vec![("old default privileges", postgres.database().await?)];
    let new = "do $$ declare maker text; begin
          foreach maker in array array['postgres', 'supabase_admin'] loop
            execute format('alter default privileges for role %I in schema public revoke all on tables from anon, authenticated, service_role', maker);
            execute format('alter default privileges for role %I in schema public revoke all on functions from anon, authenticated, service_role', maker);
            execute format('alter default privileges for role %I in schema public revoke all on sequences from anon, authenticated, service_role', maker);
          end loop;
        end $$";
    let orm = "create type public.instance_status as enum ('pending', 'running', 'completed', 'error', 'terminated');
        create table public.cyberdesk_instances (
          id uuid primary key default gen_random_uuid() not null,
          user_id uuid not null references auth.users (id) on delete cascade,
          created_at timestamp default now(), updated_at timestamp, status public.instance_status default 'pending' not null,
          timeout_at timestamp default now() + interval '24 hours' not null, stream_url varchar(1024));
        alter table public.cyberdesk_instances owner to postgres;
        alter type public.instance_status owner to postgres;
        grant update (status, stream_url), insert (id) on public.cyberdesk_instances to authenticated, anon, public";
    for (what, before) in [("new default privileges", new), ("the ORM's table with grants", orm)] {
        let database = postgres.supabase_database().await?;
        database.connect_as(SUPERUSER).await?.batch_execute(before).await.context(what)?;
        migrate(&database).await?;
        databases.push((what, database));
    }
    Ok(databases)
}

/// Beside the rest of a session that knows every object by its whole name.
const OBJECTS: &str = concat!("set search_path = ''; ", include_str!("access/objects.sql"));

async fn complete(postgres: &Postgres) -> Result<()> {
    let database = postgres.database().await?;
    let client = database.connect_as(SUPERUSER).await?;
    client.batch_execute(OBJECTS).await?;
    let found = client.query("select name, owner, kind from pg_temp.object", &[]).await?;
    let names: BTreeSet<&str> = found.iter().map(|row| row.get(0)).collect();
    let written: BTreeSet<&str> = MATRIX.iter().map(|(object, _)| *object).collect();
    let missing: Vec<_> = names.difference(&written).collect();
    let gone: Vec<_> = written.difference(&names).collect();
    assert!(missing.is_empty() && gone.is_empty(), "not in the matrix: {missing:#?}; only in the matrix: {gone:#?}");
    for row in found.iter().filter(|row| row.get::<_, &str>(0) != "schema public") {
        assert_eq!(row.get::<_, &str>(1), "postgres", "{}", row.get::<_, &str>(0));
    }
    Ok(())
}

/// Each permission of the matrix as a sentence.
fn written() -> BTreeSet<String> {
    let mut written = BTreeSet::new();
    for (object, may) in MATRIX {
        for (role, verbs) in *may {
            written.extend(verbs.split(' ').map(|verb| format!("{role} may {verb} {object}")));
        }
    }
    written
}

async fn grants(postgres: &Postgres) -> Result<()> {
    for (what, database) in databases(postgres).await? {
        let mut client = database.connect_as(SUPERUSER).await?;
        let transaction = client.transaction().await?;
        transaction.batch_execute(OBJECTS).await?;
        transaction.batch_execute(&format!("create role {STRANGER}")).await?;
        let granted = transaction
            .query(
                "select format('%s may %s %s', r.role, g.verb, o.name)
                   from pg_temp.object o, unnest($1::text[]) as r (role), lateral (
                     select v.verb from unnest(array['usage', 'create']) as v (verb)
                      where o.kind = 'schema' and has_schema_privilege(r.role, o.oid, v.verb)
                     union all
                     select v.verb
                       from unnest(array['select', 'insert', 'update', 'delete', 'truncate', 'references', 'trigger']
                         || case when current_setting('server_version_num')::int >= 170000 then array['maintain'] end) as v (verb)
                      where o.kind = 'table' and has_table_privilege(r.role, o.oid, v.verb)
                     union all
                     select format('%s(%s)', v.verb, string_agg(a.attname, ',' order by a.attname collate \"C\"))
                       from unnest(array['select', 'insert', 'update', 'references']) as v (verb), pg_attribute a
                      where o.kind = 'table' and not has_table_privilege(r.role, o.oid, v.verb)
                        and a.attrelid = o.oid and a.attnum > 0 and not a.attisdropped
                        and has_column_privilege(r.role, o.oid, a.attnum, v.verb)
                      group by v.verb
                     union all
                     select v.verb from unnest(array['usage', 'select', 'update']) as v (verb)
                      where o.kind = 'sequence' and has_sequence_privilege(r.role, o.oid, v.verb)
                     union all
                     select 'execute' where o.kind = 'function' and has_function_privilege(r.role, o.oid, 'execute')
                     union all
                     select 'usage' where o.kind = 'type' and has_type_privilege(r.role, o.oid, 'usage')
                   ) as g (verb)",
                &[&ROLES.as_slice()],
            )
            .await?;
        let granted: BTreeSet<String> = granted.iter().map(|row| row.get(0)).collect();
        let written = written();
        let more: Vec<_> = granted.difference(&written).collect();
        let less: Vec<_> = written.difference(&granted).collect();
        assert!(
            more.is_empty() && less.is_empty(),
            "{what}: granted beside the matrix {more:#?}, and not granted {less:#?}"
        );
    }
    Ok(())
}

/// Every verb on every object, as the role itself. What comes of it is undone each time. By default this database
/// grants the most; that others grant the same shows in `grants`.
async fn tried_by(postgres: &Postgres, role: &str) -> Result<()> {
    let written = written();
    let database = postgres.database().await?;
    let client = database.connect_as(SUPERUSER).await?;
    let stranger = if role == STRANGER { format!("create role {STRANGER};") } else { String::new() };
    let begin = format!("begin; {stranger} set local session authorization {role}");
    client.batch_execute(OBJECTS).await?;
    let attempts = client.query("select name, verb, statement from pg_temp.attempt", &[]).await?;
    assert!(attempts.len() > 100, "there is something to try");
    for attempt in &attempts {
        let (object, verb, statement): (&str, &str, &str) = (attempt.get(0), attempt.get(1), attempt.get(2));
        client.batch_execute(&begin).await?;
        let done = client.batch_execute(statement).await;
        client.batch_execute("rollback").await?;
        let sentence = format!("{role} may {verb} {object}");
        let columns = (format!("{role} may {verb}("), format!(") {object}"));
        let may = written.contains(&sentence)
            || written.iter().any(|line| line.starts_with(&columns.0) && line.ends_with(&columns.1));
        let denied = done.as_ref().err().is_some_and(refuses);
        assert_eq!(!denied, may, "{sentence}? tried: {statement}; answer: {done:?}");
    }
    Ok(())
}

/// Whether the database refuses this to the role, or to everybody: a view that cannot be written to has no one who may.
/// What a function says once it runs is its own affair.
fn refuses(error: &tokio_postgres::Error) -> bool {
    let message = error.as_db_error().map_or("", |error| error.message());
    match error.code() {
        Some(&SqlState::INSUFFICIENT_PRIVILEGE) => !message.contains("row-level security"),
        Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE | &SqlState::WRONG_OBJECT_TYPE) => true,
        _ => false,
    }
}

async fn operator_role(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    for statement in [
        "select * from auth.users",
        "create schema mine",
        "set role service_role",
        "set role postgres",
        "alter role cyberdesk_daemon createrole",
        "select pg_read_file('PG_VERSION')",
    ] {
        assert_eq!(code(fixture.operator.client.execute(statement, &[]).await), "42501", "{statement}");
    }
    Ok(())
}

/// What comes of a statement: how many rows, or the SQLSTATE.
async fn outcome(database: &Database, caller: Caller, statement: &str) -> String {
    match database.request(caller, statement, &[]).await {
        Ok(rows) => rows.len().to_string(),
        Err(error) => code::<()>(Err(error)),
    }
}

async fn rows(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let (id, owner) = (fixture.insert().await?, fixture.user);
    let stranger = fixture.database.sign_up().await?;
    let callers = [Caller::User(owner), Caller::User(stranger), Caller::Anon, Caller::Service];
    let table: &[(&str, [&str; 4])] = &[
        // statement, and what it comes to for the owner, another user, a visitor, the app's server
        ("select * from public.cyberdesk_instances", ["1", "0", "42501", "1"]),
        ("select * from public.cyberdesk_desktop_history", ["1", "0", "42501", "1"]),
        (
            "update public.cyberdesk_instances set status = 'terminated' where id = $id returning id",
            ["42501", "42501", "42501", "1"],
        ),
        (
            "update public.cyberdesk_instances set timeout_at = now() where id = $id returning id",
            ["42501", "42501", "42501", "1"],
        ),
        (
            "delete from public.cyberdesk_instances where id = gen_random_uuid() returning id",
            ["42501", "42501", "42501", "0"],
        ),
        (
            "insert into public.cyberdesk_instances (user_id) values ($owner) returning id",
            ["42501", "42501", "42501", "1"],
        ),
        ("select from public.touch_desktop($id)", ["1", "0", "42501", "1"]),
        ("select from public.extend_desktop($id, '1 minute')", ["1", "0", "42501", "1"]),
        ("select from public.set_desktop_timeout($id, now() + interval '1 hour')", ["1", "0", "42501", "1"]),
        ("select from public.desktop_service_state()", ["1", "1", "42501", "1"]),
        ("select from public.request_shutdown($id)", ["1", "0", "42501", "1"]),
        ("select * from cyberdesk.desktop", ["42501", "42501", "42501", "42501"]),
        ("select * from cyberdesk.settings", ["42501", "42501", "42501", "42501"]),
    ];
    for (statement, expected) in table {
        let statement = statement.replace("$id", &format!("'{id}'")).replace("$owner", &format!("'{owner}'"));
        // The stranger first: had they changed anything, the owner's row would show it.
        for at in [1, 2, 0, 3] {
            let came_of_it = outcome(&fixture.database, callers[at], &statement).await;
            assert_eq!(came_of_it, expected[at], "{:?}: {statement}", callers[at]);
        }
    }
    // A request without a subject is nobody's.
    let authenticator = fixture.database.connect_as("authenticator").await?;
    authenticator.batch_execute("begin; set local role authenticated").await?;
    let seen = authenticator.query("select from public.cyberdesk_instances", &[]).await?;
    assert!(seen.is_empty(), "who has no id owns nothing");
    Ok(())
}

async fn browsers_insert(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let owner = fixture.user;
    let stranger = fixture.database.sign_up().await?;
    let insert = |columns: &str, values: &str| {
        format!(
            "insert into public.cyberdesk_instances (user_id{columns}) values ('{owner}'{values}) returning id, status"
        )
    };
    for (allowed, plain) in [(false, "42501"), (true, "1")] {
        fixture.app.execute("update cyberdesk.settings set browsers_may_insert = $1", &[&allowed]).await?;
        let all = insert(", timeout_at, params", ", now() + interval '1 hour', '{\"size\": \"small\"}'");
        for statement in [insert("", ""), all] {
            assert_eq!(
                outcome(&fixture.database, Caller::User(owner), &statement).await,
                plain,
                "{allowed}: {statement}"
            );
            for other in [Caller::User(stranger), Caller::Anon] {
                assert_eq!(outcome(&fixture.database, other, &statement).await, "42501", "{other:?}: {statement}");
            }
        }
        for (column, value) in [
            ("id", "gen_random_uuid()"),
            ("status", "'running'"),
            ("created_at", "now()"),
            ("updated_at", "now()"),
            ("stream_url", "'https://evil.example'"),
            ("reason", "'requested'"),
            ("message", "''"),
            ("shutdown_requested_at", "now()"),
            ("ended_at", "now()"),
            ("warned_at", "now()"),
        ] {
            let statement = insert(&format!(", {column}"), &format!(", {value}"));
            assert_eq!(
                outcome(&fixture.database, Caller::User(owner), &statement).await,
                "42501",
                "{allowed}: {statement}"
            );
        }
    }
    Ok(())
}
