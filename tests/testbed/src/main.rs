//! The testbed's binary: the parts to look at and to work against, and the tools for machines that lack them.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use cyberdesk_testbed::running::Running;
use cyberdesk_testbed::{Options, Progress, Testbed, assets, supervise};
use tokio::signal::unix::{SignalKind, signal};

mod sql;

/// The parts that a desktop needs, on this machine: Postgres as Supabase sets it up, an API server, KubeVirt.
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
    /// Leave the operator out: migrate and run it yourself against what is printed.
    #[arg(long)]
    no_operator: bool,
    /// Who plays KubeVirt.
    #[arg(long, value_enum, default_value_t = KubeVirt::Simulated)]
    kubevirt: KubeVirt,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KubeVirt {
    /// The simulator of this repository.
    Simulated,
    /// Nobody: virtual machines are objects that nothing happens to.
    None,
}

fn main() -> ExitCode {
    supervise::become_supervisor_if_asked();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let done = runtime
        .context("start a runtime")
        .and_then(|runtime| runtime.block_on(run(Cli::parse())));
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
        Command::Up(options) => up(&options).await.map(|()| ExitCode::SUCCESS),
        Command::Sql(sql) => sql.run().await.map(|()| ExitCode::SUCCESS),
        Command::Kubectl { args } => kubectl(&args).await,
    }
}

/// Starts everything, says where it is, and waits to be told to end.
async fn up(options: &Up) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut told_to_end = async || {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = interrupt.recv() => (),
        }
    };
    let progress = Progress::shown();
    let started = tokio::select! {
        started = start(options, &progress) => Some(started),
        () = told_to_end() => None,
    };
    progress.end();
    let Some(started) = started.transpose()? else {
        return Ok(());
    };
    println!("DATABASE_URL={}", started.running.database_url);
    println!("KUBECONFIG={}", started.running.kubeconfig.display());
    eprintln!("Ready. Ctrl-C ends it and leaves nothing behind. In another terminal:");
    eprintln!(
        "  psql '{}'    or    cargo testbed sql 'select 1'",
        started.running.database_url
    );
    eprintln!(
        "  kubectl --kubeconfig {} get ns    or    cargo testbed kubectl get ns",
        started.running.kubeconfig.display()
    );
    told_to_end().await;
    Ok(())
}

/// What lives as long as `up` does. Fields are dropped in this order.
struct Started {
    running: Running,
    _testbed: Testbed,
}

async fn start(options: &Up, progress: &Progress) -> Result<Started> {
    let testbed = Testbed::start(&Options::default(), progress).await?;
    let database = testbed
        .postgres
        .database_named("cyberdesk", !options.no_operator)
        .await?
        .kept();
    let running = Running {
        database_url: database.url(cyberdesk_testbed::postgres::ADMINISTRATOR),
        kubeconfig: testbed.control_plane.kubeconfig().to_owned(),
    };
    match options.kubevirt {
        // The simulator starts here.
        KubeVirt::Simulated | KubeVirt::None => (),
    }
    // The operator starts here, unless it is left out.
    running.announce(testbed.directory())?;
    Ok(Started {
        running,
        _testbed: testbed,
    })
}

async fn kubectl(args: &[std::ffi::OsString]) -> Result<ExitCode> {
    let part = Progress::quiet().part("kubectl");
    let mut command = tokio::process::Command::new(assets::kubectl(&part).await?);
    if std::env::var_os("KUBECONFIG").is_none() {
        command.env("KUBECONFIG", Running::find()?.kubeconfig);
    }
    let status = command.args(args).status().await.context("run kubectl")?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}
