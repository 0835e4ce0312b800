//! Those who watch: one looks at the rows, one at the CRs, one at the VMs. They see what an app and a person with
//! kubectl can see, and nothing of the operator's own mind.
//!
//! What the figures include: a row is looked at every 5 ms, so news of it is up to 5 ms and one query old; a CR or VM
//! comes by a watch of our own, about a millisecond after the API server has it.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use cyberdesk_operator::names::Key;
use cyberdesk_testbed::World;
use cyberdesk_testbed::kubevirt::{condition, vms};
use cyberdesk_testbed::operator::NAMESPACE;
use cyberdesk_testbed::postgres::ADMINISTRATOR;
use futures::TryStreamExt as _;
use kube::ResourceExt as _;
use kube::api::{Api, ApiResource, DynamicObject};
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};
use uuid::Uuid;

use super::board::{Cr, News, Row, Vm};

/// Between two looks at the rows.
const LOOK: Duration = Duration::from_millis(5);

/// The app's row where there is one, and what is remembered of one that was deleted.
const ROWS: &str =
    "select d.id, c.status::text, d.reason, d.message, d.shutdown_requested_at is not null, d.ended_at is not null
  from cyberdesk.desktop d left join public.cyberdesk_instances c using (id)";

/// Where news goes, with the instant at which it was seen.
pub(crate) type Teller = UnboundedSender<(Instant, News)>;

/// Begins to watch. A watcher that ends has failed.
pub(crate) async fn watch(world: &World, tell: &Teller) -> Result<JoinSet<Result<()>>> {
    let mut watchers = JoinSet::new();
    let rows = world.database.connect_as(ADMINISTRATOR).await?;
    watchers.spawn(watch_rows(rows, tell.clone()));
    let client = world.testbed.control_plane.client().await?;
    let crs = Api::namespaced_with(client.clone(), NAMESPACE, &cyberdesks());
    watchers.spawn(follow(crs, tell.clone(), |object, there| News::Cr {
        key: object.name_any(),
        cr: there.then(|| cr(&object)),
    }));
    watchers.spawn(follow(vms(&client, NAMESPACE), tell.clone(), |object, there| News::Vm {
        key: Key::from_vm_name(&object.name_any()).map_or_else(String::new, |key| key.to_string()),
        vm: there.then(|| vm(&object)),
    }));
    Ok(watchers)
}

/// The kind of our CRs.
pub(crate) fn cyberdesks() -> ApiResource {
    ApiResource::erase::<cyberdesk_operator::crd::Cyberdesk>(&())
}

async fn watch_rows(client: tokio_postgres::Client, tell: Teller) -> Result<()> {
    let statement = client.prepare(ROWS).await?;
    let mut known: HashMap<Uuid, Row> = HashMap::new();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let rows = client.query(&statement, &[]).await;
        for found in rows.context("look at the rows")? {
            let id: Uuid = found.get(0);
            let row = Row {
                status: found.get(1),
                reason: found.get(2),
                message: found.get(3),
                ending: found.get(4),
                over: found.get(5),
            };
            if known.get(&id) == Some(&row) {
                continue;
            }
            known.insert(id, row.clone());
            let key = Key::of_row(id).to_string();
            if tell.send((Instant::now(), News::Row { key, row })).is_err() {
                return Ok(());
            }
        }
    }
}

async fn follow(api: Api<DynamicObject>, tell: Teller, news: fn(DynamicObject, bool) -> News) -> Result<()> {
    let mut events = std::pin::pin!(watcher(api, watcher::Config::default()));
    while let Some(event) = events.try_next().await.context("watch the cluster")? {
        let news = match event {
            Event::Apply(object) | Event::InitApply(object) => news(object, true),
            Event::Delete(object) => news(object, false),
            Event::Init | Event::InitDone => continue,
        };
        if tell.send((Instant::now(), news)).is_err() {
            break;
        }
    }
    Ok(())
}

fn cr(object: &DynamicObject) -> Cr {
    let status = &object.data["status"];
    let text = |name: &str| status[name].as_str().map(str::to_owned);
    Cr {
        phase: text("phase"),
        reason: text("reason"),
        message: text("message"),
        ip: text("ip"),
        over: condition(status, "Ended").is_some_and(|ended| ended["status"] == "True"),
    }
}

fn vm(object: &DynamicObject) -> Vm {
    let status = object.data["status"]["printableStatus"].as_str();
    Vm { status: status.map(str::to_owned) }
}
