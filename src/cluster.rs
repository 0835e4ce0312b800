//! The cluster's side: a tamed client, what is watched, and the calls that change something.

mod cache;
mod counted;
mod objects;
pub(crate) mod rights;
pub(crate) mod templates;
mod watch;
mod write;

use std::time::Duration;

use jiff::Timestamp;
use kube::Client;
use kube::client::ClientBuilder;
use tokio::time::Instant;
use tower::layer::layer_fn;

pub use cache::Cache;
use counted::Counted;
pub use objects::{CrObject, Observed, VmObject, VmiObject};
pub(crate) use templates::Keeper;
pub(crate) use watch::follow;
pub use write::{Cluster, Created, Error, Tried, Written};

/// Longest time for one call. A write that hangs longer could land after this process was replaced.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// Connects with the kubeconfig or the pod's service account.
///
/// kube's client repeats refused writes for up to a minute by default, and waits for ever on a server
/// that accepts and never answers. Here a call is made once; who called decides what follows.
///
/// # Errors
///
/// If there is no configuration, or it cannot be read.
pub async fn connect() -> anyhow::Result<Client> {
    let mut config = kube::Config::infer().await?;
    config.default_retry = false;
    config.connect_timeout = Some(Duration::from_secs(5));
    // Longer than a watch lives, so that a quiet watch is not taken for a dead one.
    config.read_timeout = Some(Duration::from_secs(u64::from(watch::WATCH_SECONDS) + 10));
    config.write_timeout = Some(CALL_DEADLINE);
    Ok(ClientBuilder::try_from(config)?.with_layer(&layer_fn(Counted)).build())
}

/// What the API server's clock says, from the `Date` of an answer, which has whole seconds only.
///
/// # Errors
///
/// If it does not answer, or without a date.
pub async fn server_time(client: &Client) -> anyhow::Result<(Timestamp, Instant)> {
    let request = http::Request::get("/version").body(kube::client::Body::empty())?;
    let answer = tokio::time::timeout(CALL_DEADLINE, client.send(request)).await??;
    let date = answer.headers().get(http::header::DATE).ok_or_else(|| anyhow::anyhow!("the answer has no date"))?;
    let time = jiff::fmt::rfc2822::parse(date.to_str()?)?.timestamp();
    Ok((time, Instant::now()))
}
