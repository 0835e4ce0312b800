//! A start: what it waits for, in whose words, and how long it may still take.
//!
//! A start begins when the VM is made (or, while it cannot be, with the first try), and a restart when the guest
//! that was ready is no longer the one that there is. KubeVirt leaves much stuck for ever; here each start ends.
//! Its clock stands still while the cluster as a whole is the trouble, and while we hold back the VM ourselves.

use jiff::{SignedDuration, Timestamp};

use super::status::whole_seconds;
use super::{CreateFailure, Desktop, Fault, View};
use crate::crd::StartClock;
use crate::fleet::{Progress, Stage, Standing, Trouble};
use crate::model::{ReadyBy, RunStrategy, Seen, Vm, Vmi, VmiPhase, later};
use crate::reason::Reason;
use crate::template::Refusal;

/// KubeVirt takes notice of a VM, and makes a pod, within a second or two. When it is silent for longer, it is away.
const SILENCE: SignedDuration = SignedDuration::from_secs(30);

/// Why a desktop is not ready, in the words of whoever says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cause {
    pub(super) reason: Reason,
    pub(super) words: String,
}

/// How a desktop that lives stands with its start.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Start {
    /// Whether it can be used.
    pub(super) ready: bool,
    /// What keeps it from being ready, where somebody says so.
    pub(super) obstacle: Option<Cause>,
    /// Its clock. `None`: no start is under way.
    pub(super) clock: Option<StartClock>,
    /// Why it is given up, if it is.
    pub(super) given_up: Option<Cause>,
    /// When it must be looked at again.
    pub(super) next_look: Option<Timestamp>,
    /// What the fleet is told of it.
    pub(super) progress: Option<Progress>,
}

/// Whether the guest can be used. KubeVirt leaves `Ready` as it was on a VMI that has ended or is being deleted,
/// and a guest that was never let go on is ready to it.
pub(super) fn is_ready(vm: &Vm, vmi: &Vmi) -> bool {
    let up = vmi.ready && vmi.phase == VmiPhase::Running && !vmi.deleting && !vmi.paused;
    up && (vm.start.ready == ReadyBy::Vmi || vmi.agent)
}

/// The parts that a start is judged by.
#[derive(Clone, Copy)]
struct Parts<'a> {
    failure: Option<&'a CreateFailure>,
    vm: Option<&'a Vm>,
    vmi: Option<&'a Vmi>,
    now: Timestamp,
    limit: SignedDuration,
    /// When this start began, where that is known.
    began: Option<Timestamp>,
    /// Whether its VM is yet to be made.
    wanted: bool,
    ran: bool,
}

impl Desktop<'_> {
    /// How its start stands. `limit`: how long it may take, where there is no VM yet that says so. `unread`: why its
    /// template is not known yet, if it is not.
    pub(super) fn start(
        &self,
        view: &View<'_>,
        limit: SignedDuration,
        unread: Option<&Refusal>,
        now: Timestamp,
    ) -> Start {
        let vm = view.vm.present().filter(|vm| vm.owner.as_ref() == Some(&self.owner));
        let vmi = view.vmi.present().filter(|vmi| vm.is_some() && vmi.owner.as_ref() == Some(&self.owner));
        let ran = self.has_run();
        let recorded = self.recorded_clock(vm);
        let limit = vm.map_or(limit, |vm| vm.start.deadline);
        let failure = self.failure(view).filter(|failure| vm.is_none() && failure.fault != Fault::Refused);
        let began = match vm {
            Some(vm) if !ran => Some(vm.created),
            _ => recorded.map(|clock| clock.since).or(failure.map(|failure| failure.since)),
        };
        let wanted = view.vm == Seen::Absent && self.recorded_vm().is_none();
        let parts = Parts { failure, vm, vmi, now, limit, began, wanted, ran };
        if vm.zip(vmi).is_some_and(|(vm, vmi)| is_ready(vm, vmi)) {
            return Start { ready: true, ..Start::default() };
        }
        let throttled = view.fleet.throttled.filter(|_| wanted && unread.is_none());
        let trouble = parts.trouble().filter(|trouble| view.fleet.is_shared(trouble));
        let cluster = trouble.as_ref().map(|trouble| (trouble.since, trouble.words.clone()));
        let cluster = cluster.into_iter().chain(view.fleet.trouble.clone()).min();
        let shared = cluster.as_ref().map(|(_, words)| words.as_str());
        let paused = view.paused && wanted;
        let obstacle = if paused {
            let words = Reason::MakingPaused.words().to_owned();
            Some(Cause { reason: Reason::MakingPaused, words })
        } else if let Some(unread) = unread {
            Some(Cause { reason: unread.reason, words: unread.message.clone() })
        } else {
            parts.obstacle(trouble.as_ref(), shared, throttled).map(|cause| self.with_memory(cause))
        };
        let held_back = paused || throttled.is_some() || unread.is_some();

        let stopped = ran && vm.is_some_and(|vm| is_stopped(vm, vmi));
        let held_up = wanted && held_back && recorded.is_some();
        let under_way = !stopped && (failure.is_some() || held_up || vm.is_some() && (!ran || self.is_restarting(vmi)));
        let clock = under_way.then(|| {
            let clock = recorded.cloned().unwrap_or_else(|| parts.new_clock());
            let fleet = Standing { trouble: cluster.clone(), ..view.fleet.clone() };
            tick(&clock, fleet.stood_still(clock.since, now), cluster.is_some() || held_back, now)
        });
        let deadline = clock.as_ref().and_then(|clock| clock.deadline);
        let late = deadline.is_some_and(|deadline| deadline <= now);
        let given_up = late.then(|| parts.given_up(obstacle.as_ref(), vm.map(|vm| vm.start.ready)));
        let next_look = [deadline, parts.silent_at(), throttled.map(|since| later(since, THROTTLE_TOLD))];
        let next_look = next_look.into_iter().flatten().filter(|at| *at > now).min();
        let progress = (under_way || wanted).then(|| parts.progress(trouble, throttled.is_some(), held_back));
        Start { ready: false, obstacle, clock, given_up, next_look, progress }
    }

    /// The clock as the CR has it, unless it is that of a VM that could not be made and now is.
    fn recorded_clock(&self, vm: Option<&Vm>) -> Option<&StartClock> {
        let status = &self.cr?.status;
        status.start_clock.as_ref().filter(|_| status.virtual_machine_ref.is_some() || vm.is_none())
    }

    /// The pods of a lost node are evicted after a while: that is not what became of its guests.
    fn with_memory(&self, cause: Cause) -> Cause {
        match cause.reason {
            Reason::Evicted if self.was_said(Reason::NodeLost) => Cause { reason: Reason::NodeLost, ..cause },
            _ => cause,
        }
    }

    /// Whether this is what the CR has said last.
    pub(super) fn was_said(&self, reason: Reason) -> bool {
        self.cr.is_some_and(|cr| cr.status.reason.as_deref() == Some(reason.as_str()))
    }

    /// Whether the guest that was ready is not the one that there is now.
    fn is_restarting(&self, vmi: Option<&Vmi>) -> bool {
        let was = self.cr.and_then(|cr| cr.status.vmi_uid.as_deref());
        vmi.is_none_or(|vmi| was.is_some_and(|uid| uid != vmi.uid))
    }
}

/// A VM that waits because too many others do says so when it has waited for this long: most wait for less.
const THROTTLE_TOLD: SignedDuration = SignedDuration::from_secs(2);

/// Whether KubeVirt is told not to run it.
fn is_stopped(vm: &Vm, vmi: Option<&Vmi>) -> bool {
    match vm.run_strategy {
        RunStrategy::Halted => true,
        RunStrategy::Manual => vmi.is_none() && !vm.restart_pending,
        RunStrategy::Always | RunStrategy::RerunOnFailure | RunStrategy::Once | RunStrategy::Other => false,
    }
}

impl Parts<'_> {
    fn new_clock(&self) -> StartClock {
        let since = self.began.unwrap_or(self.now);
        StartClock { since, deadline: Some(later(since, self.limit)), seconds_left: None }
    }

    fn stage(&self) -> Stage {
        match (self.vm, self.vmi) {
            (None, _) => Stage::Wanted,
            (Some(vm), None) if !vm.noticed => Stage::Made,
            (Some(_), None) => Stage::Noticed,
            (Some(_), Some(vmi)) if vmi.phase == VmiPhase::Pending => Stage::Instance,
            (Some(_), Some(_)) => Stage::Pod,
        }
    }

    /// When KubeVirt will have been silent for too long, where the next word is its.
    fn silent_at(&self) -> Option<Timestamp> {
        let since = match (self.vm?, self.vmi) {
            (vm, None) if !vm.noticed => vm.created,
            (_, Some(vmi)) if vmi.phase == VmiPhase::Pending && vmi.waiting.is_none() => vmi.created,
            _ => return None,
        };
        Some(later(since, SILENCE.min(self.limit)))
    }

    /// What may be the cluster's trouble: it is if no other start gets past it.
    fn trouble(&self) -> Option<Trouble> {
        let trouble = |since, before, words: &str| Some(Trouble { since, before, words: words.to_owned() });
        let silent = self.silent_at().is_some_and(|at| at <= self.now);
        match (self.failure, self.vm, self.vmi) {
            (Some(failure), None, _) if failure.fault == Fault::Outage => {
                trouble(failure.since, Stage::Made, &failure.words)
            }
            (_, Some(vm), None) if silent => {
                let words = format!("KubeVirt has not reacted to the VirtualMachine made at {}", vm.created);
                trouble(vm.created, Stage::Noticed, &words)
            }
            (_, Some(vm), None) => {
                let words = vm.failure.as_deref().filter(|words| is_outage(words))?;
                trouble(self.began.unwrap_or(vm.created), Stage::Instance, words)
            }
            (_, Some(_), Some(vmi)) if silent => {
                let words = format!("KubeVirt has made no pod for the VirtualMachineInstance made at {}", vmi.created);
                trouble(vmi.created, Stage::Pod, &words)
            }
            (_, Some(_), Some(vmi)) if vmi.phase == VmiPhase::Pending => {
                let (_, words) = vmi.waiting.as_ref().filter(|(_, words)| is_outage(words))?;
                trouble(vmi.created, Stage::Pod, words)
            }
            _ => None,
        }
    }

    /// What keeps it from being ready, where somebody says so. The nearest cause comes first.
    fn obstacle(
        &self,
        trouble: Option<&Trouble>,
        cluster: Option<&str>,
        throttled: Option<Timestamp>,
    ) -> Option<Cause> {
        let cause = |reason: Reason, words: &str| {
            let words = if words.is_empty() { reason.words() } else { words };
            Some(Cause { reason, words: words.to_owned() })
        };
        if let Some(trouble) = trouble {
            return cause(Reason::ClusterUnavailable, &trouble.words);
        }
        let said = match (self.vm, self.vmi) {
            (None, _) => self.failure.and_then(|failure| match failure.fault {
                Fault::Quota => cause(Reason::Quota, &failure.words),
                Fault::Forbidden | Fault::Outage | Fault::Refused => cause(Reason::NotCreated, &failure.words),
            }),
            (Some(vm), vmi) if is_stopped(vm, vmi) => {
                let words = format!("its runStrategy is {:?}, and nobody starts it", vm.run_strategy);
                cause(Reason::VmStopped, &words)
            }
            (Some(vm), vmi) => said_of_the_vm(vm).or_else(|| vmi.and_then(said_of_the_vmi)).or_else(|| {
                let times = vm.failed_starts;
                let words = format!("the guest ended before it ran, {times} times in a row; KubeVirt tries again");
                (times > 0).then_some(Cause { reason: Reason::CrashLoop, words })
            }),
        };
        let held_back = || {
            let told = throttled.is_some_and(|since| self.now >= later(since, THROTTLE_TOLD));
            told.then_some(Cause { reason: Reason::Throttled, words: Reason::Throttled.words().to_owned() })
        };
        let shared = || cluster.filter(|_| !self.ran).and_then(|words| cause(Reason::ClusterUnavailable, words));
        said.or_else(held_back).or_else(shared)
    }

    /// Why it was not ready in time: what somebody said, or where it got stuck without a word.
    fn given_up(&self, obstacle: Option<&Cause>, ready: Option<ReadyBy>) -> Cause {
        let cause = |reason: Reason, words: &str| Cause { reason, words: words.to_owned() };
        let plain = |reason: Reason| cause(reason, reason.words());
        let found = match (obstacle, self.vmi) {
            (Some(cause), _) => cause.clone(),
            (None, None) => cause(Reason::StartTimeout, "KubeVirt has made no VirtualMachineInstance"),
            (None, Some(vmi)) => match (vmi.phase, &vmi.unready) {
                (VmiPhase::Pending, _) => cause(Reason::StartTimeout, "KubeVirt has made no pod for the guest"),
                (VmiPhase::Scheduling, _) => plain(Reason::PodNotReady),
                (VmiPhase::Scheduled, _) => {
                    cause(Reason::StartTimeout, "the pod is ready, and the guest was not started")
                }
                (VmiPhase::Running, _) if vmi.ready && ready == Some(ReadyBy::Agent) => {
                    plain(Reason::AgentNotConnected)
                }
                (VmiPhase::Running, Some((_, words))) if !words.is_empty() => cause(Reason::GuestNotReady, words),
                (VmiPhase::Running, _) => plain(Reason::GuestNotReady),
                _ => plain(Reason::StartTimeout),
            },
        };
        Cause { words: format!("{} (not ready within {:#})", found.words, self.limit), ..found }
    }

    fn progress(&self, trouble: Option<Trouble>, throttled: bool, held_back: bool) -> Progress {
        let unstarted = match (self.vm, self.vmi) {
            // Made in a moment. One that could not be made last time takes nobody's place.
            (None, _) => self.wanted && !held_back && self.failure.is_none(),
            (Some(vm), None) => vm.failure.is_none() && vm.failed_starts == 0 && !is_stopped(vm, None),
            (Some(_), Some(_)) => false,
        };
        Progress { stage: self.stage(), trouble, unstarted, throttled }
    }
}

/// What KubeVirt says on a VM that it makes no VMI for.
fn said_of_the_vm(vm: &Vm) -> Option<Cause> {
    let words = vm.failure.clone()?;
    let reason = if is_quota(&words) { Reason::Quota } else { Reason::VmiRefused };
    Some(Cause { reason, words })
}

/// What KubeVirt says on a VMI.
fn said_of_the_vmi(vmi: &Vmi) -> Option<Cause> {
    let cause = |reason: Reason, words: &str| {
        let words = if words.is_empty() { reason.words() } else { words };
        Some(Cause { reason, words: words.to_owned() })
    };
    if let Some((why, words)) = &vmi.waiting {
        let reason = match why.as_str() {
            "Unschedulable" | "SchedulingGated" | "SchedulerError" => Reason::Unschedulable,
            "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => Reason::ImagePull,
            "FailedCreate" if is_quota(words) => Reason::Quota,
            "FailedCreate" => Reason::PodRefused,
            why if why.contains("Pvc") || why.contains("DataVolume") || why.contains("Storage") => Reason::Storage,
            _ => Reason::NotSynchronized,
        };
        return cause(reason, words);
    }
    match &vmi.unready {
        _ if vmi.paused => cause(Reason::Paused, ""),
        _ if vmi.node_lost => cause(Reason::NodeLost, ""),
        _ if vmi.evicted => cause(Reason::Evicted, ""),
        // The pod of a guest that nobody asked to end: its node is being drained.
        Some((why, words)) if why == "PodTerminating" && !vmi.deleting => cause(Reason::Evicted, words),
        Some((why, words)) if why == "NodeNotReady" => cause(Reason::NodeLost, words),
        _ => None,
    }
}

/// Kubernetes' words for a quota that is used up (`plugin/pkg/admission/resourcequota`).
pub(crate) fn is_quota(words: &str) -> bool {
    words.contains("exceeded quota")
}

/// Words of a cluster that does not work, in a refusal that was passed on as text: those of the API server for a
/// webhook that cannot be called and for itself (`staging/src/k8s.io/apiserver`), and those of a connection.
fn is_outage(words: &str) -> bool {
    let of_an_outage = [
        "failed calling webhook",
        "failed to call webhook",
        "Internal error occurred",
        "the server is currently unable to handle the request",
        "the server was unable to return a response",
        "Too many requests",
        "etcdserver",
        "connection refused",
        "context deadline exceeded",
        "i/o timeout",
    ];
    of_an_outage.iter().any(|known| words.contains(known))
}

/// The clock at this instant: a time in which it stood still moves its deadline.
pub(super) fn tick(clock: &StartClock, stood_still: SignedDuration, stands: bool, now: Timestamp) -> StartClock {
    let running = |deadline| StartClock { since: now, deadline: Some(ceil(deadline)), seconds_left: None };
    match (clock.deadline, clock.seconds_left) {
        (Some(deadline), _) if stands => {
            let left = ceil(later(deadline, stood_still)).duration_since(whole_seconds(now)).max(SignedDuration::ZERO);
            StartClock { since: now, deadline: None, seconds_left: Some(left.as_secs()) }
        }
        (Some(_), _) if stood_still.is_zero() => clock.clone(),
        (Some(deadline), _) => running(later(deadline, stood_still)),
        (None, _) if stands => clock.clone(),
        (None, left) => running(later(now, SignedDuration::from_secs(left.unwrap_or_default()))),
    }
}

/// The next whole second: nobody's start is given up early.
fn ceil(at: Timestamp) -> Timestamp {
    let whole = whole_seconds(at);
    if whole < at { later(whole, SignedDuration::from_secs(1)) } else { whole }
}
