//! The bound pair: how a daemon judges it, databases that take each other's place, and a person's word.

use cyberdesk_operator::brake::{self, Missing, Verdict, judge};
use cyberdesk_operator::lease::Term;
use cyberdesk_operator::model::Cr;
use jiff::Timestamp;
use uuid::Uuid;

use crate::daemon::Pair;
use crate::database::Database;
use crate::planted::Bug;
use crate::processes::CLUSTER;
use crate::world::{ROWS, Told, World, person};

impl World {
    /// Judges the pair, as the leader does at the begin of a term, in doubt, and every so often.
    pub(crate) fn judges(&mut self, at: usize) -> Told {
        let missing = Missing { strangers: self.strangers(), ..Missing::default() };
        let Some(daemon) = self.processes[at].runs().filter(|_| self.database_away.is_none() && !self.api_away) else {
            return Ok(None);
        };
        let Some((term, _)) =
            daemon.term.filter(|(term, _)| self.lease.holder == Some(at) && self.lease.epoch == term.epoch)
        else {
            return Ok(None);
        };
        // What was agreed on is written down first.
        if matches!(daemon.pair, Pair::Agreed { .. }) && daemon.admits(&self.database) {
            return Ok(None);
        }
        let (database, cluster) = (self.database.side(), self.lease.side(term));
        let verdict = judge(&database, &cluster, missing);
        if verdict == Verdict::Bound && daemon.pair == Pair::Right && daemon.admits(&self.database) {
            return Ok(None);
        }
        if self.bug != Some(Bug::NoBrake)
            && self.aside.is_some()
            && matches!(verdict, Verdict::Bound | Verdict::Bind { confirmed: false })
        {
            return Err("the wrong database is taken for the right one".to_owned());
        }
        let verdict = if self.bug == Some(Bug::NoBrake) { Verdict::Bound } else { verdict };
        daemon.judged(verdict, &self.database, |cause| brake::confirmation(cause, &database, &cluster, missing));
        if verdict == (Verdict::Bind { confirmed: true }) {
            // What a person says is right is right.
            self.aside = None;
            self.forget_what_was_seen();
        }
        self.count(format!("{verdict:?}"));
        Ok(Some(format!("{} judges: {verdict:?}", person(at))))
    }

    pub(crate) fn strangers(&self) -> usize {
        let of_another = |cr: &Cr| cr.database.is_some_and(|database| database != self.database.itself.id);
        self.cluster.crs.objects.values().filter(|(_, cr)| of_another(cr)).count()
    }

    /// Writes down on both sides what was agreed on.
    pub(crate) fn binds(&mut self, at: usize, term: Term, confirmed: bool) -> Option<String> {
        let holds = !self.api_away && self.lease.holder == Some(at) && self.lease.epoch == term.epoch;
        let daemon = self.processes[at].runs()?;
        if self.database.bind(term, CLUSTER, confirmed).is_err() {
            daemon.pair = Pair::default();
            return Some(format!("{} may not bind", person(at)));
        }
        if !holds {
            return Some(format!("{} binds the database, and cannot reach the Lease", person(at)));
        }
        self.lease.bond = Some((self.database.itself.clone(), term.epoch));
        daemon.expected = self.lease.bond.clone();
        daemon.bound();
        self.lease.confirmation = None;
        if confirmed {
            self.lease.confirmed_at = Some(Timestamp::from_second(1_800_000_000).expect("a time"));
        }
        Some(format!("{} binds database and cluster", person(at)))
    }

    /// Another database comes to be where the right one was, or that one is back.
    pub(crate) fn swaps(&mut self, how: u32) -> Option<String> {
        if let Some((right, ids)) = self.aside.take() {
            (self.database, self.ids) = (right, ids);
            self.forget_what_was_seen();
            return Some("the right database is back".to_owned());
        }
        let earlier = self.earlier.replace(self.database.clone());
        // For the most part, the right one is there.
        if !how.is_multiple_of(4) {
            return None;
        }
        // Of one that was confirmed just now and knows of no term yet, nothing can tell that it has gone back.
        let bond = self.lease.bond.as_ref().filter(|(database, _)| *database == self.database.itself);
        let accepted = bond.map_or(0, |(_, epoch)| *epoch);
        let mine = |database: &Database| database.itself.id == self.database.itself.id;
        self.databases += 1;
        let oid = i64::try_from(self.databases).expect("a few");
        let renamed =
            |database: Database| Database { itself: brake::Database { oid, ..database.itself.clone() }, ..database };
        let (other, what) = match how / 4 % 8 {
            0 | 1 => (renamed(self.database.clone()), "a clone"),
            2 => (renamed(earlier.filter(mine)?), "a copy from before"),
            3..=5 => {
                (earlier.filter(mine).filter(|earlier| earlier.epoch() < accepted)?, "the same, restored to before")
            }
            _ => {
                let id = Uuid::from_u128(0xdb00 + u128::from(self.databases));
                let itself = brake::Database { id, system: "server".to_owned(), oid };
                (Database { itself, ..Database::default() }, "an empty one")
            }
        };
        self.last_ids += u128::from(ROWS);
        let right = (std::mem::replace(&mut self.database, other), std::mem::replace(&mut self.ids, self.last_ids));
        self.aside = Some(right);
        self.forget_what_was_seen();
        self.count(what);
        Some(format!("in the database's place there is {what}"))
    }

    /// What was witnessed of rows is no measure of another database; of the cluster it is as true as before.
    pub(crate) fn forget_what_was_seen(&mut self) {
        self.seen.statuses.clear();
        self.seen.absent.clear();
        self.ended_by_the_cr.clear();
    }

    /// A person confirms what is asked, by SQL or by kubectl.
    pub(crate) fn confirms(&mut self, how: u32) -> Option<String> {
        let asked = self.processes.iter_mut().find_map(|process| match &process.runs()?.pair {
            Pair::Braked(asked) => Some(asked.clone()),
            _ => None,
        })?;
        let by_sql = how & 1 == 0;
        let place = if by_sql { &mut self.database.confirmation } else { &mut self.lease.confirmation };
        *place = Some(asked.clone());
        Some(format!("a person confirms {asked} by {}", if by_sql { "SQL" } else { "kubectl" }))
    }
}
