//! The simulator: KubeVirt's virt-api and virt-controller in one small program, for speed and scale.
//!
//! It stands on the played node ([`crate::node`]), which it shares with the real virt-api and virt-controller, and is
//! held to them: by traces and refusals on record in every test run (`tests/kubevirt`), side by side in `cargo conformance`.
//!
//! - [`schema`]: the CustomResourceDefinitions;
//! - `admission`: virt-api's webhooks, a table of small rules, and the defaults that it writes;
//! - `subresources`: virt-api's start, stop and restart;
//! - `controller`, `vm`, `vmi`, `launcher`: virt-controller, the last three pure.
//!
//! # Left out on purpose
//!
//! Asking for one of these is refused at admission (`the simulator does not play ...`), unless the line says otherwise.
//!
//! - VirtualMachinePool, Clone, Snapshot, Restore, Export, Migration and Preset objects: their kinds do not exist;
//! - instance types and preferences; DataVolumes, PersistentVolumeClaims and hot-plugged volumes;
//! - `WaitAsReceiver`; `running` together with anything but `true` or `false` (as KubeVirt);
//! - edits of what KubeVirt updates in a VMI that runs (sockets, memory, disks, volumes, networks, where it may run): all
//!   other edits of its VM's template are played, as `RestartRequired`;
//! - `RestartRequired` for an edit that only spells out a default, the VMI being the same: not written;
//! - of the subresource API all but start, stop and restart of a VM: not served, 404 (let the node pause the guest);
//!   options in the body of these three (`gracePeriod`, `paused`): refused with 400;
//! - ControllerRevisions and KubeVirt's Events: not written;
//! - the eviction webhook: a drained guest shuts down, whatever its `evictionStrategy` (KubeVirt migrates some);
//! - `NodeUnresponsive`: the VMI of a lost node fails when its pod is gone, without a reason;
//! - adopting an ownerless VMI of a VM's name: KubeVirt adopts it and then fails for ever; here the VM just never runs.

use anyhow::{Context, Result};
use kube::Client;
use std::time::Duration;
use tokio::task::JoinSet;

use crate::control_plane::install;
use crate::kubevirt::as_kubevirt;

mod admission;
mod controller;
mod launcher;
pub mod schema;
mod subresources;
mod vm;
mod vmi;

/// How much of KubeVirt's chatter is played.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Every event of the recorded traces, no-op updates included.
    Recorded,
    /// For a thousand VMs at once: what carries no news is left out. The first status and the API version notes are
    /// not written on their own, a VM that has just made its VMI skips `VMINotExists`, and neither `activePods` nor
    /// another reason for not being ready is a reason to write. Phases, finalizers, readiness itself, all other
    /// conditions and the order of things stay.
    Essential,
}

/// What the simulator is like.
#[derive(Clone, Copy, Debug)]
pub struct SimulatorConfig {
    /// How much of KubeVirt's chatter is played.
    pub detail: Detail,
    /// The pause after a first failed start; KubeVirt's is ten seconds.
    pub back_off: Duration,
    /// Objects worked on at once, and so API calls at once.
    pub width: usize,
}

impl Default for SimulatorConfig {
    fn default() -> Self {
        Self { detail: Detail::Recorded, back_off: Duration::from_secs(10), width: 32 }
    }
}

/// The running simulator, for all namespaces. Dropping it stops it and leaves its objects in the cluster; with the
/// webhooks' server gone, VM and VMI writes are then refused, as with KubeVirt down.
pub struct Simulator {
    _tasks: JoinSet<()>,
}

impl Simulator {
    /// Installs the kinds and the webhooks, and begins to play once both answer. The client must be an admin's.
    pub async fn start(client: Client, config: SimulatorConfig) -> Result<Self> {
        install(&client, &schema::definitions()?).await.context("installing KubeVirt's kinds")?;
        let mut tasks = JoinSet::new();
        admission::start(&client, &mut tasks).await.context("starting the webhooks")?;
        let mut loops = controller::start(as_kubevirt(&client), &config);
        tasks.spawn(async move { while loops.join_next().await.is_some() {} });
        Ok(Self { _tasks: tasks })
    }
}
