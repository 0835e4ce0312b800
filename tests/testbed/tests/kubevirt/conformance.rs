//! The real KubeVirt and the simulator side by side: the same lives, the same bad manifests, and the same answers.
//!
//! Two API servers stand beside each other, one under the simulator, one under virt-api and virt-controller of a
//! release; a node is played on each. The real one is right: where the two differ, the simulator is to be mended.
//!
//! `cargo test` neither builds nor runs this; `cargo conformance` does.

use anyhow::{Context, Result, ensure};
use cyberdesk_testbed::assets::kubevirt::Release;
use cyberdesk_testbed::control_plane::ControlPlane;
use cyberdesk_testbed::node::{NodeConfig, Speed};
use cyberdesk_testbed::players::{self, KubeVirt, Players};
use cyberdesk_testbed::scratch::Scratch;
use cyberdesk_testbed::simulator::SimulatorConfig;
use cyberdesk_testbed::{Progress, supervise};
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use kube::Client;
use libtest_mimic::{Arguments, Trial};
use serde_json::Value;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;

mod compare;
mod event;
mod faults;
mod guests;
mod lives;
mod published;
mod stage;

use faults::Fault;
use lives::Life;

fn main() -> Result<ExitCode> {
    supervise::become_supervisor_if_asked();
    let mut arguments = Arguments::from_args();
    // They mostly wait: for the node's recorded times.
    arguments.test_threads.get_or_insert(8);
    if arguments.list {
        return Ok(libtest_mimic::run(&arguments, trials(None)).exit_code());
    }
    let runtime = Arc::new(Runtime::new().context("start a runtime")?);
    let sides = Arc::new(runtime.block_on(Sides::start())?);
    let conclusion = libtest_mimic::run(&arguments, trials(Some((runtime.clone(), sides.clone()))));
    // What lives on the runtime ends on it.
    runtime.block_on(async { drop(sides) });
    Ok(conclusion.exit_code())
}

/// Where the real one's answers to bad manifests are kept, for `cargo test` to hold the simulator to.
const REFUSALS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kubevirt/refusals.json");
/// Set, the run writes that file anew.
const RECORD: &str = "CYBERDESK_RECORD";

/// What older releases refuse and the newest admits.
const REFUSED_BEFORE: [&str; 1] = ["an unknown architecture"];

/// Lives that go otherwise on older releases: before 1.8, an edit that is taken back still requires a restart.
const OTHERWISE_BEFORE: [&str; 1] = ["edit-undone"];

type Test = fn(&Sides) -> LocalBoxFuture<'_, Result<()>>;

/// Each life and each manifest as a test of its own. Without sides they can only be listed.
fn trials(sides: Option<(Arc<Runtime>, Arc<Sides>)>) -> Vec<Trial> {
    fn trial<T>(name: String, sides: Option<(Arc<Runtime>, Arc<Sides>)>, test: T) -> Trial
    where
        T: for<'a> FnOnce(&'a Sides) -> LocalBoxFuture<'a, Result<()>> + Send + 'static,
    {
        Trial::test(name, move || {
            let (runtime, sides) = sides.expect("a test that is run has its sides");
            runtime.block_on(test(&sides)).map_err(|error| format!("{error:#}").into())
        })
    }
    let lives =
        lives::recorded().into_iter().chain(guests::lives()).chain(lives::more()).map(|life| {
            trial(format!("life {}", life.name), sides.clone(), move |sides| sides.live(life).boxed_local())
        });
    let faults = faults::faults().into_iter().map(|fault| {
        trial(format!("manifest {}", fault.name), sides.clone(), move |sides| sides.answer(fault).boxed_local())
    });
    let others: [(&str, Test); 3] = [
        ("refusals on record are those of the real one", |sides| sides.on_record().boxed_local()),
        ("published templates are admitted", |sides| published::templates(&sides.real.client).boxed_local()),
        ("published examples are admitted", |sides| published::examples(&sides.real.client).boxed_local()),
    ];
    let others = others.map(|(name, test)| trial(name.to_owned(), sides.clone(), test));
    lives.chain(faults).chain(others).collect()
}

/// Both sides.
struct Sides {
    real: Side,
    simulated: Side,
}

/// An API server and who plays KubeVirt on it.
struct Side {
    client: Client,
    _players: Players,
    _control_plane: ControlPlane,
}

impl Sides {
    /// Plays a life on both, and compares what watchers saw.
    async fn live(&self, life: Life) -> Result<()> {
        if players::release()? != Release::default() && OTHERWISE_BEFORE.contains(&life.code()) {
            return Ok(());
        }
        let (real, simulated) = tokio::try_join!(
            async { lives::told(self.real.client.clone(), &life).await.context("on the real one") },
            async { lives::told(self.simulated.client.clone(), &life).await.context("on the simulator") },
        )?;
        compare::alike(("real", &real), ("simulated", &simulated)).map_err(anyhow::Error::msg)
    }

    /// Has a bad manifest judged by both: the same answer word for word, or from an older release the same verdict.
    async fn answer(&self, fault: Fault) -> Result<()> {
        let vm = fault.vm("bad");
        let real = faults::answer(&self.real.client, &vm).await?;
        let simulated = faults::answer(&self.simulated.client, &vm).await?;
        if players::release()? != Release::default() {
            // Words change between releases, and the simulator has those of the newest.
            let differs = real["admitted"] != simulated["admitted"];
            ensure!(differs == REFUSED_BEFORE.contains(&fault.name), "real {real}, simulated {simulated}");
            return Ok(());
        }
        ensure!(real == simulated, "they differ:\n  real      {real}\n  simulated {simulated}");
        Ok(())
    }

    /// The file of refusals says what the real one says; for the newest release, of which it is.
    async fn on_record(&self) -> Result<()> {
        if players::release()? != Release::default() {
            return Ok(());
        }
        let mut refusals = BTreeMap::new();
        for fault in faults::faults() {
            refusals.insert(fault.name, faults::answer(&self.real.client, &fault.vm("bad")).await?);
        }
        if std::env::var_os(RECORD).is_some() {
            std::fs::write(REFUSALS, serde_json::to_string_pretty(&refusals)? + "\n")?;
            return Ok(());
        }
        let recorded: BTreeMap<&str, Value> = serde_json::from_str(faults::RECORDED)?;
        ensure!(recorded == refusals, "{REFUSALS} is not what the real one says: run with {RECORD}=1");
        Ok(())
    }

    async fn start() -> Result<Self> {
        let (real, simulated) = tokio::try_join!(Side::start(KubeVirt::Real), Side::start(KubeVirt::Simulated))?;
        Ok(Self { real, simulated })
    }
}

impl Side {
    async fn start(who: KubeVirt) -> Result<Self> {
        let (scratch, part) = (Scratch::new()?, Progress::quiet().part("kubernetes"));
        let control_plane = ControlPlane::start(Default::default(), &scratch, &part).await?;
        // Ends slowly enough for every controller to look in between, also on a busy machine.
        let (bind, pod_end) = (Duration::from_secs(1), Duration::from_secs(1));
        let speed = Speed { bind, pod_end, ..Speed::RECORDED };
        let node = NodeConfig { speed, ..NodeConfig::default() };
        let players = Players::start(who, &control_plane, &scratch, (SimulatorConfig::default(), node), &part).await?;
        Ok(Self { client: control_plane.client().await?, _players: players, _control_plane: control_plane })
    }
}
