//! Decides: what was seen of a desktop, and the time, in; what to do out. Does nothing itself.
//!
//! Every desktop is brought one step further by [`plan`] whenever anything may have changed, and by
//! nothing else. What must stay true here:
//!
//! - Nothing is done on what could not be seen, but for one thing: while the database is away, a desktop whose
//!   deadline has come ends all the same, by its CR. A cached `Absent` is enough to create (the name is the
//!   guard); to declare a desktop over, VM and VMI must have been looked for live.
//! - A VM that was recorded and is gone means an end, never another VM.
//! - An end that the cluster decided (crash, power-off) stands in the CR before the VM is deleted.
//! - What is not marked as this desktop's is never touched, nor is what another operator holds.
//! - A desktop that a person has paused is not touched either: see [`paused`].

mod observed;
mod orphan;
mod paused;
mod projection;
mod start;
mod status;
mod teardown;
mod unread;

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use uuid::Uuid;

use crate::crd::{CyberdeskSpec, CyberdeskStatus, End, Phase};
use crate::fleet::{Progress, Standing};
use crate::model::{Cr, Desired, Now, Report, Row, RowStatus, RunStrategy, Seen, Silence, Vm, Vmi, later};
use crate::names::{Key, Owner, secrets_by_hand};
use crate::reason::{self, Reason};
use crate::template::{Manifests, Refusal, Templates};
pub use orphan::Orphan;
pub(crate) use paused::says_paused;
use start::Start;
pub(crate) use start::is_quota;
use status::Course;
use teardown::{clear_away, collect_leftovers};

/// How long a desktop applied by hand lives when its spec does not say: as long as a row's by default.
const DEFAULT_LIFETIME: SignedDuration = SignedDuration::from_hours(24);

/// Everything that is known of one desktop, and what its VM would be made from.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// Whose.
    pub key: &'a Key,
    /// Its row. `Absent` only if the database said so, or the key cannot be a row's.
    pub row: Seen<Row>,
    /// Its CR.
    pub cr: Seen<Cr>,
    /// The VM of its name, ours or not.
    pub vm: Seen<Vm>,
    /// The VMI of its name, ours or not.
    pub vmi: Seen<Vmi>,
    /// Whether VM and VMI were asked of the API server just now, not read from a cache.
    pub live: bool,
    /// For how long the database has not answered.
    pub silence: Silence,
    /// What became of the last try to make the VM, if it was not made.
    pub failure: Option<&'a CreateFailure>,
    /// How the starts of all desktops stand.
    pub fleet: &'a Standing,
    /// Whether new VMs shall wait.
    pub paused: bool,
    /// Whether a person must say that the rows are the right ones, before anything is done on account of one.
    pub braked: bool,
    /// The database that the rows are of.
    pub database: Option<Uuid>,
    /// How much longer what has no row is left alone.
    pub orphan_rest: Duration,
    /// What VMs are made from.
    pub templates: &'a Templates,
}

/// Why the VM could not be made when it was last tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateFailure {
    /// For whom it was to be made.
    pub owner: Owner,
    /// The API server's words.
    pub words: String,
    /// Whose fault it is.
    pub fault: Fault,
    /// When it was first tried in vain, by the API server's clock.
    pub since: Timestamp,
}

/// Whose fault it is that a VM could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The manifest's: the API server will never take it.
    Refused,
    /// Nobody's: a quota is used up.
    Quota,
    /// Somebody's: a Role or a policy does not let it be made for now.
    Forbidden,
    /// The cluster's: the API server or a webhook does not answer, or KubeVirt is not there.
    Outage,
}

/// One effect. [`act`](crate::act) has one call for each.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Make the row's CR.
    CreateCr {
        /// The row's id and user, for its labels.
        owner: (Uuid, Uuid),
        /// The spec that projects the row.
        spec: CyberdeskSpec,
    },
    /// Make labels and spec of the row's CR what the row wants, by server-side apply.
    ApplyCr {
        /// The CR meant, and no later one of its name.
        uid: String,
        /// The row's id and user, for its labels.
        owner: (Uuid, Uuid),
        /// The spec that projects the row.
        spec: CyberdeskSpec,
    },
    /// Write the status of the CR.
    WriteCrStatus {
        /// The CR meant, and no later one of its name.
        uid: String,
        /// The version that this was decided on, and no later one: what another leader has written meanwhile, such
        /// as an end, stays.
        version: String,
        /// The whole status.
        status: Box<CyberdeskStatus>,
    },
    /// Delete the CR.
    DeleteCr {
        /// The CR meant, and no later one of its name.
        uid: String,
    },
    /// Make the Secret with the user data, then the VM.
    CreateVm {
        /// Whom for.
        owner: Owner,
        /// Both objects.
        manifests: Box<Manifests>,
    },
    /// Delete the VM; KubeVirt shuts its guest down.
    DeleteVm {
        /// The VM meant, and no later one of its name.
        uid: String,
        /// The version meant, and no later one, if no finalizer holds it yet: see [`Vm::unheld`].
        version: Option<String>,
    },
    /// Delete a VMI whose VM is gone.
    DeleteVmi {
        /// The VMI meant, and no later one of its name.
        uid: String,
    },
    /// Delete the Secrets with the user data.
    DeleteSecrets {
        /// Those with these labels.
        selector: String,
    },
    /// Ask the API server for VM and VMI, then plan again: it matters that they are really gone.
    LookLive,
    /// Ask the database to end the row at its deadline; its row lock decides against an extension.
    Expire(Uuid),
    /// Tell the database.
    Report(Report),
    /// Nothing of it is left anywhere: drop what is remembered of it.
    Forget,
}

impl Action {
    fn delete(vm: &Vm) -> Self {
        Self::DeleteVm { uid: vm.uid.clone(), version: vm.unheld.clone() }
    }
}

/// What to do now, and when to look again even if nothing happens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// In this order; the first that fails ends the round.
    pub actions: Vec<Action>,
    /// Time to the next deadline.
    pub wait: Option<Duration>,
    /// How its start stands, for the fleet. `None`: no start is under way.
    pub progress: Option<Progress>,
    /// Whether it can be used.
    pub ready: bool,
    /// Whether it is in the cluster without a row.
    pub orphan: Option<Orphan>,
}

impl Plan {
    fn nothing() -> Self {
        Self::default()
    }
}

/// Decides, and does nothing: the same view at the same instant gives the same plan.
pub fn plan(view: &View<'_>, now: Now) -> Plan {
    match (&view.row, &view.cr) {
        // Which rows are right is a person's to say. What cannot be a row's goes on.
        _ if view.braked && view.key.row_id().is_some() => Plan::nothing(),
        // "Could not see" is not "is not there".
        (_, Seen::Unknown) => Plan::nothing(),
        // Another operator's, until it is adopted: it may have a VM under a name of which nothing is known here.
        (_, Seen::Present(cr)) if cr.is_kopfs() => Plan::nothing(),
        _ if let Some(words) = paused::why(view) => paused::plan(view, words, now),
        (Seen::Unknown, Seen::Present(cr)) => unread::plan(view, cr, now),
        (Seen::Unknown, Seen::Absent) => Plan::nothing(),

        (Seen::Present(row), cr) if row.ended => clear_away(view, row, cr.present()),
        // A row that went without its trigger (TRUNCATE, a restored copy) is no word of anyone's.
        (Seen::Present(row), _) if row.desired == Desired::Present && !row.exists => Plan::nothing(),
        (Seen::Present(row), cr) => Desktop::of_row(row, cr.present()).plan(view, now),

        // A CR that somebody's finalizer holds is as good as deleted.
        (Seen::Absent, Seen::Present(cr)) if cr.owner.is_none() && cr.deleting => collect_leftovers(view),
        // What was recorded of it could not be read: it may be over, or have its VM.
        (Seen::Absent, Seen::Present(cr)) if cr.owner.is_none() && !cr.status_readable => Plan::nothing(),
        (Seen::Absent, Seen::Present(cr)) if cr.owner.is_none() => match Desktop::by_hand(cr) {
            Ok(desktop) => desktop.plan(view, now),
            Err(why) => refuse_spec(view, cr, why, now),
        },
        // Made for a row that the database does not know: of another database, or older than its tombstones.
        (Seen::Absent, _) if orphan::is_marked(view) => orphan::collect(view),
        (Seen::Absent, _) => collect_leftovers(view),
    }
}

/// One desktop while it has a row or a CR: the two kinds differ in where their wants come from and in
/// where their end is recorded, and in nothing else.
struct Desktop<'a> {
    owner: Owner,
    row: Option<&'a Row>,
    cr: Option<&'a Cr>,
    params: Option<Value>,
    /// When to end it, or to have the database look whether it is still in use.
    due_at: Timestamp,
    /// The deadline that is shown.
    expires_at: Timestamp,
}

impl<'a> Desktop<'a> {
    fn of_row(row: &'a Row, cr: Option<&'a Cr>) -> Self {
        let params = row.params.clone();
        let (due_at, expires_at) = (row.expires_at, row.timeout_at);
        Self { owner: Owner::Row(row.id), row: Some(row), cr, params, due_at, expires_at }
    }

    fn by_hand(cr: &'a Cr) -> Result<Self, &'a str> {
        let spec = cr.spec.as_ref().map_err(String::as_str)?;
        let expires_at = deadline_by_hand(cr);
        let params = spec.params.clone().map(Value::Object);
        let due_at = expires_at;
        Ok(Self { owner: Owner::Hand(cr.uid.clone()), row: None, cr: Some(cr), params, due_at, expires_at })
    }

    fn now(&self, now: Now) -> Timestamp {
        if matches!(self.owner, Owner::Row(_)) { now.database } else { now.cluster }
    }

    /// The VM that was made for it, as far as anyone recorded it.
    fn recorded_vm(&self) -> Option<&str> {
        let by_row = self.row.and_then(|row| row.vm_uid.as_deref());
        let by_cr = || Some(self.cr?.status.virtual_machine_ref.as_ref()?.uid.as_str());
        by_row.or_else(by_cr)
    }

    /// An end that was decided before: by the database, or by the cluster and recorded in the CR.
    fn decided_end(&self, now: Now) -> Option<End> {
        let recorded = self.cr.and_then(|cr| cr.status.end.clone());
        let Some(row) = self.row.filter(|row| row.desired == Desired::Absent) else { return recorded };
        let phase = if row.status == RowStatus::Error { Phase::Error } else { Phase::Terminated };
        let reason = row.reason.clone().unwrap_or_else(|| Reason::Requested.to_string());
        let words = || Reason::parse(&reason).map(|reason| reason.words().to_owned());
        let message = row.message.clone().or_else(words).map(reason::cut);
        // It was decided when it was first recorded.
        let at = recorded.filter(|end| end.reason == reason).map_or(now.database, |end| end.at);
        Some(End { phase, reason, message, at })
    }

    fn plan(&self, view: &View<'_>, now: Now) -> Plan {
        if let Some(end) = self.decided_end(now) {
            return self.end(view, &end, now);
        }
        let to_make = self.to_make(view);
        let start = self.look_at_the_start(view, to_make.as_ref(), now);
        let observed = self.observed_end(view, to_make.as_ref(), &start, now);
        let left = self.due_at.duration_since(self.now(now));
        let due = left <= SignedDuration::ZERO;
        let next_look = start.next_look.map(|at| at.duration_since(now.cluster));
        let wait = (!due).then(|| next_look.map_or(left, |next| next.min(left)).unsigned_abs());
        let (progress, ready) = (start.progress.clone(), start.ready);
        match (observed, self.row) {
            // What the guest did before its deadline is what became of it.
            (Some(end), _) if self.cr.is_some() && (!due || view.vm.present().is_some()) => self.end(view, &end, now),
            (_, Some(row)) if due => self.expire(view, row, now),
            (_, None) if due => self.end(view, &self.timeout(now), now),
            // The end must stand in the CR before anything is deleted on its account.
            (Some(_), _) => Plan { actions: self.project(), wait, ..Plan::default() },
            (None, _) => {
                Plan { actions: self.live(view, to_make, &start, now), wait, progress, ready, ..Plan::default() }
            }
        }
    }

    fn look_at_the_start(&self, view: &View<'_>, to_make: Option<&Result<Manifests, Refusal>>, now: Now) -> Start {
        if view.vm == Seen::Unknown || view.vmi == Seen::Unknown {
            return Start::default();
        }
        let rules = to_make.and_then(|made| made.as_ref().ok()).map(Manifests::start_rules).unwrap_or_default();
        let unread = to_make.and_then(|made| made.as_ref().err()).filter(|refusal| refusal.is_for_now());
        self.start(view, rules.deadline, unread, now.cluster)
    }

    /// The VM to make, where there is none and never was one.
    fn to_make(&self, view: &View<'_>) -> Option<Result<Manifests, Refusal>> {
        let user = self.row.map(|row| row.user_id);
        let wanted = view.vm == Seen::Absent && self.recorded_vm().is_none();
        wanted.then(|| view.templates.render(view.key, &self.owner, user, self.params.as_ref()))
    }

    /// What became of the last try to make its VM.
    fn failure<'v>(&self, view: &View<'v>) -> Option<&'v CreateFailure> {
        view.failure.filter(|failure| failure.owner == self.owner)
    }

    fn has_run(&self) -> bool {
        self.cr.is_some_and(|cr| cr.status.start_time.is_some())
            || self.row.is_some_and(|row| row.status == RowStatus::Running)
    }

    fn is_predecessors(&self, owner: &Option<Owner>) -> bool {
        matches!((&self.owner, owner), (Owner::Hand(ours), Some(Owner::Hand(theirs))) if ours != theirs)
    }

    /// Brings CR, VM and row in line with a desktop that lives.
    fn live(
        &self,
        view: &View<'_>,
        to_make: Option<Result<Manifests, Refusal>>,
        start: &Start,
        now: Now,
    ) -> Vec<Action> {
        let mut actions = self.project();
        if let [Action::ApplyCr { .. }] = actions.as_slice() {
            // Its status is written on the version that comes of it.
            return actions;
        }
        let (Seen::Absent | Seen::Present(_), Seen::Absent | Seen::Present(_)) = (&view.vm, &view.vmi) else {
            return actions;
        };
        match (view.vm.present(), to_make) {
            (Some(vm), _) if self.is_predecessors(&vm.owner) => {
                if !vm.deleting {
                    // Its Secret with it: this one's is not there yet.
                    actions.push(Action::DeleteSecrets { selector: secrets_by_hand(view.key) });
                    actions.push(Action::delete(vm));
                }
                actions.extend(self.status(view, Course::Lives(start), now));
            }
            (Some(vm), _) => {
                // The row first: whoever waits for it need not wait for the API server.
                actions.extend(self.row.and_then(|row| news(row, Some(vm), start)));
                actions.extend(self.status(view, Course::Lives(start), now));
                let may_be_over =
                    view.vmi == Seen::Absent && vm.run_strategy == RunStrategy::RerunOnFailure && self.has_run();
                let may_be_given_up = start.given_up.is_some();
                if (may_be_over && !vm.restart_pending || may_be_given_up) && !view.live {
                    actions.push(Action::LookLive);
                }
            }
            // A template that does not render is an end that was observed. One that is not known yet is waited for.
            (None, Some(made)) => {
                // While all goes well, the status comes with the VM; it would cost a write of its own.
                if start.obstacle.is_some() {
                    actions.extend(self.status(view, Course::Lives(start), now));
                    actions.extend(self.row.and_then(|row| news(row, None, start)));
                }
                if let Some(manifests) = made.ok().filter(|_| !view.paused && view.fleet.throttled.is_none()) {
                    actions.push(Action::CreateVm { owner: self.owner.clone(), manifests: Box::new(manifests) });
                }
            }
            (None, None) => actions.push(Action::LookLive),
        }
        actions
    }

    /// The write that makes the CR's status true, if it is not.
    fn status(&self, view: &View<'_>, course: Course<'_>, now: Now) -> Option<Action> {
        let cr = self.cr?;
        // Once over, what was last known of it stays.
        if matches!(course, Course::Ends(_)) && status::is_over(&cr.status) {
            return None;
        }
        let status = status::project(view, cr, course, self.expires_at, (self.now(now), now), &self.owner);
        let (uid, version) = (cr.uid.clone(), cr.version.clone());
        (status != cr.status).then(|| Action::WriteCrStatus { uid, version, status: Box::new(status) })
    }
}

/// The deadline of a CR by hand, as far as its spec can be read.
pub(crate) fn deadline_by_hand(cr: &Cr) -> Timestamp {
    let spec = cr.spec.as_ref().ok();
    let by_timeout = spec.and_then(|spec| spec.timeout_ms).map(|ms| later(cr.created, SignedDuration::from_millis(ms)));
    match (by_timeout, spec.and_then(|spec| spec.expires_at)) {
        (Some(a), Some(b)) => a.min(b),
        (Some(at), None) | (None, Some(at)) => at,
        (None, None) => later(cr.created, DEFAULT_LIFETIME),
    }
}

/// What the database does not know yet of a desktop that lives.
fn news(row: &Row, vm: Option<&Vm>, start: &Start) -> Option<Action> {
    let running = start.ready && row.status == RowStatus::Pending;
    let known = vm.is_none_or(|vm| row.observed_generation >= row.generation && row.vm_uid.as_deref() == Some(&vm.uid));
    let message = message_of(row, start);
    (!known || running || message.is_some()).then(|| {
        Action::Report(Report {
            id: row.id,
            // Without a VM, what the row wants is still to be done.
            generation: if vm.is_some() { row.generation } else { row.observed_generation },
            vm_uid: vm.map(|vm| vm.uid.clone()),
            status: running.then_some(RowStatus::Running),
            reason: None,
            message,
            stream_url: vm.filter(|_| running).and_then(|vm| vm.start.stream_url.clone()),
            ended: false,
        })
    })
}

/// The message of a row that is not ready: what keeps it, once for each cause. A change is an event to everyone
/// who watches the row, so neither other words of the same cause nor our own queue are one.
fn message_of(row: &Row, start: &Start) -> Option<String> {
    let told = row.message.as_deref();
    match start.obstacle.as_ref().filter(|cause| !cause.reason.is_our_own_doing()) {
        Some(cause) => {
            let prefix = format!("{}: ", cause.reason);
            let known = told.is_some_and(|told| told.starts_with(&prefix));
            (!known).then(|| reason::cut(prefix + &cause.words))
        }
        None => told.map(|_| String::new()),
    }
}

/// A CR by hand whose spec cannot be read: it says so, and nothing is made of it.
fn refuse_spec(view: &View<'_>, cr: &Cr, why: &str, now: Now) -> Plan {
    let desktop = Desktop {
        owner: Owner::Hand(cr.uid.clone()),
        row: None,
        cr: Some(cr),
        params: None,
        due_at: deadline_by_hand(cr),
        expires_at: deadline_by_hand(cr),
    };
    let end = reason::end(Reason::BadSpec, Some(why.to_owned()), now.cluster);
    desktop.end(view, desktop.decided_end(now).as_ref().unwrap_or(&end), now)
}

#[cfg(test)]
mod tests;
