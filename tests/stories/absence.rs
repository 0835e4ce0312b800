//! One side is away for a while, and comes back.

use anyhow::{Result, ensure};
use uuid::Uuid;

use crate::world::{World, vm_name};
use crate::{Story, health, story};

pub(crate) fn stories() -> Vec<Story> {
    // All others share these servers.
    vec![
        story("what became of a desktop while Postgres was away is told when it is back", without_postgres).alone(),
        story("what was asked while the API server was away is done when it is back", without_the_api_server).alone(),
    ]
}

async fn without_postgres(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    let postgres = &world.parts.testbed.postgres;
    postgres.server().kill9().await?;
    world.guest(&id, "crash").await?;
    let gone = async || Ok(world.vms().get_opt(&vm_name(&id)).await?.is_none());
    world.until("the VM of the crashed guest is gone", gone).await?;
    ensure!(world.crs().get(&id).await?.data["status"]["end"]["reason"] == "guest-crashed", "the CR remembers it");
    postgres.restart().await?;
    let app = world.database.connect_as("postgres").await?;
    let told = "select 1 from cyberdesk_instances
                 where id = $1 and status = 'error' and reason = 'guest-crashed' and ended_at is not null";
    let row = id.parse::<Uuid>()?;
    world.until("the row tells it", async || Ok(app.query_opt(told, &[&row]).await?.is_some())).await?;
    world.until("nothing is left", async || Ok(world.left().await?.is_empty())).await
}

async fn without_the_api_server(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let stopped = world.running_desktop("1 hour").await?;
    let control_plane = &world.parts.testbed.control_plane;
    control_plane.api_server().kill9().await?;
    world.request_shutdown(&stopped).await?;
    let inserted = world.insert("1 hour").await?;
    world.operator_says("not done; the next look decides anew").await?;
    health::told(world, "/readyz?verbose", 503, "[-]watch-vms failed: the API server could not be watched").await?;
    health::told(world, "/livez", 200, "ok").await?;
    control_plane.api_server().start().await?;
    control_plane.ready().await?;
    let row = world.until_over(&stopped).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some("requested")), "{row:?}");
    world.until_status(&inserted, "running").await
}
