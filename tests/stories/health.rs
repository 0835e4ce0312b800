//! `/livez`, `/readyz` and `/metrics` tell the truth, also while something is away.

use anyhow::{Context, Result, ensure};
use cyberdesk_testbed::postgres::Options;
use cyberdesk_testbed::{Postgres, Progress};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::World;
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a leader and a standby are both ready, and each check can be asked for", both_ready),
        story("the figures follow a desktop's life", figures),
        story("while Postgres is away a daemon is not ready, and no restart is asked for", without_postgres),
    ]
}

/// Asks a daemon of the story, by the address that it logged. Answers status and body.
pub(crate) async fn get(world: &World, daemon: &str, path: &str) -> Result<(u16, String)> {
    let log = std::fs::read_to_string(world.log(daemon))?;
    let address = log.rsplit_once("address=\"").and_then(|(_, rest)| rest.split_once('"')).context("it has started")?.0;
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer of HTTP")?;
    Ok((head.split(' ').nth(1).context("a status")?.parse()?, body.to_owned()))
}

/// Waits until the operator answers so to a path.
pub(crate) async fn told(world: &World, path: &str, status: u16, words: &str) -> Result<()> {
    world
        .until(&format!("{path} answers {status} with {words:?}"), async || {
            let (found, body) = get(world, "operator", path).await?;
            ensure!(found == status && body.contains(words), "{found}: {body}");
            Ok(true)
        })
        .await
}

async fn both_ready(world: &World) -> Result<()> {
    let _leader = world.start_daemon("a", &[("CYBERDESK_IDENTITY", "a")]).await?;
    world.daemon_says("a", "writing to the database").await?;
    let _standby = world.start_daemon("b", &[("CYBERDESK_IDENTITY", "b")]).await?;
    for (daemon, leads) in [("a", 1), ("b", 0)] {
        let checks = ["listen", "rows", "watch-crs", "watch-vms", "watch-vmis", "leadership", "write-back", "clocks"];
        let all: String = checks.iter().map(|check| format!("[+]{check} ok\n")).collect();
        // It is ready before its first notification and its first look at the API server's clock have come.
        let well = async || {
            let (status, told) = get(world, daemon, "/readyz?verbose").await?;
            ensure!(status == 200 && told == format!("{all}readyz check passed\n"), "{status}: {told}");
            Ok(true)
        };
        world.until(&format!("all is well with {daemon}"), well).await?;
        ensure!(get(world, daemon, "/readyz/rows").await? == (200, "ok".to_owned()), "one alone");
        ensure!(get(world, daemon, "/readyz/luck").await?.0 == 404, "one that there is not");
        let (_, alive) = get(world, daemon, "/livez?verbose").await?;
        ensure!(alive == "[+]scan ok\n[+]election ok\n[+]workers ok\nlivez check passed\n", "{daemon}: {alive}");
        let (_, figures) = get(world, daemon, "/metrics").await?;
        ensure!(figures.contains(&format!("\ncyberdesk_leader {leads}\n")), "{daemon}: {figures}");
    }
    Ok(())
}

async fn figures(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let has = async |wanted: &[&str]| {
        let until = async || {
            let (_, figures) = get(world, "operator", "/metrics").await?;
            let missing: Vec<_> = wanted.iter().filter(|line| !figures.contains(&format!("\n{line}\n"))).collect();
            ensure!(missing.is_empty(), "{missing:?} in {figures}");
            Ok(true)
        };
        world.until(&format!("the figures are {wanted:?}"), until).await
    };
    has(&[
        "cyberdesk_insert_to_cr_seconds_count 1",
        "cyberdesk_insert_to_vm_seconds_count 1",
        "cyberdesk_insert_to_running_seconds_count 1",
        "cyberdesk_desktops{phase=\"running\"} 1",
        "cyberdesk_watch_up{kind=\"vmis\"} 1",
        "cyberdesk_write_back_entries 0",
        "cyberdesk_notifications_arrive 1",
    ])
    .await?;
    let (_, figures) = get(world, "operator", "/metrics").await?;
    for made in [
        "cyberdesk_api_calls_total{verb=\"create\",resource=\"virtualmachines\",code=\"201\"}",
        "cyberdesk_sql_statements_total{statement=\"report\",result=\"ok\"}",
    ] {
        ensure!(figures.contains(made), "{made}\n{figures}");
    }
    world.app("update cyberdesk_instances set timeout_at = now() where id = $1", &id).await?;
    world.until_over(&id).await?;
    has(&[
        "cyberdesk_deadline_lateness_seconds_count 1",
        "cyberdesk_desktop_ends_total{reason=\"timeout\"} 1",
        "cyberdesk_desktops{phase=\"running\"} 0",
    ])
    .await
}

async fn without_postgres(world: &World) -> Result<()> {
    // One of its own: it goes away for longer than others could wait.
    let part = Progress::quiet().part("postgres");
    let postgres = Postgres::start(&Options::default(), world.parts.testbed.scratch(), &part).await?;
    let world = World::on(world.parts.clone(), postgres.database().await?).await?;
    let world = &world;
    world.start_operator(&[]).await?;
    // As a standby it is ready without them; it reads the rows when its term begins.
    world.operator_says("writing to the database").await?;
    told(world, "/readyz", 200, "ok").await?;
    postgres.server().kill9().await?;
    told(world, "/readyz?verbose", 503, "[-]rows failed: the rows were last read").await?;
    let (_, told_then) = get(world, "operator", "/readyz?verbose").await?;
    ensure!(told_then.contains("[+]listen ok: warning: notifications do not arrive"), "{told_then}");
    ensure!(told_then.contains("[+]leadership ok"), "what does not need Postgres is well: {told_then}");
    ensure!(get(world, "operator", "/livez").await? == (200, "ok".to_owned()), "a restart would not help");
    postgres.restart().await?;
    told(world, "/readyz", 200, "ok").await
}
