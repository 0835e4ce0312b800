//! How another terminal finds a running testbed: a note in its directory, which goes when that goes.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// The note's name in a testbed's directory.
pub(crate) const NOTE: &str = "running.json";

/// What one must know to look around in a running testbed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The database, as its administrator.
    pub database_url: String,
    /// The administrator's kubeconfig file.
    pub kubeconfig: PathBuf,
}

impl Running {
    /// Leaves the note in a testbed's directory.
    pub fn announce(&self, directory: &Path) -> Result<()> {
        let path = directory.join(NOTE);
        std::fs::write(&path, serde_json::to_vec(self)?).with_context(|| format!("write {}", path.display()))?;
        Ok(std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?)
    }

    /// The testbed of ours that was announced last.
    pub fn find() -> Result<Self> {
        let us = rustix::process::geteuid().as_raw();
        let mut notes: Vec<(SystemTime, PathBuf)> = [std::env::temp_dir(), "/tmp".into(), "/var/tmp".into()]
            .iter()
            .filter_map(|place| std::fs::read_dir(place).ok())
            .flatten()
            .filter_map(|entry| {
                let entry = entry.ok()?;
                entry.file_name().to_str()?.starts_with(crate::scratch::PREFIX).then_some(())?;
                let note = entry.path().join(NOTE);
                let found = note.symlink_metadata().ok()?;
                // Anyone can write to these places; only our own word counts.
                (found.is_file() && found.uid() == us).then_some((found.modified().ok()?, note))
            })
            .collect();
        notes.sort();
        if notes.len() > 1 {
            eprintln!(
                "{} testbeds are running; this goes to the newest. DATABASE_URL and KUBECONFIG name another.",
                notes.len()
            );
        }
        let (_, newest) = notes.pop().context("no testbed is running; start one with `cargo testbed`")?;
        Ok(serde_json::from_slice(&std::fs::read(newest)?)?)
    }
}
