//! A desktop's whole life, and each way in which it ends.

use anyhow::{Result, ensure};
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use serde_json::json;

use crate::starts::template;
use crate::templates::metrics;
use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a row becomes a running desktop and kubectl tells the same", a_row_becomes_a_running_desktop),
        story("a shutdown asked for in SQL ends it gracefully", shutdown_by_sql),
        story("the app writes terminated and is answered at once", the_app_writes_terminated),
        story("the app writes error and the desktop still goes", the_app_writes_error),
        story("the deadline ends it by the database's clock", the_deadline),
        story("an extension before the deadline keeps it", an_extension),
        story("a row inserted past its deadline never gets a VM", inserted_too_late),
        story("a guest that powers off ends its row", the_guest_powers_off),
        story("a guest that crashes ends its row as an error", the_guest_crashes),
        story("a guest that ignores ACPI is over only when its grace ends", the_guest_ignores_acpi),
        story("a deleted row takes its VM along", a_deleted_row),
        story("a deleted user takes all desktops along", a_deleted_user),
        story("a VM deleted by hand ends its row with a reason", a_vm_deleted_by_hand),
        story("a VMI deleted by hand is another VMI of the same desktop", a_vmi_deleted_by_hand),
        story("a CR deleted by hand comes back and its VM lives on", a_cr_deleted_by_hand),
        story("a live migration shows in kubectl and ends nothing", a_live_migration),
        story("Events of its CR tell a desktop's life, each step once", events_tell_it),
        story("a late running of a gateway does not bring it back", a_late_running),
    ]
}

async fn a_row_becomes_a_running_desktop(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.insert("1 hour").await?;
    world.until_status(&id, "running").await?;
    let phase = async || Ok(world.cr_status(&id, "phase").await?.as_deref() == Some("Running"));
    world.until("the CR says Running", phase).await?;

    let cr = world.crs().get(&id).await?;
    let status = &cr.data["status"];
    let vm = world.vms().get(&vm_name(&id)).await?;
    ensure!(status["virtualMachineRef"]["uid"].as_str() == vm.metadata.uid.as_deref(), "{status}");
    ensure!(status["node"].is_string() && status["ip"].is_string() && status["expiryTime"].is_string(), "{status}");
    let ready = status["conditions"].as_array().into_iter().flatten().find(|condition| condition["type"] == "Ready");
    ensure!(ready.is_some_and(|ready| ready["status"] == "True"), "kubectl wait --for=condition=Ready: {status}");
    ensure!(world.left().await?.len() == 4, "one CR, VM, VMI and Secret each: {:?}", world.left().await?);
    Ok(())
}

async fn shutdown_by_sql(world: &World) -> Result<()> {
    // It takes its time, so that it can be seen to stop.
    world.templates(&[("default.yaml", &stubborn(10))]).await?;
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.request_shutdown(&id).await?;
    let row = world.row(&id).await?;
    ensure!(row.status == "running" && row.shutdown_requested_at.is_some(), "it is stopping: {row:?}");
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("requested")), "{row:?}");
    ensure!(world.left().await?.is_empty(), "{:?}", world.left().await?);
    Ok(())
}

async fn the_app_writes(world: &World, status: &str) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let statement = format!(
        "update cyberdesk_instances set status = '{status}', updated_at = now() where id = $1 returning id, status"
    );
    ensure!(world.app(&statement, &id).await? == 1, "the app takes no row for 404");
    let row = world.row(&id).await?;
    ensure!(row.status == status && row.shutdown_requested_at.is_some(), "it stands at once: {row:?}");
    let row = world.until_over(&id).await?;
    ensure!(row.status == status, "{row:?}");
    Ok(())
}

async fn the_app_writes_terminated(world: &World) -> Result<()> {
    the_app_writes(world, "terminated").await
}

async fn the_app_writes_error(world: &World) -> Result<()> {
    the_app_writes(world, "error").await
}

async fn the_deadline(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.insert("3 seconds").await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("timeout")), "{row:?}");
    ensure!(row.message.is_some(), "it says so in words: {row:?}");
    let asked = row.shutdown_requested_at.expect("the deadline is a request of its own");
    ensure!(asked >= row.timeout_at, "not a moment before: {row:?}");
    ensure!(world.left().await?.is_empty(), "{:?}", world.left().await?);
    Ok(())
}

async fn an_extension(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.insert("4 seconds").await?;
    world.app("update cyberdesk_instances set timeout_at = now() + interval '1 hour' where id = $1", &id).await?;
    let first = world.insert("5 seconds").await?;
    world.until_over(&first).await?;
    let row = world.row(&id).await?;
    ensure!(row.ended_at.is_none() && row.shutdown_requested_at.is_none(), "it lives past its first deadline: {row:?}");
    let expires = async || {
        Ok(world.cr_status(&id, "expiryTime").await?.is_some_and(|at| {
            at.parse::<jiff::Timestamp>().is_ok_and(|at| (row.timeout_at - at).get_seconds().abs() <= 1)
        }))
    };
    world.until("the CR shows the new deadline", expires).await
}

async fn inserted_too_late(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    for lifetime in ["0 seconds", "-1 hour"] {
        let id = world.insert(lifetime).await?;
        let row = world.until_over(&id).await?;
        ensure!(row.reason.as_deref() == Some("timeout"), "{row:?}");
        let recorded = world
            .count(&format!("select count(*) from cyberdesk.desktop where id = '{id}' and vm_uid is not null"))
            .await?;
        ensure!(recorded == 0, "it never had a VM");
    }
    Ok(())
}

async fn the_guest_powers_off(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.guest(&id, "power-off").await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("guest-shutdown")), "{row:?}");
    ensure!(row.message.is_some(), "it says so in words: {row:?}");
    Ok(())
}

async fn the_guest_crashes(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.guest(&id, "crash").await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("error", Some("guest-crashed")), "{row:?}");
    Ok(())
}

/// A template whose guest does not listen to the power button, and has so many seconds of grace.
pub(crate) fn stubborn(grace: u32) -> String {
    format!(
        "
apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata: {{}}
spec:
  runStrategy: Once
  template:
    metadata:
      annotations: {{guest.testbed/ignores-acpi: 'true'}}
    spec:
      terminationGracePeriodSeconds: {grace}
      domain: {{memory: {{guest: 64Mi}}, devices: {{}}}}
"
    )
}

async fn the_guest_ignores_acpi(world: &World) -> Result<()> {
    world.templates(&[("default.yaml", &stubborn(2))]).await?;
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.request_shutdown(&id).await?;
    let row = world.until_over(&id).await?;
    let (asked, ended) = (row.shutdown_requested_at.expect("it was asked for"), row.ended_at.expect("it is over"));
    ensure!((ended - asked).total(jiff::Unit::Second)? >= 1.9, "it is given its grace: {row:?}");
    ensure!(
        (row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("requested")),
        "the VMI's end as Failed is no crash: {row:?}"
    );
    Ok(())
}

async fn a_deleted_row(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    ensure!(world.app("delete from cyberdesk_instances where id = $1", &id).await? == 1);
    world.until("nothing of it is left", async || Ok(world.left().await?.is_empty())).await?;
    let tombstones = "select count(*) from cyberdesk.desktop where ended_at is not null and reason = 'row-deleted'";
    world.until("its tombstone says that it is over", async || Ok(world.count(tombstones).await? == 1)).await
}

async fn a_deleted_user(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    for _ in 0..3 {
        world.running_desktop("1 hour").await?;
    }
    world.delete_user().await?;
    world.until("nothing of them is left", async || Ok(world.left().await?.is_empty())).await
}

async fn a_vm_deleted_by_hand(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.delete(world.vms(), &vm_name(&id)).await?;
    let row = world.until_over(&id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("vm-deleted")), "{row:?}");
    Ok(())
}

async fn a_vmi_deleted_by_hand(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let first = world.vmis().get(&vm_name(&id)).await?.metadata.uid;
    world.delete(world.vmis(), &vm_name(&id)).await?;
    let another = async || {
        let vmi = world.vmis().get(&vm_name(&id)).await?;
        Ok(vmi.metadata.uid != first && vmi.data["status"]["phase"] == "Running")
    };
    world.until("KubeVirt has started another", another).await?;
    let row = world.row(&id).await?;
    ensure!(row.status == "running" && row.shutdown_requested_at.is_none(), "{row:?}");
    Ok(())
}

async fn a_cr_deleted_by_hand(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let (cr, vm) = (world.crs().get(&id).await?.metadata.uid, world.vms().get(&vm_name(&id)).await?.metadata.uid);
    world.delete(world.crs(), &id).await?;
    let back = async || {
        let now = world.crs().get(&id).await?;
        Ok(now.metadata.uid != cr && now.data["status"]["phase"] == "Running")
    };
    world.until("the CR is back and says Running", back).await?;
    ensure!(world.vms().get(&vm_name(&id)).await?.metadata.uid == vm, "the VM lives on");
    ensure!(world.row(&id).await?.status == "running");
    Ok(())
}

async fn a_live_migration(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.until("the CR names its node", async || Ok(world.cr_status(&id, "node").await?.is_some())).await?;
    let before = world.cr_status(&id, "node").await?;
    world.guest(&id, "migrate").await?;
    world.until("the CR names another node", async || Ok(world.cr_status(&id, "node").await? != before)).await?;
    ensure!(world.row(&id).await?.status == "running");
    Ok(())
}

async fn events_tell_it(world: &World) -> Result<()> {
    // A guest that is up before anybody has looked was never seen to start.
    let by_agent = template(json!({ "cyberdesk.io/ready": "agent" }), json!({}), json!({}));
    world.templates(&[("default.yaml", &by_agent)]).await?;
    world.start_operator(&[]).await?;
    let id = world.insert("1 hour").await?;
    let starts = async || Ok(world.cr_status(&id, "phase").await?.as_deref() == Some("Starting"));
    world.until("it starts", starts).await?;
    let cr = world.crs().get(&id).await?.metadata.uid;
    let events: Api<Event> = Api::namespaced(world.parts.client.clone(), &world.namespace);
    let told = async || {
        let mut told = vec![];
        for event in events.list(&Default::default()).await? {
            if event.regarding.as_ref().is_some_and(|about| about.uid == cr) {
                told.push([event.type_, event.reason].map(Option::unwrap_or_default).join(" "));
            }
        }
        told.sort();
        anyhow::Ok(told)
    };
    world.until("they tell of its start", async || Ok(told().await? == ["Normal Starting"])).await?;
    let up = async || Ok(world.vmis().get(&vm_name(&id)).await?.data["status"]["phase"] == "Running");
    world.until("its guest runs", up).await?;
    world.guest(&id, "agent-connect").await?;
    world.until("they tell that it runs", async || Ok(told().await? == ["Normal Running", "Normal Starting"])).await?;
    world.guest(&id, "crash").await?;
    world.until_over(&id).await?;
    let whole = ["Normal Running", "Normal Starting", "Warning guest-crashed"];
    world.until("they tell of its end", async || Ok(told().await? == whole)).await?;
    let ends = metrics(world).await?;
    ensure!(ends.contains("cyberdesk_desktop_ends_total{reason=\"guest-crashed\"} 1"), "{ends}");
    Ok(())
}

async fn a_late_running(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.app("update cyberdesk_instances set status = 'terminated' where id = $1", &id).await?;
    let late = "update cyberdesk_instances set status = 'running', stream_url = 'https://example.com' where id = $1";
    ensure!(world.app(late, &id).await? == 1, "the gateway is answered");
    let row = world.until_over(&id).await?;
    ensure!(world.app(late, &id).await? == 1, "also when it is over");
    ensure!(world.row(&id).await? == row, "{row:?}");
    Ok(())
}
