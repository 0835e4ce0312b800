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
use crate::node::{Node, NodeConfig, Speed};
use crate::operator::{NAMESPACE, Operator};
use crate::postgres::{ADMINISTRATOR, Database};
use crate::progress::{Part, Progress};
use crate::running::Running;
use crate::simulator::{Simulator, SimulatorConfig};
use crate::{Testbed, postgres};

/// Who makes virtual machines run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KubeVirt {
    /// The simulator of this repository, on guests this fast.
    Simulated(Speed),
    /// Nobody: virtual machines are objects that nothing happens to.
    None,
}

/// What a world is made of.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Who makes virtual machines run.
    pub kubevirt: KubeVirt,
    /// Whether the database is migrated and the operator runs; else both are left to the user.
    pub operator: bool,
}

/// A running world. Dropping it ends everything, the operator first.
pub struct World {
    /// The operator, unless it was left out.
    pub operator: Option<Operator>,
    _kubevirt: Option<(Simulator, Node)>,
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
        };
        let testbed = Testbed::start(&parts, progress).await?;
        let (database, kubevirt) = tokio::try_join!(
            async {
                let name = testbed.postgres.database_named("cyberdesk", options.operator);
                anyhow::Ok(name.await?.kept())
            },
            async {
                make_namespace(&testbed.control_plane).await?;
                match options.kubevirt {
                    KubeVirt::None => Ok(None),
                    KubeVirt::Simulated(speed) => {
                        let part = progress.part("kubevirt");
                        let started = simulate(&testbed.control_plane, speed, &part);
                        started.await.context("start the KubeVirt simulator").map(Some)
                    }
                }
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

async fn simulate(control_plane: &ControlPlane, speed: Speed, part: &Part) -> Result<(Simulator, Node)> {
    part.step("starting the simulator and the played node");
    let client = control_plane.client().await?;
    let node = NodeConfig { speed, ..NodeConfig::default() };
    let started =
        tokio::try_join!(Simulator::start(client.clone(), SimulatorConfig::default()), Node::start(client, node),)?;
    part.done("the simulator, on a played node");
    Ok(started)
}
