//! The soak: two operators at work, rows that come and go, and everything around them failing at random. In the end
//! rows, objects and history are held against one another.
//!
//! ```text
//!   app ── rows ──▶ Postgres ◀── wire ──┬── operator one ──┬── wire ──▶ kube-apiserver ◀── people with kubectl
//!                                       └── operator two ──┘                 ▲
//!   chaos: kills, freezes, cuts, restarts any of these          witness: every VM that was ever made
//! ```
//!
//! Everything random comes from one seed. It gives the same orders again, not the same run: the programs are real.

mod app;
mod audit;
mod chaos;
mod witness;

use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::{Instant, sleep_until};

use crate::node::{NodeConfig, Speed};
use crate::operator;
use crate::players::{KubeVirt, Players};
use crate::postgres::Database;
use crate::progress::Progress;
use crate::simulator::{Detail, SimulatorConfig};
use crate::supervise::Supervised;
use crate::wire::Wire;
use crate::world::make_namespace;
use crate::{Options, Testbed};

use app::App;
use chaos::Chaos;
use witness::Witness;

/// What to do, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Soak {
    /// For how long things go wrong. Until all is settled afterwards takes longer.
    pub time: Duration,
    /// Where all that is random begins.
    pub seed: u64,
    /// How many desktops live at a time.
    pub desktops: usize,
    /// How often something goes wrong.
    pub every: Duration,
    /// Who plays KubeVirt.
    pub kubevirt: KubeVirt,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// Rows that were inserted.
    pub rows: usize,
    /// What went wrong, and how often.
    pub faults: Vec<(&'static str, usize)>,
    /// What is not as it should be; empty when all is well.
    pub findings: Vec<String>,
    /// The operators' logs, where something was found.
    pub logs: Vec<(String, String)>,
}

/// The parts that may fail.
struct Parts {
    operators: [Daemon; 2],
    database: Database,
    testbed: Testbed,
}

/// An operator, and its two wires.
struct Daemon {
    process: Supervised,
    to_postgres: Wire,
    to_api_server: Wire,
}

impl Soak {
    /// Runs it. `tell` hears of each thing that goes wrong.
    pub async fn run(&self, progress: &Progress, tell: impl Fn(&str)) -> Result<Outcome> {
        let testbed = Testbed::start(&Options::default(), progress).await?;
        let database = testbed.postgres.database_named("cyberdesk", true).await?.kept();
        make_namespace(&testbed.control_plane).await?;
        let simulator = SimulatorConfig { detail: Detail::Essential, ..SimulatorConfig::default() };
        let node = NodeConfig { speed: Speed::FAST, ..NodeConfig::default() };
        let part = progress.part("kubevirt");
        let (cluster, scratch) = (&testbed.control_plane, testbed.scratch());
        let _kubevirt = Players::start(self.kubevirt, cluster, scratch, (simulator, node), &part).await?;
        let operators = [daemon("one", &database, &testbed).await?, daemon("two", &database, &testbed).await?];
        progress.end();

        let parts = Parts { operators, database, testbed };
        let client = parts.testbed.control_plane.client().await?;
        let witness = Witness::of(&client);
        let mut app = App::new(&parts, client.clone(), self.seed, self.desktops).await?;
        let chaos = Chaos::new(self.seed, self.every);
        let until = Instant::now() + self.time;
        tokio::select! {
            never = app.live() => match never {},
            // Not cut off in the middle: what it stopped, it starts again.
            done = chaos.reign(&parts, until, &tell) => done?,
        }
        sleep_until(until).await;
        tell("nothing goes wrong any more; waiting until all is settled");
        let findings = audit::audit(&parts, &client, &app, &witness).await?;
        let logs = if findings.is_empty() { vec![] } else { parts.logs()? };
        Ok(Outcome { rows: app.rows(), faults: chaos.faults(), findings, logs })
    }
}

impl Parts {
    fn logs(&self) -> Result<Vec<(String, String)>> {
        let names = ["one", "two"].into_iter().zip(&self.operators);
        names.map(|(name, daemon)| Ok((name.to_owned(), std::fs::read_to_string(daemon.process.log())?))).collect()
    }
}

/// Starts an operator on wires of its own.
async fn daemon(name: &str, database: &Database, testbed: &Testbed) -> Result<Daemon> {
    let (to_postgres, to_api_server) =
        (Wire::to(testbed.postgres.port()).await?, Wire::to(testbed.control_plane.port()).await?);
    let through = |port: u16| format!(":{port}");
    let kubeconfig = std::fs::read_to_string(testbed.control_plane.kubeconfig()).context("read the kubeconfig")?;
    let kubeconfig = kubeconfig.replace(&through(testbed.control_plane.port()), &through(to_api_server.port()));
    let file = testbed.directory().join(format!("{name}.kubeconfig"));
    std::fs::write(&file, kubeconfig)?;
    let url = database.url("cyberdesk_daemon");
    let url = url.replace(&through(testbed.postgres.port()), &through(to_postgres.port()));
    let settings = [("CYBERDESK_IDENTITY", name), ("DATABASE_URL", url.as_str())];
    let process = operator::launch(operator::program()?, name, &settings, database, &file, testbed.scratch())?;
    process.running().await?;
    Ok(Daemon { process, to_postgres, to_api_server })
}
