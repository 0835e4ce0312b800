//! Limits, where the data is: off at first, clear when they refuse, and no way round them.

use anyhow::{Context as _, Result, ensure};
use cyberdesk_testbed::{Caller, Postgres};
use futures::SinkExt as _;
use futures::future::try_join_all;
use tokio_postgres::{Client, IsolationLevel};
use uuid::Uuid;

use super::Story;
use super::fixture::{Entry, Fixture, code};
use super::functions::rpc;

pub(super) const STORIES: &[Story] = &[
    ("a lifetime beyond the limits is refused in words, and moved within them", |p| Box::pin(lifetimes(p))),
    ("a user gets as many desktops as may be, one statement or many", |p| Box::pin(quota(p))),
    ("a desktop counts until it is over", |p| Box::pin(counts_until_over(p))),
    ("an upsert of a row that is there is no new desktop", |p| Box::pin(upserts(p))),
    ("inserts at the same time share one limit", |p| Box::pin(at_once(p))),
    ("a snapshot from before is no way round a limit", |p| Box::pin(old_snapshot(p))),
    ("statements with the same users in any order never wait in a circle", |p| Box::pin(no_circles(p))),
    ("settings that cannot be meant are refused", |p| Box::pin(settings(p))),
];

/// The refusal of a statement that a limit forbids: SQLSTATE and words; the hint is there.
#[track_caller]
fn refusal<T: std::fmt::Debug>(result: Result<T, tokio_postgres::Error>) -> (String, String) {
    let error = result.expect_err("a limit forbids it");
    let error = error.as_db_error().expect("the database itself refuses");
    assert!(error.hint().is_some_and(|hint| hint.contains("cyberdesk.settings")), "{error:?}");
    (error.code().code().to_owned(), error.message().to_owned())
}

async fn lifetimes(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let old = fixture.insert().await?;
    fixture
        .app
        .batch_execute("update cyberdesk.settings set min_lifetime = '1 minute', max_lifetime = '8 hours'")
        .await?;
    let insert = async |lifetime: &str| {
        let statement = format!(
            "insert into public.cyberdesk_instances (user_id, timeout_at) values ($1, now() + interval '{lifetime}') returning id"
        );
        fixture.app.query_one(&statement, &[&fixture.user]).await.map(|row| row.get::<_, Uuid>(0))
    };
    for (lifetime, words) in [
        ("8 hours 1 second", "may live for 08:00:00 at most, and timeout_at would let it live for 08:00:01"),
        ("59 seconds", "must be given at least 00:01:00, and timeout_at would leave it 00:00:59"),
        ("0", "at least 00:01:00"),
        ("-1 hour", "at least 00:01:00"),
    ] {
        let (code, message) = refusal(insert(lifetime).await);
        ensure!(code == "CD004" && message.contains(words), "{lifetime}: {code} {message}");
    }
    // By whom, and how many at once, is all the same.
    let many = "insert into public.cyberdesk_instances (user_id, timeout_at)
                select $1, now() + make_interval(hours => n) from generate_series(7, 9) n";
    ensure!(refusal(fixture.database.request(Caller::Service, many, &[&fixture.user]).await).0 == "CD004");
    for lifetime in ["1 minute", "8 hours"] {
        insert(lifetime).await.context(lifetime)?;
    }

    // Extensions count from the insert; ending it early is always possible.
    let id = insert("1 hour").await?;
    let owner = Caller::User(fixture.user);
    let extend = async |by: &str| {
        rpc(&fixture, owner, "extend_desktop", serde_json::json!({ "desktop_id": id, "by_interval": by })).await
    };
    extend("6 hours 59 minutes").await?;
    let (code, message) = refusal(extend("2 minutes").await);
    ensure!(code == "CD004" && message.contains("at most"), "{code} {message}");
    let update = "update public.cyberdesk_instances set timeout_at = now() + interval '1 day' where id = $1";
    ensure!(refusal(fixture.app.execute(update, &[&id]).await).0 == "CD004");
    fixture.execute("update public.cyberdesk_instances set timeout_at = now() where id = $1", id).await?;
    ensure!(fixture.operator.expire(&[id]).await? == ["expired"]);

    // What was there before the limit goes on, as long as it is not moved later.
    fixture.execute("update public.cyberdesk_instances set status = 'running' where id = $1", old).await?;
    fixture
        .execute("update public.cyberdesk_instances set timeout_at = timeout_at - interval '1 hour' where id = $1", old)
        .await?;
    ensure!(
        refusal(fixture.app.execute(update, &[&old]).await).0 == "CD004",
        "nor later, even within what it once had"
    );
    // Nor is what is over, and what a shutdown was asked for, in anyone's way.
    fixture.execute("select public.request_shutdown($1)", old).await?;
    ensure!(fixture.execute(update, old).await? == 1, "absorbed, as ever");
    let ended =
        "insert into public.cyberdesk_instances (user_id, status, timeout_at) values ($1, 'terminated', '2020-01-01')";
    ensure!(fixture.app.execute(ended, &[&fixture.user]).await? == 1);
    Ok(())
}

async fn limit(fixture: &Fixture, desktops: i32) -> Result<()> {
    fixture.app.execute("update cyberdesk.settings set desktops_per_user = $1", &[&desktops]).await?;
    Ok(())
}

async fn live(fixture: &Fixture, user: Uuid) -> Result<i64> {
    let statement = "select count(*) from public.cyberdesk_instances where user_id = $1 and ended_at is null";
    Ok(fixture.app.query_one(statement, &[&user]).await?.get(0))
}

const INSERT: &str = "insert into public.cyberdesk_instances (user_id) values ($1)";
const INSERT_MANY: &str = "insert into public.cyberdesk_instances (user_id) select $1 from generate_series(1, $2::int)";

async fn quota(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let (user, other) = (fixture.user, fixture.database.sign_up().await?);
    limit(&fixture, 3).await?;
    let (code, message) = refusal(fixture.app.execute(INSERT_MANY, &[&user, &4_i32]).await);
    ensure!(code == "CD005" && message == "a user may have 3 desktops at a time, and this would make 4", "{message}");
    ensure!(live(&fixture, user).await? == 0, "all or none of a statement");
    fixture.app.execute(INSERT_MANY, &[&user, &3_i32]).await?;
    ensure!(refusal(fixture.app.execute(INSERT, &[&user]).await).0 == "CD005");
    ensure!(refusal(fixture.database.request(Caller::Service, INSERT, &[&user]).await).0 == "CD005");
    let sink = fixture.app.copy_in("copy public.cyberdesk_instances (user_id) from stdin").await?;
    tokio::pin!(sink);
    sink.send(std::io::Cursor::new(format!("{user}\n").into_bytes())).await?;
    ensure!(refusal(sink.finish().await).0 == "CD005", "nor by COPY");
    // One user's limit is nobody else's, and rows that are over from the start are no desktops.
    fixture.app.execute(INSERT, &[&other]).await?;
    let old = "insert into public.cyberdesk_instances (user_id, status) values ($1, 'terminated')";
    fixture.app.execute(old, &[&user]).await?;
    ensure!(live(&fixture, user).await? == 3);

    limit(&fixture, 1).await?;
    let (_, message) = refusal(fixture.app.execute(INSERT, &[&other]).await);
    ensure!(message == "a user may have 1 desktop at a time, and this would make 2", "{message}");
    ensure!(live(&fixture, user).await? == 3, "a lower limit ends none");
    fixture.app.batch_execute("update cyberdesk.settings set desktops_per_user = null").await?;
    fixture.app.execute(INSERT_MANY, &[&user, &10_i32]).await?;
    Ok(())
}

async fn counts_until_over(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    limit(&fixture, 1).await?;
    let full = async || code(fixture.app.execute(INSERT, &[&fixture.user]).await) == "CD005";
    let id = fixture.insert_running().await?;
    ensure!(full().await);
    fixture.execute("select public.request_shutdown($1)", id).await?;
    ensure!(full().await, "it is stopping");
    fixture.execute("delete from public.cyberdesk_instances where id = $1", id).await?;
    ensure!(full().await, "its row is gone, its VM may not be");
    fixture.operator.report(Entry { generation: 2, ..Entry::ended(id, "terminated", "requested", "") }).await?;
    fixture.insert().await?;
    ensure!(full().await);
    Ok(())
}

async fn upserts(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    limit(&fixture, 2).await?;
    let (first, second) = (fixture.insert().await?, fixture.insert().await?);
    let upsert =
        "insert into public.cyberdesk_instances (id, user_id, status) values ($1, $3, 'running'), ($2, $3, 'running')
                  on conflict (id) do update set status = excluded.status returning id";
    let rows = fixture.database.request(Caller::Service, upsert, &[&first, &second, &fixture.user]).await?;
    ensure!(rows.len() == 2);
    ensure!(refusal(fixture.app.query(upsert, &[&first, &Uuid::new_v4(), &fixture.user]).await).0 == "CD005");
    let none = "insert into public.cyberdesk_instances (id, user_id) values ($1, $2) on conflict do nothing";
    ensure!(fixture.app.execute(none, &[&first, &fixture.user]).await? == 0);
    Ok(())
}

async fn at_once(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    limit(&fixture, 5).await?;
    let clients = try_join_all((0..12).map(|_| fixture.database.connect_as("postgres"))).await?;
    let insert = async |client: &Client| client.execute(INSERT, &[&fixture.user]).await;
    let answers = futures::future::join_all(clients.iter().map(insert)).await;
    let refused = answers.into_iter().filter(|answer| answer.is_err()).map(refusal).collect::<Vec<_>>();
    ensure!(refused.len() == 7 && refused.iter().all(|(code, _)| code == "CD005"), "{refused:?}");
    ensure!(live(&fixture, fixture.user).await? == 5);
    Ok(())
}

async fn old_snapshot(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    limit(&fixture, 1).await?;
    for isolation in [IsolationLevel::RepeatableRead, IsolationLevel::Serializable] {
        let user = fixture.database.sign_up().await?;
        // A user of whom there was nothing, and one who had a turn before.
        for before in [false, true] {
            let mut client = fixture.database.connect_as("postgres").await?;
            let transaction = client.build_transaction().isolation_level(isolation).start().await?;
            transaction.query("select count(*) from public.cyberdesk_instances", &[]).await?;
            fixture.app.execute(INSERT, &[&user]).await?;
            let sqlstate = code(transaction.execute(INSERT, &[&user]).await);
            ensure!(sqlstate == "40001", "{isolation:?}, {before}: {sqlstate}; to be tried again, and refused then");
            transaction.rollback().await?;
            ensure!(live(&fixture, user).await? == 1);
            let ended = "update public.cyberdesk_instances set status = 'terminated' where user_id = $1 returning id";
            for row in fixture.app.query(ended, &[&user]).await? {
                fixture.operator.report(Entry::ended(row.get(0), "terminated", "requested", "")).await?;
            }
        }
    }
    Ok(())
}

async fn no_circles(postgres: &Postgres) -> Result<()> {
    const ROUNDS: usize = 40;
    let fixture = Fixture::new(postgres).await?;
    limit(&fixture, 1000).await?;
    let users = [fixture.user, fixture.database.sign_up().await?, fixture.database.sign_up().await?];
    let inserting = async |order: [usize; 3]| {
        let client = fixture.database.connect_as("postgres").await?;
        let both = "insert into public.cyberdesk_instances (user_id) values ($1), ($2), ($3)";
        for _ in 0..ROUNDS {
            client.execute(both, &[&users[order[0]], &users[order[1]], &users[order[2]]]).await?;
        }
        anyhow::Ok(())
    };
    tokio::try_join!(inserting([0, 1, 2]), inserting([2, 1, 0]), inserting([1, 2, 0]))?;
    for user in users {
        ensure!(live(&fixture, user).await? == 3 * 40);
    }
    Ok(())
}

async fn settings(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let all_off = "select num_nonnulls(min_lifetime, max_lifetime, desktops_per_user, idle_timeout, warn_before) = 0
                          and not browsers_may_insert and not paused from cyberdesk.settings";
    ensure!(fixture.app.query_one(all_off, &[]).await?.get::<_, bool>(0), "so that the app that was there goes on");
    for (change, constraint) in [
        ("min_lifetime = '-1 second'", "min_lifetime_is_from_0_to_1_year"),
        ("max_lifetime = '0'", "max_lifetime_is_from_1_second_to_100_years"),
        ("min_lifetime = '2 hours', max_lifetime = '1 hour'", "min_lifetime_is_at_most_max_lifetime"),
        ("desktops_per_user = -1", "desktops_per_user_is_not_negative"),
        ("idle_timeout = '1 millisecond'", "idle_timeout_is_from_1_second_to_1_year"),
        ("warn_before = '2 years'", "warn_before_is_from_1_second_to_1_year"),
        ("history_retention = '0'", "history_retention_is_from_1_day_to_100_years"),
        ("only_row = false", "settings_only_row_check"),
    ] {
        let error = fixture.app.batch_execute(&format!("update cyberdesk.settings set {change}")).await;
        let error = error.expect_err(change);
        let told = error.as_db_error().and_then(|error| error.constraint()).unwrap_or_default();
        ensure!(told == constraint, "{change}: {told}");
    }
    ensure!(code(fixture.app.execute("insert into cyberdesk.settings default values", &[]).await) == "23505");
    // Nobody but the schema's owner may.
    for caller in [Caller::Anon, Caller::User(fixture.user), Caller::Service] {
        let change = "update cyberdesk.settings set desktops_per_user = 1000";
        ensure!(code(fixture.database.request(caller, change, &[]).await) == "42501", "{caller:?}");
    }
    // Without its row all is off.
    fixture.app.batch_execute("delete from cyberdesk.settings").await?;
    fixture.insert_running().await?;
    Ok(())
}
