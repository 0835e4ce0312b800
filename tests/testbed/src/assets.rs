//! etcd and kube-apiserver, from wherever this machine can have them.
//!
//! The order is the one that users of envtest know:
//! 1. `KUBEBUILDER_ASSETS` names a directory;
//! 2. our cache, by version;
//! 3. the envtest release archive, after its hash is checked ([`envtest`]);
//! 4. a build from Go modules, which needs a Go toolchain, a module proxy and minutes.
//!
//! A rung that cannot be had costs no wait: a name that does not resolve fails at once, and the next rung follows.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::cache;
use crate::progress::Part;

pub mod envtest;
mod go;
pub mod kubevirt;

/// What is built, and what is preferred of the archives.
pub const VERSION: &str = "v1.36.3";

/// Names etcd, kube-apiserver and kubectl, and their versions.
const MODULE: go::Module<'_> = go::Module(&[
    ("go.mod", include_str!("../control-plane/go.mod")),
    ("go.sum", include_str!("../control-plane/go.sum")),
]);

/// The two servers' binaries.
#[derive(Clone, Debug)]
pub struct Assets {
    /// The API server's store.
    pub etcd: PathBuf,
    /// The API server.
    pub kube_apiserver: PathBuf,
}

impl Assets {
    /// Walks down the ladder.
    pub async fn find(part: &Part) -> Result<Self> {
        if let Some(directory) = std::env::var_os("KUBEBUILDER_ASSETS").filter(|value| !value.is_empty()) {
            return Self::of(Path::new(&directory))
                .with_context(|| format!("use KUBEBUILDER_ASSETS={}", directory.display()));
        }
        let cache = cache::directory()?;
        let target = cache.join(entry());
        if let Ok(found) = Self::of(&target) {
            return Ok(found);
        }
        let _lock = cache::lock(&cache, &entry(), part).await?;
        if let Ok(found) = Self::of(&target) {
            return Ok(found);
        }
        let workshop = cache::workshop(&cache)?;
        let made = workshop.path().join("made");
        std::fs::create_dir(&made)?;
        let index = envtest::index_url();
        part.step("looking for the release archive of etcd and kube-apiserver");
        if let Err(no_archive) = envtest::fetch(&index, VERSION, &made, part).await {
            part.step(format!("no archive ({}); building instead", no_archive.root_cause()));
            if let Err(no_build) = go::build(&MODULE, &[&etcd(), &kubernetes("kube-apiserver")], &made, part).await {
                bail!(
                    "etcd and kube-apiserver {VERSION} are needed, and every way to them failed:\n\
                     - KUBEBUILDER_ASSETS, a directory that holds both, is not set;\n\
                     - {} does not hold them;\n\
                     - the release archive of its index: {no_archive}: {};\n\
                     - a build from Go modules: {no_build:#}\n\
                     Any one is enough.",
                    target.display(),
                    no_archive.root_cause(),
                );
            }
        }
        // What a broken earlier run left there is of no use.
        let _ = std::fs::remove_dir_all(&target);
        std::fs::rename(&made, &target)
            .with_context(|| format!("move etcd and kube-apiserver to {}", target.display()))?;
        Self::of(&target)
    }

    fn of(directory: &Path) -> Result<Self> {
        let file = |name: &str| {
            let path = directory.join(name);
            path.is_file().then_some(path).with_context(|| format!("{} has no {name}", directory.display()))
        };
        Ok(Self { etcd: file("etcd")?, kube_apiserver: file("kube-apiserver")? })
    }
}

/// A kubectl: of the PATH, of `KUBEBUILDER_ASSETS`, or of the cache.
pub fn find_kubectl() -> Option<PathBuf> {
    let mut places: Vec<PathBuf> = std::env::var_os("PATH").iter().flat_map(std::env::split_paths).collect();
    places.extend(std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from));
    places.extend(cache::directory().ok().map(|cache| cache.join(entry())));
    places.iter().map(|place| place.join("kubectl")).find(|path| path.is_file())
}

/// The same, or one that is built now.
pub async fn kubectl(part: &Part) -> Result<PathBuf> {
    if let Some(found) = find_kubectl() {
        return Ok(found);
    }
    let cache = cache::directory()?;
    let target = cache.join(entry());
    let kubectl = target.join("kubectl");
    let _lock = cache::lock(&cache, &entry(), part).await?;
    if !kubectl.is_file() {
        let workshop = cache::workshop(&cache)?;
        go::build(&MODULE, &[&kubernetes("kubectl")], workshop.path(), part).await?;
        std::fs::create_dir_all(&target)?;
        std::fs::rename(workshop.path().join("kubectl"), &kubectl)?;
    }
    Ok(kubectl)
}

fn etcd() -> go::Target {
    let takes = "some 15 s after the download of 0.8 GB";
    go::Target { name: "etcd", package: "go.etcd.io/etcd/server/v3".to_owned(), link: String::new(), takes }
}

fn kubernetes(name: &'static str) -> go::Target {
    // Without its version an API server calls itself v0.0.0, and its compatibility rules go wrong.
    let mut numbers = VERSION.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let base = "k8s.io/component-base/version";
    let link = format!("-X {base}.gitVersion={VERSION} -X {base}.gitMajor={major} -X {base}.gitMinor={minor}");
    go::Target { name, package: format!("k8s.io/kubernetes/cmd/{name}"), link, takes: "some minutes" }
}

fn entry() -> String {
    format!("control-plane-{VERSION}")
}

/// A client that gives up on what does not answer.
pub(crate) fn http_client() -> Result<reqwest::Client> {
    // The first to install a provider wins; any is good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .connect_timeout(Duration::from_secs(5))
        .read_timeout(Duration::from_secs(30))
        .user_agent("cyberdesk-testbed");
    client.build().context("make an HTTP client")
}
