//! What was last seen of one kind of object, by key.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::model::Seen;
use crate::names::Key;

/// A watch fills it; the answers to our own writes go in at once, so that the next look sees them.
///
/// Of two versions of an object the later one stays, whichever way it came.
#[derive(Debug)]
pub struct Cache<T> {
    state: Mutex<State<T>>,
    complete: watch::Sender<bool>,
}

#[derive(Debug)]
struct State<T> {
    objects: HashMap<Key, (u64, T)>,
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        Self { state: Mutex::new(State { objects: HashMap::new() }), complete: watch::Sender::new(false) }
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
            Some((_, object)) => Seen::Present(object.clone()),
            None if *self.complete.borrow() => Seen::Absent,
            None => Seen::Unknown,
        }
    }

    /// Takes in a version of an object. Tells whether anything that we read has changed by it.
    pub fn put(&self, key: &Key, version: u64, object: T) -> bool {
        let mut state = self.state();
        match state.objects.get(key) {
            Some((newest, _)) if *newest > version => false,
            before => {
                let changed = before.is_none_or(|(_, before)| *before != object);
                state.objects.insert(key.clone(), (version, object));
                changed
            }
        }
    }

    /// Takes an object out. Tells whether it was there.
    pub fn remove(&self, key: &Key) -> bool {
        self.state().objects.remove(key).is_some()
    }

    /// Takes in a complete list. Returns all keys whose object is another, new or gone.
    pub fn replace(&self, objects: HashMap<Key, (u64, T)>) -> Vec<Key> {
        let mut state = self.state();
        let first = !self.complete.send_replace(true);
        let before = std::mem::replace(&mut state.objects, objects);
        let gone = before.keys().filter(|key| !state.objects.contains_key(*key));
        let there = state
            .objects
            .iter()
            .filter(|(key, (_, now))| first || before.get(*key).is_none_or(|(_, then)| then != now))
            .map(|(key, _)| key);
        gone.chain(there).cloned().collect()
    }

    /// Waits for the first complete list.
    pub async fn completed(&self) {
        // The sender is here, so it is not gone.
        let _ = self.complete.subscribe().wait_for(|complete| *complete).await;
    }

    /// All keys.
    pub fn keys(&self) -> Vec<Key> {
        self.state().objects.keys().cloned().collect()
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
    fn a_list_tells_what_is_new_other_or_gone() {
        let cache = Cache::<u8>::default();
        let list = |objects: &[(&str, u8)]| {
            objects.iter().map(|(name, value)| (key(name), (u64::from(*value), *value))).collect()
        };
        let sorted = |mut keys: Vec<Key>| {
            keys.sort();
            keys
        };
        assert_eq!(sorted(cache.replace(list(&[("a", 1), ("b", 1), ("c", 1)]))), [key("a"), key("b"), key("c")]);
        assert_eq!(sorted(cache.replace(list(&[("a", 1), ("b", 2), ("d", 1)]))), [key("b"), key("c"), key("d")]);
    }
}
