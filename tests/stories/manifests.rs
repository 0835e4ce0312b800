//! What people apply: the kustomizations of `deploy/`, read as kubectl does, as far as ours go.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams, TypeMeta};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::Value;

/// Where the namespace of all manifests is written; a story's own stands in for it.
const NAMESPACE: &str = "cyberdesk-system";

/// The objects of one of the kustomizations, in its order, made for this namespace.
pub(crate) fn objects(kustomization: &str, namespace: &str) -> Result<Vec<DynamicObject>> {
    let folder = folder(kustomization);
    let listed: Value = serde_saphyr::from_str(&std::fs::read_to_string(folder.join("kustomization.yaml"))?)?;
    let fields: Vec<&String> = listed.as_object().context("a kustomization is a mapping")?.keys().collect();
    ensure!(fields == ["apiVersion", "kind", "resources"], "only a list of files is read here: {fields:?}");
    let mut objects = vec![];
    for file in listed["resources"].as_array().context("a kustomization lists files")? {
        let file = file.as_str().context("a file has a name")?;
        objects
            .extend(objects_of(&folder.join(file), namespace).with_context(|| format!("read {kustomization}/{file}"))?);
    }
    Ok(objects)
}

/// The objects of one file of `deploy/`.
pub(crate) fn file(name: &str, namespace: &str) -> Result<Vec<DynamicObject>> {
    objects_of(&folder("deploy").join(name), namespace).with_context(|| format!("read deploy/{name}"))
}

fn folder(kustomization: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(kustomization)
}

fn objects_of(file: &Path, namespace: &str) -> Result<Vec<DynamicObject>> {
    let text = std::fs::read_to_string(file)?.replace(NAMESPACE, namespace);
    text.split("\n---\n").map(|document| Ok(serde_saphyr::from_str(document)?)).collect()
}

/// The one object of this kind and name.
pub(crate) fn find<'a>(objects: &'a [DynamicObject], kind: &str, name: &str) -> Result<&'a DynamicObject> {
    let is_it = |object: &&DynamicObject| {
        object.types.as_ref().is_some_and(|types| types.kind == kind) && object.metadata.name.as_deref() == Some(name)
    };
    objects.iter().find(is_it).with_context(|| format!("the manifests hold a {kind} {name}"))
}

/// Applies one as `kubectl apply --server-side` does, with fields that the API server does not know refused, and
/// answers it as it is then.
pub(crate) async fn apply(admin: &Client, object: &DynamicObject) -> Result<DynamicObject> {
    let name = name(object)?;
    let params = PatchParams::apply("kubectl").force().validation_strict();
    let applied = api(admin, object)?.patch(name, &params, &Patch::Apply(object)).await;
    applied.with_context(|| format!("apply {name} of deploy/"))
}

/// Applies them in their order.
pub(crate) async fn apply_all(admin: &Client, objects: &[DynamicObject]) -> Result<()> {
    for object in objects {
        apply(admin, object).await?;
    }
    Ok(())
}

/// Where it is in the API.
pub(crate) fn api(client: &Client, object: &DynamicObject) -> Result<Api<DynamicObject>> {
    let kind = ApiResource::from_gvk(&GroupVersionKind::try_from(kind(object)?)?);
    Ok(match &object.metadata.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &kind),
        None => Api::all_with(client.clone(), &kind),
    })
}

/// What it is called.
pub(crate) fn name(object: &DynamicObject) -> Result<&str> {
    object.metadata.name.as_deref().context("a manifest has a name")
}

fn kind(object: &DynamicObject) -> Result<&TypeMeta> {
    object.types.as_ref().context("a manifest says what it is")
}
