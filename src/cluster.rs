//! The cluster's side: a tamed client, what is watched, and the calls that change something.

mod answers;
mod cache;
mod counted;
mod objects;
mod relist;
pub(crate) mod rights;
pub(crate) mod templates;
mod watch;
mod write;

use std::time::Duration;

use axum::body::Body;
use kube::Client;
use kube::client::{ClientBuilder, DynBody};
use tokio::time::Instant;
use tower::layer::layer_fn;
use tower::util::MapResponseLayer;

use crate::clock::Reading;
pub use answers::{Created, Error, Tried, Written};
pub use cache::Cache;
use counted::Counted;
pub use objects::{CrObject, Observed, VmObject, VmiObject};
pub(crate) use templates::Keeper;
pub(crate) use watch::follow;
pub use write::Cluster;

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
    config.read_timeout = Some(relist::SILENCE);
    config.write_timeout = Some(CALL_DEADLINE);
    Ok(ClientBuilder::try_from(config)?
        .with_layer(&MapResponseLayer::new(with_status))
        .with_layer(&layer_fn(Counted))
        .build())
}

/// Makes a `Status` of a bare text with which someone who has too much to do asks to be left alone: the wish in its
/// header would not be heard of otherwise.
fn with_status(response: http::Response<Box<DynBody>>) -> http::Response<Body> {
    let code = response.status();
    let Some(seconds) = bare_wish(code, response.headers()) else { return response.map(Body::new) };
    let status = serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(),
        "message": code.canonical_reason(), "details": { "retryAfterSeconds": seconds },
    });
    response.map(|_| Body::from(status.to_string()))
}

/// The seconds of `Retry-After` in an answer that is no `Status`: 429 of the API server's flow control, 503 of a load
/// balancer.
fn bare_wish(code: http::StatusCode, headers: &http::HeaderMap) -> Option<u32> {
    let header = |name: http::HeaderName| headers.get(name)?.to_str().ok();
    let is_status = header(http::header::CONTENT_TYPE).is_some_and(|kind| kind.starts_with("application/json"));
    let seconds = header(http::header::RETRY_AFTER)?.trim().parse().ok()?;
    (!is_status && matches!(code.as_u16(), 429 | 503)).then_some(seconds)
}

/// What the API server's clock says, from the `Date` of an answer, which has whole seconds only.
///
/// # Errors
///
/// If it does not answer, or without a date.
pub async fn server_time(client: &Client) -> anyhow::Result<Reading> {
    let asked = Instant::now();
    let request = http::Request::get("/version").body(kube::client::Body::empty())?;
    let answer = tokio::time::timeout(CALL_DEADLINE, client.send(request)).await??;
    let date = answer.headers().get(http::header::DATE).ok_or_else(|| anyhow::anyhow!("the answer has no date"))?;
    let time = jiff::fmt::rfc2822::parse(date.to_str()?)?.timestamp();
    let at = Instant::now();
    Ok(Reading { time, at, slack: at - asked + Duration::from_secs(1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_to_be_left_alone_is_heard_where_no_status_tells_it() {
        let cases = [
            (429, "text/plain; charset=utf-8", Some("1"), Some(1)),
            (503, "text/html", Some(" 30 "), Some(30)),
            (429, "application/json", Some("1"), None),
            (429, "text/plain", None, None),
            (503, "text/plain", Some("Wed, 21 Oct 2026 07:28:00 GMT"), None),
            (200, "text/plain", Some("1"), None),
        ];
        for (code, kind, wish, heard) in cases {
            let mut answer = http::Response::builder().status(code).header("content-type", kind);
            if let Some(wish) = wish {
                answer = answer.header("retry-after", wish);
            }
            let answer = answer.body(()).expect("it is an answer");
            assert_eq!(bare_wish(answer.status(), answer.headers()), heard, "{code} {kind} {wish:?}");
        }
    }
}
