//! One desktop at a time, with nothing else to do: from the commit of its row to its VM, from its guest's being ready to
//! its row's saying so, from its row's shutdown request to the deletion of its VM.

use anyhow::Result;
use cyberdesk_operator::names::Key;
use cyberdesk_testbed::players::KubeVirt;
use tokio::time::Instant;
use uuid::Uuid;

use crate::Arguments;
use crate::bare::Bare;
use crate::counted::Counted;
use crate::place::{Place, until};
use crate::report::{Figure, Goal, percentile};
use crate::sights::{Sight, Sights};

const GOAL: Goal = Goal::ValueAtMost(50.0);
const CALLS: &str = "the bare calls: one CR, one Secret, one VM, one after the other";
const DELETE: &str = "the bare call";
const UPDATE: &str = "one update of the row by the app, triggers and all";

/// The writes to the API server that nobody could do without in a life that starts, runs and is asked to end, by what is
/// promised: a CR whose status and Events tell each step once, and the end before the VM is deleted.
const LEAST_WRITES: [(&str, f64); 8] = [
    ("create cyberdesks", 1.0),
    ("create secrets", 1.0),
    ("create virtualmachines", 1.0),
    // Its VM is made; it runs; it ends, and why.
    ("patch cyberdesks/status", 3.0),
    ("create events", 3.0),
    ("delete virtualmachines", 1.0),
    ("deletecollection secrets", 1.0),
    ("delete cyberdesks", 1.0),
];

/// Milliseconds of each desktop.
#[derive(Default)]
struct Times {
    made: Vec<f64>,
    told: Vec<f64>,
    deleted: Vec<f64>,
}

pub(crate) async fn measure(arguments: &Arguments) -> Result<Vec<Figure>> {
    let place = Place::start(KubeVirt::Simulated).await?;
    let operator = place.operator("bench").await?;
    place.clear().await?;
    place.no_crs().await?;
    let bare = Bare::apart(&place.client).await?;
    let (ours, theirs) = (Sights::of(&place.client, place.namespace()), Sights::of(&place.client, bare.namespace()));
    let (mut times, mut limits) = (Times::default(), Times::default());
    let before = Counted::of(&operator).await?;
    // One of each in turn: the machine's moods take both alike.
    for _ in 0..arguments.desktops {
        life(&place, &ours, &mut times).await?;
        bare_life(&place, &bare, &theirs, &mut limits).await?;
    }
    place.no_crs().await?;
    let counted = Counted::of(&operator).await?.since(&before);
    let figure = |name: &str, times: &[f64], limits: &[f64], percent: usize, limit: &'static str, goal: Goal| Figure {
        name: format!("{name}, p{percent}"),
        value: percentile(times.iter().copied(), percent),
        unit: "ms",
        limit: Some((percentile(limits.iter().copied(), percent), limit)),
        goal,
    };
    let half = Goal::RatioAtMost(1.5);
    let mut figures = vec![
        figure("commit of one row -> VM created", &times.made, &limits.made, 50, CALLS, half),
        figure("commit of one row -> VM created", &times.made, &limits.made, 99, CALLS, GOAL),
        figure("guest ready -> row committed", &times.told, &limits.told, 50, UPDATE, Goal::Told),
        figure("guest ready -> row committed", &times.told, &limits.told, 99, UPDATE, GOAL),
        figure("shutdown request -> VM delete accepted", &times.deleted, &limits.deleted, 50, DELETE, Goal::Told),
        figure("shutdown request -> VM delete accepted", &times.deleted, &limits.deleted, 99, DELETE, GOAL),
    ];
    figures.extend(writes(&counted, arguments.desktops as f64));
    Ok(figures)
}

/// The writes of one desktop's life, all together and each kind by itself. The Lease is renewed for the whole fleet.
fn writes(counted: &Counted, lives: f64) -> Vec<Figure> {
    let mut writes: Vec<(String, f64, Option<f64>)> = vec![];
    for (call, count) in counted.api_calls() {
        let is_read = ["get ", "list ", "watch "].iter().any(|verb| call.starts_with(verb));
        if !is_read && !call.ends_with(" leases") {
            let least = LEAST_WRITES.iter().find(|(least, _)| *least == call).map(|(_, least)| *least);
            writes.push((format!("API writes of a life: {call}"), count / lives, least));
        }
    }
    let all = writes.iter().map(|(_, count, _)| count).sum();
    let least = LEAST_WRITES.iter().map(|(_, least)| least).sum();
    writes.push(("API writes of a life, all".to_owned(), all, Some(least)));
    let figure = |(name, value, least): (String, f64, Option<f64>)| Figure {
        goal: if name.ends_with("all") { Goal::RatioAtMost(1.3) } else { Goal::Told },
        limit: least.map(|least| (least, "the calls that nobody could do without")),
        name,
        value,
        unit: "",
    };
    writes.into_iter().map(figure).collect()
}

async fn life(place: &Place, sights: &Sights, times: &mut Times) -> Result<()> {
    let id = place.insert().await?;
    let committed = Instant::now();
    let vm = Key::of_row(id).vm_name();
    times.made.push(since(committed, sights.when(Sight::Made, &vm).await?));
    let told = row_says(place, "status = 'running'", id).await?;
    times.told.push(since(sights.when(Sight::Ready, &vm).await?, told));
    place.app.execute("select request_shutdown($1)", &[&id]).await?;
    let committed = Instant::now();
    times.deleted.push(since(committed, sights.when(Sight::Deleted, &vm).await?));
    until("the desktop is over", async || {
        Ok(place
            .app
            .query_one("select ended_at is not null from cyberdesk_instances where id = $1", &[&id])
            .await?
            .get(0))
    })
    .await
}

/// Asks without a pause until a row is so: its answer comes some tenth of a millisecond after the commit.
async fn row_says(place: &Place, what: &str, id: Uuid) -> Result<Instant> {
    let statement = place.app.prepare(&format!("select {what} from cyberdesk_instances where id = $1")).await?;
    loop {
        if place.app.query_one(&statement, &[&id]).await?.get(0) {
            return Ok(Instant::now());
        }
        tokio::time::sleep(std::time::Duration::from_micros(500)).await;
    }
}

async fn bare_life(place: &Place, bare: &Bare, sights: &Sights, times: &mut Times) -> Result<()> {
    let id = Uuid::new_v4();
    let vm = Key::of_row(id).vm_name();
    let began = Instant::now();
    bare.make(id, place.user).await?;
    times.made.push(since(began, sights.when(Sight::Made, &vm).await?));
    sights.when(Sight::Ready, &vm).await?;
    let began = Instant::now();
    bare.delete_vm(&vm).await?;
    times.deleted.push(since(began, sights.when(Sight::Deleted, &vm).await?));
    bare.clear().await?;
    // A row of nobody's desktop: it was inserted over, and no operator takes notice of it.
    let insert = "insert into cyberdesk_instances (user_id, status) values ($1, 'terminated') returning id";
    let row: Uuid = place.app.query_one(insert, &[&place.user]).await?.get(0);
    let began = Instant::now();
    place.app.execute("update cyberdesk_instances set stream_url = 'wss://example.com' where id = $1", &[&row]).await?;
    times.told.push(since(began, Instant::now()));
    Ok(())
}

fn since(began: Instant, ended: Instant) -> f64 {
    ended.saturating_duration_since(began).as_secs_f64() * 1e3
}
