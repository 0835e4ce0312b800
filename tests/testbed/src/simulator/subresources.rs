//! The played subresource API: start, stop and restart of a VM, as virt-api does them.
//!
//! Each request is one patch of the VM; virt-controller does the rest. The API server has authorised who asks before
//! it passes the request on.

use anyhow::Result;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use k8s_openapi::ByteString;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::{Client, ResourceExt};
use serde::Deserialize;
use serde_json::{Value, json};

use super::vm::run_strategy;
use crate::aggregation::{NAMESPACE, SUBRESOURCES, apply, install_service, subresources_are_served};
use crate::kubevirt::{as_kubevirt, is_final, vmis, vms};

/// The last word of a request's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Verb {
    Start,
    Stop,
    Restart,
}

/// What a request changes.
#[derive(Clone, Debug, PartialEq)]
enum Change {
    /// The VM is to run for ever, or not at all.
    Run(bool),
    /// virt-controller is asked, in `status.stateChangeRequests`.
    Requests(Value),
}

/// Why a request fails.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Refusal {
    /// The VM is not in a state for it.
    Conflict(String),
    /// KubeVirt calls it an internal error, whoever's mistake it is.
    Internal(String),
}

/// What the request does to a VM whose VMI is this; refused in KubeVirt's words, its misspelling included.
fn change(verb: Verb, vm: &DynamicObject, vmi: Option<&DynamicObject>) -> Result<Change, Refusal> {
    let refuse = |words: String| Err(Refusal::Conflict(words));
    let stop = |vmi: &DynamicObject| json!({ "action": "Stop", "uid": vmi.uid() });
    let start = json!({ "action": "Start" });
    let strategy = run_strategy(vm);
    let alive = vmi.filter(|vmi| !is_final(vmi));
    let requests = match (verb, strategy, vmi) {
        (Verb::Start, ..) if alive.is_some() => return refuse("VM is already running".into()),
        (Verb::Start, "Halted", _) => return Ok(Change::Run(true)),
        (Verb::Start, "RerunOnFailure", Some(vmi)) if vmi.data["status"]["phase"] == "Failed" => {
            return refuse(format!("{strategy} does not support starting VM from failed state"));
        }
        (Verb::Start, "RerunOnFailure" | "Manual", Some(vmi)) => json!([stop(vmi), start]),
        (Verb::Start, "RerunOnFailure" | "Manual", None) => json!([start]),
        (Verb::Start, ..) => return refuse(format!("{strategy} does not support manual start requests")),

        (Verb::Stop, "Always" | "Once", _) => return Ok(Change::Run(false)),
        (Verb::Stop, "Halted", _) if alive.is_some() => {
            return refuse(format!("{strategy} only supports manual stop requests with a shorter graceperiod"));
        }
        (Verb::Stop, ..) => match alive {
            Some(vmi) => json!([stop(vmi)]),
            None => return refuse("VM is not running".into()),
        },

        (Verb::Restart, "Halted" | "Once", _) => {
            return refuse(format!("RunStategy {strategy} does not support manual restart requests"));
        }
        (Verb::Restart, _, None) => return refuse("VM is not running: Halted".into()),
        (Verb::Restart, _, Some(vmi)) => json!([stop(vmi), start]),
    };
    let underway = vm.data["status"]["stateChangeRequests"].as_array().is_some_and(|asked| !asked.is_empty());
    if underway && verb != Verb::Stop {
        return Err(Refusal::Internal("unable to complete request: stop/start already underway".into()));
    }
    Ok(Change::Requests(requests))
}

/// The answers under the API's path.
pub(super) fn routes(client: &Client) -> axum::Router {
    axum::Router::new()
        .route(SUBRESOURCES, get(discovery))
        .route(&format!("{SUBRESOURCES}/namespaces/{{namespace}}/virtualmachines/{{name}}/{{verb}}"), put(answer))
        .with_state(as_kubevirt(client))
}

/// Tells the API server to pass the API's requests on to this port, and returns once it does.
pub(super) async fn register(client: &Client, port: u16, authority: &ByteString, manager: &str) -> Result<()> {
    install_service(client, manager).await?;
    let service = json!({
        "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
        "metadata": { "name": "v1.subresources.kubevirt.io" },
        "spec": {
            "group": "subresources.kubevirt.io", "version": "v1", "groupPriorityMinimum": 1000, "versionPriority": 15,
            "service": { "namespace": NAMESPACE, "name": "virt-api", "port": port }, "caBundle": authority,
        },
    });
    apply(client, &serde_json::from_value(service)?, manager).await?;
    subresources_are_served(client).await
}

async fn discovery() -> Json<Value> {
    let verb = |verb: &str| {
        json!({ "name": format!("virtualmachines/{verb}"), "singularName": "", "namespaced": true, "kind": "",
            "verbs": ["update"] })
    };
    let verbs = ["start", "stop", "restart"].map(verb);
    Json(json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "subresources.kubevirt.io/v1",
        "resources": verbs,
    }))
}

async fn answer(
    State(client): State<Client>,
    Path((namespace, name, verb)): Path<(String, String, Verb)>,
    body: Bytes,
) -> Response {
    if !matches!(body.trim_ascii(), b"" | b"{}" | b"null") {
        return failure(&name, 400, "BadRequest", "the simulator does not play options of a subresource".into());
    }
    match carry_out(&client, &namespace, &name, verb).await {
        Ok(Ok(())) => StatusCode::ACCEPTED.into_response(),
        Ok(Err(Refusal::Conflict(words))) => {
            let message = format!("Operation cannot be fulfilled on virtualmachine.kubevirt.io \"{name}\": {words}");
            failure(&name, 409, "Conflict", message)
        }
        Ok(Err(Refusal::Internal(words))) => {
            failure(&name, 500, "InternalError", format!("Internal error occurred: {words}"))
        }
        Err(kube::Error::Api(status)) if status.code == 404 => {
            failure(&name, 404, "NotFound", format!("virtualmachine.kubevirt.io \"{name}\" not found"))
        }
        Err(error) => failure(&name, 500, "InternalError", format!("Internal error occurred: {error}")),
    }
}

async fn carry_out(client: &Client, namespace: &str, name: &str, verb: Verb) -> kube::Result<Result<(), Refusal>> {
    let api = vms(client, namespace);
    let vm = api.get(name).await?;
    let vmi = vmis(client, namespace).get_opt(name).await?;
    let (params, status) = (PatchParams::default(), &vm.data["status"]);
    let written = match change(verb, &vm, vmi.as_ref()) {
        Err(refusal) => return Ok(Err(refusal)),
        Ok(Change::Run(run)) => {
            let spec = if vm.data["spec"]["runStrategy"].is_string() {
                json!({ "runStrategy": if run { "Always" } else { "Halted" } })
            } else {
                json!({ "running": run })
            };
            api.patch(name, &params, &Patch::Merge(json!({ "spec": spec }))).await
        }
        Ok(Change::Requests(requests)) => {
            // Only on top of the requests that were seen: somebody else may ask, too.
            let mut operations = vec![json!({ "op": "add", "path": "/status/stateChangeRequests", "value": requests })];
            operations.insert(
                0,
                match &status["stateChangeRequests"] {
                    Value::Null if !status.is_object() => json!({ "op": "add", "path": "/status", "value": {} }),
                    seen => json!({ "op": "test", "path": "/status/stateChangeRequests", "value": seen }),
                },
            );
            if status["startFailure"].is_object() {
                operations.push(json!({ "op": "remove", "path": "/status/startFailure" }));
            }
            let patch = serde_json::from_value(Value::Array(operations)).map_err(kube::Error::SerdeError)?;
            api.patch_status(name, &params, &Patch::Json::<()>(patch)).await
        }
    };
    match written {
        Err(kube::Error::Api(refused)) if refused.code == 422 => Ok(Err(Refusal::Conflict(refused.message.clone()))),
        other => other.map(|_| Ok(())),
    }
}

/// A failure as Kubernetes words one.
fn failure(name: &str, code: u16, reason: &str, message: String) -> Response {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "reason": reason,
        "message": message, "details": { "name": name, "group": "kubevirt.io", "kind": "virtualmachine" },
    });
    (StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), Json(status)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of virt-api's table: what is asked, the strategy, the VMI's phase (or none yet), what is done.
    #[test]
    fn each_strategy_takes_each_request_in_its_own_way() {
        let conflict = |words: &str| Err(Refusal::Conflict(words.to_owned()));
        let (stop, start) = (json!({ "action": "Stop", "uid": "v" }), json!({ "action": "Start" }));
        let requests = |requests: &[&Value]| Ok(Change::Requests(json!(requests)));
        let table = [
            (Verb::Start, "Always", Some("Running"), conflict("VM is already running")),
            (Verb::Start, "Always", None, conflict("Always does not support manual start requests")),
            (Verb::Start, "Once", Some("Failed"), conflict("Once does not support manual start requests")),
            (Verb::Start, "Halted", None, Ok(Change::Run(true))),
            (Verb::Start, "Manual", None, requests(&[&start])),
            (Verb::Start, "Manual", Some("Failed"), requests(&[&stop, &start])),
            (Verb::Stop, "Always", None, Ok(Change::Run(false))),
            (Verb::Stop, "Once", Some("Running"), Ok(Change::Run(false))),
            (Verb::Stop, "RerunOnFailure", Some("Running"), requests(&[&stop])),
            (Verb::Stop, "RerunOnFailure", Some("Succeeded"), conflict("VM is not running")),
            (Verb::Stop, "Halted", None, conflict("VM is not running")),
            (Verb::Restart, "Always", Some("Running"), requests(&[&stop, &start])),
            (Verb::Restart, "Manual", None, conflict("VM is not running: Halted")),
            (Verb::Restart, "Once", None, conflict("RunStategy Once does not support manual restart requests")),
        ];
        let object = |value: Value| serde_json::from_value::<DynamicObject>(value).expect("an object");
        for (verb, strategy, phase, expected) in table {
            let vm = object(json!({ "metadata": {}, "spec": { "runStrategy": strategy } }));
            let vmi = phase.map(|phase| object(json!({ "metadata": { "uid": "v" }, "status": { "phase": phase } })));
            assert_eq!(change(verb, &vm, vmi.as_ref()), expected, "{verb:?}, {strategy}, {phase:?}");
        }
    }
}
