//! The simulator is held to traces of the real KubeVirt: the same actions must lead to the same watch events.
//!
//! Each scenario does on the simulator what was done on the real virt-api and virt-controller when `recorded.txt` was
//! recorded, and compares the whole sequences of events, not only the ends (`compare.rs` says what races may change).

use anyhow::{Context, Result, bail};
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use kube::Client;
use kube::api::PropagationPolicy;
use libtest_mimic::Failed;
use serde_json::json;
use std::sync::Arc;
use tokio::runtime::Runtime;

use crate::compare;
use crate::event::{Event, Kind};
use crate::stage::Stage;

const RECORDED: &str = include_str!("recorded.txt");

/// Plays a scenario and compares.
pub(crate) fn hold(runtime: &Runtime, client: Client, name: &'static str, play: Play) -> Result<(), Failed> {
    let (code, _) = name.split_once(' ').unwrap_or((name, ""));
    let told = runtime.block_on(async {
        let stage = Arc::new(Stage::new(client, code).await?);
        play(stage.clone()).await?;
        stage.gone().await?;
        anyhow::Ok(stage)
    });
    let stage = told.map_err(|error| format!("{error:#}"))?;
    let recorded = recorded(code)?;
    let mut complaints = Vec::new();
    for kind in [Kind::Vm, Kind::Vmi] {
        let seen = stage.events(kind);
        let recorded: Vec<Event> = recorded.iter().filter(|event| event.kind == kind).cloned().collect();
        for (whose, events) in [("recorded", &recorded), ("seen", &seen)] {
            complaints.extend(compare::broken_order(events).map(|broken| format!("{whose}: {broken}")));
        }
        if let Err(diff) = compare::differences(&compare::normalise(&recorded), &compare::normalise(&seen)) {
            complaints.push(format!("recorded (-) and seen (+) differ:\n{diff}"));
        }
    }
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n\n").into()) }
}

fn recorded(code: &str) -> Result<Vec<Event>> {
    let heading = format!("== {code} ");
    let mut lines = RECORDED.lines().skip_while(|line| !line.starts_with(&heading)).skip(1);
    let events: Vec<Event> = lines.by_ref().take_while(|line| !line.is_empty()).map(Event::parse).collect();
    if events.is_empty() {
        bail!("recorded.txt has no {code}");
    }
    Ok(events)
}

/// What is done in a scenario.
pub(crate) type Play = fn(Arc<Stage>) -> LocalBoxFuture<'static, Result<()>>;

/// A scenario from an async block over its stage.
macro_rules! scenario {
    ($name:literal, |$stage:ident| $body:block) => {{
        let play: Play = |$stage| async move { $body.context($name) }.boxed_local();
        ($name, play)
    }};
}

/// The scenarios of `recorded.txt`, each by its code and what it is about.
pub(crate) fn scenarios() -> Vec<(&'static str, Play)> {
    vec![
        scenario!("S2 always, power-off", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            stage.tell("power-off").await?;
            stage.until(Kind::Vm, "a VM that is not ready", |vm| !vm.marked("ready")).await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        scenario!("S3a rerun-on-failure, power-off", |stage| {
            stage.create("RerunOnFailure", |_| ()).await?;
            stage.ready().await?;
            stage.tell("power-off").await?;
            stage.at_rest("Stopped").await?;
            stage.delete_vm().await
        }),
        scenario!("S3b rerun-on-failure, crash", |stage| {
            stage.create("RerunOnFailure", |_| ()).await?;
            stage.ready().await?;
            stage.tell("crash").await?;
            stage.until(Kind::Vm, "a VM that is not ready", |vm| !vm.marked("ready")).await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        scenario!("S4a once, power-off", |stage| {
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
        scenario!("S4b manual, never started", |stage| {
            stage.create("Manual", |_| ()).await?;
            stage.at_rest("Stopped").await?;
            stage.delete_vm().await
        }),
        scenario!("S4c always, VMI deleted", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            stage.delete_vmi().await?;
            stage.until(Kind::Vm, "a VM that is not ready", |vm| !vm.marked("ready")).await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        scenario!("S4d rerun-on-failure, VMI deleted, grace expires", |stage| {
            let deaf = |vm: &mut serde_json::Value| {
                vm["spec"]["template"]["metadata"]["annotations"] = json!({ "guest.testbed/ignores-acpi": "true" });
                vm["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = json!(2);
            };
            stage.create("RerunOnFailure", deaf).await?;
            stage.ready().await?;
            stage.delete_vmi().await?;
            stage.at_rest("Stopped").await?;
            stage.delete_vm().await
        }),
        scenario!("S5 always, fails before running", |stage| {
            let script = |vm: &mut serde_json::Value| {
                vm["spec"]["template"]["metadata"]["annotations"] =
                    json!({ "guest.testbed/do": "fail-before-running" });
            };
            stage.create("Always", script).await?;
            let twice = |vm: &Event| vm.marked("failures=2") && !vm.marked("created");
            stage.until(Kind::Vm, "a second failed start", twice).await?;
            stage.delete_vm().await
        }),
        scenario!("S6 always, no memory", |stage| {
            stage.create("Always", |vm| vm["spec"]["template"]["spec"]["domain"]["memory"] = json!(null)).await?;
            stage.until(Kind::Vm, "a failure", |vm| vm.condition("Failure") == Some("T(FailedCreate)")).await?;
            stage.delete_vm().await
        }),
        scenario!("S6b always, label too long", |stage| {
            let label = |vm: &mut serde_json::Value| {
                vm["spec"]["template"]["metadata"]["labels"] = json!({ "owner": "x".repeat(64) });
            };
            stage.create("Always", label).await?;
            stage.until(Kind::Vm, "a failure", |vm| vm.condition("Failure") == Some("T(FailedCreate)")).await?;
            stage.delete_vm().await
        }),
        scenario!("S7a always, VM deleted at once", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.until(Kind::Vmi, "a scheduling VMI", |vmi| vmi.state == "Scheduling").await?;
            stage.until(Kind::Vm, "a starting VM", |vm| vm.state == "Starting").await?;
            stage.delete_vm().await
        }),
        scenario!("S7b always, unschedulable", |stage| {
            stage.create("Always", never_schedules("unschedulable")).await?;
            stage.until(Kind::Vm, "ErrorUnschedulable", |vm| vm.state == "ErrorUnschedulable").await?;
            stage.delete_vm().await
        }),
        scenario!("S7c always, made again under the same name", |stage| {
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            stage.delete_vm().await?;
            stage.name_is_taken().await?;
            stage.gone().await?;
            stage.create("Always", |_| ()).await?;
            stage.ready().await?;
            stage.delete_vm().await
        }),
        scenario!("S7d always, image cannot be pulled", |stage| {
            stage.create("Always", never_schedules("image-pull")).await?;
            stage.until(Kind::Vm, "ImagePullBackOff", |vm| vm.state == "ImagePullBackOff").await?;
            stage.delete_vm().await
        }),
        scenario!("S11 always, halted, always; foreground", |stage| {
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
        scenario!("S12 always, orphaned", |stage| {
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
