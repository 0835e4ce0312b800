//! The played virt-controller: a level-triggered loop per VM and per VMI around the pure decisions of [`super::vm`]
//! and [`super::vmi`].
//!
//! Every write carries the resource version it was decided on, and every answer goes into the cache, so a pass never
//! acts on the state before its own last write. A refused write (409, 404) is not retried here: the object has
//! changed, and its change causes the next pass.

use futures::FutureExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::launcher::{self, OBSERVED_LATEST, OBSERVED_STORAGE};
use super::{Detail, SimulatorConfig, vm, vmi};
use crate::keyed::{Keyed, Next};
use crate::kubevirt::{
    APP_LABEL, VM_CONTROLLER_FINALIZER, annotation, condition, controller_uid, has_finalizer, is_final, is_race,
    set_condition, vm_resource, vmi_resource, vmis, vms,
};
use crate::mirror::{Key, Mirror};

/// Which loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Loop {
    Vm,
    Vmi,
}

/// Pauses between refused creations: doubling from this...
const FIRST_RETRY: Duration = Duration::from_millis(200);
/// ... up to this.
const LAST_RETRY: Duration = Duration::from_secs(30);

/// Starts the loops; they end with the set.
pub(super) fn start(client: Client, config: &SimulatorConfig) -> JoinSet<()> {
    let controller = Arc::new(Controller {
        client: client.clone(),
        detail: config.detail,
        back_off: config.back_off,
        vms: Mirror::default(),
        vmis: Mirror::default(),
        pods: Mirror::default(),
        refusals: Mutex::default(),
    });
    let passes = controller.clone();
    let keyed = Arc::new(Keyed::new(config.width, move |(kind, key)| {
        let controller = passes.clone();
        async move { controller.pass(kind, key).await }.boxed()
    }));

    let mut tasks = JoinSet::new();
    let hints = keyed.clone();
    let watch = watcher(Api::all_with(client.clone(), &vm_resource()), watcher::Config::default()).default_backoff();
    tasks.spawn(controller.vms.clone().follow(watch, move |vm: &DynamicObject| {
        hints.hint((Loop::Vm, Key::of(vm)));
        hints.hint((Loop::Vmi, Key::of(vm)));
    }));
    let hints = keyed.clone();
    let watch = watcher(Api::all_with(client.clone(), &vmi_resource()), watcher::Config::default()).default_backoff();
    tasks.spawn(controller.vmis.clone().follow(watch, move |vmi: &DynamicObject| {
        hints.hint((Loop::Vmi, Key::of(vmi)));
        hints.hint((Loop::Vm, Key::of(vmi)));
    }));
    let launchers = watcher::Config::default().labels(&format!("{APP_LABEL}=virt-launcher"));
    let watch = watcher(Api::<Pod>::all(client), launchers).default_backoff();
    tasks.spawn(controller.pods.clone().follow(watch, move |pod: &Pod| {
        if let Some(owner) = pod.owner_references().iter().find(|owner| owner.controller == Some(true)) {
            let key = Key { namespace: pod.namespace().unwrap_or_default(), name: owner.name.clone() };
            keyed.hint((Loop::Vmi, key));
        }
    }));
    tasks
}

struct Controller {
    client: Client,
    detail: Detail,
    back_off: Duration,
    vms: Mirror<DynamicObject>,
    vmis: Mirror<DynamicObject>,
    pods: Mirror<Pod>,
    /// How often in a row a creation was refused.
    refusals: Mutex<HashMap<(Loop, Key), u32>>,
}

impl Controller {
    async fn pass(&self, kind: Loop, key: Key) -> Next {
        let outcome = match kind {
            Loop::Vm => self.vm_pass(&key).await,
            Loop::Vmi => self.vmi_pass(&key).await,
        };
        match outcome {
            Ok(next) => next,
            Err(error) if is_race(&error) => Next::In(Duration::from_millis(100)),
            Err(error) => {
                tracing::warn!(?kind, %key, %error, "a write failed; the simulator tries again");
                Next::In(Duration::from_secs(1))
            }
        }
    }

    async fn vm_pass(&self, key: &Key) -> kube::Result<Next> {
        let Some(vm) = self.vms.get(key) else {
            self.accepted(Loop::Vm, key);
            return Ok(Next::Gone);
        };
        if self.greet_vm(&vm).await? {
            return Ok(Next::In(Duration::ZERO));
        }
        let vmi = self.vmis.get(key);
        if let Some(vmi) = &vmi
            && controller_uid(&**vmi) != vm.uid().as_deref()
        {
            // KubeVirt adopts it and then fails for ever on it; either way this VM never runs.
            tracing::warn!(%key, "a VMI of that name belongs to somebody else");
            return Ok(Next::Rest);
        }
        let vmi = vmi.as_deref();

        let now = Timestamp::now();
        let sync = vm::sync(&vm, vmi, now);
        let (mut next, mut refused) = (Next::Rest, None);
        let mut vm = vm;
        match (sync, vmi) {
            (vm::Sync::Rest, _) | (vm::Sync::Stop | vm::Sync::Restart, None) => {}
            (vm::Sync::Release, _) => match self.drop_finalizer(&self.vm_api(key), &vm).await? {
                left if left.finalizers().is_empty() => return Ok(Next::Rest),
                left => vm = self.remember_vm(left),
            },
            (vm::Sync::Stop, Some(vmi)) => self.delete_vmi(vmi).await?,
            (vm::Sync::Restart, Some(vmi)) => {
                self.delete_vmi(vmi).await?;
                let request = json!([{ "action": "Start" }]);
                vm = self.write_vm_status(&vm, with(&vm.data["status"], "stateChangeRequests", request)).await?;
            }
            (vm::Sync::StartIn(pause), _) => next = Next::In(pause),
            (vm::Sync::Start, _) => refused = self.create_vmi(&vm, key).await?,
        }
        if refused.is_some() {
            next = Next::In(self.refused(Loop::Vm, key));
        } else {
            self.accepted(Loop::Vm, key);
        }

        let made_one = sync == vm::Sync::Start && refused.is_none();
        let around =
            vm::Circumstances { failure: refused.as_deref(), made_one, now, back_off: self.back_off, jitter: jitter() };
        let status = vm::status(&vm, vmi, &around);
        let news = match self.detail {
            Detail::Recorded => status != vm.data["status"],
            Detail::Essential => !made_one && brings_news(&vm.data["status"], &status),
        };
        if news {
            self.write_vm_status(&vm, status).await?;
        }
        if let Some(vmi) = vmi.filter(|vmi| is_final(vmi) && has_finalizer(*vmi, VM_CONTROLLER_FINALIZER)) {
            let left = self.drop_finalizer(&vmis(&self.client, &key.namespace), vmi).await?;
            self.vmis.learn(left);
        }
        Ok(next)
    }

    /// What is written on a VM before anything else: a first status, the API versions seen, the finalizer. Returns
    /// whether there was something to write.
    async fn greet_vm(&self, vm: &DynamicObject) -> kube::Result<bool> {
        let greeted = annotation(vm, OBSERVED_LATEST).is_some();
        let held = has_finalizer(vm, VM_CONTROLLER_FINALIZER);
        if vm.metadata.deletion_timestamp.is_some() || greeted && held {
            return Ok(false);
        }
        let mut metadata = json!({ "resourceVersion": vm.resource_version() });
        if self.detail == Detail::Recorded && vm.data["status"].is_null() {
            let volumes = vm.data["spec"]["template"]["spec"]["volumes"].as_array();
            let verdict = |volume: &Value| {
                let name = &volume["name"];
                json!({ "name": name, "enabled": false,
                    "reason": format!("Snapshot is not supported for this volumeSource type [{}]", name.as_str().unwrap_or_default()) })
            };
            let verdicts: Value = volumes.into_iter().flatten().map(verdict).collect();
            self.write_vm_status(vm, json!({ "volumeSnapshotStatuses": verdicts })).await?;
            return Ok(true);
        }
        if !greeted {
            metadata["annotations"] = json!({ OBSERVED_LATEST: "v1", OBSERVED_STORAGE: "v1" });
        }
        if greeted || self.detail == Detail::Essential {
            let finalizers: Vec<&str> =
                vm.finalizers().iter().map(String::as_str).chain([VM_CONTROLLER_FINALIZER]).collect();
            metadata["finalizers"] = json!(finalizers);
        }
        let patch = Patch::Merge(json!({ "metadata": metadata }));
        let api = vms(&self.client, &vm.namespace().unwrap_or_default());
        self.vms.learn(api.patch(&vm.name_any(), &PatchParams::default(), &patch).await?);
        Ok(true)
    }

    /// Makes the VM's VMI; the refusal in words if the API server will not have it.
    async fn create_vmi(&self, vm: &DynamicObject, key: &Key) -> kube::Result<Option<String>> {
        let refusal = |words: &str| Ok(Some(format!("Failure while starting VMI: {words}")));
        let mut instance = match launcher::instance(vm) {
            Ok(instance) => instance,
            Err(error) => return refusal(&format!("{error:#}")),
        };
        if self.detail == Detail::Essential {
            instance.annotations_mut().insert(OBSERVED_LATEST.into(), "v1".into());
            instance.annotations_mut().insert(OBSERVED_STORAGE.into(), "v1".into());
        }
        match vmis(&self.client, &key.namespace).create(&PostParams::default(), &instance).await {
            Ok(vmi) => {
                self.vmis.learn(vmi);
                Ok(None)
            }
            Err(kube::Error::Api(status)) if status.code < 500 && status.code != 409 => refusal(&status.message),
            Err(error) => Err(error),
        }
    }

    async fn vmi_pass(&self, key: &Key) -> kube::Result<Next> {
        let Some(vmi) = self.vmis.get(key) else {
            self.accepted(Loop::Vmi, key);
            return Ok(Next::Gone);
        };
        if annotation(&*vmi, OBSERVED_LATEST).is_none() {
            let patch = json!({ "metadata": { "resourceVersion": vmi.resource_version(),
                "annotations": { OBSERVED_LATEST: "v1", OBSERVED_STORAGE: "v1" } } });
            let api = vmis(&self.client, &key.namespace);
            self.vmis.learn(api.patch(&key.name, &PatchParams::default(), &Patch::Merge(patch)).await?);
            return Ok(Next::In(Duration::ZERO));
        }
        let uid = vmi.uid().unwrap_or_default();
        let mut pods = self.pods.owned_by(&uid);
        let (mut next, mut failure) = (Next::Rest, None);
        match vmi::sync(&vmi, &pods) {
            vmi::Sync::Rest => {}
            vmi::Sync::DeletePods(alive) => {
                for pod in alive {
                    self.delete_pod(&pod).await?;
                }
                // The status is still computed from the pods as they were.
            }
            vmi::Sync::CreatePod => match self.create_pod(&vmi).await? {
                Ok(pod) => pods.push(Arc::new(pod)),
                Err(refusal) => failure = Some(refusal),
            },
        }
        if failure.is_some() {
            next = Next::In(self.refused(Loop::Vmi, key));
        } else {
            self.accepted(Loop::Vmi, key);
        }
        let owner = self.vms.get(key).is_some_and(|vm| vm.uid().as_deref() == controller_uid(&*vmi));
        let updated = vmi::update(&vmi, &pods, failure, owner, Timestamp::now());
        let news = match self.detail {
            Detail::Recorded => updated != *vmi,
            Detail::Essential => {
                updated.metadata != vmi.metadata || brings_news(&vmi.data["status"], &updated.data["status"])
            }
        };
        if news {
            let api = vmis(&self.client, &key.namespace);
            let written = api.replace(&key.name, &PostParams::default(), &updated).await?;
            if written.finalizers().is_empty() {
                return Ok(Next::Rest);
            }
            self.vmis.learn(written);
        }
        Ok(next)
    }

    /// Makes the VMI's pod; KubeVirt's words for the refusal if the API server will not have it.
    async fn create_pod(&self, vmi: &DynamicObject) -> kube::Result<Result<Pod, vmi::Failure>> {
        let refusal = |words: String| {
            let message = format!("failed to create virtual machine pod: {words}");
            Ok(Err(vmi::Failure { reason: "FailedCreate", message }))
        };
        let pod = match launcher::pod(vmi) {
            Ok(pod) => pod,
            Err(error) => return refusal(format!("{error:#}")),
        };
        let api = Api::<Pod>::namespaced(self.client.clone(), &vmi.namespace().unwrap_or_default());
        match api.create(&PostParams::default(), &pod).await {
            Ok(pod) => {
                self.pods.learn(pod.clone());
                Ok(Ok(pod))
            }
            Err(kube::Error::Api(status)) if status.code < 500 => refusal(status.message.clone()),
            Err(error) => Err(error),
        }
    }

    async fn delete_vmi(&self, vmi: &DynamicObject) -> kube::Result<()> {
        let api = vmis(&self.client, &vmi.namespace().unwrap_or_default());
        if let Some(deleting) = api.delete(&vmi.name_any(), &exactly(vmi)).await?.left() {
            self.vmis.learn(deleting);
        }
        Ok(())
    }

    async fn delete_pod(&self, pod: &Pod) -> kube::Result<()> {
        let api = Api::<Pod>::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
        match api.delete(&pod.name_any(), &exactly(pod)).await {
            Ok(answer) => answer.left().into_iter().for_each(|deleting| self.pods.learn(deleting)),
            Err(error) if is_race(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn write_vm_status(&self, vm: &DynamicObject, status: Value) -> kube::Result<Arc<DynamicObject>> {
        let mut next = vm.clone();
        next.data["status"] = status;
        let api = vms(&self.client, &vm.namespace().unwrap_or_default());
        let written = api.replace_status(&vm.name_any(), &PostParams::default(), &next).await?;
        Ok(self.remember_vm(written))
    }

    fn remember_vm(&self, vm: DynamicObject) -> Arc<DynamicObject> {
        self.vms.learn(vm.clone());
        Arc::new(vm)
    }

    fn vm_api(&self, key: &Key) -> Api<DynamicObject> {
        vms(&self.client, &key.namespace)
    }

    /// Takes the VM controller's finalizer off a VM or VMI.
    async fn drop_finalizer(&self, api: &Api<DynamicObject>, object: &DynamicObject) -> kube::Result<DynamicObject> {
        let left: Vec<&String> = object.finalizers().iter().filter(|held| *held != VM_CONTROLLER_FINALIZER).collect();
        let patch = json!({ "metadata": { "resourceVersion": object.resource_version(), "finalizers": left } });
        api.patch(&object.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await
    }

    /// Notes a refused creation; returns when to try again.
    fn refused(&self, kind: Loop, key: &Key) -> Duration {
        let mut refusals = self.refusals.lock().expect("no holder of this lock panics");
        let count = refusals.entry((kind, key.clone())).or_default();
        let pause = FIRST_RETRY.saturating_mul(1 << (*count).min(16)).min(LAST_RETRY);
        *count += 1;
        pause
    }

    fn accepted(&self, kind: Loop, key: &Key) {
        self.refusals.lock().expect("no holder of this lock panics").remove(&(kind, key.clone()));
    }
}

fn exactly<K: Resource>(object: &K) -> DeleteParams {
    DeleteParams::default().preconditions(Preconditions { uid: object.meta().uid.clone(), resource_version: None })
}

fn with(status: &Value, key: &str, value: Value) -> Value {
    let mut status = if status.is_object() { status.clone() } else { json!({}) };
    status[key] = value;
    status
}

/// Whether a status says more than another reason for not being ready, or on which node the pods are.
fn brings_news(old: &Value, new: &Value) -> bool {
    let essence = |status: &Value| {
        let mut status = status.clone();
        if status["activePods"].is_object() {
            status["activePods"] = json!({});
        }
        if condition(&status, "Ready").is_some_and(|ready| ready["status"] == "False") {
            set_condition(&mut status, "Ready", None);
        }
        status
    };
    essence(old) != essence(new)
}

/// A number from 0 to 1, from the randomness of a UUID: not worth a generator.
fn jitter() -> f64 {
    f64::from(Uuid::new_v4().as_fields().0) / f64::from(u32::MAX)
}
