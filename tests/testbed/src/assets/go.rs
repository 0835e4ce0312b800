//! Binaries built from Go modules.
//!
//! A module that names what is built, and in which versions, is part of this program, so that a build needs no
//! checkout: it is written down where nobody sees it, built and removed.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::cache;
use crate::progress::Part;
use crate::supervise::{Program, Spec, Supervised};

/// A module's files, by their paths in it.
pub(super) struct Module<'a>(pub(super) &'a [(&'a str, &'a str)]);

/// One binary of a module.
pub(super) struct Target {
    /// The binary's name.
    pub(super) name: &'static str,
    /// Its package.
    pub(super) package: String,
    /// What is linked in besides, `-X ...`.
    pub(super) link: String,
    /// How long it takes, in words for who waits.
    pub(super) takes: &'static str,
}

/// Builds these into `into`, one after the other: each uses both processors and more.
pub(super) async fn build(module: &Module<'_>, targets: &[&Target], into: &Path, part: &Part) -> Result<()> {
    let go = which("go").context("there is no go on the PATH")?;
    let cache = cache::directory()?;
    for target in targets {
        let name = target.name;
        let workshop = cache::workshop(&cache)?;
        let directory = workshop.path();
        for (path, text) in module.0 {
            let path = directory.join(path);
            path.parent().map(std::fs::create_dir_all).transpose()?;
            std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        part.slow(format!("building {name} from Go modules, once: {}", target.takes));
        let server = command(&go, target, into)?;
        let mut spec = Spec::new("go build", server, directory, directory.join(format!("{name}.log")));
        spec.env.insert("CGO_ENABLED".to_owned(), "0".to_owned());
        spec.remove.push(directory.to_owned());
        spec.grace = Duration::from_secs(1);
        let build = Supervised::spawn(&spec)?;
        tokio::select! {
            ended = build.ended() => ended.with_context(|| format!("build {name}"))?,
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

fn command(go: &Path, target: &Target, into: &Path) -> Result<Program> {
    let output = into.join(target.name).into_os_string().into_string();
    let Ok(output) = output else { bail!("the cache directory's name is not valid UTF-8") };
    let flags = format!("-s -w {}", target.link);
    let args = ["build", "-v", "-buildvcs=false", "-trimpath", "-ldflags", &flags, "-o", &output, &target.package];
    Ok(Program::new(go, args))
}

fn which(name: &str) -> Option<std::path::PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|place| place.join(name)).find(|path| path.is_file())
}
