//! How Postgres is reached: the URL, TLS, and time limits on everything.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use rustls::{ClientConfig, RootCertStore};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Config, Row};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Connections for statements: one for the write-back, one for reading changes, one for what else is asked.
/// LISTEN has one of its own: four in all.
const POOL_SIZE: usize = 3;
/// Longest wait for an answer. The server's own limits do not help where a pooler in between lost its server.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(15);

/// How to reach the database. Its `Debug` shows no password.
#[derive(Clone)]
pub struct Target {
    config: Config,
    tls: MakeRustlsConnect,
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
    /// Reads a URL as `psql` takes it.
    ///
    /// TLS is required, and certificate and host name verified, unless the host is this machine or the
    /// URL says `sslmode=disable`: there is never a downgrade to plain text that nobody asked for.
    /// `sslrootcert` names a file with the authority to trust besides the system's.
    ///
    /// # Errors
    ///
    /// If the URL cannot be read. The error never shows the URL, for it holds a password.
    pub fn from_url(url: &str) -> anyhow::Result<Self> {
        let (url, options) = split_options(url);
        let mut config: Config = url.parse().map_err(|error: tokio_postgres::Error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            anyhow::anyhow!("it is not a Postgres URL such as postgres://user:password@host:5432/postgres ({cause})")
        })?;
        if config.get_hosts().is_empty() {
            bail!("it names no host");
        }
        let local = config.get_hosts().iter().all(|host| match host {
            Host::Tcp(name) => ["localhost", "127.0.0.1", "::1"].contains(&name.as_str()),
            #[cfg(unix)]
            Host::Unix(_) => true,
        });
        config.ssl_mode(match options.ssl_mode.as_deref() {
            Some("disable") => SslMode::Disable,
            None if local => SslMode::Disable,
            None | Some("allow" | "prefer" | "require" | "verify-ca" | "verify-full") => SslMode::Require,
            Some(other) => {
                bail!("it has sslmode={other}; sslmode is disable, require or verify-full")
            }
        });
        config
            .application_name("cyberdesk-operator")
            .connect_timeout(Duration::from_secs(5))
            .keepalives_idle(Duration::from_secs(15))
            .keepalives_interval(Duration::from_secs(5))
            .keepalives_retries(3)
            .tcp_user_timeout(Duration::from_secs(20));
        Ok(Self { config, tls: MakeRustlsConnect::new(tls(options.ssl_root_cert.as_deref())?) })
    }

    /// A connection of its own, with the connection object that must be driven.
    ///
    /// # Errors
    ///
    /// If the database cannot be reached or refuses us.
    pub async fn connect(
        &self,
    ) -> Result<
        (
            tokio_postgres::Client,
            tokio_postgres::Connection<
                tokio_postgres::Socket,
                <MakeRustlsConnect as tokio_postgres::tls::MakeTlsConnect<tokio_postgres::Socket>>::Stream,
            >,
        ),
        tokio_postgres::Error,
    > {
        self.config.connect(self.tls.clone()).await
    }

    /// The pool for statements. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// Never, as long as its settings agree with each other.
    pub fn pool(&self) -> anyhow::Result<Pool> {
        // `Verified` asks before it hands a connection out: `Fast` hands out half-open ones.
        let manager = ManagerConfig { recycling_method: RecyclingMethod::Verified };
        Pool::builder(Manager::from_config(self.config.clone(), self.tls.clone(), manager))
            .max_size(POOL_SIZE)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(Duration::from_secs(2)))
            .create_timeout(Some(Duration::from_secs(5)))
            .recycle_timeout(Some(Duration::from_secs(2)))
            .build()
            .context("make a connection pool")
    }
}

/// A parameter of a statement, with its type.
pub(crate) type Param<'a> = (&'a (dyn ToSql + Sync), Type);

/// Runs one statement. It is unnamed (`query_typed`), so that a pooler in between does no harm.
pub(crate) async fn query(pool: &Pool, statement: &str, params: &[Param<'_>]) -> anyhow::Result<Vec<Row>> {
    let client = pool.get().await.context("take a connection")?;
    let answer = tokio::time::timeout(STATEMENT_DEADLINE, client.query_typed(statement, params)).await;
    match answer {
        Ok(Err(error)) if error.code() == Some(&SqlState::INVALID_SCHEMA_NAME) => Err(anyhow::Error::new(error)
            .context("the database has no schema of ours: run `cyberdesk-operator migrate` first")),
        Ok(answer) => Ok(answer?),
        Err(_) => {
            // It would keep the next statement waiting.
            drop(deadpool_postgres::Object::take(client));
            bail!("no answer within {} s", STATEMENT_DEADLINE.as_secs())
        }
    }
}

#[derive(Default)]
struct Options {
    ssl_mode: Option<String>,
    ssl_root_cert: Option<String>,
}

/// Takes out of the URL what the driver's parser refuses or does not know: TLS settings, which are ours
/// to decide, and what Supabase's dashboard adds for other drivers.
fn split_options(url: &str) -> (String, Options) {
    let mut options = Options::default();
    let Some((base, query)) = url.split_once('?') else {
        return (url.to_owned(), options);
    };
    let mut kept = vec![];
    for pair in query.split('&') {
        match pair.split_once('=') {
            Some(("sslmode", value)) => options.ssl_mode = Some(value.to_owned()),
            Some(("sslrootcert", value)) => options.ssl_root_cert = Some(value.replace("%2F", "/")),
            Some(("pgbouncer" | "gssencmode" | "supa" | "connection_limit", _)) => (),
            _ => kept.push(pair),
        }
    }
    let query = if kept.is_empty() { String::new() } else { format!("?{}", kept.join("&")) };
    (format!("{base}{query}"), options)
}

fn tls(authority: Option<&str>) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(file) = authority {
        use rustls::pki_types::CertificateDer;
        use rustls::pki_types::pem::PemObject;
        let certificates =
            CertificateDer::pem_file_iter(file).with_context(|| format!("its sslrootcert {file} cannot be read"))?;
        for certificate in certificates {
            roots.add(certificate.with_context(|| format!("its sslrootcert {file} holds no certificates in PEM"))?)?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_is_required_unless_the_host_is_here_or_the_url_says_otherwise() {
        let mode = |url: &str| Target::from_url(url).expect(url).config.get_ssl_mode();
        assert_eq!(mode("postgres://u@db.example.com/postgres"), SslMode::Require);
        assert_eq!(mode("postgres://u@db.example.com/postgres?sslmode=prefer"), SslMode::Require);
        assert_eq!(mode("postgres://u@db.example.com/postgres?sslmode=disable"), SslMode::Disable);
        assert_eq!(mode("postgres://u@127.0.0.1:5432/postgres"), SslMode::Disable);
        assert_eq!(mode("postgres://u@127.0.0.1:5432/postgres?sslmode=verify-full&pgbouncer=true"), SslMode::Require);
    }

    #[test]
    fn an_unreadable_url_is_refused_without_showing_it() {
        for url in ["postgres://u:geheim@", "mysql://u:geheim@h/d", "postgres://u:geheim@h/d?sslmode=maybe"] {
            let message = format!("{:#}", Target::from_url(url).expect_err(url));
            assert!(!message.contains("geheim"), "{message}");
        }
        let shown = format!("{:?}", Target::from_url("postgres://u:geheim@h/d").expect("a URL"));
        assert!(!shown.contains("geheim"), "{shown}");
    }
}
