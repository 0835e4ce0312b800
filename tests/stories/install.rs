//! What people install: the manifests of `deploy/`, on the real API server, applied, applied again, removed.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::manifests::{self, api, apply, apply_all, find};
use crate::world::{World, vm_name};
use crate::{Story, story};

/// Kustomizations that need nothing but a cluster.
const KUSTOMIZATIONS: [&str; 3] = ["deploy/crd", "deploy/migrate", "deploy"];
/// Files that people fill in, or try.
const EXAMPLES: [&str; 4] =
    ["secret.example.yaml", "migrate/admin-secret.example.yaml", "sample-cyberdesk.yaml", "example-templates.yaml"];
/// Where the pods of `deploy/` find their Secret.
const MOUNTED: &str = "/etc/cyberdesk-operator";

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("the manifests are applied twice, and the second time changes nothing", twice),
        story("whatever names the image names the one of this version", versions),
        story("what people edited stays when the manifests are applied again", edited),
        story("the pods of deploy/ are admitted where only restricted ones are", restricted),
        story("a daemon started as its Deployment says serves a database migrated as the Job says", as_written),
        story("the ServiceMonitor finds the daemon's figures by its labels and port", monitored),
        story("an upgrade under load, schema first and then the daemon, loses no desktop and doubles none", upgraded),
        story("removing deploy/ leaves the desktops, and applying it again goes on with them", removed),
        // The kind is everybody's.
        story("deleting the CRD leaves the VMs of rows running, and with it their CRs come back", without_the_crd)
            .alone(),
    ]
}

async fn twice(world: &World) -> Result<()> {
    let mut objects = vec![];
    for kustomization in KUSTOMIZATIONS {
        objects.extend(manifests::objects(kustomization, &world.namespace)?);
    }
    for example in EXAMPLES {
        objects.extend(manifests::file(example, &world.namespace)?);
    }
    for object in &objects {
        let name = manifests::name(object)?;
        let first = apply(&world.parts.client, object).await?;
        // Those of cluster scope have the API server's own.
        ensure!(first.metadata.finalizers.is_none() || first.metadata.namespace.is_none(), "{name} would not go");
        let second = apply(&world.parts.client, object).await?;
        // Of those, other stories that apply the same change the version.
        let is_same = match first.metadata.namespace {
            Some(_) => first.resource_version() == second.resource_version(),
            None => first.metadata.generation == second.metadata.generation && first.uid() == second.uid(),
        };
        ensure!(is_same, "applied again, {name} is another");
    }
    Ok(())
}

async fn versions(_: &World) -> Result<()> {
    let image = concat!("cyberdesk-operator:", env!("CARGO_PKG_VERSION"));
    for file in
        ["deploy/deployment.yaml", "deploy/migrate/job.yaml", "compose.yaml", "docs/getting-started.md", "Dockerfile"]
    {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file))?;
        let named: Vec<&str> = text.match_indices("cyberdesk-operator:").map(|(at, _)| &text[at..]).collect();
        ensure!(!named.is_empty() && named.iter().all(|rest| rest.starts_with(image)), "{file} does not name {image}");
    }
    Ok(())
}

async fn edited(world: &World) -> Result<()> {
    let client = &world.parts.client;
    let base = manifests::objects("deploy", &world.namespace)?;
    apply_all(client, &base).await?;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &world.namespace);
    world.templates(&[("default.yaml", "a person's")]).await?;
    // The daemon's own record is in the base, for the daemon may not make ConfigMaps; what is in it is not.
    let record = "cyberdesk-vm-template-accepted";
    let accepted = json!({ "data": { "default.yaml": "accepted" } });
    maps.patch(record, &PatchParams::default(), &Patch::Merge(accepted)).await?;
    apply_all(client, &base).await?;
    for (name, text) in [("cyberdesk-vm-template", "a person's"), (record, "accepted")] {
        let data = maps.get(name).await?.data.context("it holds what was put into it")?;
        ensure!(data["default.yaml"] == text, "{name}: {data:?}");
    }
    ensure!(manifests::find(&base, "Secret", "cyberdesk-operator").is_err(), "the base holds no Secret");
    Ok(())
}

/// The pod that a Deployment or a Job makes.
fn pod_of(workload: &DynamicObject) -> Result<Pod> {
    let mut pod = workload.data["spec"]["template"].clone();
    pod["metadata"]["name"] = "tried".into();
    // No controller makes the account here, and it is not what is judged.
    pod["spec"].as_object_mut().context("a pod has a spec")?.remove("serviceAccountName");
    Ok(serde_json::from_value(pod)?)
}

async fn restricted(world: &World) -> Result<()> {
    let namespaces: Api<Namespace> = Api::all(world.parts.client.clone());
    let label = json!({ "metadata": { "labels": { "pod-security.kubernetes.io/enforce": "restricted" } } });
    namespaces.patch(&world.namespace, &PatchParams::default(), &Patch::Merge(label)).await?;
    let pods: Api<Pod> = Api::namespaced(world.parts.client.clone(), &world.namespace);
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let mut unsafe_pod = None;
    for (kustomization, kind, name) in
        [("deploy", "Deployment", "cyberdesk-operator"), ("deploy/migrate", "Job", "cyberdesk-migrate")]
    {
        let objects = manifests::objects(kustomization, &world.namespace)?;
        let pod = pod_of(find(&objects, kind, name)?)?;
        pods.create(&dry_run, &pod).await.with_context(|| format!("the pod of {name}"))?;
        unsafe_pod = Some(pod);
    }
    // That it is really looked at.
    let mut pod = unsafe_pod.context("a pod was tried")?;
    pod.spec.as_mut().context("a pod has a spec")?.security_context = None;
    let refused = async || {
        let refused = format!("{:?}", pods.create(&dry_run, &pod).await);
        ensure!(refused.contains("violates PodSecurity"), "{refused}");
        Ok(true)
    };
    world.until("a pod without it is refused", refused).await?;
    Ok(())
}

/// The variables of the one container of a workload, its Secret's files being in this folder.
fn environment(workload: &DynamicObject, folder: &Path) -> Result<Vec<(String, String)>> {
    let container = &workload.data["spec"]["template"]["spec"]["containers"][0];
    let variables = container["env"].as_array().context("it has variables")?.iter();
    // Those that come from elsewhere, the story has.
    let variables = variables.filter_map(|variable| {
        Some((variable["name"].as_str()?.to_owned(), here(variable["value"].as_str()?, folder)))
    });
    Ok(variables.collect())
}

/// A path in the Secret's volume, in this folder.
fn here(text: &str, folder: &Path) -> String {
    text.replace(MOUNTED, &folder.display().to_string())
}

async fn as_written(world: &World) -> Result<()> {
    let secret = manifests::file("secret.example.yaml", &world.namespace)?;
    let secret = find(&secret, "Secret", "cyberdesk-operator")?;
    let folder = tempfile::tempdir()?;
    for (file, content) in secret.data["stringData"].as_object().context("the example holds values")? {
        std::fs::write(folder.path().join(file), content.as_str().context("of text")?)?;
    }

    let objects = manifests::objects("deploy/migrate", &world.namespace)?;
    let job = find(&objects, "Job", "cyberdesk-migrate")?;
    let container = &job.data["spec"]["template"]["spec"]["containers"][0];
    let arguments = container["args"].as_array().context("the Job has arguments")?.iter().filter_map(Value::as_str);
    let database = world.parts.testbed.postgres.supabase_database().await?;
    let migrated = tokio::process::Command::new(env!("CARGO_BIN_EXE_cyberdesk-operator"))
        .args(arguments.map(|argument| here(argument, folder.path())))
        .env_clear()
        .env("DATABASE_URL", database.url("postgres"))
        .current_dir(folder.path())
        .output()
        .await?;
    ensure!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));

    let world = World::on(world.parts.clone(), database).await?;
    let objects = manifests::objects("deploy", &world.namespace)?;
    let deployment = find(&objects, "Deployment", "cyberdesk-operator")?;
    let settings = environment(deployment, folder.path())?;
    ensure!(settings.iter().any(|(name, _)| name == "DATABASE_PASSWORD_FILE"), "{settings:?}");
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    world.start_operator(&settings).await?;
    world.running_desktop("1 hour").await?;
    ensure!(
        !world.operator_said("means nothing to this program")?,
        "a variable of the Deployment is none of the daemon's"
    );
    Ok(())
}

async fn monitored(world: &World) -> Result<()> {
    let monitoring = manifests::objects("deploy/monitoring", &world.namespace)?;
    let base = manifests::objects("deploy", &world.namespace)?;
    let deployment = find(&base, "Deployment", "cyberdesk-operator")?;
    let service = find(&monitoring, "Service", "cyberdesk-operator")?;
    let monitor = find(&monitoring, "ServiceMonitor", "cyberdesk-operator")?;
    apply(&world.parts.client, service).await?;
    let pod = &deployment.data["spec"]["template"];
    let selects = |selector: &Value, labels: &Value| {
        selector.as_object().is_some_and(|wanted| wanted.iter().all(|(key, value)| labels[key] == *value))
    };
    ensure!(selects(&service.data["spec"]["selector"], &pod["metadata"]["labels"]), "the Service finds no pod");
    let labels = serde_json::to_value(service.labels())?;
    ensure!(selects(&monitor.data["spec"]["selector"]["matchLabels"], &labels), "the monitor finds no Service");
    let named = |ports: &Value, name: &Value| {
        ports.as_array().is_some_and(|ports| ports.iter().any(|port| port["name"] == *name))
    };
    let port = &service.data["spec"]["ports"][0];
    ensure!(named(&pod["spec"]["containers"][0]["ports"], &port["targetPort"]), "the Service has no port of the pod");
    let endpoint = &monitor.data["spec"]["endpoints"][0];
    ensure!(endpoint["port"] == port["name"] && endpoint["path"] == "/metrics", "the monitor asks elsewhere");
    Ok(())
}

/// What a migration may do to the functions that the running daemon calls: each is another one afterwards. The app's table
/// comes first, as in its own statements: the other way round, one of the two would be a deadlock's victim.
const MADE_ANEW: &str = "
    alter table public.cyberdesk_instances add column of_the_next_version text;
    alter table cyberdesk.desktop add column of_the_next_version text;
    do $$
    declare
      f record;
    begin
      for f in select p.oid::regprocedure::text as signature, pg_get_functiondef(p.oid) as definition
                 from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                where n.nspname = 'cyberdesk' and has_function_privilege('cyberdesk_daemon', p.oid, 'execute')
      loop
        execute format('drop function %s', f.signature);
        execute f.definition;
        execute format('revoke all on function %s from public', f.signature);
        execute format('grant execute on function %s to cyberdesk_daemon', f.signature);
      end loop;
    end $$;";

/// Nothing is released yet, so there is no version before to start from. What it would meet is played: under its feet
/// the schema becomes the next one.
async fn upgraded(world: &World) -> Result<()> {
    let before = world.start_daemon("a", &[("CYBERDESK_IDENTITY", "a")]).await?;
    let first = world.running_desktop("1 hour").await?;
    let uid = world.vms().get(&vm_name(&first)).await?.uid();
    let load = async {
        let mut ids = vec![];
        for _ in 0..40 {
            ids.push(world.insert("1 hour").await?);
        }
        anyhow::Ok(ids)
    };
    let migrated = async {
        let administrator = world.database.connect_as("postgres").await?;
        Ok(administrator.batch_execute(MADE_ANEW).await?)
    };
    let (mut ids, ()) = tokio::try_join!(load, migrated)?;
    ids.push(first.clone());
    world.request_shutdown(&ids[0]).await?;
    world.until_over(&ids.remove(0)).await?;

    // The Deployment's next pod is there before the old one goes.
    let _after = world.start_daemon("b", &[("CYBERDESK_IDENTITY", "b")]).await?;
    before.signal(rustix::process::Signal::TERM)?;
    before.ended().await?;
    ids.push(world.insert("1 hour").await?);
    for id in &ids {
        world.until_status(id, "running").await?;
    }
    let vms = world.vms().list(&ListParams::default()).await?.items;
    ensure!(vms.len() == ids.len(), "{} VMs for {} desktops", vms.len(), ids.len());
    ensure!(world.vms().get(&vm_name(&first)).await?.uid() == uid, "what ran runs on");
    Ok(())
}

async fn removed(world: &World) -> Result<()> {
    let client = &world.parts.client;
    let base = manifests::objects("deploy", &world.namespace)?;
    apply_all(client, &base).await?;
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let uid = world.vms().get(&vm_name(&id)).await?.uid();
    world.stop_operator().await?;

    for object in &base {
        api(client, object)?.delete(manifests::name(object)?, &DeleteParams::default()).await?;
    }
    for object in &base {
        let name = manifests::name(object)?;
        ensure!(api(client, object)?.get_opt(name).await?.is_none(), "{name} is stuck");
    }
    let left = world.vms().list(&ListParams::default()).await?.items;
    ensure!(left.len() == 1 && left[0].uid() == uid && left[0].metadata.deletion_timestamp.is_none(), "{left:?}");
    ensure!(world.crs().get(&id).await?.metadata.deletion_timestamp.is_none(), "its CR stays too");

    apply_all(client, &base).await?;
    // Another account of the same name.
    crate::account::in_namespace(&world.parts.testbed.control_plane, &world.namespace).await?;
    world.start_operator(&[]).await?;
    world.request_shutdown(&id).await?;
    let row = world.until_over(&id).await?;
    ensure!(row.reason.as_deref() == Some("requested"), "{row:?}");
    Ok(())
}

async fn without_the_crd(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let (kept, stopped) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    let uid = world.vms().get(&vm_name(&kept)).await?.uid();
    let what_outlives = manifests::objects("deploy/crd", &world.namespace)?;
    let crd = find(&what_outlives, "CustomResourceDefinition", "cyberdesks.cyberdesk.io")?;
    let crds = api(&world.parts.client, crd)?;
    crds.delete(manifests::name(crd)?, &DeleteParams::default()).await?;
    let gone = async || Ok(crds.get_opt(manifests::name(crd)?).await?.is_none());
    world.until("the CRD is gone, with all CRs", gone).await?;

    // Without it no desktop is made, and one that is asked to end does.
    let inserted = world.insert("1 hour").await?;
    world.request_shutdown(&stopped).await?;
    let ended = async || Ok(world.row(&stopped).await?.ended_at.is_some());
    world.until("the one that was asked to end is over", ended).await?;
    let vms = world.vms().list(&ListParams::default()).await?.items;
    let lives = vms.iter().find(|vm| vm.name_any() == vm_name(&kept)).context("the other's VM is there")?;
    ensure!(lives.uid() == uid && lives.metadata.deletion_timestamp.is_none(), "{lives:?}");
    ensure!(world.row(&kept).await?.status == "running", "its row says so");

    apply(&world.parts.client, crd).await?;
    let shown = async || Ok(world.cr_status(&kept, "phase").await?.as_deref() == Some("Running"));
    world.until("the CR of the running desktop is back, and says so", shown).await?;
    world.until_status(&inserted, "running").await?;
    let vm = world.vms().get(&vm_name(&kept)).await?;
    ensure!(vm.uid() == uid && vm.metadata.deletion_timestamp.is_none(), "{vm:?}");
    world.request_shutdown(&kept).await?;
    world.until_over(&kept).await.map(drop)
}
