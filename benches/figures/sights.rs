//! What a bystander sees of virtual machines, and when: the same eyes for the operator's work and for the bare client's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use cyberdesk_testbed::kubevirt::{vm_resource, vmi_resource};
use futures::StreamExt as _;
use kube::api::{Api, DynamicObject};
use kube::core::ApiResource;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt as _};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant, timeout};

/// Something that can be seen of a VM or its instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Sight {
    /// The VM is there.
    Made,
    /// Its deletion was accepted.
    Deleted,
    /// Its instance can be used.
    Ready,
}

type Seen = HashMap<(Sight, String), Instant>;

/// The eyes on one namespace.
pub(crate) struct Sights {
    seen: Arc<Mutex<Seen>>,
    changes: watch::Receiver<usize>,
    _watches: JoinSet<()>,
}

impl Sights {
    /// Begins to watch VMs and VMIs of a namespace.
    pub(crate) fn of(client: &Client, namespace: &str) -> Self {
        let seen = Arc::<Mutex<Seen>>::default();
        let (changed, changes) = watch::channel(0);
        let changed = Arc::new(changed);
        let mut watches = JoinSet::new();
        for (kind, is_vm) in [(vm_resource(), true), (vmi_resource(), false)] {
            let api = Api::<DynamicObject>::namespaced_with(client.clone(), namespace, &kind);
            let (seen, changed) = (seen.clone(), changed.clone());
            watches.spawn(async move {
                let mut events = watcher(api, watcher::Config::default()).boxed();
                while let Some(event) = events.next().await {
                    let Ok(Event::Apply(object) | Event::InitApply(object)) = event else { continue };
                    let (at, name) = (Instant::now(), object.name_any());
                    for sight in sights(&object, is_vm) {
                        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                        seen.entry((sight, name.clone())).or_insert(at);
                    }
                    changed.send_modify(|changes| *changes += 1);
                }
            });
        }
        Self { seen, changes, _watches: watches }
    }

    /// When this was first seen; waits for it.
    pub(crate) async fn when(&self, sight: Sight, vm: &str) -> Result<Instant> {
        let at = || self.lock().get(&(sight, vm.to_owned())).copied();
        self.wait(&format!("{vm} is {sight:?}"), || at().is_some()).await?;
        at().ok_or_else(|| anyhow::anyhow!("{vm} was seen and is forgotten"))
    }

    /// When the last of these was seen; waits for all.
    pub(crate) async fn when_all(&self, sight: Sight, vms: &[String]) -> Result<Instant> {
        let all = || vms.iter().all(|vm| self.lock().contains_key(&(sight, vm.clone())));
        // To ask for each whenever one is seen would be the most of the work.
        let enough = || self.lock().len() >= vms.len() && all();
        self.wait(&format!("{} VMs are {sight:?}", vms.len()), enough).await?;
        let seen = self.lock();
        Ok(vms.iter().filter_map(|vm| seen.get(&(sight, vm.clone())).copied()).max().unwrap_or_else(Instant::now))
    }

    async fn wait(&self, what: &str, holds: impl Fn() -> bool) -> Result<()> {
        let mut changes = self.changes.clone();
        let done = timeout(Duration::from_secs(900), changes.wait_for(|_| holds())).await;
        ensure!(matches!(done, Ok(Ok(_))), "waited in vain until {what}");
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sights(object: &DynamicObject, is_vm: bool) -> Vec<Sight> {
    let deleted = object.metadata.deletion_timestamp.is_some().then_some(Sight::Deleted);
    if is_vm {
        return [Some(Sight::Made), deleted].into_iter().flatten().collect();
    }
    let conditions = object.data["status"]["conditions"].as_array();
    let ready = conditions.into_iter().flatten().any(|it| it["type"] == "Ready" && it["status"] == "True");
    ready.then_some(Sight::Ready).into_iter().collect()
}

/// Keeps a watch on a kind open and reads it, as the operator does.
pub(crate) fn read_along(client: &Client, namespace: &str, kind: &ApiResource) -> impl Future<Output = ()> + use<> {
    let api = Api::<DynamicObject>::namespaced_with(client.clone(), namespace, kind);
    async move {
        let mut events = watcher(api, watcher::Config::default()).boxed();
        while events.next().await.is_some() {}
    }
}
