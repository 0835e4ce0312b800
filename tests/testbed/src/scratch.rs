//! Where data lives while a testbed runs, and the ports it listens on.
//!
//! A directory of its own per testbed, with a short path whatever the checkout's, so that two runs at once do not
//! collide. The supervisors remove it; `CYBERDESK_TESTBED_KEEP=1` leaves it for a look at logs and data.

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::account::{Account, reachable_by_all};
use crate::running::NOTE;
use crate::supervise::Spec;

/// How the names of testbeds' directories begin.
pub(crate) const PREFIX: &str = "cyberdesk-testbed-";

/// A testbed's directory.
#[derive(Clone, Debug)]
pub struct Scratch {
    root: PathBuf,
    keep: bool,
}

impl Scratch {
    /// Makes a fresh directory that every account can walk through.
    pub fn new() -> Result<Self> {
        let preferred = std::env::temp_dir();
        let candidates = [preferred.as_path(), Path::new("/tmp"), Path::new("/var/tmp")];
        let parent = match Account::to_drop_to()? {
            None => preferred.as_path(),
            Some(_) => candidates.into_iter().find(|path| reachable_by_all(path)).with_context(|| {
                format!("find a directory for data that an unprivileged user can reach: {candidates:?}")
            })?,
        };
        let root = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(parent)
            .with_context(|| format!("make a directory for data in {}", parent.display()))?
            .keep();
        std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o711))?;
        let keep = std::env::var_os("CYBERDESK_TESTBED_KEEP").is_some_and(|value| !value.is_empty());
        Ok(Self { root, keep })
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// A directory for one server, owned by whom it runs as and closed to others.
    pub fn directory(&self, name: &str, account: Option<Account>) -> Result<PathBuf> {
        let path = self.root.join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))?;
        if let Some(account) = account {
            std::os::unix::fs::chown(&path, Some(account.uid), Some(account.gid))
                .with_context(|| format!("give {} to the user that the server runs as", path.display()))?;
        }
        Ok(path)
    }

    /// Makes this server's supervisor the one that removes its directory.
    pub fn removed_with(&self, spec: &mut Spec) {
        if !self.keep {
            spec.remove.push(spec.directory.clone());
            spec.remove.push(self.root.join(NOTE));
            spec.remove_if_empty.push(self.root.clone());
        }
    }
}

impl Drop for Scratch {
    /// For a start that failed before any server took the directory over.
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir(&self.root);
        }
    }
}

/// A TCP port on 127.0.0.1 that nobody listens on.
///
/// Taken below the range that systems hand out for outgoing connections, so that nothing grabs it while a server
/// that a test has killed is down. Another process may still be quicker: who starts a server tries again.
pub fn free_port() -> Result<u16> {
    const FIRST: u32 = 12_000;
    const COUNT: u32 = 18_000;
    let start = uuid::Uuid::new_v4().as_fields().0;
    (0..COUNT)
        .map(|step| (FIRST + start.wrapping_add(step) % COUNT) as u16)
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .context("find a free port on 127.0.0.1")
}
