//! Killed at every point between two effects, the operator comes to the same end.
//!
//! An effect is a call that changes the cluster or a statement that changes the database: what lies between two of
//! them is lost with the process and seen by nobody. A proxy on either side holds an effect, the operator is killed
//! with SIGKILL, and another is started; the held effect is lost, or has been done and was never heard of, or lands
//! after the other began, or after all is over. Many desktops are held at once, each at a point of its own.
//!
//! [`Life::calls`] and the lists beside it name all effects. A life that is not disturbed is recorded first: an effect that is not in the list
//! fails the test, and so does a point in the list that no operator comes to.

mod lives;

use std::collections::BTreeSet;
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, bail, ensure};
use cyberdesk_testbed::api_proxy::{ApiProxy, Fault};
use cyberdesk_testbed::gate::{Gate, Verdict};
use cyberdesk_testbed::statement_proxy::{Statement, StatementProxy, When};
use futures::future::try_join_all;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, DeleteParams};
use uuid::Uuid;

use lives::{HOUSEKEEPING, LIVES, Life, MAKING, OF_THE_TERM, READS, REPORTS, is_about, of_call, of_statement};

use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    // Thirty desktops at once are work enough for a machine.
    vec![
        story("crashes: the list of all effects is complete", every_effect_is_listed),
        story("crashes: killed at each call, which is lost", calls_lost).alone(),
        story("crashes: killed at each call, which was done unheard", calls_unheard).alone(),
        story("crashes: killed at each call, which lands late", calls_late).alone(),
        story("crashes: killed at each call, which lands when all is over", calls_stale).alone(),
        story("crashes: killed at each statement, which is lost", statements_lost),
        story("crashes: killed at each statement, which was run unheard", statements_unheard),
        story("crashes: killed at each statement, which runs late", statements_late),
        story("crashes: killed at each statement, which runs when all is over", statements_stale),
    ]
}

async fn calls_lost(world: &World) -> Result<()> {
    calls(world, Fate::Lost).await
}

async fn calls_unheard(world: &World) -> Result<()> {
    calls(world, Fate::Unheard).await
}

async fn calls_late(world: &World) -> Result<()> {
    calls(world, Fate::Late).await
}

async fn calls_stale(world: &World) -> Result<()> {
    calls(world, Fate::Stale).await
}

async fn statements_lost(world: &World) -> Result<()> {
    statements(world, Fate::Lost).await
}

async fn statements_unheard(world: &World) -> Result<()> {
    statements(world, Fate::Unheard).await
}

async fn statements_late(world: &World) -> Result<()> {
    statements(world, Fate::Late).await
}

async fn statements_stale(world: &World) -> Result<()> {
    statements(world, Fate::Stale).await
}

/// What becomes of the effect at which the operator is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It never gets there.
    Lost,
    /// It was done, and the answer was on its way.
    Unheard,
    /// It gets there when the next operator has begun.
    Late,
    /// It gets there when everything is over.
    Stale,
}

impl Fate {
    fn when(self) -> When {
        if self == Self::Unheard { When::After } else { When::Before }
    }

    fn fault(self, gate: &Gate) -> Fault {
        match self.when() {
            When::Before => Fault::HeldBefore(gate.clone()),
            When::After => Fault::HeldAfter(gate.clone()),
        }
    }
}

/// Both sides of an operator, with a proxy before each.
struct Sides {
    cluster: ApiProxy,
    database: StatementProxy,
}

impl Sides {
    /// Starts the proxies, and has the operator's settings lead through them.
    async fn of(world: &World) -> Result<(Self, Vec<(&'static str, String)>)> {
        let testbed = &world.parts.testbed;
        let cluster = ApiProxy::start(&testbed.control_plane).await?;
        let database = StatementProxy::start(&testbed.postgres).await?;
        let settings = vec![
            ("KUBECONFIG", world.through(&cluster)?),
            ("DATABASE_URL", database.url(&testbed.postgres, &world.database.url("cyberdesk_daemon"))),
            // Held calls take places; there are as many as wanted.
            ("CYBERDESK_CONCURRENCY", "500".to_owned()),
            ("CYBERDESK_MAX_UNSTARTED", "500".to_owned()),
        ];
        Ok((Self { cluster, database }, settings))
    }
}

async fn start(world: &World, settings: &[(&'static str, String)]) -> Result<()> {
    let settings: Vec<_> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    world.start_operator(&settings).await
}

async fn every_effect_is_listed(world: &World) -> Result<()> {
    let (sides, settings) = Sides::of(world).await?;
    start(world, &settings).await?;
    let mut met = BTreeSet::new();
    for life in LIVES {
        let (name, begun) = (life.name(), sides.cluster.log().len());
        life.live(world, &name).await?;
        world.until("nothing is left", async || Ok(world.left().await?.is_empty())).await?;
        audit(world, &sides, life, &name, Fate::Lost).await?;
        let mut made = 0;
        for passed in sides.cluster.log()[begun..].iter().filter(|passed| passed.call.writes()) {
            let mut effect = of_call(&passed.call);
            made += usize::from(effect == MAKING[0]);
            if effect == MAKING[0] && made > 1 {
                effect.push_str(" again");
            }
            let listed = OF_THE_TERM.iter().chain(&MAKING).chain(life.calls()).any(|listed| *listed == effect);
            let tail = Life::Requested.calls().contains(&effect.as_str());
            // An Event that is lost is lost: nothing follows from it.
            ensure!(
                listed || tail || effect.starts_with("create events"),
                "{life:?}: {effect:?} is an effect at which nobody was killed yet: list it"
            );
        }
        met.extend(sides.database.log().iter().filter_map(of_statement));
    }
    let reports = REPORTS.iter().map(|(_, effect)| effect);
    let listed: BTreeSet<_> = reports.chain(&HOUSEKEEPING).chain(&READS).map(|effect| (*effect).to_owned()).collect();
    let unknown: Vec<_> = met.difference(&listed).collect();
    ensure!(unknown.is_empty(), "{unknown:?}: statements at which nobody was killed yet: list them");
    Ok(())
}

/// A desktop, and the effect at which the operator is to be killed.
struct Held {
    life: Life,
    name: String,
    point: &'static str,
    gate: Gate,
}

impl Held {
    fn new(life: Life, point: &'static str) -> Self {
        Self { life, name: life.name(), point, gate: Gate::default() }
    }

    /// Has its call held, however often it is tried.
    fn arm(&self, proxy: &ApiProxy, fate: Fate) {
        let (point, name) = (self.point, self.name.clone());
        let (effect, again) = point.strip_suffix(" again").map_or((point, false), |effect| (effect, true));
        let met = AtomicUsize::new(0);
        proxy.always(fate.fault(&self.gate), move |call| {
            let is_it = call.writes() && is_about(call, &name) && of_call(call) == effect;
            is_it && (met.fetch_add(1, Ordering::Relaxed) > 0 || !again)
        });
    }

    /// The same for a statement that tells of its row.
    fn arm_statement(&self, proxy: &StatementProxy, fate: Fate) {
        let (point, id) = (self.point, Uuid::parse_str(&self.name).unwrap_or_default());
        proxy.hold(fate.when(), &self.gate, move |statement| {
            let ids = statement.array(2);
            of_statement(statement).as_deref() == Some(point) && ids.contains(&Some(id.as_bytes().to_vec()))
        });
    }

    /// The same for a call or a statement that is of no desktop.
    fn arm_term(&self, sides: &Sides, fate: Fate) {
        let point = self.point;
        if OF_THE_TERM.contains(&point) {
            sides.cluster.always(fate.fault(&self.gate), move |call| of_call(call) == point);
        } else {
            let is_it = move |statement: &Statement| of_statement(statement).as_deref() == Some(point);
            sides.database.hold(fate.when(), &self.gate, is_it);
        }
    }
}

async fn calls(world: &World, fate: Fate) -> Result<()> {
    let (sides, settings) = Sides::of(world).await?;
    let held: Vec<Held> =
        LIVES.into_iter().flat_map(|life| life.points().into_iter().map(move |point| Held::new(life, point))).collect();
    held.iter().for_each(|held| held.arm(&sides.cluster, fate));
    start(world, &settings).await?;
    let lives = try_join_all(held.iter().map(|held| held.life.live(world, &held.name)));
    tokio::try_join!(lives, crash(world, &sides, fate, &held))?;
    settle(world, fate, &held).await?;
    let nothing = async || {
        let left = world.left().await?;
        let whose = held.iter().filter(|held| left.iter().any(|object| object.contains(&held.name)));
        let whose: Vec<_> = whose.map(|held| (held.life, held.point)).collect();
        ensure!(left.is_empty(), "of {whose:?} there is still {left:?}");
        Ok(true)
    };
    world.until("nothing is left", nothing).await?;
    for held in &held {
        audit(world, &sides, held.life, &held.name, fate).await?;
    }
    Ok(())
}

async fn statements(world: &World, fate: Fate) -> Result<()> {
    let (sides, settings) = Sides::of(world).await?;
    // Written once, when the templates are first taken into use.
    let first = Held::new(Life::Requested, "patch configmaps");
    first.arm_term(&sides, fate);
    start(world, &settings).await?;
    killed_in_a_term(world, &sides, fate, &first).await?;
    for (life, effect) in REPORTS {
        let held = Held::new(life, effect);
        held.arm_statement(&sides.database, fate);
        tokio::try_join!(life.live(world, &held.name), crash(world, &sides, fate, slice::from_ref(&held)))?;
        settle(world, fate, slice::from_ref(&held)).await?;
        audit(world, &sides, life, &held.name, fate).await?;
    }
    for effect in ["create leases", "update leases"].into_iter().chain(HOUSEKEEPING) {
        let held = Held::new(Life::Requested, effect);
        let operator = world.kill_operator().await?;
        if effect == "create leases" {
            let leases: Api<Lease> = Api::namespaced(world.parts.client.clone(), &world.namespace);
            leases.delete("cyberdesk-operator", &DeleteParams::default()).await?;
        }
        held.arm_term(&sides, fate);
        world.revive_operator(operator).await?;
        killed_in_a_term(world, &sides, fate, &held).await?;
    }
    world.until("nothing is left", async || Ok(world.left().await?.is_empty())).await
}

/// Kills the operator at an effect that is of no desktop, and has one live afterwards.
async fn killed_in_a_term(world: &World, sides: &Sides, fate: Fate, held: &Held) -> Result<()> {
    crash(world, sides, fate, slice::from_ref(held)).await?;
    held.life.live(world, &held.name).await?;
    settle(world, fate, slice::from_ref(held)).await?;
    audit(world, sides, held.life, &held.name, fate).await
}

/// Kills the operator when all is held, and starts another.
async fn crash(world: &World, sides: &Sides, fate: Fate, held: &[Held]) -> Result<()> {
    let all = async || match held.iter().find(|held| held.gate.held().is_empty()) {
        Some(missing) => bail!("{:?} {:?} is yet to come", missing.life, missing.point),
        None => Ok(true),
    };
    world.until("every effect is held", all).await?;
    let operator = world.kill_operator().await?;
    sides.cluster.lift_all();
    sides.database.lift();
    let open = |verdict| held.iter().for_each(|held| held.gate.open(verdict));
    let terms = async || world.count("select cyberdesk.fence_epoch()").await;
    let before = terms().await?;
    if matches!(fate, Fate::Lost | Fate::Unheard) {
        open(Verdict::Lost);
    }
    world.revive_operator(operator).await?;
    if fate == Fate::Late {
        world.until("the next one leads", async || Ok(terms().await? > before)).await?;
        open(Verdict::Lands);
    }
    Ok(())
}

/// Waits until what is to land has landed.
async fn settle(world: &World, fate: Fate, held: &[Held]) -> Result<()> {
    if !matches!(fate, Fate::Late | Fate::Stale) {
        return Ok(());
    }
    // A Secret that comes when its desktop is over goes with the next sweep: `a Secret that comes` tells of that.
    let lands = |held: &&Held| fate == Fate::Late || held.point != "create secrets";
    held.iter().filter(lands).for_each(|held| held.gate.open(Verdict::Lands));
    let landed = async || Ok(held.iter().filter(lands).all(|held| held.gate.landed() >= held.gate.held().len()));
    world.until("all has landed", landed).await
}

/// One VM was made for a desktop, and what is told of it is what became of it, each thing once.
async fn audit(world: &World, sides: &Sides, life: Life, name: &str, fate: Fate) -> Result<()> {
    let made = sides.cluster.done("create", "virtualmachines", &vm_name(name));
    // What lands when all is over is made, seen and deleted.
    let most = if fate == Fate::Stale { 2 } else { 1 };
    ensure!((1..=most).contains(&made), "{life:?}: {made} VMs were made");
    if life == Life::ByHand {
        return Ok(());
    }
    let row = world.row(name).await?;
    ensure!((row.status.as_str(), row.reason.as_deref()) == ("terminated", Some(life.reason())), "{life:?}: {row:?}");
    let history = world.history(name).await?;
    let kept_by_cr = row.message.as_deref().is_some_and(|words| words.ends_with("while the database did not answer"));
    // An expiry that was on its way meanwhile may have come all the same.
    let is_told = [false, kept_by_cr].iter().any(|kept_by_cr| history == life.history(*kept_by_cr));
    ensure!(is_told, "{life:?}: the history tells {history}");
    Ok(())
}
