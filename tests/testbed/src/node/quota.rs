//! A quota that hits single guests: the API server refuses their pods.
//!
//! A real ResourceQuota hits a whole namespace, and a bare API server has no controller that would count for it. An
//! admission policy gives the same answer, `Forbidden`, to exactly the pods whose guest's script asks for it (KubeVirt
//! copies a VMI's annotations to its pod), whoever creates them.

use anyhow::{Context, Result};
use k8s_openapi::api::admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use std::time::Duration;

const NAME: &str = "guest.testbed";

/// How long an API server may take to heed a policy.
const HEEDED_WITHIN: Duration = Duration::from_secs(30);

pub(super) async fn install(client: &Client) -> Result<()> {
    let apply = PatchParams::apply("testbed-node").force();
    let annotations = "object.metadata.?annotations['guest.testbed/never-schedules'].orValue('')";
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
        "metadata": { "name": NAME },
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": { "resourceRules": [
                { "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"] },
            ] },
            "validations": [{
                "expression": format!("{annotations} != 'quota'"),
                "message": "exceeded quota: testbed, requested: pods=1, used: pods=0, limited: pods=0",
                "reason": "Forbidden",
            }],
        },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": { "name": NAME },
        "spec": { "policyName": NAME, "validationActions": ["Deny"] },
    });
    let policies = Api::<ValidatingAdmissionPolicy>::all(client.clone());
    policies.patch(NAME, &apply, &Patch::Apply(policy)).await?;
    let bindings = Api::<ValidatingAdmissionPolicyBinding>::all(client.clone());
    bindings.patch(NAME, &apply, &Patch::Apply(binding)).await?;
    heeded(client).await
}

/// Waits until a dry run is refused: an API server takes a moment to heed a new policy.
async fn heeded(client: &Client) -> Result<()> {
    let pods = Api::<Pod>::namespaced(client.clone(), "default");
    let probe = serde_json::from_value(json!({
        "metadata": { "name": "is-the-quota-there", "annotations": { "guest.testbed/never-schedules": "quota" } },
        "spec": { "containers": [{ "name": "x", "image": "x.invalid/x:1" }] },
    }))?;
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let refused = async {
        while pods.create(&dry_run, &probe).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(HEEDED_WITHIN, refused).await.context("the API server does not heed the quota policy")
}
