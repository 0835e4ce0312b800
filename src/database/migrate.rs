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
use refinery::{Migration, Runner};
use tokio_postgres::{Client, error::SqlState};
use tracing::{info, warn};

/// Every migration, oldest first: version and name as in its file's name, and its text.
pub const MIGRATIONS: &[(&str, &str, &str)] = &[
    CHECK,
    ("20261123000200", "tables", include_str!("../../sql/20261123000200_tables.sql")),
    ("20261123000300", "triggers", include_str!("../../sql/20261123000300_triggers.sql")),
    ("20261123000400", "adopt_rows", include_str!("../../sql/20261123000400_adopt_rows.sql")),
    ("20261123000500", "operator_functions", include_str!("../../sql/20261123000500_operator_functions.sql")),
    ("20261123000600", "app_functions", include_str!("../../sql/20261123000600_app_functions.sql")),
    ("20261124000100", "settings", include_str!("../../sql/20261124000100_settings.sql")),
    ("20261124000110", "history_tables", include_str!("../../sql/20261124000110_history_tables.sql")),
    ("20261124000120", "limits_and_history", include_str!("../../sql/20261124000120_limits_and_history.sql")),
    ("20261124000125", "erase_users", include_str!("../../sql/20261124000125_erase_users.sql")),
    ("20261124000130", "operator_functions", include_str!("../../sql/20261124000130_operator_functions.sql")),
    ("20261124000140", "more_app_functions", include_str!("../../sql/20261124000140_more_app_functions.sql")),
];

/// The first migration changes nothing, it only refuses. It is run on its own before all else, each time.
const CHECK: (&str, &str, &str) =
    ("20261123000100", "check_the_apps_table", include_str!("../../sql/20261123000100_check_the_apps_table.sql"));

/// In the private schema: in `public`, PostgREST would show it to the world.
const HISTORY: &str = "cyberdesk.refinery_schema_history";

/// Session lock under which migrations take turns ("cyberdsk" in ASCII). refinery itself has none.
const TURN: i64 = 0x6379_6265_7264_736b;

/// How long one migration waits for another. A migration takes seconds; one that takes a minute needs a person.
const TURN_TIMEOUT: &str = "60s";

/// How long one statement waits for the app's writers. While it waits for the whole table, new writers queue behind it,
/// so this is also the longest pause that we cause them.
const LOCK_TIMEOUT: &str = "1s";

/// Tries per migration when the app's writers do not let go, with a pause in which they go on. Together about a minute.
const TRIES: u32 = 30;
const PAUSE: Duration = Duration::from_millis(500);

/// Rows adopted in one transaction; their locks are held for some milliseconds.
const ADOPT_BATCH: i64 = 5_000;

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
    #[error("wait for another migration of this database to end")]
    Busy(#[source] tokio_postgres::Error),
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
    run(client, "prepare the session", &format!("set lock_timeout = '{TURN_TIMEOUT}'")).await?;
    client.execute("select pg_catalog.pg_advisory_lock($1)", &[&TURN]).await.map_err(Error::Busy)?;

    let done = in_turn(client, operator_password).await;

    // Best effort: the end of the session releases it too.
    if let Err(error) = client.execute("select pg_catalog.pg_advisory_unlock($1)", &[&TURN]).await {
        warn!(%error, "cannot release the migration lock; the end of the session will");
    }
    done
}

async fn in_turn(client: &mut Client, operator_password: Option<&str>) -> Result<Report, Error> {
    let (.., check) = CHECK;
    client
        .batch_execute(check)
        .await
        .map_err(|source| refusal(&source).unwrap_or(Error::Statement { doing: "check the app's table", source }))?;
    run(client, "prepare the session", &format!("set lock_timeout = '{LOCK_TIMEOUT}'")).await?;
    run(client, "create schema cyberdesk", "create schema if not exists cyberdesk").await?;

    let mut report = Report { applied: apply(client).await?, adopted_late: 0 };
    loop {
        let adopted: i64 = client
            .query_one("select cyberdesk.adopt_rows($1)", &[&ADOPT_BATCH])
            .await
            .map_err(statement("adopt the app's rows"))?
            .get(0);
        if adopted == 0 {
            break;
        }
        report.adopted_late += adopted;
    }
    if let Some(password) = operator_password {
        set_password(client, password).await?;
    }
    info!(applied = ?report.applied, adopted_late = report.adopted_late, "the database has the operator's schema");
    Ok(report)
}

/// Lets refinery apply what its history lacks; again from there if the app's writers were in the way.
async fn apply(client: &mut Client) -> Result<Vec<String>, Error> {
    let migrations: Vec<Migration> = MIGRATIONS
        .iter()
        .map(|(version, name, text)| Migration::unapplied(&format!("V{version}__{name}"), text))
        .collect::<Result<_, _>>()
        .map_err(Error::Apply)?;
    let mut runner = Runner::new(&migrations)
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
    cause(error)
        .and_then(tokio_postgres::Error::code)
        .is_some_and(|code| [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED].contains(code))
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
