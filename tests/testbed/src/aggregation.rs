//! Where the API server finds virt-api's subresource API, real or played: by a Service that is another name for this
//! machine.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};

/// Where KubeVirt is installed.
pub(crate) const NAMESPACE: &str = "kubevirt";
/// How the API server names virt-api, as a client of TLS.
pub(crate) const API_HOST: &str = "virt-api.kubevirt.svc";
/// The path under which the API server serves the subresource API, and asks virt-api for it.
pub(crate) const SUBRESOURCES: &str = "/apis/subresources.kubevirt.io/v1";
/// How long the API server may take to heed a new APIService: generous, for a machine that compiles beside it.
const PATIENCE: Duration = Duration::from_secs(120);

/// Installs the namespace and the Service under which virt-api is reached.
pub(crate) async fn install_service(client: &Client, manager: &str) -> Result<()> {
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
    apply(client, &serde_json::from_value(namespace)?, manager).await?;
    let service = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "virt-api", "namespace": NAMESPACE },
        "spec": { "type": "ExternalName", "externalName": "localhost" } });
    apply(client, &serde_json::from_value(service)?, manager).await
}

/// Waits until the API server passes a request of the subresource API on.
pub(crate) async fn subresources_are_served(client: &Client) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let request = http::Request::get(SUBRESOURCES).body(Vec::new())?;
        match client.request::<Value>(request).await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => bail!("the subresource API is not served: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Applies an object of any kind.
pub(crate) async fn apply(client: &Client, object: &DynamicObject, manager: &str) -> Result<()> {
    let (kind, name) = (resource(object)?, object.name_any());
    let api: Api<DynamicObject> = match object.namespace() {
        Some(namespace) => Api::namespaced_with(client.clone(), &namespace, &kind),
        None => Api::all_with(client.clone(), &kind),
    };
    let mut object = object.clone();
    object.metadata.managed_fields = None;
    let apply = PatchParams::apply(manager).force();
    api.patch(&name, &apply, &Patch::Apply(object)).await.with_context(|| format!("apply {} {name}", kind.kind))?;
    Ok(())
}

/// What an object says that it is.
pub(crate) fn resource(object: &DynamicObject) -> Result<ApiResource> {
    let types = object.types.as_ref().context("a manifest says what it is")?;
    Ok(ApiResource::from_gvk(&types.try_into()?))
}
