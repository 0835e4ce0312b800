//! A quota that hits single guests: the API server refuses their pods.
//!
//! A real ResourceQuota hits a whole namespace, and a bare API server has no controller that would count for it. An
//! admission policy gives the same answer, `Forbidden`, to exactly the pods whose guest's script asks for it (KubeVirt
//! copies a VMI's annotations to its pod), whoever creates them.

use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

const NAME: &str = "guest.testbed";

pub(super) async fn install(client: &Client) -> kube::Result<()> {
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
    Ok(())
}
