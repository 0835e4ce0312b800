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
