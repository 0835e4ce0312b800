//! Did every desktop end as told? And how long did it take? Pure, but for the look at what is left.

use std::time::Duration;

use anyhow::{Context as _, Result};
use cyberdesk_testbed::World;
use cyberdesk_testbed::kubevirt::{vm_resource, vmi_resource};
use cyberdesk_testbed::operator::NAMESPACE;
use cyberdesk_testbed::postgres::ADMINISTRATOR;
use kube::ResourceExt as _;
use kube::api::{Api, ApiResource, DynamicObject, ListParams};

use super::board::{Board, Desktop, duration, row_text};
use super::fate::{Expected, Fate};
use super::observe::cyberdesks;

/// What became of a desktop, in a few words.
pub(crate) fn outcome(desktop: &Desktop) -> String {
    match (desktop.fate.expected(), desktop.row.there(), desktop.cr.there()) {
        (Expected::Cr { .. }, _, Some(cr)) => {
            let phase = cr.phase.as_deref().unwrap_or("?");
            format!("CR {phase} · {}", cr.reason.as_deref().unwrap_or("?"))
        }
        (Expected::Cr { .. }, _, None) => "no CR".to_owned(),
        (_, Some(row), _) if row.status.is_none() => "row deleted".to_owned(),
        (_, Some(row), _) => row_text(row),
        (_, None, _) => "no row".to_owned(),
    }
}

/// What is wrong with the end of this desktop.
pub(crate) fn fault(desktop: &Desktop) -> Option<String> {
    let nickname = desktop.fate.nickname();
    let as_told = match desktop.fate.expected() {
        Expected::Row { status, reason } => desktop
            .row
            .there()
            .is_some_and(|row| row.status.as_deref() == Some(status) && row.reason.as_deref() == Some(reason)),
        Expected::NoRow { reason } => {
            desktop.row.there().is_some_and(|row| row.status.is_none() && row.reason.as_deref() == Some(reason))
        }
        Expected::Cr { phase, reason } => desktop
            .cr
            .there()
            .is_some_and(|cr| cr.phase.as_deref() == Some(phase) && cr.reason.as_deref() == Some(reason)),
    };
    let expected = match desktop.fate.expected() {
        Expected::Row { status, reason } => format!("{status} · {reason}"),
        Expected::NoRow { reason } => format!("row deleted · {reason}"),
        Expected::Cr { phase, reason } => format!("CR {phase} · {reason}"),
    };
    if desktop.key.is_none() {
        Some(format!("{nickname}: was never made"))
    } else if !as_told {
        let outcome = outcome(desktop);
        Some(format!("{nickname}: is {outcome}, and should be {expected}"))
    } else if !desktop.is_over() {
        let (row, cr, vm) = (&desktop.row, &desktop.cr, &desktop.vm);
        Some(format!("{nickname}: is not over; seen last: {row:?}, {cr:?}, {vm:?}"))
    } else {
        None
    }
}

/// Each desktop on a line: how it was told to end, what became of it, how long that took.
pub(crate) fn account(board: &Board) -> Vec<String> {
    let line = |desktop: &Desktop| {
        let mark = if fault(desktop).is_none() { '✓' } else { '✗' };
        let took = desktop.marks.told_to_over();
        let took = took.map_or_else(|| "–".to_owned(), duration);
        format!("{mark} {:<9} {:<34}  {:<24} {took:>6}", desktop.fate.nickname(), desktop.fate.told(), outcome(desktop),)
    };
    board.desktops.iter().map(line).collect()
}

/// How late the database's own clock says that the deadline was acted on: with the row's lock held, before the commit.
pub(crate) async fn deadline_missed_by(world: &World, board: &Board) -> Result<Option<Duration>> {
    let Some(key) = &board.desktop(Fate::Deadline).key else {
        return Ok(None);
    };
    let id: uuid::Uuid = key.parse().context("a row's key is its id")?;
    let client = world.database.connect_as(ADMINISTRATOR).await?;
    let statement = "select extract(epoch from shutdown_requested_at - timeout_at at time zone 'utc')::float8
                       from cyberdesk_instances where id = $1";
    let found = client.query_opt(statement, &[&id]).await?;
    let late: Option<f64> = found.and_then(|row| row.get(0));
    Ok(late.map(|seconds| Duration::from_secs_f64(seconds.max(0.0))))
}

/// The figures, each with what it spans.
pub(crate) fn figures(board: &Board, deadline_missed_by: Option<Duration>) -> Vec<String> {
    let range = |measure: fn(&Desktop) -> Option<Duration>| {
        let found: Vec<Duration> = board.desktops.iter().filter_map(measure).collect();
        match (found.iter().min(), found.iter().max()) {
            (Some(least), Some(most)) => format!("{} to {}", duration(*least), duration(*most)),
            _ => "–".to_owned(),
        }
    };
    let one = |time: Option<Duration>| time.map_or_else(|| "–".to_owned(), duration);
    let to_end = board.desktop(Fate::Deadline).marks.told_to_over();
    [
        ("from commit to VM created", range(|desktop| desktop.marks.commit_to_vm())),
        ("from commit to running", range(|desktop| desktop.marks.commit_to_running())),
        ("from deadline to shutdown requested", one(deadline_missed_by)),
        ("from deadline to row terminated", one(to_end)),
    ]
    .map(|(what, time)| format!("  {what:<36} {time}"))
    .to_vec()
}

/// What the cluster still holds beside the CR that a person applied: looked for live, not remembered.
pub(crate) async fn leftovers(world: &World) -> Result<Vec<String>> {
    let client = world.testbed.control_plane.client().await?;
    let secrets = ApiResource::erase::<k8s_openapi::api::core::v1::Secret>(&());
    let mut left = vec![];
    for kind in [cyberdesks(), vm_resource(), vmi_resource(), secrets] {
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), NAMESPACE, &kind);
        let found = api.list_metadata(&ListParams::default()).await;
        for object in found.with_context(|| format!("list {}", kind.plural))? {
            let name = object.name_any();
            if (kind.kind.as_str(), name.as_str()) != ("Cyberdesk", Fate::ByHand.nickname()) {
                left.push(format!("{} {name}", kind.kind));
            }
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::super::board::{Marks, Row, Side};
    use super::*;

    fn ended(status: &str, reason: &str) -> Desktop {
        let now = tokio::time::Instant::now();
        let row = Row {
            status: Some(status.to_owned()),
            reason: Some(reason.to_owned()),
            ending: true,
            over: true,
            ..Row::default()
        };
        Desktop {
            fate: Fate::Crash,
            key: Some("k".to_owned()),
            row: Side::There(row),
            cr: Side::Gone,
            vm: Side::Gone,
            marks: Marks { over: Some(now), ..Marks::default() },
        }
    }

    #[test]
    fn an_end_as_told_is_no_fault_and_another_is() {
        assert_eq!(fault(&ended("error", "guest-crashed")), None);
        assert_eq!(
            fault(&ended("error", "refused")).as_deref(),
            Some("crash: is error · refused, and should be error · guest-crashed")
        );
        let mut lingers = ended("error", "guest-crashed");
        lingers.vm = Side::There(super::super::board::Vm::default());
        assert!(fault(&lingers).is_some_and(|fault| fault.contains("not over")));
    }

    #[test]
    fn accounts_fit_into_80_columns() {
        let board = Board::new(tokio::time::Instant::now());
        for line in account(&board) {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }
}
