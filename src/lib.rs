//! `cyberdesk-operator`: keeps a fleet of virtual desktops true to a Postgres table.
mod act;
pub mod cli;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod crd;
pub mod database;
pub mod model;
pub mod names;
pub mod operator;
pub mod plan;
pub mod queue;
pub mod reason;
pub mod telemetry;
pub mod template;
