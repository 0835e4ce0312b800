//! What the daemon serves: `/livez` and `/readyz`, each with a path per check, and `/metrics`.

use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::extract::{Path, Query};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use crate::health::{self, Check};

/// What is asked.
pub(crate) trait Served: Send + Sync + 'static {
    /// Whether a restart would help.
    fn live(&self) -> Vec<Check>;
    /// Whether desktops are served.
    fn ready(&self) -> Vec<Check>;
    /// All figures.
    fn figures(&self) -> String;
}

/// Serves for as long as nothing is wrong.
///
/// # Errors
///
/// If the server ends.
pub(crate) async fn serve<S: Served>(listener: TcpListener, served: Arc<S>) -> anyhow::Result<()> {
    let figures = served.clone();
    let figures = move || async move {
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        ([(CONTENT_TYPE, kind)], figures.figures()).into_response()
    };
    let router = Router::new().route("/metrics", get(figures));
    let router = with_checks(router, "livez", served.clone(), S::live);
    let router = with_checks(router, "readyz", served, S::ready);
    axum::serve(listener, router).await.context("serve /livez, /readyz and /metrics")
}

/// All checks at once, in full with `?verbose`, and each alone.
fn with_checks<S: Served>(router: Router, name: &'static str, served: Arc<S>, look: fn(&S) -> Vec<Check>) -> Router {
    let one = served.clone();
    let all = move |Query(query): Query<Vec<(String, String)>>| async move {
        answer(name, &look(&served), query.iter().any(|(key, _)| key == "verbose"))
    };
    let one = move |Path(wanted): Path<String>| async move {
        match look(&one).into_iter().find(|check| check.name == wanted) {
            Some(check) => answer(name, &[check], false),
            None => (StatusCode::NOT_FOUND, format!("{name} has no check {wanted}\n")).into_response(),
        }
    };
    router.route(&format!("/{name}"), get(all)).route(&format!("/{name}/{{check}}"), get(one))
}

fn answer(name: &str, checks: &[Check], verbose: bool) -> Response {
    let passed = checks.iter().all(Check::passed);
    let text = if passed && !verbose { "ok".to_owned() } else { health::told(name, checks) };
    (if passed { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text).into_response()
}
