//! `cyberdesk-operator`: keeps a fleet of virtual desktops true to a Postgres table.
pub mod crd;
pub mod database;
pub mod model;
pub mod names;
pub mod plan;
pub mod queue;
pub mod reason;
pub mod template;
