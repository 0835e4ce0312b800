//! The database alone: what the app may count on, what the operator's functions answer, how a migration goes. Each
//! story is told on every version of PostgreSQL that is supported.

mod access;
mod app;
mod drop_in;
mod fixture;
mod functions;
mod growth;
mod history;
mod in_use;
mod limits;
mod lints;
mod migration;
mod model;
mod operator;
mod realtime;
mod versions;
mod wake;

use anyhow::Result;
use cyberdesk_testbed::Postgres;
use futures::future::BoxFuture;

pub(crate) use versions::{Servers, VERSIONS};

/// A sentence, and what shows it. Each story makes its own databases on a shared server.
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
        lints::STORIES,
        growth::STORIES,
    ]
    .concat()
}
