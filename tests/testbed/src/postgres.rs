//! A real Postgres with the parts of Supabase that matter, and a database per test.
//!
//! The cluster's superuser is called `supabase_admin`, as on the hosted platform, so that `postgres` can be what it
//! is there: a role that owns the database but is no superuser. `postgres/supabase.sql` makes the
//! rest once, in a template; a migrated template is made from it; a test's database is a copy of one, which takes
//! 0.1 s.
//!
//! Nothing is flushed to disk, for data lives as long as the testbed. It survives a killed server all the same: what
//! is committed has been handed to the system by then.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

use crate::account::Account;
use crate::control_plane::Identity;
use crate::progress::Part;
use crate::scratch::{Scratch, free_port};
use crate::supervise::{Program, Signal, Spec, Supervised};

mod binaries;
mod database;

pub use binaries::Binaries;
pub use database::{Caller, Database};

/// The cluster's superuser, as on Supabase.
pub const SUPERUSER: &str = "supabase_admin";

/// The hosted project's administrator, who migrates: owner of the database, no superuser.
pub const ADMINISTRATOR: &str = "postgres";

/// How long a started server may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Migrates the database at this URL (of the hosted-like role `postgres`).
pub type Migrate = fn(String) -> BoxFuture<'static, Result<()>>;

/// What kind of Postgres to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// A major version, the machine's own or the archive's; `None` is the machine's own whichever it is, else the
    /// archive's 17.
    /// `CYBERDESK_TESTBED_POSTGRES_VERSION` decides if this does not.
    pub version: Option<u32>,
    /// Server settings beside and over the testbed's own.
    pub settings: Vec<(String, String)>,
    /// Makes the template of [`Postgres::database`]; the operator's own migrations unless set. Without any these
    /// databases are like [`Postgres::supabase_database`]'s.
    pub migrate: Option<Migrate>,
    /// Lets the daemon's role in only with its password, and only by TLS (see [`Postgres::show`]).
    pub guarded: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { version: None, settings: Vec::new(), migrate: Some(|url| apply_migrations(url).boxed()), guarded: false }
    }
}

/// What `cyberdesk-operator migrate` does.
async fn apply_migrations(url: String) -> Result<()> {
    let (mut client, connection) = tokio_postgres::connect(&url, NoTls).await?;
    tokio::spawn(connection);
    cyberdesk_operator::database::migrate::migrate(&mut client, None).await?;
    // Its limit is meant for the replicas of one operator; here each test has an operator of its own.
    client.batch_execute("alter role cyberdesk_daemon connection limit -1").await?;
    Ok(())
}

/// A running server. Dropping it ends the server and removes its data.
#[derive(Debug)]
pub struct Postgres {
    server: Supervised,
    address: Address,
    version: String,
    template: &'static str,
    account: Option<Account>,
}

impl Postgres {
    /// Finds or fetches the binaries, starts a server and fills the templates.
    pub async fn start(options: &Options, scratch: &Scratch, part: &Part) -> Result<Self> {
        let account = Account::to_drop_to()?;
        let binaries = Binaries::find(options.version, account.is_some(), part).await?;
        part.step(format!("starting PostgreSQL {}", binaries.version));
        let (server, address) = launch(&binaries, account, options, scratch).await?;
        let mut postgres = Self { server, address, version: binaries.version, template: database::SUPABASE, account };
        part.step("filling the templates");
        postgres.fill_templates(options.migrate).await?;
        part.done(&format!("PostgreSQL {} on port {}", postgres.version, postgres.address.port));
        Ok(postgres)
    }

    /// A fresh, migrated database.
    pub async fn database(&self) -> Result<Database> {
        Database::create(self.address.port, &fresh_name(), self.template, ADMINISTRATOR).await
    }

    /// A fresh database with the parts of Supabase and nothing of ours.
    pub async fn supabase_database(&self) -> Result<Database> {
        Database::create(self.address.port, &fresh_name(), database::SUPABASE, ADMINISTRATOR).await
    }

    /// A fresh database as plain PostgreSQL makes it: no schema `auth`, no publication. The roles are the cluster's,
    /// so they are there.
    pub async fn plain_database(&self) -> Result<Database> {
        Database::create(self.address.port, &fresh_name(), "template0", ADMINISTRATOR).await
    }

    /// A database under a name of one's own: migrated, or with the parts of Supabase only.
    pub async fn database_named(&self, name: &str, migrated: bool) -> Result<Database> {
        let template = if migrated { self.template } else { database::SUPABASE };
        Database::create(self.address.port, name, template, ADMINISTRATOR).await
    }

    /// A further handle on a database that somebody else keeps.
    pub fn existing(&self, name: &str) -> Database {
        Database::existing(self.address.port, name)
    }

    /// The server's process: to kill, stop, freeze or start again.
    pub fn server(&self) -> &Supervised {
        &self.server
    }

    /// Starts a killed server again on its data, and waits until it answers.
    pub async fn restart(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.server.start().await?;
            match answers(&self.server, &self.address, deadline).await {
                Ok(()) => return Ok(()),
                // The killed server's children are given a moment to notice and leave the shared memory.
                Err(error) if Instant::now() < deadline && self.server.has_ended() => drop(error),
                Err(error) => return Err(error),
            }
        }
    }

    /// Where it listens on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.address.port
    }

    /// Shows this certificate from now on, or speaks no TLS at all, as after an administrator's reload.
    pub async fn show(&self, identity: Option<&Identity>) -> Result<()> {
        let (certificate, key) = (self.address.directory.join("server.crt"), self.address.directory.join("server.key"));
        let client = connect(self.address.port, SUPERUSER, "template1").await?;
        let mut settings = vec![format!("alter system set ssl = {}", if identity.is_some() { "on" } else { "off" })];
        if let Some(identity) = identity {
            write_for(self.account, &certificate, &identity.certificate)?;
            write_for(self.account, &key, &identity.key)?;
            settings.push(format!("alter system set ssl_cert_file = '{}'", certificate.display()));
            settings.push(format!("alter system set ssl_key_file = '{}'", key.display()));
        }
        for setting in settings {
            client.batch_execute(&setting).await.with_context(|| setting)?;
        }
        let loaded = async || {
            let fresh = connect(self.address.port, SUPERUSER, "template1").await?;
            anyhow::Ok(fresh.query_one("select pg_conf_load_time()::text", &[]).await?.get::<_, String>(0))
        };
        let before = loaded().await?;
        client.batch_execute("select pg_reload_conf()").await?;
        let deadline = Instant::now() + PATIENCE;
        while loaded().await? == before {
            anyhow::ensure!(Instant::now() < deadline, "Postgres does not load its settings anew");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// What `postgres --version` calls itself, e.g. `17.11`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The number by which versions of Postgres are told apart, e.g. 17.
    pub fn major(&self) -> Result<u32> {
        parse_version(&self.version).map(|(major, _)| major)
    }

    async fn fill_templates(&mut self, migrate: Option<Migrate>) -> Result<()> {
        let template = Database::create(self.address.port, database::SUPABASE, "template0", SUPERUSER).await?.kept();
        let client = template.connect_as(SUPERUSER).await?;
        client.batch_execute(include_str!("postgres/supabase.sql")).await.context("apply supabase.sql")?;
        drop(client);
        if let Some(migrate) = migrate {
            let template = Database::create(self.address.port, database::MIGRATED, database::SUPABASE, ADMINISTRATOR)
                .await?
                .kept();
            migrate(template.url(ADMINISTRATOR)).await.context("migrate the template database")?;
            self.template = database::MIGRATED;
        }
        Ok(())
    }
}

/// Where a server listens, and the name by which it is known from others that might listen there.
#[derive(Debug)]
struct Address {
    port: u16,
    cluster: String,
    directory: PathBuf,
}

/// Starts a server, and tries other ports if someone else was quicker on ours.
async fn launch(
    binaries: &Binaries,
    account: Option<Account>,
    options: &Options,
    scratch: &Scratch,
) -> Result<(Supervised, Address)> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let cluster = Uuid::new_v4().simple().to_string();
        let directory = scratch.directory(&format!("postgres-{cluster}"), account)?;
        let address = Address { port: free_port()?, cluster, directory: directory.clone() };
        let data = directory.join("data");
        let log = directory.join("log");
        let mut settings = vec![format!("port={}", address.port), format!("cluster_name={}", address.cluster)];
        settings.extend(SETTINGS.iter().map(|setting| (*setting).to_owned()));
        if options.guarded {
            let file = directory.join("pg_hba.conf");
            write_for(account, &file, GUARD)?;
            settings.push(format!("hba_file={}", file.display()));
        }
        settings.extend(options.settings.iter().map(|(name, value)| format!("{name}={value}")));
        let mut args = vec!["-D".into(), data.clone().into_os_string()];
        for setting in settings {
            args.extend(["-c".into(), setting.into()]);
        }
        let mut spec = Spec::new("postgres", Program::new(binaries.directory.join("postgres"), args), &directory, log);
        let mut initdb = vec!["--pgdata".into(), data.into_os_string(), "--username".into(), SUPERUSER.into()];
        initdb.extend(INITDB.iter().map(Into::into));
        spec.before = vec![Program::new(binaries.directory.join("initdb"), initdb)];
        spec.env.insert("LC_ALL".to_owned(), "C".to_owned());
        spec.account = account;
        // Immediate shutdown: the data goes anyway, and unlike SIGKILL it leaves no shared memory behind.
        spec.stop_signal = Signal::QUIT.as_raw();
        scratch.removed_with(&mut spec);
        let server = Supervised::spawn(&spec)?;
        match answers(&server, &address, Instant::now() + PATIENCE).await {
            Ok(()) => return Ok((server, address)),
            Err(error) if attempts < 3 && format!("{error:#}").contains("Address already in use") => drop(error),
            Err(error) => return Err(error),
        }
    }
}

/// Who is let in where the daemon must show its password, by TLS. The others are the test itself.
const GUARD: &str = "\
hostssl   all cyberdesk_daemon all scram-sha-256
hostnossl all cyberdesk_daemon all reject
host      all all              all trust
";

/// Writes a file that the server alone may read.
fn write_for(account: Option<Account>, file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600))?;
    if let Some(account) = account {
        std::os::unix::fs::chown(file, Some(account.uid), Some(account.gid))?;
    }
    Ok(())
}

/// `initdb` beside data directory and superuser.
const INITDB: [&str; 4] = ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"];

/// TCP only (a socket's path may be too long), quick rather than durable, otherwise as Supabase sets it.
const SETTINGS: [&str; 10] = [
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "fsync=off",
    "full_page_writes=off",
    "max_connections=300",
    "wal_level=logical",
    "max_wal_size=4GB",
    "timezone=UTC",
    "log_timezone=UTC",
    "jit=off",
];

/// Waits until the server lets us in.
async fn answers(server: &Supervised, address: &Address, deadline: Instant) -> Result<()> {
    server.running().await?;
    loop {
        match says_its_name(address).await {
            Ok(true) => return Ok(()),
            _ if server.has_ended() => return Err(server.last_words()),
            _ if Instant::now() > deadline => {
                return Err(server.last_words().context("it does not let us in"));
            }
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Is it our server that listens there, and not another testbed's that was quicker to take the port?
async fn says_its_name(address: &Address) -> Result<bool> {
    let client = connect(address.port, SUPERUSER, "template1").await?;
    let name: String = client.query_one("select current_setting('cluster_name')", &[]).await?.get(0);
    Ok(name == address.cluster)
}

async fn connect(port: u16, role: &str, database: &str) -> Result<Client> {
    let mut config = tokio_postgres::Config::new();
    config.host(Ipv4Addr::LOCALHOST.to_string()).port(port).user(role).dbname(database);
    config.application_name("testbed").connect_timeout(Duration::from_secs(5));
    let (client, connection) = config
        .connect(NoTls)
        .await
        .with_context(|| format!("connect to the database {database} on port {port} as {role}"))?;
    tokio::spawn(async move {
        // Its end shows at the client; there is nobody else to tell.
        let _ = connection.await;
    });
    Ok(client)
}

fn fresh_name() -> String {
    format!("test_{}", Uuid::new_v4().simple())
}

/// The first number of `postgres (PostgreSQL) 15.18 (Debian …)`, and the whole version.
fn parse_version(said: &str) -> Result<(u32, String)> {
    let version = said.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()));
    let major = version.and_then(|version| version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    match (major, version) {
        (Some(major), Some(version)) => Ok((major, version.to_owned())),
        _ => bail!("read a version from {said:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::parse_version;

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        for (said, want) in [
            ("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)", (15, "15.18")),
            ("postgres (PostgreSQL) 17.11", (17, "17.11")),
            ("postgres (PostgreSQL) 18beta1", (18, "18beta1")),
        ] {
            let (major, version) = parse_version(said).expect("it holds a version");
            assert_eq!((major, version.as_str()), want, "{said}");
        }
        assert!(parse_version("postgres").is_err());
    }
}
