//! The world of one story: a database, a namespace and an operator of its own, on parts shared by all.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cyberdesk_testbed::api_proxy::ApiProxy;
use cyberdesk_testbed::players::KubeVirt;
use cyberdesk_testbed::supervise::{Program, Spec, Supervised};
use cyberdesk_testbed::{Caller, Database, Testbed, kubevirt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::config::Kubeconfig;
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::database::Servers;
use crate::{account, grants, manifests};

/// Longest wait for anything that a story waits for. Far more than it takes: the machine may be busy. The real
/// KubeVirt tries again by itself, after back-offs of its own.
fn patience() -> Duration {
    Duration::from_secs(if matches!(KubeVirt::wanted(), Ok(KubeVirt::Real)) { 180 } else { 120 })
}
/// Shortest and longest time between two looks while waiting. Who has waited for long looks less often: many wait at
/// once, and their looks are work for the machine that they wait for.
const GLANCE: RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_millis(200);

/// The parts that all stories share.
pub(crate) struct Parts {
    pub(crate) servers: Servers,
    pub(crate) testbed: Testbed,
    pub(crate) client: Client,
    /// The functions of ours that daemons had Postgres call, in all stories so far.
    pub(crate) called: Mutex<BTreeSet<String>>,
}

/// The world of one story.
pub(crate) struct World {
    pub(crate) parts: Arc<Parts>,
    pub(crate) database: Database,
    pub(crate) namespace: String,
    user: Uuid,
    app: Mutex<Arc<tokio_postgres::Client>>,
    operator: Mutex<Option<Supervised>>,
    kubeconfig: PathBuf,
}

/// A row as the app reads it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) status: String,
    pub(crate) reason: Option<String>,
    pub(crate) message: Option<String>,
    pub(crate) timeout_at: Timestamp,
    pub(crate) shutdown_requested_at: Option<Timestamp>,
    pub(crate) ended_at: Option<Timestamp>,
}

impl World {
    /// A world in which nothing runs yet.
    pub(crate) async fn new(parts: Arc<Parts>) -> Result<Self> {
        let database = parts.testbed.postgres.database().await?;
        Self::on(parts, database).await
    }

    /// The same on a database of one's own choice.
    pub(crate) async fn on(parts: Arc<Parts>, database: Database) -> Result<Self> {
        let namespace = format!("story-{}", &Uuid::new_v4().simple().to_string()[..8]);
        // With the labels of ours: what they forbid, no desktop's pod of any story may need.
        manifests::apply_all(&parts.client, &manifests::file("crd/namespace.yaml", &namespace)?).await?;
        let user = database.sign_up().await?;
        let app = database.connect_as("postgres").await?;
        let kubeconfig = account::in_namespace(&parts.testbed.control_plane, &namespace)
            .await
            .context("make the operator's account")?;
        let app = Mutex::new(Arc::new(app));
        Ok(Self { parts, database, namespace, user, app, operator: Mutex::default(), kubeconfig })
    }

    fn client(&self) -> Arc<tokio_postgres::Client> {
        self.app.lock().expect("no story panics with it").clone()
    }

    /// Connects the app anew, after its connection was cut.
    pub(crate) async fn reconnect(&self) -> Result<()> {
        let client = Arc::new(self.database.connect_as("postgres").await?);
        *self.app.lock().expect("no story panics with it") = client;
        Ok(())
    }

    /// Starts an operator under the account of `deploy/`, with settings beside those that lead it to this world.
    pub(crate) async fn start_operator(&self, settings: &[(&str, &str)]) -> Result<()> {
        let operator = self.start_daemon("operator", settings).await?;
        *self.operator.lock().expect("no story panics with it") = Some(operator);
        Ok(())
    }

    /// Runs a command of the program as by `kubectl exec`: with the daemon's settings, account and role, over which
    /// come these. Answers exit code and standard output.
    pub(crate) async fn command(&self, arguments: &[&str], settings: &[(&str, &str)]) -> Result<(i32, String)> {
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_cyberdesk-operator"))
            .args(arguments)
            .env("DATABASE_URL", self.database.url("cyberdesk_daemon"))
            .env("KUBECONFIG", &self.kubeconfig)
            .env("CYBERDESK_NAMESPACE", &self.namespace)
            .envs(settings.iter().copied())
            .current_dir(self.parts.testbed.directory())
            .output()
            .await?;
        Ok((output.status.code().context("it ended by itself")?, String::from_utf8(output.stdout)?))
    }

    /// The kubeconfig of the operator's own account.
    pub(crate) fn kubeconfig(&self) -> &std::path::Path {
        &self.kubeconfig
    }

    /// The operator's own account.
    pub(crate) async fn account(&self) -> Result<Client> {
        let kubeconfig = Kubeconfig::read_from(&self.kubeconfig)?;
        Ok(Client::try_from(kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?)?)
    }

    /// The same for one of several: its log has its name.
    pub(crate) async fn start_daemon(&self, name: &str, settings: &[(&str, &str)]) -> Result<Supervised> {
        let program = Program::new(env!("CARGO_BIN_EXE_cyberdesk-operator"), ["run"]);
        let log = self.log(name);
        let mut spec = Spec::new("cyberdesk-operator", program, self.parts.testbed.directory(), &log);
        spec.stop_signal = 15;
        spec.remove = vec![log];
        spec.remove_if_empty = vec![self.parts.testbed.directory().to_owned()];
        spec.env = BTreeMap::from([
            ("DATABASE_URL".to_owned(), self.database.url("cyberdesk_daemon")),
            ("KUBECONFIG".to_owned(), self.kubeconfig.display().to_string()),
            ("CYBERDESK_NAMESPACE".to_owned(), self.namespace.clone()),
            ("CYBERDESK_LISTEN".to_owned(), "127.0.0.1:0".to_owned()),
            ("CYBERDESK_LOG_FORMAT".to_owned(), "text".to_owned()),
        ]);
        spec.env.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let daemon = Supervised::spawn(&spec)?;
        daemon.running().await?;
        Ok(daemon)
    }

    /// The operator's kubeconfig led through a proxy: the value of its `KUBECONFIG`.
    pub(crate) fn through(&self, proxy: &ApiProxy) -> Result<String> {
        let file = self.kubeconfig.with_extension("proxied");
        std::fs::write(&file, proxy.kubeconfig(Kubeconfig::read_from(&self.kubeconfig)?)?)?;
        Ok(file.display().to_string())
    }

    /// Notes what was called in this database, at a story's end.
    pub(crate) async fn note_calls(&self) -> Result<()> {
        let called = grants::called_in(&self.database).await?;
        self.parts.called.lock().expect("no story panics with it").extend(called);
        Ok(())
    }

    /// A daemon's log.
    pub(crate) fn log(&self, daemon: &str) -> PathBuf {
        self.parts.testbed.directory().join(format!("{}-{daemon}.log", self.namespace))
    }

    /// Waits until the operator has logged this.
    pub(crate) async fn operator_says(&self, words: &str) -> Result<()> {
        self.daemon_says("operator", words).await
    }

    /// What the operator has logged.
    pub(crate) fn operator_log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.log("operator"))?)
    }

    /// Whether the operator has logged this by now.
    pub(crate) fn operator_said(&self, words: &str) -> Result<bool> {
        Ok(std::fs::read_to_string(self.log("operator"))?.contains(words))
    }

    /// Waits until one of several has logged this.
    pub(crate) async fn daemon_says(&self, name: &str, words: &str) -> Result<()> {
        self.until(&format!("{name} says {words:?}"), async || {
            Ok(std::fs::read_to_string(self.log(name))?.contains(words))
        })
        .await
    }

    /// Kills the operator as a crash would, and starts it anew.
    pub(crate) async fn crash_operator(&self) -> Result<()> {
        let operator = self.kill_operator().await?;
        self.revive_operator(operator).await
    }

    /// Kills the operator as a crash would.
    pub(crate) async fn kill_operator(&self) -> Result<Supervised> {
        let operator = self.operator.lock().expect("no story panics with it").take();
        let operator = operator.context("no operator runs")?;
        operator.kill9().await?;
        Ok(operator)
    }

    /// Starts anew an operator that was killed.
    pub(crate) async fn revive_operator(&self, operator: Supervised) -> Result<()> {
        operator.start().await?;
        *self.operator.lock().expect("no story panics with it") = Some(operator);
        Ok(())
    }

    /// Ends the operator by SIGTERM, and waits until it is gone.
    pub(crate) async fn stop_operator(&self) -> Result<()> {
        let operator = self.operator.lock().expect("no story panics with it").take();
        let operator = operator.context("no operator runs")?;
        operator.signal(rustix::process::Signal::TERM)?;
        operator.ended().await
    }

    /// The one who owns its rows.
    pub(crate) fn user(&self) -> Uuid {
        self.user
    }

    /// Inserts a row as the app does, and answers its id.
    pub(crate) async fn insert(&self, lifetime: &str) -> Result<String> {
        self.insert_with(lifetime, None).await
    }

    /// The same with params.
    pub(crate) async fn insert_with(&self, lifetime: &str, params: Option<Value>) -> Result<String> {
        let statement = format!(
            "insert into cyberdesk_instances (user_id, status, timeout_at, params)
             values ($1, 'pending', now() + interval '{lifetime}', $2) returning id"
        );
        let row = self.client().query_one(&statement, &[&self.user, &params]).await?;
        Ok(row.get::<_, Uuid>(0).to_string())
    }

    /// The same with params as SQL has them.
    pub(crate) async fn insert_sql(&self, params: &str) -> Result<String> {
        let statement = format!("insert into cyberdesk_instances (user_id, params) values ($1, {params}) returning id");
        Ok(self.client().query_one(&statement, &[&self.user]).await?.get::<_, Uuid>(0).to_string())
    }

    /// Inserts many rows in one statement.
    pub(crate) async fn insert_many(&self, count: i32) -> Result<()> {
        let statement = "insert into cyberdesk_instances (user_id) select $1 from generate_series(1, $2)";
        self.client().execute(statement, &[&self.user, &count]).await?;
        Ok(())
    }

    /// Runs one statement of the app's about one row, and answers how many rows it returned or changed.
    pub(crate) async fn app(&self, statement: &str, id: &str) -> Result<u64> {
        Ok(self.client().execute(statement, &[&id.parse::<Uuid>()?]).await?)
    }

    /// Runs a statement that asks for one number.
    pub(crate) async fn count(&self, statement: &str) -> Result<i64> {
        Ok(self.client().query_one(statement, &[]).await?.get(0))
    }

    /// Runs statements as the owner of the schema.
    pub(crate) async fn sql(&self, statements: &str) -> Result<()> {
        Ok(self.client().batch_execute(statements).await?)
    }

    /// Asks for a shutdown as the desktop's owner does from a browser.
    pub(crate) async fn request_shutdown(&self, id: &str) -> Result<()> {
        let statement = "select changed from request_shutdown($1)";
        let answer = self.database.request(Caller::User(self.user), statement, &[&id.parse::<Uuid>()?]).await?;
        anyhow::ensure!(answer.len() == 1, "the owner's row was not found");
        Ok(())
    }

    /// Deletes the user as GoTrue does, and all their rows with them.
    pub(crate) async fn delete_user(&self) -> Result<()> {
        self.database.delete_user(self.user).await.map(drop)
    }

    pub(crate) async fn row(&self, id: &str) -> Result<Row> {
        let statement =
            "select status::text, reason, message, timeout_at at time zone 'utc', shutdown_requested_at, ended_at
                         from cyberdesk_instances where id = $1";
        let row = self.client().query_one(statement, &[&id.parse::<Uuid>()?]).await?;
        Ok(Row {
            status: row.get(0),
            reason: row.get(1),
            message: row.get(2),
            timeout_at: row.get(3),
            shutdown_requested_at: row.get(4),
            ended_at: row.get(5),
        })
    }

    /// The events in a desktop's history, in their order.
    pub(crate) async fn history(&self, id: &str) -> Result<String> {
        let statement = "select coalesce(string_agg(event, ', ' order by id), '')
                           from cyberdesk_desktop_history where desktop_id = $1";
        Ok(self.client().query_one(statement, &[&id.parse::<Uuid>()?]).await?.get(0))
    }

    pub(crate) fn crs(&self) -> Api<DynamicObject> {
        let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("cyberdesk.io", "v1alpha1", "Cyberdesk"));
        Api::namespaced_with(self.parts.client.clone(), &self.namespace, &kind)
    }

    pub(crate) fn vms(&self) -> Api<DynamicObject> {
        kubevirt::vms(&self.parts.client, &self.namespace)
    }

    pub(crate) fn vmis(&self) -> Api<DynamicObject> {
        kubevirt::vmis(&self.parts.client, &self.namespace)
    }

    pub(crate) fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.parts.client.clone(), &self.namespace)
    }

    /// Applies a CR as a person does.
    pub(crate) async fn apply_cr(&self, name: &str, spec: Value) -> Result<(), kube::Error> {
        let mut cr =
            json!({ "apiVersion": "cyberdesk.io/v1alpha1", "kind": "Cyberdesk", "metadata": { "name": name } });
        if !spec.is_null() {
            cr["spec"] = spec;
        }
        self.crs().patch(name, &PatchParams::apply("kubectl"), &Patch::Apply(cr)).await.map(drop)
    }

    /// Makes the ConfigMap with these templates.
    pub(crate) async fn templates(&self, files: &[(&str, &str)]) -> Result<()> {
        let map: ConfigMap = serde_json::from_value(json!({
            "metadata": { "name": "cyberdesk-vm-template" },
            "data": files.iter().copied().collect::<BTreeMap<_, _>>(),
        }))?;
        Api::<ConfigMap>::namespaced(self.parts.client.clone(), &self.namespace)
            .create(&PostParams::default(), &map)
            .await?;
        Ok(())
    }

    /// Tells the guest of a desktop to do something (see the played node's table of guest scripts).
    pub(crate) async fn guest(&self, id: &str, command: &str) -> Result<()> {
        let patch = json!({ "metadata": { "annotations": { "guest.testbed/do": command } } });
        self.vmis().patch(&vm_name(id), &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    pub(crate) async fn delete(&self, api: Api<DynamicObject>, name: &str) -> Result<()> {
        api.delete(name, &DeleteParams::default()).await.map(drop)?;
        Ok(())
    }

    /// What is left in the cluster of all desktops: CRs, VMs, VMIs and Secrets.
    pub(crate) async fn left(&self) -> Result<Vec<String>> {
        let all = ListParams::default();
        let mut left = vec![];
        for (kind, api) in [("CR", self.crs()), ("VM", self.vms()), ("VMI", self.vmis())] {
            left.extend(api.list(&all).await?.iter().map(|object| format!("{kind} {}", object.name_any())));
        }
        left.extend(self.secrets().list(&all).await?.iter().map(|secret| format!("Secret {}", secret.name_any())));
        Ok(left)
    }

    /// Waits until something holds. Looks at the state again and again; errors count as "not yet".
    pub(crate) async fn until(&self, what: &str, holds: impl AsyncFn() -> Result<bool>) -> Result<()> {
        self.until_within(patience(), what, holds).await
    }

    /// The same with a patience of its own.
    pub(crate) async fn until_within(
        &self,
        patience: Duration,
        what: &str,
        holds: impl AsyncFn() -> Result<bool>,
    ) -> Result<()> {
        until_within(patience, what, holds).await
    }

    /// Waits until the row has this status.
    pub(crate) async fn until_status(&self, id: &str, status: &str) -> Result<()> {
        self.until(&format!("the row of {id} says {status}"), async || Ok(self.row(id).await?.status == status)).await
    }

    /// Waits until the desktop is over, and answers its row. Nothing of it may be left in the cluster but
    /// its CR, which goes next.
    pub(crate) async fn until_over(&self, id: &str) -> Result<Row> {
        self.until(&format!("{id} is over"), async || Ok(self.row(id).await?.ended_at.is_some())).await?;
        let left: Vec<String> =
            self.left().await?.into_iter().filter(|object| object.contains(id) && !object.starts_with("CR")).collect();
        anyhow::ensure!(left.is_empty(), "the row says that it is over, but there is still {left:?}");
        self.until(&format!("the CR of {id} is released"), async || Ok(self.crs().get_opt(id).await?.is_none()))
            .await?;
        self.row(id).await
    }

    /// A running desktop, inserted as the app does.
    pub(crate) async fn running_desktop(&self, lifetime: &str) -> Result<String> {
        let id = self.insert(lifetime).await?;
        self.until_status(&id, "running").await?;
        Ok(id)
    }

    /// One field of the CR's status, as text.
    pub(crate) async fn cr_status(&self, name: &str, field: &str) -> Result<Option<String>> {
        let cr = self.crs().get_opt(name).await?;
        Ok(cr.and_then(|cr| cr.data["status"][field].as_str().map(str::to_owned)))
    }

    /// All that one would ask for when a story went wrong.
    pub(crate) async fn autopsy(&self) -> String {
        let mut text = String::new();
        let mut section = |title: &str, body: String| text.push_str(&format!("\n--- {title}\n{body}\n"));
        let rows = self.client().query("select to_jsonb(desktop) from cyberdesk.desktop limit 10", &[]).await;
        section("cyberdesk.desktop", lines(rows.into_iter().flatten().map(|row| row.get::<_, Value>(0))));
        for (title, api) in [("CRs", self.crs()), ("VMs", self.vms()), ("VMIs", self.vmis())] {
            let objects = api.list(&ListParams::default().limit(5)).await.map(|list| list.items).unwrap_or_default();
            section(title, lines(objects.iter().map(|object| json!({ "name": object.name_any(), "deleting": object.metadata.deletion_timestamp, "status": object.data["status"] }))));
        }
        for daemon in ["operator", "a", "b"] {
            let Ok(log) = std::fs::read_to_string(self.log(daemon)) else { continue };
            let tail = log.lines().rev().take(60).collect::<Vec<_>>();
            section(&format!("the log of {daemon}"), tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        text
    }
}

/// Waits until something holds, in no world in particular.
pub(crate) async fn until(what: &str, holds: impl AsyncFn() -> Result<bool>) -> Result<()> {
    until_within(patience(), what, holds).await
}

/// Does it, and answers how long it took: not counting what the machine stood still for meanwhile.
pub(crate) async fn timed<T>(it: impl Future<Output = Result<T>>) -> Result<Duration> {
    const TICK: Duration = Duration::from_millis(10);
    let mut it = pin!(it);
    let (mut took, mut last) = (Duration::ZERO, tokio::time::Instant::now());
    loop {
        let done = tokio::time::timeout(TICK, &mut it).await;
        took += last.elapsed().min(10 * TICK);
        last = tokio::time::Instant::now();
        if let Ok(done) = done {
            return done.map(|_| took);
        }
    }
}

async fn until_within(patience: Duration, what: &str, holds: impl AsyncFn() -> Result<bool>) -> Result<()> {
    let began = tokio::time::Instant::now();
    loop {
        let now = holds().await;
        if matches!(now, Ok(true)) {
            return Ok(());
        }
        if began.elapsed() > patience {
            let why = now.err().map(|error| format!(" ({error:#})")).unwrap_or_default();
            bail!("waited {} s in vain until {what}{why}", patience.as_secs());
        }
        tokio::time::sleep((began.elapsed() / 10).clamp(*GLANCE.start(), *GLANCE.end())).await;
    }
}

fn lines<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join("\n")
}

/// The name of a desktop's VM and VMI.
pub(crate) fn vm_name(id: &str) -> String {
    format!("cyberdesk-{id}")
}
