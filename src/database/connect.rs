//! How Postgres is reached: one target, a small pool, and time limits on everything.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use deadpool_postgres::{Connect, HookError, Manager, ManagerConfig, Pool, PoolError, RecyclingMethod, Runtime};
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Config, Connection, Row, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::{debug, warn};

use super::bond::Expected;
pub use super::url::Route;
use super::url::{DatabaseUrl, is_here};
use super::{advice, tls};
use crate::metrics;

/// Connections for statements: one for the write-back, one for reading changes, one for what else is asked.
/// LISTEN has one of its own: four in all.
const POOL_SIZE: usize = 3;
/// Longest time for one host to take a connection, and for the server behind it to let us in.
const CONNECT: Duration = Duration::from_secs(3);
const ANSWER: Duration = Duration::from_secs(2);
/// Longest wait for an answer. The server's own limits do not help where a pooler in between lost its server.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(15);
/// How often two connections are compared before they are taken to have servers of their own.
const COMPARISONS: usize = 3;

/// How to reach the database. Its `Debug` shows no password.
#[derive(Clone)]
pub struct Target {
    config: Config,
    tls: MakeRustlsConnect,
    password_file: Option<PathBuf>,
    route: Route,
    warnings: Vec<String>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target")
            .field("hosts", &self.config.get_hosts())
            .field("dbname", &self.config.get_dbname())
            .finish_non_exhaustive()
    }
}

impl Target {
    /// Reads a URL as it is copied from Supabase's dashboard, or as `psql` takes it.
    ///
    /// TLS is required, and certificate and host name verified, unless the host is this machine or the
    /// URL says `sslmode=disable`: there is never a downgrade to plain text that nobody asked for.
    /// `sslrootcert` names a file with the authority to trust in place of the system's.
    ///
    /// The password in `password_file` goes before that in the URL, and is read again for each new connection.
    ///
    /// # Errors
    ///
    /// If the URL cannot be read or honoured, or the file cannot be read. The error never shows the URL, for it
    /// holds a password.
    pub fn from_url(url: &str, password_file: Option<PathBuf>) -> anyhow::Result<Self> {
        let mut url = DatabaseUrl::parse(url)?;
        match &password_file {
            Some(file) => drop(url.config.password(read_password(file)?)),
            None => ensure!(
                !url.has_placeholder,
                "it still holds a placeholder where the password goes; put the password there, percent-escaped, or \
                 its file's name into DATABASE_PASSWORD_FILE"
            ),
        }
        url.config
            .application_name("cyberdesk-operator")
            .connect_timeout(CONNECT)
            .keepalives_idle(Duration::from_secs(15))
            .keepalives_interval(Duration::from_secs(5))
            .keepalives_retries(3)
            .tcp_user_timeout(Duration::from_secs(20));
        let tls = MakeRustlsConnect::new(tls::client_config(url.authority.as_deref())?);
        Ok(Self { warnings: url.warnings(), route: url.route, config: url.config, tls, password_file })
    }

    /// What is likely to go wrong, as far as the URL shows it.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The way to the database, as far as the URL shows it.
    pub fn route(&self) -> Route {
        self.route
    }

    /// Whether the database is on this machine.
    pub(crate) fn is_here(&self) -> bool {
        is_here(&self.config)
    }

    /// What the driver makes of the URL.
    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// How long it may take to connect. The driver tries one host after the other, of which all but the last may
    /// be gone so that nobody answers.
    pub(crate) fn connects_within(&self) -> Duration {
        let hosts = u32::try_from(self.config.get_hosts().len()).unwrap_or(1);
        ANSWER + CONNECT.saturating_mul(hosts)
    }

    /// A connection of its own, with the connection object that must be driven.
    ///
    /// # Errors
    ///
    /// If the database cannot be reached or refuses us. The error says what to do, where that is known.
    pub async fn connect(&self) -> anyhow::Result<(Client, Connection<Socket, TlsStream>)> {
        self.try_connect().await.map_err(advice::with_advice)
    }

    async fn try_connect(&self) -> Result<(Client, Connection<Socket, TlsStream>), tokio_postgres::Error> {
        let Some(file) = &self.password_file else {
            return self.config.connect(self.tls.clone()).await;
        };
        let mut config = self.config.clone();
        match read_password(file) {
            Ok(password) => drop(config.password(password)),
            Err(error) => {
                warn!(error = %crate::telemetry::chain(error.as_ref()), "using the password that was read at start");
            }
        }
        config.connect(self.tls.clone()).await
    }

    /// The pool for statements, all to the database that is expected. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// Never, as long as its settings agree with each other.
    pub fn pool(&self, expected: &Arc<Expected>) -> anyhow::Result<Pool> {
        // `Verified` asks before it hands a connection out: `Fast` hands out half-open ones.
        let manager = ManagerConfig { recycling_method: RecyclingMethod::Verified };
        Pool::builder(Manager::from_connect(self.config.clone(), self.clone(), manager))
            .max_size(POOL_SIZE)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(Duration::from_secs(2)))
            .create_timeout(Some(self.connects_within()))
            .recycle_timeout(Some(Duration::from_secs(2)))
            .post_create(expected.hook())
            .pre_recycle(expected.no_older())
            .build()
            .context("make a connection pool")
    }
}

type TlsStream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;
type Connected = Result<(Client, JoinHandle<()>), tokio_postgres::Error>;

/// The pool connects as everything does: with the password that holds now.
impl Connect for Target {
    fn connect(&self, _: &Config) -> Pin<Box<dyn Future<Output = Connected> + Send + '_>> {
        Box::pin(async move {
            let (client, connection) = self.try_connect().await?;
            let driver = tokio::spawn(async move {
                // Whoever uses the connection next is told, and tells it in full.
                if let Err(error) = connection.await {
                    debug!(%error, "a connection to the database broke");
                }
            });
            Ok((client, driver))
        })
    }
}

/// The password in a file, as an editor or a mounted Secret leaves it: without the end of its line.
pub(crate) fn read_password(file: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read the password in {}", file.display()))?;
    let password = text.trim_end_matches(['\r', '\n']);
    ensure!(!password.is_empty(), "{} holds no password", file.display());
    Ok(password.to_owned())
}

/// Whether two connections are given one server process between them: the mark of a transaction pooler.
pub(crate) async fn share_a_server(one: &Client, other: &Client) -> Result<bool, tokio_postgres::Error> {
    for _ in 0..COMPARISONS {
        let (first, second, again) = (server_of(one).await?, server_of(other).await?, server_of(one).await?);
        if first == second || first != again {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn server_of(client: &Client) -> Result<Option<i32>, tokio_postgres::Error> {
    let rows = client.query_typed("select pg_catalog.pg_backend_pid()", &[]).await?;
    rows.first().map(|row| row.try_get(0)).transpose()
}

/// A parameter of a statement, with its type.
pub(crate) type Param<'a> = (&'a (dyn ToSql + Sync), Type);

/// Runs one statement. It is unnamed (`query_typed`), so that a pooler in between does no harm.
pub(crate) async fn query(pool: &Pool, statement: &str, params: &[Param<'_>]) -> anyhow::Result<Vec<Row>> {
    let answer = try_query(pool, statement, params).await;
    metrics::stated(statement, answer.is_ok());
    answer
}

async fn try_query(pool: &Pool, statement: &str, params: &[Param<'_>]) -> anyhow::Result<Vec<Row>> {
    let client = pool.get().await.map_err(no_connection)?;
    let answer = ask(&client, statement, params).await;
    if answer.as_ref().is_err_and(|error| error.is::<NoAnswer>()) {
        // It would keep the next statement waiting.
        drop(deadpool_postgres::Object::take(client));
    }
    answer
}

/// The same on a connection of one's own. One that gives no answer is of no use any more.
pub(crate) async fn ask(client: &Client, statement: &str, params: &[Param<'_>]) -> anyhow::Result<Vec<Row>> {
    match tokio::time::timeout(STATEMENT_DEADLINE, client.query_typed(statement, params)).await {
        Ok(Err(error)) if error.code() == Some(&SqlState::INVALID_SCHEMA_NAME) => Err(anyhow::Error::new(error)
            .context("the database has no schema of ours: run `cyberdesk-operator migrate` first")),
        Ok(answer) => Ok(answer?),
        Err(_) => bail!(NoAnswer),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("no answer within {} s", STATEMENT_DEADLINE.as_secs())]
struct NoAnswer;

fn no_connection(error: PoolError) -> anyhow::Error {
    match error {
        PoolError::Backend(error) => advice::with_advice(error),
        PoolError::PostCreateHook(HookError::Message(words)) => anyhow::Error::msg(words),
        other => other.into(),
    }
    .context("take a connection")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_password_is_ever_shown() {
        for url in ["postgres://u:geheim@", "mysql://u:geheim@h/d", "postgres://u:geheim@h/d?sslmode=maybe"] {
            let message = format!("{:#}", Target::from_url(url, None).expect_err(url));
            assert!(!message.contains("geheim"), "{message}");
        }
        let shown = format!("{:?}", Target::from_url("postgres://u:geheim@h/d", None).expect("a URL"));
        assert!(!shown.contains("geheim"), "{shown}");
    }

    #[test]
    fn a_placeholder_needs_a_file_that_holds_the_password() {
        let url = "postgresql://postgres:[YOUR-PASSWORD]@db.x.supabase.co:5432/postgres";
        let message = format!("{:#}", Target::from_url(url, None).expect_err("no password"));
        assert!(message.contains("placeholder") && message.contains("DATABASE_PASSWORD_FILE"), "{message}");

        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("password");
        std::fs::write(&file, "geheim\n").expect("write it");
        let target = Target::from_url(url, Some(file.clone())).expect("with a file");
        assert_eq!(target.config.get_password(), Some(&b"geheim"[..]));

        std::fs::write(&file, "\n").expect("write it");
        assert!(Target::from_url(url, Some(file)).is_err(), "an empty file is no password");
        assert!(Target::from_url(url, Some(folder.path().join("none"))).is_err(), "nor is none");
    }
}
