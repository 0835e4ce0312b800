//! Both sides as they are at this moment, read once and never written: what `status` and `diff` show.
//!
//! A side that cannot be read is told by its own error, and the other is shown all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use deadpool_postgres::Pool;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::ListParams;
use kube::{Api, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use tokio_postgres::types::Type;
use uuid::Uuid;

use crate::cluster::{CALL_DEADLINE, Cluster, Observed, server_time, templates};
use crate::config::Config;
use crate::crd::Phase;
use crate::database::connect::query;
use crate::database::rows::{self, Unreadable};
use crate::fleet::Standing;
use crate::model::{Cr, Desired, Now, Row, Seen, Silence, Vm, Vmi};
use crate::names::{Key, Owner};
use crate::operator::templates_of;
use crate::plan::{Action, View, plan};
use crate::telemetry::chain;
use crate::template::Templates;

/// What is known of a side, or why nothing is.
pub type Side<T> = Result<T, String>;

/// Both sides.
pub struct Survey {
    /// Where CRs are, and where VMs.
    pub namespaces: (String, String),
    /// The database's half.
    pub database: Side<Database>,
    /// The cluster's half.
    pub cluster: Side<Objects>,
    /// To read more of either.
    pub(crate) pool: Option<Pool>,
    pub(crate) client: Option<Client>,
}

/// What the database says.
#[derive(Debug)]
pub struct Database {
    /// By key: those that are not over, and all others that something in the cluster has the name of.
    pub rows: BTreeMap<Key, Row>,
    /// Which it is.
    pub id: Uuid,
    /// Those that something in the cluster has the name of, and that it does not have.
    pub missing: BTreeSet<Key>,
    /// Whether a daemon serves it.
    pub service: Service,
    /// Its clock.
    pub now: Timestamp,
}

/// `cyberdesk.service_state()`: what an app is told of the operator.
#[derive(Clone, Debug, Serialize)]
pub struct Service {
    /// `serving`, `paused`, `braked` or `away`.
    pub state: String,
    /// The same in a sentence.
    pub message: String,
    /// Whether new desktops shall wait.
    pub paused: bool,
}

/// What the API server says.
#[derive(Debug)]
pub struct Objects {
    /// By key.
    pub crs: BTreeMap<Key, Cr>,
    /// By key, ours or not.
    pub vms: BTreeMap<Key, Vm>,
    /// By key, ours or not.
    pub vmis: BTreeMap<Key, Vmi>,
    /// Who leads, and why that is not known.
    pub leader: Side<Option<Leader>>,
    /// What new VMs are made from.
    pub templates: Side<Templates>,
    /// The API server's clock.
    pub now: Timestamp,
}

/// What the Lease says.
#[derive(Clone, Debug, Serialize)]
pub struct Leader {
    /// Who holds it, or held it last.
    pub name: String,
    /// The term.
    pub epoch: i32,
    /// Seconds since it was renewed.
    pub renewed_seconds_ago: i64,
    /// Whether it has run out.
    pub expired: bool,
}

impl Survey {
    /// Reads both sides. One desktop alone is asked for too, if it is over.
    pub async fn read(variables: &[(String, String)], client: anyhow::Result<Client>, also: Option<Uuid>) -> Self {
        let namespaces = Config::namespaces(variables).unwrap_or_default();
        let folder = Config::read(variables.to_vec()).ok().and_then(|(config, _)| config.templates);
        let pool = Config::target(variables)
            .and_then(|target| target.pool(&Arc::default()).map_err(|error| format!("{error:#}")));
        let client = client.map_err(|error| chain(error.as_ref()).to_string());
        let cluster = match &client {
            Ok(client) => read_cluster(client, &namespaces).await.map_err(|error| chain(error.as_ref()).to_string()),
            Err(error) => Err(error.clone()),
        };
        let cluster = cluster.map(|objects| match folder.map(|folder| templates_of(&folder)) {
            None => objects,
            Some(sources) => {
                let no_secret = |_: &_| Err("Secrets are not read for templates of a folder".to_owned());
                let templates = sources.map(|sources| Templates::read(&namespaces.1, &sources, no_secret));
                Objects { templates: templates.map_err(|error| format!("{error:#}")), ..objects }
            }
        });
        let mut asked: BTreeSet<Uuid> = also.into_iter().collect();
        asked.extend(cluster.iter().flat_map(Objects::keys).filter_map(|key| key.row_id()));
        let database = match &pool {
            Ok(pool) => read_database(pool, asked).await.map_err(|error| chain(error.as_ref()).to_string()),
            Err(error) => Err(error.clone()),
        };
        Self { namespaces, database, cluster, pool: pool.ok(), client: client.ok() }
    }

    /// The time by both clocks. One stands in for the other.
    pub fn now(&self) -> Option<Now> {
        let database = self.database.as_ref().ok().map(|it| it.now);
        let cluster = self.cluster.as_ref().ok().map(|it| it.now);
        Some(Now { database: database.or(cluster)?, cluster: cluster.or(database)? })
    }

    /// Every desktop that either side knows of.
    pub fn keys(&self) -> BTreeSet<Key> {
        let rows = self.database.iter().flat_map(|database| database.rows.keys().cloned());
        rows.chain(self.cluster.iter().flat_map(Objects::keys)).collect()
    }

    /// A desktop's row.
    pub fn row(&self, key: &Key) -> Seen<Row> {
        match (&self.database, key.row_id()) {
            (_, None) => Seen::Absent,
            (Err(_), Some(_)) => Seen::Unknown,
            (Ok(database), Some(_)) if database.missing.contains(key) => Seen::Absent,
            // One that is there and cannot be read is not absent.
            (Ok(database), Some(_)) => database.rows.get(key).cloned().map_or(Seen::Unknown, Seen::Present),
        }
    }

    /// Something of a desktop in the cluster.
    pub fn seen<T: Clone>(&self, key: &Key, of: impl Fn(&Objects) -> &BTreeMap<Key, T>) -> Seen<T> {
        match &self.cluster {
            Err(_) => Seen::Unknown,
            Ok(objects) => of(objects).get(key).cloned().map_or(Seen::Absent, Seen::Present),
        }
    }

    /// What the daemon would do to a desktop now, as far as it is seen here: not what it remembers of earlier tries,
    /// nor whom it has waiting in line.
    pub fn plan(&self, key: &Key) -> Vec<Action> {
        let (Some(now), Ok(objects)) = (self.now(), &self.cluster) else { return vec![] };
        let Ok(templates) = &objects.templates else { return vec![] };
        let view = View {
            key,
            row: self.row(key),
            cr: self.seen(key, |it| &it.crs),
            vm: self.seen(key, |it| &it.vms),
            vmi: self.seen(key, |it| &it.vmis),
            // They were read from the API server just now.
            live: true,
            silence: Silence::default(),
            failure: None,
            fleet: &Standing::default(),
            paused: self.database.as_ref().is_ok_and(|database| database.service.paused),
            braked: self.database.as_ref().is_ok_and(|database| database.service.state == "braked"),
            database: self.database.as_ref().ok().map(|database| database.id),
            // What it will do once its grace is over.
            orphan_rest: Duration::ZERO,
            templates,
        };
        plan(&view, now).actions
    }
}

impl Objects {
    fn keys(&self) -> impl Iterator<Item = Key> {
        self.crs.keys().chain(self.vms.keys()).chain(self.vmis.keys()).cloned().collect::<BTreeSet<_>>().into_iter()
    }
}

/// Reads the database's half.
pub(crate) async fn read_database(pool: &Pool, asked: BTreeSet<Uuid>) -> anyhow::Result<Database> {
    let unreadable = Unreadable::default();
    let mut all = rows::live(pool, &unreadable).await?;
    let missing: Vec<Uuid> = asked.into_iter().filter(|id| all.iter().all(|row| row.id != *id)).collect();
    let found = rows::by_id(pool, &missing, &unreadable).await?;
    all.extend(found.rows);
    let missing = found.missing.into_iter().map(Key::of_row).collect();
    let id =
        query(pool, "select database_id from cyberdesk.identity()", &[]).await.context("read which database it is")?;
    let id = id.first().context("the database has no identity")?.try_get(0)?;
    let asked = "select state, message, paused from cyberdesk.service_state()";
    let service = query(pool, asked, &[]).await.context("read how the operator fares")?;
    let service = service.first().context("the database does not say how the operator fares")?;
    let service = Service { state: service.try_get(0)?, message: service.try_get(1)?, paused: service.try_get(2)? };
    let now = rows::time(pool).await?.time;
    Ok(Database { rows: all.into_iter().map(|row| (Key::of_row(row.id), row)).collect(), id, missing, service, now })
}

async fn read_cluster(client: &Client, (namespace, vm_namespace): &(String, String)) -> anyhow::Result<Objects> {
    let (crs, vms, vmis) = Cluster::new(client, namespace, vm_namespace).apis();
    let read = async {
        let (crs, vms, vmis) = tokio::try_join!(list(crs), list(vms), list(vmis))?;
        let now = server_time(client).await?.time;
        let leader = leader(client, namespace, now).await.map_err(|error| chain(&error).to_string());
        let templates = templates::in_use(client, (namespace, vm_namespace)).await;
        let templates = templates.map_err(|error| chain(&error).to_string());
        anyhow::Ok(Objects { crs, vms, vmis, leader, templates, now })
    };
    timeout(CALL_DEADLINE * 2, read).await.context("the API server does not answer")?
}

async fn list<K>(api: Api<K>) -> anyhow::Result<BTreeMap<Key, K::Seen>>
where
    K: Observed + Clone + DeserializeOwned + std::fmt::Debug,
{
    let list = api.list(&ListParams::default()).await.with_context(|| format!("list {}", K::plural(&())))?;
    Ok(list.items.iter().filter_map(|object| Some((object.key()?, object.seen()))).collect())
}

async fn leader(client: &Client, namespace: &str, now: Timestamp) -> kube::Result<Option<Leader>> {
    let lease = Api::<Lease>::namespaced(client.clone(), namespace).get_opt("cyberdesk-operator").await?;
    let Some(spec) = lease.and_then(|lease| lease.spec) else { return Ok(None) };
    let renewed = spec.renew_time.map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    let age = renewed.duration_until(now).max(SignedDuration::ZERO);
    Ok(spec.holder_identity.filter(|holder| !holder.is_empty()).map(|name| Leader {
        name,
        epoch: spec.lease_transitions.unwrap_or_default(),
        renewed_seconds_ago: age.as_secs(),
        expired: age.as_secs() > i64::from(spec.lease_duration_seconds.unwrap_or_default()),
    }))
}

/// An action in words, as something that would be done. `None`: it changes nothing that anybody sees.
pub fn words(action: &Action) -> Option<String> {
    Some(match action {
        Action::CreateCr { .. } => "make its Cyberdesk".to_owned(),
        Action::ApplyCr { .. } => "bring its Cyberdesk in line with its row".to_owned(),
        Action::WriteCrStatus { status, .. } => {
            let phase = status.phase.map(|phase| format!("{phase:?}")).unwrap_or_default();
            let reason = status.reason.as_ref().map(|reason| format!(", {reason}")).unwrap_or_default();
            format!("write its Cyberdesk's status: {phase}{reason}")
        }
        Action::DeleteCr { .. } => "delete its Cyberdesk".to_owned(),
        Action::CreateVm { .. } => "make its VirtualMachine".to_owned(),
        Action::DeleteVm { .. } => "delete its VirtualMachine, so that the guest shuts down".to_owned(),
        Action::DeleteVmi { .. } => "delete the VirtualMachineInstance that its VM left behind".to_owned(),
        Action::DeleteSecrets { .. } => "delete its Secrets with user data".to_owned(),
        Action::Expire(_) => "have the database end its row, whose deadline has come".to_owned(),
        Action::Report(report) => {
            let status = report.status.map(|status| status.as_str().to_owned());
            let news = [status, report.reason.clone(), report.ended.then(|| "over".to_owned())];
            let news: Vec<String> = news.into_iter().flatten().collect();
            match news.is_empty() {
                true => "tell the database that its row was acted on".to_owned(),
                false => format!("tell its row: {}", news.join(", ")),
            }
        }
        Action::LookLive | Action::Forget => return None,
    })
}

/// A row in a word.
pub fn row_word(row: &Seen<Row>) -> String {
    match row {
        Seen::Unknown => "unknown".to_owned(),
        Seen::Absent => "-".to_owned(),
        Seen::Present(row) if row.ended => "over".to_owned(),
        Seen::Present(row) if !row.exists => "deleted".to_owned(),
        Seen::Present(row) if row.desired == Desired::Absent => "ending".to_owned(),
        Seen::Present(row) => row.status.as_str().to_owned(),
    }
}

/// A CR in a word.
pub fn cr_word(cr: &Seen<Cr>) -> String {
    match cr {
        Seen::Unknown => "unknown".to_owned(),
        Seen::Absent => "-".to_owned(),
        Seen::Present(cr) => cr.status.phase.map_or("new".to_owned(), |phase: Phase| format!("{phase:?}")),
    }
}

/// A VM in a word.
pub fn vm_word(vm: &Seen<Vm>) -> &'static str {
    match vm {
        Seen::Unknown => "unknown",
        Seen::Absent => "-",
        Seen::Present(vm) if vm.owner.is_none() => "foreign",
        Seen::Present(vm) if vm.deleting => "leaving",
        Seen::Present(_) => "there",
    }
}

/// A VMI in a word: its phase.
pub fn vmi_word(vmi: &Seen<Vmi>) -> String {
    match vmi {
        Seen::Unknown => "unknown".to_owned(),
        Seen::Absent => "-".to_owned(),
        Seen::Present(vmi) if vmi.deleting => "leaving".to_owned(),
        Seen::Present(vmi) => format!("{:?}", vmi.phase),
    }
}

/// What was made for a row that this database does not know, if it was.
pub fn is_strange(row: &Seen<Row>, owner: Option<&Owner>) -> bool {
    *row == Seen::Absent && matches!(owner, Some(Owner::Row(_)))
}

/// One entry of a desktop's history in the database.
#[derive(Clone, Debug)]
pub struct Entry {
    /// When, by the database's clock.
    pub at: Timestamp,
    /// What happened, in a line.
    pub words: String,
}

/// What the database has kept of a desktop, oldest first.
///
/// # Errors
///
/// If it cannot be read.
pub async fn history(pool: &Pool, id: Uuid) -> anyhow::Result<Vec<Entry>> {
    let asked =
        "select at, event, from_status, to_status, reason, timeout_at, actor, actor_role from cyberdesk.history_of($1)";
    let rows = query(pool, asked, &[(&id, Type::UUID)]).await.context("read the history of the desktop")?;
    rows.iter()
        .map(|row| {
            let (event, from, to): (String, Option<String>, Option<String>) =
                (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
            let (reason, timeout_at): (Option<String>, Option<Timestamp>) = (row.try_get(4)?, row.try_get(5)?);
            let (actor, role): (String, Option<String>) = (row.try_get(6)?, row.try_get(7)?);
            let mut words = event.clone();
            match (from, to) {
                (Some(from), Some(to)) if from != to => words.push_str(&format!(": {from} to {to}")),
                (_, Some(to)) => words.push_str(&format!(": {to}")),
                _ => (),
            }
            if let Some(reason) = reason {
                words.push_str(&format!(", {reason}"));
            }
            if let Some(at) = timeout_at.filter(|_| matches!(event.as_str(), "created" | "deadline")) {
                words.push_str(&format!(", until {}", whole(at)));
            }
            words.push_str(&format!(", by {}", role.unwrap_or(actor)));
            Ok(Entry { at: row.try_get(0)?, words })
        })
        .collect()
}

/// A time for people: without fractions.
pub fn whole(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// A span for people: its two greatest units.
pub fn span(span: SignedDuration) -> String {
    let seconds = span.abs().as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} m {:02} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {:02} m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_told_by_their_two_greatest_units() {
        for (seconds, told) in [(5, "5 s"), (-65, "1 m 05 s"), (3700, "1 h 01 m"), (90_000, "1 d 01 h")] {
            assert_eq!(span(SignedDuration::from_secs(seconds)), told);
        }
    }
}
