//! Programs that some stories need and that not every machine has.

use std::path::PathBuf;

use cyberdesk_testbed::pgbouncer::PgBouncer;

/// A program that comes from a distribution's packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    /// The connection pooler.
    PgBouncer,
}

impl Tool {
    /// Where it is, if it is here.
    pub(crate) fn find(self) -> Option<PathBuf> {
        match self {
            Self::PgBouncer => PgBouncer::find(),
        }
    }

    /// How to get it, in words.
    pub(crate) fn remedy(self) -> &'static str {
        match self {
            Self::PgBouncer => "there is no pgbouncer here: apt-get install pgbouncer",
        }
    }

    /// Whether a story that needs it is left out, and says so. In CI none may be: it is told, and fails.
    #[expect(clippy::disallowed_methods, reason = "what CI must not skip is no setting of the operator")]
    pub(crate) fn is_missed(self, story: &str) -> bool {
        let missed = self.find().is_none() && !std::env::var("CI").is_ok_and(|ci| ci == "true");
        if missed {
            eprintln!("SKIPPED: {story}: {}", self.remedy());
        }
        missed
    }
}
