//! Brings a database to the schema in `sql/`.
//!
//! Only a person's `migrate` does this, with an administrator's connection: the operator's own role can neither create nor
//! alter anything. The files are named the way Supabase names them and are applied by refinery, one transaction each, so
//! what is applied here and what is applied by Supabase's tools is the same text.
//!
//! What must stay true: nothing is touched before the app's table has been found fit; two migrations at once take turns;
//! applying everything twice changes nothing; the app's writers wait for a lock of ours for moments only.

use std::time::Duration;

use postgres_protocol::password::scram_sha_256;
use refinery::{Migration, Runner, Target};
use tokio::time::Instant;
use tokio_postgres::{Client, error::SqlState};
use tracing::{info, warn};
use uuid::Uuid;

/// Every migration, oldest first: version and name as in its file's name, and its text.
pub const MIGRATIONS: &[(&str, &str, &str)] = &[
    CHECK,
    ("20261123000200", "tables", include_str!("../../sql/20261123000200_tables.sql")),
    ("20261123000210", "live_rows", include_str!("../../sql/20261123000210_live_rows.sql")),
    INDEXES,
    ("20261123000300", "triggers", include_str!("../../sql/20261123000300_triggers.sql")),
    ("20261123000400", "adopt_rows", include_str!("../../sql/20261123000400_adopt_rows.sql")),
    ("20261123000410", "adopt_rows_now", include_str!("../../sql/20261123000410_adopt_rows_now.sql")),
    ("20261123000500", "operator_functions", include_str!("../../sql/20261123000500_operator_functions.sql")),
    ("20261123000600", "app_functions", include_str!("../../sql/20261123000600_app_functions.sql")),
    ("20261124000100", "settings", include_str!("../../sql/20261124000100_settings.sql")),
    ("20261124000105", "used_ids", include_str!("../../sql/20261124000105_used_ids.sql")),
    ("20261124000110", "history_tables", include_str!("../../sql/20261124000110_history_tables.sql")),
    ("20261124000120", "limits_and_history", include_str!("../../sql/20261124000120_limits_and_history.sql")),
    ("20261124000125", "erase_users", include_str!("../../sql/20261124000125_erase_users.sql")),
    ("20261124000130", "operator_functions", include_str!("../../sql/20261124000130_operator_functions.sql")),
    ("20261124000140", "more_app_functions", include_str!("../../sql/20261124000140_more_app_functions.sql")),
    ("20261124000200", "retention", include_str!("../../sql/20261124000200_retention.sql")),
    ("20261124000210", "browsers_insert", include_str!("../../sql/20261124000210_browsers_insert.sql")),
    ("20261124000300", "applied_migrations", include_str!("../../sql/20261124000300_applied_migrations.sql")),
    ("20261124000400", "bound_pair", include_str!("../../sql/20261124000400_bound_pair.sql")),
    ("20261124000500", "look_on", include_str!("../../sql/20261124000500_look_on.sql")),
    ("20261124000600", "pause_desktop", include_str!("../../sql/20261124000600_pause_desktop.sql")),
    ("20261128000100", "lean_inserts", include_str!("../../sql/20261128000100_lean_inserts.sql")),
    ("20261129000100", "sign_of_life", include_str!("../../sql/20261129000100_sign_of_life.sql")),
    ("20261129000200", "leaner_inserts", include_str!("../../sql/20261129000200_leaner_inserts.sql")),
    ("20261129000210", "one_index_less", include_str!("../../sql/20261129000210_one_index_less.sql")),
    ("20261129000300", "bound_params", include_str!("../../sql/20261129000300_bound_params.sql")),
    ("20261129000400", "refused_rows", include_str!("../../sql/20261129000400_refused_rows.sql")),
];

/// The first migration changes nothing, it only refuses. It is run on its own before all else, each time.
const CHECK: (&str, &str, &str) =
    ("20261123000100", "check_the_apps_table", include_str!("../../sql/20261123000100_check_the_apps_table.sql"));

/// The indexes of the app's table, each `create index if not exists`.
const INDEXES: (&str, &str, &str) =
    ("20261123000220", "index_the_apps_table", include_str!("../../sql/20261123000220_index_the_apps_table.sql"));

/// What is done in small steps before the migration that would do it at once, in one transaction, for however large a
/// table; the migration then finds it done.
const BEFOREHAND: [(&str, Step); 3] =
    [("20261123000210", Step::SetLiveRowsBack), (INDEXES.0, Step::BuildIndexes), ("20261123000410", Step::AdoptRows)];

#[derive(Clone, Copy)]
enum Step {
    SetLiveRowsBack,
    BuildIndexes,
    AdoptRows,
}

/// In the private schema: in `public`, PostgREST would show it to the world.
pub(super) const HISTORY: &str = "cyberdesk.refinery_schema_history";

/// Session lock under which migrations take turns ("cyberdsk" in ASCII). refinery itself has none.
const TURN: i64 = 0x6379_6265_7264_736b;

/// How long one migration waits for another. A migration takes seconds; one that takes a minute needs a person.
const TURN_TIMEOUT: Duration = Duration::from_secs(60);

/// How long one statement waits for the app's writers. While it waits for the whole table, new writers queue behind it,
/// so this is also the longest pause that we cause them.
const LOCK_TIMEOUT: &str = "200ms";

/// Tries per migration when the app's writers do not let go, with a pause in which they go on. Together about a minute.
const TRIES: u32 = 90;
const PAUSE: Duration = Duration::from_millis(500);

/// How long an index may wait for transactions that are older than it. Nobody waits for it meanwhile.
const INDEX_PATIENCE: &str = "10min";

/// Rows written in one transaction; their locks are held for some milliseconds.
const BATCH: i64 = 2_000;

/// What a run of [`migrate`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The migrations applied now, by file name without `.sql`. Empty: the database was up to date.
    pub applied: Vec<String>,
    /// Rows of the app that had to be adopted after the migrations, because somebody held them meanwhile.
    pub adopted_late: i64,
}

/// Why a database could not be brought to our schema.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database is not one that we can extend. The text says what is wrong and what to do.
    #[error("{0}")]
    Refused(String),
    /// Another migration is running, and has been for longer than one takes.
    #[error(
        "another migration of this database has been running for more than {} s: wait for it to end, or look for it in pg_stat_activity",
        TURN_TIMEOUT.as_secs()
    )]
    Busy,
    /// A migration failed; those before it stay applied, it itself left nothing behind.
    #[error("apply the migrations")]
    Apply(#[source] refinery::Error),
    /// A statement beside the migrations failed.
    #[error("{doing}")]
    Statement {
        /// What the statement was for.
        doing: &'static str,
        /// What the database said.
        #[source]
        source: tokio_postgres::Error,
    },
}

/// Applies what is missing, adopts rows that are there already, and sets the password of the operator's role if one is given.
///
/// `client` must be a session of its own (not a transaction pooler's) of a role that may create schemas and roles and owns
/// the app's table: on Supabase, `postgres`. Its settings are left changed; drop it afterwards.
///
/// # Errors
/// See [`Error`]; in each case running it again is safe.
pub async fn migrate(client: &mut Client, operator_password: Option<&str>) -> Result<Report, Error> {
    // Names are written out in full, so that no search path can lead a migration astray.
    run(
        client,
        "prepare the session",
        "set search_path = ''; set timezone = 'UTC'; set client_min_messages = warning; set statement_timeout = 0",
    )
    .await?;
    take_turn(client).await?;

    let done = in_turn(client, operator_password).await;

    // Best effort: the end of the session releases it too.
    if let Err(error) = client.execute("select pg_catalog.pg_advisory_unlock($1)", &[&TURN]).await {
        warn!(%error, "cannot release the migration lock; the end of the session will");
    }
    done
}

async fn take_turn(client: &Client) -> Result<(), Error> {
    let began = Instant::now();
    loop {
        // Asked again and again: a statement that waits for it would hold up the winner's `concurrently`, and it that.
        let taken = client.query_one("select pg_catalog.pg_try_advisory_lock($1)", &[&TURN]).await;
        if taken.map_err(statement("take turns with other migrations"))?.get(0) {
            return Ok(());
        }
        if began.elapsed() > TURN_TIMEOUT {
            return Err(Error::Busy);
        }
        tokio::time::sleep(PAUSE / 10).await;
    }
}

async fn in_turn(client: &mut Client, operator_password: Option<&str>) -> Result<Report, Error> {
    let (.., check) = CHECK;
    client
        .batch_execute(check)
        .await
        .map_err(|source| refusal(&source).unwrap_or(Error::Statement { doing: "check the app's table", source }))?;
    run(client, "prepare the session", &format!("set lock_timeout = '{LOCK_TIMEOUT}'")).await?;
    run(client, "create schema cyberdesk", "create schema if not exists cyberdesk").await?;

    let mut report = Report::default();
    for (version, step) in BEFOREHAND {
        let before = version.parse::<i64>().map(|version| version - 1).expect("a version is a number");
        report.applied.extend(apply(client, Target::Version(before)).await?);
        if !is_applied(client, version).await? {
            take(step, client).await?;
        }
    }
    report.applied.extend(apply(client, Target::Latest).await?);
    report.adopted_late = adopt_rows(client).await?;
    if let Some(password) = operator_password {
        set_password(client, password).await?;
    }
    info!(applied = ?report.applied, adopted_late = report.adopted_late, "the database has the operator's schema");
    Ok(report)
}

async fn is_applied(client: &Client, version: &str) -> Result<bool, Error> {
    let history = format!("select exists (select from {HISTORY} where version::text = $1)");
    Ok(client.query_one(&history, &[&version]).await.map_err(statement("read the history of migrations"))?.get(0))
}

async fn take(step: Step, client: &Client) -> Result<(), Error> {
    match step {
        Step::SetLiveRowsBack => set_live_rows_back(client).await,
        Step::BuildIndexes => build_indexes(client).await,
        Step::AdoptRows => adopt_rows(client).await.map(|_| ()),
    }
}

async fn set_live_rows_back(client: &Client) -> Result<(), Error> {
    // Looked for without a lock, then written by their key: who holds one is waited for alone.
    let doing = statement("set the app's live rows back");
    let wrong = "ended_at is not null and status in ('pending', 'running')";
    let found = client.query(&format!("select id from public.cyberdesk_instances where {wrong}"), &[]).await;
    let ids: Vec<Uuid> = found.map_err(&doing)?.iter().map(|row| row.get(0)).collect();
    let set_back = format!("update public.cyberdesk_instances set ended_at = null where id = any($1) and {wrong}");
    for ids in ids.chunks(BATCH as usize) {
        let mut tries = 0;
        while let Err(error) = client.execute(&set_back, &[&ids]).await {
            tries += 1;
            if !is_lock(&error) || tries == TRIES {
                return Err(doing(error));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
    Ok(())
}

async fn build_indexes(client: &Client) -> Result<(), Error> {
    let doing = "index the app's table";
    run(client, doing, &format!("set lock_timeout = '{INDEX_PATIENCE}'")).await?;
    // What a run that was interrupted left behind is there, but serves nobody.
    let unusable = "select indexrelid::regclass::text from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indexrelid
        where i.indrelid = 'public.cyberdesk_instances'::regclass and not i.indisvalid and c.relname like 'cyberdesk\\_instances\\_%'";
    for row in client.query(unusable, &[]).await.map_err(statement(doing))? {
        run(client, doing, &format!("drop index concurrently {}", row.get::<_, &str>(0))).await?;
    }
    for index in INDEXES.2.split(';').filter(|text| text.contains("create index")) {
        run(client, doing, &index.replace("create index", "create index concurrently")).await?;
    }
    run(client, doing, &format!("set lock_timeout = '{LOCK_TIMEOUT}'")).await
}

async fn adopt_rows(client: &Client) -> Result<i64, Error> {
    let mut all = 0;
    loop {
        let adopted = client.query_one("select cyberdesk.adopt_rows($1)", &[&BATCH]).await;
        match adopted.map_err(statement("adopt the app's rows"))?.get(0) {
            0 => return Ok(all),
            some => all += some,
        }
    }
}

/// The migrations as refinery takes them.
pub(super) fn migrations() -> Result<Vec<Migration>, refinery::Error> {
    MIGRATIONS.iter().map(|(version, name, text)| Migration::unapplied(&format!("V{version}__{name}"), text)).collect()
}

/// Lets refinery apply what its history lacks; again from there if the app's writers were in the way.
async fn apply(client: &mut Client, target: Target) -> Result<Vec<String>, Error> {
    let mut runner = Runner::new(&migrations().map_err(Error::Apply)?)
        .set_target(target)
        // A newer release may have been here; its schema serves this one too.
        .set_abort_missing(false);
    runner.set_migration_table_name(HISTORY);

    let mut applied = Vec::new();
    let mut tries = 0;
    loop {
        let (report, failure) = match runner.run_async(client).await {
            Ok(report) => (Some(report), None),
            Err(error) => (error.report().cloned(), Some(error)),
        };
        applied.extend(
            report
                .iter()
                .flat_map(|report| report.applied_migrations())
                .map(|migration| format!("{}_{}", migration.version(), migration.name())),
        );
        tries += 1;
        match failure {
            None => return Ok(applied),
            Some(error) if in_the_way(&error) && tries < TRIES => {
                warn!("the app's writers hold the table; trying again in a moment");
                tokio::time::sleep(PAUSE).await;
            }
            Some(error) => {
                return Err(cause(&error).and_then(refusal).unwrap_or(Error::Apply(error)));
            }
        }
    }
}

async fn set_password(client: &Client, password: &str) -> Result<(), Error> {
    // Hashed here: the statement may end up in the server's log. The hash holds no quote.
    let statement_text = format!("alter role cyberdesk_daemon password '{}'", scram_sha_256(password.as_bytes()));
    let mut tries = 0;
    loop {
        tries += 1;
        match client.batch_execute(&statement_text).await {
            // "tuple concurrently updated": roles are shared, and another database's migrate was at it.
            Err(error) if error.code() == Some(&SqlState::INTERNAL_ERROR) && tries < TRIES => {
                tokio::time::sleep(PAUSE / 10).await;
            }
            Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                return Err(Error::Refused(
                    "the password of the role cyberdesk_daemon was not set, for another administrator made that role; all else \
                     is done. Let them set it (alter role cyberdesk_daemon password '…'), or let them hand the role over (grant \
                     cyberdesk_daemon to postgres with admin option) and migrate again"
                        .to_owned(),
                ));
            }
            done => return done.map_err(statement("set the password of cyberdesk_daemon")),
        }
    }
}

async fn run(client: &Client, doing: &'static str, text: &str) -> Result<(), Error> {
    client.batch_execute(text).await.map_err(statement(doing))
}

fn statement(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> Error {
    move |source| Error::Statement { doing, source }
}

/// Our own refusals carry SQLSTATE `CD…` and are complete sentences: their text is all that a reader needs.
fn refusal(error: &tokio_postgres::Error) -> Option<Error> {
    let error = error.as_db_error()?;
    error.code().code().starts_with("CD").then(|| {
        let hint = error.hint().unwrap_or_default();
        Error::Refused(format!("{}. {hint}", error.message()).trim_end().to_owned())
    })
}

fn in_the_way(error: &refinery::Error) -> bool {
    cause(error).is_some_and(is_lock)
}

fn is_lock(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED].contains(code))
}

fn cause(error: &refinery::Error) -> Option<&tokio_postgres::Error> {
    match error.kind() {
        refinery::error::Kind::Connection(_, source) => source.downcast_ref(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file in `sql/` that is not listed would be applied by Supabase's tools and not by us.
    #[test]
    fn every_file_is_listed_in_order() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/sql");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .expect("sql/ is part of the repository")
            .map(|entry| {
                let name = entry.expect("sql/ is readable").file_name();
                name.to_string_lossy().into_owned()
            })
            .filter_map(|name| name.strip_suffix(".sql").map(str::to_owned))
            .collect();
        files.sort();
        let listed: Vec<String> = MIGRATIONS.iter().map(|(version, name, _)| format!("{version}_{name}")).collect();
        assert_eq!(files, listed);
    }
}
