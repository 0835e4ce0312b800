//! The command line: one binary, a subcommand for each task.

#![expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]

mod render;

use std::ffi::OsString;
use std::fs;
use std::future::poll_fn;
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use clap::{Parser, Subcommand};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::signal::unix::{SignalKind, signal};
use tokio_postgres::AsyncMessage;
use tracing::warn;

use crate::config::Config;
use crate::database::connect::Target;
use crate::{crd, database, operator, telemetry};

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
    /// Print the CustomResourceDefinition.
    Crd,
}

/// Runs the program with these arguments, the first of which is its name.
///
/// # Errors
///
/// If the command failed. The error says what to do.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<()> {
    let arguments = Arguments::parse_from(arguments);
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime");
    match arguments.command {
        Command::Run => {
            read_dotenv()?;
            // A variable that is not text is none of ours.
            let text =
                |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
            let (config, warnings) = Config::read(std::env::vars_os().filter_map(text))?;
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
            let password = daemon_password_file
                .map(|file| {
                    fs::read_to_string(&file).with_context(|| format!("read the password in {}", file.display()))
                })
                .transpose()?;
            runtime()?.block_on(migrate(password.as_deref().map(str::trim_end)))
        }
        Command::Render(render) => render.run(),
        Command::Crd => {
            print!("{}", serde_saphyr::to_string(&crd::definition())?);
            Ok(())
        }
    }
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
    let target = Target::from_url(&url).context("DATABASE_URL")?;
    let (mut client, connection) = target.connect().await.context("connect to the database")?;
    let connection = tokio::spawn(show_warnings(connection));
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
