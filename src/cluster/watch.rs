//! The watches: each kind has a task and a back-off of its own. An event carries nothing to the
//! decision but the key of a desktop to look at.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use futures::StreamExt;
use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Error, Event, watcher};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tracing::{info, warn};

use super::cache::Cache;
use super::objects::{Observed, version};
use crate::queue::{Lane, Queue};

/// How long one watch lives.
pub(super) const WATCH_SECONDS: u32 = 30;
/// A watch that has said nothing for so long is dead, though its socket lives: a quiet one would have ended.
pub(super) const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);

/// Wait before all is listed anew because the version that a watch goes on from is not known any more.
pub(super) const EXPIRED: Duration = Duration::from_secs(1);
/// Shortest and longest wait before it is after any other error. No back-off of kube's watcher is longer.
const QUIET: RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_secs(75);

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
    let period = relist;
    let mut regular = Instant::now() + period;
    let mut relist = interval_at(regular, period);
    relist.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut list = HashMap::new();
    let (mut trouble, mut listing, mut listed) = (None::<Instant>, true, false);
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            _ = relist.tick(), if !listing => {
                events = watch();
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
                if trouble.is_some() || !listed {
                    info!(%kind, "listed");
                }
                (trouble, listing, listed) = (None, false, true);
                regular = Instant::now() + period;
                relist.reset_at(regular);
            }
            Ok(Event::Apply(object)) => {
                if trouble.take().is_some() {
                    relist.reset_at(regular);
                }
                let (Some(key), seen) = (object.key(), object.seen()) else {
                    continue;
                };
                let lane = K::lane(&seen);
                if cache.put(&key, version(object.meta()), seen) {
                    queue.wake(&key, lane);
                }
            }
            Ok(Event::Delete(object)) => {
                if trouble.take().is_some() {
                    relist.reset_at(regular);
                }
                if let Some(key) = object.key() {
                    cache.remove(&key, version(object.meta()));
                    queue.wake(&key, Lane::Ends);
                }
            }
            Err(error) => {
                listing = false;
                let lasted = trouble.map(|since| since.elapsed());
                relist.reset_after(relist_after(&error, lasted.unwrap_or_default()));
                trouble.get_or_insert_with(Instant::now);
                // Once per trouble: the back-off repeats it for as long as it lasts.
                if lasted.is_some() {
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

/// When all is to be listed anew after an error, in a trouble that has lasted so long.
///
/// kube's watcher lists anew when a watch is told 410 in its stream, and not when its start is refused so. And it says
/// nothing when a watch goes on after an error: that is known when the list is there. While errors go on it is not due,
/// for between two of them there is at most twice the time that they have lasted, and that of a try.
fn relist_after(error: &Error, lasted: Duration) -> Duration {
    let quiet = lasted.saturating_add(EXPIRED).saturating_mul(2).clamp(*QUIET.start(), *QUIET.end());
    if is_expired(error) { EXPIRED } else { quiet }
}

/// The start of a watch was refused, as the version that it was to go on from is not known any more.
pub(super) fn is_expired(error: &Error) -> bool {
    matches!(error, Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
}
