//! The watches: each kind has a task and a back-off of its own. An event carries nothing to the
//! decision but the key of a desktop to look at.

use std::collections::HashMap;
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tracing::{info, warn};

use super::cache::Cache;
use super::objects::{Observed, version};
use crate::queue::{Lane, Queue};
use crate::template::Templates;

/// How long one watch lives. One that has gone silent is noticed when it should have ended.
pub(super) const WATCH_SECONDS: u32 = 30;

/// Keeps a cache current and wakes the desktops whose objects changed. Ends when it is dropped.
///
/// There is no label selector: a label that somebody removes would look like a deletion. `tell` hears whether
/// the watch goes well.
pub(crate) async fn follow<K>(api: Api<K>, cache: &Cache<K::Seen>, queue: &Queue, tell: impl Fn(bool))
where
    K: Observed + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let kind = K::plural(&());
    let mut events = watcher(api, watcher::Config::default().timeout(WATCH_SECONDS)).default_backoff().boxed();
    let mut list = HashMap::new();
    let mut trouble = false;
    while let Some(event) = events.next().await {
        // A list that was begun may still fail.
        if !matches!(event, Ok(Event::Init | Event::InitApply(_))) {
            tell(event.is_ok());
        }
        match event {
            Ok(Event::Init) => list = HashMap::new(),
            Ok(Event::InitApply(object)) => {
                if let Some(key) = object.key() {
                    list.insert(key, (version(object.meta()), object.seen()));
                }
            }
            // What vanished while nobody watched is looked at too.
            Ok(Event::InitDone) => {
                for key in cache.replace(std::mem::take(&mut list)) {
                    queue.wake(&key, Lane::Makes);
                }
                info!(%kind, "listed");
                trouble = false;
            }
            Ok(Event::Apply(object)) => {
                trouble = false;
                let (Some(key), seen) = (object.key(), object.seen()) else {
                    continue;
                };
                let lane = K::lane(&seen);
                if cache.put(&key, version(object.meta()), seen) {
                    queue.wake(&key, lane);
                }
            }
            Ok(Event::Delete(object)) => {
                trouble = false;
                if let Some(key) = object.key() {
                    cache.remove(&key, version(object.meta()));
                    queue.wake(&key, Lane::Ends);
                }
            }
            Err(error) => {
                // Once per trouble: the back-off repeats it for as long as it lasts.
                if !std::mem::replace(&mut trouble, true) {
                    warn!(%kind, error = %crate::telemetry::chain(&error), "cannot watch; will try again");
                }
            }
        }
    }
}

/// The name of the ConfigMap with the VM templates.
pub(crate) const TEMPLATES: &str = "cyberdesk-vm-template";

/// Keeps the templates as the ConfigMap has them; without one, those that ship with the binary.
/// `namespace` is where VMs are made.
pub(crate) async fn follow_templates(
    api: Api<ConfigMap>,
    namespace: &str,
    templates: &watch::Sender<Option<Arc<Templates>>>,
) {
    let set = |map: Option<ConfigMap>| {
        let found = map.is_some();
        let next = map.map_or_else(|| Templates::built_in(namespace), |map| read(namespace, map));
        templates.send_if_modified(|current| {
            let news = current.as_deref() != Some(&next);
            if news && found {
                info!(config_map = TEMPLATES, "VM templates taken into use");
            } else if news {
                info!(config_map = TEMPLATES, "there is no ConfigMap with VM templates: those built in are used");
            }
            if news {
                *current = Some(Arc::new(next));
            }
            news
        });
    };
    let config = watcher::Config::default().fields(&format!("metadata.name={TEMPLATES}")).timeout(WATCH_SECONDS);
    let mut events = watcher(api, config).default_backoff().boxed();
    let mut found = None;
    let mut trouble = false;
    while let Some(event) = events.next().await {
        trouble = match event {
            Ok(Event::Init) => {
                found = None;
                false
            }
            Ok(Event::InitApply(map)) => {
                found = Some(map);
                false
            }
            Ok(Event::InitDone) => {
                set(found.take());
                false
            }
            Ok(Event::Apply(map)) => {
                set(Some(map));
                false
            }
            Ok(Event::Delete(_)) => {
                set(None);
                false
            }
            Err(error) => {
                if !trouble {
                    warn!(config_map = TEMPLATES, error = %crate::telemetry::chain(&error), "cannot watch; will try again");
                }
                true
            }
        };
    }
}

fn read(namespace: &str, map: ConfigMap) -> Templates {
    Templates::new(namespace, map.data.unwrap_or_default())
}
