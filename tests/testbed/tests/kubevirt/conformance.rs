//! The real KubeVirt and the simulator side by side: the same lives, the same bad manifests, and the same answers.
//!
//! Two API servers stand beside each other, one under the simulator, one under virt-api and virt-controller of a
//! release; a node is played on each. The real one is right: where the two differ, the simulator is to be mended.
//!
//! `cargo test` neither builds nor runs this; `cargo conformance` does.

use anyhow::{Context, Result};
use cyberdesk_testbed::control_plane::ControlPlane;
use cyberdesk_testbed::node::{NodeConfig, Speed};
use cyberdesk_testbed::players::{KubeVirt, Players};
use cyberdesk_testbed::scratch::Scratch;
use cyberdesk_testbed::simulator::SimulatorConfig;
use cyberdesk_testbed::{Progress, supervise};
use kube::Client;
use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;
use std::sync::Arc;
use tokio::runtime::Runtime;

mod compare;
mod event;
mod guests;
mod lives;
mod stage;

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

/// Each life as a test of its own. Without sides they can only be listed.
fn trials(sides: Option<(Arc<Runtime>, Arc<Sides>)>) -> Vec<Trial> {
    let lives = lives::recorded().into_iter().chain(guests::lives());
    lives
        .map(|life| {
            let sides = sides.clone();
            Trial::test(format!("life {}", life.name), move || {
                let (runtime, sides) = sides.expect("a life that is played has its sides");
                let told = runtime.block_on(async {
                    tokio::try_join!(
                        async { lives::told(sides.real.client.clone(), &life).await.context("on the real one") },
                        async { lives::told(sides.simulated.client.clone(), &life).await.context("on the simulator") },
                    )
                });
                let (real, simulated) = told.map_err(|error| format!("{error:#}"))?;
                Ok(compare::alike(("real", &real), ("simulated", &simulated))?)
            })
        })
        .collect()
}

/// Both sides, at the speed of the recording.
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
    async fn start() -> Result<Self> {
        let (real, simulated) = tokio::try_join!(Side::start(KubeVirt::Real), Side::start(KubeVirt::Simulated))?;
        Ok(Self { real, simulated })
    }
}

impl Side {
    async fn start(who: KubeVirt) -> Result<Self> {
        let (scratch, part) = (Scratch::new()?, Progress::quiet().part("kubernetes"));
        let control_plane = ControlPlane::start(&scratch, &part).await?;
        let node = NodeConfig { speed: Speed::RECORDED, ..NodeConfig::default() };
        let players = Players::start(who, &control_plane, &scratch, (SimulatorConfig::default(), node), &part).await?;
        Ok(Self { client: control_plane.client().await?, _players: players, _control_plane: control_plane })
    }
}
