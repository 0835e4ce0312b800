//! The app and its users, people with kubectl, and what guests do by themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::time::Duration;

use anyhow::{Context as _, Result};
use fastrand::Rng;
use kube::Client;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::json;
use tokio::time::sleep;
use uuid::Uuid;

use super::Parts;
use crate::kubevirt;
use crate::operator::NAMESPACE;
use crate::postgres::{ADMINISTRATOR, Database};

/// Between two deeds.
const PAUSE: Duration = Duration::from_millis(25);
/// A statement that is not answered by then is given up, as an app does.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the app knows of its own deeds: what the database has acknowledged.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known {
    /// Its end was asked for.
    pub(super) asked: bool,
    /// Its row was deleted, or that was tried.
    pub(super) deleted: bool,
    /// It was tried to have its guest crash.
    pub(super) crashed: bool,
}

pub(super) struct App {
    database: Database,
    connection: Option<tokio_postgres::Client>,
    user: Uuid,
    client: Client,
    rng: Rng,
    desktops: usize,
    known: BTreeMap<Uuid, Known>,
    /// Those that may still live.
    live: Vec<Uuid>,
}

/// What somebody does.
#[derive(Clone, Copy)]
enum Deed {
    Insert,
    InsertMany,
    RequestShutdown,
    Terminate,
    Fail,
    DeleteRow,
    Extend,
    ReadyTooLate,
    DeleteCr,
    DeleteVm,
    PowerOff,
    Crash,
}

const DEEDS: [(Deed, usize); 12] = [
    (Deed::Insert, 20),
    (Deed::InsertMany, 2),
    (Deed::RequestShutdown, 5),
    (Deed::Terminate, 3),
    (Deed::Fail, 1),
    (Deed::DeleteRow, 1),
    (Deed::Extend, 3),
    (Deed::ReadyTooLate, 2),
    (Deed::DeleteCr, 2),
    (Deed::DeleteVm, 1),
    (Deed::PowerOff, 2),
    (Deed::Crash, 1),
];

impl App {
    pub(super) async fn new(parts: &Parts, client: Client, seed: u64, desktops: usize) -> Result<Self> {
        Ok(Self {
            database: parts.testbed.postgres.existing(parts.database.name()),
            connection: None,
            user: parts.database.sign_up().await?,
            client,
            rng: Rng::with_seed(seed ^ 1),
            desktops,
            known: BTreeMap::new(),
            live: vec![],
        })
    }

    /// How many rows it knows to have inserted.
    pub(super) fn rows(&self) -> usize {
        self.known.len()
    }

    pub(super) fn known(&self) -> &BTreeMap<Uuid, Known> {
        &self.known
    }

    pub(super) async fn live(&mut self) -> Infallible {
        loop {
            // What fails, fails: a user tries something else.
            let _ = tokio::time::timeout(PATIENCE, self.act()).await;
            sleep(PAUSE).await;
        }
    }

    async fn act(&mut self) -> Result<()> {
        if self.connection.as_ref().is_none_or(tokio_postgres::Client::is_closed) {
            self.connection = Some(self.database.connect_as(ADMINISTRATOR).await?);
            self.forget_the_ended().await?;
        }
        let deed = self.choose();
        let id = self.rng.choice(&self.live).copied();
        match (deed, id) {
            (Deed::Insert, _) => self.insert(1).await,
            (Deed::InsertMany, _) => self.insert(10).await,
            (_, None) => self.insert(1).await,
            (Deed::RequestShutdown, Some(id)) => self.end(id, "select request_shutdown($1)").await,
            (Deed::Terminate, Some(id)) => {
                self.end(id, "update cyberdesk_instances set status = 'terminated', updated_at = now() where id = $1")
                    .await
            }
            (Deed::Fail, Some(id)) => {
                self.end(id, "update cyberdesk_instances set status = 'error', updated_at = now() where id = $1").await
            }
            (Deed::DeleteRow, Some(id)) => {
                self.note(id).deleted = true;
                self.end(id, "delete from cyberdesk_instances where id = $1").await
            }
            (Deed::Extend, Some(id)) => {
                let by = self.rng.u32(0..20);
                let statement = format!("select set_desktop_timeout($1, now() + interval '{by} seconds')");
                self.run(&statement, id).await
            }
            (Deed::ReadyTooLate, Some(id)) => {
                self.run(
                    "update cyberdesk_instances set status = 'running', stream_url = 'wss://late' where id = $1",
                    id,
                )
                .await
            }
            (Deed::DeleteCr, Some(id)) => {
                let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("cyberdesk.io", "v1alpha1", "Cyberdesk"));
                let crs = Api::<DynamicObject>::namespaced_with(self.client.clone(), NAMESPACE, &kind);
                crs.delete(&id.to_string(), &DeleteParams::default()).await.map(drop).context("delete the CR")
            }
            (Deed::DeleteVm, Some(id)) => {
                let vms = kubevirt::vms(&self.client, NAMESPACE);
                vms.delete(&vm_name(id), &DeleteParams::default()).await.map(drop).context("delete the VM")
            }
            (Deed::PowerOff, Some(id)) => self.tell_guest(id, "power-off").await,
            (Deed::Crash, Some(id)) => {
                self.note(id).crashed = true;
                self.tell_guest(id, "crash").await
            }
        }
    }

    fn choose(&mut self) -> Deed {
        if self.live.len() >= self.desktops {
            return Deed::RequestShutdown;
        }
        let mut at = self.rng.usize(0..DEEDS.iter().map(|(_, weight)| weight).sum());
        for (deed, weight) in DEEDS {
            if at < weight {
                return deed;
            }
            at -= weight;
        }
        Deed::Insert
    }

    async fn insert(&mut self, count: i32) -> Result<()> {
        // A third is short.
        let seconds = if self.rng.u8(0..3) == 0 { self.rng.u32(0..30) } else { 3600 };
        let statement = format!(
            "insert into cyberdesk_instances (user_id, timeout_at)
             select $1, now() + interval '{seconds} seconds' from generate_series(1, $2) returning id"
        );
        let connection = self.connection.as_ref().context("no connection")?;
        let rows = connection.query(&statement, &[&self.user, &count]).await?;
        for row in rows {
            let id = row.get(0);
            self.known.insert(id, Known::default());
            self.live.push(id);
        }
        Ok(())
    }

    async fn end(&mut self, id: Uuid, statement: &str) -> Result<()> {
        self.run(statement, id).await?;
        self.note(id).asked = true;
        self.live.retain(|other| *other != id);
        Ok(())
    }

    async fn run(&mut self, statement: &str, id: Uuid) -> Result<()> {
        let connection = self.connection.as_ref().context("no connection")?;
        connection.execute(statement, &[&id]).await?;
        Ok(())
    }

    async fn tell_guest(&mut self, id: Uuid, command: &str) -> Result<()> {
        let patch = json!({ "metadata": { "annotations": { "guest.testbed/do": command } } });
        let vmis = kubevirt::vmis(&self.client, NAMESPACE);
        vmis.patch(&vm_name(id), &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    fn note(&mut self, id: Uuid) -> &mut Known {
        self.known.entry(id).or_default()
    }

    /// Rows whose end the app did not ask for, or was not told of.
    async fn forget_the_ended(&mut self) -> Result<()> {
        let connection = self.connection.as_ref().context("no connection")?;
        let rows = connection.query("select id from cyberdesk_instances where ended_at is null", &[]).await?;
        let open: BTreeSet<Uuid> = rows.iter().map(|row| row.get(0)).collect();
        self.live.retain(|id| open.contains(id));
        // An insert may have been done though nobody heard so.
        self.live.extend(open.iter().filter(|id| !self.known.contains_key(id)));
        self.known.extend(
            open.iter().filter(|id| !self.known.contains_key(id)).map(|id| (*id, Known::default())).collect::<Vec<_>>(),
        );
        Ok(())
    }
}

pub(super) fn vm_name(id: Uuid) -> String {
    format!("cyberdesk-{id}")
}
