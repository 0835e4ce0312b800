//! The played KubeVirt, on a real API server: is it like the recorded one, do guests follow their scripts, are bad
//! manifests refused as KubeVirt refuses them?

use anyhow::Result;
use cyberdesk_testbed::control_plane::ControlPlane;
use cyberdesk_testbed::node::{Node, NodeConfig, Speed};
use cyberdesk_testbed::scratch::Scratch;
use cyberdesk_testbed::simulator::{Detail, Simulator, SimulatorConfig};
use cyberdesk_testbed::{Progress, supervise};
use futures::FutureExt;
use futures::future::BoxFuture;
use kube::Client;
use libtest_mimic::{Arguments, Failed, Trial};
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::Runtime;

mod admission;
mod compare;
mod event;
mod faults;
mod fleet;
mod guests;
mod lives;
mod stage;
mod traces;

fn main() -> Result<()> {
    supervise::become_supervisor_if_asked();
    let mut arguments = Arguments::from_args();
    // They mostly wait: for the node's recorded times.
    arguments.test_threads.get_or_insert(8);
    let world = Arc::new(World::new()?);

    let held = world.clone();
    let mut trials: Vec<Trial> = lives::recorded()
        .into_iter()
        .map(|life| {
            let world = held.clone();
            Trial::test(format!("trace {}", life.name), move || traces::hold(&world.runtime, world.client()?, &life))
        })
        .collect();
    trials.extend(guests::lives().into_iter().chain(lives::more()).map(|life| {
        let world = world.clone();
        Trial::test(format!("guest {}", life.name), move || {
            let client = world.client()?;
            world.run(async { lives::told(client, &life).await.map(drop) })
        })
    }));
    type Test = fn(Client) -> BoxFuture<'static, Result<()>>;
    let of_admission: [(&str, Test); 3] = [
        ("answers bad manifests as recorded", |client| admission::answers_as_recorded(client).boxed()),
        ("refuses what it does not play", |client| admission::refuses_what_it_does_not_play(client).boxed()),
        ("defaults and protects", |client| admission::defaults_and_protects(client).boxed()),
    ];
    trials.extend(of_admission.map(|(name, test)| {
        let world = world.clone();
        Trial::test(format!("admission {name}"), move || world.run(test(world.client()?)))
    }));
    let fleet = world.clone();
    let thousand = move || fleet.run(fleet::a_thousand_vms());
    // Minutes on a busy machine: asked for by name, `--ignored`.
    trials.push(Trial::test("fleet of a thousand", thousand).with_ignored_flag(true));

    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(world);
    conclusion.exit()
}

/// The parts under the tests, at the speed of the recording, started by the first test that needs them.
struct World {
    runtime: Runtime,
    parts: OnceLock<Result<Parts, String>>,
}

struct Parts {
    client: Client,
    _simulator: Simulator,
    _node: Node,
    _control_plane: ControlPlane,
}

impl World {
    fn new() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        Ok(Self { runtime, parts: OnceLock::new() })
    }

    fn client(&self) -> Result<Client, Failed> {
        let started = || {
            let parts = self.runtime.block_on(Parts::start(Speed::RECORDED, Detail::Recorded));
            parts.map_err(|error| format!("{error:#}"))
        };
        let parts = self.parts.get_or_init(started).as_ref();
        Ok(parts.map_err(|error| Failed::from(error.as_str()))?.client.clone())
    }

    fn run(&self, test: impl Future<Output = Result<()>>) -> Result<(), Failed> {
        self.runtime.block_on(test).map_err(|error| format!("{error:#}").into())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What lives on the runtime ends on it.
        let parts = self.parts.take();
        self.runtime.block_on(async { drop(parts) });
    }
}

impl Parts {
    async fn start(speed: Speed, detail: Detail) -> Result<Self> {
        let scratch = Scratch::new()?;
        let control_plane =
            ControlPlane::start(Default::default(), &scratch, &Progress::quiet().part("kubernetes")).await?;
        let client = control_plane.client().await?;
        let simulator = SimulatorConfig { detail, back_off: Duration::from_secs(1), ..Default::default() };
        let node = NodeConfig { speed, ..Default::default() };
        let (simulator, node) =
            tokio::try_join!(Simulator::start(client.clone(), simulator), Node::start(client.clone(), node))?;
        Ok(Self { client, _simulator: simulator, _node: node, _control_plane: control_plane })
    }
}
