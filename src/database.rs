//! The database's side: connections, the rows as they were last read, and what is told back.

pub mod connect;
pub(crate) mod housekeeping;
pub(crate) mod listen;
pub mod migrate;
pub mod outbox;
pub(crate) mod rows;
pub mod store;
pub mod writeback;
