//! The world that a schedule plays in: one database, one cluster, two daemons, an app, people, and the time.
//!
//! A schedule is a list of numbers. Each names one thing that may happen and whom it happens to, whatever happened
//! before: so a schedule from which some are left out is a schedule too, and a failing one can be shrunk.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cyberdesk_operator::brake::{self, ClusterSide, Missing, Verdict, judge};
use cyberdesk_operator::crd::CyberdeskSpec;
use cyberdesk_operator::lease::Term;
use cyberdesk_operator::model::{Cr, Desired, Now, RowStatus, RunStrategy, VmiPhase};
use cyberdesk_operator::names::{Key, Owner};
use cyberdesk_operator::plan::Action;
use cyberdesk_operator::template::Templates;
use jiff::{SignedDuration, Timestamp};
use tokio::time::{Instant, advance};
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::daemon::{Daemon, FAILED, Pair};
use crate::database::{Database, is_live};
use crate::planted::Bug;

/// How long a lease lasts, and how long its holder may write.
const LASTS: Duration = Duration::from_secs(12);
const HOLDS: Duration = Duration::from_secs(10);
/// The database's clock is ahead of the API server's by this.
const SKEW: SignedDuration = SignedDuration::from_secs(3);
const ROWS: u32 = 3;
const BY_HAND: [&str; 1] = ["by-hand"];

/// What may happen.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Insert,
    Write,
    Request,
    Deadline,
    Delete,
    Lock,
    Person,
    Guest,
    KubeVirt,
    Hear,
    Read,
    Take,
    Act,
    WriteBack,
    StartOrDie,
    FreezeOrWake,
    Lead,
    LandLate,
    Cut,
    Judge,
    Swap,
    Confirm,
    Time,
}

impl Happening {
    /// How likely each is: the wheels turn far more often than anything befalls them.
    fn of(number: u32) -> Self {
        match number {
            0..=2 => Self::Insert,
            3 => Self::Write,
            4 => Self::Request,
            5 => Self::Deadline,
            6 => Self::Delete,
            7 => Self::Lock,
            8..=9 => Self::Person,
            10 => Self::Guest,
            11..=24 => Self::KubeVirt,
            25..=48 => Self::Hear,
            49..=58 => Self::Read,
            59..=74 => Self::Take,
            75..=101 => Self::Act,
            102..=104 => Self::Judge,
            105 => Self::Confirm,
            106 => Self::Swap,
            107..=115 => Self::WriteBack,
            116 => Self::StartOrDie,
            117 => Self::FreezeOrWake,
            118..=123 => Self::Lead,
            124..=125 => Self::LandLate,
            126 => Self::Cut,
            _ => Self::Time,
        }
    }
}

/// A word of the story, or why it broke.
pub(crate) type Told = Result<Option<String>, String>;

/// A process: running, frozen or dead.
enum Process {
    Runs(Box<Daemon>),
    Frozen(Box<Daemon>),
    Dead,
}

impl Process {
    fn runs(&mut self) -> Option<&mut Daemon> {
        match self {
            Self::Runs(daemon) => Some(daemon),
            Self::Frozen(_) | Self::Dead => None,
        }
    }

    /// The database that it marks objects as of.
    fn database(&self) -> Uuid {
        match self {
            Self::Runs(daemon) | Self::Frozen(daemon) => {
                daemon.expected.as_ref().map_or(Uuid::nil(), |(known, _)| known.id)
            }
            Self::Dead => Uuid::nil(),
        }
    }
}

/// UID of the namespace.
const CLUSTER: &str = "cluster";

impl Lease {
    fn side(&self, term: Term) -> ClusterSide {
        ClusterSide {
            id: CLUSTER.to_owned(),
            term: term.epoch,
            bond: self.bond.clone(),
            confirmation: self.confirmation.clone(),
            confirmed_at: self.confirmed_at,
        }
    }
}

struct Lease {
    epoch: i64,
    holder: Option<usize>,
    renewed: Instant,
    bond: Option<(brake::Database, i64)>,
    confirmation: Option<String>,
    confirmed_at: Option<Timestamp>,
}

pub(crate) struct World {
    pub(crate) database: Database,
    pub(crate) cluster: Cluster,
    processes: [Process; 2],
    lease: Lease,
    /// Calls whose caller is gone: they may land late, or never.
    limbo: Vec<(Key, Action, Uuid)>,
    /// The right database, while another one is in its place.
    aside: Option<(Database, u128)>,
    /// The database as it was before.
    earlier: Option<Database>,
    /// Databases that ever were; and where the ids of new rows begin: no id is drawn twice.
    databases: u64,
    ids: u128,
    last_ids: u128,
    /// Since when.
    pub(crate) database_away: Option<Instant>,
    api_away: bool,
    locked: BTreeSet<Uuid>,
    run_strategy: RunStrategy,
    templates: Templates,
    began: Instant,
    pub(crate) bug: Option<Bug>,
    pub(crate) seen: Witness,
    /// Rows whose VM was deleted for an end that stands in the CR.
    pub(crate) ended_by_the_cr: BTreeSet<Uuid>,
    /// The earliest deadline that each row ever had.
    pub(crate) earliest_deadlines: BTreeMap<Uuid, Timestamp>,
    pub(crate) deeds: Deeds,
}

/// How often each kind of thing has happened: a simulation in which nothing happens finds nothing.
pub(crate) type Deeds = BTreeMap<String, u64>;

/// What must be remembered to judge a step by those before it.
#[derive(Default)]
pub(crate) struct Witness {
    statuses: BTreeMap<Uuid, RowStatus>,
    absent: BTreeSet<Uuid>,
    /// VMs that landed late, after their caller was gone.
    late: BTreeSet<String>,
    /// CRs that tell of an end.
    pub(crate) ended_crs: BTreeSet<String>,
}

impl World {
    pub(crate) fn new(run_strategy: RunStrategy, bug: Option<Bug>) -> Self {
        let vm = "apiVersion: kubevirt.io/v1\nkind: VirtualMachine\nspec: {template: {spec: {domain: {}}}}\n";
        Self {
            database: Database::default(),
            cluster: Cluster::default(),
            processes: [Process::Runs(Box::new(Daemon::start(bug))), Process::Runs(Box::new(Daemon::start(bug)))],
            lease: Lease {
                epoch: 0,
                holder: None,
                renewed: Instant::now(),
                bond: None,
                confirmation: None,
                confirmed_at: None,
            },
            limbo: vec![],
            aside: None,
            earlier: None,
            databases: 1,
            ids: 0,
            last_ids: 0,
            database_away: None,
            api_away: false,
            locked: BTreeSet::new(),
            run_strategy,
            templates: Templates::new("ns", [("default.yaml", vm)]),
            began: Instant::now(),
            bug,
            seen: Witness::default(),
            ended_by_the_cr: BTreeSet::new(),
            earliest_deadlines: BTreeMap::new(),
            deeds: Deeds::default(),
        }
    }

    /// Two daemons that have listed and read everything, one of which leads.
    pub(crate) fn begin(&mut self) {
        for at in 0..2 {
            self.reads(at, 0);
            self.leads(at);
        }
        self.judges(0).expect("two that meet for the first time can be bound");
        while self.writes_back(0).expect("a first meeting breaks nothing").is_some() {}
        self.reads(0, 1);
    }

    pub(crate) fn now(&self) -> Now {
        let passed = SignedDuration::try_from(self.began.elapsed()).expect("a schedule takes hours, not ages");
        let cluster = Timestamp::from_second(1_800_000_000).expect("a time") + passed;
        Now { cluster, database: cluster + SKEW }
    }

    /// Does what this number stands for, and checks every invariant.
    pub(crate) async fn step(&mut self, choice: u32) -> Told {
        let (what, which, how) = (choice % 128, (choice >> 7) % 1024, choice >> 17);
        let told = self.happens(what, which, how).await?;
        if told.is_some() {
            self.count(format!("{:?}", Happening::of(what)));
            self.check()?;
        }
        Ok(told)
    }

    async fn happens(&mut self, what: u32, which: u32, how: u32) -> Told {
        let new = Uuid::from_u128(self.ids + u128::from(which % ROWS) + 1);
        let known = self.database.desktops.keys().nth(which as usize % self.database.desktops.len().max(1));
        let id = known.copied().filter(|_| which & 256 != 0).unwrap_or(new);
        let daemon = usize::from(which & 512 != 0);
        Ok(match Happening::of(what) {
            Happening::Insert => self.app_inserts(new, how),
            Happening::Write => self.app_writes(id, how),
            Happening::Request => {
                let changed = self.database.request_shutdown(id, None).filter(|changed| *changed);
                changed.map(|_| format!("the app asks {} to end", name(id)))
            }
            Happening::Deadline => self.app_moves_deadline(id, how),
            Happening::Delete => self.database.delete(id).then(|| format!("the app deletes {}", name(id))),
            Happening::Lock => self.app_locks(id),
            Happening::Person => self.person(id, how),
            Happening::Guest => self.guest(which, how),
            Happening::KubeVirt => self.kubevirt(which, how),
            Happening::Hear => self.hears(daemon, which),
            Happening::Read => self.reads(daemon, how),
            Happening::Take => self.takes(daemon),
            Happening::Act => self.acts(daemon, which, how)?,
            Happening::WriteBack => self.writes_back(daemon)?,
            Happening::StartOrDie => self.starts_or_dies(daemon, how),
            Happening::FreezeOrWake => self.freezes_or_wakes(daemon, how),
            Happening::Lead => self.leads(daemon),
            Happening::LandLate => self.lands_late(which),
            Happening::Cut => self.cuts(how),
            Happening::Judge => self.judges(daemon)?,
            Happening::Swap => self.swaps(how),
            Happening::Confirm => self.confirms(how),
            Happening::Time => {
                let seconds = u64::from(how % 16) + 1;
                advance(Duration::from_secs(seconds)).await;
                Some(format!("{seconds} s pass"))
            }
        })
    }

    fn count(&mut self, deed: impl Into<String>) {
        *self.deeds.entry(deed.into()).or_default() += 1;
    }

    // ----- the app and people

    fn app_inserts(&mut self, id: Uuid, how: u32) -> Option<String> {
        let status = match how % 16 {
            0 => RowStatus::Terminated,
            1 => RowStatus::Running,
            _ => RowStatus::Pending,
        };
        let seconds = [0, 20, 60, 3600][(how / 16 % 4) as usize];
        let at = self.now().database + SignedDuration::from_secs(seconds);
        let done = self.database.insert(id, status, at);
        self.note_deadline(id, at);
        done.then(|| format!("the app inserts {} as {} for {seconds} s", name(id), status.as_str()))
    }

    fn app_writes(&mut self, id: Uuid, how: u32) -> Option<String> {
        use RowStatus::{Completed, Error, Pending, Running, Terminated};
        let status = [Pending, Running, Completed, Error, Terminated][(how % 5) as usize];
        let done = self.database.write_status(id, status);
        done.then(|| format!("the app writes {} to {}", status.as_str(), name(id)))
    }

    fn app_moves_deadline(&mut self, id: Uuid, how: u32) -> Option<String> {
        let seconds = [0, 5, 60, 3600][(how % 4) as usize];
        let at = self.now().database + SignedDuration::from_secs(seconds);
        self.note_deadline(id, at);
        self.database.set_timeout(id, at).then(|| format!("the app gives {} {seconds} s", name(id)))
    }

    fn app_locks(&mut self, id: Uuid) -> Option<String> {
        if self.locked.remove(&id) {
            return Some(format!("the app commits, and unlocks {}", name(id)));
        }
        self.locked.insert(id).then(|| format!("the app locks {}", name(id)))
    }

    fn person(&mut self, id: Uuid, how: u32) -> Option<String> {
        let key = if how & 1 == 0 { Key::of_row(id) } else { Key::new(BY_HAND[0]) };
        let now = self.now();
        let what = match how / 2 % 8 {
            0 => self.cluster.delete_cr(&key, None).then_some("deletes the CR"),
            1 => self.cluster.delete_vm(&key, None).then_some("deletes the VM"),
            2 => self.cluster.delete_vmi(&key, None).then_some("deletes the VMI"),
            3 if self.cluster.crs.get(&key).is_none() && self.cluster.vms.get(&key).is_none() => self
                .cluster
                .create_vm(&key, (None, None), RunStrategy::Once, now.cluster)
                .then_some("makes a VM of that name"),
            _ => {
                let spec = CyberdeskSpec { timeout_ms: Some(60_000), ..CyberdeskSpec::default() };
                let by_hand = key.row_id().is_none();
                (by_hand && self.cluster.create_cr(&key, (None, None), spec, now.cluster)).then_some("applies a CR")
            }
        };
        what.map(|what| format!("a person {what}: {}", short(&key)))
    }

    // ----- KubeVirt

    fn kubevirt(&mut self, which: u32, how: u32) -> Option<String> {
        let key = pick(&self.cluster.keys(), which)?;
        let now = self.now().cluster;
        let what = self.cluster.kubevirt(&key, !how.is_multiple_of(4), now)?;
        Some(format!("KubeVirt {what}: {}", short(&key)))
    }

    fn guest(&mut self, which: u32, how: u32) -> Option<String> {
        let key = pick(&self.cluster.keys(), which)?;
        let (phase, what) =
            if how & 1 == 0 { (VmiPhase::Failed, "crashes") } else { (VmiPhase::Succeeded, "powers off") };
        self.cluster.guest_ends(&key, phase).then(|| format!("the guest {what}: {}", short(&key)))
    }

    // ----- the daemons

    fn hears(&mut self, at: usize, which: u32) -> Option<String> {
        let daemon = self.processes[at].runs().filter(|_| !self.api_away)?;
        let heard = match which % 3 {
            0 => daemon.crs.hear(&self.cluster.crs, &daemon.queue).then_some("a CR"),
            1 => daemon.vms.hear(&self.cluster.vms, &daemon.queue).then_some("a VM"),
            _ => daemon.vmis.hear(&self.cluster.vmis, &daemon.queue).then_some("a VMI"),
        };
        heard.map(|kind| format!("{} hears of {kind}", person(at)))
    }

    fn reads(&mut self, at: usize, how: u32) -> Option<String> {
        let daemon = self.processes[at].runs()?;
        match how % 8 {
            0 if !self.api_away => {
                daemon.crs.list(&self.cluster.crs, &daemon.queue);
                daemon.vms.list(&self.cluster.vms, &daemon.queue);
                daemon.vmis.list(&self.cluster.vmis, &daemon.queue);
                Some(format!("{} lists the cluster", person(at)))
            }
            1 | 2 if self.database_away.is_none() && daemon.trusts(&self.database) => {
                daemon.resync(&self.database);
                Some(format!("{} reads all rows", person(at)))
            }
            3.. if self.database_away.is_none() && daemon.trusts(&self.database) => {
                daemon.scan(&self.database);
                Some(format!("{} looks for changed rows", person(at)))
            }
            _ => None,
        }
    }

    fn takes(&mut self, at: usize) -> Option<String> {
        let (now, silence) = (self.now(), self.silence());
        let daemon = self.processes[at].runs()?;
        daemon.silence = silence;
        let readable = self.database_away.is_none() && daemon.trusts(&self.database);
        let key = daemon.take(readable.then_some(&self.database), &self.templates, now)?;
        Some(format!("{} looks at {}", person(at), short(&key)))
    }

    fn acts(&mut self, at: usize, which: u32, how: u32) -> Result<Option<String>, String> {
        let (now, silence) = (self.now(), self.silence());
        let Some(daemon) = self.processes[at].runs() else { return Ok(None) };
        if daemon.turns.is_empty() {
            return Ok(None);
        }
        let turn = which as usize % daemon.turns.len();
        let key = daemon.turns[turn].key.clone();
        let Some(action) = daemon.turns[turn].actions.pop_front() else { return Ok(None) };
        let words = format!("{} for {}: {}", person(at), short(&key), words(&action));
        let is_local = matches!(action, Action::Report(_) | Action::Expire(_) | Action::Forget);
        if !is_local && (!daemon.leads() || self.api_away || how % 32 == 1) {
            daemon.end(turn, FAILED);
            return Ok(Some(format!("{words}, in vain")));
        }
        let Some(action) = self.with_bug(&key, action) else { return Ok(Some(format!("{words}: forgotten"))) };
        self.judge(&key, &action)?;
        if let Action::WriteCrStatus { status, .. } = &action {
            self.judge_end(&key, status)?;
        }
        self.witness_end(&key, &action);
        self.count(verb(&action));
        let answer_lost = !is_local && how % 32 == 2;
        let overtaken = !self.perform(at, turn, &key, action);
        let Some(daemon) = self.processes[at].runs() else { return Ok(None) };
        if answer_lost {
            daemon.end(turn, FAILED);
            return Ok(Some(format!("{words}, and hears no answer")));
        }
        if daemon.turns.get(turn).is_some_and(|turn| turn.key == key && (overtaken || turn.actions.is_empty())) {
            let database = (self.database_away.is_none() && daemon.trusts(&self.database)).then_some(&self.database);
            daemon.silence = silence;
            daemon.round_done(turn, database, &self.templates, now);
        }
        Ok(Some(words))
    }

    /// What a planted bug makes of an action.
    fn with_bug(&self, key: &Key, action: Action) -> Option<Action> {
        match (self.bug, &action) {
            (Some(Bug::TimeoutNotTold), Action::Report(report)) if report.reason.as_deref() == Some("timeout") => None,
            (Some(Bug::FailureNotTold), Action::Report(report)) if report.status == Some(RowStatus::Error) => None,
            (Some(Bug::NotInStatusNotDeleted), Action::DeleteVm { .. }) => {
                let named = self.cluster.crs.get(key).is_some_and(|cr| cr.status.virtual_machine_ref.is_some());
                named.then_some(action)
            }
            _ => Some(action),
        }
    }

    /// The effect of an action. False: what it was meant for is gone.
    fn perform(&mut self, at: usize, turn: usize, key: &Key, action: Action) -> bool {
        let now = self.now();
        let database = self.processes[at].database();
        let landed = self.land(key, &action, database, now);
        let Some(daemon) = self.processes[at].runs() else { return true };
        match action {
            Action::CreateCr { .. }
            | Action::ApplyCr { .. }
            | Action::WriteCrStatus { .. }
            | Action::DeleteCr { .. } => {
                daemon.crs.learn(&self.cluster.crs, key);
            }
            Action::CreateVm { .. } => {
                daemon.failures.remove(key);
                daemon.vms.learn(&self.cluster.vms, key);
            }
            Action::DeleteVm { .. } => drop(daemon.vms.learn(&self.cluster.vms, key)),
            Action::DeleteVmi { .. } => drop(daemon.vmis.learn(&self.cluster.vmis, key)),
            Action::DeleteSecrets { .. } => (),
            Action::LookLive => {
                let live = daemon.look_live(&self.cluster, key);
                daemon.turns[turn].live = Some(live);
            }
            Action::Expire(id) => {
                daemon.outbox.expire(id);
                daemon.turns[turn].told = true;
            }
            Action::Report(report) => {
                daemon.outbox.report(report);
                daemon.turns[turn].told = true;
            }
            Action::Forget => {
                daemon.failures.remove(key);
                if let Some(id) = key.row_id() {
                    daemon.store.forget(id);
                }
                daemon.end(turn, cyberdesk_operator::queue::Outcome::Settled(None));
            }
        }
        landed
    }

    /// What a call does to the cluster when it lands. False: what it was meant for is not there.
    fn land(&mut self, key: &Key, action: &Action, database: Uuid, now: Now) -> bool {
        match action {
            Action::CreateCr { owner: (id, _), spec } => {
                self.cluster.create_cr(key, (Some(Owner::Row(*id)), Some(database)), spec.clone(), now.cluster);
                true
            }
            Action::ApplyCr { uid, owner: (id, _), spec } => self.cluster.change_cr(key, uid, |cr| {
                (cr.owner, cr.database) = (Some(Owner::Row(*id)), Some(database));
                if cr.spec.as_ref() != Ok(spec) {
                    (cr.spec, cr.generation) = (Ok(spec.clone()), cr.generation + 1);
                }
            }),
            Action::WriteCrStatus { uid, version, status } => {
                let is_meant = self.cluster.crs.get(key).is_some_and(|cr| cr.version == *version);
                (is_meant || self.bug == Some(Bug::StatusOverAnyVersion))
                    && self.cluster.change_cr(key, uid, |cr| cr.status = status.as_ref().clone())
            }
            Action::DeleteCr { uid } => {
                self.cluster.delete_cr(key, Some(uid));
                true
            }
            Action::CreateVm { owner, .. } => {
                self.cluster.secrets.insert(owner.id());
                let of_row = matches!(owner, Owner::Row(_)).then_some(database);
                self.cluster.create_vm(key, (Some(owner.clone()), of_row), self.run_strategy, self.now().cluster);
                true
            }
            Action::DeleteVm { uid, .. } => {
                self.cluster.delete_vm(key, Some(uid));
                true
            }
            Action::DeleteVmi { uid } => {
                self.cluster.delete_vmi(key, Some(uid));
                true
            }
            Action::DeleteSecrets { selector } => {
                let of_row = key.row_id().map(|id| id.hyphenated().to_string());
                self.cluster.secrets.retain(|owner| match &of_row {
                    Some(id) if selector.contains("origin=hand") => owner.starts_with("cr-") || owner != id,
                    Some(id) => owner != id,
                    None => !owner.starts_with("cr-"),
                });
                true
            }
            Action::LookLive | Action::Expire(_) | Action::Report(_) | Action::Forget => true,
        }
    }

    fn writes_back(&mut self, at: usize) -> Told {
        let before = self.aside.is_some().then(|| self.database.clone());
        let told = self.writes(at);
        // Until somebody has confirmed it, which takes `aside` away.
        let changed = before.is_some_and(|before| {
            self.aside.is_some() && (before.rows != self.database.rows || before.desktops != self.database.desktops)
        });
        if changed { Err("a row of the wrong database is written".to_owned()) } else { Ok(told) }
    }

    fn writes(&mut self, at: usize) -> Option<String> {
        let now = self.now();
        let locked = self.locked.clone();
        let database = &self.database;
        let daemon =
            self.processes[at].runs().filter(|daemon| self.database_away.is_none() && daemon.admits(database))?;
        if matches!(daemon.pair, Pair::Unjudged | Pair::Braked(_)) {
            return None;
        }
        if let (Some((term, _)), Pair::Agreed { confirmed, .. }, true) =
            (daemon.term, daemon.pair.clone(), daemon.fenced_in)
        {
            return self.binds(at, term, confirmed);
        }
        if self.bug == Some(Bug::UnguardedStatus) {
            for report in daemon.outbox.next_reports(Instant::now()) {
                self.database.write_unguarded(&report);
            }
        }
        let known = self.database.fence;
        if !daemon.write_back(&mut self.database, now, |id| locked.contains(&id)) {
            // The database knows a later epoch: the Lease is raised above it, if it is ours.
            let behind = daemon
                .term
                .is_some_and(|(term, _)| known.is_some_and(|known| known.epoch >= term.epoch && known != term));
            if behind && daemon.leads() && !daemon.fenced_in && self.lease.holder == Some(at) {
                let epoch = known.map_or(0, |known| known.epoch).max(self.lease.epoch) + 1;
                (self.lease.epoch, self.lease.renewed) = (epoch, Instant::now());
                daemon.term = Some((term(at, epoch), Instant::now() + HOLDS));
                return Some(format!("{} raises the Lease to {epoch}", person(at)));
            }
            return None;
        }
        Some(format!("{} writes back", person(at)))
    }

    fn starts_or_dies(&mut self, at: usize, how: u32) -> Option<String> {
        match &mut self.processes[at] {
            Process::Dead => {
                self.processes[at] = Process::Runs(Box::new(Daemon::start(self.bug)));
                Some(format!("{} starts", person(at)))
            }
            Process::Runs(daemon) | Process::Frozen(daemon) if how.is_multiple_of(4) => {
                self.limbo.extend(calls(daemon));
                self.processes[at] = Process::Dead;
                Some(format!("{} is killed", person(at)))
            }
            Process::Runs(_) | Process::Frozen(_) => None,
        }
    }

    fn freezes_or_wakes(&mut self, at: usize, how: u32) -> Option<String> {
        let process = std::mem::replace(&mut self.processes[at], Process::Dead);
        let (process, what) = match process {
            Process::Runs(mut daemon) if how.is_multiple_of(4) => {
                // What it was about to call may be on its way.
                if how & 8 == 0 {
                    self.limbo.extend(calls(&mut daemon));
                }
                (Process::Frozen(daemon), Some("freezes"))
            }
            Process::Frozen(daemon) => (Process::Runs(daemon), Some("wakes up")),
            process => (process, None),
        };
        self.processes[at] = process;
        what.map(|what| format!("{} {what}", person(at)))
    }

    /// Takes or renews the Lease, or finds that it is another's.
    fn leads(&mut self, at: usize) -> Option<String> {
        let daemon = self.processes[at].runs().filter(|_| !self.api_away)?;
        let now = Instant::now();
        let ours = daemon.term.filter(|(term, _)| self.lease.holder == Some(at) && self.lease.epoch == term.epoch);
        match ours {
            Some((term, until)) if now < until => {
                self.lease.renewed = now;
                daemon.term = Some((term, now + HOLDS));
                None
            }
            _ if daemon.term.is_some() => {
                daemon.lose();
                Some(format!("{} leads no longer", person(at)))
            }
            _ if self.lease.holder.is_none() || self.lease.renewed + LASTS <= now || self.lease.holder == Some(at) => {
                (self.lease.epoch, self.lease.holder, self.lease.renewed) = (self.lease.epoch + 1, Some(at), now);
                let bound_to = self.lease.bond.as_ref().map(|(database, _)| database.id);
                daemon.begin(term(at, self.lease.epoch), now + HOLDS, bound_to);
                Some(format!("{} leads, in term {}", person(at), self.lease.epoch))
            }
            _ => None,
        }
    }

    fn lands_late(&mut self, which: u32) -> Option<String> {
        if self.limbo.is_empty() {
            return None;
        }
        let (key, action, database) = self.limbo.remove(which as usize % self.limbo.len());
        if which & 256 != 0 {
            return Some(format!("lost for ever, for {}: {}", short(&key), words(&action)));
        }
        let before = self.cluster.vms.get(&key).map(|vm| vm.uid.clone());
        let now = self.now();
        self.land(&key, &action, database, now);
        let after = self.cluster.vms.get(&key).map(|vm| vm.uid.clone());
        self.seen.late.extend(after.filter(|_| before.is_none()));
        Some(format!("lands late, for {}: {}", short(&key), words(&action)))
    }

    fn cuts(&mut self, how: u32) -> Option<String> {
        let (was_away, side) = match how & 1 {
            0 => (self.database_away.is_some(), "the database"),
            _ => (self.api_away, "the API server"),
        };
        if !was_away && how % 8 > 1 {
            return None;
        }
        match how & 1 {
            0 => self.database_away = (!was_away).then(Instant::now),
            _ => self.api_away = !was_away,
        }
        Some(format!("{side} is {}", if was_away { "back" } else { "away" }))
    }

    // ----- the pair

    /// Judges the pair, as the leader does at the begin of a term, in doubt, and every so often.
    fn judges(&mut self, at: usize) -> Told {
        let missing = Missing { strangers: self.strangers(), ..Missing::default() };
        let Some(daemon) = self.processes[at].runs().filter(|_| self.database_away.is_none() && !self.api_away) else {
            return Ok(None);
        };
        let Some((term, _)) =
            daemon.term.filter(|(term, _)| self.lease.holder == Some(at) && self.lease.epoch == term.epoch)
        else {
            return Ok(None);
        };
        // What was agreed on is written down first.
        if matches!(daemon.pair, Pair::Agreed { .. }) && daemon.admits(&self.database) {
            return Ok(None);
        }
        let (database, cluster) = (self.database.side(), self.lease.side(term));
        let verdict = judge(&database, &cluster, missing);
        if verdict == Verdict::Bound && daemon.pair == Pair::Right && daemon.admits(&self.database) {
            return Ok(None);
        }
        if self.bug != Some(Bug::NoBrake)
            && self.aside.is_some()
            && matches!(verdict, Verdict::Bound | Verdict::Bind { confirmed: false })
        {
            return Err("the wrong database is taken for the right one".to_owned());
        }
        let verdict = if self.bug == Some(Bug::NoBrake) { Verdict::Bound } else { verdict };
        daemon.judged(verdict, &self.database, |cause| brake::confirmation(cause, &database, &cluster, missing));
        if verdict == (Verdict::Bind { confirmed: true }) {
            // What a person says is right is right.
            self.aside = None;
            self.forget_what_was_seen();
        }
        self.count(format!("{verdict:?}"));
        Ok(Some(format!("{} judges: {verdict:?}", person(at))))
    }

    fn strangers(&self) -> usize {
        let of_another = |cr: &Cr| cr.database.is_some_and(|database| database != self.database.itself.id);
        self.cluster.crs.objects.values().filter(|(_, cr)| of_another(cr)).count()
    }

    /// Writes down on both sides what was agreed on.
    fn binds(&mut self, at: usize, term: Term, confirmed: bool) -> Option<String> {
        let holds = !self.api_away && self.lease.holder == Some(at) && self.lease.epoch == term.epoch;
        let daemon = self.processes[at].runs()?;
        if self.database.bind(term, CLUSTER, confirmed).is_err() {
            daemon.pair = Pair::default();
            return Some(format!("{} may not bind", person(at)));
        }
        if !holds {
            return Some(format!("{} binds the database, and cannot reach the Lease", person(at)));
        }
        self.lease.bond = Some((self.database.itself.clone(), term.epoch));
        daemon.expected = self.lease.bond.clone();
        daemon.pair = Pair::Right;
        self.lease.confirmation = None;
        if confirmed {
            self.lease.confirmed_at = Some(Timestamp::from_second(1_800_000_000).expect("a time"));
        }
        Some(format!("{} binds database and cluster", person(at)))
    }

    /// Another database comes to be where the right one was, or that one is back.
    fn swaps(&mut self, how: u32) -> Option<String> {
        if let Some((right, ids)) = self.aside.take() {
            (self.database, self.ids) = (right, ids);
            self.forget_what_was_seen();
            return Some("the right database is back".to_owned());
        }
        let earlier = self.earlier.replace(self.database.clone());
        // For the most part, the right one is there.
        if !how.is_multiple_of(4) {
            return None;
        }
        let accepted = self.lease.bond.as_ref().map_or(0, |(_, epoch)| *epoch);
        let mine = |database: &Database| database.itself.id == self.database.itself.id;
        self.databases += 1;
        let oid = i64::try_from(self.databases).expect("a few");
        let renamed =
            |database: Database| Database { itself: brake::Database { oid, ..database.itself.clone() }, ..database };
        let (other, what) = match how / 4 % 8 {
            0 | 1 => (renamed(self.database.clone()), "a clone"),
            2 => (renamed(earlier.filter(mine)?), "a copy from before"),
            3..=5 => {
                (earlier.filter(mine).filter(|earlier| earlier.epoch() < accepted)?, "the same, restored to before")
            }
            _ => {
                let id = Uuid::from_u128(0xdb00 + u128::from(self.databases));
                let itself = brake::Database { id, system: "server".to_owned(), oid };
                (Database { itself, ..Database::default() }, "an empty one")
            }
        };
        self.last_ids += u128::from(ROWS);
        let right = (std::mem::replace(&mut self.database, other), std::mem::replace(&mut self.ids, self.last_ids));
        self.aside = Some(right);
        self.forget_what_was_seen();
        self.count(what);
        Some(format!("in the database's place there is {what}"))
    }

    /// What was witnessed is no measure of another database.
    fn forget_what_was_seen(&mut self) {
        self.seen = Witness::default();
        self.ended_by_the_cr.clear();
    }

    /// A person confirms what is asked, by SQL or by kubectl.
    fn confirms(&mut self, how: u32) -> Option<String> {
        let asked = self.processes.iter_mut().find_map(|process| match &process.runs()?.pair {
            Pair::Braked(asked) => Some(asked.clone()),
            _ => None,
        })?;
        let by_sql = how & 1 == 0;
        let place = if by_sql { &mut self.database.confirmation } else { &mut self.lease.confirmation };
        *place = Some(asked.clone());
        Some(format!("a person confirms {asked} by {}", if by_sql { "SQL" } else { "kubectl" }))
    }

    /// Removes the Secrets of desktops that are over.
    fn sweeps(&mut self, at: usize) {
        let database = &self.database;
        let away = self.database_away.is_some() || self.api_away;
        if self.processes[at].runs().is_some_and(|daemon| !away && daemon.leads() && daemon.trusts(database)) {
            let over: BTreeSet<String> =
                self.database.all().filter(|row| row.ended).map(|row| Owner::Row(row.id).id()).collect();
            self.cluster.secrets.retain(|owner| !over.contains(owner));
        }
    }

    // ----- what must hold

    /// The database that counts, wherever connections lead.
    pub(crate) fn right(&self) -> &Database {
        self.aside.as_ref().map_or(&self.database, |(right, _)| right)
    }

    /// Whether this may be done, as the world is.
    fn judge(&self, key: &Key, action: &Action) -> Result<(), String> {
        let vm = self.cluster.vms.get(key);
        let of_another = |database: Option<Uuid>| database.is_some_and(|id| id != self.right().itself.id);
        let stranger = match action {
            Action::DeleteVm { uid, .. } => vm.is_some_and(|vm| vm.uid == *uid && of_another(vm.database)),
            Action::DeleteCr { uid } => {
                self.cluster.crs.get(key).is_some_and(|cr| cr.uid == *uid && of_another(cr.database))
            }
            _ => false,
        };
        if stranger {
            return Err("another database's desktop is touched".to_owned());
        }
        match action {
            Action::DeleteCr { .. } => {
                let row = key.row_id().and_then(|id| self.right().row(id));
                let lives = row.is_some_and(|row| !row.ended);
                if lives { Err("the CR of a desktop that is not over is deleted".to_owned()) } else { Ok(()) }
            }
            Action::DeleteVm { uid, .. } if vm.is_some_and(|vm| vm.uid == *uid && vm.owner.is_none()) => {
                Err("a VM that is not ours is deleted".to_owned())
            }
            Action::DeleteVm { uid, .. } => {
                let doomed = vm.filter(|vm| vm.uid == *uid && !vm.deleting);
                match doomed.and_then(|vm| vm.owner.as_ref()) {
                    Some(Owner::Row(id)) => self.may_end(key, *id),
                    _ => Ok(()),
                }
            }
            Action::CreateVm { owner: Owner::Row(id), .. } => {
                let Some(row) = self.right().row(*id) else { return Err("a VM is made without a row".to_owned()) };
                let by_cr = self.cluster.crs.get(key).is_some_and(|cr| cr.status.virtual_machine_ref.is_some());
                if vm.is_none() && (row.vm_uid.is_some() || by_cr) {
                    return Err("a VM that was recorded and went is made again".to_owned());
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A VM of a row that wants one is deleted only if something has happened to it, and the CR says what.
    fn may_end(&self, key: &Key, id: Uuid) -> Result<(), String> {
        let wanted = self.right().row(id).is_some_and(|row| row.desired == Desired::Present);
        let recorded = self.cluster.crs.get(key).is_some_and(|cr| cr.status.end.is_some());
        if wanted && !recorded {
            Err("the VM of a row that wants it is deleted, and nothing says why".to_owned())
        } else {
            Ok(())
        }
    }

    fn check(&mut self) -> Result<(), String> {
        self.recorded_ends_stand()?;
        for row in self.database.all().collect::<Vec<_>>() {
            let (id, key) = (row.id, Key::of_row(row.id));
            if let Some(before) = self.seen.statuses.insert(id, row.status).filter(|before| !is_live(*before)) {
                let kept = before == row.status || row.status == RowStatus::Terminated;
                if !kept {
                    return Err(format!("{} was {}, and is {} again", name(id), before.as_str(), row.status.as_str()));
                }
            }
            if row.desired == Desired::Absent {
                self.seen.absent.insert(id);
            } else if self.seen.absent.contains(&id) {
                return Err(format!("{} was to end, and is wanted again", name(id)));
            }
            let ours = |owner: &Option<Owner>| *owner == Some(Owner::Row(id));
            let vm = self.cluster.vms.get(&key).filter(|vm| ours(&vm.owner) && !self.seen.late.contains(&vm.uid));
            if row.ended && vm.is_some() && self.aside.is_none() {
                return Err(format!("{} is said to be over, and has a VM", name(id)));
            }
        }
        Ok(())
    }

    /// Everything comes back and goes well, until nothing changes any more; then all must be as it should.
    pub(crate) async fn settles(&mut self) -> Result<(), String> {
        self.all_but_the_database_come_back();
        self.database_away = None;
        for round in 0..400 {
            self.quiet_round().await?;
            self.confirms(round);
            if self.is_settled().is_ok() {
                return Ok(());
            }
            // Half a minute under one leader: what waits for its time waits in one term.
            for _ in 0..if round % 5 == 4 { 6 } else { 0 } {
                advance(Duration::from_secs(5)).await;
                (0..2).for_each(|at| drop(self.leads(at)));
            }
        }
        self.is_settled()
    }

    pub(crate) fn all_but_the_database_come_back(&mut self) {
        self.api_away = false;
        self.locked.clear();
        self.limbo.clear();
        for at in 0..2 {
            if let Process::Frozen(_) | Process::Dead = self.processes[at] {
                self.processes[at] = Process::Runs(Box::new(Daemon::start(self.bug)));
            }
        }
    }

    /// Whether somebody may write to the cluster, and the brake does not hold.
    pub(crate) fn is_served(&mut self) -> bool {
        let serves = |daemon: &mut Daemon| daemon.leads() && !matches!(daemon.pair, Pair::Braked(_));
        self.processes.iter_mut().any(|process| process.runs().is_some_and(serves))
    }

    pub(crate) async fn quiet_round(&mut self) -> Result<(), String> {
        for at in 0..2 {
            self.leads(at);
            self.judges(at)?;
            self.sweeps(at);
            if self.began.elapsed() > Duration::ZERO {
                for how in [0, 1, 3] {
                    self.reads(at, how);
                }
            }
            while (0..3).any(|which| self.hears(at, which).is_some()) {}
            while self.takes(at).is_some() {}
            while self.acts(at, 0, 0)?.is_some() {
                self.check()?;
            }
            self.writes_back(at)?;
            self.check()?;
        }
        for which in 0..8 {
            self.kubevirt(which, 1);
        }
        advance(Duration::from_millis(500)).await;
        Ok(())
    }

    /// Whether all is as it should be when nothing happens any more.
    fn is_settled(&self) -> Result<(), String> {
        self.ends_are_final()?;
        for row in self.database.all() {
            let key = Key::of_row(row.id);
            let (cr, vm, vmi) = (self.cluster.crs.get(&key), self.cluster.vms.get(&key), self.cluster.vmis.get(&key));
            let ours = vm.filter(|vm| vm.owner == Some(Owner::Row(row.id)));
            let what = format!("{} ({:?}, {})", name(row.id), row.desired, row.status.as_str());
            match row.desired {
                Desired::Present if cr.is_none() => return Err(format!("{what} has no CR")),
                Desired::Present if ours.is_none() => return Err(format!("{what} has no VM")),
                Desired::Present if vmi.is_some_and(|vmi| vmi.ready) && row.status != RowStatus::Running => {
                    return Err(format!("{what} is ready, and does not say so"));
                }
                Desired::Present if row.generation > row.observed_generation => {
                    return Err(format!("{what} was not acted on"));
                }
                Desired::Present => (),
                Desired::Absent if !row.ended => return Err(format!("{what} does not end")),
                Desired::Absent if ours.is_some() => return Err(format!("{what} is over, and has a VM")),
                Desired::Absent if cr.is_some() => return Err(format!("{what} is over, and has a CR")),
                Desired::Absent if self.cluster.secrets.contains(&row.id.hyphenated().to_string()) => {
                    return Err(format!("{what} is over, and has a Secret"));
                }
                Desired::Absent => (),
            }
        }
        if self.aside.is_some() {
            return Err("the brake still holds".to_owned());
        }
        let ours = |id: &Uuid| *id == self.database.itself.id;
        for (key, (_, cr)) in &self.cluster.crs.objects {
            let lost = key.row_id().is_none_or(|id| self.database.row(id).is_none());
            if cr.owner.is_some() && cr.database.as_ref().is_some_and(ours) && lost {
                return Err(format!("the CR of {} has no row, and stays", short(key)));
            }
        }
        for (key, (_, vm)) in &self.cluster.vms.objects {
            let lost = key.row_id().is_none_or(|id| self.database.row(id).is_none());
            if vm.database.as_ref().is_some_and(ours) && lost {
                return Err(format!("the VM of {} has no row, and stays", short(key)));
            }
            let cr = self.cluster.crs.get(key);
            if let Some(Owner::Hand(uid)) = &vm.owner
                && cr.is_none_or(|cr| cr.uid != *uid)
            {
                return Err(format!("the VM of {} has no CR any more", short(key)));
            }
        }
        Ok(())
    }
}

/// The calls that a process had begun.
fn calls(daemon: &mut Daemon) -> Vec<(Key, Action, Uuid)> {
    let database = daemon.expected.as_ref().map_or(Uuid::nil(), |(known, _)| known.id);
    let is_call =
        |action: &Action| !matches!(action, Action::LookLive | Action::Expire(_) | Action::Report(_) | Action::Forget);
    let begun = daemon.turns.iter().filter_map(|turn| Some((turn.key.clone(), turn.actions.front()?.clone())));
    begun.filter(|(_, action)| is_call(action)).map(|(key, action)| (key, action, database)).collect()
}

fn term(at: usize, epoch: i64) -> Term {
    Term { epoch, token: Uuid::from_u128(((at as u128 + 1) << 64) + u128::from(epoch.unsigned_abs())) }
}

fn pick(keys: &BTreeSet<Key>, which: u32) -> Option<Key> {
    keys.iter().nth(which as usize % keys.len().max(1)).cloned()
}

fn person(at: usize) -> &'static str {
    ["Anna", "Ben"][at]
}

pub(crate) fn name(id: Uuid) -> String {
    format!("row {}", id.as_u128())
}

pub(crate) fn short(key: &Key) -> String {
    key.row_id().map_or_else(|| key.to_string(), name)
}

fn verb(action: &Action) -> &'static str {
    match action {
        Action::CreateCr { .. } => "creates the CR",
        Action::ApplyCr { .. } => "applies the CR's spec",
        Action::WriteCrStatus { .. } => "writes the CR's status",
        Action::DeleteCr { .. } => "deletes the CR",
        Action::CreateVm { .. } => "creates the VM",
        Action::DeleteVm { .. } => "deletes the VM",
        Action::DeleteVmi { .. } => "deletes the VMI",
        Action::DeleteSecrets { .. } => "deletes the Secret",
        Action::LookLive => "looks for VM and VMI live",
        Action::Expire(_) => "asks for the deadline's end",
        Action::Report(_) => "tells the row",
        Action::Forget => "forgets it",
    }
}

fn words(action: &Action) -> String {
    let verb = verb(action);
    match action {
        Action::WriteCrStatus { status, .. } => format!("{verb} {:?}, {:?}", status.phase, status.reason),
        Action::Report(report) => {
            format!("{verb} {:?}, {:?}, VM {:?}, over: {}", report.status, report.reason, report.vm_uid, report.ended)
        }
        _ => verb.to_owned(),
    }
}
