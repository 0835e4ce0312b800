//! Years of old rows cost the operator nothing, and what is kept for a time only goes in time.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use cyberdesk_testbed::Postgres;
use tokio_postgres::Client;
use uuid::Uuid;

use super::Story;
use super::fixture::{Entry, Fixture, Operator, code};

pub(super) const STORIES: &[Story] = &[
    ("years of old rows cost the operator nothing, and each index serves", |p| Box::pin(years(p))),
    ("what is over is trimmed in batches, and an id once used stays refused", |p| Box::pin(trim(p))),
    ("an id that is being trimmed is refused all the same", |p| Box::pin(trim_race(p))),
    ("tombstones are kept for a day at least", |p| Box::pin(kept_for_a_day(p))),
];

/// Ended rows: so many that a plan which reads them all is never the cheaper one.
const OLD: i64 = 100_000;
const LIVE: i64 = 200;
/// More than PL/pgSQL and the driver try before they settle on a plan for all parameters.
const ROUNDS: usize = 7;

/// What a session has done of late, this transaction included: complete scans of a large table, rows read of them,
/// indexes used.
const COST: &str = "
select coalesce(sum(pg_stat_get_xact_numscans(c.oid)) filter (where c.relkind = 'r'), 0)::bigint,
       coalesce(sum(pg_stat_get_xact_tuples_returned(c.oid) + pg_stat_get_xact_tuples_fetched(c.oid)) filter (where c.relkind = 'r'), 0)::bigint,
       coalesce(array_agg(c.relname::text) filter (where c.relkind = 'i' and pg_stat_get_xact_numscans(c.oid) > 0), '{}')
  from pg_catalog.pg_class c
  left join pg_catalog.pg_index i on i.indexrelid = c.oid
  join pg_catalog.pg_class t on t.oid = coalesce(i.indrelid, c.oid)
  join pg_catalog.pg_namespace n on n.oid = t.relnamespace
 where n.nspname in ('public', 'cyberdesk') and t.relname in ('cyberdesk_instances', 'desktop', 'history', 'used_id')";

struct Meter {
    used: BTreeSet<String>,
}

impl Meter {
    /// Runs a statement again and again, each time undone, and holds it to what it may read.
    async fn hold(&mut self, client: &Client, at_most: i64, statement: &str) -> Result<()> {
        for round in 1..=ROUNDS {
            // Counted since the last report to the collector, which no transaction makes before its end.
            client.batch_execute("begin").await?;
            let before = client.query_one(COST, &[]).await?;
            client.query(statement, &[]).await.with_context(|| statement.to_owned())?;
            client.batch_execute("set constraints all immediate").await?;
            let cost = client.query_one(COST, &[]).await?;
            client.batch_execute("rollback").await?;
            let since = |at| cost.get::<_, i64>(at) - before.get::<_, i64>(at);
            let (scans, read) = (since(0), since(1));
            assert_eq!(scans, 0, "round {round}: {statement} reads a whole table");
            assert!(read <= at_most, "round {round}: {statement} reads {read} rows, and may read {at_most}");
            self.used.extend(cost.get::<_, Vec<String>>(2));
        }
        Ok(())
    }
}

async fn years(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    fixture.database.fill_with_old_rows(OLD, LIVE).await?;
    fixture
        .app
        .batch_execute("update cyberdesk.settings set warn_before = '5 minutes', desktops_per_user = 100000")
        .await?;
    let old: Uuid =
        fixture.app.query_one("select id from cyberdesk.desktop where ended_at is not null limit 1", &[]).await?.get(0);
    let live: Uuid =
        fixture.app.query_one("select id from cyberdesk.desktop where ended_at is null limit 1", &[]).await?.get(0);
    let trimmed: Uuid = fixture
        .app
        .query_one("delete from cyberdesk.desktop where id = (select id from cyberdesk.desktop where ended_at is not null offset 5 limit 1) returning id", &[])
        .await?
        .get(0);
    let mut meter = Meter { used: BTreeSet::new() };

    // All that the operator's role may call, with the most rows that each may read.
    let Operator { client, epoch, token } = &fixture.operator;
    let term = format!("{epoch}, '{token}'");
    let ids = format!("array['{live}', '{old}', '{trimmed}', gen_random_uuid()]::uuid[]");
    let (few, all_live) = (100, 12 * LIVE);
    let lists =
        "array[1,1,1,1], array['u','u',null,null], array['running',null,null,null], array[null,null,null,null]::text[],
        array['m','m',null,null], array[null,null,null,null]::text[], array[false,true,false,false]";
    let calls = [
        ("live_desktops", "", all_live),
        ("dirty_desktops", "5000", all_live),
        ("desktops_by_id", &ids, few),
        ("identity", "", few),
        ("fence_epoch", "", few),
        ("applied_migrations", "", few),
        ("paused", "", few),
        ("pair", "", few),
        ("last_sign_of_life", "", few),
        ("lost", &ids, all_live),
        ("ended_within", "3600", few),
        ("bind", &format!("{term}, 'cluster', true"), all_live),
        ("brake", "'cluster', 'because'", few),
        ("service_state", "", few),
        ("history_of", &format!("'{live}'"), few),
        ("acquire", &format!("{term}, 'story'"), few),
        ("report", &format!("{term}, {ids}, {lists}"), few),
        ("expire", &format!("{term}, {ids}"), few),
        ("reconcile_projection", &term, all_live),
        ("warn", &format!("{term}, 500"), all_live),
        ("sign_of_life", &term, few),
        // A thousand private rows and a thousand entries of history, each looked at and deleted.
        ("trim", &term, 6000),
    ];
    for (function, arguments, at_most) in calls {
        meter.hold(client, at_most, &format!("select * from cyberdesk.{function}({arguments})")).await?;
    }
    let callable =
        "select p.proname::text from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
        where n.nspname = 'cyberdesk' and has_function_privilege(p.oid, 'execute')";
    for row in client.query(callable, &[]).await? {
        let name: &str = row.get(0);
        assert!(calls.iter().any(|(function, ..)| *function == name), "{name} is measured here too");
    }

    // What the app asks, of one desktop or one user.
    let user: Uuid =
        fixture.app.query_one("select user_id from cyberdesk.desktop where id = $1", &[&live]).await?.get(0);
    for statement in [
        format!("select * from public.cyberdesk_instances where user_id = '{user}' order by created_at desc limit 20"),
        format!("insert into public.cyberdesk_instances (user_id) values ('{user}') returning id, status"),
        format!("update public.cyberdesk_instances set status = 'terminated' where id = '{live}' returning id"),
        format!("select * from public.cyberdesk_desktop_history where desktop_id = '{live}'"),
        format!("select * from public.request_shutdown('{live}')"),
        format!("delete from public.cyberdesk_instances where id = '{old}' returning id"),
    ] {
        meter.hold(&fixture.app, few + LIVE, &statement).await?;
    }

    // A user with a thousand desktops, each with its private row and its history.
    let gotrue = fixture.database.connect_as("supabase_auth_admin").await?;
    let heavy: Uuid =
        gotrue.query_one("select id from auth.users where email = 'heavy@example.com'", &[]).await?.get(0);
    meter.hold(&gotrue, 12_000, &format!("delete from auth.users where id = '{heavy}'")).await?;

    let unused: Vec<String> = fixture
        .app
        .query(
            "select c.relname::text from pg_index i join pg_class c on c.oid = i.indexrelid join pg_class t on t.oid = i.indrelid
              where t.relnamespace in ('public'::regnamespace, 'cyberdesk'::regnamespace) and not i.indisunique and c.relname <> all ($1)",
            &[&meter.used.iter().collect::<Vec<_>>()],
        )
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(
        unused,
        Vec::<String>::new(),
        "an index that serves nobody is only a cost (splinter's 0005, unused_index)"
    );
    Ok(())
}

/// Makes desktops look as if they had been over for so long.
async fn age(fixture: &Fixture, ids: &[Uuid], interval: &str) -> Result<()> {
    let aged = format!("update cyberdesk.desktop set ended_at = now() - interval '{interval}' where id = any($1)");
    fixture.app.execute(&aged, &[&ids]).await?;
    Ok(())
}

/// A desktop that is over; its row deleted, or not.
async fn over(fixture: &Fixture, deleted: bool) -> Result<Uuid> {
    let id = fixture.insert_running().await?;
    fixture.operator.report(Entry::ended(id, "terminated", "guest-shutdown", "")).await?;
    if deleted {
        fixture.execute("delete from public.cyberdesk_instances where id = $1", id).await?;
    }
    Ok(id)
}

async fn trim(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let insert = "insert into public.cyberdesk_instances (id, user_id) values ($1, $2)";
    let (kept, gone, recent) = (over(&fixture, false).await?, over(&fixture, true).await?, over(&fixture, true).await?);
    let living = fixture.insert_running().await?;
    age(&fixture, &[kept, gone], "31 days").await?;
    age(&fixture, &[recent], "29 days").await?;
    assert_eq!(fixture.operator.trim().await?, 2);
    assert_eq!(fixture.operator.trim().await?, 0);
    let left = fixture.app.query("select id from cyberdesk.desktop", &[]).await?;
    let left: BTreeSet<Uuid> = left.iter().map(|row| row.get(0)).collect();
    assert_eq!(left, BTreeSet::from([recent, living]));

    // No id comes back, and the refusal helps.
    for id in [kept, gone, recent, living] {
        let error = fixture.app.execute(insert, &[&id, &fixture.user]).await.expect_err("the id has been used");
        assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("23505"), "{id}");
    }
    // The app's row is the app's: it stands, obeys, and leaves a tombstone like any other.
    assert_eq!(fixture.operator.look(kept, &["desired", "status", "row_exists"]).await?, "absent terminated true");
    fixture.execute("update public.cyberdesk_instances set status = 'running' where id = $1", kept).await?;
    assert_eq!(fixture.row(kept).await?.brief(), "terminated guest-shutdown.");
    age(&fixture, &[kept], "31 days").await?;
    assert_eq!(fixture.operator.trim().await?, 1, "written to, it had its private row again");
    fixture.execute("delete from public.cyberdesk_instances where id = $1", kept).await?;
    assert_eq!(fixture.operator.look(kept, &["desired", "row_exists"]).await?, "absent false");
    assert_eq!(code(fixture.app.execute(insert, &[&kept, &fixture.user]).await), "23505");

    // Many go in batches, so that none takes long.
    fixture
        .app
        .batch_execute(
            "insert into cyberdesk.desktop (id, user_id, desired, status, ended_at, expires_at, observed_generation)
             select gen_random_uuid(), gen_random_uuid(), 'absent', 'terminated', now() - interval '1 year', now(), 1 from generate_series(1, 2500)",
        )
        .await?;
    let mut batches = vec![];
    while batches.last() != Some(&0) {
        batches.push(fixture.operator.trim().await?);
    }
    assert_eq!(batches, [1000, 1000, 500, 0]);

    let later = Operator::lead(&fixture.database, 2).await?;
    assert_eq!(code(fixture.operator.trim().await), "CD001", "only who leads trims");
    assert_eq!(later.trim().await?, 0);
    Ok(())
}

async fn trim_race(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = over(&fixture, true).await?;
    age(&fixture, &[id], "31 days").await?;
    fixture.operator.client.batch_execute("begin").await?;
    assert_eq!(fixture.operator.trim().await?, 1);
    let app = fixture.database.connect_as("postgres").await?;
    let user = fixture.user;
    let insert = async move {
        app.execute("insert into public.cyberdesk_instances (id, user_id) values ($1, $2)", &[&id, &user]).await
    };
    let insert = tokio::spawn(insert);
    fixture.until_somebody_waits_for_a_lock().await?;
    fixture.operator.client.batch_execute("commit").await?;
    assert_eq!(code(insert.await?), "23505");
    Ok(())
}

async fn kept_for_a_day(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let set = "update cyberdesk.settings set tombstone_retention = ";
    assert_eq!(code(fixture.app.execute(&format!("{set}'23 hours'"), &[]).await), "23514");
    fixture.app.execute(&format!("{set}'1 day'"), &[]).await?;
    let id = over(&fixture, true).await?;
    age(&fixture, &[id], "23 hours").await?;
    assert_eq!(fixture.operator.trim().await?, 0);
    age(&fixture, &[id], "25 hours").await?;
    assert_eq!(fixture.operator.trim().await?, 1);
    Ok(())
}
