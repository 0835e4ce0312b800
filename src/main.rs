//! The thin binary over the library.

use std::process::ExitCode;

use cyberdesk_operator::{cli, telemetry};

fn main() -> ExitCode {
    match cli::main(std::env::args_os()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cyberdesk-operator: {}", telemetry::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
