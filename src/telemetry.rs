//! Logs: sentences for people with fields for machines; JSON unless a person is watching.

use std::error::Error;
use std::fmt;
use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For machines.
    Json,
    /// For people.
    Text,
}

/// The client of the API server tells of each call that fails as an error, and of each watch that is cut. Whoever made
/// the call tells of it too, once per trouble: in an outage the one is bounded by time, the other is not. Of
/// certificates that cannot be read anew it alone tells. A filter that names it has the last word.
const UNTOLD: &str = "kube_client::client=off,kube_client::client::tls=info";

/// Starts logging to standard error. `filter` is in the syntax of `RUST_LOG`.
///
/// # Errors
///
/// If the filter cannot be read, or logging was started before.
pub fn start(filter: &str, format: Option<Format>) -> anyhow::Result<()> {
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { Format::Text } else { Format::Json });
    let filter = EnvFilter::try_new(format!("{UNTOLD},{filter}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        Format::Json => builder.json().flatten_event(true).try_init(),
        Format::Text => builder.with_target(false).with_ansi(terminal).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("start logging: {error}"))
}

/// An error and all its causes on one line. `Display` of our errors never repeats their source.
pub fn chain(error: &(dyn Error + 'static)) -> impl fmt::Display {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        // Many libraries say in their own words what their source says too.
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}
