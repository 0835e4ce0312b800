//! A watch that lists all anew every so often, and after any trouble.

use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Error, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

/// How long one watch lives.
const WATCH_SECONDS: u32 = 30;
/// A watch that has said nothing for so long is dead, though its socket lives: a quiet one would have ended.
pub(super) const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);

/// Wait before all is listed anew because the version that a watch goes on from is not known any more.
const EXPIRED: Duration = Duration::from_secs(1);
/// Shortest and longest wait before it is after any other error. No back-off of kube's watcher is longer.
const QUIET: RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_secs(75);

/// What a watch met, and tries again.
pub(super) struct Trouble {
    pub(super) error: Error,
    /// Whether all was well before. The back-off repeats a trouble for as long as it lasts.
    pub(super) is_news: bool,
}

/// The events of a watch. One that loses events goes on after them as if it had told them; so all is listed anew every
/// so often.
pub(super) struct Relisting<K> {
    watch: Box<dyn Fn() -> Events<K> + Send + Sync>,
    events: Events<K>,
    period: Duration,
    /// When all is to be listed anew, whatever happens.
    regular: Instant,
    relist: Interval,
    listing: bool,
    trouble: Option<Instant>,
}

type Events<K> = BoxStream<'static, watcher::Result<Event<K>>>;

impl<K> Relisting<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    /// Of the objects that `fields` selects; an empty selector selects all.
    pub(super) fn new(api: Api<K>, fields: &str, period: Duration) -> Self {
        let config = watcher::Config::default().fields(fields).timeout(WATCH_SECONDS);
        let watch = Box::new(move || watcher(api.clone(), config.clone()).default_backoff().boxed());
        let regular = Instant::now() + period;
        let mut relist = interval_at(regular, period);
        relist.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { events: watch(), watch, period, regular, relist, listing: true, trouble: None }
    }

    /// The next event, or what it met. Nothing is lost if it is dropped.
    pub(super) async fn next(&mut self) -> Result<Event<K>, Trouble> {
        let event = loop {
            tokio::select! {
                event = self.events.next() => match event {
                    Some(event) => break event,
                    None => self.events = (self.watch)(),
                },
                _ = self.relist.tick(), if !self.listing => self.events = (self.watch)(),
            }
        };
        let event = event.map_err(|error| self.in_trouble(error))?;
        match event {
            // A list that was begun may still fail.
            Event::Init => self.listing = true,
            Event::InitApply(_) => (),
            Event::InitDone => {
                (self.trouble, self.listing) = (None, false);
                self.regular = Instant::now() + self.period;
                self.relist.reset_at(self.regular);
            }
            Event::Apply(_) | Event::Delete(_) => {
                if self.trouble.take().is_some() {
                    self.relist.reset_at(self.regular);
                }
            }
        }
        Ok(event)
    }

    fn in_trouble(&mut self, error: Error) -> Trouble {
        self.listing = false;
        let lasted = self.trouble.map(|since| since.elapsed());
        self.relist.reset_after(relist_after(&error, lasted.unwrap_or_default()));
        self.trouble.get_or_insert_with(Instant::now);
        Trouble { error, is_news: lasted.is_none() }
    }
}

/// When all is to be listed anew after an error, in a trouble that has lasted so long.
///
/// kube's watcher lists anew when a watch is told 410 in its stream, and not when its start is refused so. And it says
/// nothing when a watch goes on after an error: that is known when the list is there. While errors go on it is not due,
/// for between two of them there is at most twice the time that they have lasted, and that of a try.
fn relist_after(error: &Error, lasted: Duration) -> Duration {
    let is_expired = matches!(error, Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410);
    let quiet = lasted.saturating_add(EXPIRED).saturating_mul(2).clamp(*QUIET.start(), *QUIET.end());
    if is_expired { EXPIRED } else { quiet }
}
