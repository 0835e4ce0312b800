//! The account that the operator has in a story: that of `deploy/`, with its Roles and nothing more.

use std::path::PathBuf;

use anyhow::Result;
use cyberdesk_testbed::ControlPlane;
use kube::Client;
use kube::api::{Api, DynamicObject, ListParams};
use kube::config::Kubeconfig;
use kube::core::{ApiResource, GroupVersionKind};

use crate::manifests;
use crate::world::until;

/// What of `deploy/` the daemon needs to be there, in this order.
const FILES: [&str; 3] = ["serviceaccount.yaml", "rbac.yaml", "accepted-templates.yaml"];
/// The account in them.
pub(crate) const ACCOUNT: &str = "cyberdesk-operator";

/// Makes the account in a namespace, and answers a kubeconfig with a token of it.
pub(crate) async fn in_namespace(control_plane: &ControlPlane, namespace: &str) -> Result<PathBuf> {
    let admin = control_plane.client().await?;
    for file in FILES {
        manifests::apply_all(&admin, &manifests::file(file, namespace)?).await?;
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
