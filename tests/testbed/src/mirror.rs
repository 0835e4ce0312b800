//! A mirror of one kind of object, fed by a watch and by the answers to our own writes.
//!
//! An answer to a write is as good as the watch event that will follow it, only earlier: a controller that has learnt
//! it does not act on the state before its own write. What must stay true: an object never goes back to an older
//! version, and one that the watch has seen deleted never comes back.

use futures::{Stream, StreamExt};
use kube::runtime::watcher::{Error, Event};
use kube::{Resource, ResourceExt};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::kubevirt::controller_uid;

/// Names an object of a known kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The object's namespace.
    pub namespace: String,
    /// The object's name.
    pub name: String,
}

impl Key {
    /// The key of this object.
    pub fn of<K: Resource>(object: &K) -> Self {
        Self { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The objects of one kind. Clones share the same content.
pub struct Mirror<K>(Arc<Mutex<Content<K>>>);

struct Content<K> {
    objects: HashMap<Key, Arc<K>>,
    /// Objects by the UID of their controlling owner.
    owned: HashMap<String, BTreeSet<Key>>,
    /// UIDs seen deleted: a late answer to a write must not bring them back.
    gone: HashSet<String>,
}

impl<K> Clone for Mirror<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K> Default for Mirror<K> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Content { objects: HashMap::new(), owned: HashMap::new(), gone: HashSet::new() })))
    }
}

impl<K: Resource> Mirror<K> {
    fn content(&self) -> MutexGuard<'_, Content<K>> {
        self.0.lock().expect("no holder of this lock panics")
    }

    /// The newest version we know of.
    pub fn get(&self, key: &Key) -> Option<Arc<K>> {
        self.content().objects.get(key).cloned()
    }

    /// The objects whose controlling owner has this UID.
    pub fn owned_by(&self, uid: &str) -> Vec<Arc<K>> {
        let content = self.content();
        let keys = content.owned.get(uid).into_iter().flatten();
        keys.filter_map(|key| content.objects.get(key).cloned()).collect()
    }

    /// Takes in an object that an API call answered with.
    pub fn learn(&self, object: K) {
        let mut content = self.content();
        if !object.meta().uid.as_ref().is_some_and(|uid| content.gone.contains(uid)) {
            content.put(object);
        }
    }

    fn forget(&self, object: &K) {
        let mut content = self.content();
        content.gone.extend(object.meta().uid.clone());
        let key = Key::of(object);
        if content.objects.get(&key).is_some_and(|held| held.meta().uid == object.meta().uid) {
            content.take_out(&key);
        }
    }

    /// Feeds the mirror from a watch for ever, and names the object after each event once it is in the mirror. An object
    /// that a complete list no longer holds is named too.
    pub async fn follow(self, watch: impl Stream<Item = Result<Event<K>, Error>>, changed: impl Fn(&K)) {
        // What a list lacks has vanished only if it was there when the list was asked for: an answer to a write of our own
        // may have come since.
        let (mut before, mut listed): (HashSet<Option<String>>, HashSet<Option<String>>) = Default::default();
        let mut watch = std::pin::pin!(watch);
        while let Some(event) = watch.next().await {
            match event {
                Ok(Event::Init) => {
                    listed.clear();
                    before = self.content().objects.values().map(|held| held.meta().uid.clone()).collect();
                }
                Ok(Event::InitApply(object)) => {
                    listed.insert(object.meta().uid.clone());
                    self.take_in(object, &changed);
                }
                Ok(Event::InitDone) => {
                    let vanished: Vec<Arc<K>> = {
                        let content = self.content();
                        let vanished = |uid: &Option<String>| before.contains(uid) && !listed.contains(uid);
                        content.objects.values().filter(|held| vanished(&held.meta().uid)).cloned().collect()
                    };
                    for object in vanished {
                        self.forget(&object);
                        changed(&object);
                    }
                }
                Ok(Event::Apply(object)) => self.take_in(object, &changed),
                Ok(Event::Delete(object)) => {
                    self.forget(&object);
                    changed(&object);
                }
                Err(error) => tracing::debug!(%error, "watch interrupted; it resumes by itself"),
            }
        }
    }

    fn take_in(&self, object: K, changed: &impl Fn(&K)) {
        let key = Key::of(&object);
        self.learn(object);
        if let Some(object) = self.get(&key) {
            changed(&object);
        }
    }
}

impl<K: Resource> Content<K> {
    fn put(&mut self, object: K) {
        let key = Key::of(&object);
        if let Some(held) = self.objects.get(&key) {
            if held.meta().uid == object.meta().uid && version(&**held) >= version(&object) {
                return;
            }
            self.take_out(&key);
        }
        if let Some(owner) = controller_uid(&object) {
            self.owned.entry(owner.to_owned()).or_default().insert(key.clone());
        }
        self.objects.insert(key, Arc::new(object));
    }

    fn take_out(&mut self, key: &Key) {
        let Some(object) = self.objects.remove(key) else {
            return;
        };
        if let Some(owner) = controller_uid(&*object)
            && let Some(keys) = self.owned.get_mut(owner)
        {
            keys.remove(key);
            if keys.is_empty() {
                self.owned.remove(owner);
            }
        }
    }
}

/// Versions of one object are comparable as numbers (guaranteed since Kubernetes 1.35).
fn version<K: Resource>(object: &K) -> u64 {
    object.meta().resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    fn pod(uid: &str, version: &str) -> Pod {
        let owner = json!({ "apiVersion": "v1", "kind": "X", "name": "x", "uid": "owner", "controller": true });
        let metadata = json!({ "namespace": "n", "name": "p", "uid": uid, "resourceVersion": version,
            "ownerReferences": [owner] });
        serde_json::from_value(json!({ "metadata": metadata })).expect("a pod")
    }

    fn held(mirror: &Mirror<Pod>) -> Option<(String, String)> {
        let pod = mirror.owned_by("owner").pop()?;
        Some((pod.uid()?, pod.resource_version()?))
    }

    #[tokio::test]
    async fn versions_only_go_forward_and_the_deleted_stay_away() {
        let mirror = Mirror::default();
        mirror.learn(pod("a", "10"));
        mirror.learn(pod("a", "9"));
        assert_eq!(held(&mirror), Some(("a".into(), "10".into())), "an older version is ignored");

        let events = [Ok(Event::Delete(pod("a", "11")))];
        mirror.clone().follow(futures::stream::iter(events), |_| ()).await;
        mirror.learn(pod("a", "10"));
        assert_eq!(held(&mirror), None, "a late answer does not bring it back");

        mirror.learn(pod("b", "12"));
        assert_eq!(held(&mirror), Some(("b".into(), "12".into())), "the next of that name is another object");

        let named = Mutex::new(Vec::new());
        let relist = [Ok(Event::Init), Ok(Event::InitDone)];
        mirror
            .clone()
            .follow(futures::stream::iter(relist), |pod: &Pod| named.lock().expect("lock").push(pod.uid()))
            .await;
        assert_eq!((held(&mirror), named.into_inner().expect("lock")), (None, vec![Some("b".into())]));
    }

    #[tokio::test]
    async fn what_was_made_while_all_was_listed_is_not_taken_for_gone() {
        let mirror = Mirror::default();
        let relist = futures::stream::iter([Ok(Event::Init), Ok(Event::InitDone)]).inspect(|event| {
            if matches!(event, Ok(Event::InitDone)) {
                mirror.learn(pod("a", "10"));
            }
        });
        mirror.clone().follow(relist, |_| ()).await;
        assert_eq!(held(&mirror), Some(("a".into(), "10".into())));
        mirror.clone().follow(futures::stream::iter([Ok(Event::Apply(pod("a", "11")))]), |_| ()).await;
        assert_eq!(held(&mirror), Some(("a".into(), "11".into())));
    }
}
