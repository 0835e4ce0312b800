//! The thin binary over the library.

use std::process::ExitCode;

use cyberdesk_operator::{cli, telemetry};

/// It gives back what was only needed while all was listed or read; the C library's own keeps it.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match cli::main(std::env::args_os()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cyberdesk-operator: {}", telemetry::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
