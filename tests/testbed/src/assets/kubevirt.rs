//! The real virt-api and virt-controller, built from Go modules once per release and kept.
//!
//! KubeVirt publishes no archive of the two, only images; so a Go toolchain is the one way. Each release has a module
//! in `tests/testbed/kubevirt`, with a program of a few lines that prints what virt-operator would install: the CRDs,
//! webhooks and roles of exactly that release.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use kube::api::DynamicObject;

use super::go::{self, Module, Target};
use crate::cache;
use crate::progress::Part;

/// A release of KubeVirt that can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// Its name, `v1.8.0`.
    pub version: &'static str,
    module: [&'static str; 2],
}

const MANIFESTS_GO: &str = include_str!("../../kubevirt/manifests.go");

/// Those that can be had, the newest first.
pub const RELEASES: [Release; 2] = [
    Release {
        version: "v1.8.0",
        module: [include_str!("../../kubevirt/v1.8.0/go.mod"), include_str!("../../kubevirt/v1.8.0/go.sum")],
    },
    Release {
        version: "v1.7.0",
        module: [include_str!("../../kubevirt/v1.7.0/go.mod"), include_str!("../../kubevirt/v1.7.0/go.sum")],
    },
];

impl Default for Release {
    fn default() -> Self {
        RELEASES[0]
    }
}

impl FromStr for Release {
    type Err = anyhow::Error;

    fn from_str(version: &str) -> Result<Self> {
        let Some(found) = RELEASES.into_iter().find(|release| release.version == version) else {
            bail!("there is no KubeVirt {version} here, only {}", RELEASES.map(|release| release.version).join(", "));
        };
        Ok(found)
    }
}

/// What is kept of a release.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The admission webhooks and the subresource API.
    pub virt_api: PathBuf,
    /// The controllers.
    pub virt_controller: PathBuf,
    manifests: PathBuf,
}

impl Pair {
    /// Finds the release in the cache, or builds it.
    pub async fn find(release: Release, part: &Part) -> Result<Self> {
        let cache = cache::directory()?;
        let entry = format!("kubevirt-{}", release.version);
        let target = cache.join(&entry);
        if let Ok(found) = Self::of(&target) {
            return Ok(found);
        }
        let _lock = cache::lock(&cache, &entry, part).await?;
        if let Ok(found) = Self::of(&target) {
            return Ok(found);
        }
        let workshop = cache::workshop(&cache)?;
        let made = workshop.path().join("made");
        std::fs::create_dir(&made)?;
        make(release, &made, part).await.with_context(|| {
            format!("have the real KubeVirt {}, which is built with Go 1.24 or later", release.version)
        })?;
        // What a broken earlier run left there is of no use.
        let _ = std::fs::remove_dir_all(&target);
        std::fs::rename(&made, &target).with_context(|| format!("move KubeVirt to {}", target.display()))?;
        Self::of(&target)
    }

    /// What virt-operator would install of this release.
    pub fn manifests(&self) -> Result<Vec<DynamicObject>> {
        let text =
            std::fs::read_to_string(&self.manifests).with_context(|| format!("read {}", self.manifests.display()))?;
        text.lines().map(|line| serde_json::from_str(line).context("read one of KubeVirt's manifests")).collect()
    }

    fn of(directory: &Path) -> Result<Self> {
        let file = |name: &str| {
            let path = directory.join(name);
            path.is_file().then_some(path).with_context(|| format!("{} has no {name}", directory.display()))
        };
        let (virt_api, virt_controller) = (file(VIRT_API)?, file(VIRT_CONTROLLER)?);
        Ok(Self { virt_api, virt_controller, manifests: file(MANIFESTS)? })
    }
}

const VIRT_API: &str = "virt-api";
const VIRT_CONTROLLER: &str = "virt-controller";
const MANIFESTS: &str = "manifests.json";
const PRINTER: &str = "print-manifests";

async fn make(release: Release, into: &Path, part: &Part) -> Result<()> {
    let [go_mod, go_sum] = release.module;
    let files = [("go.mod", go_mod), ("go.sum", go_sum), ("manifests/main.go", MANIFESTS_GO)];
    let target = |name, package: &str, takes| Target { name, package: package.to_owned(), link: String::new(), takes };
    let targets = [
        target(VIRT_CONTROLLER, "kubevirt.io/kubevirt/cmd/virt-controller", "some minutes"),
        target(VIRT_API, "kubevirt.io/kubevirt/cmd/virt-api", "some 15 s"),
        target(PRINTER, "./manifests", "some 10 s"),
    ];
    go::build(&Module(&files), &targets.each_ref(), into, part).await?;
    let printer = into.join(PRINTER);
    let printed = tokio::process::Command::new(&printer).stderr(Stdio::null()).output().await?;
    ensure!(printed.status.success(), "its manifests cannot be printed: {}", printed.status);
    std::fs::write(into.join(MANIFESTS), printed.stdout)?;
    Ok(std::fs::remove_file(printer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_that_is_not_here_is_refused_with_those_that_are() {
        assert_eq!("v1.8.0".parse::<Release>().ok(), Some(Release::default()));
        let error = "v0.1.0".parse::<Release>().expect_err("no such release");
        assert_eq!(error.to_string(), "there is no KubeVirt v0.1.0 here, only v1.8.0, v1.7.0");
    }
}
