//! The world that a schedule plays in: one database, one cluster, two daemons, an app, people, and the time.
//!
//! A schedule is a list of numbers. Each names one thing that may happen and whom it happens to, whatever happened
//! before: so a schedule from which some are left out is a schedule too, and a failing one can be shrunk.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cyberdesk_operator::model::{Now, RowStatus, RunStrategy};
use cyberdesk_operator::names::Key;
use cyberdesk_operator::plan::Action;
use cyberdesk_operator::template::Templates;
use jiff::{SignedDuration, Timestamp};
use tokio::time::{Instant, advance};
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::daemon::Daemon;
use crate::database::Database;
use crate::planted::Bug;
use crate::processes::{Lease, Process};

/// The database's clock is ahead of the API server's by this.
const SKEW: SignedDuration = SignedDuration::from_secs(3);
pub(crate) const ROWS: u32 = 3;
pub(crate) const BY_HAND: [&str; 1] = ["by-hand"];

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
    Pause,
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
            11 => Self::Pause,
            12..=24 => Self::KubeVirt,
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

pub(crate) struct World {
    pub(crate) database: Database,
    pub(crate) cluster: Cluster,
    pub(crate) processes: [Process; 2],
    pub(crate) lease: Lease,
    /// Calls whose caller is gone: they may land late, or never.
    pub(crate) limbo: Vec<(Key, Action, Uuid)>,
    /// Owners of Secrets that landed late, or are to.
    pub(crate) late_secrets: BTreeSet<String>,
    /// Owners of Secrets whose call seemed lost, and which come when all is over.
    pub(crate) ghosts: BTreeSet<String>,
    /// The right database, while another one is in its place.
    pub(crate) aside: Option<(Database, u128)>,
    /// The database as it was before.
    pub(crate) earlier: Option<Database>,
    /// Databases that ever were; and where the ids of new rows begin: no id is drawn twice.
    pub(crate) databases: u64,
    pub(crate) ids: u128,
    pub(crate) last_ids: u128,
    /// Since when.
    pub(crate) database_away: Option<Instant>,
    pub(crate) api_away: bool,
    pub(crate) locked: BTreeSet<Uuid>,
    pub(crate) run_strategy: RunStrategy,
    pub(crate) templates: Templates,
    pub(crate) began: Instant,
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
    pub(crate) statuses: BTreeMap<Uuid, RowStatus>,
    pub(crate) absent: BTreeSet<Uuid>,
    /// VMs that landed late, after their caller was gone.
    pub(crate) late: BTreeSet<String>,
    /// CRs that tell of an end.
    pub(crate) ended_crs: BTreeMap<String, Key>,
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
            late_secrets: BTreeSet::new(),
            ghosts: BTreeSet::new(),
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
            Happening::Pause => self.pauses(id, how),
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

    pub(crate) fn count(&mut self, deed: impl Into<String>) {
        *self.deeds.entry(deed.into()).or_default() += 1;
    }

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

    /// Everything comes back and goes well, until nothing changes any more; then all must be as it should.
    pub(crate) async fn settles(&mut self) -> Result<(), String> {
        self.all_but_the_database_come_back();
        self.database_away = None;
        self.rests().await?;
        self.resumes();
        for round in 0..400 {
            self.quiet_round().await?;
            self.confirms(round);
            if self.is_settled().is_ok() {
                if self.ghosts.is_empty() {
                    return Ok(());
                }
                self.cluster.secrets.append(&mut self.ghosts);
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
        let serves = |daemon: &mut Daemon| daemon.leads() && !daemon.is_braked();
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
}

pub(crate) fn pick(keys: &BTreeSet<Key>, which: u32) -> Option<Key> {
    keys.iter().nth(which as usize % keys.len().max(1)).cloned()
}

pub(crate) fn person(at: usize) -> &'static str {
    ["Anna", "Ben"][at]
}

pub(crate) fn name(id: Uuid) -> String {
    format!("row {}", id.as_u128())
}

pub(crate) fn short(key: &Key) -> String {
    key.row_id().map_or_else(|| key.to_string(), name)
}
