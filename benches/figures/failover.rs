//! Two operators: how long after the leader's end the other serves the next desktop.

use anyhow::Result;
use cyberdesk_operator::names::Key;
use cyberdesk_testbed::players::KubeVirt;
use cyberdesk_testbed::supervise::{Signal, Supervised};
use tokio::time::Instant;

use crate::Arguments;
use crate::place::{Place, until};
use crate::report::{Figure, Goal, percentile};
use crate::sights::{Sight, Sights};

pub(crate) async fn measure(arguments: &Arguments) -> Result<Vec<Figure>> {
    let place = Place::start(KubeVirt::None).await?;
    let sights = Sights::of(&place.client, place.namespace());
    let mut leader = place.operator("one").await?;
    let mut standby = place.launch("two")?;
    let (mut killed, mut terminated) = (vec![], vec![]);
    for round in 0..2 * arguments.repetitions {
        stands_by(&standby).await?;
        let began = Instant::now();
        if round % 2 == 0 {
            leader.kill9().await?;
            killed.push(next_served(&place, &sights, began).await?);
        } else {
            leader.signal(Signal::TERM)?;
            terminated.push(next_served(&place, &sights, began).await?);
            leader.ended().await?;
        }
        std::fs::write(leader.log(), "")?;
        leader.start().await?;
        std::mem::swap(&mut leader, &mut standby);
    }
    let figure = |name: &str, times: Vec<f64>, most: f64| Figure {
        name: format!("leader {name} -> next desktop served, worst of {}", times.len()),
        value: percentile(times, 100),
        unit: "s",
        limit: None,
        goal: Goal::ValueAtMost(most),
    };
    Ok(vec![figure("killed", killed, 15.0), figure("terminated", terminated, 1.0)])
}

/// Waits until it has listed what there is.
async fn stands_by(operator: &Supervised) -> Result<()> {
    operator.running().await?;
    until("the standby has warm caches", async || {
        Ok(std::fs::read_to_string(operator.log())?.matches("listed").count() >= 3)
    })
    .await
}

async fn next_served(place: &Place, sights: &Sights, began: Instant) -> Result<f64> {
    let id = place.insert().await?;
    let made = sights.when(Sight::Made, &Key::of_row(id).vm_name()).await?;
    place.app.execute("select request_shutdown($1)", &[&id]).await?;
    Ok(made.duration_since(began).as_secs_f64())
}
