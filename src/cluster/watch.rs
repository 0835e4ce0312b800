//! The watches: each kind has a task and a back-off of its own. An event carries nothing to the
//! decision but the key of a desktop to look at.

use std::collections::HashMap;
use std::time::Duration;

use futures::StreamExt;
use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Error, Event, watcher};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, interval_at};
use tracing::{info, warn};

use super::cache::Cache;
use super::objects::{Observed, version};
use crate::queue::{Lane, Queue};

/// How long one watch lives.
pub(super) const WATCH_SECONDS: u32 = 30;
/// A watch that has said nothing for so long is dead, though its socket lives: a quiet one would have ended.
pub(super) const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);

/// Wait before all is listed anew because the version that a watch goes on from is not known any more.
const EXPIRED: Duration = Duration::from_secs(1);

/// Keeps a cache current and wakes the desktops whose objects changed. Ends when it is dropped.
///
/// All is listed anew every so often: a watch that loses events goes on after them as if it had told them. There is
/// no label selector: a label that somebody removes would look like a deletion. `tell` hears whether the watch goes
/// well.
pub(crate) async fn follow<K>(api: Api<K>, cache: &Cache<K::Seen>, queue: &Queue, relist: Duration, tell: impl Fn(bool))
where
    K: Observed + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let kind = K::plural(&());
    let watch = || watcher(api.clone(), watcher::Config::default().timeout(WATCH_SECONDS)).default_backoff().boxed();
    let mut events = watch();
    let mut relist = interval_at(Instant::now() + relist, relist);
    let mut list = HashMap::new();
    let (mut trouble, mut expired, mut listing, mut listed) = (false, false, true, false);
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            // One that is in trouble goes on by itself, after its back-off.
            _ = relist.tick(), if !listing && (!trouble || expired) => {
                events = watch();
                expired = false;
                continue;
            }
        };
        let Some(event) = event else { return };
        // A list that was begun may still fail.
        if !matches!(event, Ok(Event::Init | Event::InitApply(_))) {
            tell(event.is_ok());
        }
        match event {
            Ok(Event::Init) => {
                listing = true;
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
                if trouble || !listed {
                    info!(%kind, "listed");
                }
                (trouble, listing, listed) = (false, false, true);
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
                listing = false;
                // The watcher lists anew when a watch is told so in its stream, and not when its start is refused so.
                if matches!(&error, Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410) {
                    expired = true;
                    relist.reset_after(EXPIRED);
                }
                // Once per trouble: the back-off repeats it for as long as it lasts.
                if std::mem::replace(&mut trouble, true) {
                    continue;
                }
                let error = match &error {
                    Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404 => {
                        format!("the API server does not serve {kind}.{}: is its CRD installed?", K::group(&()))
                    }
                    error => crate::telemetry::chain(error).to_string(),
                };
                warn!(%kind, error, "cannot watch; will try again");
            }
        }
    }
}
