//! Many rows in one transaction: until all of their VMs are made.

use anyhow::Result;
use cyberdesk_operator::crd::Cyberdesk;
use cyberdesk_operator::names::Key;
use cyberdesk_testbed::kubevirt::{vm_resource, vmi_resource};
use cyberdesk_testbed::players::KubeVirt;
use kube::CustomResourceExt as _;
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use crate::Arguments;
use crate::bare::Bare;
use crate::place::Place;
use crate::report::{Figure, Goal};
use crate::sights::{Sight, Sights, read_along};

pub(crate) async fn measure(arguments: &Arguments) -> Result<Vec<Figure>> {
    let place = Place::start(KubeVirt::Simulated).await?;
    let _operator = place.operator("bench").await?;
    place.clear().await?;
    let bare = Bare::apart(&place.client).await?;
    let mut alongside = JoinSet::new();
    for kind in [Cyberdesk::api_resource(), vm_resource(), vmi_resource()] {
        alongside.spawn(read_along(&place.client, bare.namespace(), &kind));
    }
    let mut figures: Vec<Figure> = vec![];
    for count in &arguments.burst {
        let limit = bare_burst(&place, &bare, *count).await?;
        eprintln!("burst of {count}: {limit:.0} VMs/s by the bare client");
        let value = burst(&place, *count).await?;
        eprintln!("burst of {count}: {value:.0} VMs/s");
        figures.push(Figure {
            name: format!("burst of {count} rows -> all VMs created"),
            value,
            unit: "/s",
            limit: Some((limit, "the bare client, 32 desktops at once")),
            goal: Goal::RatioAtLeast(0.8),
        });
    }
    if let [first, .., last] = figures.as_slice() {
        let linear = Figure {
            name: "burst, linear in its size".to_owned(),
            value: last.value,
            unit: "/s",
            limit: Some((first.value, "the rate of the smallest burst")),
            goal: Goal::RatioAtLeast(0.8),
        };
        figures.push(linear);
    }
    Ok(figures)
}

async fn burst(place: &Place, count: usize) -> Result<f64> {
    let sights = Sights::of(&place.client, place.namespace());
    let ids = place.insert_many(count).await?;
    let committed = Instant::now();
    let rate = rate(&sights, &ids, committed).await?;
    place.clear().await?;
    Ok(rate)
}

async fn bare_burst(place: &Place, bare: &Bare, count: usize) -> Result<f64> {
    let sights = Sights::of(&place.client, bare.namespace());
    let ids: Vec<Uuid> = (0..count).map(|_| Uuid::new_v4()).collect();
    let began = Instant::now();
    bare.make_all(&ids, place.user).await?;
    let rate = rate(&sights, &ids, began).await?;
    bare.clear().await?;
    Ok(rate)
}

async fn rate(sights: &Sights, ids: &[Uuid], began: Instant) -> Result<f64> {
    let vms: Vec<String> = ids.iter().map(|id| Key::of_row(*id).vm_name()).collect();
    let all = sights.when_all(Sight::Made, &vms).await?;
    Ok(ids.len() as f64 / all.duration_since(began).as_secs_f64())
}
