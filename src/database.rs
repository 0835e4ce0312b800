//! The database's side: connections, the rows as they were last read, and what is told back.

mod advice;
pub mod bond;
pub mod connect;
pub(crate) mod contact;
pub mod export;
pub(crate) mod housekeeping;
pub(crate) mod listen;
pub mod migrate;
pub mod outbox;
pub(crate) mod rows;
pub mod store;
mod tls;
mod url;
pub mod writeback;
pub mod writer;
