//! The testbed's binary: the parts to look at and to work against, and the tools for machines that lack them.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use cyberdesk_testbed::node::Speed;
use cyberdesk_testbed::operator::{NAMESPACE, become_operator_if_asked};
use cyberdesk_testbed::players::KubeVirt;
use cyberdesk_testbed::running::Running;
use cyberdesk_testbed::{Progress, World, assets, supervise, world};

mod demo;
mod interrupt;
mod soak_command;
mod sql;

use interrupt::Interrupt;

/// The parts that a desktop needs, on this machine: Postgres as Supabase sets it up, an API server, KubeVirt, and the
/// operator at work.
#[derive(Parser)]
#[command(name = "cargo testbed", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    up: Up,
}

#[derive(Subcommand)]
enum Command {
    /// Start everything and stay until Ctrl-C (the default).
    Up(Up),
    /// Show six desktops' whole lives, from the insert to the end of each (also: cargo demo).
    Demo(demo::Demo),
    /// Let everything around two operators fail at random, and hold rows, objects and history against one another in
    /// the end (also: cargo soak).
    Soak(soak_command::Command),
    /// Run SQL against the running testbed, or DATABASE_URL: for machines without psql.
    Sql(sql::Sql),
    /// Run kubectl against the running testbed, or KUBECONFIG; a machine without kubectl gets one.
    Kubectl {
        /// What follows `kubectl`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
}

#[derive(Args)]
struct Up {
    /// Leave the operator out, and the database without its schema: migrate and run it yourself against what is
    /// printed.
    #[arg(long)]
    no_operator: bool,
    /// Who plays KubeVirt.
    #[arg(long, value_enum, default_value_t = KubeVirt::Simulated)]
    kubevirt: KubeVirt,
}

fn main() -> ExitCode {
    supervise::become_supervisor_if_asked();
    become_operator_if_asked();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime.context("start a runtime").and_then(|runtime| runtime.block_on(run(Cli::parse())));
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command.unwrap_or(Command::Up(cli.up)) {
        Command::Up(options) => up(&options).await,
        Command::Demo(demo) => demo.run().await,
        Command::Soak(soak) => soak.run().await,
        Command::Sql(sql) => sql.run().await.map(|()| ExitCode::SUCCESS),
        Command::Kubectl { args } => kubectl(&args).await,
    }
}

/// Starts everything, says where it is, and waits to be told to end.
async fn up(options: &Up) -> Result<ExitCode> {
    let mut interrupt = Interrupt::listen()?;
    let options = world::Options { kubevirt: options.kubevirt, speed: Speed::RECORDED, operator: !options.no_operator };
    let progress = Progress::shown();
    let started = tokio::select! {
        started = World::start(&options, &progress) => Some(started),
        () = interrupt.came() => None,
    };
    progress.end();
    let Some(world) = started.transpose()? else {
        return Ok(Interrupt::EXIT_CODE.into());
    };
    let running = world.announce()?;
    let (database_url, kubeconfig) = (&running.database_url, running.kubeconfig.display());
    println!("export DATABASE_URL='{database_url}'");
    println!("export KUBECONFIG='{kubeconfig}'");
    eprintln!("Ready. Ctrl-C ends it and leaves nothing behind. In another terminal, with these lines pasted:");
    eprintln!("  psql \"$DATABASE_URL\"");
    eprintln!("  kubectl -n {NAMESPACE} get cd,vm,vmi");
    eprintln!("Without psql and kubectl:");
    eprintln!("  cargo testbed sql 'select 1'");
    eprintln!("  cargo testbed kubectl -n {NAMESPACE} get cd,vm,vmi");
    if world.operator.is_none() {
        eprintln!("The operator:");
        eprintln!("  cargo run -- migrate");
        eprintln!("  cargo run -- run");
    }
    match &world.operator {
        None => interrupt.came().await,
        Some(operator) => {
            eprintln!("  tail -f {}", operator.process().log().display());
            tokio::select! {
                () = interrupt.came() => (),
                failure = operator.failure() => return Err(failure),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn kubectl(args: &[std::ffi::OsString]) -> Result<ExitCode> {
    let part = Progress::quiet().part("kubectl");
    let mut command = tokio::process::Command::new(assets::kubectl(&part).await?);
    if std::env::var_os("KUBECONFIG").is_none() {
        command.env("KUBECONFIG", Running::find()?.kubeconfig);
    }
    let status = command.args(args).status().await.context("run kubectl")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
