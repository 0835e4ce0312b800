//! The database's side: its schema, and every statement that is sent to it.

pub mod migrate;
