//! `DATABASE_URL`: what it says, in the driver's terms and in ours. Pure.
//!
//! People paste what Supabase's dashboard, an ORM's guide or another driver's page shows. What those URLs hold
//! besides is understood, translated or left out; what cannot be honoured is refused by name.

use anyhow::{Context, bail, ensure};
use percent_encoding::percent_decode_str;
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};

/// Supabase's transaction poolers, shared and dedicated, listen here.
const TRANSACTION_POOLER_PORT: u16 = 6543;
/// Hosts of Supabase's shared pooler end so.
const SHARED_POOLER: &str = ".pooler.supabase.com";
/// What dashboards and guides write where the password goes.
const PLACEHOLDERS: [&str; 6] =
    ["[YOUR-PASSWORD]", "[YOUR_PASSWORD]", "YOUR-PASSWORD", "YOUR_PASSWORD", "PASSWORD", "…"];
/// Parameters of other drivers, and of this one those that are ours to decide.
const LEFT_OUT: [&str; 18] = [
    "application_name",
    "connect_timeout",
    "connection_limit",
    "fallback_application_name",
    "gssencmode",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "pool_timeout",
    "prepare_threshold",
    "schema",
    "sslsni",
    "statement_cache_mode",
    "statement_cache_size",
    "supa",
    "tcp_user_timeout",
];

/// What is known of the way to the database from the URL alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Nothing in it speaks of a pooler.
    Direct,
    /// A pooler that gives each client a server of its own.
    SessionPooler,
    /// A pooler that gives out servers by the transaction: LISTEN succeeds there, and stays silent.
    TransactionPooler,
}

/// A connection URL that was read.
#[derive(Clone)]
pub(super) struct DatabaseUrl {
    /// For the driver. TLS is either required or off, never "if there is any".
    pub(super) config: Config,
    /// `sslrootcert`: a file with the authority to trust, or `system`.
    pub(super) authority: Option<String>,
    pub(super) route: Route,
    /// Something stands where the password goes, but only to say so.
    pub(super) has_placeholder: bool,
}

impl DatabaseUrl {
    /// Reads a URL. No message shows a part of it that may hold the password.
    pub(super) fn parse(url: &str) -> anyhow::Result<Self> {
        let url = url.trim();
        if url.starts_with("https://") || url.starts_with("http://") {
            bail!(
                "it is the URL of an API; the database's own begins with postgres:// (in Supabase's dashboard: Connect)"
            );
        }
        ensure!(
            url.starts_with("postgres://") || url.starts_with("postgresql://"),
            "it is not a Postgres URL such as postgres://user:password@host:5432/postgres"
        );
        check_escapes(url)?;
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        let mut options = Options::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            options.take(pair)?;
        }
        let mut config: Config =
            format!("{base}?{}", options.kept.join("&")).parse().map_err(|error: tokio_postgres::Error| {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                anyhow::anyhow!("it cannot be read: {cause}")
            })?;
        ensure!(!config.get_hosts().is_empty(), "it names no host");
        config.ssl_mode(if options.plain.unwrap_or_else(|| is_here(&config)) {
            SslMode::Disable
        } else {
            SslMode::Require
        });
        // Of several hosts the one that takes writes is meant; one alone is better read than not reached at all.
        let attributes = if options.primary || config.get_hosts().len() > 1 {
            TargetSessionAttrs::ReadWrite
        } else {
            TargetSessionAttrs::Any
        };
        config.target_session_attrs(attributes);
        let has_placeholder = config
            .get_password()
            .and_then(|password| std::str::from_utf8(password).ok())
            .is_some_and(|password| PLACEHOLDERS.contains(&password));
        let route = route(&config, options.pgbouncer);
        Ok(Self { config, authority: options.authority, route, has_placeholder })
    }

    /// What is likely to go wrong with it, in words for its owner.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = vec![];
        if self.route == Route::TransactionPooler {
            warnings.push(
                "DATABASE_URL seems to lead through a transaction pooler (port 6543, or pgbouncer=true), where \
                 notifications never arrive: use the direct connection or the session pooler, both on port 5432"
                    .to_owned(),
            );
        }
        let user = self.config.get_user().unwrap_or_default();
        let names_tenant = user.contains('.') || self.config.get_options().is_some_and(|it| it.contains("reference"));
        if hosts(&self.config).any(|host| host.ends_with(SHARED_POOLER)) && !names_tenant {
            warnings.push(format!(
                "DATABASE_URL leads through Supabase's pooler, which wants the project in the user's name: {user}.REF"
            ));
        }
        warnings
    }
}

#[derive(Default)]
struct Options {
    kept: Vec<String>,
    /// Whether it asks for plain text, if it says anything about that.
    plain: Option<bool>,
    authority: Option<String>,
    primary: bool,
    pgbouncer: bool,
}

impl Options {
    fn take(&mut self, pair: &str) -> anyhow::Result<()> {
        let (name, value) = pair.split_once('=').context("after its ? there is something without a value")?;
        let value = percent_decode_str(value).decode_utf8().with_context(|| format!("{name} is not text"))?;
        match (name, &*value) {
            ("sslmode", "disable") => self.plain = Some(true),
            ("sslmode", "allow" | "prefer" | "require" | "verify-ca" | "verify-full") | ("ssl", "true" | "1") => {
                self.plain = Some(false);
            }
            ("sslmode" | "ssl", other) => bail!(
                "it has {name}={other}; sslmode is disable, require or verify-full, and all but disable verify \
                 certificate and host name"
            ),
            ("sslrootcert", file) => self.authority = Some(file.to_owned()),
            ("sslcert" | "sslkey" | "sslpassword", _) => bail!("it has {name}: client certificates are not supported"),
            ("passfile", _) => bail!("it has passfile; name a file with the password in DATABASE_PASSWORD_FILE"),
            ("target_session_attrs", "any") => (),
            ("target_session_attrs", "read-write" | "primary") => self.primary = true,
            ("target_session_attrs", other) => {
                bail!("it has target_session_attrs={other}; it must be read-write, primary or any: this program writes")
            }
            ("pgbouncer", said) => self.pgbouncer = said == "true",
            (name, _) if LEFT_OUT.contains(&name) => (),
            _ => self.kept.push(pair.to_owned()),
        }
        Ok(())
    }
}

/// A password pasted as it is: whatever is read then would be read wrongly.
fn check_escapes(url: &str) -> anyhow::Result<()> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let elsewhere = rest.contains('@') && !rest.contains("user=");
    ensure!(
        authority.matches('@').count() == 1 || (!authority.contains('@') && !elsewhere),
        "its password holds a character that a URL reads differently: write @ as %40, / as %2F, ? as %3F, # as %23, \
         % as %25"
    );
    Ok(())
}

fn hosts(config: &Config) -> impl Iterator<Item = &str> {
    config.get_hosts().iter().filter_map(|host| match host {
        Host::Tcp(name) => Some(name.as_str()),
        #[cfg(unix)]
        Host::Unix(_) => None,
    })
}

/// Whether all hosts are this machine. A host name with an address of its own (`hostaddr`) is taken at its word.
pub(super) fn is_here(config: &Config) -> bool {
    hosts(config).all(|host| ["localhost", "127.0.0.1", "::1"].contains(&host))
        && config.get_hostaddrs().iter().all(std::net::IpAddr::is_loopback)
}

fn route(config: &Config, pgbouncer: bool) -> Route {
    if pgbouncer || config.get_ports().contains(&TRANSACTION_POOLER_PORT) {
        Route::TransactionPooler
    } else if hosts(config).any(|host| host.ends_with(SHARED_POOLER)) {
        Route::SessionPooler
    } else {
        Route::Direct
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> DatabaseUrl {
        DatabaseUrl::parse(url).unwrap_or_else(|error| panic!("{url}: {error:#}"))
    }

    fn refused(url: &str) -> String {
        let error = DatabaseUrl::parse(url).err().unwrap_or_else(|| panic!("{url} is taken"));
        format!("{error:#}")
    }

    /// As the dashboard's "Connect" shows them, in all its tabs.
    #[test]
    fn supabases_urls_are_read_as_they_are_copied() {
        let direct = "postgresql://postgres:geheim@db.abcdefghijklmnopqrst.supabase.co:5432/postgres";
        let session =
            "postgresql://postgres.abcdefghijklmnopqrst:geheim@aws-0-eu-central-1.pooler.supabase.com:5432/postgres";
        let transaction =
            "postgres://cyberdesk_daemon.abcdefghijklmnopqrst:geheim@aws-1-us-east-1.pooler.supabase.com:6543/postgres";
        let dedicated = "postgres://postgres:geheim@db.abcdefghijklmnopqrst.supabase.co:6543/postgres";
        for (url, user, route) in [
            (direct.to_owned(), "postgres", Route::Direct),
            (format!("{direct}?sslmode=require"), "postgres", Route::Direct),
            (format!("{direct}?sslmode=verify-full&sslrootcert=%2Fetc%2Fprod-ca-2021.crt"), "postgres", Route::Direct),
            (session.to_owned(), "postgres.abcdefghijklmnopqrst", Route::SessionPooler),
            (format!("{session}?supa=base-pooler.x"), "postgres.abcdefghijklmnopqrst", Route::SessionPooler),
            (format!("{session}?pgbouncer=true"), "postgres.abcdefghijklmnopqrst", Route::TransactionPooler),
            (transaction.to_owned(), "cyberdesk_daemon.abcdefghijklmnopqrst", Route::TransactionPooler),
            (
                format!("{transaction}?pgbouncer=true&connection_limit=1"),
                "cyberdesk_daemon.abcdefghijklmnopqrst",
                Route::TransactionPooler,
            ),
            (dedicated.to_owned(), "postgres", Route::TransactionPooler),
        ] {
            let seen = read(&url);
            assert_eq!((seen.config.get_user(), seen.route), (Some(user), route), "{url}");
            assert_eq!(seen.config.get_password(), Some(&b"geheim"[..]), "{url}");
            assert_eq!(seen.config.get_dbname(), Some("postgres"), "{url}");
            assert_eq!(seen.config.get_ssl_mode(), SslMode::Require, "{url}");
        }
        let with_authority = read(&format!("{direct}?sslrootcert=%2Fetc%2Fprod-ca-2021.crt"));
        assert_eq!(with_authority.authority.as_deref(), Some("/etc/prod-ca-2021.crt"));
    }

    #[test]
    fn tls_is_required_unless_the_host_is_here_or_the_url_says_otherwise() {
        for (url, mode) in [
            ("postgres://u@db.example.com/postgres", SslMode::Require),
            ("postgres://u@db.example.com/postgres?sslmode=prefer", SslMode::Require),
            ("postgres://u@db.example.com/postgres?ssl=true", SslMode::Require),
            ("postgres://u@db.example.com/postgres?sslmode=disable", SslMode::Disable),
            ("postgres://u@db.example.com/postgres?hostaddr=127.0.0.1", SslMode::Require),
            ("postgres://u@db.example.com,localhost/postgres", SslMode::Require),
            ("postgres://u@127.0.0.1:5432/postgres", SslMode::Disable),
            ("postgres://u@[::1]/postgres", SslMode::Disable),
            ("postgres://u@%2Fvar%2Frun%2Fpostgresql/postgres", SslMode::Disable),
            ("postgres://u@127.0.0.1:5432/postgres?sslmode=verify-full&pgbouncer=true", SslMode::Require),
        ] {
            assert_eq!(read(url).config.get_ssl_mode(), mode, "{url}");
        }
    }

    #[test]
    fn hosts_are_read_in_every_form() {
        let hosts_of = |url: &str| {
            let seen = read(url);
            let names: Vec<String> = hosts(&seen.config).map(str::to_owned).collect();
            (names.join(" "), seen.config.get_ports().to_vec(), seen.config.get_target_session_attrs())
        };
        for (url, names, ports, attributes) in [
            ("postgres://u@h/d", "h", vec![5432], TargetSessionAttrs::Any),
            (
                "postgres://u@[2a05:d014::1f]:5433/d?target_session_attrs=any",
                "2a05:d014::1f",
                vec![5433],
                TargetSessionAttrs::Any,
            ),
            ("postgres://u@a:1,b:2,[::2]:3/d", "a b ::2", vec![1, 2, 3], TargetSessionAttrs::ReadWrite),
            ("postgres://u@h/d?target_session_attrs=primary", "h", vec![5432], TargetSessionAttrs::ReadWrite),
            ("postgres://u@h/d?target_session_attrs=read-write", "h", vec![5432], TargetSessionAttrs::ReadWrite),
        ] {
            assert_eq!(hosts_of(url), (names.to_owned(), ports, attributes), "{url}");
        }
    }

    #[test]
    fn escapes_in_a_password_are_read_and_unescaped_ones_are_told() {
        let seen = read("postgres://u:p%40ss%2Fw%3For%23d%25@h/d?options=reference%3Dabc");
        assert_eq!(seen.config.get_password(), Some(&b"p@ss/w?or#d%"[..]));
        assert_eq!(seen.config.get_options(), Some("reference=abc"));
        for url in ["postgres://u:p@ss@h/d", "postgres://u:p/ss@h/d", "postgres://u:p?ss@h/d"] {
            assert!(refused(url).contains("%40"), "{}", refused(url));
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for (url, words) in [
            ("https://abcdefghijklmnopqrst.supabase.co", "URL of an API"),
            ("host=h user=u password=geheim", "not a Postgres URL"),
            ("mysql://u:geheim@h/d", "not a Postgres URL"),
            ("postgres://u:geheim@", "no host"),
            ("postgres://u:geheim@h:port/d", "port"),
            ("postgres://u:geheim@h/d?sslmode=maybe", "sslmode=maybe"),
            ("postgres://u:geheim@h/d?sslmode=no-verify", "sslmode=no-verify"),
            ("postgres://u:geheim@h/d?sslkey=x", "client certificates"),
            ("postgres://u:geheim@h/d?passfile=x", "DATABASE_PASSWORD_FILE"),
            ("postgres://u:geheim@h/d?target_session_attrs=standby", "standby"),
            ("postgres://u:geheim@h/d?colour=red", "colour"),
            ("postgres://u:geheim@h/d?channel_binding=maybe", "channel_binding"),
        ] {
            let message = refused(url);
            assert!(message.contains(words), "{url}: {message}");
            assert!(!message.contains("geheim"), "{message}");
        }
    }

    #[test]
    fn a_placeholder_is_seen_in_the_place_of_the_password() {
        for (password, placeholder) in [
            ("[YOUR-PASSWORD]", true),
            ("%5BYOUR-PASSWORD%5D", true),
            ("YOUR_PASSWORD", true),
            ("%E2%80%A6", true),
            ("password", false),
            ("[geheim]", false),
        ] {
            let url = format!("postgresql://postgres:{password}@db.x.supabase.co:5432/postgres");
            assert_eq!(read(&url).has_placeholder, placeholder, "{password}");
        }
    }

    #[test]
    fn what_is_likely_to_go_wrong_is_told_early() {
        let warnings = |url: &str| read(url).warnings().join(" ");
        assert!(warnings("postgres://u@h:6543/d").contains("port 5432"));
        assert!(warnings("postgres://u@h/d?pgbouncer=true").contains("transaction pooler"));
        assert!(warnings("postgres://u@aws-0-x.pooler.supabase.com/d").contains("u.REF"));
        assert_eq!(warnings("postgres://u.ref@aws-0-x.pooler.supabase.com/d"), "");
        assert_eq!(warnings("postgres://u@aws-0-x.pooler.supabase.com/d?options=reference%3Dref"), "");
        assert_eq!(warnings("postgres://u@h/d"), "");
    }
}
