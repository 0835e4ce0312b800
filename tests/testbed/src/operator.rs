//! The operator as a process of its own, of this same executable.
//!
//! The library is linked in, so nothing else has to be built: the executable starts itself with a hidden first
//! argument, under a supervisor as every server here.

use std::path::Path;

use anyhow::{Context as _, Result};
use cyberdesk_operator::{cli, telemetry};
use tokio::time::{Duration, Instant, sleep};

use crate::postgres::{ADMINISTRATOR, Database};
use crate::progress::Part;
use crate::scratch::Scratch;
use crate::supervise::{self, Program, Signal, Spec, Supervised};

/// The hidden first argument that turns an executable of ours into the operator.
const ARGUMENT: &str = "__operator";

/// The database role that the operator runs as, and is given no more than it needs by.
const ROLE: &str = "cyberdesk_daemon";

/// Where CRs and VMs live.
pub const NAMESPACE: &str = "cyberdesk-system";

/// How long it may take to begin its work: generous, for a machine that compiles beside it.
const PATIENCE: Duration = Duration::from_secs(60);

/// The running operator. Dropping it ends it as a cluster would, with SIGTERM.
#[derive(Debug)]
pub struct Operator {
    process: Supervised,
}

impl Operator {
    /// Starts it on a migrated database and a cluster that serves all kinds, and waits until it holds the fence: from
    /// then on it reads and writes.
    pub async fn start(database: &Database, kubeconfig: &Path, scratch: &Scratch, part: &Part) -> Result<Self> {
        part.step("starting cyberdesk-operator run");
        let process = launch(program()?, "operator", &[], database, kubeconfig, scratch)?;
        let pid = process.running().await?;
        let operator = Self { process };
        part.step("waiting for it to begin its term");
        operator.holds_the_fence(database).await?;
        part.done(&format!("cyberdesk-operator run, process {pid}"));
        Ok(operator)
    }

    async fn holds_the_fence(&self, database: &Database) -> Result<()> {
        let client = database.connect_as(ADMINISTRATOR).await?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let epoch: i64 = client
                .query_one("select cyberdesk.fence_epoch()", &[])
                .await
                .context("ask the database for the fence")?
                .get(0);
            if epoch > 0 {
                return Ok(());
            }
            if self.process.has_ended() || Instant::now() > deadline {
                return Err(self.process.last_words());
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Its process: to kill, freeze or start again, and to read what it said.
    pub fn process(&self) -> &Supervised {
        &self.process
    }

    /// Resolves if it ends by itself, with the story of how.
    pub async fn failure(&self) -> anyhow::Error {
        match self.process.ended().await {
            Ok(()) => anyhow::anyhow!("the operator ended by itself"),
            Err(error) => error,
        }
    }

    /// Copies its log to where it outlives the testbed.
    pub fn save_log(&self, to: &Path) -> Result<()> {
        std::fs::copy(self.process.log(), to)
            .with_context(|| format!("copy the operator's log to {}", to.display()))?;
        Ok(())
    }

    /// The last lines of its log.
    pub fn last_lines(&self, count: usize) -> Result<String> {
        let log = std::fs::read(self.process.log()).context("read the operator's log")?;
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        Ok(lines[lines.len().saturating_sub(count)..].join("\n"))
    }
}

/// This executable, as the operator: see [`become_operator_if_asked`].
pub fn program() -> Result<Program> {
    Ok(Program::new(supervise::executable()?, [ARGUMENT, "run"]))
}

/// Starts the process alone, under a name of its own where there are several, with settings beside those that lead it
/// to its database and cluster.
pub fn launch(
    program: Program,
    name: &str,
    settings: &[(&str, &str)],
    database: &Database,
    kubeconfig: &Path,
    scratch: &Scratch,
) -> Result<Supervised> {
    let directory = scratch.directory(name, None)?;
    let mut spec = Spec::new(name, program, &directory, directory.join("log"));
    spec.stop_signal = Signal::TERM.as_raw();
    let (url, kubeconfig) = (database.url(ROLE), kubeconfig.display().to_string());
    // What the caller has in its environment for another cluster is none of this one's business.
    let ours = [
        ("DATABASE_URL", url.as_str()),
        ("KUBECONFIG", kubeconfig.as_str()),
        ("CYBERDESK_NAMESPACE", NAMESPACE),
        ("CYBERDESK_VM_NAMESPACE", NAMESPACE),
        ("CYBERDESK_TEMPLATES", ""),
        ("CYBERDESK_LISTEN", "127.0.0.1:0"),
        ("CYBERDESK_LOG_FORMAT", "text"),
    ];
    let all = ours.iter().chain(settings);
    spec.env = all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    scratch.removed_with(&mut spec);
    Supervised::spawn(&spec)
}

/// Returns at once in an ordinary process; in one that was started to be the operator it never returns.
///
/// Call it first in `main`, with [`supervise::become_supervisor_if_asked`].
pub fn become_operator_if_asked() {
    let mut arguments = std::env::args_os();
    let name = arguments.next();
    if arguments.next().is_none_or(|first| first != ARGUMENT) {
        return;
    }
    let done = match name {
        Some(name) => cli::main(std::iter::once(name).chain(arguments)),
        None => Err(anyhow::anyhow!("the operator was started without a name")),
    };
    if let Err(error) = &done {
        eprintln!("cyberdesk-operator: {}", telemetry::chain(error.as_ref()));
    }
    std::process::exit(i32::from(done.is_err()));
}
