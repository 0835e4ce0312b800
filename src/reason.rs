//! Why a desktop ends: one table of stable words, the same in rows, CRs, logs and docs.

use std::fmt;

use jiff::Timestamp;

use crate::crd::{End, Phase};

/// Why a desktop ends, or could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Somebody asked for it: in SQL, or by writing a terminal status.
    Requested,
    /// Its deadline came.
    Timeout,
    /// Nobody used it for as long as its idle timeout.
    Idle,
    /// Its row was deleted, by itself or with its user.
    RowDeleted,
    /// Its guest powered off.
    GuestShutdown,
    /// Its guest crashed, or never came up.
    GuestCrashed,
    /// Somebody deleted its VM.
    VmDeleted,
    /// A VM that is not ours has its name.
    NameTaken,
    /// The template cannot be rendered.
    BadTemplate,
    /// The desktop's params are not what the template offers.
    BadParams,
    /// The spec of a CR applied by hand cannot be read.
    BadSpec,
    /// The API server refused the VM.
    Refused,
}

impl Reason {
    /// All of them, for tables and tests.
    pub const ALL: [Self; 12] = [
        Self::Requested,
        Self::Timeout,
        Self::Idle,
        Self::RowDeleted,
        Self::GuestShutdown,
        Self::GuestCrashed,
        Self::VmDeleted,
        Self::NameTaken,
        Self::BadTemplate,
        Self::BadParams,
        Self::BadSpec,
        Self::Refused,
    ];

    /// The stable word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Timeout => "timeout",
            Self::Idle => "idle",
            Self::RowDeleted => "row-deleted",
            Self::GuestShutdown => "guest-shutdown",
            Self::GuestCrashed => "guest-crashed",
            Self::VmDeleted => "vm-deleted",
            Self::NameTaken => "name-taken",
            Self::BadTemplate => "bad-template",
            Self::BadParams => "bad-params",
            Self::BadSpec => "bad-spec",
            Self::Refused => "refused",
        }
    }

    /// Reads the stable word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == word)
    }

    /// The phase that a desktop ends in for this reason.
    pub fn phase(self) -> Phase {
        match self {
            Self::Requested | Self::Timeout | Self::Idle | Self::RowDeleted | Self::GuestShutdown | Self::VmDeleted => {
                Phase::Terminated
            }
            Self::GuestCrashed
            | Self::NameTaken
            | Self::BadTemplate
            | Self::BadParams
            | Self::BadSpec
            | Self::Refused => Phase::Error,
        }
    }

    /// What to tell people when nobody had better words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Requested => "shutdown was requested",
            Self::Timeout => "the deadline of the desktop came",
            Self::Idle => "nobody used the desktop for as long as its idle timeout",
            Self::RowDeleted => "the row of the desktop was deleted",
            Self::GuestShutdown => "the guest powered off",
            Self::GuestCrashed => "the guest crashed or did not come up",
            Self::VmDeleted => "somebody deleted the VirtualMachine",
            Self::NameTaken => "a VirtualMachine that is not of this desktop has its name",
            Self::BadTemplate => "the VM template cannot be rendered",
            Self::BadParams => "the params are not what the VM template takes",
            Self::BadSpec => "the spec cannot be read",
            Self::Refused => "the API server refused the VirtualMachine",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An end for this reason, decided at this instant.
pub fn end(reason: Reason, message: Option<String>, at: Timestamp) -> End {
    let message = message.unwrap_or_else(|| reason.words().to_owned());
    End { phase: reason.phase(), reason: reason.as_str().to_owned(), message: Some(cut(message)), at }
}

/// Longest message that is passed on, in characters. An API server's refusal echoes what it was given, and
/// a condition that is too long is refused itself.
const LONGEST_MESSAGE: usize = 2000;

/// A message of a length that everyone takes.
pub fn cut(message: String) -> String {
    match message.char_indices().nth(LONGEST_MESSAGE) {
        Some((end, _)) => format!("{}…", &message[..end]),
        None => message,
    }
}
