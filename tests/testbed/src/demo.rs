//! `cargo demo`: six desktops' whole lives on real parts, from nothing, in a minute.
//!
//! ```text
//!   script ──▶ database, cluster ──▶ observe ──▶ news ──▶ board ──▶ table ──▶ screen
//!      └──────────────── what was done ────────────┘         └────▶ verdict
//! ```
//!
//! The operator runs as a process of its own, and nothing here looks into it: the story is told from the outside, by
//! what an app and a person with kubectl can see.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use cyberdesk_testbed::node::Speed;
use cyberdesk_testbed::operator::Operator;
use cyberdesk_testbed::players::KubeVirt;
use cyberdesk_testbed::{Progress, World, world};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use crate::interrupt::Interrupt;

mod board;
mod fate;
mod look_around;
mod observe;
mod screen;
mod script;
mod table;
mod verdict;

use board::Board;
use screen::Screen;
use script::Users;

/// How long the whole story may take: several times what it takes, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(90);

/// How often the picture is drawn anew.
const FRAME: Duration = Duration::from_millis(50);

/// How fast guests are here: like real ones that are in a hurry.
const GUESTS: Speed = Speed {
    bind: Duration::from_millis(80),
    pod_ready: Duration::from_millis(150),
    boot: Duration::from_millis(900),
    shutdown: Duration::from_millis(600),
    pod_end: Duration::from_millis(80),
};

/// How much of the operator's log is shown when something went wrong.
const LAST_LINES: usize = 20;

/// `demo`.
#[derive(Args)]
pub(crate) struct Demo {
    /// Stay up afterwards, and say how to look around.
    #[arg(long)]
    keep: bool,
    /// Who plays KubeVirt.
    #[arg(long, value_enum, default_value_t = KubeVirt::Simulated)]
    kubevirt: KubeVirt,
}

/// What came of the story.
struct Told {
    world: World,
    users: Users,
    faults: Vec<String>,
}

impl Demo {
    /// Shows the story. Succeeds if every desktop ended as told.
    pub(crate) async fn run(self) -> Result<ExitCode> {
        let mut interrupt = Interrupt::listen()?;
        // Whatever a story that is cut short had begun is ended and removed when it is dropped, in here.
        let told = tokio::select! {
            told = self.show() => Some(told?),
            () = interrupt.came() => None,
        };
        let Some(told) = told else {
            eprintln!("\nInterrupted: everything is ended and removed.");
            return Ok(Interrupt::EXIT_CODE.into());
        };
        if self.keep {
            stay(&told, &mut interrupt).await?;
        }
        Ok(if told.faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn show(&self) -> Result<Told> {
        ensure!(self.kubevirt != KubeVirt::None, "the demo needs somebody who plays KubeVirt: simulated or real");
        let progress = Progress::shown();
        let options = world::Options { kubevirt: self.kubevirt, speed: GUESTS, operator: true };
        let world = World::start(&options, &progress).await;
        progress.end();
        let world = world?;
        let operator = world.operator.as_ref().context("no operator was started")?;
        let users = Users::sign_up(&world).await?;
        let told = tell(&world, operator, &users).await;
        let faults = match told {
            Ok(faults) => faults,
            Err(error) => vec![format!("{error:#}")],
        };
        if faults.is_empty() {
            say("All six ended as told; the cluster holds only the CR that was applied by hand.")?;
        } else {
            complain(&faults, operator)?;
        }
        Ok(Told { world, users, faults })
    }
}

/// Lets the story happen and shows it; answers what was not as it should be.
async fn tell(world: &World, operator: &Operator, users: &Users) -> Result<Vec<String>> {
    let (tell, mut news) = mpsc::unbounded_channel();
    let (runs, running) = watch::channel(vec![]);
    let mut watchers = observe::watch(world, &tell).await?;
    let began = Instant::now();
    let mut board = Board::new(began);
    let mut screen = Screen::open()?;
    let mut frames = interval(FRAME);
    frames.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut script = std::pin::pin!(script::play(world, users, began, &running, &tell));
    let mut played = false;
    while !board.all_over() && began.elapsed() < PATIENCE {
        tokio::select! {
            Some((at, news)) = news.recv() => {
                board.take(at, news);
                let now_running = board.desktops.iter().filter(|desktop| desktop.marks.running.is_some());
                runs.send_replace(now_running.map(|desktop| desktop.fate).collect());
            }
            _ = frames.tick() => screen.show(&board)?,
            done = &mut script, if !played => {
                done?;
                played = true;
            }
            Some(ended) = watchers.join_next() => ended??,
            _ = operator.failure() => {
                screen.show(&board)?;
                bail!("the operator ended by itself");
            }
        }
    }
    screen.show(&board)?;
    drop(screen);

    let mut faults: Vec<String> = board.desktops.iter().filter_map(verdict::fault).collect();
    if began.elapsed() >= PATIENCE {
        faults.push(format!("the story was not over after {} s", PATIENCE.as_secs()));
    }
    faults.extend(left_behind(world).await?);
    let mut lines = vec![String::new()];
    lines.extend(verdict::account(&board));
    lines.push(String::new());
    let missed_by = verdict::deadline_missed_by(world, &board).await?;
    lines.extend(verdict::figures(&board, missed_by));
    lines.push(String::new());
    say(&lines.join("\n"))?;
    Ok(faults)
}

/// What is still in the cluster after a moment: the last deletions may be under way.
async fn left_behind(world: &World) -> Result<Vec<String>> {
    let mut left = vec![];
    let clean = async {
        loop {
            left = verdict::leftovers(world).await?;
            if left.is_empty() {
                return anyhow::Ok(());
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    match timeout(Duration::from_secs(5), clean).await {
        Ok(looked) => looked.map(|()| vec![]),
        Err(_) => Ok(left.iter().map(|object| format!("left in the cluster: {object}")).collect()),
    }
}

/// Says what went wrong, and keeps what the operator had to say about it.
fn complain(faults: &[String], operator: &Operator) -> Result<()> {
    let log: PathBuf = std::env::temp_dir().join(format!("cyberdesk-demo-operator-{}.log", std::process::id()));
    operator.save_log(&log)?;
    eprintln!("The operator's log ends so:");
    for line in operator.last_lines(LAST_LINES)?.lines() {
        eprintln!("  {line}");
    }
    eprintln!("All of it: {}\n", log.display());
    eprintln!("Not as told:");
    for fault in faults {
        eprintln!("  ✗ {fault}");
    }
    Ok(())
}

/// Stays up until told to end.
async fn stay(told: &Told, interrupt: &mut Interrupt) -> Result<()> {
    let running = told.world.announce()?;
    let operator = told.world.operator.as_ref().context("no operator was started")?;
    let log = operator.process().log().display().to_string();
    let tools = look_around::Tools::of_this_machine();
    say("")?;
    say(&look_around::text(&running, &log, told.users.stays, &tools))?;
    tokio::select! {
        () = interrupt.came() => Ok(()),
        failure = operator.failure() => bail!(failure),
    }
}

/// Prints, where a closed pipe is an error and no panic.
fn say(text: &str) -> Result<()> {
    use std::io::Write as _;
    writeln!(std::io::stdout(), "{text}").context("write to standard output")
}
