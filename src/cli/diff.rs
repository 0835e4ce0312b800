//! `diff`: each desktop about which row, CR and VM disagree, and what the daemon would do about it.

use std::fmt::Write;

use clap::Args;
use serde::Serialize;

use super::Shown;
use crate::model::{Cr, Seen};
use crate::names::Key;
use crate::survey::{Survey, cr_word, is_strange, row_word, vm_word, vmi_word, words};

const EXAMPLES: &str = "\
Examples:
  kubectl exec -n cyberdesk-system deploy/cyberdesk-operator -- cyberdesk-operator diff
  cyberdesk-operator diff --json | jq -r '.differences[].desktop'

What would be done is what the daemon itself decides, from what is seen now; nothing is done here. On a busy fleet
some desktops are always on their way: what stays from one diff to the next is what to look into, with status ID.

The exit code is 0 if there are no differences, 1 if there are, and 2 if a side could not be looked at: what is printed
then is of the other alone. Without the database nothing can be said of desktops that have a row.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Diff {
    /// For programs: an object with the list of differences.
    #[arg(long)]
    json: bool,
}

/// One desktop about which the sides disagree.
#[derive(Debug, Serialize)]
struct Difference {
    desktop: String,
    row: String,
    cyberdesk: String,
    vm: &'static str,
    vmi: String,
    /// What the daemon would do, in order.
    would: Vec<String>,
    /// What is to be said where nothing would be done.
    note: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct Report {
    differences: Vec<Difference>,
    /// Desktops that were looked at.
    desktops: usize,
    /// Why a side could not be looked at.
    unseen: Vec<String>,
}

impl Diff {
    pub(super) async fn run(self) -> anyhow::Result<Shown> {
        let survey = Survey::read(&super::variables(), crate::cluster::connect().await, None).await;
        let report = compare(&survey);
        let code = match (report.unseen.is_empty(), report.differences.is_empty()) {
            (false, _) => 2,
            (true, false) => 1,
            (true, true) => 0,
        };
        let text = if self.json { serde_json::to_string_pretty(&report)? + "\n" } else { print(&report) };
        Ok(Shown { text, code })
    }
}

fn compare(survey: &Survey) -> Report {
    let mut unseen = vec![];
    unseen.extend(survey.database.as_ref().err().map(|why| format!("the database: {why}")));
    unseen.extend(survey.cluster.as_ref().err().map(|why| format!("the cluster: {why}")));
    match survey.cluster.as_ref().map(|objects| &objects.templates) {
        Ok(Ok(templates)) => unseen.extend(templates.not_known().map(|refusal| refusal.message.clone())),
        Ok(Err(why)) => unseen.push(format!("the templates: {why}")),
        Err(_) => (),
    }
    let keys = survey.keys();
    Report {
        desktops: keys.len(),
        differences: keys.iter().filter_map(|key| difference(survey, key)).collect(),
        unseen,
    }
}

fn difference(survey: &Survey, key: &Key) -> Option<Difference> {
    let (row, cr) = (survey.row(key), survey.seen(key, |it| &it.crs));
    let (vm, vmi) = (survey.seen(key, |it| &it.vms), survey.seen(key, |it| &it.vmis));
    let would: Vec<String> = survey.plan(key).iter().filter_map(words).collect();
    let owner = cr.present().and_then(|cr| cr.owner.as_ref()).or(vm.present().and_then(|vm| vm.owner.as_ref()));
    let note = match &vm {
        _ if !would.is_empty() => None,
        _ if cr.present().is_some_and(Cr::is_kopfs) => {
            Some("the Kopf operator holds it: it is left alone until it is taken over (cyberdesk-operator adopt)")
        }
        _ if is_strange(&row, owner) => Some("made for a row that this database does not have: it is left alone"),
        Seen::Present(vm) if vm.owner.is_none() && cr != Seen::Absent => {
            Some("the VM of its name is not ours: it is left alone")
        }
        _ => None,
    };
    if would.is_empty() && note.is_none() {
        return None;
    }
    Some(Difference {
        desktop: key.to_string(),
        row: row_word(&row),
        cyberdesk: cr_word(&cr),
        vm: vm_word(&vm),
        vmi: vmi_word(&vmi),
        would,
        note,
    })
}

fn print(report: &Report) -> String {
    let mut text = String::new();
    if !report.differences.is_empty() {
        let _ = writeln!(text, "{:<36} {:<10} {:<10} {:<8} VMI", "DESKTOP", "ROW", "CYBERDESK", "VM");
    }
    for Difference { desktop, row, cyberdesk, vm, vmi, would, note } in &report.differences {
        let _ = writeln!(text, "{desktop:<36} {row:<10} {cyberdesk:<10} {vm:<8} {vmi}");
        for action in would {
            let _ = writeln!(text, "  would {action}");
        }
        if let Some(note) = note {
            let _ = writeln!(text, "  {note}");
        }
    }
    for why in &report.unseen {
        let _ = writeln!(text, "not looked at: {why}");
    }
    let _ = writeln!(text, "{} of {} desktops differ", report.differences.len(), report.desktops);
    text
}
