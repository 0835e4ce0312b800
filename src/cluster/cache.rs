//! What was last seen of one kind of object, by key.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::model::Seen;
use crate::names::Key;

/// A watch fills it; the answers to our own calls go in at once, so that the next look sees them.
///
/// The two come on different ways, so either may overtake the other. Of two versions of an object the later
/// one stays, and an answer cannot bring back what the watch has seen go.
#[derive(Debug)]
pub struct Cache<T> {
    state: Mutex<State<T>>,
    complete: watch::Sender<bool>,
}

/// Objects by key, each with its version.
pub(super) type Listing<T> = HashMap<Key, (u64, Arc<T>)>;

#[derive(Debug)]
struct State<T> {
    /// Each for itself: a map of all holds room for twice as many.
    objects: Listing<T>,
    /// The latest version that the watch has told of, of any object.
    newest: u64,
    /// What calls of ours have answered since a list was begun: it may be of before them. `None`: none is under way.
    learned: Option<HashSet<Key>>,
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        let state = State { objects: HashMap::new(), newest: 0, learned: None };
        Self { state: Mutex::new(state), complete: watch::Sender::new(false) }
    }
}

impl<T: Clone + PartialEq> Cache<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known. `Unknown` until the first list is complete.
    pub fn get(&self, key: &Key) -> Seen<T> {
        let state = self.state();
        match state.objects.get(key) {
            Some((_, object)) => Seen::Present(T::clone(object)),
            None if *self.complete.borrow() => Seen::Absent,
            None => Seen::Unknown,
        }
    }

    /// The watch tells of a version of an object. Answers whether anything that we read has changed by it.
    pub fn put(&self, key: &Key, version: u64, object: T) -> bool {
        let mut state = self.state();
        state.newest = state.newest.max(version);
        state.put(key, version, object)
    }

    /// A call of ours has answered with a version of an object.
    pub fn learn(&self, key: &Key, version: u64, object: T) {
        let mut state = self.state();
        if state.objects.contains_key(key) || version > state.newest {
            state.put(key, version, object);
            let is_latest = state.objects.get(key).is_some_and(|(latest, _)| *latest == version);
            if let Some(learned) = state.learned.as_mut().filter(|_| is_latest) {
                learned.insert(key.clone());
            }
        }
    }

    /// The watch tells that an object is gone, and which version went.
    pub fn remove(&self, key: &Key, version: u64) {
        let mut state = self.state();
        state.newest = state.newest.max(version);
        if state.objects.get(key).is_some_and(|(known, _)| *known <= version) {
            state.objects.remove(key);
        }
    }

    /// A call of ours has been answered that there is no such object.
    pub fn forget(&self, key: &Key) {
        self.state().objects.remove(key);
    }

    /// A list is begun.
    pub fn begin_list(&self) {
        self.state().learned = Some(HashSet::new());
    }

    /// An object to be listed: the one that there is, if it is the same, so that a new list takes no room of its own.
    pub(super) fn shared(&self, key: &Key, object: T) -> Arc<T> {
        let state = self.state();
        let known = state.objects.get(key).filter(|(_, known)| **known == object);
        known.map_or_else(|| Arc::new(object), |(_, known)| known.clone())
    }

    /// Takes in a complete list. Returns all keys whose object is another, new or gone.
    ///
    /// Of what a call of ours has answered meanwhile the later version stays. Of other objects the listed one does,
    /// whatever its version: after the API server's data was restored from a copy, versions are lower than before.
    pub fn replace(&self, mut objects: Listing<T>) -> Vec<Key> {
        let mut state = self.state();
        for key in state.learned.take().unwrap_or_default() {
            if let (Some(listed), Some(known)) = (objects.get_mut(&key), state.objects.get(&key))
                && known.0 > listed.0
            {
                *listed = known.clone();
            }
        }
        let first = !self.complete.send_replace(true);
        state.newest = objects.values().map(|(version, _)| *version).max().unwrap_or(0);
        let before = std::mem::replace(&mut state.objects, objects);
        let gone = before.keys().filter(|key| !state.objects.contains_key(*key));
        let there = state
            .objects
            .iter()
            .filter(|(key, (_, now))| first || before.get(*key).is_none_or(|(_, then)| then != now))
            .map(|(key, _)| key);
        gone.chain(there).cloned().collect()
    }

    /// Whether the first list is complete.
    pub fn is_complete(&self) -> bool {
        *self.complete.borrow()
    }

    /// Something of each object there is.
    pub fn map<U>(&self, of: impl Fn(&T) -> U) -> Vec<U> {
        self.state().objects.values().map(|(_, object)| of(object)).collect()
    }

    /// Waits for the first complete list.
    pub async fn completed(&self) {
        // The sender is here, so it is not gone.
        let _ = self.complete.subscribe().wait_for(|complete| *complete).await;
    }

    /// What this makes of each object, where it makes anything of it.
    pub fn each<R>(&self, of: impl Fn(&Key, &T) -> Option<R>) -> Vec<R> {
        self.state().objects.iter().filter_map(|(key, (_, object))| of(key, object)).collect()
    }

    /// All keys.
    pub fn keys(&self) -> Vec<Key> {
        self.state().objects.keys().cloned().collect()
    }
}

impl<T: PartialEq> State<T> {
    fn put(&mut self, key: &Key, version: u64, object: T) -> bool {
        match self.objects.get(key) {
            Some((newest, _)) if *newest > version => false,
            before => {
                let changed = before.is_none_or(|(_, before)| **before != object);
                self.objects.insert(key.clone(), (version, Arc::new(object)));
                changed
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new(name)
    }

    #[test]
    fn nothing_is_absent_before_a_complete_list() {
        let cache = Cache::<u8>::default();
        assert_eq!(cache.get(&key("a")), Seen::Unknown);
        cache.put(&key("b"), 1, 1);
        assert_eq!(cache.get(&key("b")), Seen::Present(1));
        cache.replace(HashMap::new());
        assert_eq!(cache.get(&key("a")), Seen::Absent);
        assert_eq!(cache.get(&key("b")), Seen::Absent);
    }

    #[test]
    fn an_older_version_does_not_replace_a_newer_one() {
        let cache = Cache::<u8>::default();
        assert!(cache.put(&key("a"), 5, 50));
        assert!(!cache.put(&key("a"), 4, 40));
        assert_eq!(cache.get(&key("a")), Seen::Present(50));
        assert!(!cache.put(&key("a"), 6, 50), "a version in which nothing changed for us is no news");
    }

    #[test]
    fn an_answer_does_not_bring_back_what_the_watch_saw_go() {
        let cache = Cache::<u8>::default();
        cache.replace(HashMap::new());
        cache.put(&key("a"), 5, 50);
        cache.remove(&key("a"), 7);
        cache.learn(&key("a"), 6, 60);
        assert_eq!(cache.get(&key("a")), Seen::Absent, "it was on its way while the watch told the end");
        cache.learn(&key("a"), 8, 80);
        cache.remove(&key("a"), 7);
        assert_eq!(cache.get(&key("a")), Seen::Present(80), "made anew, and the old one's end told again");
    }

    #[test]
    fn a_list_does_not_bring_back_what_an_answer_has_overtaken() {
        let cache = Cache::<u8>::default();
        let list = |version: u64, object: u8| HashMap::from([(key("a"), (version, Arc::new(object)))]);
        cache.replace(list(5, 50));
        cache.begin_list();
        cache.learn(&key("a"), 6, 60);
        assert_eq!(cache.replace(list(5, 50)), [], "it was read before the call");
        assert_eq!(cache.get(&key("a")), Seen::Present(60));
        cache.begin_list();
        cache.learn(&key("a"), 7, 70);
        assert_eq!(cache.replace(list(8, 80)), [key("a")], "it was read after the call, and after somebody else's");
        assert_eq!(cache.get(&key("a")), Seen::Present(80));
        cache.learn(&key("a"), 9, 90);
        cache.begin_list();
        assert_eq!(cache.replace(list(3, 30)), [key("a")], "the API server's data was restored");
        assert_eq!(cache.get(&key("a")), Seen::Present(30));
    }

    #[test]
    fn a_list_tells_what_is_new_other_or_gone() {
        let cache = Cache::<u8>::default();
        let list = |objects: &[(&str, u8)]| {
            objects.iter().map(|(name, value)| (key(name), (u64::from(*value), Arc::new(*value)))).collect()
        };
        let sorted = |mut keys: Vec<Key>| {
            keys.sort();
            keys
        };
        assert_eq!(sorted(cache.replace(list(&[("a", 1), ("b", 1), ("c", 1)]))), [key("a"), key("b"), key("c")]);
        let (same, other) = (cache.shared(&key("a"), 1), cache.shared(&key("a"), 2));
        assert!(Arc::ptr_eq(&same, &cache.shared(&key("a"), 1)) && *other == 2, "what is the same is kept once");
        assert_eq!(sorted(cache.replace(list(&[("a", 1), ("b", 2), ("d", 1)]))), [key("b"), key("c"), key("d")]);
    }
}
