//! Binaries of the control plane, built from Go modules.
//!
//! The module that names them is `tests/testbed/control-plane`; its two files are part of this program, so that a
//! build needs no checkout. The versions are those of its `go.mod`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::VERSION;
use crate::cache;
use crate::progress::Part;
use crate::supervise::{Program, Spec, Supervised};

const GO_MOD: &str = include_str!("../../control-plane/go.mod");
const GO_SUM: &str = include_str!("../../control-plane/go.sum");

/// Builds some of `etcd`, `kube-apiserver` and `kubectl` into `into`.
pub(super) async fn build(binaries: &[&str], into: &Path, part: &Part) -> Result<()> {
    let cache = cache::directory()?;
    for binary in binaries {
        let workshop = cache::workshop(&cache)?;
        let module = workshop.path();
        std::fs::write(module.join("go.mod"), GO_MOD)?;
        std::fs::write(module.join("go.sum"), GO_SUM)?;
        part.slow(match *binary {
            "etcd" => "building etcd from Go modules, once: some 15 s after the download of 0.8 GB".to_owned(),
            name => format!("building {name} from Go modules, once: some minutes"),
        });
        let mut spec = Spec::new("go build", command(binary, into)?, module, module.join(format!("{binary}.log")));
        spec.env.insert("CGO_ENABLED".to_owned(), "0".to_owned());
        spec.remove.push(module.to_owned());
        spec.grace = Duration::from_secs(1);
        let build = Supervised::spawn(&spec)?;
        tokio::select! {
            ended = build.ended() => ended.with_context(|| format!("build {binary}"))?,
            never = report(&build, part) => match never {},
        }
    }
    Ok(())
}

/// Says how far the build is: Go names what it downloads and compiles, one a line.
async fn report(build: &Supervised, part: &Part) -> std::convert::Infallible {
    let began = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let log = std::fs::read_to_string(build.log()).unwrap_or_default();
        let downloads = log.lines().filter(|line| line.starts_with("go: downloading ")).count();
        let compiled = log.lines().filter(|line| !line.starts_with("go: ")).count();
        let seconds = began.elapsed().as_secs();
        let fetched = if downloads == 0 { String::new() } else { format!("{downloads} modules fetched, ") };
        part.detail(&format!("{fetched}{compiled} packages compiled, {seconds} s"));
    }
}

fn command(binary: &str, into: &Path) -> Result<Program> {
    let package = match binary {
        "etcd" => "go.etcd.io/etcd/server/v3".to_owned(),
        name => format!("k8s.io/kubernetes/cmd/{name}"),
    };
    let output = into.join(binary).into_os_string().into_string();
    let Ok(output) = output else { bail!("the cache directory's name is not valid UTF-8") };
    // Without its version an API server calls itself v0.0.0, and its compatibility rules go wrong.
    let version = VERSION.trim_start_matches('v');
    let mut numbers = version.split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let base = "k8s.io/component-base/version";
    let flags = format!("-s -w -X {base}.gitVersion={VERSION} -X {base}.gitMajor={major} -X {base}.gitMinor={minor}");
    let go = which("go").context("there is no go on the PATH")?;
    Ok(Program::new(go, ["build", "-v", "-buildvcs=false", "-trimpath", "-ldflags", &flags, "-o", &output, &package]))
}

fn which(name: &str) -> Option<std::path::PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|place| place.join(name)).find(|path| path.is_file())
}
