//! The database as a leader writes to it: the one place from which a fenced function is called.
//!
//! The fence refuses a term once the database knows of a later one. One that was restored to before that does not know
//! of it. So a leader does not rely on the fence alone: nothing is sent, and no answer is waited for, unless the Lease
//! is held just then. What was sent before is over within the role's `statement_timeout`, and a later leader's first
//! statement waits for it at the fence.

use deadpool_postgres::Pool;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::connect::{Param, query};
use crate::lease::{Tenure, Term};

/// Calls the functions that check the fence, for one term.
#[derive(Clone, Copy, Debug)]
pub struct Writer<'a> {
    pub(super) pool: &'a Pool,
    tenure: &'a Tenure,
    term: Term,
}

impl<'a> Writer<'a> {
    /// One for this term.
    pub fn new(pool: &'a Pool, tenure: &'a Tenure, term: Term) -> Self {
        Self { pool, tenure, term }
    }

    /// Runs one statement, with the term's epoch and token as its `$1` and `$2`. While the Lease is not held it waits;
    /// a statement under way when it is lost is given up, and may have been done all the same.
    pub(super) async fn query(&self, statement: &str, params: &[Param<'_>]) -> anyhow::Result<Vec<Row>> {
        let mut fenced: Vec<Param<'_>> = vec![(&self.term.epoch, Type::INT8), (&self.term.token, Type::UUID)];
        fenced.extend(params.iter().cloned());
        loop {
            self.tenure.held().await;
            if let Some(answer) = self.tenure.while_held(query(self.pool, statement, &fenced)).await {
                return answer;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::time::timeout;
    use uuid::Uuid;

    use super::*;
    use crate::database::connect::Target;

    #[tokio::test(start_paused = true)]
    async fn without_the_lease_it_does_not_even_ask_for_a_connection() {
        let nowhere = Target::from_url("postgres://u:p@127.0.0.1:1/d", None).expect("a URL");
        let pool = nowhere.pool(&Arc::default()).expect("a pool");
        let (term, lasts) = (Term { epoch: 1, token: Uuid::nil() }, Duration::from_secs(60));

        let held = Tenure::of(term, lasts);
        let asked = timeout(lasts, Writer::new(&pool, &held, term).query("select 1", &[])).await;
        assert!(asked.expect("it is tried").is_err(), "there is no database");

        let lost = Tenure::default();
        let waits = timeout(lasts, Writer::new(&pool, &lost, term).query("select 1", &[])).await;
        assert!(waits.is_err(), "it waits for the lease, and that is no trouble of the database's");
    }
}
