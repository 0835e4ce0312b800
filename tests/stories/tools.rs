//! Programs that some stories need and that not every machine has.

use std::path::PathBuf;

use cyberdesk_testbed::assets;
use cyberdesk_testbed::pgbouncer::PgBouncer;

/// A program that some stories run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    /// The connection pooler.
    PgBouncer,
    /// Node with npm, and what npm installs.
    Node,
    /// kubectl, which can be built, too.
    Kubectl,
}

impl Tool {
    /// Where it is, if it is here.
    pub(crate) fn find(self) -> Option<PathBuf> {
        match self {
            Self::PgBouncer => PgBouncer::find(),
            Self::Node => on_the_path("npm").and_then(|_| on_the_path("node")),
            Self::Kubectl => assets::find_kubectl(),
        }
    }

    /// How to get it, in words.
    pub(crate) fn remedy(self) -> &'static str {
        match self {
            Self::PgBouncer => "there is no pgbouncer here: apt-get install pgbouncer",
            Self::Node => "there is no Node with npm here: apt-get install nodejs npm",
            Self::Kubectl => "there is no kubectl here: `cargo testbed kubectl version --client` builds one, with Go",
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

fn on_the_path(program: &str) -> Option<PathBuf> {
    #[expect(clippy::disallowed_methods, reason = "where programs are is no setting of the operator")]
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file())
}
