//! `cyberdesk-operator`: keeps a fleet of virtual desktops true to a Postgres table.
//!
//! ```text
//!  app ── insert, update ──▶ public.cyberdesk_instances ── trigger ──▶ cyberdesk.desktop (desired, generation)
//!                                      ▲                                      │ NOTIFY: a hint, without data
//!                        write-back    │                                      ▼
//!                  (batched, fenced)   └── act ◀── plan ◀── look: row, CR, VM, VMI ◀── watch ──┐
//!                                           │                                                  │
//!                                           └──▶ Cyberdesk CR, Secret, VirtualMachine ──▶ KubeVirt ──▶ VMI
//! ```
//!
//! Data flows one way round. Whatever wakes a desktop (a notification, a watch event, a timer) carries nothing
//! but its key; what is done follows from a fresh look alone. In reading order:
//!
//! | module | what it is |
//! |---|---|
//! | [`names`] | a desktop's key, the names made of it, and the marks by which an object is ours |
//! | [`model`] | plain data: what is known of a desktop on each side; "could not see" is not "is not there" |
//! | [`reason`] | why a desktop ends, or is not ready: one table of stable words |
//! | [`fleet`] | the starts of all desktops together: is one stuck, or the cluster; does KubeVirt keep up |
//! | [`plan`] | decides: a view and the time in, actions out; pure, and the heart of the program |
//! | [`template`] | reads VM templates and renders a VM's manifests; pure |
//! | [`queue`] | which desktop is looked at next: keyed, ends before makes |
//! | [`lease`] | who leads: one daemon at a time, none after its time |
//! | [`brake`] | whether database and cluster belong together, or a person must say so; pure |
//! | [`operator`] | the daemon: sources wake keys, workers look, plan and act |
//! | `act` | the hands: one match from an action to one call |
//! | [`cluster`] | the API server: a tamed client, watches and their caches, the calls that write |
//! | [`database`] | Postgres: connections, LISTEN, rows as last read, the write-back, migrations |
//! | [`crd`] | the `Cyberdesk` custom resource |
//! | [`clock`] | the database's and the API server's time, never this machine's |
//! | [`doctor`] | what is wrong with this installation, why it matters, and what mends it |
//! | [`health`], [`metrics`], `http` | whether the daemon is well, its figures, and how both are served |
//! | [`survey`] | both sides as they are now, read once: for `status` and `diff` |
//! | `adopt` | what the Kopf operator before this one made: what is whose; pure |
//! | [`config`], [`telemetry`], [`events`], [`cli`] | settings, logs, Events, the command line |

mod act;
mod adopt;
pub mod brake;
pub mod cli;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod crd;
pub mod database;
pub mod doctor;
pub mod events;
pub mod fleet;
pub mod health;
mod http;
pub mod lease;
pub mod metrics;
pub mod model;
pub mod names;
pub mod operator;
pub mod plan;
pub mod queue;
pub mod reason;
pub mod survey;
pub mod telemetry;
pub mod template;
