//! The account that the operator has in a story: that of `deploy/`, with its Roles and nothing more.

use std::path::PathBuf;

use anyhow::{Context, Result};
use cyberdesk_testbed::ControlPlane;
use kube::Client;
use kube::api::{Api, DynamicObject, ListParams, Patch, PatchParams};
use kube::config::Kubeconfig;
use kube::core::{ApiResource, GroupVersionKind};

use crate::world::until;

/// What people apply, in this order.
const MANIFESTS: [&str; 3] = [
    include_str!("../../deploy/serviceaccount.yaml"),
    include_str!("../../deploy/rbac.yaml"),
    include_str!("../../deploy/accepted-templates.yaml"),
];
/// The account in them, and the namespace that a story's own stands in for.
const ACCOUNT: &str = "cyberdesk-operator";
const NAMESPACE: &str = "namespace: cyberdesk-system";

/// Makes the account in a namespace, and answers a kubeconfig with a token of it.
pub(crate) async fn in_namespace(control_plane: &ControlPlane, namespace: &str) -> Result<PathBuf> {
    let admin = control_plane.client().await?;
    for manifest in MANIFESTS {
        let ours = manifest.replace(NAMESPACE, &format!("namespace: {namespace}"));
        for document in ours.split("\n---\n") {
            apply(&admin, namespace, document).await?;
        }
    }
    let config = control_plane.service_account(namespace, ACCOUNT).await?;
    let mut file = Kubeconfig::read_from(control_plane.kubeconfig())?;
    for user in &mut file.auth_infos {
        user.auth_info = Some(config.auth_info.clone());
    }
    // Beside the administrator's, so that it goes when that goes. JSON is YAML.
    let kubeconfig = control_plane.kubeconfig().with_file_name(format!("{namespace}.kubeconfig"));
    std::fs::write(&kubeconfig, serde_json::to_string(&file)?)?;

    // The API server learns of a Role a moment after it was made.
    let account = Client::try_from(config)?;
    for (group, version, kind) in [("cyberdesk.io", "v1alpha1", "Cyberdesk"), ("kubevirt.io", "v1", "VirtualMachine")] {
        let kind = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        let api: Api<DynamicObject> = Api::namespaced_with(account.clone(), namespace, &kind);
        until(&format!("the account may list {}", kind.plural), async || {
            api.list(&ListParams::default().limit(1)).await?;
            Ok(true)
        })
        .await?;
    }
    Ok(kubeconfig)
}

async fn apply(admin: &Client, namespace: &str, document: &str) -> Result<()> {
    let object: DynamicObject = serde_saphyr::from_str(document).context("read a manifest of deploy/")?;
    let types = object.types.as_ref().context("a manifest says what it is")?;
    let kind = ApiResource::from_gvk(&types.try_into()?);
    let name = object.metadata.name.clone().context("a manifest has a name")?;
    Api::<DynamicObject>::namespaced_with(admin.clone(), namespace, &kind)
        .patch(&name, &PatchParams::apply("kubectl"), &Patch::Apply(object))
        .await
        .with_context(|| format!("apply {} {name} of deploy/", kind.kind))?;
    Ok(())
}
