//! The versions of PostgreSQL that the stories of the database are told on, all within one run.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use cyberdesk_testbed::account::Account;
use cyberdesk_testbed::postgres::{Binaries, Options};
use cyberdesk_testbed::{Postgres, Progress, Testbed};
use tokio::sync::OnceCell;

/// The oldest that is supported, that of Supabase's new projects, and the newest.
pub(crate) const VERSIONS: [u32; 3] = [15, 17, 18];

/// A server for each version that can be had. The testbed's own serves its version; the others start when their
/// first story asks, side by side.
pub(crate) struct Servers(BTreeMap<u32, OnceCell<Postgres>>);

impl Servers {
    /// Finds or fetches the binaries of each version. In CI none may be missing.
    pub(crate) async fn find(testbed: &Testbed) -> Result<Self> {
        let own = testbed.postgres.major()?;
        let for_another = Account::to_drop_to()?.is_some();
        let mut servers = BTreeMap::new();
        for version in VERSIONS {
            let part = Progress::quiet().part(format!("postgres {version}"));
            if version == own || had(version, Binaries::find(Some(version), for_another, &part).await)? {
                servers.insert(version, OnceCell::new());
            }
        }
        Ok(Self(servers))
    }

    /// Whether this version can be had here.
    pub(crate) fn have(&self, version: u32) -> bool {
        self.0.contains_key(&version)
    }

    /// The server of this version, started if it is not yet.
    pub(crate) async fn of<'a>(&'a self, version: u32, testbed: &'a Testbed) -> Result<&'a Postgres> {
        if testbed.postgres.major()? == version {
            return Ok(&testbed.postgres);
        }
        let cell = self.0.get(&version).with_context(|| format!("PostgreSQL {version} cannot be had here"))?;
        cell.get_or_try_init(|| start(version, Options::default(), testbed)).await
    }
}

/// A further server, which ends with what is returned.
pub(crate) async fn start(version: u32, options: Options, testbed: &Testbed) -> Result<Postgres> {
    let part = Progress::quiet().part(format!("postgres {version}"));
    let options = Options { version: Some(version), ..options };
    let started = Postgres::start(&options, testbed.scratch(), &part).await;
    started.with_context(|| format!("start PostgreSQL {version}"))
}

#[expect(clippy::disallowed_methods, reason = "what CI must not skip is no setting of the operator")]
fn had(version: u32, found: Result<Binaries>) -> Result<bool> {
    let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    match found {
        Ok(_) => Ok(true),
        Err(error) if ci => Err(error.context(format!("PostgreSQL {version} must be tested in CI"))),
        Err(error) => {
            eprintln!("SKIPPED: the database's stories on PostgreSQL {version}, which cannot be had: {error:#}");
            Ok(false)
        }
    }
}
