//! The cluster's half: the API server, our kind and KubeVirt's, what the account may do, the templates, and who leads.
//!
//! It is looked at under the daemon's own account, whose Roles are of one or two namespaces. What lies outside of them
//! is asked of what the API server tells every account: which kinds it serves, and their schemas. What is created is
//! created by dry run.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DynamicObject, ListParams, ObjectMeta, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt};
use serde_json::Value;
use tokio::time::timeout;

use super::{Check, Fault, Finding, Verdict};
use crate::cluster::rights::{self, Place, Right};
use crate::cluster::{CALL_DEADLINE, Cluster, CrObject, Observed, server_time, templates};
use crate::crd;
use crate::telemetry::chain;
use crate::template::Sources;

const API_SERVER: Check = Check::new("api-server", "without it nothing starts or ends; desktops that run go on");
const CRD: Check =
    Check::new("crd", "each desktop has a Cyberdesk; a field that the cluster does not know is dropped in silence");
const KUBEVIRT: Check = Check::new("kubevirt", "it makes the virtual machines");
const KUBEVIRT_HEALTH: Check =
    Check::new("kubevirt-health", "while it is not well no desktop starts, and ends are not seen");
const NAMESPACES: Check = Check::new("namespaces", "desktops are made in them");
const RIGHTS: Check = Check::new("rights", "each verb is one that the daemon uses; without it a step of a life fails");
const TEMPLATES: Check = Check::new("templates", "a template that is refused makes no desktop");
const CLOCK: Check = Check::new(
    "cluster-clock",
    "desktops applied by hand end by the API server's clock, and so do all while the database is away",
);
const ADOPTION: Check =
    Check::new("adoption", "what the Kopf operator holds is left alone: its rows get no VM, and nothing here ends it");
const LEADER: Check = Check::new("leader", "one daemon leads and does all the work; without one nothing is done");

/// Clocks further apart than this make times hard to compare. Nothing is decided by this machine's.
const SKEW: SignedDuration = SignedDuration::from_secs(2);

const APPLY_CRD: &str = "kubectl apply -k deploy/crd";
const APPLY_ROLES: &str = "kubectl apply -f deploy/rbac.yaml";

/// The places that are looked at.
pub(super) struct Places {
    pub(super) namespace: String,
    pub(super) vm_namespace: String,
    /// Templates of a folder, in place of the ConfigMap's.
    pub(super) folder: Option<Sources>,
}

/// Looks at all of it. Where the API server does not answer, the rest is left out.
pub(super) async fn examine(client: anyhow::Result<Client>, places: &Places) -> Vec<Finding> {
    let client = match client {
        Ok(client) => client,
        Err(error) => return vec![unreachable(chain(error.as_ref()).to_string())],
    };
    let version = match timeout(CALL_DEADLINE, client.apiserver_version()).await {
        Ok(Ok(version)) => version.git_version,
        Ok(Err(error)) => return vec![unreachable(chain(&error).to_string())],
        Err(_) => return vec![unreachable(format!("no answer within {} s", CALL_DEADLINE.as_secs()))],
    };
    vec![
        API_SERVER.ok(format!("Kubernetes {version} answers")),
        within(CRD, our_kind(&client)).await,
        within(KUBEVIRT, kubevirt(&client)).await,
        within(KUBEVIRT_HEALTH, kubevirt_health(&client)).await,
        within(NAMESPACES, namespaces(&client, places)).await,
        within(RIGHTS, rights(&client, places)).await,
        within(TEMPLATES, templates(&client, places)).await,
        within(ADOPTION, adoption(&client, places)).await,
        within(CLOCK, clock(&client)).await,
        within(LEADER, leader(&client, places)).await,
    ]
}

fn unreachable(why: String) -> Finding {
    let mend = vec!["kubectl --v=6 get --raw /version   # with the same KUBECONFIG".to_owned()];
    API_SERVER.finding(Verdict::Failure, format!("it cannot be reached: {why}"), mend)
}

/// All of one check's calls together.
async fn within(check: Check, look: impl Future<Output = kube::Result<Finding>>) -> Finding {
    match timeout(CALL_DEADLINE * 3, look).await {
        Ok(Ok(finding)) => finding,
        Ok(Err(error)) => check.unseen(format!("it cannot be looked at: {}", chain(&error))),
        Err(_) => check.unseen("it cannot be looked at: the API server does not answer in time"),
    }
}

async fn raw(client: &Client, path: &str) -> kube::Result<Value> {
    let request = http::Request::get(path).body(vec![]).map_err(kube::Error::HttpError)?;
    client.request(request).await
}

fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

async fn our_kind(client: &Client) -> kube::Result<Finding> {
    let served = match raw(client, "/openapi/v3/apis/cyberdesk.io/v1alpha1").await {
        Ok(served) => served,
        Err(error) if code(&error) == Some(404) => {
            let found = "the cluster knows no Cyberdesk (cyberdesks.cyberdesk.io/v1alpha1)";
            return Ok(CRD.finding(Verdict::Failure, found, vec![APPLY_CRD.to_owned()]));
        }
        Err(error) => return Err(error),
    };
    let served = &served["components"]["schemas"]["io.cyberdesk.v1alpha1.Cyberdesk"];
    let ours = serde_json::to_value(crd::definition()).map_err(kube::Error::SerdeError)?;
    let mut differences = vec![];
    for part in ["spec", "status"] {
        let ours = &ours["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][part];
        compare(part, ours, &served["properties"][part], &mut differences);
    }
    let faults = differences.into_iter().map(|found| Fault::new(found, APPLY_CRD)).collect();
    Ok(CRD.faults(Verdict::Failure, faults, "cyberdesk.io/v1alpha1 is served, with the schema of this program"))
}

/// The fields of a schema of ours that the cluster does not have, or has as something else.
fn compare(path: &str, ours: &Value, served: &Value, differences: &mut Vec<String>) {
    if served.is_null() {
        return differences.push(format!("{path} is missing in the cluster's schema"));
    }
    for word in ["type", "format", "minimum", "enum", "x-kubernetes-preserve-unknown-fields"] {
        let as_numbers = ours[word].as_f64().zip(served[word].as_f64());
        if ours[word] != served[word] && as_numbers.is_none_or(|(ours, served)| ours != served) {
            differences.push(format!("{path} has {word} {} in the cluster, not {}", served[word], ours[word]));
        }
    }
    for (name, field) in ours["properties"].as_object().into_iter().flatten() {
        compare(&format!("{path}.{name}"), field, &served["properties"][name], differences);
    }
    if !ours["items"].is_null() {
        compare(&format!("{path}[]"), &ours["items"], &served["items"], differences);
    }
}

async fn kubevirt(client: &Client) -> kube::Result<Finding> {
    let mend = || vec!["see https://kubevirt.io/user-guide/cluster_admin/installation/".to_owned()];
    let served = match raw(client, "/apis/kubevirt.io/v1").await {
        Ok(served) => served,
        Err(error) if code(&error) == Some(404) => {
            return Ok(KUBEVIRT.finding(Verdict::Failure, "the cluster serves no kubevirt.io/v1", mend()));
        }
        Err(error) => return Err(error),
    };
    let names: Vec<&str> =
        served["resources"].as_array().into_iter().flatten().filter_map(|it| it["name"].as_str()).collect();
    let missing: Vec<&str> =
        ["virtualmachines", "virtualmachineinstances"].into_iter().filter(|name| !names.contains(name)).collect();
    Ok(match missing.as_slice() {
        [] => KUBEVIRT.ok("kubevirt.io/v1 is served, with virtual machines and their instances"),
        missing => {
            KUBEVIRT.finding(Verdict::Failure, format!("kubevirt.io/v1 has no {}", missing.join(" and no ")), mend())
        }
    })
}

/// KubeVirt's own object says how it is; not every account may read it. Its version most may ask for, and it is
/// virt-api that answers.
async fn kubevirt_health(client: &Client) -> kube::Result<Finding> {
    let right = |group, resource| Right { place: Place::Own, group, resource, name: None, verbs: &[] };
    if rights::may(client, "", &right("kubevirt.io", "kubevirts"), "list").await? {
        let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
        match Api::<DynamicObject>::all_with(client.clone(), &kind).list(&ListParams::default()).await {
            Ok(list) => {
                let none = || KUBEVIRT_HEALTH.finding(Verdict::Warning, "there is no KubeVirt object", vec![]);
                return Ok(list.items.first().map_or_else(none, |object| judge_kubevirt(&object.data["status"])));
            }
            // The kind is not served: a KubeVirt without its operator.
            Err(error) if code(&error) == Some(404) => (),
            Err(error) => return Err(error),
        }
    }
    let unseen = "this account may not look at it: kubectl get kubevirt -A shows it to who may";
    if !rights::may(client, "", &right("subresources.kubevirt.io", "version"), "get").await? {
        return Ok(KUBEVIRT_HEALTH.unseen(unseen));
    }
    Ok(match raw(client, "/apis/subresources.kubevirt.io/v1/version").await {
        Ok(version) => {
            let version = version["gitVersion"].as_str().unwrap_or("of an unknown version").to_owned();
            KUBEVIRT_HEALTH.ok(format!("virt-api {version} answers; more this account may not look at"))
        }
        Err(error) if matches!(code(&error), Some(500..)) => {
            let mend = vec!["kubectl get pods -n kubevirt".to_owned()];
            KUBEVIRT_HEALTH.finding(Verdict::Failure, format!("virt-api does not answer: {error}"), mend)
        }
        Err(_) => KUBEVIRT_HEALTH.unseen(unseen),
    })
}

fn judge_kubevirt(status: &Value) -> Finding {
    let phase = status["phase"].as_str().unwrap_or("no phase");
    let version = status["observedKubeVirtVersion"].as_str().unwrap_or_default();
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let is = |condition: &&Value, kind: &str, state: &str| condition["type"] == kind && condition["status"] == state;
    let bad = |condition: &&Value| is(condition, "Available", "False") || is(condition, "Degraded", "True");
    let faults: Vec<String> = conditions
        .filter(bad)
        .map(|condition| {
            format!("{} is {}: {}", text(&condition["type"]), text(&condition["status"]), text(&condition["message"]))
        })
        .collect();
    let mend = || vec!["kubectl describe kubevirt -A; kubectl get pods -n kubevirt".to_owned()];
    if phase == "Deployed" && faults.is_empty() {
        return KUBEVIRT_HEALTH.ok(format!("KubeVirt {version} is Deployed"));
    }
    let found = [vec![format!("its phase is {phase}")], faults].concat().join("; ");
    KUBEVIRT_HEALTH.finding(Verdict::Failure, found, mend())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// An object of a kind that the daemon may create is refused with 404 where there is no namespace for it.
async fn namespaces(client: &Client, places: &Places) -> kube::Result<Finding> {
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let metadata = |name: &str| ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    let lease = Lease { metadata: metadata("cyberdesk-doctor"), spec: None };
    let secret = Secret { metadata: metadata("cyberdesk-doctor"), ..Secret::default() };
    let own = Api::<Lease>::namespaced(client.clone(), &places.namespace).create(&dry_run, &lease).await.map(drop);
    let vms = Api::<Secret>::namespaced(client.clone(), &places.vm_namespace).create(&dry_run, &secret).await.map(drop);
    let mut faults = vec![];
    for (name, tried) in [(&places.namespace, own), (&places.vm_namespace, vms)] {
        match tried {
            Err(kube::Error::Api(status)) if status.code == 404 => {
                faults.push(Fault::new(
                    format!("there is no namespace {name}"),
                    format!("kubectl create namespace {name}"),
                ));
            }
            // What the account may not do is another check's.
            Ok(()) | Err(kube::Error::Api(_)) => (),
            Err(error) => return Err(error),
        }
    }
    let told = match places.namespace == places.vm_namespace {
        true => format!("all is in {}", places.namespace),
        false => format!("Cyberdesks are in {}, virtual machines in {}", places.namespace, places.vm_namespace),
    };
    Ok(NAMESPACES.faults(Verdict::Failure, faults, told))
}

async fn rights(client: &Client, places: &Places) -> kube::Result<Finding> {
    let mut faults = vec![];
    let mut asked = 0;
    for right in &rights::RIGHTS {
        let namespace = match right.place {
            Place::Own => &places.namespace,
            Place::Vms => &places.vm_namespace,
        };
        for verb in right.verbs {
            asked += 1;
            if !rights::may(client, namespace, right, verb).await? {
                let name = right.name.map(|name| format!(" {name}")).unwrap_or_default();
                faults.push(Fault::new(format!("may not {verb} {}{name} in {namespace}", right.resource), APPLY_ROLES));
            }
        }
    }
    Ok(RIGHTS.faults(Verdict::Failure, faults, format!("this account may do all {asked} that are needed")))
}

async fn templates(client: &Client, places: &Places) -> kube::Result<Finding> {
    let cluster = Cluster::new(client, &places.namespace, &places.vm_namespace);
    let names = (places.namespace.as_str(), places.vm_namespace.as_str());
    let verdicts = templates::examine(client, &cluster, names, places.folder.clone()).await?;
    let edit = format!("kubectl edit configmap cyberdesk-vm-template -n {}", places.namespace);
    let (mut refused, mut warned, mut untried) = (vec![], vec![], vec![]);
    for (name, verdict) in &verdicts {
        match verdict {
            templates::Verdict::Accepted(_, warnings) if warnings.is_empty() => (),
            templates::Verdict::Accepted(_, warnings) => {
                warned.push(Fault::new(format!("{name}: the API server warns: {}", warnings.join("; ")), &edit));
            }
            templates::Verdict::Refused(why) => refused.push(Fault::new(why, &edit)),
            templates::Verdict::Unchecked(_, why) => untried.push(format!("{name} cannot be tried: {why}")),
        }
    }
    let names: Vec<&str> = verdicts.keys().map(String::as_str).collect();
    Ok(match (refused.is_empty(), untried.is_empty()) {
        (false, _) => TEMPLATES.faults(Verdict::Failure, refused, ""),
        (true, false) => TEMPLATES.unseen(untried.join("; ")),
        (true, true) => TEMPLATES.faults(
            Verdict::Warning,
            warned,
            format!("the API server takes what they make: {}", names.join(", ")),
        ),
    })
}

async fn adoption(client: &Client, places: &Places) -> kube::Result<Finding> {
    let crs = Api::<CrObject>::namespaced(client.clone(), &places.namespace).list(&ListParams::default()).await?;
    let held: Vec<String> = crs.iter().filter(|cr| cr.seen().is_kopfs()).map(ResourceExt::name_any).collect();
    let Some(first) = held.first() else { return Ok(ADOPTION.ok("the Kopf operator holds nothing")) };
    let found = format!("the Kopf operator holds {} Cyberdesks, such as {first}", held.len());
    Ok(ADOPTION.finding(Verdict::Warning, found, vec!["cyberdesk-operator adopt".to_owned()]))
}

#[expect(clippy::disallowed_methods, reason = "this machine's clock is what is looked at, and judges nothing")]
async fn clock(client: &Client) -> kube::Result<Finding> {
    let asked = Timestamp::now();
    let there = server_time(client).await.map_err(|error| kube::Error::Service(error.into()))?.time;
    Ok(compare_clocks(asked, there, Timestamp::now()))
}

/// The API server read its clock at some time between these two of ours, and tells whole seconds.
fn compare_clocks(asked: Timestamp, there: Timestamp, answered: Timestamp) -> Finding {
    let second = SignedDuration::from_secs(1);
    let (least, most) = (answered.duration_until(there), asked.duration_until(there) + second);
    let found = |skew: SignedDuration, words| {
        format!("the API server is at least {:.1} s {words} this machine", skew.abs().as_secs_f64())
    };
    let mend = vec!["timedatectl set-ntp true".to_owned()];
    if least > SKEW {
        CLOCK.finding(Verdict::Warning, found(least, "ahead of"), mend)
    } else if most < -SKEW {
        CLOCK.finding(Verdict::Warning, found(most, "behind"), mend)
    } else {
        CLOCK.ok("the API server and this machine agree to within two seconds")
    }
}

async fn leader(client: &Client, places: &Places) -> kube::Result<Finding> {
    let start = vec![format!("kubectl rollout status deployment/cyberdesk-operator -n {}", places.namespace)];
    let lease = Api::<Lease>::namespaced(client.clone(), &places.namespace).get_opt("cyberdesk-operator").await?;
    let now = server_time(client).await.map_err(|error| kube::Error::Service(error.into()))?.time;
    let Some(spec) = lease.and_then(|lease| lease.spec) else {
        return Ok(LEADER.finding(Verdict::Warning, "no daemon has ever led here", start));
    };
    let holder = spec.holder_identity.filter(|holder| !holder.is_empty());
    let (Some(holder), Some(renewed)) = (holder, spec.renew_time) else {
        return Ok(LEADER.finding(Verdict::Warning, "nobody leads: the last leader gave the Lease back", start));
    };
    let age = Duration::try_from(renewed.0.duration_until(now)).unwrap_or_default();
    let lasts =
        Duration::from_secs(spec.lease_duration_seconds.and_then(|it| u64::try_from(it).ok()).unwrap_or_default());
    Ok(if age > lasts {
        LEADER.finding(
            Verdict::Warning,
            format!("nobody leads: {holder} last renewed the Lease {} s ago", age.as_secs()),
            start,
        )
    } else {
        LEADER.ok(format!("{holder} leads, in term {}", spec.lease_transitions.unwrap_or_default()))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn clocks_are_compared_as_far_as_whole_seconds_and_the_answer_allow() {
        let at = |seconds: i64| Timestamp::from_second(1_700_000_000 + seconds).expect("a time");
        for (answered, there, verdict) in [
            (0, 0, Verdict::Ok),
            (0, 2, Verdict::Ok),
            (0, 3, Verdict::Warning),
            (0, -3, Verdict::Ok),
            (0, -4, Verdict::Warning),
            (10, 12, Verdict::Ok),
            (10, 13, Verdict::Warning),
        ] {
            assert_eq!(compare_clocks(at(0), at(there), at(answered)).verdict, verdict, "{there} in {answered}");
        }
    }

    #[test]
    fn kubevirt_is_well_when_it_is_deployed_and_available() {
        let condition = |kind: &str, status: &str| json!({ "type": kind, "status": status, "message": "why" });
        for (phase, conditions, verdict) in [
            ("Deployed", vec![condition("Available", "True"), condition("Degraded", "False")], Verdict::Ok),
            ("Deploying", vec![], Verdict::Failure),
            ("Deployed", vec![condition("Available", "False")], Verdict::Failure),
            ("Deployed", vec![condition("Degraded", "True")], Verdict::Failure),
        ] {
            let finding = judge_kubevirt(&json!({ "phase": phase, "conditions": conditions }));
            assert_eq!(finding.verdict, verdict, "{finding:?}");
        }
    }

    #[test]
    fn an_older_schema_lacks_fields_and_a_newer_one_has_more() {
        let ours = json!({ "type": "object", "properties": { "a": { "type": "string" }, "b": { "type": "integer", "minimum": 1000.0 } } });
        let differences = |served: Value| {
            let mut found = vec![];
            compare("spec", &ours, &served, &mut found);
            found
        };
        assert_eq!(differences(ours.clone()), [""; 0]);
        let newer = json!({ "type": "object", "properties": { "a": { "type": "string" }, "b": { "type": "integer", "minimum": 1000 }, "c": {} } });
        assert_eq!(differences(newer), [""; 0]);
        let older = json!({ "type": "object", "properties": { "b": { "type": "string" } } });
        let found = differences(older).join("\n");
        assert!(found.contains("spec.a is missing") && found.contains("spec.b has type \"string\""), "{found}");
    }
}
