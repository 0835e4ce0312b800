//! A place to measure in: a testbed with an app's database, a cluster, and operators that are started by hand.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cyberdesk_operator::crd::Cyberdesk;
use cyberdesk_testbed::node::{NodeConfig, Speed};
use cyberdesk_testbed::operator::{NAMESPACE, launch};
use cyberdesk_testbed::players::{KubeVirt, Players};
use cyberdesk_testbed::postgres::{ADMINISTRATOR, Database};
use cyberdesk_testbed::simulator::{Detail, SimulatorConfig};
use cyberdesk_testbed::supervise::{Program, Supervised};
use cyberdesk_testbed::world::make_namespace;
use cyberdesk_testbed::{Options, Progress, Testbed};
use kube::api::{Api, ListParams};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

/// Longest wait for anything that is waited for.
const PATIENCE: Duration = Duration::from_secs(900);

/// What an operator logs here: a line for each desktop would be the largest part of what is measured.
const LOG: &str = "warn,cyberdesk_operator::operator=info,cyberdesk_operator::cluster::watch=info";

/// Guests that take no time: what is measured is ours.
const INSTANT: Speed = Speed {
    bind: Duration::ZERO,
    pod_ready: Duration::ZERO,
    boot: Duration::ZERO,
    shutdown: Duration::ZERO,
    pod_end: Duration::ZERO,
};

/// Servers without an operator. Dropping it ends all of it.
pub(crate) struct Place {
    _kubevirt: Players,
    pub(crate) app: tokio_postgres::Client,
    pub(crate) user: Uuid,
    pub(crate) client: kube::Client,
    pub(crate) database: Database,
    pub(crate) testbed: Testbed,
}

impl Place {
    /// Starts everything. With nobody for KubeVirt, virtual machines are objects that nothing happens to.
    pub(crate) async fn start(kubevirt: KubeVirt) -> Result<Self> {
        let testbed = Testbed::start(&Options::default(), &Progress::quiet()).await?;
        let database = testbed.postgres.database_named("cyberdesk", true).await?.kept();
        make_namespace(&testbed.control_plane).await?;
        let simulator = SimulatorConfig { detail: Detail::Essential, ..SimulatorConfig::default() };
        let node = NodeConfig { speed: INSTANT, ..NodeConfig::default() };
        let part = Progress::quiet().part("kubevirt");
        let players =
            Players::start(kubevirt, &testbed.control_plane, testbed.scratch(), (simulator, node), &part).await?;
        let (app, user) = (database.connect_as(ADMINISTRATOR).await?, database.sign_up().await?);
        let client = testbed.control_plane.client().await?;
        Ok(Self { _kubevirt: players, app, user, client, database, testbed })
    }

    /// Starts an operator, and answers at once.
    pub(crate) fn launch(&self, name: &str) -> Result<Supervised> {
        let kubeconfig = self.testbed.control_plane.kubeconfig();
        let settings = [
            ("CYBERDESK_IDENTITY", name),
            ("CYBERDESK_LOG", LOG),
            // It may make VMs faster than KubeVirt takes notice of them: the bare client does, too.
            ("CYBERDESK_MAX_UNSTARTED", "100000"),
        ];
        // The program itself: this one would hold more in memory.
        let program = Program::new(env!("CARGO_BIN_EXE_cyberdesk-operator"), ["run"]);
        launch(program, name, &settings, &self.database, kubeconfig, self.testbed.scratch())
    }

    /// Starts an operator, and waits until the first desktop that is inserted has been served.
    pub(crate) async fn operator(&self, name: &str) -> Result<Supervised> {
        let operator = self.launch(name)?;
        operator.running().await?;
        self.serves().await?;
        Ok(operator)
    }

    /// Inserts one desktop and waits until its VM is recorded; it is then ended, and what is left of it goes by itself.
    pub(crate) async fn serves(&self) -> Result<()> {
        let id = self.insert().await?;
        until("a desktop is served", async || {
            let recorded = "select vm_uid is not null from cyberdesk.desktop where id = $1";
            Ok(self.app.query_one(recorded, &[&id]).await?.get(0))
        })
        .await?;
        self.app.execute("select request_shutdown($1)", &[&id]).await?;
        Ok(())
    }

    /// Inserts a row as the app does. The answer comes with the commit.
    pub(crate) async fn insert(&self) -> Result<Uuid> {
        let statement = "insert into cyberdesk_instances (user_id) values ($1) returning id";
        Ok(self.app.query_one(statement, &[&self.user]).await?.get(0))
    }

    /// Inserts so many rows in one transaction.
    pub(crate) async fn insert_many(&self, count: usize) -> Result<Vec<Uuid>> {
        let statement = "insert into cyberdesk_instances (user_id) select $1 from generate_series(1, $2) returning id";
        let rows = self.app.query(statement, &[&self.user, &i32::try_from(count)?]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// A number of the database's.
    pub(crate) async fn count(&self, statement: &str) -> Result<i64> {
        Ok(self.app.query_one(statement, &[]).await?.get(0))
    }

    /// Ends all desktops and waits until nothing is left of them.
    pub(crate) async fn clear(&self) -> Result<()> {
        self.app.execute("select count(*) from request_shutdown_all($1)", &[&self.user]).await?;
        until("all desktops are over", async || {
            Ok(self.count("select count(*) from cyberdesk_instances where ended_at is null").await? == 0)
        })
        .await
    }

    /// Waits until there is no CR any more: the last that the operator does about a desktop.
    pub(crate) async fn no_crs(&self) -> Result<()> {
        let crs = Api::<Cyberdesk>::namespaced(self.client.clone(), self.namespace());
        let one = ListParams::default().limit(1);
        until("all CRs are gone", async || Ok(crs.list(&one).await?.items.is_empty())).await
    }

    /// The operator's own API: its namespace.
    pub(crate) fn namespace(&self) -> &'static str {
        NAMESPACE
    }
}

/// Waits until something holds. It is looked at often enough for figures in seconds, not for others.
pub(crate) async fn until(what: &str, holds: impl AsyncFn() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !holds().await.with_context(|| format!("look whether {what}"))? {
        ensure!(began.elapsed() < PATIENCE, "waited {} s in vain until {what}", PATIENCE.as_secs());
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}
