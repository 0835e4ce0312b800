//! The bare client: it makes a desktop with the calls that nobody could do without, one CR, one Secret, one VM, and
//! does nothing else. Its manifests are the operator's.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use cyberdesk_operator::cluster::{Cluster, Created};
use cyberdesk_operator::crd::{Cyberdesk, CyberdeskSpec};
use cyberdesk_operator::names::{ANNOTATION_DATABASE, Key, Owner};
use cyberdesk_operator::template::{Templates, built_in, files};
use cyberdesk_testbed::kubevirt;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, PostParams};
use kube::{Client, CustomResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::json;
use uuid::Uuid;

use crate::place::until;

/// A deadline that does not come.
const FAR: Timestamp = Timestamp::constant(4_000_000_000, 0);
/// Calls of the bare client at once. More do not make it faster on any machine that was tried.
pub(crate) const WIDTH: usize = 32;

/// The bare client in a namespace.
pub(crate) struct Bare {
    client: Client,
    namespace: String,
    cluster: Cluster,
    templates: Templates,
    annotations: BTreeMap<String, String>,
}

impl Bare {
    /// In the namespace of somebody else.
    pub(crate) fn new(client: &Client, namespace: &str) -> Self {
        Self {
            client: client.clone(),
            namespace: namespace.to_owned(),
            cluster: Cluster::new(client, namespace, namespace),
            templates: Templates::new(namespace, files(&built_in())),
            annotations: BTreeMap::new(),
        }
    }

    /// As the operator of a database makes them: it takes them for its own.
    pub(crate) fn of_database(self, id: Uuid) -> Self {
        Self { annotations: BTreeMap::from([(ANNOTATION_DATABASE.to_owned(), id.to_string())]), ..self }
    }

    /// In a namespace of its own, where no operator looks.
    pub(crate) async fn apart(client: &Client) -> Result<Self> {
        let name = "bare";
        let new: Namespace = serde_json::from_value(json!({ "metadata": { "name": name } }))?;
        Api::<Namespace>::all(client.clone()).create(&PostParams::default(), &new).await?;
        Ok(Self::new(client, name))
    }

    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Makes one desktop, one call after the other.
    pub(crate) async fn make(&self, id: Uuid, user: Uuid) -> Result<()> {
        let (key, owner) = (Key::of_row(id), Owner::Row(id));
        let spec = CyberdeskSpec { timeout_ms: None, expires_at: Some(FAR), params: None };
        self.cluster.create_cr(&key, owner.labels(&key, Some(user)), self.annotations.clone(), &spec).await?;
        let manifests = self.templates.render(&key, &owner, Some(user), None);
        let manifests = manifests.map_err(|refusal| anyhow::anyhow!(refusal.message))?;
        let made = self.cluster.create_vm(&key, &manifests, &self.annotations).await?;
        ensure!(made == Created::There, "{made:?}");
        Ok(())
    }

    /// Makes many, as fast as the API server lets it.
    pub(crate) async fn make_all(&self, ids: &[Uuid], user: Uuid) -> Result<()> {
        stream::iter(ids).map(|id| self.make(*id, user)).buffer_unordered(WIDTH).try_collect().await
    }

    /// Deletes one VM.
    pub(crate) async fn delete_vm(&self, name: &str) -> Result<()> {
        kubevirt::vms(&self.client, &self.namespace).delete(name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Deletes everything in its namespace, and waits until the guests have shut down.
    pub(crate) async fn clear(&self) -> Result<()> {
        let all = ListParams::default();
        let of = |kind| Api::<DynamicObject>::namespaced_with(self.client.clone(), &self.namespace, &kind);
        let (crs, vms) = (of(Cyberdesk::api_resource()), of(kubevirt::vm_resource()));
        delete_all(&vms).await?;
        until("the bare client's VMs are gone", async || Ok(vms.list(&all.clone().limit(1)).await?.items.is_empty()))
            .await?;
        // A guest that is still to start waits for its Secret.
        delete_all(&Api::<Secret>::namespaced(self.client.clone(), &self.namespace)).await?;
        delete_all(&crs).await
    }
}

/// One by one: the API server cuts a `deletecollection` of thousands after its minute.
async fn delete_all<K>(api: &Api<K>) -> Result<()>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    let names = api.list_metadata(&ListParams::default()).await?.items.into_iter().filter_map(|it| it.metadata.name);
    stream::iter(names)
        .map(async |name| {
            api.delete(&name, &DeleteParams::default()).await?;
            anyhow::Ok(())
        })
        .buffer_unordered(WIDTH)
        .try_collect()
        .await
}
