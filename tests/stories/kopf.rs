//! A cluster that the Kopf operator ran: its objects are built as it left them, and taken over.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use cyberdesk_testbed::kubevirt;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::docs::run;
use crate::manifests;
use crate::tools::Tool;
use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "a cluster that Kopf ran is taken over without a restart, and each desktop ends as its row says",
            taken_over,
        ),
        story("what Kopf holds is left alone until it is adopted, and diff says so", left_alone),
        story("adopt does nothing where no VM of Kopf's is found: it may be the wrong namespace", wrong_namespace),
        story("Kopf's operator is put back as it was saved", put_back).needs(Tool::Kubectl),
    ]
}

/// As the app's ORM made it, before we came.
const APPS_TABLE: &str = r#"
    create type public.instance_status as enum ('pending', 'running', 'completed', 'error', 'terminated');
    create table cyberdesk_instances (
      id uuid primary key default gen_random_uuid() not null,
      user_id uuid not null references auth.users (id) on delete cascade,
      created_at timestamp default now(),
      updated_at timestamp,
      status instance_status default 'pending' not null,
      timeout_at timestamp default now() + interval '24 hours' not null,
      stream_url varchar(1024)
    )"#;

const FINALIZER: &str = "kopf.zalando.org/KopfFinalizerMarker";

/// A world whose database has these rows from before the migration, and which has a namespace for Kopf's VMs.
struct Kopf {
    world: World,
    vm_namespace: String,
    ids: BTreeMap<&'static str, String>,
}

impl Kopf {
    /// The rows: what each is called here, its status, and when it is due.
    async fn new(world: &World, rows: &[(&'static str, &str, &str)]) -> Result<Self> {
        let database = world.parts.testbed.postgres.supabase_database().await?;
        let world = World::on(world.parts.clone(), database).await?;
        world.sql(APPS_TABLE).await?;
        let mut ids = BTreeMap::new();
        for (name, status, due) in rows {
            let (id, user) = (Uuid::new_v4(), world.user());
            let values = format!("'{id}', '{user}', '{status}', now() + interval '{due}'");
            world
                .sql(&format!("insert into cyberdesk_instances (id, user_id, status, timeout_at) values ({values})"))
                .await?;
            ids.insert(*name, id.to_string());
        }
        let url = world.database.url("postgres");
        let (code, said) = world.command(&["migrate"], &[("DATABASE_URL", &url)]).await?;
        ensure!(code == 0, "{said}");

        let vm_namespace = format!("{}-kubevirt", world.namespace);
        let client = &world.parts.client;
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": vm_namespace } });
        manifests::apply(client, &serde_json::from_value(namespace)?).await?;
        for mut object in manifests::objects("deploy/adopt", &world.namespace)? {
            ensure!(object.metadata.namespace.as_deref() == Some("kubevirt"), "it reaches nowhere else");
            object.metadata.namespace = Some(vm_namespace.clone());
            manifests::apply(client, &object).await?;
        }
        let kopf = Self { world, vm_namespace, ids };
        kopf.until_granted().await?;
        Ok(kopf)
    }

    /// The API server learns of a Role a moment after it was made. Asked, not tried: what is refused would count.
    async fn until_granted(&self) -> Result<()> {
        let account = self.world.account().await?;
        for (resource, verb) in
            [("virtualmachines", "list"), ("virtualmachines", "patch"), ("virtualmachineinstances", "list")]
        {
            let attributes = ResourceAttributes {
                namespace: Some(self.vm_namespace.clone()),
                group: Some("kubevirt.io".to_owned()),
                resource: Some(resource.to_owned()),
                verb: Some(verb.to_owned()),
                ..ResourceAttributes::default()
            };
            let spec =
                SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), non_resource_attributes: None };
            let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
            let api = Api::<SelfSubjectAccessReview>::all(account.clone());
            let granted = async || {
                let answer = api.create(&PostParams::default(), &review).await?;
                Ok(answer.status.is_some_and(|status| status.allowed))
            };
            self.world.until(&format!("the account may {verb} {resource}"), granted).await?;
        }
        Ok(())
    }

    fn id(&self, name: &str) -> &str {
        &self.ids[name]
    }

    fn vms(&self) -> Api<DynamicObject> {
        kubevirt::vms(&self.world.parts.client, &self.vm_namespace)
    }

    fn vmis(&self) -> Api<DynamicObject> {
        kubevirt::vmis(&self.world.parts.client, &self.vm_namespace)
    }

    fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.world.parts.client.clone(), &self.vm_namespace)
    }

    /// A VM and its Secret as Kopf's operator made them for a desktop, running.
    async fn vm(&self, name: &str, desktop: &str) -> Result<()> {
        let secret = json!({
            "metadata": { "name": format!("cloud-init-{name}"), "labels": { "managed-by": "cyberdesk-operator" } },
            "stringData": { "userdata": "#cloud-config" },
        });
        self.secrets().create(&PostParams::default(), &serde_json::from_value(secret)?).await?;
        let labels = json!({ "app": "cyberdesk", "cyberdesk-instance": desktop, "managed-by": "cyberdesk-operator" });
        let vm = json!({
            "apiVersion": "kubevirt.io/v1",
            "kind": "VirtualMachine",
            "metadata": { "name": name, "labels": labels },
            "spec": { "running": true, "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "domain": {
                        "cpu": { "cores": 1 },
                        "devices": {
                            "disks": [{ "name": "containerdisk", "disk": { "bus": "virtio" } },
                                      { "name": "cloudinitdisk", "disk": { "bus": "virtio" } }],
                            "interfaces": [{ "name": "default", "masquerade": {} }],
                        },
                        "resources": { "requests": { "memory": "64Mi" } },
                    },
                    "networks": [{ "name": "default", "pod": {} }],
                    "volumes": [
                        { "name": "containerdisk", "containerDisk": { "image": "quay.io/containerdisks/ubuntu:22.04" } },
                        { "name": "cloudinitdisk", "cloudInitNoCloud": { "secretRef": { "name": format!("cloud-init-{name}") } } },
                    ],
                },
            } },
        });
        self.vms().create(&PostParams::default(), &serde_json::from_value(vm)?).await?;
        self.world.until(&format!("{name} runs"), async || self.is_ready(name).await).await
    }

    async fn is_ready(&self, vm: &str) -> Result<bool> {
        let vmi = self.vmis().get(vm).await?;
        let conditions = vmi.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True"))
    }

    /// A CR as the gateway made it and Kopf's operator left it, with this VM in its status.
    async fn cr(&self, name: &str, vm: Option<&str>) -> Result<()> {
        let cr = json!({
            "apiVersion": "cyberdesk.io/v1alpha1",
            "kind": "Cyberdesk",
            "metadata": {
                "name": name,
                "finalizers": [FINALIZER],
                "annotations": { "kopf.zalando.org/last-handled-configuration": r#"{"spec":{"timeoutMs":3600000}}"# },
            },
            "spec": { "timeoutMs": 3_600_000 },
        });
        self.world.crs().create(&PostParams::default(), &serde_json::from_value(cr)?).await?;
        let Some(vm) = vm else { return Ok(()) };
        let status = json!({ "status": { "cyberdesk_create": {
            "virtualMachineRef": vm,
            "startTime": "2026-11-28T20:00:00.123456",
            "expiryTime": "2026-11-28T21:00:00.123456",
            "lastPhase": "Plucked",
        } } });
        self.world.crs().patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await?;
        Ok(())
    }

    /// A desktop of a row: its VM, which has its id as its name, and its CR.
    async fn desktop(&self, name: &str) -> Result<()> {
        let id = self.id(name);
        self.vm(id, id).await?;
        self.cr(id, Some(id)).await
    }

    fn settings(&self) -> [(&str, &str); 1] {
        [("CYBERDESK_VM_NAMESPACE", &self.vm_namespace)]
    }

    async fn adopt(&self, arguments: &[&str]) -> Result<(i32, String)> {
        let arguments: Vec<&str> = ["adopt"].iter().chain(arguments).copied().collect();
        self.world.command(&arguments, &self.settings()).await
    }

    /// The UIDs of all VMs and VMIs, by kind and name.
    async fn uids(&self) -> Result<BTreeMap<String, String>> {
        let mut uids = BTreeMap::new();
        for (kind, api) in [("VM", self.vms()), ("VMI", self.vmis())] {
            for object in api.list(&ListParams::default()).await? {
                uids.insert(format!("{kind} {}", object.name_any()), object.uid().unwrap_or_default());
            }
        }
        Ok(uids)
    }

    /// All that adopt may write. Of a VM and a VMI KubeVirt writes the status meanwhile, so their versions tell nothing.
    async fn writable(&self) -> Result<Vec<String>> {
        let all = ListParams::default();
        let crs = self.world.crs().list(&all).await?.items;
        let mut writable: Vec<_> =
            crs.iter().map(|cr| format!("{} {:?}", cr.name_any(), cr.resource_version())).collect();
        for api in [self.vms(), self.vmis()] {
            for object in api.list(&all).await? {
                let kept = (object.labels(), object.annotations(), object.finalizers(), &object.data["spec"]);
                let itself = (object.uid(), object.metadata.deletion_timestamp.is_some());
                writable.push(format!("{} {itself:?} {kept:?}", object.name_any()));
            }
        }
        Ok(writable)
    }

    async fn vm_uid(&self, name: &str) -> Result<Option<String>> {
        let client = self.world.database.connect_as("postgres").await?;
        let id: Uuid = self.id(name).parse()?;
        Ok(client.query_one("select vm_uid from cyberdesk.desktop where id = $1", &[&id]).await?.get(0))
    }
}

async fn taken_over(world: &World) -> Result<()> {
    let rows = [
        ("running", "running", "1 hour"),
        ("untold", "pending", "1 hour"),
        ("pooled", "running", "1 hour"),
        ("without-cr", "running", "1 hour"),
        ("without-vm", "running", "1 hour"),
        ("without-both", "running", "1 hour"),
        ("leaked", "terminated", "1 hour"),
        ("forgotten", "running", "-1 hour"),
        ("new", "pending", "1 hour"),
    ];
    let kopf = Kopf::new(world, &rows).await?;
    let world = &kopf.world;
    let id = |name| kopf.id(name).to_owned();
    kopf.desktop("running").await?;
    kopf.desktop("untold").await?;
    kopf.desktop("leaked").await?;
    kopf.vm("cyberdesk-warm-pool-0", &id("pooled")).await?;
    kopf.cr(&id("pooled"), Some("cyberdesk-warm-pool-0")).await?;
    kopf.vm(&id("without-cr"), &id("without-cr")).await?;
    kopf.cr(&id("without-vm"), Some(&id("without-vm"))).await?;
    kopf.vm("by-hand", "by-hand").await?;
    kopf.cr("by-hand", Some("by-hand")).await?;
    kopf.vm("stuck", "stuck").await?;
    kopf.cr("stuck", Some("stuck")).await?;
    world.delete(world.crs(), "stuck").await?;
    kopf.vm("nobodys", "nobodys").await?;
    let before = kopf.uids().await?;

    // As docs/migrate-from-kopf.md has it: the daemon comes first, and new desktops wait.
    world.sql("update cyberdesk.settings set paused = true").await?;
    world.start_operator(&kopf.settings()).await?;
    let forgotten = world.until_over(&id("forgotten")).await?;
    ensure!(forgotten.reason.as_deref() == Some("timeout"), "its time was over, and nobody had told: {forgotten:?}");
    for name in ["new", "without-cr", "without-both"] {
        let waits = async || Ok(world.cr_status(&id(name), "reason").await?.as_deref() == Some("making-paused"));
        world.until(&format!("{name} waits"), waits).await?;
    }

    let untouched = kopf.writable().await?;
    let (code, told) = kopf.adopt(&[]).await?;
    ensure!(code == 1 && told.contains("nothing was done") && told.contains("LEFT: VirtualMachine nobodys"), "{told}");
    ensure!(kopf.writable().await? == untouched, "it only tells:\n{told}");

    let (code, told) = kopf.adopt(&["--yes"]).await?;
    ensure!(code == 1 && told.contains("9 desktops taken over, 1 left"), "{told}");

    // Those that live are tracked, and nothing was started anew.
    let lives = ["running", "untold", "pooled", "without-cr"];
    for name in lives {
        let id = id(name);
        world.until_status(&id, "running").await?;
        let vm = if name == "pooled" { "cyberdesk-warm-pool-0".to_owned() } else { id.clone() };
        world
            .until(&format!("{name} is tracked"), async || {
                let cr = world.crs().get(&id).await?;
                let (status, uid) = (&cr.data["status"], &before[&format!("VM {vm}")]);
                Ok(status["phase"] == "Running"
                    && status["ip"].is_string()
                    && status["virtualMachineRef"] == json!({ "name": vm, "uid": uid })
                    && status["cyberdesk_create"]["virtualMachineRef"] == Value::String(vm.clone())
                    && cr.metadata.finalizers.is_none()
                    && cr.annotations().contains_key("cyberdesk.io/database")
                    && kopf.vm_uid(name).await?.as_ref() == Some(uid))
            })
            .await?;
    }
    world
        .until("the one by hand is tracked", async || {
            Ok(world.cr_status("by-hand", "phase").await?.as_deref() == Some("Running"))
        })
        .await?;

    // What was left behind goes, and what is gone is over.
    for name in ["without-vm", "without-both"] {
        let row = world.until_over(&id(name)).await?;
        ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("vm-deleted")), "{name}: {row:?}");
    }
    for vm in [id("leaked"), "stuck".to_owned()] {
        world.until(&format!("{vm} is gone"), async || Ok(kopf.vms().get_opt(&vm).await?.is_none())).await?;
    }
    world.until("the CR that Kopf held is gone", async || Ok(world.crs().get_opt("stuck").await?.is_none())).await?;
    let mut stays = before.clone();
    stays.retain(|object, _| !object.ends_with(&id("leaked")) && !object.ends_with(" stuck"));
    world.until("nothing else has changed", async || Ok(kopf.uids().await? == stays)).await?;

    // New ones come to be where the old gateway looks.
    world.sql("update cyberdesk.settings set paused = false").await?;
    world.until_status(&id("new"), "running").await?;
    let found = async || {
        let status = &world.crs().get(&id("new")).await?.data["status"];
        Ok(status["cyberdesk_create"]["virtualMachineRef"] == vm_name(&id("new")))
    };
    world.until("the old gateway finds it", found).await?;
    ensure!(kopf.vms().get_opt(&vm_name(&id("new"))).await?.is_some());
    let agree = async || {
        let (_, told) = world.command(&["diff"], &kopf.settings()).await?;
        ensure!(told.contains("\n0 of") || told.starts_with("0 of"), "{told}");
        Ok(true)
    };
    world.until("nothing disagrees", agree).await?;
    let (_, told) = kopf.adopt(&["--yes"]).await?;
    ensure!(told.contains("0 desktops taken over, 1 left"), "again, there is nothing to do: {told}");

    // A guest that KubeVirt starts anew is its desktop's still.
    let off = json!({ "metadata": { "annotations": { "guest.testbed/do": "power-off" } } });
    kopf.vmis().patch(&id("untold"), &PatchParams::default(), &Patch::Merge(off)).await?;
    world
        .until("it was started anew", async || {
            let restarts = &world.crs().get(&id("untold")).await?.data["status"]["restarts"];
            Ok(*restarts == 1 && kopf.is_ready(&id("untold")).await?)
        })
        .await?;

    // Each ends as its row says, a crash of the daemon in between.
    world.crash_operator().await?;
    world.app("select from set_desktop_timeout($1, now())", &id("pooled")).await?;
    world.app("update cyberdesk_instances set status = 'terminated' where id = $1", &id("without-cr")).await?;
    kopf.vms().delete(&id("untold"), &DeleteParams::default()).await?;
    for name in ["running", "new"] {
        world.request_shutdown(&id(name)).await?;
    }
    for (name, reason) in
        [("pooled", "timeout"), ("without-cr", "requested"), ("untold", "vm-deleted"), ("running", "requested")]
    {
        let row = world.until_over(&id(name)).await?;
        ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some(reason)), "{name}: {row:?}");
    }
    world.until_over(&id("new")).await?;
    world.delete(world.crs(), "by-hand").await?;
    world
        .until("nothing is left but what is nobody's", async || {
            let secrets = kopf.secrets().list(&ListParams::default()).await?;
            let left: Vec<String> =
                kopf.uids().await?.into_keys().chain(secrets.iter().map(|it| it.name_any())).collect();
            ensure!(left == ["VM nobodys", "VMI nobodys", "cloud-init-nobodys"], "{left:?}");
            Ok(world.crs().list(&ListParams::default()).await?.items.is_empty())
        })
        .await?;
    let nobodys = kopf.uids().await?.remove("VMI nobodys").context("it runs on")?;
    ensure!(nobodys == before["VMI nobodys"]);
    Ok(())
}

async fn left_alone(world: &World) -> Result<()> {
    let kopf = Kopf::new(world, &[("running", "running", "1 hour"), ("due", "running", "-1 hour")]).await?;
    let world = &kopf.world;
    kopf.desktop("running").await?;
    kopf.desktop("due").await?;
    let before = kopf.writable().await?;
    world.start_operator(&kopf.settings()).await?;
    // Each row is looked at by the time that a later one has its VM.
    let later = world.running_desktop("1 hour").await?;
    let diff = world.command(&["diff"], &kopf.settings()).await?.1;
    ensure!(diff.matches("the Kopf operator holds it").count() == 2, "{diff}");
    let (_, doctor) = world.command(&["doctor"], &kopf.settings()).await?;
    ensure!(doctor.contains("the Kopf operator holds 2 Cyberdesks"), "{doctor}");
    world.request_shutdown(&later).await?;
    world.until_over(&later).await?;
    ensure!(kopf.writable().await? == before, "neither is replaced nor ended");
    let row = world.row(kopf.id("due")).await?;
    ensure!(row.status == "running" && row.ended_at.is_none(), "{row:?}");

    let (code, told) = kopf.adopt(&["--yes"]).await?;
    ensure!(code == 0, "{told}");
    let (_, doctor) = world.command(&["doctor"], &kopf.settings()).await?;
    ensure!(doctor.contains("the Kopf operator holds nothing"), "{doctor}");
    let row = world.until_over(kopf.id("due")).await?;
    ensure!(row.reason.as_deref() == Some("timeout"), "{row:?}");
    world.until_status(kopf.id("running"), "running").await?;
    world.until("one VM is left", async || Ok(kopf.vms().list(&ListParams::default()).await?.items.len() == 1)).await
}

async fn wrong_namespace(world: &World) -> Result<()> {
    let kopf = Kopf::new(world, &[("running", "running", "1 hour")]).await?;
    let world = &kopf.world;
    kopf.desktop("running").await?;
    let before = kopf.writable().await?;
    let (code, told) = world.command(&["adopt", "--yes"], &[]).await?;
    ensure!(code == 1 && told.is_empty() && kopf.writable().await? == before, "{told}");
    let (code, told) = kopf.adopt(&["--yes"]).await?;
    ensure!(code == 0 && told.contains("1 desktops taken over, 0 left"), "{told}");
    Ok(())
}

/// Of the objects in a List, what `jq` leaves in docs/migrate-from-kopf.md.
fn saved(list: &str) -> Result<Vec<Value>> {
    let mut list: Value = serde_json::from_str(list)?;
    let items = list["items"].as_array_mut().context("it is a List")?;
    for item in items.iter_mut() {
        item.as_object_mut().context("an object")?.remove("status");
        let metadata = item["metadata"].as_object_mut().context("metadata")?;
        ["uid", "resourceVersion", "managedFields"].iter().for_each(|field| drop(metadata.remove(*field)));
    }
    Ok(std::mem::take(items))
}

async fn put_back(world: &World) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let kubeconfig = world.parts.testbed.control_plane.kubeconfig().display().to_string();
    let kubectl = async |script: &str| run(script, folder.path(), &kubeconfig).await;
    let list = |items: Value| json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string();
    // Two of the four are the cluster's: in a story their names are its own.
    let name = format!("{}-kopf", world.namespace);
    let in_namespace = json!({ "name": name, "namespace": world.namespace });
    let labels = json!({ "app": name });
    let pod = json!({ "serviceAccountName": name, "containers": [{ "name": "operator", "image": "cyberdesk-operator:kopf" }] });
    let role = json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name });
    let operator = json!([
        { "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": { "name": name },
          "rules": [{ "apiGroups": ["kopf.dev"], "resources": ["clusterkopfpeerings"], "verbs": ["list", "watch"] }] },
        { "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": name },
          "roleRef": role, "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": world.namespace }] },
        { "apiVersion": "v1", "kind": "ServiceAccount", "metadata": in_namespace },
        { "apiVersion": "apps/v1", "kind": "Deployment", "metadata": in_namespace,
          "spec": { "replicas": 1, "selector": { "matchLabels": labels },
                    "template": { "metadata": { "labels": labels }, "spec": pod } } },
    ]);
    std::fs::write(folder.path().join("operator.json"), list(operator))?;
    kubectl("kubectl create -f operator.json").await?;

    let read = async |file: &str| -> Result<Vec<Value>> {
        kubectl(&format!(
            "kubectl get clusterrole/{name} clusterrolebinding/{name} --output json > roles-{file}
             kubectl get serviceaccount/{name} deployment/{name} --namespace {} --output json > daemon-{file}",
            world.namespace
        ))
        .await?;
        let read = |kind| std::fs::read_to_string(folder.path().join(format!("{kind}-{file}")));
        Ok([saved(&read("roles")?)?, saved(&read("daemon")?)?].concat())
    };
    let before = read("before.json").await?;
    std::fs::write(folder.path().join("kopf.json"), list(before.clone().into()))?;
    kubectl(&format!(
        "kubectl scale deployment/{name} --namespace {} --replicas=0
         kubectl delete -f operator.json",
        world.namespace
    ))
    .await?;
    kubectl("kubectl create -f kopf.json").await?;
    let without_times = |mut objects: Vec<Value>| {
        for object in &mut objects {
            let metadata = object["metadata"].as_object_mut().expect("it was read");
            ["creationTimestamp", "generation"].iter().for_each(|field| drop(metadata.remove(*field)));
        }
        objects
    };
    let (before, after) = (without_times(before), without_times(read("after.json").await?));
    ensure!(before.len() == 4 && after == before, "{before:#?}\n{after:#?}");
    Ok(())
}
