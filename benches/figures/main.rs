//! The figures by which the system is judged, each beside a limit measured in the same run, and its goal.
//!
//! `cargo bench` measures all of them; `cargo bench -- FIGURE…` some. On a busy machine only the ratios mean something.

mod app_inserts;
mod bare;
mod burst;
mod counted;
mod failover;
mod fleet;
mod look_for_work;
mod one_desktop;
mod place;
mod plot;
mod report;
mod report_storm;
mod sights;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use cyberdesk_testbed::postgres::Options;
use cyberdesk_testbed::scratch::Scratch;
use cyberdesk_testbed::{Postgres, Progress, supervise};

use report::Figure;

/// Measures the figures by which the system is judged.
#[derive(Debug, Parser)]
#[command(name = "cargo bench --")]
pub(crate) struct Arguments {
    /// What to measure; all of it unless named.
    #[arg(value_enum)]
    figures: Vec<Name>,
    /// Old rows for look-for-work. Ten million take some minutes to make, and 6 GB of disk while it runs.
    #[arg(long, default_value_t = 10_000_000)]
    pub(crate) rows: i64,
    /// How often each measurement is made; the median counts.
    #[arg(long, default_value_t = 5)]
    pub(crate) repetitions: usize,
    /// How long the writers of app-inserts write each time.
    #[arg(long, default_value_t = 3.0)]
    pub(crate) seconds: f64,
    /// Desktops of one-desktop, one after the other.
    #[arg(long, default_value_t = 100)]
    pub(crate) desktops: usize,
    /// Rows of burst in one transaction; several bursts, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "1000,5000")]
    pub(crate) burst: Vec<usize>,
    /// Desktops of fleet; several fleets, separated by commas, to see how costs grow.
    #[arg(long, value_delimiter = ',', default_value = "10000")]
    pub(crate) fleet: Vec<usize>,
    /// Desktops that come and go before fleet looks at the operator's memory.
    #[arg(long, default_value_t = 3600)]
    pub(crate) churn: usize,
    /// Draws how the costs of fleet grow into this SVG file.
    #[arg(long)]
    pub(crate) plot: Option<PathBuf>,
    /// One JSON object for each figure instead of the table.
    #[arg(long)]
    json: bool,
    /// What `cargo bench` adds by itself.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Name {
    /// The app's inserts per second with our triggers, against none.
    AppInserts,
    /// How long the operator's look for changed rows takes above years of old ones.
    LookForWork,
    /// Reports told to the database as fast as it takes them.
    ReportStorm,
    /// From commit to VM, from ready guest to row, from shutdown request to delete, one desktop at a time.
    OneDesktop,
    /// Many rows in one transaction until all of their VMs are made.
    Burst,
    /// From the leader's end to the next desktop served by the other operator.
    Failover,
    /// Start, lateness of deadlines, memory and idle cost over many live desktops.
    Fleet,
}

fn main() -> ExitCode {
    supervise::become_supervisor_if_asked();
    let mut arguments = Arguments::parse();
    if arguments.figures.is_empty() {
        arguments.figures = Name::value_variants().to_vec();
    }
    match measure(&arguments) {
        Ok(figures) => {
            report::print(&figures, arguments.json);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<Vec<Figure>> {
    let runtime = tokio::runtime::Runtime::new()?;
    let mut figures = vec![];
    for name in &arguments.figures {
        figures.extend(runtime.block_on(async {
            match name {
                Name::AppInserts => app_inserts::measure(arguments).await,
                Name::LookForWork => look_for_work::measure(arguments).await,
                Name::ReportStorm => report_storm::measure(arguments).await,
                Name::OneDesktop => one_desktop::measure(arguments).await,
                Name::Burst => burst::measure(arguments).await,
                Name::Failover => failover::measure(arguments).await,
                Name::Fleet => fleet::measure(arguments).await,
            }
        })?);
    }
    Ok(figures)
}

/// A server with these settings beside the testbed's own. It ends with what is returned, the server first.
pub(crate) async fn server(settings: &[(&str, &str)]) -> Result<(Postgres, Scratch)> {
    let scratch = Scratch::new()?;
    let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let options = Options { settings, ..Options::default() };
    let server = Postgres::start(&options, &scratch, &Progress::quiet().part("postgres")).await?;
    Ok((server, scratch))
}
