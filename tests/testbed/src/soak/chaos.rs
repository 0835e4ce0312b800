//! What goes wrong.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use fastrand::Rng;
use futures::future::try_join_all;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, DeleteParams};
use tokio::time::{Instant, sleep};

use super::{Daemon, Parts};
use crate::operator::NAMESPACE;
use crate::postgres::SUPERUSER;
use crate::supervise::Signal;
use crate::wire::{Condition, Wire};

pub(super) struct Chaos {
    seed: u64,
    every: Duration,
    faults: Mutex<BTreeMap<&'static str, usize>>,
}

/// Whom something happens to.
#[derive(Clone, Copy)]
enum Victim {
    Operator(usize),
    Postgres,
    Cluster,
}

#[derive(Clone, Copy)]
enum Fault {
    Kill,
    Stop,
    Freeze,
    CutPostgres,
    SwallowPostgres,
    SlowPostgres,
    CutApiServer,
    SwallowApiServer,
    SlowApiServer,
    KillPostgres,
    EndSessions,
    KillApiServer,
    DeleteLease,
}

const OF_OPERATORS: [(Fault, &str); 9] = [
    (Fault::Kill, "an operator killed"),
    (Fault::Stop, "an operator told to stop"),
    (Fault::Freeze, "an operator frozen"),
    (Fault::CutPostgres, "an operator's connections to Postgres cut"),
    (Fault::SwallowPostgres, "an operator's connections to Postgres silent"),
    (Fault::SlowPostgres, "an operator's connections to Postgres slow"),
    (Fault::CutApiServer, "an operator's connections to the API server cut"),
    (Fault::SwallowApiServer, "an operator's connections to the API server silent"),
    (Fault::SlowApiServer, "an operator's connections to the API server slow"),
];
const OF_POSTGRES: [(Fault, &str); 2] =
    [(Fault::KillPostgres, "Postgres killed"), (Fault::EndSessions, "all sessions of Postgres ended")];
const OF_THE_CLUSTER: [(Fault, &str); 2] =
    [(Fault::KillApiServer, "the API server killed"), (Fault::DeleteLease, "the Lease deleted")];

impl Victim {
    fn faults(self) -> &'static [(Fault, &'static str)] {
        match self {
            Self::Operator(_) => &OF_OPERATORS,
            Self::Postgres => &OF_POSTGRES,
            Self::Cluster => &OF_THE_CLUSTER,
        }
    }
}

impl Chaos {
    pub(super) fn new(seed: u64, every: Duration) -> Self {
        Self { seed, every, faults: Mutex::default() }
    }

    /// What went wrong, and how often.
    pub(super) fn faults(&self) -> Vec<(&'static str, usize)> {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.iter().map(|(name, times)| (*name, *times)).collect()
    }

    /// Lets things go wrong with everybody side by side, until it is time; then all is as it was.
    pub(super) async fn reign(&self, parts: &Parts, until: Instant, tell: &impl Fn(&str)) -> Result<()> {
        let victims = [Victim::Operator(0), Victim::Operator(1), Victim::Postgres, Victim::Cluster];
        let all = (1..).zip(victims).map(|(number, victim)| async move {
            let mut rng = Rng::with_seed(self.seed.wrapping_mul(31).wrapping_add(number));
            while Instant::now() < until {
                sleep(self.every.mul_f64(rng.f64() * 2.0 * victims.len() as f64)).await;
                let Some((fault, name)) = rng.choice(victim.faults()) else { continue };
                tell(name);
                *self.faults.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += 1;
                strike(*fault, victim, parts, &mut rng).await?;
            }
            anyhow::Ok(())
        });
        try_join_all(all).await.map(drop)
    }
}

async fn strike(fault: Fault, victim: Victim, parts: &Parts, rng: &mut Rng) -> Result<()> {
    let daemon = &parts.operators[if let Victim::Operator(which) = victim { which } else { 0 }];
    let pause = Duration::from_millis(rng.u64(0..3000));
    // Long enough to lose the lease, every fourth time.
    let long = Duration::from_millis(rng.u64(500..16_000));
    match fault {
        Fault::Kill => daemon.killed(pause).await,
        Fault::Stop => {
            daemon.process.signal(Signal::TERM)?;
            daemon.process.ended().await?;
            sleep(pause).await;
            daemon.process.start().await.map(drop)
        }
        Fault::Freeze => {
            daemon.process.signal(Signal::STOP)?;
            sleep(long).await;
            daemon.process.signal(Signal::CONT)
        }
        Fault::KillPostgres => {
            parts.testbed.postgres.server().kill9().await?;
            sleep(pause).await;
            parts.testbed.postgres.restart().await
        }
        Fault::KillApiServer => {
            parts.testbed.control_plane.api_server().kill9().await?;
            sleep(pause).await;
            parts.testbed.control_plane.api_server().start().await?;
            parts.testbed.control_plane.ready().await
        }
        Fault::CutPostgres => bent(&daemon.to_postgres, Condition::Refuses, pause).await,
        Fault::SwallowPostgres => bent(&daemon.to_postgres, Condition::Swallows, long).await,
        Fault::SlowPostgres => bent(&daemon.to_postgres, Condition::Delays(pause / 10), long).await,
        Fault::CutApiServer => bent(&daemon.to_api_server, Condition::Refuses, pause).await,
        Fault::SwallowApiServer => bent(&daemon.to_api_server, Condition::Swallows, long).await,
        Fault::SlowApiServer => bent(&daemon.to_api_server, Condition::Delays(pause / 10), long).await,
        Fault::EndSessions => {
            let superuser = parts.database.connect_as(SUPERUSER).await?;
            let end = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() and datname = current_database()";
            superuser.execute(end, &[]).await.map(drop).map_err(Into::into)
        }
        Fault::DeleteLease => {
            let leases = Api::<Lease>::namespaced(parts.testbed.control_plane.client().await?, NAMESPACE);
            // It may not be there again yet.
            let _ = leases.delete("cyberdesk-operator", &DeleteParams::default()).await;
            Ok(())
        }
    }
}

impl Daemon {
    async fn killed(&self, pause: Duration) -> Result<()> {
        self.process.kill9().await?;
        sleep(pause).await;
        self.process.start().await.map(drop)
    }
}

async fn bent(wire: &Wire, condition: Condition, time: Duration) -> Result<()> {
    wire.set(condition);
    sleep(time).await;
    wire.set(Condition::Passes);
    Ok(())
}
