//! One watch event, reduced to what the traces record.

use cyberdesk_testbed::kubevirt::{FOREGROUND_FINALIZER, VM_CONTROLLER_FINALIZER, phase};
use kube::api::{DynamicObject, WatchEvent};
use serde_json::Value;
use std::fmt;

/// Which object the event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Vm,
    Vmi,
}

/// A condition: what it is, and `T` or `F(reason)`.
pub(crate) type Condition = (String, String);

/// An event as a line of `recorded.txt` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) kind: Kind,
    /// `+`, `~` or `-`.
    pub(crate) sign: char,
    pub(crate) deleting: bool,
    pub(crate) finalizers: Vec<String>,
    /// printableStatus or phase; empty if there is none.
    pub(crate) state: String,
    /// `created`, `ready`, `rs=...`, `asked=...`, `failures=...`, in this order.
    pub(crate) marks: Vec<String>,
    pub(crate) conditions: Vec<Condition>,
}

impl Event {
    /// Reduces a real event; bookmarks and errors are none.
    pub(crate) fn of(kind: Kind, event: &WatchEvent<DynamicObject>) -> Option<Self> {
        let (sign, object) = match event {
            WatchEvent::Added(object) => ('+', object),
            WatchEvent::Modified(object) => ('~', object),
            WatchEvent::Deleted(object) => ('-', object),
            WatchEvent::Bookmark(_) | WatchEvent::Error(_) => return None,
        };
        let status = &object.data["status"];
        let mut marks = Vec::new();
        if kind == Kind::Vm {
            marks.extend(["created", "ready"].into_iter().filter(|flag| status[flag] == true).map(str::to_owned));
            let requests = status["stateChangeRequests"].as_array();
            let asked: Vec<&str> = requests.into_iter().flatten().filter_map(|it| it["action"].as_str()).collect();
            let failures = status["startFailure"]["consecutiveFailCount"].as_u64();
            marks.extend(status["runStrategy"].as_str().map(|strategy| format!("rs={strategy}")));
            marks.extend((!asked.is_empty()).then(|| format!("asked={}", asked.join(","))));
            marks.extend(failures.map(|count| format!("failures={count}")));
        }
        let state = match kind {
            Kind::Vm => status["printableStatus"].as_str().unwrap_or_default(),
            Kind::Vmi => phase(object),
        };
        let finalizers = object.metadata.finalizers.iter().flatten();
        let conditions = status["conditions"].as_array().into_iter().flatten();
        Some(Self {
            kind,
            sign,
            deleting: object.metadata.deletion_timestamp.is_some(),
            finalizers: finalizers.map(|finalizer| short(finalizer)).collect(),
            state: state.to_owned(),
            marks,
            conditions: conditions.map(condition).collect(),
        })
    }

    pub(crate) fn condition(&self, kind: &str) -> Option<&str> {
        self.conditions.iter().find(|(name, _)| name == kind).map(|(_, value)| value.as_str())
    }

    pub(crate) fn marked(&self, mark: &str) -> bool {
        self.marks.iter().any(|held| held == mark)
    }

    /// Whether this VMI has ended.
    pub(crate) fn is_final(&self) -> bool {
        self.kind == Kind::Vmi && ["Succeeded", "Failed"].contains(&self.state.as_str())
    }
}

fn short(finalizer: &str) -> String {
    match finalizer {
        VM_CONTROLLER_FINALIZER => "VMC",
        FOREGROUND_FINALIZER | "foregroundDeletion" => "FG",
        other => other,
    }
    .to_owned()
}

fn condition(condition: &Value) -> Condition {
    let text = |key: &str| condition[key].as_str().unwrap_or_default().to_owned();
    let value = if text("status") == "True" && text("type") == "Ready" {
        "T".to_owned()
    } else {
        format!("{}({})", &text("status")[..1], text("reason"))
    };
    (text("type"), value)
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:3} {}", if self.kind == Kind::Vm { "vm" } else { "vmi" }, self.sign)?;
        if self.deleting {
            write!(f, " deleting")?;
        }
        if !self.finalizers.is_empty() {
            write!(f, " {}", self.finalizers.join(","))?;
        }
        if !self.state.is_empty() {
            write!(f, " {}", self.state)?;
        }
        for mark in &self.marks {
            write!(f, " {mark}")?;
        }
        for (name, value) in &self.conditions {
            write!(f, " {name}={value}")?;
        }
        Ok(())
    }
}
