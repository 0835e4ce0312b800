//! The app developer's page: what it shows is taken from it and run.
//!
//! SQL is run as it stands. TypeScript is compiled against the packages' own types; what speaks to Postgres itself
//! (Drizzle, `drizzle-kit push`) runs too. supabase-js speaks to PostgREST, which no package brings: its calls are
//! held to the database by types that are made from the catalogue.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use cyberdesk_operator::doctor::{self, Verdict};
use cyberdesk_testbed::{Progress, cache};
use sha2::{Digest as _, Sha256};
use tokio::process::Command;

use crate::tools::Tool;
use crate::world::World;
use crate::{Story, story};

mod types;

const PAGE: &str = include_str!("../../docs/apps.md");
const TYPES: &str = include_str!("../../docs/database.types.ts");
const PACKAGES: &str = include_str!("apps/package.json");
const LOCK: &str = include_str!("apps/package-lock.json");

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("the page's SQL does what it says", sql),
        story("the page's types are those of the database", types_of_the_database),
        story("the page's TypeScript compiles, and its Drizzle code runs", typescript).needs(Tool::Node),
        story("drizzle-kit push with the page's schema changes nothing", drizzle_kit).needs(Tool::Node),
        story("what drizzle-kit push with the app's old schema takes away, doctor tells how to bring back", old_schema)
            .needs(Tool::Node),
    ]
}

/// Blocks of one language.
fn blocks(language: &str) -> impl Iterator<Item = &'static str> {
    let fence = format!("```{language}\n");
    PAGE.match_indices(&fence)
        .map(|(begins, found)| {
            let rest = &PAGE[begins + found.len()..];
            rest.split_once("\n```").map_or(rest, |(block, _)| block)
        })
        .collect::<Vec<_>>()
        .into_iter()
}

async fn sql(world: &World) -> Result<()> {
    let app = world.database.connect_as("postgres").await?;
    let desktop = world.insert("1 hour").await?;
    let user: String = app.query_one("select user_id::text from cyberdesk_instances", &[]).await?.get(0);
    let text = blocks("sql").collect::<Vec<_>>().join("\n");
    let text = text.replace(":'user'", &format!("'{user}'")).replace(":'desktop'", &format!("'{desktop}'"));
    let mut answers = vec![];
    for statement in
        text.split_inclusive(";\n").filter(|statement| statement.contains("cyberdesk") || statement.contains("desktop"))
    {
        let rows = app.query(statement, &[]).await.with_context(|| statement.to_owned())?;
        answers.push(rows.len());
    }
    // Ten statements speak of a desktop that is there; touched, extended and ended once each.
    ensure!(answers.len() == 11 && answers.iter().all(|rows| *rows > 0), "{answers:?}");
    Ok(())
}

async fn types_of_the_database(world: &World) -> Result<()> {
    let client = world.database.connect_as("postgres").await?;
    let made = types::generate(&client).await?;
    if made != TYPES {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("database.types.ts");
        std::fs::write(&file, &made)?;
        anyhow::bail!("docs/database.types.ts is not of this schema; it should be as in {}", file.display());
    }
    Ok(())
}

/// A folder with the page's files, and the packages that they import.
async fn workshop() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    std::os::unix::fs::symlink(packages().await?.join("node_modules"), folder.path().join("node_modules"))?;
    std::fs::write(folder.path().join("package.json"), PACKAGES)?;
    std::fs::write(folder.path().join("tsconfig.json"), include_str!("apps/tsconfig.json"))?;
    std::fs::write(folder.path().join("check.ts"), include_str!("apps/check.ts"))?;
    std::fs::write(folder.path().join("database.types.ts"), TYPES)?;
    for block in blocks("ts") {
        let name = block.lines().next().and_then(|line| line.strip_prefix("// ")).context("a block names its file")?;
        std::fs::write(folder.path().join(name), block)?;
    }
    Ok(folder)
}

/// The packages, installed once for each lock file.
async fn packages() -> Result<PathBuf> {
    let (cache, part) = (cache::directory()?, Progress::quiet().part("npm"));
    let digest: String = Sha256::digest(LOCK).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let place = cache.join(format!("npm-{digest}"));
    let _lock = cache::lock(&cache, "npm", &part).await?;
    if !place.exists() {
        let unfinished = cache::workshop(&cache)?;
        std::fs::write(unfinished.path().join("package.json"), PACKAGES)?;
        std::fs::write(unfinished.path().join("package-lock.json"), LOCK)?;
        run(unfinished.path(), "npm", &["ci", "--ignore-scripts", "--no-audit", "--no-fund"], &[]).await?;
        std::fs::rename(unfinished.path(), &place)?;
    }
    Ok(place)
}

async fn run(folder: &Path, program: &str, arguments: &[&str], env: &[(&str, &str)]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .envs(env.iter().copied())
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .await
        .with_context(|| format!("run {program}"))?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{program} {}: {text}", arguments.join(" "));
    Ok(text)
}

async fn typescript(world: &World) -> Result<()> {
    let folder = workshop().await?;
    run(folder.path(), "node", &["node_modules/typescript/bin/tsc", "-p", "."], &[]).await?;
    let user = world.database.sign_up().await?.to_string();
    let url = world.database.url("postgres").replace("?sslmode=disable", "");
    run(folder.path(), "node", &["out/check.js"], &[("DATABASE_URL", &url), ("USER_ID", &user)]).await?;
    Ok(())
}

/// `drizzle-kit push` with what is `schema.ts` there. It ends with success even where a statement fails.
async fn push(world: &World, folder: &Path) -> Result<String> {
    let url = world.database.url("postgres").replace("?sslmode=disable", "");
    let arguments = ["node_modules/drizzle-kit/bin.cjs", "push", "--verbose", "--force"];
    run(folder, "node", &arguments, &[("DATABASE_URL", &url)]).await
}

async fn drizzle_kit(world: &World) -> Result<()> {
    let folder = workshop().await?;
    let said = push(world, folder.path()).await?;
    ensure!(said.contains("No changes detected"), "{said}");

    // The other way round, so that "no changes" is known to be an answer: an index that the schema does not name.
    world.sql("create index not_in_the_schema on public.cyberdesk_instances (status)").await?;
    let said = push(world, folder.path()).await?;
    ensure!(said.contains("DROP INDEX \"not_in_the_schema\""), "{said}");
    Ok(())
}

/// It gets as far as the new columns, which the operator's views hold: then RLS, policy's cover and indexes are gone.
async fn old_schema(world: &World) -> Result<()> {
    let folder = workshop().await?;
    std::fs::write(folder.path().join("schema.ts"), include_str!("apps/old-schema.ts"))?;
    let pushed = push(world, folder.path()).await;
    let url = world.database.url("cyberdesk_daemon");
    let examine = async || doctor::examine_database(vec![("DATABASE_URL".to_owned(), url.clone())]).await;

    let mut report = examine().await;
    let told = report.to_string();
    for lost in ["row-level security is off", "public.cyberdesk_desktop_history is missing", "_not_over_idx is missing"]
    {
        ensure!(told.contains(lost), "{lost:?} is not told:\n{told}\n{pushed:?}");
    }
    // What is brought back has its grants to come: a second look tells.
    for _ in 0..2 {
        for line in report.findings.iter().filter(|it| it.verdict != Verdict::Ok).flat_map(|finding| &finding.mend) {
            world.sql(line).await.with_context(|| line.clone())?;
        }
        report = examine().await;
    }
    ensure!(report.count(Verdict::Ok) == report.findings.len(), "{report}");
    Ok(())
}
