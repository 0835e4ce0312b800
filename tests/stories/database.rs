//! The database alone: what the app may count on, what the operator's functions answer, how a migration goes.

mod access;
mod app;
mod drop_in;
mod fixture;
mod functions;
mod history;
mod in_use;
mod limits;
mod migration;
mod model;
mod operator;
mod realtime;
mod wake;

use anyhow::Result;
use cyberdesk_testbed::Postgres;
use futures::future::BoxFuture;

/// A sentence, and what shows it. Each story makes its own databases on the shared server.
pub(crate) type Story = (&'static str, for<'a> fn(&'a Postgres) -> BoxFuture<'a, Result<()>>);

/// All stories about the database.
pub(crate) fn stories() -> Vec<Story> {
    [
        app::STORIES,
        drop_in::STORIES,
        functions::STORIES,
        limits::STORIES,
        in_use::STORIES,
        history::STORIES,
        realtime::STORIES,
        operator::STORIES,
        wake::STORIES,
        migration::STORIES,
        access::STORIES,
        model::STORIES,
    ]
    .concat()
}
