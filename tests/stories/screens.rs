//! `status` and `diff`: what people see of the fleet and of one desktop, under the daemon's own account and role.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("status shows the fleet on one screen", fleet),
        story("status ID tells one desktop's whole story, also when it is over", one_story),
        story("status and diff show the other half when one side is away, and tell by exit code", halves),
        story("diff shows what disagrees and what would be done, and does nothing", differences),
    ]
}

/// Nobody listens there.
const NO_DATABASE: (&str, &str) = ("DATABASE_URL", "postgres://u:p@127.0.0.1:1/d");
const NO_CLUSTER: (&str, &str) = ("KUBECONFIG", "/nowhere");

fn fits(screen: &str) -> Result<()> {
    let widest = screen.lines().map(|line| line.chars().count()).max().unwrap_or_default();
    ensure!(widest <= 100, "a line of {widest} characters in:\n{screen}");
    Ok(())
}

async fn fleet(world: &World) -> Result<()> {
    let (code, screen) = world.command(&["status"], &[]).await?;
    ensure!(code == 0 && screen.contains("leader     nobody") && screen.contains("operator   away"), "{screen}");
    world.start_operator(&[("CYBERDESK_IDENTITY", "the-leader")]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.apply_cr("by-hand", serde_json::json!({ "timeoutMs": 600_000 })).await?;
    world
        .until("the one by hand runs", async || {
            Ok(world.cr_status("by-hand", "phase").await?.as_deref() == Some("Running"))
        })
        .await?;
    let holds = async || {
        let (code, screen) = world.command(&["status"], &[]).await?;
        for words in [
            "leader     the-leader, term 1",
            "operator   serving",
            "1 running",
            "every change was acted on",
            "2 Running; 2 VMs, 2 instances",
        ] {
            ensure!(code == 0 && screen.contains(words), "{words:?} is not in:\n{screen}");
        }
        let (by_hand, by_row) =
            (screen.find("by-hand").context("it is due first")?, screen.find(&id).context("it is due")?);
        ensure!(by_hand < by_row && !screen.contains("NOT SEEN"), "{screen}");
        fits(&screen)?;
        Ok(true)
    };
    world.until("the fleet is shown", holds).await?;
    let (_, json) = world.command(&["status", "--json"], &[]).await?;
    let told: Value = serde_json::from_str(&json)?;
    ensure!(
        told["rows"]["running"] == 1 && told["leader"]["name"] == "the-leader" && told["service"]["state"] == "serving",
        "{json}"
    );
    ensure!(world.command(&["status", "--watch", "--json"], &[]).await?.0 == 2, "a usage error");
    Ok(())
}

async fn one_story(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let tells = async |id: &str, wanted: &[&str]| {
        let holds = async || {
            let (code, screen) = world.command(&["status", id], &[]).await?;
            for words in wanted {
                ensure!(code == 0 && screen.contains(words), "{words:?} is not in:\n{screen}");
            }
            let told: Vec<usize> = wanted.iter().filter_map(|words| screen.find(words)).collect();
            ensure!(told.is_sorted(), "not in this order: {wanted:?}\n{screen}");
            Ok(true)
        };
        world.until(&format!("the story of {id} is told"), holds).await
    };
    let alive = [
        "row        running",
        "cyberdesk  Running",
        "in 59 m",
        "row        created: pending",
        "next       its deadline",
    ];
    tells(&id, &alive).await?;
    // A person types no more than they must.
    tells(&id[..8], &["row        running", "Started: ", "Running: its guest is ready"][..1]).await?;
    tells(&id, &["event      Running: its guest is ready", "next"]).await?;
    world.request_shutdown(&id).await?;
    world.until_over(&id).await?;
    let over = [
        "row        over",
        "created: pending",
        "status: pending to running",
        "shutdown-requested",
        "ended: running to terminated, requested",
        "next       nothing: it is over",
    ];
    tells(&id, &over).await?;
    let (code, screen) = world.command(&["status", "00000000-0000-0000-0000-00000000abcd"], &[]).await?;
    ensure!(code == 1 && screen.contains("there is no desktop"), "{screen}");
    let (_, json) = world.command(&["status", &id, "--json"], &[]).await?;
    let told: Value = serde_json::from_str(&json)?;
    ensure!(told["row"] == "over" && told["moments"].as_array().is_some_and(|moments| moments.len() >= 4), "{json}");
    Ok(())
}

async fn halves(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    // The row is told first.
    let shown = async || Ok(world.cr_status(&id, "phase").await?.as_deref() == Some("Running"));
    world.until("its CR says so too", shown).await?;
    let (code, screen) = world.command(&["status"], &[NO_DATABASE]).await?;
    ensure!(
        code == 0 && screen.contains("NOT SEEN   the database: ") && screen.contains("1 Running; 1 VMs"),
        "{screen}"
    );
    ensure!(screen.contains(&id), "its deadline is in its Cyberdesk: {screen}");
    let (code, screen) = world.command(&["status"], &[NO_CLUSTER]).await?;
    ensure!(code == 0 && screen.contains("NOT SEEN   the cluster: ") && screen.contains("1 running"), "{screen}");
    ensure!(world.command(&["status"], &[NO_DATABASE, NO_CLUSTER]).await?.0 == 2, "nothing can be looked at");
    let (code, screen) = world.command(&["status", &id], &[NO_DATABASE]).await?;
    ensure!(code == 0 && screen.contains("Ready is True") && screen.contains("row        unknown"), "{screen}");
    for away in [NO_DATABASE, NO_CLUSTER] {
        let (code, screen) = world.command(&["diff"], &[away]).await?;
        ensure!(code == 2 && screen.contains("not looked at: the "), "{screen}");
    }
    Ok(())
}

async fn differences(world: &World) -> Result<()> {
    let diff = async || world.command(&["diff"], &[]).await;
    let shows = async |code: i32, wanted: &[&str]| {
        let holds = async || {
            let (found, screen) = diff().await?;
            let missing: Vec<_> = wanted.iter().filter(|words| !screen.contains(**words)).collect();
            ensure!(found == code && missing.is_empty(), "{found}, without {missing:?}:\n{screen}");
            fits(&screen)?;
            Ok(true)
        };
        world.until(&format!("diff shows {wanted:?}"), holds).await
    };
    shows(0, &["0 of 0 desktops differ"]).await?;
    let id = world.insert("1 hour").await?;
    shows(
        1,
        &[
            &id,
            "pending    -          -        -",
            "would make its Cyberdesk",
            "would make its VirtualMachine",
            "1 of 1",
        ],
    )
    .await?;
    ensure!(world.left().await?.is_empty(), "nothing was done");
    world.start_operator(&[]).await?;
    world.until_status(&id, "running").await?;
    shows(0, &["0 of 1 desktops differ"]).await?;

    world.stop_operator().await?;
    let kept = world.insert("1 hour").await?;
    world.app("update cyberdesk_instances set timeout_at = now() where id = $1", &id).await?;
    shows(1, &["would have the database end its row, whose deadline has come", &kept, "2 of 2"]).await?;
    world.request_shutdown(&id).await?;
    shows(1, &["ending     Running    there    Running", "would delete its VirtualMachine"]).await?;
    ensure!(world.vms().get_opt(&vm_name(&id)).await?.is_some(), "nothing was done");
    let (_, json) = world.command(&["diff", "--json"], &[]).await?;
    let told: Value = serde_json::from_str(&json)?;
    ensure!(told["desktops"] == 2 && told["differences"].as_array().is_some_and(|all| all.len() == 2), "{json}");
    Ok(())
}
