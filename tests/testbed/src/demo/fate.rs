//! The six desktops: what each is called, how it is told to end, and what must become of it.

use std::time::Duration;

/// A desktop of the story, named after how it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Fate {
    /// Its owner asks for it in SQL.
    ShutDown,
    /// Its guest crashes.
    Crash,
    /// The app writes a terminal status.
    Update,
    /// Its user is deleted, and the row with them.
    UserGone,
    /// Applied with kubectl, without a row: it ends by its own timeout.
    ByHand,
    /// Its deadline comes.
    Deadline,
}

/// How a desktop must have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// The row says so.
    Row { status: &'static str, reason: &'static str },
    /// The row is gone; its tombstone says why.
    NoRow { reason: &'static str },
    /// There never was a row; the CR says so.
    Cr { phase: &'static str, reason: &'static str },
}

impl Fate {
    /// All of them, in the order in which they end.
    pub(crate) const ALL: [Self; 6] =
        [Self::ShutDown, Self::Crash, Self::Update, Self::UserGone, Self::ByHand, Self::Deadline];

    /// How long the desktop with the deadline may live.
    pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

    /// What it is called on the screen.
    pub(crate) fn nickname(self) -> &'static str {
        match self {
            Self::ShutDown => "shut-down",
            Self::Crash => "crash",
            Self::Update => "update",
            Self::UserGone => "user-gone",
            Self::ByHand => "by-hand",
            Self::Deadline => "deadline",
        }
    }

    /// How it is told to end.
    pub(crate) fn told(self) -> &'static str {
        match self {
            Self::ShutDown => "its owner calls request_shutdown()",
            Self::Crash => "its guest crashes",
            Self::Update => "the app sets status = 'terminated'",
            Self::UserGone => "its user is deleted",
            Self::ByHand => "the timeoutMs in its YAML is over",
            Self::Deadline => "its deadline of 10 s is over",
        }
    }

    /// What must become of it.
    pub(crate) fn expected(self) -> Expected {
        let row = |status, reason| Expected::Row { status, reason };
        match self {
            Self::ShutDown | Self::Update => row("terminated", "requested"),
            Self::Crash => row("error", "guest-crashed"),
            Self::Deadline => row("terminated", "timeout"),
            Self::UserGone => Expected::NoRow { reason: "row-deleted" },
            Self::ByHand => Expected::Cr { phase: "Terminated", reason: "timeout" },
        }
    }
}
