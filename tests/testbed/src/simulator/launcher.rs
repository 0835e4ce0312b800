//! The two objects that virt-controller makes: a VM's VMI, and a VMI's virt-launcher pod.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::kubevirt::{APP_LABEL, CREATED_BY_LABEL, DEFAULT_GRACE_SECONDS, VM_CONTROLLER_FINALIZER};

/// virt-controller's note on each object that it has seen which API version it knows.
pub(super) const OBSERVED_LATEST: &str = "kubevirt.io/latest-observed-api-version";
pub(super) const OBSERVED_STORAGE: &str = "kubevirt.io/storage-observed-api-version";

/// The VMI of a VM: the template under the VM's name. The VM's own labels are not copied, its template's are.
pub(super) fn instance(vm: &DynamicObject) -> Result<DynamicObject> {
    let template = &vm.data["spec"]["template"];
    let mut metadata = match &template["metadata"] {
        Value::Object(metadata) => metadata.clone(),
        _ => Map::new(),
    };
    metadata.remove("generateName");
    metadata.insert("name".into(), json!(vm.name_any()));
    metadata.insert("namespace".into(), json!(vm.namespace()));
    metadata.insert("finalizers".into(), json!([VM_CONTROLLER_FINALIZER]));
    metadata.insert("ownerReferences".into(), owner("VirtualMachine", vm));
    let mut instance = json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": metadata,
        "spec": template["spec"],
    });
    instance["metadata"]["annotations"]["kubevirt.io/vm-generation"] =
        json!(vm.metadata.generation.map(|it| it.to_string()));
    serde_json::from_value(instance).context("the template's metadata")
}

fn owner(kind: &str, object: &DynamicObject) -> Value {
    json!([{ "apiVersion": "kubevirt.io/v1", "kind": kind, "name": object.name_any(), "uid": object.uid(),
        "controller": true, "blockOwnerDeletion": true }])
}

/// The pod in which a VMI's guest runs. What KubeVirt puts into it besides is left out; what the API server may refuse
/// (name, host name, labels, quota) and what the kubelet waits for (Secrets) is here.
pub(super) fn pod(vmi: &DynamicObject) -> Result<Pod> {
    let spec = &vmi.data["spec"];
    let suffix = Uuid::new_v4().simple().to_string();
    let kept =
        |key: &str| !key.starts_with("kubectl.kubernetes.io") && ![OBSERVED_LATEST, OBSERVED_STORAGE].contains(&key);
    let mut annotations: Map<String, Value> =
        vmi.annotations().iter().filter(|(key, _)| kept(key)).map(|(key, value)| (key.clone(), json!(value))).collect();
    annotations.insert("kubevirt.io/domain".into(), json!(vmi.name_any()));
    let mut labels: Map<String, Value> = vmi.labels().iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    labels.insert(APP_LABEL.into(), json!("virt-launcher"));
    labels.insert(CREATED_BY_LABEL.into(), json!(vmi.uid()));
    let grace = spec["terminationGracePeriodSeconds"].as_i64().unwrap_or(DEFAULT_GRACE_SECONDS);
    let memory =
        spec["domain"]["memory"]["guest"].as_str().or(spec["domain"]["resources"]["requests"]["memory"].as_str());
    let pod = json!({
        "metadata": {
            "name": format!("virt-launcher-{}-{}", vmi.name_any(), &suffix[..5]),
            "namespace": vmi.namespace(),
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": owner("VirtualMachineInstance", vmi),
        },
        "spec": {
            "hostname": host_name(vmi),
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": grace + 30,
            "automountServiceAccountToken": false,
            "nodeSelector": spec["nodeSelector"],
            "containers": [{
                "name": "compute",
                "image": "virt-launcher.invalid/played:1",
                "resources": { "requests": { "cpu": "100m", "memory": memory.unwrap_or("1Gi") } },
            }],
            "volumes": secrets(spec),
        },
    });
    serde_json::from_value(pod).context("the virt-launcher pod")
}

/// `spec.hostname`, or the VMI's name up to its first dot and to 63 characters.
fn host_name(vmi: &DynamicObject) -> String {
    let name = vmi.data["spec"]["hostname"].as_str().map_or_else(|| vmi.name_any(), str::to_owned);
    name.split('.').next().unwrap_or_default().chars().take(63).collect()
}

/// The Secrets without which the container is not created.
fn secrets(spec: &Value) -> Vec<Value> {
    let mut volumes = Vec::new();
    for volume in spec["volumes"].as_array().into_iter().flatten() {
        let name = volume["name"].as_str().unwrap_or_default();
        for (source, key, suffix) in [
            ("cloudInitNoCloud", "secretRef", "udata"),
            ("cloudInitNoCloud", "networkDataSecretRef", "ndata"),
            ("cloudInitConfigDrive", "secretRef", "udata"),
            ("cloudInitConfigDrive", "networkDataSecretRef", "ndata"),
        ] {
            if let Some(secret) = volume[source][key]["name"].as_str() {
                volumes.push(json!({ "name": format!("{name}-{suffix}"), "secret": { "secretName": secret } }));
            }
        }
        if let Some(secret) = volume["secret"]["secretName"].as_str() {
            let optional = volume["secret"]["optional"].as_bool();
            volumes.push(json!({ "name": name, "secret": { "secretName": secret, "optional": optional } }));
        }
    }
    volumes
}
