//! The stories: what users see, told on real parts.

mod database;

use std::process::ExitCode;

use cyberdesk_testbed::{Postgres, Progress, postgres, scratch::Scratch, supervise};
use libtest_mimic::{Arguments, Trial};

fn main() -> anyhow::Result<ExitCode> {
    supervise::become_supervisor_if_asked();
    let arguments = Arguments::from_args();
    let runtime: &'static tokio::runtime::Runtime =
        Box::leak(Box::new(tokio::runtime::Runtime::new()?));
    if arguments.list {
        return Ok(libtest_mimic::run(&arguments, trials(runtime, None)).exit_code());
    }

    let scratch = Scratch::new()?;
    let options = postgres::Options {
        migrate: Some(database::migrate_template),
        ..postgres::Options::default()
    };
    let part = Progress::quiet().part("postgres");
    let server: &'static Postgres = Box::leak(Box::new(
        runtime.block_on(Postgres::start(&options, &scratch, &part))?,
    ));
    Ok(libtest_mimic::run(&arguments, trials(runtime, Some(server))).exit_code())
}

fn trials(
    runtime: &'static tokio::runtime::Runtime,
    server: Option<&'static Postgres>,
) -> Vec<Trial> {
    database::stories()
        .into_iter()
        .map(|(name, story)| {
            Trial::test(name, move || {
                let server = server.expect("only listed stories have no server");
                runtime
                    .block_on(story(server))
                    .map_err(|error| format!("{error:?}").into())
            })
        })
        .collect()
}
