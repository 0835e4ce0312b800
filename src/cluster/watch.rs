//! The watches: each kind has a task and a back-off of its own. An event carries nothing to the
//! decision but the key of a desktop to look at.

use std::collections::HashMap;

use futures::StreamExt;
use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use serde::de::DeserializeOwned;
use tracing::{info, warn};

use super::cache::Cache;
use super::objects::{Observed, version};
use crate::queue::{Lane, Queue};

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
