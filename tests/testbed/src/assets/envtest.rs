//! The release archive that envtest users know: etcd, kube-apiserver and kubectl for one platform.
//!
//! Its index, published in the controller-tools repository, gives address and SHA-512 of each archive. Nothing is
//! unpacked before its hash is right.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures::StreamExt as _;
use serde::Deserialize;
use sha2::{Digest as _, Sha512};

use crate::progress::Part;

const INDEX: &str = "https://raw.githubusercontent.com/kubernetes-sigs/controller-tools/HEAD/envtest-releases.yaml";

/// The binaries that an archive holds.
const BINARIES: [&str; 3] = ["etcd", "kube-apiserver", "kubectl"];

/// Versions, and their archives by file name.
#[derive(Debug, Deserialize)]
struct Index {
    releases: BTreeMap<String, BTreeMap<String, Archive>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Archive {
    /// SHA-512 in hexadecimal digits.
    hash: String,
    #[serde(rename = "selfLink")]
    url: String,
}

/// The index's address; `CYBERDESK_TESTBED_ENVTEST_INDEX` names another.
pub fn index_url() -> String {
    let set = std::env::var("CYBERDESK_TESTBED_ENVTEST_INDEX").ok().filter(|url| !url.is_empty());
    set.unwrap_or_else(|| INDEX.to_owned())
}

/// Fetches the archive for this platform, of `version` or else of the newest patch of the same minor version, and
/// unpacks its binaries into `into`.
pub async fn fetch(index_url: &str, version: &str, into: &Path, part: &Part) -> Result<()> {
    let client = super::http_client()?;
    let index = client.get(index_url).timeout(Duration::from_secs(20)).send().await.and_then(|a| a.error_for_status());
    let index = index.with_context(|| format!("fetch the index {index_url}"))?.text().await?;
    let index: Index = serde_saphyr::from_str(&index).context("read the index")?;
    let (version, archive) = choose(&index, version, platform())
        .with_context(|| format!("the index lists no archive of {version} for {}", platform()))?;

    part.slow(format!("fetching etcd and kube-apiserver {version}, once"));
    let response = client.get(&archive.url).send().await.and_then(|answer| answer.error_for_status());
    let response = response.with_context(|| format!("fetch {}", archive.url))?;
    let size = response.content_length();
    let mut body = response.bytes_stream();
    let mut bytes = Vec::new();
    let mut hash = Sha512::new();
    while let Some(chunk) = body.next().await {
        let chunk = chunk.with_context(|| format!("fetch {}", archive.url))?;
        hash.update(&chunk);
        bytes.extend_from_slice(&chunk);
        let of = size.map_or_else(String::new, |size| format!(" of {}", size / 1_000_000));
        part.detail(&format!("{}{of} MB", bytes.len() / 1_000_000));
    }
    let hash: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if !hash.eq_ignore_ascii_case(&archive.hash) {
        bail!("the archive {} does not have the hash that the index gives; it is not used", archive.url);
    }
    part.step("unpacking etcd and kube-apiserver");
    unpack(&bytes, into).with_context(|| format!("unpack {}", archive.url))
}

/// Go's names for this machine, as in the archives' names.
fn platform() -> &'static str {
    match (std::env::consts::OS, std::env::consts::ARCH) {
        ("linux", "x86_64") => "linux-amd64",
        ("linux", "aarch64") => "linux-arm64",
        ("macos", "x86_64") => "darwin-amd64",
        ("macos", "aarch64") => "darwin-arm64",
        _ => "an unknown platform",
    }
}

fn choose<'a>(index: &'a Index, version: &str, platform: &str) -> Option<(&'a str, &'a Archive)> {
    let (wanted_minor, _) = split(version)?;
    let of = |release: &str, archives: &'a BTreeMap<String, Archive>| {
        archives.get(&format!("envtest-{release}-{platform}.tar.gz"))
    };
    let candidates = index.releases.iter().filter_map(|(release, archives)| {
        let (minor, patch) = split(release)?;
        (minor == wanted_minor).then_some(((release == version, patch), release.as_str(), of(release, archives)?))
    });
    candidates.max_by_key(|(rank, ..)| *rank).map(|(_, release, archive)| (release, archive))
}

/// `v1.36.3` as `v1.36` and 3. Candidates of a release are no releases.
fn split(version: &str) -> Option<(&str, u32)> {
    let (minor, patch) = version.rsplit_once('.')?;
    Some((minor, patch.parse().ok()?))
}

fn unpack(bytes: &[u8], into: &Path) -> Result<()> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(bytes));
    let mut found = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        // Only files that we know, under their last name: no path of the archive's choosing is written to.
        let name = BINARIES.into_iter().find(|name| path.file_name().is_some_and(|last| last == *name));
        if let Some(name) = name.filter(|_| entry.header().entry_type().is_file()) {
            let mut binary = Vec::new();
            entry.read_to_end(&mut binary)?;
            let target = into.join(name);
            std::fs::write(&target, binary)?;
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o755))?;
            found.push(name);
        }
    }
    match BINARIES[..2].iter().find(|name| !found.contains(name)) {
        None => Ok(()),
        Some(missing) => bail!("it holds no {missing}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exact_version_is_preferred_then_the_newest_patch() {
        let index: Index = serde_saphyr::from_str(
            "releases:\n\
             \x20 v1.36.0:\n    envtest-v1.36.0-linux-amd64.tar.gz: {hash: a, selfLink: 'https://example.com/0'}\n\
             \x20 v1.36.10:\n    envtest-v1.36.10-linux-amd64.tar.gz: {hash: b, selfLink: 'https://example.com/10'}\n\
             \x20 v1.36.2:\n    envtest-v1.36.2-linux-amd64.tar.gz: {hash: c, selfLink: 'https://example.com/2'}\n\
             \x20 v1.36.11-rc.1:\n    envtest-v1.36.11-rc.1-linux-amd64.tar.gz: {hash: d, selfLink: 'https://example.com/rc'}\n\
             \x20 v1.37.0:\n    envtest-v1.37.0-linux-amd64.tar.gz: {hash: e, selfLink: 'https://example.com/37'}\n",
        )
        .expect("it is an index");
        let chosen = |version, platform| choose(&index, version, platform).map(|(version, _)| version);
        assert_eq!(chosen("v1.36.2", "linux-amd64"), Some("v1.36.2"));
        assert_eq!(chosen("v1.36.3", "linux-amd64"), Some("v1.36.10"));
        assert_eq!(chosen("v1.36.3", "linux-s390x"), None);
        assert_eq!(chosen("v1.35.0", "linux-amd64"), None);
    }
}
