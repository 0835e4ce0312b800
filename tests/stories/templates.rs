//! VM templates: what an edit does and does not do, and what becomes of user data.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a template's edit takes effect on the next VM, and a bad one on none, over a restart too", edits),
        story("a webhook that is down makes no template bad", webhook_down),
        story("user data of any size goes into the desktop's own Secret, and nowhere else", user_data),
        story("user data comes from a Secret that the operator may read, and from no other", user_data_from),
        story("the example ConfigMap and the templates that ship make desktops that run", examples),
        story("render prints what a row would get from a template, and all faults with their places", render),
        story("the seed's own kind of template works, with long user data in base64", seeds_kind),
    ]
}

/// A template whose VMs carry a mark, by which its version is told.
fn marked(mark: &str) -> String {
    format!(
        "
apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata: {{name: '${{vm_name}}', labels: {{mark: {mark}}}}}
spec: {{runStrategy: Once, template: {{spec: {{domain: {{memory: {{guest: 64Mi}}, devices: {{}}}}}}}}}}
"
    )
}

/// Writes the ConfigMap as `kubectl apply` does.
pub(crate) async fn edit(world: &World, files: &[(&str, &str)]) -> Result<()> {
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "cyberdesk-vm-template" },
        "data": files.iter().copied().collect::<BTreeMap<_, _>>(),
    });
    let params = PatchParams::apply("kubectl").force();
    config_maps(world).patch("cyberdesk-vm-template", &params, &Patch::Apply(map)).await?;
    Ok(())
}

fn config_maps(world: &World) -> Api<ConfigMap> {
    Api::namespaced(world.parts.client.clone(), &world.namespace)
}

/// How a template stands: status and message of its condition.
async fn condition(world: &World, template: &str) -> Result<(String, String)> {
    let record = config_maps(world).get("cyberdesk-vm-template-accepted").await?;
    let annotation = record.metadata.annotations.unwrap_or_default().remove("cyberdesk.io/conditions");
    let conditions: Vec<Value> = serde_json::from_str(&annotation.context("no condition yet")?)?;
    let found = conditions.into_iter().find(|condition| condition["template"] == template).context("no condition")?;
    ensure!(found["lastTransitionTime"].is_string() && found["type"] == "Accepted", "{found}");
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    Ok((text("status"), text("message")))
}

pub(crate) async fn until_condition(world: &World, template: &str, status: &str, words: &str) -> Result<()> {
    let holds = async || {
        let (found, message) = condition(world, template).await?;
        Ok(found == status && message.contains(words))
    };
    world.until(&format!("the template {template} is {status}, {words:?}"), holds).await
}

/// Makes a desktop and answers the mark of the template that its VM was made from.
async fn mark_of_next(world: &World) -> Result<String> {
    let id = world.running_desktop("1 hour").await?;
    let vm = world.vms().get(&vm_name(&id)).await?;
    vm.metadata.labels.and_then(|mut labels| labels.remove("mark")).context("the VM carries no mark")
}

/// What Prometheus would read.
pub(crate) async fn metrics(world: &World) -> Result<String> {
    let log = world.operator_log()?;
    let address = log.lines().rev().find_map(|line| line.split("address=\"").nth(1)?.split('"').next());
    let mut connection = tokio::net::TcpStream::connect(address.context("the log names no address")?).await?;
    connection.write_all(b"GET /metrics HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    Ok(answer)
}

async fn edits(world: &World) -> Result<()> {
    edit(world, &[("default.yaml", &marked("first")), ("other.yaml", &marked("other"))]).await?;
    world.start_operator(&[]).await?;
    ensure!(mark_of_next(world).await? == "first");
    edit(world, &[("default.yaml", &marked("second")), ("other.yaml", &marked("other"))]).await?;
    let taken = async || {
        let record = config_maps(world).get("cyberdesk-vm-template-accepted").await?;
        Ok(record.data.is_some_and(|data| data.get("default.yaml") == Some(&marked("second"))))
    };
    world.until("the edit is accepted", taken).await?;
    ensure!(mark_of_next(world).await? == "second");

    let bad = marked("bad");
    let edits = [
        (
            bad.replace("${vm_name}", "${vm_nmae}"),
            "default.yaml:4:19: unknown variable ${vm_nmae}; did you mean ${vm_name}?",
        ),
        (bad.replace("kind:", "{{{"), "default.yaml:3:3: unclosed bracket"),
        (bad.replace("memory:", "memoory:"), "unknown field \"spec.template.spec.domain.memoory\""),
        (bad.replace("runStrategy: Once,", ""), "virtualmachine-validator.kubevirt.io"),
        (bad.replace("runStrategy: Once", "runStrategy: 5"), "runStrategy"),
    ];
    for (text, words) in edits {
        // The others are edited beside it, and not held up.
        edit(world, &[("default.yaml", &text), ("other.yaml", &marked("other"))]).await?;
        until_condition(world, "default", "False", words).await?;
        ensure!(mark_of_next(world).await? == "second", "{words}");
        let events: Api<Event> = Api::namespaced(world.parts.client.clone(), &world.namespace);
        let told = async || {
            let events = events.list(&ListParams::default()).await?.items;
            Ok(events.iter().any(|event| {
                let about = event.regarding.as_ref().and_then(|about| about.name.as_deref());
                let note = event.note.as_deref().unwrap_or_default();
                (about, event.reason.as_deref()) == (Some("cyberdesk-vm-template"), Some("TemplateRefused"))
                    && note.contains(words)
                    && note.ends_with("The last good version stays in use")
            }))
        };
        world.until("an Event on the ConfigMap tells it", told).await?;
    }
    let shown = metrics(world).await?;
    for line in [
        "cyberdesk_template_accepted{template=\"default\"} 0",
        "cyberdesk_template_accepted{template=\"other\"} 1",
        "cyberdesk_template_refusals_total 5",
    ] {
        ensure!(shown.contains(line), "{line:?} is missing: {shown}");
    }
    ensure!(world.operator_log()?.contains("VM template taken into use"), "the log tells what was accepted");

    world.crash_operator().await?;
    ensure!(mark_of_next(world).await? == "second", "the last good one outlives the operator");
    edit(world, &[("default.yaml", &marked("third"))]).await?;
    until_condition(world, "default", "True", "").await?;
    ensure!(mark_of_next(world).await? == "third");
    Ok(())
}

async fn webhook_down(world: &World) -> Result<()> {
    edit(world, &[("default.yaml", &marked("first"))]).await?;
    world.start_operator(&[]).await?;
    until_condition(world, "default", "True", "").await?;
    let hook: ValidatingWebhookConfiguration = serde_json::from_value(json!({
        "metadata": { "name": world.namespace },
        "webhooks": [{
            "name": "nobody.example.com", "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "clientConfig": { "url": "https://127.0.0.1:1/" },
            "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": world.namespace } },
            "rules": [{ "apiGroups": ["kubevirt.io"], "apiVersions": ["v1"], "operations": ["CREATE"],
                "resources": ["virtualmachines"] }],
        }],
    }))?;
    let hooks = Api::<ValidatingWebhookConfiguration>::all(world.parts.client.clone());
    hooks.create(&PostParams::default(), &hook).await?;
    let sample = json!({ "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": "sample" },
        "spec": { "runStrategy": "Halted", "template": { "spec": { "domain": { "devices": {} } } } } });
    let sample = serde_json::from_value(sample)?;
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let is_down = async || {
        Ok(world
            .vms()
            .create(&dry_run, &sample)
            .await
            .is_err_and(|error| error.to_string().contains("nobody.example.com")))
    };
    world.until("the webhook is asked", is_down).await?;

    edit(world, &[("default.yaml", &marked("second"))]).await?;
    until_condition(world, "default", "Unknown", "nobody.example.com").await?;
    hooks.delete(&world.namespace, &DeleteParams::default()).await?;
    until_condition(world, "default", "True", "").await?;
    ensure!(mark_of_next(world).await? == "second");
    Ok(())
}

/// A template with one cloud-init volume.
pub(crate) fn with_cloud_init(settings: &str, source: &str) -> String {
    format!(
        "
{settings}
---
apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata: {{name: '${{vm_name}}'}}
spec:
  runStrategy: Once
  template:
    spec:
      domain: {{memory: {{guest: 64Mi}}, devices: {{disks: [{{name: c, disk: {{bus: virtio}}}}]}}}}
      volumes: [{{name: c, cloudInitNoCloud: {source}}}]
"
    )
}

/// Where its user data goes.
pub(crate) const TAKES_USER_DATA: &str = "{userDataBase64: '${user_data_base64}'}";

/// The user data in the desktop's own Secret.
async fn user_data_of(world: &World, id: &str) -> Result<String> {
    let secret = world.secrets().get(&format!("cyberdesk-{id}-user-data")).await?;
    let data = secret.data.and_then(|mut data| data.remove("userdata")).context("no userdata in the Secret")?;
    Ok(String::from_utf8(data.0)?)
}

/// Waits until the desktop is over, and sees that its secret is told nowhere.
async fn nothing_is_told(world: &World, id: &str, secret: &str) -> Result<()> {
    let cr = serde_json::to_string(&world.crs().get(id).await?.data)?;
    let vm = serde_json::to_string(&world.vms().get(&vm_name(id)).await?)?;
    let history = "select count(*) from cyberdesk.desktop d where to_jsonb(d)::text like '%geheim%'";
    ensure!(world.count(history).await? == 0, "the database tells it");
    for (place, text) in [("the CR", cr), ("the VM", vm), ("the log", world.operator_log()?)] {
        ensure!(!text.contains(secret), "{place} tells it: {text}");
    }
    world.request_shutdown(id).await?;
    world.until_over(id).await?;
    ensure!(world.secrets().get_opt(&format!("cyberdesk-{id}-user-data")).await?.is_none());
    Ok(())
}

async fn user_data(world: &World) -> Result<()> {
    let params = "params: {properties: {motd: {type: string, default: hi}}}";
    let template = with_cloud_init(params, TAKES_USER_DATA);
    let padding = "x".repeat(5000);
    let text = format!("#cloud-config\n# {padding}\nruncmd:\n  - [echo, geheim, '${{motd}}', '{padding}']\n");
    edit(world, &[("default.yaml", &template), ("default.user-data", &text)]).await?;
    world.start_operator(&[("CYBERDESK_LOG", "debug")]).await?;
    let hostile = "hi'\nruncmd: [evil]\n- \"";
    let id = world.insert_with("1 hour", Some(json!({ "motd": hostile }))).await?;
    world.until_status(&id, "running").await?;
    let made = user_data_of(world, &id).await?;
    let value: Value = serde_saphyr::from_str(&made)?;
    ensure!(made.starts_with("#cloud-config\n"), "{made}");
    ensure!(value == json!({ "runcmd": [["echo", "geheim", hostile, padding]] }), "{value}");
    nothing_is_told(world, &id, "geheim").await
}

async fn user_data_from(world: &World) -> Result<()> {
    for name in ["cyberdesk-vm-user-data", "somebody-else-s"] {
        let secret: Secret = serde_json::from_value(json!({
            "metadata": { "name": name }, "stringData": { "userdata": "#!/bin/sh\necho geheim ${vm_name}\n" },
        }))?;
        world.secrets().create(&PostParams::default(), &secret).await?;
    }
    let ours = with_cloud_init("userDataFrom: {secret: cyberdesk-vm-user-data}", TAKES_USER_DATA);
    let other = with_cloud_init("userDataFrom: {secret: somebody-else-s}", TAKES_USER_DATA);
    edit(world, &[("default.yaml", &ours), ("other.yaml", &other)]).await?;
    world.start_operator(&[("CYBERDESK_LOG", "debug")]).await?;
    let id = world.running_desktop("1 hour").await?;
    let wanted = format!("#!/bin/sh\necho geheim {}\n", vm_name(&id));
    ensure!(user_data_of(world, &id).await? == wanted);
    until_condition(world, "other", "False", "the operator may not read the Secret somebody-else-s").await?;
    let refused = world.insert_with("1 hour", Some(json!({ "template": "other" }))).await?;
    let row = world.until_over(&refused).await?;
    ensure!(row.reason.as_deref() == Some("bad-template"), "{row:?}");
    // Somebody spoils the Secret: what it held before stays in use.
    let spoilt = json!({ "data": null });
    world.secrets().patch("cyberdesk-vm-user-data", &PatchParams::default(), &Patch::Merge(spoilt)).await?;
    edit(world, &[("default.yaml", &ours)]).await?;
    until_condition(world, "default", "False", "has no text under the key \"userdata\"").await?;
    let another = world.running_desktop("1 hour").await?;
    ensure!(user_data_of(world, &another).await? == format!("#!/bin/sh\necho geheim {}\n", vm_name(&another)));
    nothing_is_told(world, &id, "geheim").await
}

async fn examples(world: &World) -> Result<()> {
    // Those built in, first.
    world.start_operator(&[]).await?;
    // In Kubernetes 5.0 is 5.
    let params = [json!({}), json!({ "template": "small" }), json!({ "template": "small", "grace_seconds": 5.0 })];
    for params in params {
        let id = world.insert_with("1 hour", Some(params)).await?;
        world.until_status(&id, "running").await?;
    }
    until_condition(world, "default", "True", "").await?;
    ensure!(condition(world, "default").await? == ("True".to_owned(), String::new()), "no warning");

    let example = include_str!("../../deploy/example-templates.yaml");
    let mut map: ConfigMap = serde_saphyr::from_str(example)?;
    map.metadata.namespace = Some(world.namespace.clone());
    config_maps(world).patch("cyberdesk-vm-template", &PatchParams::apply("kubectl"), &Patch::Apply(map)).await?;
    for template in ["default", "workstation", "kiosk"] {
        until_condition(world, template, "True", "").await?;
        ensure!(condition(world, template).await?.1.is_empty(), "the API server warns of {template}");
    }
    let cases = [
        json!({}),
        json!({ "template": "workstation", "cpu": 4, "memory_gib": 8, "image": "debian:13",
            "ssh_authorized_keys": ["ssh-ed25519 AAAA me@here"], "hostname": "mine" }),
        json!({ "template": "kiosk", "page": "https://example.com/board" }),
    ];
    for params in cases {
        let id = world.insert_with("1 hour", Some(params.clone())).await?;
        world.until("it has a VM", async || Ok(world.vms().get_opt(&vm_name(&id)).await?.is_some())).await?;
        let vm = world.vms().get(&vm_name(&id)).await?;
        if params["template"] == "workstation" {
            let annotations = vm.metadata.annotations.unwrap_or_default();
            let url = format!("https://desktops.example.com/{id}");
            for (name, value) in [("ready", "agent"), ("start-deadline", "600"), ("stream-url", &url)] {
                ensure!(
                    annotations.get(&format!("cyberdesk.io/{name}")).map(String::as_str) == Some(value),
                    "{annotations:?}"
                );
            }
            ensure!(vm.data["spec"]["template"]["spec"]["domain"]["cpu"]["cores"] == 4, "{}", vm.data);
            let user_data: Value = serde_saphyr::from_str(&user_data_of(world, &id).await?)?;
            ensure!(user_data["ssh_authorized_keys"] == json!(["ssh-ed25519 AAAA me@here"]), "{user_data}");
        } else {
            world.until_status(&id, "running").await?;
        }
    }
    let refused =
        world.insert_with("1 hour", Some(json!({ "template": "kiosk", "page": "https://x/'; reboot" }))).await?;
    let row = world.until_over(&refused).await?;
    ensure!(row.reason.as_deref() == Some("bad-params"), "{row:?}");
    Ok(())
}

async fn seeds_kind(world: &World) -> Result<()> {
    let template = "
apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata:
  name: ${vm_name}
  namespace: ${namespace}
  labels:
    app: cyberdesk
    cyberdesk-instance: ${cyberdesk_name}
    managed-by: ${managed_by}
spec:
  running: true
  template:
    metadata:
      labels:
        kubevirt.io/domain: ${vm_name}
    spec:
      domain:
        devices:
          disks:
            - name: cloudinitdisk
              disk: {bus: virtio}
        resources:
          requests: {memory: 64Mi}
      volumes:
        - name: cloudinitdisk
          cloudInitNoCloud:
            userDataBase64: ${user_data_base64}
";
    let text = format!("#!/bin/bash\n# {}\nfor f in *; do echo \"$f ${{#f}} $(date)\"; done\n", "y".repeat(4096));
    edit(world, &[("default.yaml", template), ("default.user-data", &text)]).await?;
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    ensure!(user_data_of(world, &id).await? == text, "byte by byte");
    until_condition(world, "default", "True", "spec.running is deprecated").await?;
    let labels = world.vms().get(&vm_name(&id)).await?.metadata.labels.unwrap_or_default();
    ensure!(
        labels.get("cyberdesk-instance") == Some(&id) && labels["managed-by"] == "cyberdesk-operator",
        "{labels:?}"
    );
    Ok(())
}

/// Runs `render`, and answers its exit code and what it wrote to standard output and to standard error.
fn run_render(arguments: &[&str]) -> Result<(Option<i32>, String, String)> {
    let program = env!("CARGO_BIN_EXE_cyberdesk-operator");
    let output = std::process::Command::new(program).arg("render").args(arguments).env_clear().output()?;
    Ok((output.status.code(), String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?))
}

async fn render(world: &World) -> Result<()> {
    let id = "0b1f7b3a-3b86-4d22-9d0a-6b9a4bd1b5a0";
    let (code, printed, _) =
        run_render(&["--name", id, "--params", r#"{"cpu": 8, "ssh_authorized_keys": ["ssh-ed25519 A"]}"#])?;
    let objects: Vec<Value> = serde_saphyr::from_multiple(&printed)?;
    ensure!(code == Some(0) && objects.len() == 2, "{printed}");
    let user_data = objects[0]["stringData"]["userdata"].as_str().unwrap_or_default();
    ensure!(user_data.contains("- ssh-ed25519 A"), "{user_data}");
    ensure!(objects[1]["spec"]["template"]["spec"]["domain"]["cpu"]["cores"] == 8, "{printed}");
    ensure!(objects[1]["metadata"]["name"] == vm_name(id), "{printed}");

    let folder = world.parts.testbed.scratch().directory("templates-to-render", None)?;
    for (file, text) in [
        ("default.yaml", marked("good")),
        ("a.yaml", marked("x").replace("${vm_name}", "${vm_nam}")),
        ("b.yaml", with_cloud_init("startDeadline: soon", TAKES_USER_DATA)),
        ("b.user-data", "#!/bin/sh\n\necho ${who}\n".to_owned()),
    ] {
        std::fs::write(folder.join(file), text)?;
    }
    let folder = folder.display().to_string();
    let (code, printed, faults) = run_render(&["--templates", &folder])?;
    ensure!(code == Some(1) && printed.contains("mark: good"), "the good one is printed all the same: {printed}");
    for fault in [
        "a.yaml:4:19: unknown variable ${vm_nam}; did you mean ${vm_name}?",
        "b.user-data:3:6: unknown variable ${who}",
        "b.yaml:2:1: startDeadline is \"soon\"",
        "2 of 3 templates cannot be used",
    ] {
        ensure!(faults.contains(fault), "{fault:?} is missing: {faults}");
    }
    let (code, _, words) = run_render(&["--params", r#"{"cpu": 64}"#])?;
    ensure!(code == Some(1) && words.contains("params.cpu must be at most 16, not 64"), "{words}");
    ensure!(run_render(&["--params", "[]"])?.0 == Some(2));
    Ok(())
}
