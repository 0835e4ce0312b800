//! The documents: their commands are run, their links lead somewhere.
//!
//! A block of `sh` is run as it stands, on the testbed's API server, with a daemon at work in `cyberdesk-system`. One that
//! needs more of a cluster than there is (pods that run, a registry) is marked `sh needs-cluster`; one that is for a
//! checkout of this repository, and run by `.ci/run` or by hand, `sh checkout`.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use cyberdesk_testbed::operator::NAMESPACE;
use tokio::process::Command;

use crate::tools::Tool;
use crate::world::World;
use crate::{Story, account, manifests, story};

/// The pages whose commands are run, in the order in which one would follow them.
const FOLLOWED: [&str; 4] = ["docs/getting-started.md", "README.md", "docs/templates.md", "docs/operator.md"];
/// Of a checkout, and not in `.ci/run`: what only measures, and itself.
const BY_HAND: [&str; 2] = ["cargo bench", ".ci/run"];

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("each command in the documents is run, or marked with what it needs", marked),
        story("the links in the documents lead somewhere", linked),
        story("each story that docs/failures.md names is told", proven),
        story("the commands in the documents do as they say", followed).needs(Tool::Kubectl),
    ]
}

/// A fenced block: the words after its fence, and its lines.
struct Block {
    info: String,
    text: String,
}

fn blocks(page: &str) -> Vec<Block> {
    let mut blocks = vec![];
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if let Some(info) = line.strip_prefix("```") {
            let text: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            blocks.push(Block { info: info.to_owned(), text: text.join("\n") });
        }
    }
    blocks
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Markdown files that are for readers of the repository.
fn pages() -> Result<Vec<PathBuf>> {
    let mut pages = vec![];
    for folder in ["", "docs", "sql"] {
        for entry in std::fs::read_dir(root().join(folder))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path);
            }
        }
    }
    ensure!(pages.len() > 8, "there are documents: {pages:?}");
    Ok(pages)
}

/// A line of a table is proven by what its last cell names: a story by its first words, or a test of Rust by its name.
async fn proven(_: &World) -> Result<()> {
    let mut sources = String::new();
    let mut folders = vec![root().join("tests"), root().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources += &std::fs::read_to_string(path)?;
            }
        }
    }
    let page = std::fs::read_to_string(root().join("docs/failures.md"))?;
    let mut named = 0;
    for line in page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("|-")) {
        let last = line.trim_end_matches('|').rsplit(" | ").next().unwrap_or_default();
        for name in
            last.split('`').skip(1).step_by(2).filter(|name| !name.starts_with("cargo ") && !name.contains("::"))
        {
            ensure!(sources.contains(&format!("\"{name}")), "docs/failures.md: there is no story that begins {name:?}");
            named += 1;
        }
    }
    ensure!(named > 30, "only {named} stories are named");
    Ok(())
}

async fn marked(_: &World) -> Result<()> {
    let checked = std::fs::read_to_string(root().join(".ci/run"))?;
    for path in pages()? {
        let name = path.strip_prefix(root())?.display().to_string();
        for Block { info, text } in blocks(&std::fs::read_to_string(&path)?) {
            let first = text.lines().next().unwrap_or_default();
            match info.as_str() {
                "sh" => ensure!(FOLLOWED.contains(&name.as_str()), "{name}: no story runs its blocks of sh: {first}"),
                "sh checkout" => {
                    for line in text.lines() {
                        let command: Vec<&str> = line.split_whitespace().take(2).collect();
                        let command = command.join(" ");
                        let known = checked.contains(&command) || BY_HAND.contains(&command.as_str());
                        ensure!(known, "{name}: .ci/run does not run {line}");
                    }
                }
                "sh needs-cluster" => (),
                // Shown and not run, or run by stories of their own.
                "" | "text" | "sql" | "ts" | "yaml" => (),
                other => bail!("{name}: a block of {other:?} is nothing that a story knows: {first}"),
            }
        }
    }
    Ok(())
}

async fn linked(_: &World) -> Result<()> {
    let mut broken = vec![];
    for path in pages()? {
        let page = std::fs::read_to_string(&path)?;
        for rest in page.split("](").skip(1) {
            let target = rest.split([')', '#']).next().unwrap_or_default();
            let elsewhere = target.is_empty() || target.contains("://") || target.contains(' ');
            let folder = path.parent().context("a page is in a folder")?;
            if !elsewhere && !folder.join(target).exists() {
                broken.push(format!("{}: {target}", path.display()));
            }
        }
    }
    ensure!(broken.is_empty(), "{}", broken.join("\n"));
    Ok(())
}

async fn followed(world: &World) -> Result<()> {
    manifests::apply_all(&world.parts.client, &manifests::objects("deploy/crd", NAMESPACE)?).await?;
    let control_plane = &world.parts.testbed.control_plane;
    let account = account::in_namespace(control_plane, NAMESPACE).await?.display().to_string();
    world.start_operator(&[("CYBERDESK_NAMESPACE", NAMESPACE), ("KUBECONFIG", &account)]).await?;
    let kubeconfig = control_plane.kubeconfig().display().to_string();

    let folder = workplace()?;
    let user = world.user().to_string();
    for page in FOLLOWED {
        for Block { info, text } in blocks(&std::fs::read_to_string(root().join(page))?) {
            // Those of the README are shown to apps, and have parameters.
            let is_sql = info == "sql" && page != "README.md";
            if info != "sh" && !is_sql {
                continue;
            }
            let id = match has_word(&text, "ID") {
                true => world.running_desktop("1 hour").await?,
                false => String::new(),
            };
            let text = replace_word(&replace_word(&text, "ID", &id), "USER", &user);
            let done = if is_sql { world.sql(&text).await } else { run(&text, folder.path(), &kubeconfig).await };
            done.with_context(|| format!("{page}:\n{text}"))?;
        }
    }
    // The last of them removes what is ours from the database. The app's table is the app's again, and may be taken over.
    let id = world.insert("1 hour").await?;
    let changed = "update cyberdesk_instances set status = 'running' where id = $1";
    ensure!(
        world.app(changed, &id).await? == 1
            && world.app("delete from cyberdesk_instances where id = $1", &id).await? == 1
    );
    let migrate = format!("DATABASE_URL='{}' cyberdesk-operator migrate", world.database.url("postgres"));
    run(&migrate, folder.path(), &kubeconfig).await.context("migrate once more")?;
    Ok(())
}

/// A folder in which the commands find what they name, and may leave what they make.
fn workplace() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    std::os::unix::fs::symlink(root().join("deploy"), folder.path().join("deploy"))?;
    std::os::unix::fs::symlink(root().join("templates"), folder.path().join("my-templates"))?;
    std::fs::write(folder.path().join("prod-ca-2021.crt"), "the authority")?;
    std::fs::create_dir(folder.path().join("bin"))?;
    let program = folder.path().join("bin/cyberdesk-operator");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_cyberdesk-operator"), program)?;
    Ok(folder)
}

/// Runs commands as a document has them, with kubectl and the operator at hand.
pub(crate) async fn run(script: &str, folder: &Path, kubeconfig: &str) -> Result<()> {
    let kubectl = Tool::Kubectl.find().context(Tool::Kubectl.remedy())?;
    #[expect(clippy::disallowed_methods, reason = "where programs are is no setting of the operator")]
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = [folder.join("bin"), kubectl.parent().context("kubectl is in a folder")?.to_owned()];
    let path = std::env::join_paths(places.into_iter().chain(std::env::split_paths(&path)))?;
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", script])
        .current_dir(folder)
        .envs([("KUBECONFIG", kubeconfig), ("EDITOR", "true")])
        .env("PATH", path)
        .env_remove("DATABASE_URL")
        .stdin(Stdio::null())
        .output()
        .await?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{said}");
    Ok(())
}

fn has_word(text: &str, word: &str) -> bool {
    replace_word(text, word, "") != text
}

/// Puts a value where a word stands alone.
fn replace_word(text: &str, word: &str, value: &str) -> String {
    let mut replaced = String::new();
    let mut rest = text;
    let is_part = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    while let Some((before, after)) = rest.split_once(word) {
        replaced.push_str(before);
        let alone = !is_part(replaced.chars().next_back()) && !is_part(after.chars().next());
        replaced.push_str(if alone { value } else { word });
        rest = after;
    }
    replaced + rest
}
