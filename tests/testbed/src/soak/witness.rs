//! Whoever watches and forgets nothing: every virtual machine that was ever made, by its name.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt as _;
use kube::api::{Api, DynamicObject};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt as _};
use tokio::task::JoinSet;

use crate::kubevirt::vm_resource;
use crate::operator::NAMESPACE;

type Made = BTreeMap<String, BTreeSet<String>>;

pub(super) struct Witness {
    made: Arc<Mutex<Made>>,
    _watch: JoinSet<()>,
}

impl Witness {
    /// Begins to watch. What comes and goes between two lists, while the API server is away, it cannot see: nor could
    /// anybody make it then.
    pub(super) fn of(client: &Client) -> Self {
        let made = Arc::<Mutex<Made>>::default();
        let vms = Api::<DynamicObject>::namespaced_with(client.clone(), NAMESPACE, &vm_resource());
        let mut watch = JoinSet::new();
        let notes = made.clone();
        watch.spawn(async move {
            let mut events = watcher(vms, watcher::Config::default().timeout(20)).default_backoff().boxed();
            while let Some(event) = events.next().await {
                let Ok(Event::Apply(vm) | Event::InitApply(vm) | Event::Delete(vm)) = event else { continue };
                let mut made = notes.lock().unwrap_or_else(PoisonError::into_inner);
                made.entry(vm.name_any()).or_default().extend(vm.uid());
            }
        });
        Self { made, _watch: watch }
    }

    /// The UIDs of the VMs of each name.
    pub(super) fn made(&self) -> Made {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
