//! The lives that a desktop may lead, and all effects that are met in them.

use anyhow::{Result, ensure};
use cyberdesk_testbed::api_proxy::Call;
use cyberdesk_testbed::statement_proxy::Statement;
use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::world::{World, vm_name};

/// What becomes of a desktop, and by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Life {
    /// Its owner asks for its shutdown.
    Requested,
    /// Its deadline comes.
    Deadline,
    /// Its guest powers off.
    PowerOff,
    /// Its deadline is moved, and its CR with it; then its owner asks.
    Moved,
    /// Somebody deletes the CR of its row, which comes back; then its owner asks.
    CrDeleted,
    /// A CR by hand, whose time is over; then it is deleted.
    ByHand,
}

pub(super) const LIVES: [Life; 6] =
    [Life::Requested, Life::Deadline, Life::PowerOff, Life::Moved, Life::CrDeleted, Life::ByHand];

/// The calls by which a desktop of a row comes to run.
pub(super) const MAKING: [&str; 5] = [
    "create cyberdesks",
    "create secrets",
    "create virtualmachines",
    "patch cyberdesks/status Starting",
    "patch cyberdesks/status Running",
];

/// Calls that are of no desktop.
pub(super) const OF_THE_TERM: [&str; 3] = ["create leases", "update leases", "patch configmaps"];

/// Statements that change a row, and in which life they are met.
pub(super) const REPORTS: [(Life, &str); 5] = [
    (Life::Requested, "report"),
    (Life::Requested, "report running"),
    (Life::Requested, "report terminated ended"),
    (Life::Deadline, "expire"),
    (Life::PowerOff, "report terminated ended"),
];

/// Statements that change something else.
pub(super) const HOUSEKEEPING: [&str; 6] = ["acquire", "bind", "reconcile_projection", "sign_of_life", "warn", "trim"];

/// Statements that change nothing.
pub(super) const READS: [&str; 10] = [
    "live_desktops",
    "dirty_desktops",
    "desktops_by_id",
    "ended_within",
    "identity",
    "pair",
    "lost",
    "paused",
    "last_sign_of_life",
    "fence_epoch",
];

impl Life {
    /// Why its row says that it ended.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Requested | Self::Moved | Self::CrDeleted => "requested",
            Self::Deadline | Self::ByHand => "timeout",
            Self::PowerOff => "guest-shutdown",
        }
    }

    /// What its history tells. A deadline that was `kept_by_cr`, for the database did not answer, has nobody who asked
    /// for a shutdown.
    pub(super) fn history(self, kept_by_cr: bool) -> &'static str {
        match self {
            Self::Deadline if kept_by_cr => "created, status, deadline, ended",
            Self::Deadline | Self::Moved => "created, status, deadline, shutdown-requested, ended",
            Self::Requested | Self::CrDeleted => "created, status, shutdown-requested, ended",
            Self::PowerOff => "created, status, ended",
            Self::ByHand => "",
        }
    }

    /// The calls of its part that is its own.
    pub(super) fn calls(self) -> &'static [&'static str] {
        match self {
            Self::Requested => &[
                "patch cyberdesks/status Stopping requested",
                "delete virtualmachines",
                "deletecollection secrets",
                "delete cyberdesks",
            ],
            Self::Deadline => &[
                "patch cyberdesks/status Stopping timeout",
                "delete virtualmachines",
                "deletecollection secrets",
                "delete cyberdesks",
            ],
            Self::PowerOff => &[
                "patch cyberdesks/status Stopping guest-shutdown",
                "delete virtualmachines",
                "deletecollection secrets",
                "delete cyberdesks",
            ],
            Self::Moved => &["patch cyberdesks", "patch cyberdesks/status Stopping requested"],
            Self::CrDeleted => &["create cyberdesks again", "patch cyberdesks/status Stopping requested"],
            Self::ByHand => &[
                "patch cyberdesks/status Stopping timeout",
                "delete virtualmachines",
                "deletecollection secrets",
                "patch cyberdesks/status Terminated timeout",
            ],
        }
    }

    /// The calls at which the operator is killed. What the lives have in common, two of them stand for.
    pub(super) fn points(self) -> Vec<&'static str> {
        let of_making = match self {
            Self::Requested => &MAKING[..],
            // Somebody else makes its CR.
            Self::ByHand => &MAKING[1..],
            Self::Deadline | Self::PowerOff | Self::Moved | Self::CrDeleted => &[],
        };
        of_making.iter().chain(self.calls()).copied().collect()
    }

    /// The name of a desktop that lives so: of a row, its id.
    pub(super) fn name(self) -> String {
        let id = Uuid::new_v4();
        if self == Self::ByHand { format!("hand-{}", id.simple()) } else { id.to_string() }
    }

    /// Lives it from its insert to its end, whatever becomes of the operator meanwhile.
    pub(super) async fn live(self, world: &World, id: &str) -> Result<()> {
        if self == Self::ByHand {
            return by_hand(world, id).await;
        }
        let insert = "insert into cyberdesk_instances (id, user_id, timeout_at)
                      select $1, id, now() + interval '1 hour' from auth.users";
        world.app(insert, id).await?;
        world.until_status(id, "running").await?;
        match self {
            Self::Requested | Self::ByHand => world.request_shutdown(id).await?,
            Self::Deadline => {
                // Past by more than what is not known of the database's clock: one that is still to come goes to the CR.
                let past = "update cyberdesk_instances set timeout_at = now() - interval '1 minute' where id = $1";
                world.app(past, id).await.map(drop)?;
            }
            Self::PowerOff => world.guest(id, "power-off").await?,
            Self::Moved => {
                let at = "select changed from set_desktop_timeout($1, now() + interval '2 hours')";
                world.app(at, id).await?;
                let deadline = world.row(id).await?.timeout_at;
                let has = async || {
                    let at = world.crs().get(id).await?.data["spec"]["expiresAt"].as_str().map(str::parse::<Timestamp>);
                    Ok(at.and_then(Result::ok) == Some(deadline))
                };
                world.until("the CR has its new deadline", has).await?;
                world.request_shutdown(id).await?;
            }
            Self::CrDeleted => {
                let uid = world.crs().get(id).await?.metadata.uid;
                world.delete(world.crs(), id).await?;
                let back = async || Ok(world.crs().get_opt(id).await?.is_some_and(|cr| cr.metadata.uid != uid));
                world.until("the CR is back", back).await?;
                world.request_shutdown(id).await?;
            }
        }
        let row = world.until_over(id).await?;
        ensure!(
            (row.status.as_str(), row.reason.as_deref()) == ("terminated", Some(self.reason())),
            "{self:?}: {row:?}"
        );
        Ok(())
    }
}

async fn by_hand(world: &World, name: &str) -> Result<()> {
    world.apply_cr(name, json!({ "timeoutMs": 3_600_000 })).await?;
    let phase = async |phase: &str| Ok(world.cr_status(name, "phase").await?.as_deref() == Some(phase));
    world.until("it runs", async || phase("Running").await).await?;
    world.apply_cr(name, json!({ "timeoutMs": 1_000 })).await?;
    world.until("its time is over", async || phase("Terminated").await).await?;
    ensure!(world.cr_status(name, "reason").await?.as_deref() == Some("timeout"));
    ensure!(world.vms().get_opt(&vm_name(name)).await?.is_none(), "nothing of it is left");
    world.delete(world.crs(), name).await
}

pub(super) fn is_about(call: &Call, name: &str) -> bool {
    [call.name.as_str(), &call.query].iter().any(|text| text.contains(name))
        || String::from_utf8_lossy(&call.body).contains(name)
}

/// What a call does to a desktop, by what tells it from the others in the desktop's life.
pub(super) fn of_call(call: &Call) -> String {
    let what = format!("{} {}", call.verb, call.resource);
    let body = call.json();
    let status =
        body.as_array().into_iter().flatten().find(|part| part["path"] == "/status").map(|part| &part["value"]);
    let words = match call.resource.as_str() {
        "cyberdesks/status" => status.map(|status| vec![&status["phase"], &status["reason"]]),
        _ => None,
    };
    let words = words.into_iter().flatten().filter_map(Value::as_str);
    std::iter::once(what.as_str()).chain(words).collect::<Vec<_>>().join(" ")
}

/// What a statement does, if it changes anything.
pub(super) fn of_statement(statement: &Statement) -> Option<String> {
    let (_, rest) = statement.text.split_once("cyberdesk.")?;
    let function = rest.split('(').next()?;
    if function == "report" {
        let text = |param: usize| statement.array(param).pop().flatten().and_then(|text| String::from_utf8(text).ok());
        let ended = statement.array(9).pop().flatten() == Some(vec![1]);
        let words = [text(5), ended.then(|| "ended".to_owned())];
        return Some(
            std::iter::once("report".to_owned()).chain(words.into_iter().flatten()).collect::<Vec<_>>().join(" "),
        );
    }
    Some(function.to_owned())
}
