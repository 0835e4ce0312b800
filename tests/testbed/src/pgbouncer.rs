//! A real PgBouncer in front of a testbed's Postgres, where there is one: it comes from a distribution's packages.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::account::{Account, reachable_by_all};
use crate::postgres::Postgres;
use crate::scratch::{Scratch, free_port};
use crate::supervise::{Program, Signal, Spec, Supervised};

/// How long it may take to listen.
const PATIENCE: Duration = Duration::from_secs(30);

/// For how long a client keeps a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Until it disconnects.
    Session,
    /// Until its transaction ends.
    Transaction,
}

/// A running pooler. Dropping it ends it.
#[derive(Debug)]
pub struct PgBouncer {
    server: Supervised,
    directory: PathBuf,
    account: Option<Account>,
    upstream: u16,
    port: u16,
}

impl PgBouncer {
    /// Its binary, if this machine has one that the servers' account can run.
    pub fn find() -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        // Packages put it where ordinary users' PATH does not look.
        std::env::split_paths(&path)
            .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/sbin")])
            .map(|directory| directory.join("pgbouncer"))
            .find(|file| file.is_file() && reachable_by_all(file))
    }

    /// Starts one that lets everybody in, as the testbed's Postgres does.
    pub async fn start(binary: &Path, postgres: &Postgres, mode: Mode, scratch: &Scratch) -> Result<Self> {
        let (account, port) = (Account::to_drop_to()?, free_port()?);
        let directory = scratch.directory(&format!("pgbouncer-{port}"), account)?;
        let upstream = postgres.port();
        configure(&directory, account, upstream, port, mode)?;
        let program = Program::new(binary, [directory.join("pgbouncer.ini")]);
        let mut spec = Spec::new("pgbouncer", program, &directory, directory.join("log"));
        spec.stop_signal = Signal::TERM.as_raw();
        spec.account = account;
        scratch.removed_with(&mut spec);
        let server = Supervised::spawn(&spec)?;
        server.running().await?;
        let pooler = Self { server, directory, account, upstream, port };
        pooler.listens().await?;
        Ok(pooler)
    }

    /// Changes what it does for those who connect from now on, as an administrator does with a reload; whoever is
    /// connected is cut off.
    pub async fn switch(&self, mode: Mode) -> Result<()> {
        configure(&self.directory, self.account, self.upstream, self.port, mode)?;
        self.server.kill9().await?;
        self.server.start().await?;
        self.listens().await
    }

    /// A URL through it, for a role and a database of its Postgres.
    pub fn url(&self, role: &str, database: &str) -> String {
        format!("postgres://{role}@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }

    async fn listens(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
            if self.server.has_ended() || Instant::now() > deadline {
                return Err(self.server.last_words().context("PgBouncer does not listen"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

fn configure(directory: &Path, account: Option<Account>, upstream: u16, port: u16, mode: Mode) -> Result<()> {
    let users = directory.join("users.txt");
    let mode = match mode {
        Mode::Session => "session",
        Mode::Transaction => "transaction",
    };
    let settings = format!(
        "[databases]\n* = host=127.0.0.1 port={upstream}\n\
         [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
         auth_type = trust\nauth_file = {}\npool_mode = {mode}\nmax_client_conn = 200\ndefault_pool_size = 20\n",
        users.display()
    );
    let everybody = "\"cyberdesk_daemon\" \"\"\n\"postgres\" \"\"\n";
    for (file, text) in [(users, everybody), (directory.join("pgbouncer.ini"), settings.as_str())] {
        std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        if let Some(account) = account {
            std::os::unix::fs::chown(&file, Some(account.uid), Some(account.gid))?;
        }
    }
    Ok(())
}
