//! One scenario's stage: a namespace, both watches open from the start, and the hands of a user and of the garbage
//! collector, which does not run here.

use anyhow::{Context, Result, bail, ensure};
use cyberdesk_testbed::kubevirt::{vmis, vms};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Namespace;
use kube::Client;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, PropagationPolicy, WatchParams};
use kube::client::Body;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::event::{Event, Kind};

/// How long a step of a story may take. Generous: other things run on this machine.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Stage {
    name: String,
    client: Client,
    seen: Arc<Seen>,
    _watches: JoinSet<()>,
}

#[derive(Default)]
struct Seen {
    events: Mutex<Vec<Event>>,
    more: Notify,
}

impl Stage {
    pub(crate) async fn new(client: Client, scenario: &str) -> Result<Self> {
        let name = scenario.to_lowercase();
        let namespace = json!({ "metadata": { "name": name } });
        Api::<Namespace>::all(client.clone())
            .create(&PostParams::default(), &serde_json::from_value(namespace)?)
            .await?;
        let seen = Arc::new(Seen::default());
        let mut watches = JoinSet::new();
        for kind in [Kind::Vm, Kind::Vmi] {
            let api = if kind == Kind::Vm { vms(&client, &name) } else { vmis(&client, &name) };
            // From before the first object, without a relist: every event comes through.
            let from = api.list(&Default::default()).await?.metadata.resource_version.unwrap_or_default();
            let seen = seen.clone();
            watches.spawn(async move {
                let params = WatchParams::default().timeout(290);
                let Ok(stream) = api.watch(&params, &from).await else {
                    return;
                };
                let mut stream = stream.boxed();
                while let Ok(Some(event)) = stream.try_next().await {
                    if let Some(event) = Event::of(kind, &event) {
                        seen.events.lock().expect("no holder of this lock panics").push(event);
                        seen.more.notify_waiters();
                    }
                }
            });
        }
        Ok(Self { name, client, seen, _watches: watches })
    }

    fn vms(&self) -> Api<DynamicObject> {
        vms(&self.client, &self.name)
    }

    fn vmis(&self) -> Api<DynamicObject> {
        vmis(&self.client, &self.name)
    }

    pub(crate) fn events(&self, kind: Kind) -> Vec<Event> {
        let events = self.seen.events.lock().expect("no holder of this lock panics");
        events.iter().filter(|event| event.kind == kind).cloned().collect()
    }

    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    pub(crate) async fn vmi(&self) -> Result<DynamicObject> {
        Ok(self.vmis().get(&self.name).await?)
    }

    /// The VMI once its status is as asked.
    pub(crate) async fn vmi_when(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Result<DynamicObject> {
        self.eventually(&format!("a VMI {what}"), async || Ok(is_so(&self.vmi().await?.data["status"]))).await?;
        self.vmi().await
    }

    /// Looks until it is so: for what no watched event tells.
    pub(crate) async fn eventually(&self, what: &str, look: impl AsyncFn() -> Result<bool>) -> Result<()> {
        let found = async {
            while !look().await? {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(PATIENCE, found).await.with_context(|| format!("waited in vain for {what}"))?
    }

    /// A VM of that strategy with a small guest; `adjust` may change its manifest.
    pub(crate) async fn create(&self, strategy: &str, adjust: impl FnOnce(&mut Value)) -> Result<()> {
        let mut vm = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": self.name },
            "spec": { "runStrategy": strategy, "template": { "metadata": {}, "spec": {
                "terminationGracePeriodSeconds": 30,
                "domain": { "memory": { "guest": "64Mi" }, "devices": { "disks": [{ "name": "root", "disk": { "bus": "virtio" } }] } },
                "volumes": [{ "name": "root", "containerDisk": { "image": "example.com/disk:1" } }],
            } } },
        });
        adjust(&mut vm);
        self.vms().create(&PostParams::default(), &serde_json::from_value(vm)?).await.context("creating the VM")?;
        Ok(())
    }

    /// Tells the guest to do something.
    pub(crate) async fn tell(&self, command: &str) -> Result<()> {
        let patch = json!({ "metadata": { "annotations": { "guest.testbed/do": command } } });
        self.vmis().patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    pub(crate) async fn set_run_strategy(&self, strategy: &str) -> Result<()> {
        let patch = json!({ "spec": { "runStrategy": strategy } });
        self.vms().patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// Asks for `start`, `stop` or `restart` of the VM by subresource; answers the status code and what was said.
    async fn ask(&self, verb: &str) -> Result<(u16, String)> {
        let path = format!("/apis/subresources.kubevirt.io/v1/namespaces/{0}/virtualmachines/{0}/{verb}", self.name);
        let request = http::Request::put(path).header("content-type", "application/json");
        let answer = self.client.send(request.body(Body::from(b"{}".to_vec()))?).await?;
        let code = answer.status().as_u16();
        let said = answer.into_body().collect_bytes().await?;
        Ok((code, String::from_utf8_lossy(&said).into_owned()))
    }

    /// By subresource, accepted without a word.
    pub(crate) async fn asks(&self, verb: &str) -> Result<()> {
        let answer = self.ask(verb).await?;
        ensure!(answer == (202, String::new()), "{verb}: {answer:?}");
        Ok(())
    }

    /// By subresource, refused as a conflict in these words.
    pub(crate) async fn may_not(&self, verb: &str, words: &str) -> Result<()> {
        let (code, said) = self.ask(verb).await?;
        let status: Value = serde_json::from_str(&said).with_context(|| format!("{verb}: {code} {said}"))?;
        let message = format!("Operation cannot be fulfilled on virtualmachine.kubevirt.io \"{}\": {words}", self.name);
        let fields = (&status["kind"], &status["code"], &status["reason"], &status["message"]);
        let expected = (&json!("Status"), &json!(409), &json!("Conflict"), &json!(message));
        ensure!(code == 409 && fields == expected, "{verb}: {code} {said}");
        Ok(())
    }

    /// Edits the template of the VM.
    pub(crate) async fn edit_template(&self, spec: Value) -> Result<()> {
        let patch = json!({ "spec": { "template": { "spec": spec } } });
        self.vms().patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    pub(crate) async fn label_vm(&self) -> Result<()> {
        let patch = json!({ "metadata": { "labels": { "owner": "somebody" } } });
        self.vms().patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    pub(crate) async fn delete_vm(&self) -> Result<()> {
        self.vms().delete(&self.name, &DeleteParams::default()).await?;
        Ok(())
    }

    pub(crate) async fn delete_vm_with(&self, propagation: PropagationPolicy) -> Result<()> {
        let params = DeleteParams { propagation_policy: Some(propagation), ..DeleteParams::default() };
        self.vms().delete(&self.name, &params).await?;
        Ok(())
    }

    pub(crate) async fn delete_vmi(&self) -> Result<()> {
        self.vmis().delete(&self.name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// As the garbage collector after `--cascade=orphan`: the VMI has no owner any more.
    pub(crate) async fn disown_vmi(&self) -> Result<()> {
        let patch = json!({ "metadata": { "ownerReferences": null } });
        self.vmis().patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// As the garbage collector when it is done: what is left of the VM's finalizers goes.
    pub(crate) async fn let_vm_go(&self) -> Result<()> {
        let patch = json!({ "metadata": { "finalizers": null } });
        self.vms().patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// Making a VM of that name must fail while the old one goes.
    pub(crate) async fn name_is_taken(&self) -> Result<()> {
        match self.create("Always", |_| ()).await {
            Err(error) if format!("{error:#}").contains("object is being deleted") => Ok(()),
            other => bail!("expected 409, object is being deleted; got {other:?}"),
        }
    }

    /// Waits until the newest event of the kind is as asked, or there has been one since `from` events.
    pub(crate) async fn until(&self, kind: Kind, what: &str, is_so: impl Fn(&Event) -> bool) -> Result<()> {
        let look = async {
            loop {
                let more = self.seen.more.notified();
                if self.events(kind).last().is_some_and(&is_so) {
                    return;
                }
                more.await;
            }
        };
        if tokio::time::timeout(PATIENCE, look).await.is_err() {
            let last = self.events(kind).last().map_or("none".to_owned(), Event::to_string);
            bail!("waited in vain for {what}; the last event is: {last}");
        }
        Ok(())
    }

    /// The VM says that its guest is ready.
    pub(crate) async fn ready(&self) -> Result<()> {
        self.until(Kind::Vm, "a ready VM", |vm| vm.state == "Running" && vm.marked("ready")).await
    }

    /// The VM shows this state, and has no VMI.
    pub(crate) async fn at_rest(&self, state: &str) -> Result<()> {
        let rests =
            |vm: &Event| vm.state == state && !vm.marked("created") && vm.condition("Ready") == Some("F(VMINotExists)");
        self.until(Kind::Vm, &format!("a VM {state} without VMI"), rests).await
    }

    /// VM and VMI are gone.
    pub(crate) async fn gone(&self) -> Result<()> {
        self.until(Kind::Vm, "the VM to be gone", |vm| vm.sign == '-').await?;
        if !self.events(Kind::Vmi).is_empty() {
            self.until(Kind::Vmi, "the VMI to be gone", |vmi| vmi.sign == '-').await?;
        }
        let left = self.vmis().list(&Default::default()).await?.items.len()
            + self.vms().list(&Default::default()).await?.items.len();
        ensure!(left == 0, "{left} objects are left");
        Ok(())
    }
}
