//! Custom resources: applied, and waited for until the API serves them.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ApiResource, DynamicObject, ListParams, Patch, PatchParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Client, ResourceExt as _};

/// How long a CRD may take to be served.
const PATIENCE: Duration = Duration::from_secs(30);

/// Applies all of these, side by side, and waits until the API serves them.
pub async fn install(client: &Client, crds: &[CustomResourceDefinition]) -> Result<()> {
    futures::future::try_join_all(crds.iter().map(|crd| establish(client, crd))).await.map(drop)
}

async fn establish(client: &Client, crd: &CustomResourceDefinition) -> Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let name = crd.name_any();
    let apply = PatchParams::apply("testbed").force();
    api.patch(&name, &apply, &Patch::Apply(crd)).await.with_context(|| format!("apply the CRD {name}"))?;
    let established = await_condition(api.clone(), &name, conditions::is_crd_established());
    tokio::time::timeout(PATIENCE, established)
        .await
        .with_context(|| format!("wait for the CRD {name} to be established"))??;
    served(client, crd).await.with_context(|| format!("wait for the API to serve {name}"))
}

/// Waits until the resource can be listed: for a moment after it is established, its storage still starts.
async fn served(client: &Client, crd: &CustomResourceDefinition) -> Result<()> {
    let version = crd.spec.versions.iter().find(|version| version.served).context("no version of it is served")?;
    let resource = ApiResource {
        group: crd.spec.group.clone(),
        version: version.name.clone(),
        api_version: format!("{}/{}", crd.spec.group, version.name),
        kind: crd.spec.names.kind.clone(),
        plural: crd.spec.names.plural.clone(),
    };
    let objects: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match objects.list_metadata(&ListParams::default().limit(1)).await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
