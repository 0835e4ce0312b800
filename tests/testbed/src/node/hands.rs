//! The node's writes: one API call or two for each [`Act`].

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::life::{Act, View, node_name, waiting_reason};
use super::script::{Command, DONE};
use crate::kubevirt::{
    NODE_NAME_LABEL, controller_uid, enter_phase, is_deleting, new_condition, seconds, set_condition, vmis,
};
use crate::mirror::Mirror;

/// Writes, and teaches the caches what the API server answers.
pub(super) struct Hands {
    client: Client,
    nodes: Vec<String>,
    pods: Mirror<Pod>,
    vmis: Mirror<DynamicObject>,
    addresses: AtomicU32,
}

/// Look again at once: the write has changed what is right.
const AT_ONCE: Duration = Duration::ZERO;
/// The answer does not say how the pod is now: the watch brings it, long before this.
const UNTIL_SEEN: Duration = Duration::from_secs(2);
/// How often a kubelet looks whether a missing Secret has come.
const SECRET_RECHECK: Duration = Duration::from_millis(300);

impl Hands {
    pub(super) fn new(client: Client, nodes: Vec<String>, pods: Mirror<Pod>, vmis: Mirror<DynamicObject>) -> Self {
        Self { client, nodes, pods, vmis, addresses: AtomicU32::new(0) }
    }

    /// Carries an act out; returns when to look at the pod again.
    pub(super) async fn perform(&self, act: Act, view: &View<'_>) -> kube::Result<Duration> {
        match act {
            Act::CallUnschedulable => self.pod_status(view.pod, unschedulable()).await?,
            Act::Bind => {
                self.bind(view.pod, &self.nodes[0]).await?;
                return Ok(UNTIL_SEEN);
            }
            Act::HoldUp(reason) => self.pod_status(view.pod, waiting(view.pod, reason)).await?,
            Act::Ready => {
                if self.a_secret_is_missing(view.pod).await? {
                    if waiting_reason(view.pod).is_none() {
                        self.pod_status(view.pod, waiting(view.pod, "ContainerCreating")).await?;
                    }
                    return Ok(SECRET_RECHECK);
                }
                self.pod_status(view.pod, running(view.pod, true, "")).await?;
            }
            Act::Unready => self.pod_status(view.pod, running(view.pod, false, "ContainersNotReady")).await?,
            Act::LoseContact => self.pod_status(view.pod, running(view.pod, false, "NodeNotReady")).await?,
            Act::Drain => {
                self.evict(view.pod).await?;
                return Ok(UNTIL_SEEN);
            }
            Act::Evict => {
                let mut status = ended(view.pod, false);
                status["reason"] = json!("Evicted");
                status["message"] = json!("The node was low on resource: memory.");
                self.pod_status(view.pod, status).await?;
            }
            Act::EndPod => {
                let well = view.vmi.is_some_and(|vmi| vmi.data["status"]["phase"] == "Succeeded");
                self.pod_status(view.pod, ended(view.pod, well)).await?;
            }
            Act::RemovePod => {
                self.remove(view.pod).await?;
                return Ok(UNTIL_SEEN);
            }
            Act::Run | Act::Finish { .. } | Act::Obey(_) => {
                let Some(vmi) = view.vmi else {
                    return Ok(AT_ONCE);
                };
                self.guest(act, vmi, view).await?;
            }
        }
        Ok(AT_ONCE)
    }

    /// What virt-handler writes on the VMI.
    async fn guest(&self, act: Act, vmi: &DynamicObject, view: &View<'_>) -> kube::Result<()> {
        let now = Timestamp::now();
        let mut next = vmi.clone();
        let status = &mut next.data["status"];
        match act {
            Act::Run => {
                enter_phase(status, "Running", now);
                status["interfaces"] = self.interfaces(vmi);
                status["guestOSInfo"] = json!({});
                if view.script.paused {
                    set_condition(status, "Paused", Some(paused(now)));
                }
            }
            Act::Finish { well } => enter_phase(status, if well { "Succeeded" } else { "Failed" }, now),
            Act::Obey(command) => {
                if let Some((text, _)) = &view.script.command {
                    next.metadata.annotations.get_or_insert_default().insert(DONE.to_owned(), text.clone());
                }
                match command {
                    Command::AgentConnect => {
                        set_condition(
                            status,
                            "AgentConnected",
                            Some(new_condition("AgentConnected", true, "", "", now)),
                        );
                    }
                    Command::AgentDisconnect => set_condition(status, "AgentConnected", None),
                    Command::Pause => set_condition(status, "Paused", Some(paused(now))),
                    Command::Unpause => set_condition(status, "Paused", None),
                    Command::Migrate => {
                        let node = self.migrate(view.pod).await?;
                        status["migrationState"] = json!({ "startTimestamp": seconds(now), "endTimestamp": seconds(now),
                            "sourceNode": status["nodeName"], "targetNode": node, "completed": true });
                        status["nodeName"] = json!(node);
                        status["interfaces"] = self.interfaces(vmi);
                        next.metadata.labels.get_or_insert_default().insert(NODE_NAME_LABEL.to_owned(), node);
                    }
                    Command::LoseNode => self.pod_status(view.pod, running(view.pod, false, "NodeNotReady")).await?,
                    // As KubeVirt's node controller does it: without a note in `phaseTransitionTimestamps`.
                    Command::GiveUpNode => {
                        status["phase"] = json!("Failed");
                        status["reason"] = json!("NodeUnresponsive");
                    }
                    // Not for a running guest: noted as done, nothing else.
                    Command::PowerOff
                    | Command::Crash
                    | Command::FailBeforeRunning
                    | Command::Drain
                    | Command::Evict
                    | Command::LosePod => {}
                }
            }
            _ => {}
        }
        // Whole, as virt-handler does: a merge patch drops every null inside a list, and virt-controller's own patches,
        // which test what they replace, would then fail for ever.
        let api = vmis(&self.client, &vmi.namespace().unwrap_or_default());
        self.vmis.learn(api.replace(&vmi.name_any(), &PostParams::default(), &next).await?);
        if matches!(act, Act::Obey(Command::Migrate | Command::GiveUpNode)) {
            self.remove(view.pod).await?;
        }
        Ok(())
    }

    /// A ready copy of the pod on the next machine: the one that is there already, if the guest's move could not be noted.
    async fn migrate(&self, source: &Pod) -> kube::Result<String> {
        let twins = self.pods.owned_by(controller_uid(source).unwrap_or_default());
        let elsewhere =
            |pod: &Pod| !is_deleting(pod) && node_name(pod).is_some() && node_name(pod) != node_name(source);
        if let Some(node) = twins.iter().find(|pod| elsewhere(pod)).and_then(|pod| node_name(pod)) {
            return Ok(node.to_owned());
        }
        let here = self.nodes.iter().position(|node| Some(node.as_str()) == node_name(source)).unwrap_or(0);
        let node = self.nodes[(here + 1) % self.nodes.len()].clone();
        let address = self.addresses.fetch_add(1, Ordering::Relaxed);
        let mut target = source.clone();
        target.metadata.name = Some(format!("{}-m{address}", source.name_any()));
        target.metadata.resource_version = None;
        target.metadata.uid = None;
        target.status = None;
        target.spec.get_or_insert_default().node_name = Some(node.clone());
        let target = self.pods(source).create(&PostParams::default(), &target).await?;
        self.pods.learn(target.clone());
        self.pod_status(&target, running(&target, true, "")).await?;
        Ok(node)
    }

    fn pods(&self, pod: &Pod) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default())
    }

    async fn bind(&self, pod: &Pod, node: &str) -> kube::Result<()> {
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding",
            "metadata": { "name": pod.name_any(), "uid": pod.uid() },
            "target": { "apiVersion": "v1", "kind": "Node", "name": node },
        });
        let api = self.pods(pod);
        let _: Value = api.create_subresource("binding", &pod.name_any(), &PostParams::default(), &binding).await?;
        Ok(())
    }

    async fn pod_status(&self, pod: &Pod, status: Value) -> kube::Result<()> {
        let patch = Patch::Merge(json!({ "status": status }));
        let written = self.pods(pod).patch_status(&pod.name_any(), &PatchParams::default(), &patch).await?;
        self.pods.learn(written);
        Ok(())
    }

    async fn remove(&self, pod: &Pod) -> kube::Result<()> {
        let preconditions = Preconditions { uid: pod.uid(), resource_version: None };
        let at_once =
            DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default().preconditions(preconditions) };
        self.pods(pod).delete(&pod.name_any(), &at_once).await.map(drop)
    }

    /// Deletes the pod as `kubectl drain` does: if the API server, and whoever it asks, lets it go.
    async fn evict(&self, pod: &Pod) -> kube::Result<()> {
        let eviction = json!({ "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": pod.name_any() } });
        let api = self.pods(pod);
        let _: Value = api.create_subresource("eviction", &pod.name_any(), &PostParams::default(), &eviction).await?;
        Ok(())
    }

    async fn a_secret_is_missing(&self, pod: &Pod) -> kube::Result<bool> {
        let secrets = Api::<Secret>::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
        for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
            let Some(source) = volume.secret.as_ref().filter(|source| source.optional != Some(true)) else {
                continue;
            };
            let name = source.secret_name.as_deref().unwrap_or_default();
            if secrets.get_metadata_opt(name).await?.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The guest's interfaces with fresh addresses: one per network that the VMI has.
    fn interfaces(&self, vmi: &DynamicObject) -> Value {
        let networks = vmi.data["spec"]["networks"].as_array();
        let entry = |network: &Value| {
            let number = self.addresses.fetch_add(1, Ordering::Relaxed);
            let address = format!("10.{}.{}.{}", 244 + number / 62_500 % 8, number / 250 % 250, number % 250 + 2);
            json!({ "name": network["name"], "ipAddress": address, "ipAddresses": [address],
                "infoSource": "domain", "queueCount": 1, "podInterfaceName": "eth0" })
        };
        networks.into_iter().flatten().map(entry).collect()
    }
}

/// The name of the pod's one container; virt-launcher's is `compute`.
fn container(pod: &Pod) -> Value {
    let first = pod.spec.as_ref().and_then(|spec| spec.containers.first());
    json!({ "name": first.map(|container| &container.name), "image": first.and_then(|container| container.image.as_ref()),
        "imageID": "", "restartCount": 0 })
}

fn conditions(pairs: &[(&str, bool)]) -> Value {
    let now = Timestamp::now();
    pairs.iter().map(|(kind, status)| new_condition(kind, *status, "", "", now)).collect()
}

fn unschedulable() -> Value {
    let message = "0/1 nodes are available: 1 Insufficient memory.";
    json!({ "conditions": [new_condition("PodScheduled", false, "Unschedulable", message, Timestamp::now())] })
}

fn waiting(pod: &Pod, reason: &str) -> Value {
    let mut status = container(pod);
    let message = match reason {
        "ImagePullBackOff" => format!("Back-off pulling image {}", status["image"]),
        _ => String::new(),
    };
    status["ready"] = json!(false);
    status["state"] = json!({ "waiting": { "reason": reason, "message": message } });
    json!({ "phase": "Pending", "containerStatuses": [status],
        "conditions": conditions(&[("PodScheduled", true), ("Initialized", true), ("ContainersReady", false), ("Ready", false)]) })
}

/// Somebody holds the guest's CPUs.
fn paused(now: Timestamp) -> Value {
    new_condition("Paused", true, "PausedByUser", "VMI was paused by user", now)
}

/// The status of a pod that runs, and whether it is ready.
fn running(pod: &Pod, ready: bool, reason: &str) -> Value {
    let now = Timestamp::now();
    let mut status = container(pod);
    status["ready"] = json!(ready);
    status["started"] = json!(true);
    status["state"] = json!({ "running": { "startedAt": seconds(now) } });
    let condition = |kind, holds, reason| new_condition(kind, holds, reason, "", now);
    json!({ "phase": "Running", "startTime": seconds(now), "containerStatuses": [status], "conditions": [
        condition("PodScheduled", true, ""), condition("Initialized", true, ""),
        condition("ContainersReady", ready, reason), condition("Ready", ready, reason),
    ] })
}

fn ended(pod: &Pod, well: bool) -> Value {
    let now = seconds(Timestamp::now());
    let mut status = container(pod);
    let (phase, code, reason) = if well { ("Succeeded", 0, "Completed") } else { ("Failed", 1, "Error") };
    status["ready"] = json!(false);
    status["state"] =
        json!({ "terminated": { "exitCode": code, "reason": reason, "startedAt": now, "finishedAt": now } });
    json!({ "phase": phase, "containerStatuses": [status],
        "conditions": conditions(&[("PodScheduled", true), ("Initialized", true), ("ContainersReady", false), ("Ready", false)]) })
}
