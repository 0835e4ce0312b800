//! What is fetched or built once and kept: binaries, by version.
//!
//! Filled under a lock (two test runs at once do the work once), beside the final place, and moved there when
//! complete: what is in the cache is whole.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::progress::Part;

/// `$XDG_CACHE_HOME/cyberdesk-testbed`, else `~/.cache/cyberdesk-testbed`.
pub fn directory() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    let path = base.context("find a cache directory: set HOME or XDG_CACHE_HOME")?.join("cyberdesk-testbed");
    std::fs::create_dir_all(&path).with_context(|| format!("make the cache directory {}", path.display()))?;
    Ok(path)
}

/// Takes the lock `NAME.lock` in `directory`; it is held until the file is dropped, or the process ends.
pub async fn lock(directory: &Path, name: &str, part: &Part) -> Result<File> {
    let path = directory.join(format!("{name}.lock"));
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    if file.try_lock().is_ok() {
        return Ok(file);
    }
    part.slow(format!("waits for another run that is filling the cache with {name}"));
    tokio::task::spawn_blocking(move || file.lock().map(|()| file))
        .await?
        .with_context(|| format!("lock {}", path.display()))
}

/// A directory beside the cache's entries, removed when dropped, for what is not complete yet.
pub fn workshop(directory: &Path) -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("unfinished-")
        .tempdir_in(directory)
        .with_context(|| format!("make a directory in {}", directory.display()))
}
