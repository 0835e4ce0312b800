//! An API server that is away, slow or hostile: no row fails for it, and what was asked is done once when it is back.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use cyberdesk_testbed::api_proxy::{Answer, ApiProxy, Call, Fault};
use kube::ResourceExt as _;
use kube::api::PostParams;
use serde_json::json;

use crate::health::told;
use crate::starts::ready_within;
use crate::templates::{TAKES_USER_DATA, edit, until_condition, with_cloud_init};
use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("hostile: whatever the API server answers, no row fails and each end is done once", refused),
        story("hostile: connections refused fail no row, and what was asked is done once", connections_refused),
        story("hostile: one desktop whose calls always fail slows no other down", one_of_many),
        story("hostile: answers cut in the middle double nothing and lose nothing", cut_answers),
        story("hostile: calls that nobody answers are given up, and the leader leads on", unanswered),
        story("hostile: a slow API server only takes longer", slow),
        story("hostile: watches that go silent are noticed", silent),
        story("hostile: what a watch loses while it tells bookmarks is found by the next list", bookmarks_only),
        story("hostile: a VM that KubeVirt took up unseen is not deleted past its finalizer", taken_up_unseen),
        story("hostile: what vanished while a watch was too old is found by the list that follows", too_old),
        story("hostile: after a watch was refused once all is well again, though nothing changes", refused_once),
        story("hostile: a guest that became ready unseen is not given up", ready_unseen),
        story("hostile: templates are followed though their watch was too old", templates_too_old),
        story("hostile: a Secret that cannot be read holds up its own template, and no other", secret_unread),
        story("hostile: a last good version whose Secret cannot be read is waited for", last_good_unread),
        story("hostile: without the templates what ends ends, and what is to be made waits", templates_unread),
        story("hostile: without KubeVirt's kinds it waits and ends nothing, at the start and later", without_kubevirt),
    ]
}

/// Starts the operator with a proxy between it and the API server.
async fn start(world: &World, settings: &[(&str, &str)]) -> Result<ApiProxy> {
    let proxy = ApiProxy::start(&world.parts.testbed.control_plane).await?;
    start_behind(world, &proxy, settings).await?;
    Ok(proxy)
}

async fn start_behind(world: &World, proxy: &ApiProxy, settings: &[(&str, &str)]) -> Result<()> {
    let kubeconfig = world.through(proxy)?;
    let settings: Vec<_> = settings.iter().copied().chain([("KUBECONFIG", kubeconfig.as_str())]).collect();
    world.start_operator(&settings).await
}

/// Whether a call changes something of a desktop.
fn changes_a_desktop(call: &Call) -> bool {
    call.writes() && ["cyberdesks", "virtualmachine", "secrets"].iter().any(|kind| call.resource.starts_with(kind))
}

fn is_of_kubevirt(call: &Call) -> bool {
    call.resource.starts_with("virtualmachine")
}

fn watches(call: &Call, resource: &str) -> bool {
    call.verb == "watch" && call.resource == resource
}

async fn until_struck(world: &World, proxy: &ApiProxy, rule: usize, times: usize) -> Result<()> {
    world.until(&format!("it went wrong {times} times"), async || Ok(proxy.struck(rule) >= times)).await
}

/// Nobody was told that anything ended or failed.
async fn lives_on(world: &World, id: &str, status: &str) -> Result<()> {
    let row = world.row(id).await?;
    ensure!(row.status == status && row.ended_at.is_none() && row.reason.is_none(), "{row:?}");
    Ok(())
}

/// The desktop is over as its owner asked, and its VM was made once and deleted once.
async fn ended_once(world: &World, proxy: &ApiProxy, id: &str) -> Result<()> {
    ended(world, proxy, id, 1).await
}

async fn ended(world: &World, proxy: &ApiProxy, id: &str, deletes: usize) -> Result<()> {
    let row = world.until_over(id).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("requested")), "{row:?}");
    for (verb, most) in [("create", 1), ("delete", deletes)] {
        let done = proxy.done(verb, "virtualmachines", &vm_name(id));
        ensure!((1..=most).contains(&done), "{most} {verb} of the VM of {id} at the most, and not {done}");
    }
    let log = proxy.log();
    let deleted = log.iter().filter(|passed| passed.call.is("delete", "virtualmachines"));
    let meant: BTreeSet<String> = deleted
        .filter(|passed| passed.call.name == vm_name(id))
        .map(|passed| passed.call.json()["preconditions"]["uid"].to_string())
        .collect();
    ensure!(meant.len() == 1 && !meant.contains("null"), "each delete means the one VM that was made: {meant:?}");
    Ok(())
}

async fn refused(world: &World) -> Result<()> {
    let proxy = start(world, &[]).await?;
    let mut stopped = world.running_desktop("1 hour").await?;
    for answer in [
        Answer::status(429, "TooManyRequests").retry_after(1),
        Answer::text(429, "Too many requests, please try again later.").retry_after(1),
        Answer::status(500, "InternalError"),
        Answer::text(503, "service unavailable"),
        Answer::status(409, "Conflict"),
    ] {
        let rule = proxy.always(Fault::Answer(answer), changes_a_desktop);
        world.request_shutdown(&stopped).await?;
        let inserted = world.insert("1 hour").await?;
        until_struck(world, &proxy, rule, 4).await?;
        lives_on(world, &inserted, "pending").await?;
        ensure!(world.row(&stopped).await?.ended_at.is_none(), "its VM is there");
        proxy.lift_all();
        ended_once(world, &proxy, &stopped).await?;
        world.until_status(&inserted, "running").await?;
        stopped = inserted;
    }
    Ok(())
}

async fn connections_refused(world: &World) -> Result<()> {
    let proxy = start(world, &[]).await?;
    let stopped = world.running_desktop("1 hour").await?;
    let left_alone = world.running_desktop("1 hour").await?;
    proxy.stop().await;
    world.request_shutdown(&stopped).await?;
    let inserted = world.insert("1 hour").await?;
    world.operator_says("not done; the next look decides anew").await?;
    ensure!(!world.operator_said("in poll")?, "that a watch was cut it says in its own words, and once");
    proxy.listen()?;
    ended_once(world, &proxy, &stopped).await?;
    world.until_status(&inserted, "running").await?;
    lives_on(world, &left_alone, "running").await
}

async fn one_of_many(world: &World) -> Result<()> {
    let proxy = start(world, &[]).await?;
    for answer in [Answer::status(500, "InternalError"), Answer::text(429, "not now").retry_after(1)] {
        let unlucky = world.insert("1 hour").await?;
        let its = vm_name(&unlucky);
        let rule = proxy.always(Fault::Answer(answer), move |call| is_of_kubevirt(call) && call.name == its);
        // It may have its VM already; then its end is what goes wrong.
        world.request_shutdown(&unlucky).await?;
        let wrong = || Fault::Answer(Answer::status(500, "InternalError"));
        let makes_none = proxy.always(wrong(), |call| call.is("create", "virtualmachines") && !call.dry_run);
        let again = world.insert("1 hour").await?;
        let name = vm_name(&again);
        let makes = proxy.always(wrong(), move |call| is_of_kubevirt(call) && call.name == name);
        proxy.lift(makes_none);
        until_struck(world, &proxy, makes, 2).await?;
        let mut before = proxy.struck(makes);
        for _ in 0..3 {
            let lucky = world.running_desktop("1 hour").await?;
            world.request_shutdown(&lucky).await?;
            world.until_over(&lucky).await?;
            let struck = proxy.struck(makes);
            ensure!(struck <= before + 8, "it backs off, and is not tried {struck} times");
            before = struck;
        }
        lives_on(world, &again, "pending").await?;
        proxy.lift(rule);
        proxy.lift(makes);
        world.until_status(&again, "running").await?;
        world.until_over(&unlucky).await?;
    }
    Ok(())
}

async fn cut_answers(world: &World) -> Result<()> {
    let proxy = ApiProxy::start(&world.parts.testbed.control_plane).await?;
    let lists = proxy.next(3, Fault::CutAnswer, |call| call.verb == "list" && call.resource != "/version");
    start_behind(world, &proxy, &[]).await?;
    until_struck(world, &proxy, lists, 3).await?;
    for (verb, resource) in [
        ("create", "cyberdesks"),
        ("create", "secrets"),
        ("create", "virtualmachines"),
        ("patch", "cyberdesks/status"),
        ("delete", "virtualmachines"),
        ("deletecollection", "secrets"),
        ("delete", "cyberdesks"),
    ] {
        let rule = proxy.next(1, Fault::CutAnswer, move |call| call.is(verb, resource));
        let id = world.running_desktop("1 hour").await?;
        world.request_shutdown(&id).await?;
        // Whether it was deleted the watch may tell later than the first back-off ends: then it is asked for again.
        let deletes = if (verb, resource) == ("delete", "virtualmachines") { 2 } else { 1 };
        ended(world, &proxy, &id, deletes).await?;
        ensure!(proxy.struck(rule) == 1, "{verb} {resource} was cut");
        ensure!(proxy.done("create", "cyberdesks", &id) == 1, "there was one CR");
    }
    world.until("nothing is left", async || Ok(world.left().await?.is_empty())).await
}

async fn unanswered(world: &World) -> Result<()> {
    let proxy = start(world, &[]).await?;
    let stopped = world.running_desktop("1 hour").await?;
    let renewals = proxy.next(1, Fault::Unanswered, |call| call.is("update", "leases"));
    let creates = proxy.next(1, Fault::Unanswered, |call| call.is("create", "virtualmachines"));
    let deletes = proxy.next(1, Fault::Unanswered, |call| call.is("delete", "virtualmachines"));
    let inserted = world.insert("1 hour").await?;
    world.request_shutdown(&stopped).await?;
    // Its VM is made, and nobody has said so.
    world.until_status(&inserted, "running").await?;
    ended_once(world, &proxy, &stopped).await?;
    world.request_shutdown(&inserted).await?;
    ended_once(world, &proxy, &inserted).await?;
    until_struck(world, &proxy, renewals, 1).await?;
    let renewed_before = proxy.log().iter().filter(|passed| is_a_renewal(passed)).count();
    ensure!((proxy.struck(creates), proxy.struck(deletes)) == (1, 1));
    let renewed = async || {
        let log = proxy.log();
        let mut later = log.iter().filter(|passed| is_a_renewal(passed)).skip(renewed_before);
        Ok(later.any(|renewal| renewal.status < 300))
    };
    world.until("the Lease is renewed again", renewed).await?;
    ensure!(!world.operator_said("no longer leading")?, "one call more or less does not cost the lease");
    Ok(())
}

fn is_a_renewal(passed: &cyberdesk_testbed::api_proxy::Passed) -> bool {
    passed.call.is("update", "leases")
}

async fn slow(world: &World) -> Result<()> {
    let proxy = start(world, &[]).await?;
    proxy.always(Fault::Late(Duration::from_millis(300)), |call| call.resource != "leases");
    let id = world.running_desktop("1 hour").await?;
    world.request_shutdown(&id).await?;
    ended_once(world, &proxy, &id).await
}

async fn silent(world: &World) -> Result<()> {
    let proxy = start(world, &[]).await?;
    let crashed = world.running_desktop("1 hour").await?;
    let stopped = world.running_desktop("1 hour").await?;
    let watches = ["cyberdesks", "virtualmachines", "virtualmachineinstances"];
    let rule = proxy.next(3, Fault::Silent, move |call| watches.contains(&call.resource.as_str()));
    until_struck(world, &proxy, rule, 3).await?;
    world.guest(&crashed, "crash").await?;
    world.request_shutdown(&stopped).await?;
    // A watch that lives for 30 s and is given 10 more is read again then.
    let over =
        async || Ok(world.row(&crashed).await?.ended_at.is_some() && world.row(&stopped).await?.ended_at.is_some());
    world.until_within(Duration::from_secs(120), "the silence is noticed", over).await?;
    ensure!(world.row(&crashed).await?.reason.as_deref() == Some("guest-crashed"));
    ended_once(world, &proxy, &stopped).await
}

async fn bookmarks_only(world: &World) -> Result<()> {
    let proxy = start(world, &[("CYBERDESK_RESYNC_INTERVAL", "2s")]).await?;
    let crashed = world.running_desktop("1 hour").await?;
    proxy.always(Fault::BookmarksOnly, |call| call.verb == "watch");
    world.guest(&crashed, "crash").await?;
    let row = world.until_over(&crashed).await?;
    ensure!(row.reason.as_deref() == Some("guest-crashed"), "{row:?}");
    let id = world.running_desktop("1 hour").await?;
    world.request_shutdown(&id).await?;
    ended_once(world, &proxy, &id).await
}

async fn taken_up_unseen(world: &World) -> Result<()> {
    let proxy = start(world, &[]).await?;
    let blind = proxy.always(Fault::BookmarksOnly, |call| watches(call, "virtualmachines"));
    let id = world.running_desktop("1 hour").await?;
    // It knows the VM as it was made. The API server would delete that one at once, if its finalizer came only now.
    world.request_shutdown(&id).await?;
    let deletes = || {
        let is_it =
            |call: &Call| call.verb == "delete" && call.resource == "virtualmachines" && call.name == vm_name(&id);
        let of_it = proxy.log().into_iter().filter(|passed| is_it(&passed.call));
        let means_a_version = |call: &Call| call.json()["preconditions"]["resourceVersion"].is_string();
        of_it.map(|passed| (passed.status, means_a_version(&passed.call))).collect::<Vec<_>>()
    };
    world.until("its VM is deleted", async || Ok(deletes().iter().any(|(status, _)| *status == 200))).await?;
    let told = deletes();
    ensure!(told == [(409, true), (200, false)], "{told:?}");
    proxy.lift(blind);
    proxy.next(1, Fault::Expired, |call| watches(call, "virtualmachines"));
    world.until_over(&id).await?;
    ended_once(world, &proxy, &id).await
}

async fn too_old(world: &World) -> Result<()> {
    let proxy = start(world, &[]).await?;
    let (deleted, crashed) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    // Nobody watches while the one goes and the other ends.
    let away = proxy.always(Fault::Answer(Answer::status(503, "ServiceUnavailable")), |call| {
        is_of_kubevirt(call) && ["watch", "list"].contains(&call.verb)
    });
    proxy.next(2, Fault::CutWatch, is_of_kubevirt);
    until_struck(world, &proxy, away, 2).await?;
    world.delete(world.vms(), &vm_name(&deleted)).await?;
    let gone = async || Ok(world.vmis().get_opt(&vm_name(&deleted)).await?.is_none());
    world.until("VM and VMI are gone", gone).await?;
    let expired = |resource| {
        proxy.always(Fault::Answer(Answer::status(410, "Expired")), move |call: &Call| watches(call, resource))
    };
    let refused = [expired("virtualmachines"), expired("virtualmachineinstances")];
    proxy.lift(away);
    let row = world.until_over(&deleted).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("vm-deleted")), "{row:?}");
    for rule in refused {
        until_struck(world, &proxy, rule, 1).await?;
        proxy.lift(rule);
    }
    // The same, told in the stream of a watch that is on.
    let expired = proxy.next(3, Fault::Expired, |call| call.resource != "leases" && call.resource != "configmaps");
    until_struck(world, &proxy, expired, 3).await?;
    world.guest(&crashed, "crash").await?;
    let row = world.until_over(&crashed).await?;
    ensure!(row.reason.as_deref() == Some("guest-crashed"), "{row:?}");
    Ok(())
}

async fn refused_once(world: &World) -> Result<()> {
    let proxy = start(world, &[]).await?;
    world.running_desktop("1 hour").await?;
    told(world, "/readyz", 200, "ok").await?;
    // Longer than the daemon calls it well all the same.
    let refused = || Fault::Answer(Answer::status(503, "ServiceUnavailable"));
    let rule = proxy.always(refused(), |call| watches(call, "virtualmachines"));
    proxy.next(1, Fault::CutWatch, |call| watches(call, "virtualmachines"));
    told(world, "/readyz?verbose", 503, "[-]watch-vms failed").await?;
    ensure!(proxy.struck(rule) > 0);
    proxy.lift(rule);
    told(world, "/readyz", 200, "ok").await
}

async fn ready_unseen(world: &World) -> Result<()> {
    world.templates(&[("default.yaml", &ready_within(20))]).await?;
    let proxy = start(world, &[]).await?;
    world.operator_says("writing to the database").await?;
    let silent = proxy.always(Fault::Silent, |call| watches(call, "virtualmachineinstances"));
    until_struck(world, &proxy, silent, 1).await?;
    let id = world.running_desktop("1 hour").await?;
    ensure!(world.row(&id).await?.reason.is_none());
    Ok(())
}

async fn templates_too_old(world: &World) -> Result<()> {
    let proxy = start(world, &[]).await?;
    world.running_desktop("1 hour").await?;
    let expired = proxy.always(Fault::Answer(Answer::status(410, "Expired")), |call| watches(call, "configmaps"));
    proxy.next(1, Fault::CutWatch, |call| watches(call, "configmaps"));
    until_struck(world, &proxy, expired, 1).await?;
    world.templates(&[("default.yaml", &ready_within(601))]).await?;
    let followed = async || {
        let id = world.running_desktop("1 hour").await?;
        let vm = world.vms().get(&vm_name(&id)).await?;
        Ok(vm.annotations().get("cyberdesk.io/start-deadline").is_some_and(|seconds| seconds == "601"))
    };
    world.until("what is made is of the new template", followed).await
}

/// A template that takes its user data from a Secret that there is.
async fn of_a_secret(world: &World) -> Result<String> {
    let secret = json!({
        "metadata": { "name": "cyberdesk-vm-user-data" }, "stringData": { "userdata": "#!/bin/sh\necho ${vm_name}\n" },
    });
    world.secrets().create(&PostParams::default(), &serde_json::from_value(secret)?).await?;
    Ok(with_cloud_init("userDataFrom: {secret: cyberdesk-vm-user-data}", TAKES_USER_DATA))
}

async fn secret_unread(world: &World) -> Result<()> {
    let of_a_secret = of_a_secret(world).await?;
    world.templates(&[("default.yaml", &ready_within(600)), ("kept.yaml", &of_a_secret)]).await?;
    let proxy = ApiProxy::start(&world.parts.testbed.control_plane).await?;
    // As when what its Secrets are encrypted with is away.
    proxy.always(Fault::Answer(Answer::status(500, "InternalError")), |call| call.is("get", "secrets"));
    start_behind(world, &proxy, &[]).await?;
    world.operator_says("VM template taken into use").await?;
    let waits = world.insert_with("1 hour", Some(json!({ "template": "kept" }))).await?;
    let ended = world.insert_with("1 hour", Some(json!({ "template": "kept" }))).await?;
    let other = world.running_desktop("1 hour").await?;
    let why = "cluster-unavailable: kept.yaml: the Secret cyberdesk-vm-user-data cannot be read";
    for id in [&waits, &ended] {
        until_told(world, id, why).await?;
    }
    for id in [&ended, &other] {
        world.request_shutdown(id).await?;
        let row = world.until_over(id).await?;
        ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("requested")), "{row:?}");
    }
    lives_on(world, &waits, "pending").await?;
    proxy.lift_all();
    world.until_status(&waits, "running").await?;
    ensure!(world.row(&waits).await?.message.is_none(), "nothing keeps it any more");
    Ok(())
}

async fn last_good_unread(world: &World) -> Result<()> {
    let good = of_a_secret(world).await?;
    edit(world, &[("default.yaml", &good)]).await?;
    let proxy = start(world, &[]).await?;
    world.running_desktop("1 hour").await?;
    proxy.always(Fault::Answer(Answer::status(500, "InternalError")), |call| call.is("get", "secrets"));
    edit(world, &[("default.yaml", &good.replace("kind:", "{{{"))]).await?;
    until_condition(world, "default", "False", "unclosed bracket").await?;
    world.operator_says("cannot read the Secrets").await?;
    // This leader knows what it held, and the next one does not.
    world.running_desktop("1 hour").await?;
    world.crash_operator().await?;
    let waits = world.insert("1 hour").await?;
    world.apply_cr("by-hand", json!({ "timeoutMs": 3_600_000 })).await?;
    until_told(world, &waits, "cluster-unavailable: default.yaml: the Secret").await?;
    let phase = async |phase: &str| Ok(world.cr_status("by-hand", "phase").await?.as_deref() == Some(phase));
    world.until("the one by hand waits too", async || phase("Pending").await).await?;
    proxy.lift_all();
    world.until_status(&waits, "running").await?;
    world.until("the one by hand runs", async || phase("Running").await).await
}

async fn templates_unread(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let (ended, late) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    world.stop_operator().await?;
    let proxy = ApiProxy::start(&world.parts.testbed.control_plane).await?;
    proxy.always(Fault::Answer(Answer::status(500, "InternalError")), |call| call.resource == "configmaps");
    start_behind(world, &proxy, &[]).await?;
    world.request_shutdown(&ended).await?;
    world.app("update cyberdesk_instances set timeout_at = now() where id = $1", &late).await?;
    let waits = world.insert("1 hour").await?;
    for (id, reason) in [(&ended, "requested"), (&late, "timeout")] {
        let row = world.until_over(id).await?;
        ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some(reason)), "{row:?}");
    }
    until_told(world, &waits, "cluster-unavailable: the VM templates have not been read yet").await?;
    lives_on(world, &waits, "pending").await?;
    proxy.lift_all();
    world.until_status(&waits, "running").await
}

async fn until_told(world: &World, id: &str, words: &str) -> Result<()> {
    let told = async || Ok(world.row(id).await?.message.is_some_and(|message| message.starts_with(words)));
    world.until(&format!("{id} says {words:?}"), told).await
}

async fn without_kubevirt(world: &World) -> Result<()> {
    let proxy = ApiProxy::start(&world.parts.testbed.control_plane).await?;
    let not_served = || Fault::Answer(Answer::text(404, "404 page not found"));
    let checks = proxy.always(not_served(), |call| is_of_kubevirt(call) && call.dry_run);
    let rule = proxy.always(not_served(), is_of_kubevirt);
    start_behind(world, &proxy, &[]).await?;
    let (stopped, left_alone) = (world.insert("1 hour").await?, world.insert("1 hour").await?);
    let late = world.insert("1 second").await?;
    world.operator_says("cannot watch").await?;
    // Both kinds are asked for again, and the templates tried again.
    until_struck(world, &proxy, rule, 4).await?;
    until_struck(world, &proxy, checks, 3).await?;
    lives_on(world, &stopped, "pending").await?;
    proxy.lift_all();
    for id in [&stopped, &left_alone] {
        world.until_status(id, "running").await?;
    }
    let row = world.until_over(&late).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("timeout")), "{row:?}");

    let deletes = proxy.always(not_served(), |call| call.is("delete", "virtualmachines"));
    proxy.always(not_served(), is_of_kubevirt);
    proxy.next(2, Fault::CutWatch, is_of_kubevirt);
    world.request_shutdown(&stopped).await?;
    until_struck(world, &proxy, deletes, 3).await?;
    ensure!(world.row(&stopped).await?.ended_at.is_none(), "its VM was not seen to be gone");
    lives_on(world, &left_alone, "running").await?;
    let inserted = world.insert("1 hour").await?;
    proxy.lift_all();
    ended_once(world, &proxy, &stopped).await?;
    world.until_status(&inserted, "running").await?;
    lives_on(world, &left_alone, "running").await
}
