//! The lives that are played: each a script of what users, guests and the node do to one VM.
//!
//! They are held to the recording (`traces.rs`) and, in the conformance run, played on the simulator and on the real
//! KubeVirt at once (`conformance.rs`).

use anyhow::{Result, ensure};
use futures::future::LocalBoxFuture;
use kube::Client;
use kube::api::PropagationPolicy;
use serde_json::json;
use std::sync::Arc;

use crate::event::{Event, Kind};
use crate::stage::Stage;

/// What is done in a life.
pub(crate) type Play = fn(Arc<Stage>) -> LocalBoxFuture<'static, Result<()>>;

/// A life: its code, which is also its namespace's and its VM's name, and what it is about, then what is done.
#[derive(Clone, Copy)]
pub(crate) struct Life {
    pub(crate) name: &'static str,
    pub(crate) play: Play,
}

impl Life {
    /// The word before the first blank.
    pub(crate) fn code(&self) -> &'static str {
        self.name.split_once(' ').map_or(self.name, |(code, _)| code)
    }
}

/// Plays a life to its end, when nothing of it is left, and answers all events.
pub(crate) async fn told(client: Client, life: &Life) -> Result<Vec<Event>> {
    let stage = Arc::new(Stage::new(client, life.code()).await?);
    (life.play)(stage.clone()).await?;
    stage.gone().await?;
    Ok([Kind::Vm, Kind::Vmi].into_iter().flat_map(|kind| stage.events(kind)).collect())
}

/// A life from an async block over its stage.
macro_rules! life {
    ($name:literal, |$stage:ident| $body:block) => {{
        let play: $crate::lives::Play =
            |$stage| futures::FutureExt::boxed_local(async move { anyhow::Context::context(async $body.await, $name) });
        $crate::lives::Life { name: $name, play }
    }};
}
pub(crate) use life;

/// The lives of `recorded.txt`.
pub(crate) fn recorded() -> Vec<Life> {
    vec![
        life!("S2 always, power-off", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            stage.tell("power-off").await?;
            stage.until(Kind::Vm, "a VM that is not ready", |vm| !vm.marked("ready")).await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("S3a rerun-on-failure, power-off", |stage| {
            stage.create("RerunOnFailure", |_| ()).await?;
            stage.ready().await?;
            stage.tell("power-off").await?;
            stage.at_rest("Stopped").await?;
            stage.delete_vm().await
        }),
        life!("S3b rerun-on-failure, crash", |stage| {
            stage.create("RerunOnFailure", |_| ()).await?;
            stage.ready().await?;
            stage.tell("crash").await?;
            stage.until(Kind::Vm, "a VM that is not ready", |vm| !vm.marked("ready")).await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("S4a once, power-off", |stage| {
            stage.create("Once", |_| ()).await?;
            stage.ready().await?;
            stage.tell("power-off").await?;
            let ended = |vm: &Event| vm.state == "Stopped" && vm.condition("Ready") == Some("F(PodTerminating)");
            stage.until(Kind::Vm, "a VM whose pod has ended", ended).await?;
            stage.until(Kind::Vmi, "a VMI without the VM's finalizer", |vmi| vmi.finalizers == ["FG"]).await?;
            stage.delete_vmi().await?;
            stage.until(Kind::Vm, "a VM that starts again", |vm| vm.state == "Starting").await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("S4b manual, never started", |stage| {
            stage.create("Manual", |_| ()).await?;
            stage.at_rest("Stopped").await?;
            stage.delete_vm().await
        }),
        life!("S4c always, VMI deleted", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            stage.delete_vmi().await?;
            stage.until(Kind::Vm, "a VM that is not ready", |vm| !vm.marked("ready")).await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("S4d rerun-on-failure, VMI deleted, grace expires", |stage| {
            stage.create("RerunOnFailure", deaf).await?;
            stage.ready().await?;
            stage.delete_vmi().await?;
            stage.at_rest("Stopped").await?;
            stage.delete_vm().await
        }),
        life!("S5 always, fails before running", |stage| {
            let script = |vm: &mut serde_json::Value| {
                vm["spec"]["template"]["metadata"]["annotations"] =
                    json!({ "guest.testbed/do": "fail-before-running" });
            };
            stage.create("Always", script).await?;
            let twice = |vm: &Event| vm.marked("failures=2") && !vm.marked("created");
            stage.until(Kind::Vm, "a second failed start", twice).await?;
            stage.delete_vm().await
        }),
        life!("S6 always, no memory", |stage| {
            stage.create("Always", |vm| vm["spec"]["template"]["spec"]["domain"]["memory"] = json!(null)).await?;
            stage.until(Kind::Vm, "a failure", |vm| vm.condition("Failure") == Some("T(FailedCreate)")).await?;
            stage.delete_vm().await
        }),
        life!("S6b always, label too long", |stage| {
            let label = |vm: &mut serde_json::Value| {
                vm["spec"]["template"]["metadata"]["labels"] = json!({ "owner": "x".repeat(64) });
            };
            stage.create("Always", label).await?;
            stage.until(Kind::Vm, "a failure", |vm| vm.condition("Failure") == Some("T(FailedCreate)")).await?;
            stage.delete_vm().await
        }),
        life!("S7a always, VM deleted at once", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.until(Kind::Vmi, "a scheduling VMI", |vmi| vmi.state == "Scheduling").await?;
            stage.until(Kind::Vm, "a starting VM", |vm| vm.state == "Starting").await?;
            stage.delete_vm().await
        }),
        life!("S7b always, unschedulable", |stage| {
            stage.create("Always", never_schedules("unschedulable")).await?;
            stage.until(Kind::Vm, "ErrorUnschedulable", |vm| vm.state == "ErrorUnschedulable").await?;
            stage.delete_vm().await
        }),
        life!("S7c always, made again under the same name", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            stage.delete_vm().await?;
            stage.name_is_taken().await?;
            stage.gone().await?;
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("S7d always, image cannot be pulled", |stage| {
            stage.create("Always", never_schedules("image-pull")).await?;
            stage.until(Kind::Vm, "ImagePullBackOff", |vm| vm.state == "ImagePullBackOff").await?;
            stage.delete_vm().await
        }),
        life!("S11 always, halted, always; foreground", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            stage.set_run_strategy("Halted").await?;
            stage.at_rest("Stopped").await?;
            stage.set_run_strategy("Always").await?;
            stage.until(Kind::Vm, "a VM that starts again", |vm| vm.state == "Starting").await?;
            stage.ready().await?;
            stage.delete_vm_with(PropagationPolicy::Foreground).await?;
            stage
                .until(Kind::Vm, "a VM that waits for the garbage collector", |vm| {
                    vm.finalizers == ["FG"] && !vm.marked("created")
                })
                .await?;
            stage.let_vm_go().await
        }),
        life!("S12 always, orphaned", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            stage.delete_vm_with(PropagationPolicy::Orphan).await?;
            let waits = |vm: &Event| vm.finalizers == ["orphan"] && vm.state == "Terminating";
            stage.until(Kind::Vm, "a VM that waits for the garbage collector", waits).await?;
            stage.disown_vmi().await?;
            stage.let_vm_go().await?;
            stage.until(Kind::Vm, "the VM to be gone", |vm| vm.sign == '-').await?;
            stage.delete_vmi().await
        }),
    ]
}

fn never_schedules(why: &'static str) -> impl FnOnce(&mut serde_json::Value) {
    move |vm| {
        vm["spec"]["template"]["metadata"]["annotations"] = json!({ "guest.testbed/never-schedules": why });
    }
}

/// Lives that nobody recorded: what else can end a VM, and when.
pub(crate) fn more() -> Vec<Life> {
    vec![
        life!("once-crash stays as it fell", |stage| {
            stage.create("Once", |_| ()).await?;
            stage.ready().await?;
            stage.tell("crash").await?;
            stage.until(Kind::Vmi, "a VMI without the VM's finalizer", |vmi| vmi.finalizers == ["FG"]).await?;
            stage.delete_vm().await
        }),
        life!("once-off deleted with the VMI that has ended", |stage| {
            stage.create("Once", |_| ()).await?;
            stage.ready().await?;
            stage.tell("power-off").await?;
            stage.until(Kind::Vmi, "a VMI without the VM's finalizer", |vmi| vmi.finalizers == ["FG"]).await?;
            stage.delete_vm().await
        }),
        life!("once-deaf does not hear that it is deleted", |stage| {
            stage.create("Once", deaf).await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("once-halted is stopped", |stage| {
            stage.create("Once", |_| ()).await?;
            stage.ready().await?;
            stage.set_run_strategy("Halted").await?;
            stage.at_rest("Stopped").await?;
            stage.delete_vm().await
        }),
        life!("once-fails before it runs", |stage| {
            let script = |vm: &mut serde_json::Value| {
                let told = json!({ "guest.testbed/do": "fail-before-running" });
                vm["spec"]["template"]["metadata"]["annotations"] = told;
            };
            stage.create("Once", script).await?;
            stage.until(Kind::Vm, "a failed start", |vm| vm.marked("failures=1")).await?;
            stage.until(Kind::Vmi, "a VMI without the VM's finalizer", |vmi| vmi.finalizers == ["FG"]).await?;
            stage.delete_vm().await
        }),
        life!("scheduled deleted before the guest boots", |stage| {
            stage.create("Once", slow_boot).await?;
            stage.until(Kind::Vmi, "a scheduled VMI", |vmi| vmi.state == "Scheduled").await?;
            stage.delete_vm().await
        }),
        life!("paused deleted while it is paused", |stage| {
            stage.create("Once", |_| ()).await?;
            stage.ready().await?;
            stage.tell("pause").await?;
            stage.until(Kind::Vm, "Paused", |vm| vm.state == "Paused").await?;
            stage.delete_vm().await
        }),
        life!("labelled while it runs", |stage| {
            stage.create("RerunOnFailure", |_| ()).await?;
            stage.ready().await?;
            stage.label_vm().await?;
            stage.delete_vm().await
        }),
        life!("halted from the start", |stage| {
            stage.create("Halted", |_| ()).await?;
            stage.at_rest("Stopped").await?;
            stage.set_run_strategy("RerunOnFailure").await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("again crash after crash", |stage| {
            stage.create("RerunOnFailure", |_| ()).await?;
            for crash in ["crash", "crash 2"] {
                stage.ready().await?;
                stage.tell(crash).await?;
                stage.until(Kind::Vm, "a VM that is not ready", |vm| !vm.marked("ready")).await?;
            }
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("asked-always stops and starts by subresource", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            stage.may_not("start", "VM is already running").await?;
            stage.asks("stop").await?;
            stage.at_rest("Stopped").await?;
            stage.may_not("stop", "VM is not running").await?;
            stage.may_not("restart", "RunStategy Halted does not support manual restart requests").await?;
            stage.asks("start").await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("asked-rerun stops and starts by subresource", |stage| {
            stage.create("RerunOnFailure", |_| ()).await?;
            stage.ready().await?;
            stage.asks("stop").await?;
            stage.at_rest("Stopped").await?;
            stage.may_not("stop", "VM is not running").await?;
            stage.may_not("restart", "VM is not running: Halted").await?;
            stage.asks("start").await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        life!("asked-manual starts, restarts and stops by subresource", |stage| {
            stage.create("Manual", |_| ()).await?;
            stage.at_rest("Stopped").await?;
            stage.asks("start").await?;
            stage.ready().await?;
            restart(&stage).await?;
            stage.asks("stop").await?;
            stage.at_rest("Stopped").await?;
            stage.delete_vm().await
        }),
        life!("asked-once stops by subresource", |stage| {
            stage.create("Once", |_| ()).await?;
            stage.ready().await?;
            stage.may_not("restart", "RunStategy Once does not support manual restart requests").await?;
            stage.asks("stop").await?;
            stage.at_rest("Stopped").await?;
            stage.delete_vm().await
        }),
        life!("again-always restarts by subresource", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            restart(&stage).await?;
            stage.delete_vm().await
        }),
        life!("again-rerun restarts by subresource", |stage| {
            stage.create("RerunOnFailure", |_| ()).await?;
            stage.ready().await?;
            restart(&stage).await?;
            stage.delete_vm().await
        }),
        life!("edited while it runs", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            let grace = async || {
                let vmi = stage.vmi().await?;
                anyhow::Ok(vmi.data["spec"]["terminationGracePeriodSeconds"].clone())
            };
            stage.edit_template(json!({ "terminationGracePeriodSeconds": 20 })).await?;
            let required = |vm: &Event| vm.condition("RestartRequired") == Some("T()");
            stage.until(Kind::Vm, "a VM that is to be restarted", required).await?;
            ensure!(grace().await? == 30, "the VMI is changed");
            restart(&stage).await?;
            ensure!(grace().await? == 20, "the new VMI is not of the new template");
            stage.until(Kind::Vm, "a VM that needs no restart", |vm| !required(vm)).await?;
            stage.delete_vm().await
        }),
        life!("edit-undone needs no restart", |stage| {
            stage.create("RerunOnFailure", |_| ()).await?;
            stage.ready().await?;
            let required = |vm: &Event| vm.condition("RestartRequired") == Some("T()");
            stage.edit_template(json!({ "terminationGracePeriodSeconds": 20 })).await?;
            stage.until(Kind::Vm, "a VM that is to be restarted", required).await?;
            stage.edit_template(json!({ "terminationGracePeriodSeconds": 30 })).await?;
            stage.until(Kind::Vm, "a VM that needs no restart", |vm| !required(vm)).await?;
            stage.delete_vm().await
        }),
    ]
}

/// Restarts a VM that is ready; the guest then runs in another VMI.
async fn restart(stage: &Stage) -> Result<()> {
    let before = stage.vmi().await?.metadata.uid;
    stage.asks("restart").await?;
    stage.until(Kind::Vm, "a VM that is not ready", |vm| !vm.marked("ready")).await?;
    stage.ready().await?;
    ensure!(stage.vmi().await?.metadata.uid != before, "it runs in the same VMI");
    Ok(())
}

fn deaf(vm: &mut serde_json::Value) {
    vm["spec"]["template"]["metadata"]["annotations"] = json!({ "guest.testbed/ignores-acpi": "true" });
    vm["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = json!(2);
}

fn slow_boot(vm: &mut serde_json::Value) {
    vm["spec"]["template"]["metadata"]["annotations"] = json!({ "guest.testbed/boot": "60s" });
}
