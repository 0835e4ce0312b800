//! The custom resources of this testbed: KubeVirt's two that matter, and the operator's.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Client, ResourceExt as _};

use crate::simulator::schema;

/// Where this repository keeps the operator's.
const OPERATOR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/crd");

/// Applies all of them and waits until the API serves them.
pub(super) async fn apply(client: &Client) -> Result<()> {
    let mut crds = schema::definitions()?;
    crds.extend(operator(Path::new(OPERATOR))?);
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let each = crds.iter().map(|crd| establish(&api, crd));
    futures::future::try_join_all(each).await.map(drop)
}

/// The CRDs among the YAML files of a directory, which may not be there yet.
fn operator(directory: &Path) -> Result<Vec<CustomResourceDefinition>> {
    let mut crds = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            let text = std::fs::read_to_string(&path)?;
            if text
                .lines()
                .any(|line| line.trim() == "kind: CustomResourceDefinition")
            {
                crds.push(
                    serde_saphyr::from_str(&text)
                        .with_context(|| format!("read {}", path.display()))?,
                );
            }
        }
    }
    Ok(crds)
}

async fn establish(
    api: &Api<CustomResourceDefinition>,
    crd: &CustomResourceDefinition,
) -> Result<()> {
    let name = crd.name_any();
    let apply = PatchParams::apply("testbed").force();
    api.patch(&name, &apply, &Patch::Apply(crd))
        .await
        .with_context(|| format!("apply the CRD {name}"))?;
    let established = await_condition(api.clone(), &name, conditions::is_crd_established());
    tokio::time::timeout(Duration::from_secs(30), established)
        .await
        .with_context(|| format!("wait for the CRD {name} to be established"))??;
    Ok(())
}
