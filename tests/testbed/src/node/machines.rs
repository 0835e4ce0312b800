//! The Node objects, and the heartbeat by which KubeVirt believes in them.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use std::time::Duration;

/// Real virt-controllers give a node up when its heartbeat is minutes old.
const HEARTBEAT: Duration = Duration::from_secs(20);

/// Puts the machines into the cluster, as virt-handler and kubelet would.
pub(super) async fn register(client: &Client, names: &[String]) -> kube::Result<()> {
    let nodes = Api::<Node>::all(client.clone());
    let apply = PatchParams::apply("testbed-node").force();
    for name in names {
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": name,
                "labels": { "kubevirt.io/schedulable": "true", "kubernetes.io/hostname": name, "kubernetes.io/arch": "amd64" },
                "annotations": { "kubevirt.io/heartbeat": Timestamp::now().to_string() },
            },
        });
        nodes.patch(name, &apply, &Patch::Apply(node)).await?;
        let amounts = json!({ "cpu": "4000", "memory": "16Ti", "pods": "100k" });
        let status = json!({ "status": { "capacity": amounts, "allocatable": amounts,
            "conditions": [{ "type": "Ready", "status": "True", "reason": "KubeletReady" }] } });
        nodes.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await?;
    }
    Ok(())
}

/// Keeps the heartbeat fresh for ever.
pub(super) async fn heartbeat(client: Client, names: Vec<String>) {
    let nodes = Api::<Node>::all(client);
    let mut beat = tokio::time::interval(HEARTBEAT);
    loop {
        beat.tick().await;
        for name in &names {
            let fresh =
                json!({ "metadata": { "annotations": { "kubevirt.io/heartbeat": Timestamp::now().to_string() } } });
            if let Err(error) = nodes.patch_metadata(name, &PatchParams::default(), &Patch::Merge(fresh)).await {
                tracing::debug!(node = name, %error, "heartbeat failed; the next one follows");
            }
        }
    }
}
