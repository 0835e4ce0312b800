//! The whole core in virtual time: the real decision, caches, store, queue and outbox of two daemons, on models of
//! the database and of the cluster, under a seeded scheduler that delays, reorders, loses, repeats, crashes, freezes
//! and elects. Now and then another database comes to be where the right one was, until that one is back or a person
//! confirms the other. After each step the invariants are checked; in the end everything comes back and must settle.
//!
//! `CYBERDESK_SIMULATION_SCHEDULES=1000000 cargo test --release --test simulation` plays a million, and says every half
//! minute how far it has come; `CYBERDESK_SIMULATION_FIRST=N` has it begin at another seed than 0.
//! `CYBERDESK_SIMULATION_SEED=N` plays one and tells it. A schedule that breaks an invariant is shrunk to the shortest
//! story that still does.

mod cluster;
mod daemon;
mod database;
mod deeds;
mod laws;
mod outage;
mod pair;
mod people;
mod planted;
mod processes;
mod world;

use std::io::Write as _;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cyberdesk_operator::model::RunStrategy;
use planted::Bug;
use world::{Deeds, World};

/// Schedules of an ordinary run.
const SCHEDULES: u64 = 10_000;
/// Things that may happen in one. Many are nothing, as nothing is there for them.
const STEPS: usize = 600;

/// How often a long run says how far it has come.
const TOLD_EVERY: Duration = Duration::from_secs(30);

/// What came of a schedule.
#[derive(Debug, PartialEq)]
struct Played {
    story: Vec<String>,
    end: Result<(), String>,
    deeds: Deeds,
}

impl Played {
    /// The story of a schedule that breaks.
    fn told(&self) -> String {
        let broken = self.end.as_ref().expect_err("a schedule that breaks goes on breaking");
        format!("{}  ! {broken}", self.story.iter().map(|line| format!("  {line}\n")).collect::<String>())
    }
}

/// One schedule: how the guests run, and what happens.
#[derive(Clone)]
struct Schedule {
    run_strategy: RunStrategy,
    choices: Vec<u32>,
}

impl Schedule {
    fn of(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let strategies = [RunStrategy::Once, RunStrategy::RerunOnFailure, RunStrategy::Always];
        let run_strategy = strategies[random.usize(..3)];
        Self { run_strategy, choices: (0..STEPS).map(|_| random.u32(..)).collect() }
    }

    /// Plays it in a time of its own. What happened, and how it broke.
    fn play(&self, bug: Option<Bug>) -> Played {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("a runtime without I/O can be built").block_on(async {
            let mut world = World::new(self.run_strategy, bug);
            world.begin();
            let mut story = vec![format!("guests run {:?}", self.run_strategy)];
            let mut end = Ok(());
            for choice in &self.choices {
                match world.step(*choice).await {
                    Ok(told) => story.extend(told),
                    Err(broken) => end = Err(broken),
                }
                if end.is_err() {
                    break;
                }
            }
            // Some end with an outage that few deadlines live to see the end of.
            if end.is_ok() && self.choices.first().is_some_and(|choice| choice >> 29 == 0) {
                story.push("the database goes for a day".to_owned());
                end = world.outlasts().await.map_err(|broken| format!("while it is away: {broken}"));
            }
            if end.is_ok() {
                end = world.settles().await.map_err(|broken| format!("when all is quiet again: {broken}"));
            }
            Played { story, end, deeds: world.deeds }
        })
    }

    fn breaks(&self, bug: Option<Bug>) -> bool {
        self.play(bug).end.is_err()
    }

    /// Leaves out all that is not needed to break it, in ever smaller pieces.
    fn shrink(mut self, bug: Option<Bug>) -> Self {
        let mut piece = self.choices.len() / 2;
        while piece > 0 {
            let mut at = 0;
            while at < self.choices.len() {
                let mut shorter = self.clone();
                shorter.choices.drain(at..(at + piece).min(self.choices.len()));
                if shorter.breaks(bug) {
                    self = shorter;
                } else {
                    at += piece;
                }
            }
            piece /= 2;
        }
        self
    }
}

/// The first seed in a range whose schedule breaks, found by all cores.
fn first_broken(seeds: Range<u64>, bug: Option<Bug>) -> Option<u64> {
    let (next, found) = (AtomicU64::new(seeds.start), AtomicU64::new(u64::MAX));
    let (began, told) = (Instant::now(), AtomicU64::new(1));
    let search = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end || seed >= found.load(Ordering::Relaxed) {
                return;
            }
            let spans = began.elapsed().as_secs() / TOLD_EVERY.as_secs();
            if spans >= told.load(Ordering::Relaxed) && told.fetch_max(spans + 1, Ordering::Relaxed) <= spans {
                let (played, all) = (seed - seeds.start, seeds.end - seeds.start);
                // Past the harness, which keeps what a test prints until it fails.
                let line = format!("{played} of {all} schedules in {} s\n", began.elapsed().as_secs());
                let _ = std::io::stderr().write_all(line.as_bytes());
            }
            if Schedule::of(seed).breaks(bug) {
                found.fetch_min(seed, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(search);
        }
    });
    Some(found.into_inner()).filter(|seed| *seed != u64::MAX)
}

#[expect(clippy::disallowed_methods, reason = "a test has its own settings")]
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}: not a number")))
}

#[test]
fn every_schedule_keeps_the_invariants_and_settles() {
    let seeds = match setting("CYBERDESK_SIMULATION_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = setting("CYBERDESK_SIMULATION_FIRST").unwrap_or_default();
            first..first + setting("CYBERDESK_SIMULATION_SCHEDULES").unwrap_or(SCHEDULES)
        }
    };
    let (count, began) = (seeds.end - seeds.start, Instant::now());
    if let Some(seed) = first_broken(seeds, None) {
        let story = Schedule::of(seed).shrink(None).play(None).told();
        panic!("the schedule of CYBERDESK_SIMULATION_SEED={seed} breaks an invariant:\n{story}");
    }
    let line = format!("{count} schedules of {STEPS} steps in {:.1?}\n", began.elapsed());
    let _ = std::io::stderr().write_all(line.as_bytes());
}

#[test]
fn a_seed_tells_the_same_story_each_time() {
    for seed in 0..20 {
        let schedule = Schedule::of(seed);
        assert_eq!(schedule.play(None), schedule.play(None));
    }
}

#[test]
fn everything_that_may_happen_does() {
    let mut deeds = Deeds::default();
    for seed in 0..800 {
        for (deed, count) in Schedule::of(seed).play(None).deeds {
            *deeds.entry(deed).or_default() += count;
        }
    }
    println!("{deeds:#?}");
    let rare: Vec<_> = deeds.iter().filter(|(_, count)| **count < 10).collect();
    assert!(deeds.len() == 52 && rare.is_empty(), "{} kinds, and hardly ever: {rare:?}", deeds.len());
}

#[test]
fn planted_bugs_are_found_and_shrunk_to_a_short_story() {
    for bug in Bug::ALL {
        let seed = first_broken(0..SCHEDULES, Some(bug)).unwrap_or_else(|| panic!("{bug:?} is not found"));
        let shrunk = Schedule::of(seed).shrink(Some(bug));
        let story = shrunk.play(Some(bug)).told();
        println!("{bug:?}, seed {seed}:\n{story}");
        assert!(shrunk.choices.len() < 60, "{bug:?} takes a long story:\n{story}");
    }
}
