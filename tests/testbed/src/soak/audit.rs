//! Rows, CRs, VMs, Secrets and history, held against one another.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt as _};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::Parts;
use super::app::{App, vm_name};
use super::witness::Witness;
use crate::kubevirt;
use crate::operator::NAMESPACE;
use crate::postgres::ADMINISTRATOR;

/// How long it may take until all is settled once nothing goes wrong any more: a lease that runs out, a start, an end,
/// the longest back-off.
const PATIENCE: Duration = Duration::from_secs(180);

/// Desktops that are on their way: each is due, wanted and not running, or not wanted and not over.
const UNSETTLED: &str = "
    select count(*) from cyberdesk.desktop
     where ended_at is null
       and (desired = 'absent' or status <> 'running' or expires_at < clock_timestamp() or observed_generation < generation)";

/// Entries of the history that do not follow from what was there before.
const BROKEN_HISTORY: &str = "
    with entry as (
      select *, lag(to_status) over chain as before, lag(event) over chain as event_before,
             count(*) filter (where event = 'created') over (partition by desktop_id) as created,
             count(*) filter (where event = 'ended') over (partition by desktop_id) as ended
        from cyberdesk.history window chain as (partition by desktop_id order by id))
    select desktop_id::text || ': ' || event || ' from ' || coalesce(from_status::text, 'nothing') || ' to ' ||
           coalesce(to_status::text, 'nothing') || ' after ' || coalesce(event_before, 'nothing') || ' ' || coalesce(before::text, '')
      from entry
     where created <> 1 or ended > 1
        or (event = 'created') <> (event_before is null)
        or from_status is distinct from before
        or event_before = 'deleted'
        or (event_before = 'ended' and event not in ('deleted', 'status'))
        or (before in ('completed', 'error', 'terminated') and to_status is distinct from before
            and event <> 'deleted' and not (to_status = 'terminated' and before <> 'terminated'))";

/// Waits until all is settled, and answers what is not as it should be.
pub(super) async fn audit(parts: &Parts, client: &Client, app: &App, witness: &Witness) -> Result<Vec<String>> {
    let database = parts.database.connect_as(ADMINISTRATOR).await?;
    let began = Instant::now();
    loop {
        let unsettled: i64 = database.query_one(UNSETTLED, &[]).await?.get(0);
        let findings = if unsettled == 0 { compare(&database, client).await? } else { vec![] };
        if unsettled == 0 && findings.is_empty() {
            break;
        }
        if began.elapsed() > PATIENCE {
            let mut all = vec![format!("{unsettled} desktops are not settled after {} s", PATIENCE.as_secs())];
            let open = database.query(&UNSETTLED.replace("count(*)", "id, to_jsonb(desktop)::text"), &[]).await?;
            for row in open.iter().take(5) {
                all.push(row.get(1));
                all.extend(remains(client, row.get(0)).await?);
            }
            all.extend(findings);
            return Ok(all);
        }
        sleep(Duration::from_millis(250)).await;
    }
    let mut findings = vec![];
    let made = witness.made();
    findings.extend(made.iter().filter(|(_, uids)| uids.len() > 1).map(|(name, uids)| {
        format!("{name} was made {} times: once made and gone, it must not come again", uids.len())
    }));
    let broken = database.query(BROKEN_HISTORY, &[]).await?;
    findings.extend(broken.iter().map(|row| format!("history of {}", row.get::<_, String>(0))));
    findings.extend(judge_rows(&database, app).await?);
    Ok(findings)
}

/// How far the objects of a desktop have come that does not get on.
async fn remains(client: &Client, id: Uuid) -> Result<Vec<String>> {
    let pods = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"));
    let (all, of_it) = (ListParams::default(), vm_name(id));
    let mut found = vec![];
    for kind in [kubevirt::vm_resource(), kubevirt::vmi_resource(), pods] {
        let objects = Api::<DynamicObject>::namespaced_with(client.clone(), NAMESPACE, &kind).list(&all).await?;
        for object in objects.items.iter().filter(|object| object.name_any().contains(&of_it)) {
            let (meta, status) = (&object.metadata, &object.data["status"]);
            found.push(format!(
                "  {} {}: deleted {:?}, held by {:?}, {} {}",
                kind.kind,
                object.name_any(),
                meta.deletion_timestamp,
                meta.finalizers,
                status["phase"],
                status["containerStatuses"]
            ));
        }
    }
    Ok(found)
}

/// What there is in the cluster, against what is wanted.
async fn compare(database: &tokio_postgres::Client, client: &Client) -> Result<Vec<String>> {
    let wanted = database.query("select id from cyberdesk.desktop where ended_at is null", &[]).await?;
    let wanted: BTreeSet<Uuid> = wanted.iter().map(|row| row.get(0)).collect();
    let crs = ApiResource::from_gvk(&GroupVersionKind::gvk("cyberdesk.io", "v1alpha1", "Cyberdesk"));
    let crs = Api::<DynamicObject>::namespaced_with(client.clone(), NAMESPACE, &crs);
    let all = ListParams::default();
    let mut findings = vec![];
    let vms: BTreeSet<String> = wanted.iter().map(|id| vm_name(*id)).collect();
    let names = |list: Vec<DynamicObject>| list.iter().map(kube::ResourceExt::name_any).collect::<BTreeSet<_>>();
    findings.extend(differ("CRs", &names(crs.list(&all).await?.items), &wanted.iter().map(Uuid::to_string).collect()));
    findings.extend(differ("VMs", &names(kubevirt::vms(client, NAMESPACE).list(&all).await?.items), &vms));
    findings.extend(differ("VMIs", &names(kubevirt::vmis(client, NAMESPACE).list(&all).await?.items), &vms));
    let secrets = Api::<Secret>::namespaced(client.clone(), NAMESPACE).list(&all).await?.items;
    let owners = secrets.iter().filter_map(|secret| secret.labels().get("cyberdesk.io/owner").cloned()).collect();
    findings.extend(differ("Secrets", &owners, &wanted.iter().map(Uuid::to_string).collect()));
    Ok(findings)
}

fn differ(what: &str, there: &BTreeSet<String>, wanted: &BTreeSet<String>) -> Vec<String> {
    let leaked = there.difference(wanted).map(|name| format!("{what}: {name} is there, and nobody wants it"));
    let lost = wanted.difference(there).map(|name| format!("{what}: {name} is wanted, and not there"));
    leaked.chain(lost).collect()
}

/// Each row, against what the app has done and was told.
async fn judge_rows(database: &tokio_postgres::Client, app: &App) -> Result<Vec<String>> {
    let rows = database
        .query(
            "select id, status::text, reason, ended_at is not null,
                    coalesce(shutdown_requested_at < timeout_at at time zone 'utc' - interval '1 second', false)
               from cyberdesk_instances",
            &[],
        )
        .await?;
    let rows: BTreeMap<Uuid, (String, Option<String>, bool, bool)> =
        rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2), row.get(3), row.get(4)))).collect();
    let mut findings = vec![];
    for (id, known) in app.known() {
        let Some((status, reason, over, early)) = rows.get(id) else {
            if !known.deleted {
                findings.push(format!("the row {id} is lost, and nobody deleted it"));
            }
            continue;
        };
        let reason = reason.as_deref().unwrap_or_default();
        if known.asked && !*over {
            findings.push(format!("{id} was asked to end, and lives: {status}"));
        }
        if *over && matches!(status.as_str(), "pending" | "running") {
            findings.push(format!("{id} is over, and says {status}"));
        }
        if reason == "timeout" && *early {
            findings.push(format!("{id} ended as a timeout before its deadline"));
        }
        if !reason.is_empty() && !EXPECTED.contains(&reason) && !known.crashed {
            findings.push(format!("{id} ended as {reason}, which nobody had a hand in"));
        }
    }
    Ok(findings)
}

/// Why a desktop may end here. A guest that was told to crash may say so in words of its own.
const EXPECTED: [&str; 4] = ["requested", "timeout", "vm-deleted", "guest-shutdown"];
