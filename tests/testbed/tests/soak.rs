//! A short soak in every test run: `cargo soak` runs longer ones.

use std::time::Duration;

use anyhow::{Result, ensure};
use cyberdesk_testbed::operator::become_operator_if_asked;
use cyberdesk_testbed::players::KubeVirt;
use cyberdesk_testbed::soak::Soak;
use cyberdesk_testbed::{Progress, supervise};
use libtest_mimic::{Arguments, Trial};

fn main() {
    supervise::become_supervisor_if_asked();
    become_operator_if_asked();
    let arguments = Arguments::from_args();
    let trial = Trial::test("a short soak leaves rows, objects and history in agreement", || Ok(soak()?));
    libtest_mimic::run(&arguments, vec![trial]).exit();
}

fn soak() -> Result<()> {
    let soak = Soak {
        time: Duration::from_secs(40),
        seed: 7,
        desktops: 40,
        every: Duration::from_secs(2),
        kubevirt: KubeVirt::Simulated,
    };
    let runtime = tokio::runtime::Runtime::new()?;
    let outcome = runtime.block_on(soak.run(&Progress::quiet(), |_| ()))?;
    for (name, log) in &outcome.logs {
        eprintln!("--- the log of operator {name}\n{log}");
    }
    ensure!(outcome.rows >= 40, "only {} rows were inserted", outcome.rows);
    ensure!(outcome.findings.is_empty(), "{}", outcome.findings.join("\n"));
    Ok(())
}
