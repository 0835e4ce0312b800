//! One desktop's story on one time line: the row's history, its objects, conditions and Events, and what comes next.

use std::fmt::Write;

use jiff::Timestamp;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::ListParams;
use serde::Serialize;

use crate::cli::Shown;
use crate::model::{Cr, Desired, Row, Seen, Vm, Vmi};
use crate::names::Key;
use crate::survey::{self, Survey, cr_word, row_word, span, vm_word, vmi_word, whole};
use crate::telemetry::chain;

/// Something that happened.
#[derive(Debug, Serialize)]
struct Moment {
    at: Timestamp,
    /// Who tells it: row, cyberdesk, event, vm or vmi.
    from: &'static str,
    words: String,
}

#[derive(Debug, Serialize)]
struct Story {
    desktop: String,
    row: String,
    cyberdesk: String,
    vm: &'static str,
    vmi: String,
    node: Option<String>,
    ip: Option<String>,
    deadline: Option<Timestamp>,
    moments: Vec<Moment>,
    /// What it is waiting for, or what comes next.
    awaits: Vec<String>,
    unseen: Vec<String>,
}

/// Tells the story of the desktop with this id or name, or that begins so and lives.
pub(super) async fn tell(survey: &Survey, id: &str, json: bool) -> anyhow::Result<Shown> {
    if survey.now().is_none() {
        let why = [survey.database.as_ref().err(), survey.cluster.as_ref().err()].into_iter().flatten();
        let text = why.map(|why| format!("not looked at: {why}\n")).collect();
        return Ok(Shown { text, code: 2 });
    }
    let keys = survey.keys();
    let exact = keys.get(&Key::new(id)).cloned();
    let key = match exact {
        Some(key) => key,
        None => match keys.iter().filter(|key| key.to_string().starts_with(id)).collect::<Vec<_>>().as_slice() {
            [only] => (*only).clone(),
            // A row whose private row was trimmed may have a history still.
            [] => Key::new(id),
            several => {
                let text = format!("{id} may be any of {}: say more of it\n", several.len());
                return Ok(Shown { text, code: 1 });
            }
        },
    };
    let story = Story::of(survey, &key).await;
    if story.moments.is_empty() && !keys.contains(&key) {
        let half = if story.unseen.is_empty() { "" } else { ", as far as could be looked" };
        let unseen: String = story.unseen.iter().map(|why| format!("not looked at: {why}\n")).collect();
        return Ok(Shown { text: format!("there is no desktop {id}{half}\n{unseen}"), code: 1 });
    }
    let text = if json { serde_json::to_string_pretty(&story)? + "\n" } else { story.print(survey) };
    Ok(Shown { text, code: 0 })
}

impl Story {
    async fn of(survey: &Survey, key: &Key) -> Self {
        let (row, cr) = (survey.row(key), survey.seen(key, |it| &it.crs));
        let (vm, vmi) = (survey.seen(key, |it| &it.vms), survey.seen(key, |it| &it.vmis));
        let (mut moments, mut unseen) = (vec![], vec![]);
        unseen.extend(survey.database.as_ref().err().map(|why| format!("the database: {why}")));
        unseen.extend(survey.cluster.as_ref().err().map(|why| format!("the cluster: {why}")));
        if let (Some(pool), Some(id), Ok(_)) = (&survey.pool, key.row_id(), &survey.database) {
            match survey::history(pool, id).await {
                Ok(entries) => moments.extend(entries.into_iter().map(|entry| Moment {
                    at: entry.at,
                    from: "row",
                    words: entry.words,
                })),
                Err(error) => unseen.push(format!("the history: {}", chain(error.as_ref()))),
            }
        }
        moments.extend(of_objects(cr.present(), vm.present(), vmi.present()));
        if survey.cluster.is_ok() {
            match events(survey, key).await {
                Ok(events) => moments.extend(events),
                Err(error) => unseen.push(format!("Events: {}", chain(&error))),
            }
        }
        moments.sort_by_key(|moment| moment.at);
        Self {
            desktop: key.to_string(),
            row: row_word(&row),
            cyberdesk: cr_word(&cr),
            vm: vm_word(&vm),
            vmi: vmi_word(&vmi),
            node: vmi.present().and_then(|vmi| vmi.node.clone()),
            ip: vmi.present().and_then(|vmi| vmi.ip.clone()),
            deadline: row.present().map(|row| row.timeout_at).or(cr.present().and_then(|cr| cr.status.expiry_time)),
            awaits: awaits(survey, key, row.present(), cr.present()),
            moments,
            unseen,
        }
    }

    fn print(&self, survey: &Survey) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "{}\n", self.desktop);
        let _ = writeln!(text, "row        {:<12} vm     {}", self.row, self.vm);
        let _ = writeln!(text, "cyberdesk  {:<12} vmi    {}", self.cyberdesk, self.vmi);
        if let Some(node) = &self.node {
            let _ = writeln!(text, "node       {:<12} ip     {}", node, self.ip.as_deref().unwrap_or("-"));
        }
        let deadline = self.deadline.filter(|_| self.row != "over");
        if let (Some(deadline), Some(now)) = (deadline, survey.now()) {
            let left = now.database.duration_until(deadline);
            let when = if left.is_positive() { format!("in {}", span(left)) } else { format!("{} ago", span(left)) };
            let _ = writeln!(text, "deadline   {}, {when}", whole(deadline));
        }
        text.push('\n');
        let mut day = String::new();
        for Moment { at, from, words } in &self.moments {
            let today = at.strftime("%Y-%m-%d").to_string();
            if day != today {
                let _ = writeln!(text, "{today}");
                day = today;
            }
            let _ = writeln!(text, "  {}  {from:<9}  {words}", at.strftime("%H:%M:%S"));
        }
        text.push('\n');
        for awaited in &self.awaits {
            let _ = writeln!(text, "next       {awaited}");
        }
        for why in &self.unseen {
            let _ = writeln!(text, "NOT SEEN   {why}");
        }
        text
    }
}

/// What its objects say of themselves. Their times have whole seconds.
fn of_objects(cr: Option<&Cr>, vm: Option<&Vm>, vmi: Option<&Vmi>) -> Vec<Moment> {
    let mut moments = vec![];
    if let Some(cr) = cr {
        let by = if cr.owner.is_some() { "for its row" } else { "by hand" };
        moments.push(Moment { at: cr.created, from: "cyberdesk", words: format!("made {by}") });
        for condition in cr.status.conditions.iter().flatten() {
            let why = if condition.message.is_empty() { &condition.reason } else { &condition.message };
            let words = format!("{} is {}: {why}", condition.type_, condition.status);
            moments.push(Moment { at: condition.last_transition_time.0, from: "cyberdesk", words });
        }
        if let Some(end) = &cr.status.end {
            moments.push(Moment {
                at: end.at,
                from: "cyberdesk",
                words: format!("its end was decided: {}", end.reason),
            });
        }
    }
    let made = |at: Timestamp, from, uid: &str| Moment { at, from, words: format!("made, {uid}") };
    moments.extend(vm.map(|vm| made(vm.created, "vm", &vm.uid)));
    moments.extend(vmi.map(|vmi| made(vmi.created, "vmi", &vmi.uid)));
    moments
}

async fn events(survey: &Survey, key: &Key) -> kube::Result<Vec<Moment>> {
    let Some(client) = &survey.client else { return Ok(vec![]) };
    let api: Api<Event> = Api::namespaced(client.clone(), &survey.namespaces.0);
    let about = ListParams::default().fields(&format!("regarding.name={key},regarding.kind=Cyberdesk"));
    let moment = |event: Event| {
        let at = event.event_time.map(|time| time.0).or(event.metadata.creation_timestamp.map(|time| time.0))?;
        let words = format!("{}: {}", event.reason.unwrap_or_default(), event.note.unwrap_or_default());
        Some(Moment { at, from: "event", words })
    };
    Ok(api.list(&about).await?.items.into_iter().filter_map(moment).collect())
}

fn awaits(survey: &Survey, key: &Key, row: Option<&Row>, cr: Option<&Cr>) -> Vec<String> {
    let would: Vec<String> =
        survey.plan(key).iter().filter_map(survey::words).map(|words| format!("the daemon would {words}")).collect();
    if !would.is_empty() {
        return would;
    }
    let status = cr.map(|cr| &cr.status);
    if row.is_some_and(|row| row.ended)
        || status.is_some_and(|it| it.end.is_some() && it.start_clock.is_none() && row.is_none())
    {
        return vec!["nothing: it is over".to_owned()];
    }
    if survey.row(key) == Seen::Unknown {
        return vec!["what its row wants, once the database can be read".to_owned()];
    }
    if row.is_some_and(|row| row.desired == Desired::Absent) {
        return vec!["that its guest shuts down and its virtual machine is gone".to_owned()];
    }
    let started = status.and_then(|it| it.conditions.iter().flatten().find(|condition| condition.type_ == "Started"));
    match started {
        Some(condition) if condition.status != "True" && !condition.message.is_empty() => {
            vec![condition.message.clone()]
        }
        Some(condition) if condition.status == "True" => vec!["its deadline, or somebody who ends it".to_owned()],
        _ => vec!["that its guest gets ready".to_owned()],
    }
}
