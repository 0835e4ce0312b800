//! The testbed: a real Postgres, a real kube-apiserver with etcd, and a KubeVirt to run desktops on.
//!
//! From nothing, with no container engine: what is not on the machine is fetched or built once and cached, later
//! starts take seconds. Every server dies with the process that started it, however that ends, and leaves nothing
//! behind.
//!
//! ```text
//!   Testbed::start ─┬─ Postgres ────── template (Supabase's parts) ── template (migrated) ── a Database per test
//!                   └─ ControlPlane ── etcd, kube-apiserver, CRD ── kubeconfig, clients
//!        each server under its own supervisor; all of their data in one Scratch directory
//! ```
//!
//! A [`World`] is a testbed with an app's database, KubeVirt and the operator on it, at work together.
//!
//! Every `main` that starts a testbed calls [`supervise::become_supervisor_if_asked`] first; one that starts a world,
//! [`operator::become_operator_if_asked`] too.

pub mod account;
mod aggregation;
pub mod assets;
pub mod cache;
pub mod control_plane;
pub mod keyed;
pub mod kubevirt;
pub mod mirror;
pub mod node;
pub mod operator;
pub mod pgbouncer;
pub mod players;
pub mod postgres;
pub mod progress;
pub mod real;
pub mod running;
pub mod scratch;
pub mod simulator;
pub mod supervise;
pub mod world;

use anyhow::{Context as _, Result};

pub use control_plane::ControlPlane;
pub use postgres::{Caller, Database, Postgres};
pub use progress::Progress;
pub use world::World;

/// What to start.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The database server.
    pub postgres: postgres::Options,
    /// The API server.
    pub control_plane: control_plane::Options,
}

/// A running testbed. Dropping it ends every server and removes all data.
#[derive(Debug)]
pub struct Testbed {
    /// The database server.
    pub postgres: Postgres,
    /// The API server.
    pub control_plane: ControlPlane,
    scratch: scratch::Scratch,
}

impl Testbed {
    /// Starts everything, side by side.
    pub async fn start(options: &Options, progress: &Progress) -> Result<Self> {
        let scratch = scratch::Scratch::new()?;
        let (database, cluster) = (progress.part("postgres"), progress.part("kubernetes"));
        let (postgres, control_plane) = tokio::try_join!(
            async { Postgres::start(&options.postgres, &scratch, &database).await.context("start Postgres") },
            async {
                let started = ControlPlane::start(options.control_plane, &scratch, &cluster).await;
                started.context("start the control plane")
            },
        )?;
        Ok(Self { postgres, control_plane, scratch })
    }

    /// Where its data is while it runs.
    pub fn directory(&self) -> &std::path::Path {
        self.scratch.path()
    }

    /// Where a further server of it may keep its own data.
    pub fn scratch(&self) -> &scratch::Scratch {
        &self.scratch
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        // All at once; each field's own drop then waits for its servers.
        self.postgres.server().begin_end();
        self.control_plane.begin_end();
    }
}
