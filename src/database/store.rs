//! The rows as they were last read: those that are not over, and those that ended and still have
//! something in the cluster to be cleared away.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::rows::Unreadable;
use crate::model::{Desired, Report, Row, RowStatus, Seen};
use crate::names::Key;
use crate::queue::{Lane, Queue};

/// What is remembered of the table. It is never the truth, only the last look at it.
#[derive(Debug, Default)]
pub struct Store {
    state: Mutex<State>,
    /// Rows of which nothing can be remembered.
    pub(crate) unreadable: Unreadable,
}

#[derive(Debug, Default)]
struct State {
    complete: bool,
    /// Each for itself: a map of all holds room for twice as many.
    rows: HashMap<Uuid, Box<Row>>,
}

/// What the store knows of a key without asking the database.
#[derive(Debug, PartialEq)]
pub enum Remembered {
    /// This row.
    Row(Box<Row>),
    /// No row can have this key.
    NotARow,
    /// Nothing: the database must be asked.
    Nothing(Uuid),
}

impl Store {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is remembered of this key's row.
    pub fn get(&self, key: &Key) -> Remembered {
        let Some(id) = key.row_id() else {
            return Remembered::NotARow;
        };
        self.state().rows.get(&id).map_or(Remembered::Nothing(id), |row| Remembered::Row(row.clone()))
    }

    /// Takes in rows just read, and wakes those that are news.
    pub fn take_in(&self, rows: Vec<Row>, queue: &Queue) {
        let mut state = self.state();
        for mut row in rows {
            // Reads may overtake each other and our own reports: a recorded VM stays recorded.
            let known_vm = state.rows.get(&row.id).and_then(|known| known.vm_uid.clone());
            row.vm_uid = row.vm_uid.or(known_vm);
            // What is wanted never goes back a generation.
            let news = match state.rows.get(&row.id) {
                Some(known) => {
                    known.generation < row.generation
                        || (known.generation == row.generation && **known != row && !known.ended)
                }
                None => !row.ended,
            };
            if news {
                queue.wake(&Key::of_row(row.id), lane_of_read(&row));
                state.rows.insert(row.id, Box::new(row));
            }
        }
    }

    /// Takes in the complete list of rows that are not over. Those that it lacks are to be asked for, and those whose
    /// generation is less than the one that is known, which is told with them: the list was overtaken, or the
    /// database has gone back, as in a failover that lost the last seconds.
    pub fn take_in_all(&self, rows: Vec<Row>, queue: &Queue) -> Vec<(Uuid, i64)> {
        let listed: HashMap<Uuid, i64> = rows.iter().map(|row| (row.id, row.generation)).collect();
        // Whatever was missed before: each is looked at.
        rows.iter().for_each(|row| queue.wake(&Key::of_row(row.id), lane_of_read(row)));
        self.take_in(rows, queue);
        let mut state = self.state();
        state.complete = true;
        let doubtful = |row: &Row| match listed.get(&row.id) {
            Some(generation) => *generation < row.generation,
            None => !row.ended,
        };
        state.rows.values().filter(|row| doubtful(row)).map(|row| (row.id, row.generation)).collect()
    }

    /// Takes in rows that were asked for as the list left them in doubt. What is still of an earlier generation than
    /// was known then is what the database has, unless something was learned meanwhile.
    pub fn take_in_doubtful(&self, rows: Vec<Row>, known: &[(Uuid, i64)], queue: &Queue) {
        let known: HashMap<Uuid, i64> = known.iter().copied().collect();
        let mut state = self.state();
        for row in &rows {
            let then = known.get(&row.id).copied();
            let now = state.rows.get(&row.id).map(|row| row.generation);
            if now == then && then.is_some_and(|then| row.generation < then) {
                state.rows.remove(&row.id);
            }
        }
        drop(state);
        self.take_in(rows, queue);
    }

    /// Takes in what the database has confirmed of a report.
    pub fn confirmed(&self, report: &Report, queue: &Queue) {
        let mut state = self.state();
        let Some(row) = state.rows.get_mut(&report.id) else {
            return;
        };
        row.observed_generation = row.observed_generation.max(report.generation);
        row.vm_uid = row.vm_uid.take().or_else(|| report.vm_uid.clone());
        if let Some(status) = report.status.filter(|_| matches!(row.status, RowStatus::Pending | RowStatus::Running)) {
            row.status = status;
        }
        if let Some(message) = report.message.as_ref().filter(|_| row.desired == Desired::Present) {
            row.message = Some(message.clone()).filter(|message| !message.is_empty());
        }
        if report.ended {
            row.ended = true;
            row.desired = Desired::Absent;
        }
        queue.wake(&Key::of_row(row.id), lane(row));
    }

    /// Drops what is remembered of a row that is over, or that the database no longer has.
    pub fn forget(&self, id: Uuid) {
        self.state().rows.remove(&id);
    }

    /// Drops everything: it may be older than what the leader before has done. Until all is read anew, nothing is
    /// known of any row.
    pub fn reset(&self) {
        *self.state() = State::default();
    }

    /// Whether the list was ever complete.
    pub fn is_complete(&self) -> bool {
        self.state().complete
    }

    /// A row that was asked for by itself.
    pub fn found(&self, id: Uuid, row: Option<Row>) -> Seen<Row> {
        match row {
            Some(row) => {
                if !row.ended {
                    self.state().rows.insert(id, Box::new(row.clone()));
                }
                Seen::Present(row)
            }
            None => Seen::Absent,
        }
    }
}

/// Of a row of which something has become known.
fn lane(row: &Row) -> Lane {
    match row.desired {
        Desired::Absent => Lane::Ends,
        Desired::Present => Lane::Makes,
    }
}

/// Of a row that was read. If somebody has acted on what it wants, it is looked at because all are.
fn lane_of_read(row: &Row) -> Lane {
    match lane(row) {
        Lane::Makes if row.observed_generation >= row.generation => Lane::Looks,
        lane => lane,
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    fn row(id: u128, generation: i64, observed_generation: i64, desired: Desired) -> Row {
        Row {
            id: Uuid::from_u128(id),
            exists: true,
            user_id: Uuid::nil(),
            desired,
            reason: None,
            message: None,
            expires_at: Timestamp::MAX,
            timeout_at: Timestamp::MAX,
            created_at: Timestamp::UNIX_EPOCH,
            changed_at: Timestamp::UNIX_EPOCH,
            generation,
            observed_generation,
            params: None,
            status: RowStatus::Pending,
            vm_uid: None,
            ended: false,
            paused: false,
        }
    }

    #[test]
    fn a_database_that_has_lost_the_last_seconds_is_believed_once_it_was_asked_again() {
        let (store, queue) = (Store::default(), Queue::default());
        let (before, after) = (row(1, 6, 6, Desired::Present), row(1, 5, 4, Desired::Absent));
        let known = |store: &Store| match store.get(&Key::of_row(before.id)) {
            Remembered::Row(row) => row.generation,
            other => panic!("{other:?}"),
        };
        store.take_in(vec![before.clone()], &queue);
        store.take_in(vec![after.clone()], &queue);
        assert_eq!(known(&store), 6, "a read may have been overtaken");
        let doubtful = store.take_in_all(vec![after.clone()], &queue);
        assert_eq!(doubtful, [(before.id, 6)]);
        store.take_in_doubtful(vec![after.clone()], &doubtful, &queue);
        assert_eq!(known(&store), 5);
        assert_eq!(store.take_in_all(vec![after.clone()], &queue), []);

        store.take_in(vec![row(1, 7, 7, Desired::Present)], &queue);
        let doubtful = store.take_in_all(vec![after.clone()], &queue);
        store.take_in(vec![row(1, 8, 7, Desired::Present)], &queue);
        store.take_in_doubtful(vec![after], &doubtful, &queue);
        assert_eq!(known(&store), 8, "something was learned while it was asked");
    }

    #[test]
    fn of_all_rows_those_that_nobody_has_acted_on_go_before_those_that_are_only_read() {
        let (store, queue) = (Store::default(), Queue::default());
        queue.open();
        let all = [(1, 1, 1), (2, 1, 0), (3, 2, 1)].map(|(id, wish, acted)| row(id, wish, acted, Desired::Present));
        store.take_in_all([all.as_slice(), &[row(4, 2, 2, Desired::Absent)]].concat(), &queue);
        let depth = |lane| queue.waiting(lane).0;
        assert_eq!([depth(Lane::Ends), depth(Lane::Makes), depth(Lane::Looks)], [1, 2, 1]);
    }
}
