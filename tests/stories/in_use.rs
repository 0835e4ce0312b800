//! What an administrator may decide: idle timeouts, warnings, and that new desktops wait.

use anyhow::{Result, ensure};

use crate::world::World;
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a desktop that nobody uses ends as idle, and touches keep another", idle),
        story("an end that is near is told in the row, and again after an extension", warned),
        story("while an administrator has paused it, new desktops wait and say so", paused),
    ]
}

async fn idle(world: &World) -> Result<()> {
    // Longer than a busy machine takes for a look.
    world.sql("update cyberdesk.settings set idle_timeout = '8 seconds'").await?;
    world.start_operator(&[("CYBERDESK_RESYNC_INTERVAL", "1h")]).await?;
    let used = world.running_desktop("1 hour").await?;
    let touch = async || world.app("select from touch_desktop($1)", &used).await;
    let unused = world.insert("1 hour").await?;
    let over = async || {
        touch().await?;
        Ok(world.row(&unused).await?.ended_at.is_some())
    };
    world.until("the unused one is over", over).await?;
    let row = world.row(&unused).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("idle")), "{row:?}");
    ensure!(row.message.as_deref().is_some_and(|words| words.contains("idle")), "{row:?}");

    touch().await?;
    let row = world.row(&used).await?;
    ensure!(row.shutdown_requested_at.is_none(), "it is in use: {row:?}");
    let shown = world.cr_status(&used, "expiryTime").await?;
    let shown = shown.and_then(|at| at.parse::<jiff::Timestamp>().ok());
    ensure!(
        shown.is_some_and(|at| (row.timeout_at - at).get_seconds().abs() <= 1),
        "kubectl shows the deadline: {shown:?}"
    );

    let row = world.until_over(&used).await?;
    ensure!(row.reason.as_deref() == Some("idle"), "nobody touched it any more: {row:?}");
    Ok(())
}

async fn is_warned(world: &World, id: &str) -> Result<bool> {
    let statement = format!("select count(*) from cyberdesk_instances where id = '{id}' and warned_at is not null");
    Ok(world.count(&statement).await? == 1)
}

async fn warned(world: &World) -> Result<()> {
    world.sql("update cyberdesk.settings set warn_before = '1 hour'").await?;
    let id = world.insert("30 minutes").await?;
    let far = world.insert("1 day").await?;
    world.start_operator(&[]).await?;
    world.until("it is warned", async || is_warned(world, &id).await).await?;
    ensure!(!is_warned(world, &far).await?, "the other's end is far");
    world.app("select from extend_desktop($1, '2 hours')", &id).await?;
    ensure!(!is_warned(world, &id).await?, "its end is far again");
    world.app("select from set_desktop_timeout($1, now() + interval '50 minutes')", &id).await?;
    world.until("it is warned again", async || is_warned(world, &id).await).await?;
    ensure!(world.row(&id).await?.shutdown_requested_at.is_none(), "a warning ends nothing");
    Ok(())
}

async fn paused(world: &World) -> Result<()> {
    world.sql("update cyberdesk.settings set paused = true").await?;
    let id = world.insert("1 hour").await?;
    let ending = world.insert("1 hour").await?;
    world.start_operator(&[]).await?;
    let says_so = async || Ok(world.cr_status(&id, "reason").await?.as_deref() == Some("making-paused"));
    world.until("its CR says that it waits", says_so).await?;
    let state = "select count(*) from desktop_service_state() where state = 'paused' and served";
    world.until("apps are told", async || Ok(world.count(state).await? == 1)).await?;
    world.request_shutdown(&ending).await?;
    let row = world.until_over(&ending).await?;
    ensure!(row.reason.as_deref() == Some("requested"), "ends go on: {row:?}");
    ensure!(world.vms().list(&Default::default()).await?.items.is_empty(), "nothing was made");

    world.sql("update cyberdesk.settings set paused = false").await?;
    world.until_status(&id, "running").await?;
    let state = "select count(*) from desktop_service_state() where state = 'serving'";
    ensure!(world.count(state).await? == 1);
    Ok(())
}
