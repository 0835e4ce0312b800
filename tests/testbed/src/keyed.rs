//! One small loop per object: woken by hints, it looks and acts, then says when to look again.
//!
//! The level-triggered heart of the node and of the simulator. A key has at most one pass in flight; a hint that
//! arrives during a pass causes another one, and any number of hints cause only one. Passes of different keys run side
//! by side, as many at once as `width` allows, so that a thousand objects do not become a thousand simultaneous calls.

use futures::future::BoxFuture;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

/// When a key wants to be looked at again, hints aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Not before something changes.
    Rest,
    /// After this time at the latest.
    In(Duration),
    /// Never: the object is gone. A later hint starts afresh.
    Gone,
}

type Pass<K> = dyn Fn(K) -> BoxFuture<'static, Next> + Send + Sync;

/// The loops of all keys. Dropping it stops them.
pub struct Keyed<K> {
    pass: Arc<Pass<K>>,
    width: Arc<Semaphore>,
    loops: Arc<Mutex<HashMap<K, Arc<Hint>>>>,
    tasks: Mutex<JoinSet<()>>,
}

#[derive(Default)]
struct Hint {
    given: AtomicBool,
    wake: Notify,
}

impl Hint {
    fn give(&self) {
        self.given.store(true, Ordering::SeqCst);
        self.wake.notify_one();
    }

    /// Returns once a hint has been given since the last pass began.
    async fn taken(&self) {
        while !self.given.load(Ordering::SeqCst) {
            self.wake.notified().await;
        }
    }
}

impl<K: Clone + Eq + Hash + Send + Sync + 'static> Keyed<K> {
    /// Loops that run `pass`, at most `width` of them at once.
    pub fn new(width: usize, pass: impl Fn(K) -> BoxFuture<'static, Next> + Send + Sync + 'static) -> Self {
        Self {
            pass: Arc::new(pass),
            width: Arc::new(Semaphore::new(width)),
            loops: Arc::default(),
            tasks: Mutex::default(),
        }
    }

    /// Something may have changed for this key.
    pub fn hint(&self, key: K) {
        let mut loops = self.loops.lock().expect("no holder of this lock panics");
        if let Some(hint) = loops.get(&key) {
            return hint.give();
        }
        let hint = Arc::new(Hint::default());
        hint.give();
        loops.insert(key.clone(), hint.clone());
        drop(loops);

        let mut tasks = self.tasks.lock().expect("no holder of this lock panics");
        while tasks.try_join_next().is_some() {}
        tasks.spawn(turn(key, hint, self.pass.clone(), self.width.clone(), self.loops.clone()));
    }
}

async fn turn<K: Clone + Eq + Hash>(
    key: K,
    hint: Arc<Hint>,
    pass: Arc<Pass<K>>,
    width: Arc<Semaphore>,
    loops: Arc<Mutex<HashMap<K, Arc<Hint>>>>,
) {
    loop {
        let next = {
            let _permit = width.acquire().await;
            hint.given.store(false, Ordering::SeqCst);
            pass(key.clone()).await
        };
        match next {
            Next::Rest => hint.taken().await,
            Next::In(after) => drop(tokio::time::timeout(after, hint.taken()).await),
            Next::Gone => {
                let mut loops = loops.lock().expect("no holder of this lock panics");
                if !hint.given.load(Ordering::SeqCst) {
                    loops.remove(&key);
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use tokio::sync::mpsc;

    #[tokio::test]
    async fn a_hint_during_a_pass_causes_one_more_and_gone_ends_the_loop() {
        let (seen, mut passes) = mpsc::unbounded_channel();
        let (gate, gated) = mpsc::unbounded_channel::<Next>();
        let gated = Arc::new(tokio::sync::Mutex::new(gated));
        let keyed = Keyed::new(1, move |key: u8| {
            let (seen, gated) = (seen.clone(), gated.clone());
            async move {
                seen.send(key).expect("the test listens");
                gated.lock().await.recv().await.unwrap_or(Next::Gone)
            }
            .boxed()
        });
        keyed.hint(7);
        assert_eq!(passes.recv().await, Some(7));
        keyed.hint(7);
        keyed.hint(7);
        gate.send(Next::Rest).expect("waiting");
        assert_eq!(passes.recv().await, Some(7), "the hints given meanwhile cause one pass");
        gate.send(Next::In(Duration::from_secs(5))).expect("waiting");
        assert_eq!(passes.recv().await, Some(7), "the time it asked for");
        gate.send(Next::Gone).expect("waiting");
        while !keyed.loops.lock().expect("lock").is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(passes.try_recv().is_err(), "and no pass besides");
        keyed.hint(7);
        assert_eq!(passes.recv().await, Some(7), "a later hint starts afresh");
    }
}
