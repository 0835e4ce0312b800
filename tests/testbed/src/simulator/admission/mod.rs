//! The played virt-api: admission webhooks over HTTPS, registered under the names of the real ones. The subresource
//! API ([`super::subresources`]) is served by the same server.
//!
//! `review` decides what happens to a request, `rules` and `devices` are the table of what is refused and in which
//! words, `defaults` is what is written into an admitted object. The API server calls us by URL and trusts a
//! certificate made for this one run.

use anyhow::{Context, Result};
use axum::Json;
use axum::extract::Path;
use axum::routing::post;
use axum_server::tls_rustls::RustlsConfig;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use rcgen::CertifiedKey;
use rustls::pki_types::PrivateKeyDer;
use serde_json::{Value, json};
use std::net::TcpListener;
use std::sync::Arc;
use tokio::task::JoinSet;

use super::subresources;
use crate::aggregation::API_HOST;
use crate::kubevirt::admission_is_heeded;

mod defaults;
mod devices;
mod quantity;
mod review;
mod rules;
mod types;

/// Under whose name the objects are applied.
const MANAGER: &str = "testbed-simulator";

/// Serves the webhooks and the subresource API, registers them, and returns once the API server obeys them.
/// The server ends with the set.
pub(super) async fn start(client: &Client, tasks: &mut JoinSet<()>) -> Result<()> {
    let CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["127.0.0.1".to_owned(), API_HOST.to_owned()])?;
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)?;

    let listener = TcpListener::bind("127.0.0.1:0").context("a port for the webhooks")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let app = axum::Router::new().route("/{hook}", post(answer)).merge(subresources::routes(client));
    let server = axum_server::from_tcp_rustls(listener, RustlsConfig::from_config(Arc::new(tls)))?;
    tasks.spawn(async move {
        if let Err(error) = server.serve(app.into_make_service()).await {
            tracing::error!(%error, "the webhook server has ended");
        }
    });
    let authority = ByteString(cert.pem().into_bytes());
    register(client, &format!("https://{address}"), &authority).await?;
    subresources::register(client, address.port(), &authority, MANAGER).await?;
    admission_is_heeded(client).await
}

/// The spec of a VMI as it is once admitted.
pub(super) fn with_defaults(mut spec: Value) -> Value {
    defaults::instance(&mut spec);
    spec
}

async fn answer(Path(hook): Path<String>, Json(review): Json<Value>) -> Json<Value> {
    let request = &review["request"];
    let mut response = review::answer(&hook, request, Timestamp::now());
    response["uid"] = request["uid"].clone();
    Json(json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response }))
}

async fn register(client: &Client, url: &str, authority: &ByteString) -> Result<()> {
    // KubeVirt's own writes need no asking after creation: its webhooks let all of them through, and a thousand VMs
    // write much.
    let strangers =
        "request.operation == 'CREATE' || !request.userInfo.username.startsWith('system:serviceaccount:kubevirt:')";
    let hook = |name: &str, path: &str, resource: &str, operations: &[&str]| {
        json!({
            "name": format!("{name}.kubevirt.io"),
            "admissionReviewVersions": ["v1"],
            "clientConfig": { "url": format!("{url}/{path}"), "caBundle": authority },
            "failurePolicy": "Fail",
            "sideEffects": "None",
            "timeoutSeconds": 10,
            "matchConditions": [{ "name": "not-kubevirt-itself", "expression": strangers }],
            "rules": [{ "apiGroups": ["kubevirt.io"], "apiVersions": ["v1alpha3", "v1"], "operations": operations,
                "resources": [resource] }],
        })
    };
    let both = &["CREATE", "UPDATE"][..];
    let (vm, vmi) = ("virtualmachines", "virtualmachineinstances");
    let mutating = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": { "name": "virt-api-mutator", "labels": { "kubevirt.io": "virt-api-mutator" } },
        "webhooks": [
            hook("virtualmachines-mutator", review::MUTATE_VM, vm, both),
            hook("virtualmachineinstances-mutator", review::MUTATE_VMI, vmi, both),
        ],
    });
    let validating = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": { "name": "virt-api-validator", "labels": { "kubevirt.io": "virt-api-validator" } },
        "webhooks": [
            hook("virtualmachineinstances-create-validator", review::VALIDATE_VMI_CREATE, vmi, &["CREATE"]),
            hook("virtualmachineinstances-update-validator", review::VALIDATE_VMI_UPDATE, vmi, &["UPDATE"]),
            hook("virtualmachine-validator", review::VALIDATE_VM, vm, both),
        ],
    });
    let apply = PatchParams::apply(MANAGER).force();
    let mutators = Api::<MutatingWebhookConfiguration>::all(client.clone());
    mutators.patch("virt-api-mutator", &apply, &Patch::Apply(mutating)).await?;
    let validators = Api::<ValidatingWebhookConfiguration>::all(client.clone());
    validators.patch("virt-api-validator", &apply, &Patch::Apply(validating)).await?;
    Ok(())
}
