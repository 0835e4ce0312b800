//! `cargo soak`: a soak of any length, told as it goes.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use cyberdesk_testbed::Progress;
use cyberdesk_testbed::players::KubeVirt;
use cyberdesk_testbed::soak::{Outcome, Soak};
use tokio::time::Instant;

use crate::interrupt::Interrupt;

/// `soak`.
#[derive(Args)]
pub(crate) struct Command {
    /// For how long things go wrong, in seconds. Start, and rest until all is settled, come on top.
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// Where all that is random begins: the same orders again, of which real programs make a run of its own.
    #[arg(long)]
    seed: Option<u64>,
    /// Desktops that live at a time.
    #[arg(long, default_value_t = 100)]
    desktops: usize,
    /// Milliseconds between two faults, on average.
    #[arg(long, default_value_t = 2000)]
    every: u64,
    /// Who plays KubeVirt.
    #[arg(long, value_enum, default_value_t = KubeVirt::Simulated)]
    kubevirt: KubeVirt,
    /// Where to leave the operators' logs if something is found.
    #[arg(long, default_value = "target/soak")]
    logs: std::path::PathBuf,
}

impl Command {
    /// Succeeds if everything agrees in the end.
    pub(crate) async fn run(self) -> Result<ExitCode> {
        let mut interrupt = Interrupt::listen()?;
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(0..1_000_000));
        let soak = Soak {
            time: Duration::from_secs(self.seconds),
            seed,
            desktops: self.desktops,
            every: Duration::from_millis(self.every),
            kubevirt: self.kubevirt,
        };
        eprintln!("seed {seed}");
        let began = Instant::now();
        let tell = |what: &str| eprintln!("{:>5} s  {what}", began.elapsed().as_secs());
        let progress = Progress::shown();
        let outcome = tokio::select! {
            outcome = soak.run(&progress, tell) => outcome?,
            () = interrupt.came() => return Ok(Interrupt::EXIT_CODE.into()),
        };
        for (name, log) in &outcome.logs {
            std::fs::create_dir_all(&self.logs)?;
            let file = self.logs.join(format!("{name}.log"));
            std::fs::write(&file, log).with_context(|| format!("write {}", file.display()))?;
            eprintln!("the log of operator {name}: {}", file.display());
        }
        report(seed, &outcome);
        Ok(if outcome.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn report(seed: u64, outcome: &Outcome) {
    println!("seed {seed}: {} rows", outcome.rows);
    for (fault, times) in &outcome.faults {
        println!("{times:>6} x {fault}");
    }
    if outcome.findings.is_empty() {
        println!("Rows, CRs, VMs, Secrets and history agree.");
        return;
    }
    println!("Something is not as it should be:");
    outcome.findings.iter().for_each(|finding| println!("  {finding}"));
}
