//! The command line: one binary, a subcommand for each task.

#![expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]

mod adopt;
mod diff;
mod render;
mod status;

use std::ffi::OsString;
use std::future::poll_fn;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail, ensure};
use clap::{Parser, Subcommand};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::signal::unix::{SignalKind, signal};
use tokio_postgres::AsyncMessage;
use tracing::warn;

use crate::config::Config;
use crate::database::connect::{Target, read_password, share_a_server};
use crate::doctor::{self, Verdict};
use crate::{cluster, crd, database, operator, telemetry};

/// Keeps a fleet of virtual desktops true to a Postgres table.
///
/// Settings are environment variables (see README.md, "Configuration"); a file .env in the current
/// folder is read too.
#[derive(Debug, Parser)]
#[command(name = "cyberdesk-operator", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon.
    Run,
    /// Bring the database to the schema of this version.
    ///
    /// DATABASE_URL is that of the owner of the schema here (on Supabase: the role postgres), not the daemon's.
    Migrate {
        /// A file with the password to give to the daemon's role, cyberdesk_daemon. Without it the role
        /// keeps the password that it has; a new role has none, and cannot log in by password.
        #[arg(long, value_name = "FILE")]
        daemon_password_file: Option<PathBuf>,
        /// Touch no database: write the migrations into this folder, for Supabase's tools (supabase/migrations).
        /// They record themselves, so that migrate and `supabase db push` may follow each other.
        #[arg(long, value_name = "DIR", conflicts_with = "daemon_password_file")]
        export: Option<PathBuf>,
    },
    /// Print the manifests that a row would get, and what is wrong with the templates.
    ///
    /// It needs neither a cluster nor a database.
    Render(render::Render),
    /// Look for what is wrong, say why it matters and what mends it. Nothing is changed.
    ///
    /// Run it with the daemon's own settings; what its role may not look at is said. The exit code is 0 if no check
    /// failed, warnings or not, and 1 if one did.
    Doctor {
        /// For programs: an object with the list of findings.
        #[arg(long)]
        json: bool,
    },
    /// Show the fleet on one screen: by phase and reason, who leads, what waits and what ends next.
    ///
    /// With an ID, tell one desktop's whole story: what became of its row, its Events and conditions on one time
    /// line, and what is awaited now. Nothing is changed.
    Status(status::Status),
    /// Show each desktop about which row, Cyberdesk and VM disagree, and what the daemon would do. Nothing is done.
    Diff(diff::Diff),
    /// Take over what the Kopf operator before this one made, without a restart of any VM.
    ///
    /// Without --yes nothing is done, and what would be done is told.
    Adopt(adopt::Adopt),
    /// Print the CustomResourceDefinition.
    Crd,
}

/// Runs the program with these arguments, the first of which is its name. Answers the exit code.
///
/// # Errors
///
/// If the command failed. The error says what to do.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse_from(arguments);
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime");
    match arguments.command {
        Command::Run => {
            read_dotenv()?;
            let (config, warnings) = Config::read(variables())?;
            telemetry::start(&config.logging.filter, config.logging.format)?;
            warnings.iter().for_each(|warning| warn!("{warning}"));
            runtime()?.block_on(async { operator::run(config, told_to_stop()?).await })
        }
        Command::Migrate { export: Some(folder), .. } => {
            database::export::export(&folder)?.iter().for_each(|file| println!("{}", file.display()));
            Ok(())
        }
        Command::Migrate { daemon_password_file, export: None } => {
            read_dotenv()?;
            let password = daemon_password_file.map(|file| read_password(&file)).transpose()?;
            runtime()?.block_on(migrate(password.as_deref()))
        }
        Command::Doctor { json } => {
            read_dotenv()?;
            let report = runtime()?.block_on(async { doctor::examine(variables(), cluster::connect().await).await });
            match json {
                true => println!("{}", serde_json::to_string_pretty(&report)?),
                false => print!("{report}"),
            }
            let failed = report.count(Verdict::Failure);
            ensure!(failed == 0, "{failed} of the checks failed");
            Ok(())
        }
        Command::Render(render) => render.run(),
        Command::Status(status) => {
            read_dotenv()?;
            return runtime()?.block_on(status.run())?.show();
        }
        Command::Diff(diff) => {
            read_dotenv()?;
            return runtime()?.block_on(diff.run())?.show();
        }
        Command::Adopt(adopt) => {
            read_dotenv()?;
            return runtime()?.block_on(adopt.run())?.show();
        }
        Command::Crd => {
            print!("{}", serde_saphyr::to_string(&crd::definition())?);
            Ok(())
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

/// What a command prints, and the code that it exits with.
struct Shown {
    text: String,
    code: u8,
}

impl Shown {
    fn show(self) -> anyhow::Result<ExitCode> {
        print!("{}", self.text);
        Ok(ExitCode::from(self.code))
    }
}

/// The environment. A variable that is not text is none of ours.
fn variables() -> Vec<(String, String)> {
    let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    std::env::vars_os().filter_map(text).collect()
}

/// Reads `.env` of the current folder, if there is one.
fn read_dotenv() -> anyhow::Result<()> {
    match dotenvy::dotenv() {
        Ok(_) => Ok(()),
        Err(error) if error.not_found() => Ok(()),
        // The line itself may hold a password.
        Err(dotenvy::Error::LineParse(_, column)) => bail!("read .env: a line cannot be read, at its column {column}"),
        Err(error) => Err(error).context("read .env"),
    }
}

async fn migrate(daemon_password: Option<&str>) -> anyhow::Result<()> {
    let url = std::env::var("DATABASE_URL").map_err(|_| {
        anyhow!("DATABASE_URL is not set; for migrate it is the URL of the schema's owner, such as postgres://postgres:PASSWORD@HOST:5432/postgres")
    })?;
    let password_file = std::env::var_os("DATABASE_PASSWORD_FILE").filter(|file| !file.is_empty()).map(PathBuf::from);
    let target = Target::from_url(&url, password_file).context("DATABASE_URL")?;
    let (mut client, connection) = target.connect().await.context("connect to the database")?;
    let connection = tokio::spawn(show_warnings(connection));
    refuse_transaction_pooler(&target, &client).await?;
    let report = database::migrate::migrate(&mut client, daemon_password).await?;
    drop(client);
    connection.await??;
    match report.applied.as_slice() {
        [] => println!("the database is up to date"),
        applied => println!("applied: {}", applied.join(", ")),
    }
    Ok(())
}

/// Drives a connection, and shows what the database warns of meanwhile.
async fn show_warnings<S, T>(mut connection: tokio_postgres::Connection<S, T>) -> Result<(), tokio_postgres::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await.transpose()? {
        if let AsyncMessage::Notice(notice) = message {
            eprintln!("{}: {}", notice.severity().to_lowercase(), notice.message());
        }
    }
    Ok(())
}

/// A migration spans statements and transactions: its lock and its settings would be lost between them.
async fn refuse_transaction_pooler(target: &Target, client: &tokio_postgres::Client) -> anyhow::Result<()> {
    let (second, connection) = target.connect().await.context("connect to the database")?;
    let connection = tokio::spawn(connection);
    let shared = share_a_server(client, &second).await.context("look for a pooler in between")?;
    drop(second);
    connection.await??;
    ensure!(
        !shared,
        "DATABASE_URL leads through a transaction pooler, through which nothing can be migrated: use the direct \
         connection or the session pooler (on Supabase both on port 5432)"
    );
    Ok(())
}

/// Resolves at the first SIGTERM or Ctrl-C.
fn told_to_stop() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = interrupt.recv() => (),
        }
    })
}
