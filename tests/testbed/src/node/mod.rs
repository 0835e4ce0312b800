//! The played node: scheduler, kubelet, virt-handler and guest, for whatever makes VMIs and their virt-launcher pods.
//!
//! It stands under the simulator and under the real virt-controller alike, so it knows nothing of either: it watches
//! VMIs and virt-launcher pods in all namespaces, and writes what the parts that it plays would write: bindings, pod
//! statuses, and on the VMI what virt-handler writes (`Running` with interface and IP, the conditions of a guest,
//! `Succeeded` or `Failed`). It never creates or deletes a VMI.
//!
//! # Guest scripts
//!
//! Annotations on the VMI say how its guest behaves. Set them in the VM's template (`spec.template.metadata.annotations`
//! is copied to the VMI), or put them onto a living VMI. A misspelt one stops the guest from starting.
//!
//! | annotation | value | effect |
//! |---|---|---|
//! | `guest.testbed/boot` | time (`300ms`, `1.5s`) | how long from pod ready to `Running` |
//! | `guest.testbed/shutdown` | time | how long a shutdown takes; longer than the grace period ends `Failed` |
//! | `guest.testbed/agent` | time | the guest agent connects this long after `Running` (otherwise never by itself) |
//! | `guest.testbed/ignores-acpi` | `"true"` | not moved by the power button: `Failed` when the grace period ends |
//! | `guest.testbed/paused` | `"true"` | paused from the start, as with `startStrategy: Paused` |
//! | `guest.testbed/never-ready` | `"true"` | the guest runs, and its pod is never ready: a probe that fails |
//! | `guest.testbed/never-schedules` | `unschedulable` | no node fits: `PodScheduled=False`, for ever `Scheduling` |
//! | | `image-pull` | `ImagePullBackOff`, for ever `Scheduling` |
//! | | `missing-secret` | the container is never created, for ever `Scheduling` |
//! | | `not-ready` | the pod runs and is never ready, for ever `Scheduling` |
//! | | `quota` | the API server refuses the pod: for ever `Pending`, `Synchronized=False` |
//! | `guest.testbed/do` | `power-off` | the running guest ends `Succeeded` |
//! | | `crash` | the running guest ends `Failed` |
//! | | `fail-before-running` | the guest ends `Failed` instead of reaching `Running` |
//! | | `agent-connect`, `agent-disconnect` | condition `AgentConnected` appears, disappears |
//! | | `pause`, `unpause` | condition `Paused` appears, disappears |
//! | | `migrate` | the guest moves to the next node: new pod, node and IP, same VMI |
//! | | `drain` | the pod is evicted by the API: the guest shuts down in its grace |
//! | | `evict` | the kubelet ends the pod for want of room: the guest ends `Failed` |
//! | | `lose-pod` | the pod is not ready (`NodeNotReady`), then gone without an end: the VMI ends `Failed` |
//! | | `lose-node` | the node falls silent: `Ready=False` (`NodeNotReady`), and nothing else happens, no shutdown either |
//! | | `give-up-node` | the pod of the silent node is removed: `Failed`, `NodeUnresponsive` |
//!
//! `do` is acted on when it appears or changes (`guest.testbed/done` notes the last one): say `pause 2` to pause again.
//! A pod that mounts a Secret is not started before that Secret exists, script or no script.

use anyhow::{Context, Result};
use futures::FutureExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DynamicObject};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::keyed::{Keyed, Next};
use crate::kubevirt::{APP_LABEL, as_kubevirt, controller_uid, is_race, vmi_resource};
use crate::mirror::{Key, Mirror};
use hands::Hands;
use life::{Act, View};
use script::Script;

mod hands;
mod life;
mod machines;
mod quota;
mod script;

/// How long the node takes for what a script does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Speed {
    /// From pod created to pod bound.
    pub bind: Duration,
    /// From pod bound to pod ready.
    pub pod_ready: Duration,
    /// From pod ready to guest running.
    pub boot: Duration,
    /// From the wish to shut down to guest ended.
    pub shutdown: Duration,
    /// From guest ended to pod ended.
    pub pod_end: Duration,
}

impl Speed {
    /// For tests: each step is visible, none is waited for long.
    pub const FAST: Self = Self {
        bind: Duration::from_millis(20),
        pod_ready: Duration::from_millis(30),
        boot: Duration::from_millis(50),
        shutdown: Duration::from_millis(50),
        pod_end: Duration::from_millis(20),
    };

    /// The times of the recorded traces.
    pub const RECORDED: Self = Self {
        bind: Duration::from_millis(300),
        pod_ready: Duration::from_millis(500),
        boot: Duration::from_secs(1),
        shutdown: Duration::from_secs(2),
        pod_end: Duration::from_millis(250),
    };
}

/// What the node is like.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Its times.
    pub speed: Speed,
    /// Names of the machines; pods go to the first, a migration goes to the next.
    pub names: Vec<String>,
    /// API calls at once.
    pub width: usize,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self { speed: Speed::FAST, names: vec!["node01".into(), "node02".into()], width: 16 }
    }
}

/// The running node. Dropping it stops it: pods and guests then stay as they are.
pub struct Node {
    _tasks: JoinSet<()>,
}

impl Node {
    /// Puts the machines into the cluster and begins to play. The client must be an admin's; the VMI kind must exist.
    pub async fn start(client: Client, config: NodeConfig) -> Result<Self> {
        let client = as_kubevirt(&client);
        machines::register(&client, &config.names).await.context("registering the nodes")?;
        quota::install(&client).await.context("installing the quota policy")?;

        let (pods, vmis) = (Mirror::<Pod>::default(), Mirror::<DynamicObject>::default());
        let player = Arc::new(Player {
            hands: Hands::new(client.clone(), config.names.clone(), pods.clone(), vmis.clone()),
            pods: pods.clone(),
            vmis: vmis.clone(),
            speed: config.speed,
            pending: Mutex::default(),
        });
        let keyed = Arc::new(Keyed::new(config.width, move |key| {
            let player = player.clone();
            async move { player.pass(key).await }.boxed()
        }));

        let mut tasks = JoinSet::new();
        tasks.spawn(machines::heartbeat(client.clone(), config.names));
        let launchers = watcher::Config::default().labels(&format!("{APP_LABEL}=virt-launcher"));
        let watch = watcher(Api::<Pod>::all(client.clone()), launchers).default_backoff();
        let hints = keyed.clone();
        tasks.spawn(pods.clone().follow(watch, move |pod| hints.hint(Key::of(pod))));
        let all = Api::<DynamicObject>::all_with(client, &vmi_resource());
        let watch = kube::runtime::watcher(all, watcher::Config::default()).default_backoff();
        tasks.spawn(vmis.follow(watch, move |vmi| {
            for pod in pods.owned_by(&vmi.uid().unwrap_or_default()) {
                keyed.hint(Key::of(&*pod));
            }
        }));
        Ok(Self { _tasks: tasks })
    }
}

/// Whether the node would understand the script on these annotations; the error says what it does not.
pub fn check_script(vmi: &DynamicObject) -> Result<()> {
    Script::of(vmi).map(drop)
}

struct Player {
    hands: Hands,
    pods: Mirror<Pod>,
    vmis: Mirror<DynamicObject>,
    speed: Speed,
    /// Per pod, the step that waits for its time, and since when it is the right one.
    pending: Mutex<HashMap<Key, (Act, Instant)>>,
}

impl Player {
    /// One look at one pod.
    async fn pass(&self, key: Key) -> Next {
        let Some(pod) = self.pods.get(&key) else {
            self.forget(&key);
            return Next::Gone;
        };
        let vmi = self.vmi_of(&pod);
        let script = match vmi.as_deref().map(Script::of).transpose() {
            Ok(script) => script.unwrap_or_default(),
            Err(error) => {
                tracing::error!(pod = %key, error = format!("{error:#}"), "the guest's script is not understood");
                return Next::Rest;
            }
        };
        let view = View { pod: &pod, vmi: vmi.as_deref(), script: &script, speed: &self.speed };
        let Some(step) = life::next(&view) else {
            self.forget(&key);
            return Next::Rest;
        };
        let waited = self.since(&key, step.act).elapsed();
        if waited < step.after {
            return Next::In(step.after - waited);
        }
        match self.hands.perform(step.act, &view).await {
            Ok(again) => {
                self.forget(&key);
                Next::In(again)
            }
            // The object has moved on: the watch brings the news.
            Err(error) if is_race(&error) => Next::In(Duration::from_millis(100)),
            Err(error) => {
                tracing::warn!(pod = %key, act = ?step.act, %error, "the node's write failed; it tries again");
                Next::In(Duration::from_millis(500))
            }
        }
    }

    /// The VMI that controls this pod, if the cache has that very one.
    fn vmi_of(&self, pod: &Pod) -> Option<Arc<DynamicObject>> {
        let uid = controller_uid(pod)?;
        let owner = pod.owner_references().iter().find(|owner| owner.uid == uid)?;
        let vmi = self.vmis.get(&Key { namespace: pod.namespace()?, name: owner.name.clone() })?;
        (vmi.uid().as_deref() == Some(uid)).then_some(vmi)
    }

    /// Since when this act has been the pod's next one.
    fn since(&self, key: &Key, act: Act) -> Instant {
        let mut pending = self.pending.lock().expect("no holder of this lock panics");
        let entry = pending.entry(key.clone()).or_insert((act, Instant::now()));
        if entry.0 != act {
            *entry = (act, Instant::now());
        }
        entry.1
    }

    fn forget(&self, key: &Key) {
        self.pending.lock().expect("no holder of this lock panics").remove(key);
    }
}
