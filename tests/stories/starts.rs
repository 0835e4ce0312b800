//! A start ends: the desktop runs, or its row says why not. What KubeVirt leaves stuck for ever, in its words.

use anyhow::{Result, ensure};
use cyberdesk_testbed::kubevirt;
use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding, ValidatingWebhookConfiguration,
};
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("each start that KubeVirt leaves stuck ends with its reason", stuck_starts),
        story("a guest that its template calls ready by its agent runs when that connects", ready_by_agent),
        story("the template's stream URL comes with running", stream_url),
        story("a stuck row is told its causes and nothing else", one_event_for_each_cause),
        story("a quota that does not let the VM be made is waited for, then ends it", a_quota_on_vms),
        story("a webhook that is down holds starts up and ends none", a_webhook_is_down),
        story("a KubeVirt that takes no notice holds starts up and ends none", kubevirt_is_silent),
        story("VMs wait while KubeVirt has not caught up, and ends do not", throttled),
    ]
}

/// A VM with annotations of ours on it, on its guest's, and with more of a spec.
pub(crate) fn template(ours: Value, guests: Value, spec: Value) -> String {
    let mut vm = json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": { "annotations": ours },
        "spec": {
            "runStrategy": "Once",
            "template": {
                "metadata": { "annotations": guests },
                "spec": { "domain": { "memory": { "guest": "64Mi" }, "devices": {} } },
            },
        },
    });
    merge(&mut vm["spec"], spec);
    vm.to_string()
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            from.into_iter().for_each(|(key, value)| merge(into.entry(key).or_insert(Value::Null), value));
        }
        (into, from) => *into = from,
    }
}

fn within(seconds: u32) -> Value {
    json!({ "cyberdesk.io/start-deadline": seconds.to_string() })
}

/// A template whose guest is to be ready within so many seconds.
pub(crate) fn ready_within(seconds: u32) -> String {
    template(within(seconds), json!({}), json!({}))
}

async fn with_templates(world: &World, templates: &[(&str, String)]) -> Result<()> {
    let files: Vec<(String, &str)> =
        templates.iter().map(|(name, text)| (format!("{name}.yaml"), text.as_str())).collect();
    world.templates(&files.iter().map(|(name, text)| (name.as_str(), *text)).collect::<Vec<_>>()).await
}

async fn insert(world: &World, template: &str) -> Result<String> {
    world.insert_with("1 hour", Some(json!({ "template": template }))).await
}

async fn until_told(world: &World, id: &str, reason: &str) -> Result<()> {
    let told = async || Ok(world.cr_status(id, "reason").await?.as_deref() == Some(reason));
    world.until(&format!("the CR of {id} says {reason}"), told).await
}

/// The seconds that are left of a start whose clock stands still.
async fn seconds_left(world: &World, id: &str) -> Result<Option<i64>> {
    Ok(world.crs().get(id).await?.data["status"]["startClock"]["secondsLeft"].as_i64())
}

async fn stuck_starts(world: &World) -> Result<()> {
    let never = |how: &str| json!({ "guest.testbed/never-schedules": how });
    let pod_spec = |spec: Value| json!({ "template": { "spec": spec } });
    let no_secret = json!({ "volumes": [{ "name": "s", "secret": { "secretName": "nowhere" } }],
        "domain": { "devices": { "disks": [{ "name": "s", "disk": { "bus": "virtio" } }] } } });
    let rerun = json!({ "runStrategy": "RerunOnFailure" });
    let cases = [
        ("unschedulable", never("unschedulable"), json!({}), "unschedulable", "Insufficient memory"),
        ("image-pull", never("image-pull"), json!({}), "image-pull", "Back-off pulling image"),
        ("quota", never("quota"), json!({}), "quota", "exceeded quota"),
        ("missing-secret", json!({}), pod_spec(no_secret), "pod-not-ready", "the pod of the guest does not get ready"),
        // KubeVirt takes a VM without memory, and refuses its VMI.
        (
            "no-memory",
            json!({}),
            pod_spec(json!({ "domain": { "memory": null } })),
            "vmi-refused",
            "Failure while starting VMI",
        ),
        ("crash-loop", json!({ "guest.testbed/do": "fail-before-running" }), rerun, "crash-loop", "times in a row"),
        ("paused", json!({ "guest.testbed/paused": "true" }), json!({}), "paused", "the guest is paused"),
        ("halted", json!({}), json!({ "runStrategy": "Halted" }), "vm-stopped", "nobody starts it"),
        (
            "unready",
            json!({ "guest.testbed/never-ready": "true", "guest.testbed/boot": "300ms" }),
            json!({}),
            "guest-not-ready",
            "not ready within 30s",
        ),
    ];
    // Time enough to get stuck on a busy machine; all wait at once.
    let mut templates: Vec<(&str, String)> = cases
        .iter()
        .map(|(name, guest, spec, ..)| (*name, template(within(30), guest.clone(), spec.clone())))
        .collect();
    let agent = json!({ "cyberdesk.io/start-deadline": "30", "cyberdesk.io/ready": "agent" });
    templates.push(("no-agent", template(agent, json!({}), json!({}))));
    with_templates(world, &templates).await?;
    world.start_operator(&[]).await?;

    let mut desktops = vec![];
    for (name, _, _, reason, words) in &cases {
        desktops.push((insert(world, name).await?, *reason, *words));
    }
    desktops.push((insert(world, "no-agent").await?, "agent-not-connected", "the guest agent does not connect"));
    for (id, reason, words) in desktops {
        let row = world.until_over(&id).await?;
        ensure!((row.status.as_str(), row.reason.as_deref()) == ("error", Some(reason)), "{reason}: {row:?}");
        ensure!(row.message.as_deref().is_some_and(|message| message.contains(words)), "{words:?} is missing: {row:?}");
    }
    ensure!(world.left().await?.is_empty(), "{:?}", world.left().await?);
    Ok(())
}

async fn ready_by_agent(world: &World) -> Result<()> {
    let agent = json!({ "cyberdesk.io/ready": "agent" });
    with_templates(world, &[("default", template(agent, json!({}), json!({})))]).await?;
    world.start_operator(&[]).await?;
    let id = world.insert("1 hour").await?;
    let ready = async || {
        let vmi = world.vmis().get(&vm_name(&id)).await?;
        let conditions = vmi.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True"))
    };
    world.until("the VMI is ready", ready).await?;
    let cr = async || Ok(world.cr_status(&id, "phase").await?.as_deref() == Some("Starting"));
    world.until("the CR says that it starts", cr).await?;
    ensure!(world.row(&id).await?.status == "pending", "its agent is not there");
    world.guest(&id, "agent-connect").await?;
    world.until_status(&id, "running").await
}

/// Notes each change of a row, as everyone sees it who watches the table.
async fn note_changes(world: &World) -> Result<()> {
    world
        .sql(
            "create table public.seen (id uuid, status text, message text, stream_url text);
             create function public.note() returns trigger language plpgsql as $$
               begin
                 insert into public.seen values (new.id, new.status, new.message, new.stream_url);
                 return null;
               end $$;
             create trigger note after update on public.cyberdesk_instances for each row execute function public.note()",
        )
        .await
}

async fn stream_url(world: &World) -> Result<()> {
    let url = json!({ "cyberdesk.io/stream-url": "https://desks.example/${cyberdesk_name}" });
    with_templates(
        world,
        &[("default", template(url, json!({}), json!({}))), ("none", template(json!({}), json!({}), json!({})))],
    )
    .await?;
    note_changes(world).await?;
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let at_once = "select count(*) from seen where status = 'running' and stream_url is distinct from 'https://desks.example/' || id";
    ensure!(world.count(at_once).await? == 0, "both in one statement");
    ensure!(world.count("select count(*) from seen where status = 'running'").await? == 1);
    let another = insert(world, "none").await?;
    world.until_status(&another, "running").await?;
    let told = format!("select count(*) from cyberdesk_instances where id = '{another}' and stream_url is null");
    ensure!(world.count(&told).await? == 1, "left to the gateway");
    ensure!(world.row(&id).await?.status == "running");
    Ok(())
}

async fn one_event_for_each_cause(world: &World) -> Result<()> {
    let stuck = json!({ "guest.testbed/never-schedules": "image-pull" });
    with_templates(world, &[("default", template(json!({}), stuck, json!({})))]).await?;
    note_changes(world).await?;
    world.start_operator(&[]).await?;
    let id = world.insert("1 hour").await?;
    until_told(world, &id, "image-pull").await?;
    let told = async || Ok(world.row(&id).await?.message.is_some_and(|message| message.starts_with("image-pull: ")));
    world.until("the row says so too", told).await?;
    let seen = "select count(*) from seen";
    let before = world.count(seen).await?;
    ensure!(before == 1, "one change for one cause, {before} seen");
    // The CR follows the words; the row does not.
    world.crash_operator().await?;
    let pulled = json!({ "metadata": { "annotations": { "guest.testbed/never-schedules": null } } });
    world.vmis().patch(&vm_name(&id), &PatchParams::default(), &Patch::Merge(pulled)).await?;
    world.until_status(&id, "running").await?;
    let row = world.row(&id).await?;
    ensure!(row.message.is_none(), "it is no longer so: {row:?}");
    let after = world.count(seen).await?;
    ensure!((2..=3).contains(&after), "the cause went, and it runs: {after} seen");
    Ok(())
}

/// Has the API server refuse some writes in this story's namespace.
async fn refuse(world: &World, name: &str, rule: Value, expression: &str, message: &str) -> Result<()> {
    let policies = Api::<ValidatingAdmissionPolicy>::all(world.parts.client.clone());
    let bindings = Api::<ValidatingAdmissionPolicyBinding>::all(world.parts.client.clone());
    let name = format!("{}-{name}", world.namespace);
    let policy = serde_json::from_value(json!({
        "metadata": { "name": name },
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": { "resourceRules": [rule] },
            "validations": [{ "expression": expression, "message": message, "reason": "Forbidden" }],
        },
    }))?;
    let binding = serde_json::from_value(json!({
        "metadata": { "name": name },
        "spec": {
            "policyName": name,
            "validationActions": ["Deny"],
            "matchResources": { "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": world.namespace } } },
        },
    }))?;
    policies.create(&PostParams::default(), &policy).await?;
    bindings.create(&PostParams::default(), &binding).await?;
    Ok(())
}

async fn allow(world: &World, name: &str) -> Result<()> {
    let bindings = Api::<ValidatingAdmissionPolicyBinding>::all(world.parts.client.clone());
    bindings.delete(&format!("{}-{name}", world.namespace), &DeleteParams::default()).await.map(drop)?;
    Ok(())
}

fn rule(operation: &str) -> Value {
    json!({ "apiGroups": ["kubevirt.io"], "apiVersions": ["v1"], "operations": [operation], "resources": ["virtualmachines"] })
}

/// A VM that nobody starts.
fn probe() -> Result<DynamicObject> {
    let mut probe: Value = serde_json::from_str(&template(json!({}), json!({}), json!({ "runStrategy": "Halted" })))?;
    probe["metadata"]["name"] = json!("probe");
    Ok(serde_json::from_value(probe)?)
}

/// Waits until a dry run is refused: an API server takes a moment to heed a new rule.
async fn until_refused(world: &World, words: &str) -> Result<()> {
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let refused = async || {
        Ok(world.vms().create(&dry_run, &probe()?).await.is_err_and(|error| error.to_string().contains(words)))
    };
    world.until("the API server heeds the rule", refused).await
}

async fn a_quota_on_vms(world: &World) -> Result<()> {
    let templates = [
        ("default", template(within(600), json!({}), json!({}))),
        ("hasty", template(within(2), json!({}), json!({}))),
    ];
    with_templates(world, &templates).await?;
    refuse(world, "quota", rule("CREATE"), "false", "exceeded quota: desks, limited: count/virtualmachines=0").await?;
    until_refused(world, "exceeded quota").await?;
    world.start_operator(&[]).await?;
    let patient = world.insert("1 hour").await?;
    let hasty = insert(world, "hasty").await?;
    until_told(world, &patient, "quota").await?;
    let row = world.until_over(&hasty).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("error", Some("quota")), "{row:?}");
    ensure!(row.message.as_deref().is_some_and(|message| message.contains("exceeded quota")), "{row:?}");
    ensure!(world.row(&patient).await?.message.is_some_and(|message| message.starts_with("quota: ")));
    allow(world, "quota").await?;
    world.until_status(&patient, "running").await?;
    ensure!(world.row(&patient).await?.message.is_none(), "it is no longer so");
    Ok(())
}

async fn a_webhook_is_down(world: &World) -> Result<()> {
    let stuck = json!({ "guest.testbed/never-schedules": "unschedulable" });
    let templates =
        [("default", template(within(20), json!({}), json!({}))), ("stuck", template(within(600), stuck, json!({})))];
    with_templates(world, &templates).await?;
    let webhooks = Api::<ValidatingWebhookConfiguration>::all(world.parts.client.clone());
    let down = serde_json::from_value(json!({
        "metadata": { "name": world.namespace },
        "webhooks": [{
            "name": "down.example.com",
            // Nothing listens on port 1.
            "clientConfig": { "url": "https://127.0.0.1:1/" },
            "rules": [rule("CREATE")],
            "failurePolicy": "Fail",
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
            "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": world.namespace } },
        }],
    }))?;
    world.start_operator(&[]).await?;
    let other = insert(world, "stuck").await?;
    until_told(world, &other, "unschedulable").await?;
    webhooks.create(&PostParams::default(), &down).await?;
    until_refused(world, "failed calling webhook").await?;
    let id = world.insert("1 hour").await?;
    until_told(world, &id, "cluster-unavailable").await?;
    let stands = async || Ok(seconds_left(world, &id).await?.is_some() && seconds_left(world, &other).await?.is_some());
    world.until("no clock runs, of no start", stands).await?;
    // Its own deadline of 20 s is long past when a third has come and gone.
    let third = world.insert("25 seconds").await?;
    let row = world.until_over(&third).await?;
    ensure!(row.reason.as_deref() == Some("timeout"), "a deadline is kept all the same: {row:?}");
    let row = world.row(&id).await?;
    ensure!(row.status == "pending" && row.shutdown_requested_at.is_none(), "{row:?}");
    ensure!(row.message.as_deref().is_some_and(|message| message.contains("down.example.com")), "{row:?}");
    webhooks.delete(&world.namespace, &DeleteParams::default()).await?;
    world.until_status(&id, "running").await?;
    let runs = async || Ok(seconds_left(world, &other).await?.is_none());
    world.until("the clock of the other runs again", runs).await?;
    ensure!(world.row(&other).await?.status == "pending", "and it has time left");
    Ok(())
}

async fn kubevirt_is_silent(world: &World) -> Result<()> {
    with_templates(world, &[("default", template(within(20), json!({}), json!({})))]).await?;
    silence(world).await?;
    world.start_operator(&[]).await?;
    let id = world.insert("1 hour").await?;
    until_told(world, &id, "cluster-unavailable").await?;
    let third = world.insert("25 seconds").await?;
    let row = world.until_over(&third).await?;
    ensure!(row.reason.as_deref() == Some("timeout"), "{row:?}");
    let row = world.row(&id).await?;
    ensure!(row.status == "pending" && row.shutdown_requested_at.is_none(), "{row:?}");
    allow(world, "silence").await?;
    world.until_status(&id, "running").await
}

/// Lets KubeVirt write to no VM of this story: as if it were not there.
async fn silence(world: &World) -> Result<()> {
    world.vms().create(&PostParams::default(), &probe()?).await?;
    let not_by_kubevirt = format!("request.userInfo.username != '{}'", kubevirt::CONTROLLER_USER);
    refuse(world, "silence", rule("UPDATE"), &not_by_kubevirt, "KubeVirt is away").await?;
    let vms = kubevirt::vms(&kubevirt::as_kubevirt(&world.parts.client), &world.namespace);
    let dry_run = PatchParams { dry_run: true, ..PatchParams::default() };
    let write = Patch::Merge(json!({ "metadata": { "annotations": { "a": "b" } } }));
    let silent = async || {
        Ok(vms.patch("probe", &dry_run, &write).await.is_err_and(|error| error.to_string().contains("is away")))
    };
    world.until("KubeVirt's writes are refused", silent).await
}

async fn throttled(world: &World) -> Result<()> {
    with_templates(world, &[("default", template(json!({}), json!({}), json!({})))]).await?;
    silence(world).await?;
    world.start_operator(&[("CYBERDESK_MAX_UNSTARTED", "1")]).await?;
    let first = world.insert("1 hour").await?;
    world.until("its VM is made", async || Ok(world.vms().get_opt(&vm_name(&first)).await?.is_some())).await?;
    let mut waiting = vec![];
    for _ in 0..2 {
        // One after the other: two at once may stand in line either way round.
        let id = &world.insert("1 hour").await?;
        waiting.push(id.clone());
        until_told(world, id, "throttled").await?;
        ensure!(world.vms().get_opt(&vm_name(id)).await?.is_none(), "it has no VM");
        ensure!(world.row(id).await?.message.is_none(), "our queue is no event");
    }
    world.request_shutdown(&first).await?;
    world.until_over(&first).await?;
    let next = async || Ok(world.vms().get_opt(&vm_name(&waiting[0])).await?.is_some());
    world.until("the first in line gets its VM", next).await?;
    ensure!(world.vms().get_opt(&vm_name(&waiting[1])).await?.is_none(), "and nobody else");
    allow(world, "silence").await?;
    for id in &waiting {
        world.until_status(id, "running").await?;
    }
    Ok(())
}
