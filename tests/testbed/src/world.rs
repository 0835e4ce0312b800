//! Everything that a desktop needs, at work together: the parts, an app's database, KubeVirt and the operator.
//!
//! ```text
//!   Testbed ── Postgres ──── the database "cyberdesk", migrated ──┐
//!           └─ ControlPlane ── KubeVirt (played) ─────────────────┴── Operator, a process of its own
//! ```

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use crate::control_plane::ControlPlane;
use crate::node::{NodeConfig, Speed};
use crate::operator::{NAMESPACE, Operator};
use crate::players::{KubeVirt, Players};
use crate::postgres::{ADMINISTRATOR, Database};
use crate::progress::Progress;
use crate::running::Running;
use crate::simulator::SimulatorConfig;
use crate::{Testbed, postgres};

/// What a world is made of.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Who plays KubeVirt.
    pub kubevirt: KubeVirt,
    /// How fast guests are.
    pub speed: Speed,
    /// Whether the database is migrated and the operator runs; else both are left to the user.
    pub operator: bool,
}

/// A running world. Dropping it ends everything, the operator first.
pub struct World {
    /// The operator, unless it was left out.
    pub operator: Option<Operator>,
    _kubevirt: Players,
    /// The app's database.
    pub database: Database,
    /// The servers.
    pub testbed: Testbed,
}

impl World {
    /// Starts everything, side by side as far as one does not need the other.
    pub async fn start(options: &Options, progress: &Progress) -> Result<Self> {
        let parts = crate::Options {
            postgres: postgres::Options {
                migrate: options.operator.then(postgres::Options::default).and_then(|options| options.migrate),
                ..postgres::Options::default()
            },
            ..crate::Options::default()
        };
        let testbed = Testbed::start(&parts, progress).await?;
        let (database, kubevirt) = tokio::try_join!(
            async {
                let name = testbed.postgres.database_named("cyberdesk", options.operator);
                anyhow::Ok(name.await?.kept())
            },
            async {
                make_namespace(&testbed.control_plane).await?;
                let part = progress.part("kubevirt");
                let node = NodeConfig { speed: options.speed, ..NodeConfig::default() };
                let (cluster, scratch) = (&testbed.control_plane, testbed.scratch());
                Players::start(options.kubevirt, cluster, scratch, (SimulatorConfig::default(), node), &part).await
            },
        )?;
        let operator = if options.operator {
            let part = progress.part("operator");
            let kubeconfig = testbed.control_plane.kubeconfig();
            let started = Operator::start(&database, kubeconfig, testbed.scratch(), &part);
            Some(started.await.context("start the operator")?)
        } else {
            None
        };
        Ok(Self { operator, _kubevirt: kubevirt, database, testbed })
    }

    /// Where it is, for people and for other processes; from now on other terminals find it, too.
    pub fn announce(&self) -> Result<Running> {
        let running = Running {
            database_url: self.database.url(ADMINISTRATOR),
            kubeconfig: self.testbed.control_plane.kubeconfig().to_owned(),
        };
        running.announce(self.testbed.directory())?;
        Ok(running)
    }
}

/// What `deploy/crd` makes for a user: the namespace of CRs and VMs. The CRD is there already.
async fn make_namespace(control_plane: &ControlPlane) -> Result<()> {
    let namespaces: Api<Namespace> = Api::all(control_plane.client().await?);
    let manifest = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
    let apply = PatchParams::apply("testbed");
    namespaces
        .patch(NAMESPACE, &apply, &Patch::Apply(manifest))
        .await
        .with_context(|| format!("make the namespace {NAMESPACE}"))?;
    Ok(())
}
