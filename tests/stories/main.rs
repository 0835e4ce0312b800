//! The stories: what users see, told on real parts.
//!
//! Each story has a database, a namespace and an operator of its own, and waits on states, never on time.
//! When one fails, it shows its rows, its objects and the operator's log.

mod absence;
mod account;
mod apps;
mod bad_input;
mod bounded;
mod brake;
mod by_hand;
mod connections;
mod crashes;
mod database;
mod deadlines;
mod docs;
mod doctor;
mod ends;
mod grants;
mod health;
mod hostile;
mod in_use;
mod install;
mod kopf;
mod leadership;
mod lives;
mod manifests;
mod orphans;
mod outages;
mod pause;
mod restarts;
mod scale;
mod screens;
mod starts;
mod templates;
mod tools;
mod wakeups;
mod world;

use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use cyberdesk_testbed::node::NodeConfig;
use cyberdesk_testbed::players::{KubeVirt, Players};
use cyberdesk_testbed::simulator::{Detail, SimulatorConfig};
use cyberdesk_testbed::{Options, Progress, Testbed, control_plane, postgres, supervise};
use libtest_mimic::{Arguments, Conclusion, Trial};
use tokio::runtime::Runtime;
use tokio::sync::RwLock;

use database::Servers;
use tools::Tool;
use world::{Parts, World};

/// What is told, and by whom.
pub(crate) struct Story {
    name: &'static str,
    alone: bool,
    needs: Option<Tool>,
    tell: Box<dyn for<'a> Telling<'a> + Send>,
}

/// A story from an async function of the world.
pub(crate) fn story<F>(name: &'static str, tell: F) -> Story
where
    F: for<'a> Telling<'a> + Send + 'static,
{
    Story { name, alone: false, needs: None, tell: Box::new(tell) }
}

impl Story {
    /// It wants the machine for itself.
    pub(crate) fn alone(self) -> Self {
        Self { alone: true, ..self }
    }

    /// It needs a program that not every machine has.
    pub(crate) fn needs(self, tool: Tool) -> Self {
        Self { needs: Some(tool), ..self }
    }
}

/// Async functions of a borrowed world, which closures cannot name the type of.
pub(crate) trait Telling<'a> {
    fn tell(&self, world: &'a World) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>>;
}

impl<'a, F, Fut> Telling<'a> for F
where
    F: Fn(&'a World) -> Fut,
    Fut: Future<Output = Result<()>> + 'a,
{
    fn tell(&self, world: &'a World) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>> {
        Box::pin(self(world))
    }
}

fn stories() -> Vec<Story> {
    [
        lives::stories(),
        outages::stories(),
        deadlines::stories(),
        in_use::stories(),
        pause::stories(),
        by_hand::stories(),
        wakeups::stories(),
        connections::stories(),
        doctor::stories(),
        health::stories(),
        screens::stories(),
        apps::stories(),
        restarts::stories(),
        bad_input::stories(),
        bounded::stories(),
        absence::stories(),
        hostile::stories(),
        crashes::stories(),
        starts::stories(),
        ends::stories(),
        templates::stories(),
        install::stories(),
        kopf::stories(),
        docs::stories(),
        leadership::stories(),
        brake::stories(),
        orphans::stories(),
        scale::stories(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Stories told side by side. They wait more than they work.
const AT_ONCE: usize = 8;

fn main() -> ExitCode {
    supervise::become_supervisor_if_asked();
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(AT_ONCE));
    match run(&arguments) {
        Ok(conclusion) => conclusion.exit_code(),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<Conclusion> {
    if arguments.list {
        return Ok(libtest_mimic::run(arguments, trials(None)));
    }
    let runtime = Arc::new(Runtime::new().context("start a runtime")?);
    // Held by us alone, so that everything ends before we do.
    let (parts, _players) = runtime.block_on(start())?;
    let parts = Arc::new(parts);
    let conclusion = libtest_mimic::run(arguments, trials(Some((runtime.clone(), parts.clone()))));
    let all = arguments.filter.is_none() && arguments.skip.is_empty() && !arguments.ignored;
    if !all || conclusion.has_failed() {
        return Ok(conclusion);
    }
    Ok(libtest_mimic::run(arguments, afterwards(runtime, parts)))
}

/// What only all stories together can tell.
fn afterwards(runtime: Arc<Runtime>, parts: Arc<Parts>) -> Vec<Trial> {
    let cluster = parts.clone();
    let told = |told: Result<()>| told.map_err(|error| format!("{error:#}").into());
    vec![
        Trial::test("the Roles of deploy/ grant what the stories used, and nothing else", move || {
            told(grants::of_the_cluster(&cluster.testbed))
        }),
        Trial::test("the daemon's database role may call what the stories used, and nothing else", move || {
            let called = parts.called.lock().expect("no story panics with it").clone();
            told(runtime.block_on(grants::of_the_database(&parts.testbed, &called)))
        }),
    ]
}

/// Starts the parts that all stories share. Who plays KubeVirt, the environment says: the stories are the same.
async fn start() -> Result<(Parts, Players)> {
    let progress = Progress::quiet();
    let options = Options {
        // What the daemon used of what it may: see `grants`.
        postgres: postgres::Options {
            settings: vec![("track_functions".to_owned(), "all".to_owned())],
            ..postgres::Options::default()
        },
        control_plane: control_plane::Options { audited: true },
    };
    let testbed = Testbed::start(&options, &progress).await?;
    let simulator =
        SimulatorConfig { detail: Detail::Essential, back_off: Duration::from_secs(1), ..SimulatorConfig::default() };
    let (cluster, scratch, part) = (&testbed.control_plane, testbed.scratch(), progress.part("kubevirt"));
    let players = Players::start(KubeVirt::wanted()?, cluster, scratch, (simulator, NodeConfig::default()), &part);
    let players = players.await?;
    progress.end();
    let client = testbed.control_plane.client().await?;
    let servers = Servers::find(&testbed).await?;
    Ok((Parts { servers, testbed, client, called: Mutex::default() }, players))
}

/// Each story as a test of its own. Without parts they can only be listed.
fn trials(parts: Option<(Arc<Runtime>, Arc<Parts>)>) -> Vec<Trial> {
    // Held by all who are at work, or by one alone.
    let room = Arc::new(RwLock::new(()));
    let with_world = stories().into_iter().map(|Story { name, alone, needs, tell }| {
        let missed = parts.is_some() && needs.is_some_and(|tool| tool.is_missed(name));
        let (parts, room) = (parts.clone(), room.clone());
        let trial = Trial::test(name, move || {
            let (runtime, parts) = parts.expect("a story that is told has its parts");
            runtime.block_on(async {
                let _all = if alone { Err(room.write().await) } else { Ok(room.read().await) };
                let world = World::new(parts).await.map_err(|error| format!("{error:#}"))?;
                match tell.tell(&world).await {
                    Ok(()) => world.note_calls().await.map_err(|error| format!("{error:#}").into()),
                    Err(error) => Err(format!("{error:#}\n{}", world.autopsy().await).into()),
                }
            })
        });
        trial.with_ignored_flag(missed)
    });
    let told = |version, (name, tell): database::Story| {
        let (told_on, room) = (parts.clone(), room.clone());
        let missing = parts.as_ref().is_some_and(|(_, parts)| !parts.servers.have(version));
        let trial = Trial::test(name, move || {
            let (runtime, parts) = told_on.expect("a story that is told has its parts");
            runtime.block_on(async {
                let _others = room.read().await;
                let told = async { tell(parts.servers.of(version, &parts.testbed).await?).await };
                told.await.map_err(|error: anyhow::Error| format!("{error:#}").into())
            })
        });
        trial.with_kind(format!("PostgreSQL {version}")).with_ignored_flag(missing)
    };
    // Every version's turn comes early, so that their servers start side by side.
    let of_the_database =
        database::stories().into_iter().flat_map(|story| database::VERSIONS.map(|version| told(version, story)));
    // They have nothing of KubeVirt, and are told beside the simulated one.
    let real = matches!(KubeVirt::wanted(), Ok(KubeVirt::Real));
    let of_the_database = of_the_database.filter(|_| !real);
    of_the_database.chain(with_world).collect()
}
