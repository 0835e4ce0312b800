//! The watches: each kind has a task and a back-off of its own. An event carries nothing to the
//! decision but the key of a desktop to look at.

use std::collections::HashMap;
use std::fmt::Debug;
use std::time::Duration;

use kube::Api;
use kube::runtime::watcher::{Error, Event};
use serde::de::DeserializeOwned;
use tracing::{info, warn};

use super::cache::Cache;
use super::objects::{Observed, version};
use super::relist::{Relisting, Trouble};
use crate::queue::{Lane, Queue};
use crate::telemetry::chain;

/// Keeps a cache current and wakes the desktops whose objects changed. Ends when it is dropped.
///
/// There is no label selector: a label that somebody removes would look like a deletion. `tell` hears whether the watch
/// goes well.
pub(crate) async fn follow<K>(api: Api<K>, cache: &Cache<K::Seen>, queue: &Queue, relist: Duration, tell: impl Fn(bool))
where
    K: Observed + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let kind = K::plural(&());
    let mut events = Relisting::new(api, "", relist);
    let mut list = HashMap::new();
    let mut to_tell = true;
    loop {
        let event = events.next().await;
        // A list that was begun may still fail.
        if !matches!(event, Ok(Event::Init | Event::InitApply(_))) {
            tell(event.is_ok());
        }
        match event {
            Ok(Event::Init) => {
                list = HashMap::new();
                cache.begin_list();
            }
            Ok(Event::InitApply(object)) => {
                if let Some(key) = object.key() {
                    let seen = cache.shared(&key, object.seen());
                    list.insert(key, (version(object.meta()), seen));
                }
            }
            // What vanished while nobody watched is looked at too.
            Ok(Event::InitDone) => {
                // Of a first list all is, for nothing is known of what has changed.
                let lane = if cache.is_complete() { Lane::Makes } else { Lane::Looks };
                for key in cache.replace(std::mem::take(&mut list)) {
                    queue.wake(&key, lane);
                }
                if std::mem::take(&mut to_tell) {
                    info!(%kind, "listed");
                }
            }
            Ok(Event::Apply(object)) => {
                to_tell = false;
                let (Some(key), seen) = (object.key(), object.seen()) else {
                    continue;
                };
                let lane = K::lane(&seen);
                if cache.put(&key, version(object.meta()), seen) {
                    queue.wake(&key, lane);
                }
            }
            Ok(Event::Delete(object)) => {
                to_tell = false;
                if let Some(key) = object.key() {
                    cache.remove(&key, version(object.meta()));
                    queue.wake(&key, Lane::Ends);
                }
            }
            Err(Trouble { error, is_news }) => {
                if !is_news {
                    continue;
                }
                to_tell = true;
                let error = match &error {
                    Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404 => {
                        format!("the API server does not serve {kind}.{}: is its CRD installed?", K::group(&()))
                    }
                    error => chain(error).to_string(),
                };
                warn!(%kind, error, "cannot watch; will try again");
            }
        }
    }
}
