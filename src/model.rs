//! Plain data: what is known of a desktop, on each side. No clients, no clock.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use crate::crd::{CyberdeskSpec, CyberdeskStatus};
use crate::names::{ANNOTATION_READY, ANNOTATION_START_DEADLINE, ANNOTATION_STREAM_URL, Key, Owner};

/// What we last learned about one thing outside this process.
///
/// A failed read is `Unknown`, never `Absent`: nothing is created, deleted or failed on what we could not see.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen<T> {
    /// It could not be read, or has not been yet.
    Unknown,
    /// It was looked for and is not there.
    Absent,
    /// It is there.
    Present(T),
}

impl<T> Seen<T> {
    /// The thing itself, where it was seen.
    pub fn present(&self) -> Option<&T> {
        match self {
            Self::Present(thing) => Some(thing),
            Self::Unknown | Self::Absent => None,
        }
    }

    /// Another thing in its place, where it was seen.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Seen<U> {
        match self {
            Self::Present(thing) => Seen::Present(change(thing)),
            Self::Absent => Seen::Absent,
            Self::Unknown => Seen::Unknown,
        }
    }
}

/// What a row wants of the cluster. `Absent` is a latch: it never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Desired {
    /// A VM.
    Present,
    /// None, any more.
    Absent,
}

/// `public.instance_status`: the row's status as the app sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowStatus {
    /// Asked for, not yet ready.
    Pending,
    /// Ready for its user.
    Running,
    /// Ended well: only the app writes this.
    Completed,
    /// Ended because something went wrong.
    Error,
    /// Ended as asked, or at its deadline.
    Terminated,
}

impl RowStatus {
    /// The value in SQL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Error => "error",
            Self::Terminated => "terminated",
        }
    }

    /// Reads the value of SQL.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Pending, Self::Running, Self::Completed, Self::Error, Self::Terminated]
            .into_iter()
            .find(|status| status.as_str() == text)
    }
}

/// A desktop as the database has it: `cyberdesk.desktop_state`, decoded.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The row's id.
    pub id: Uuid,
    /// Whether the app's row is there. Once it was deleted this is its tombstone.
    pub exists: bool,
    /// Whose it is.
    pub user_id: Uuid,
    /// Whether it wants a VM.
    pub desired: Desired,
    /// Why it no longer does, or ended.
    pub reason: Option<String>,
    /// The same for people.
    pub message: Option<String>,
    /// When it is due at the earliest, by the database's clock: its deadline, or its idle timeout before that.
    pub expires_at: Timestamp,
    /// Its deadline.
    pub timeout_at: Timestamp,
    /// When it was inserted, by the database's clock: a moment before its commit.
    pub created_at: Timestamp,
    /// When what is wanted last changed, by the same.
    pub changed_at: Timestamp,
    /// Raised by the database whenever what is wanted changes.
    pub generation: i64,
    /// The generation that we last reported to have acted on.
    pub observed_generation: i64,
    /// Its choices among what the template offers.
    pub params: Option<serde_json::Value>,
    /// Its status as the app sees it.
    pub status: RowStatus,
    /// The VM that was made for it. Once recorded and gone, it is never made again.
    pub vm_uid: Option<String>,
    /// Whether it is over: cluster clean, and reported so.
    pub ended: bool,
    /// Whether an administrator has it left as it is.
    pub paused: bool,
}

/// A `Cyberdesk` object, as far as we read it.
#[derive(Clone, Debug, PartialEq)]
pub struct Cr {
    /// Its UID.
    pub uid: String,
    /// Which version of it this is, as the API server names it (`resourceVersion`).
    pub version: String,
    /// Its generation, raised by the API server with every change of the spec.
    pub generation: i64,
    /// When it was created, by the API server's clock.
    pub created: Timestamp,
    /// The row that we made it for. `None`: a person applied it.
    pub owner: Option<Owner>,
    /// The database that this owner is a row of, as it is marked.
    pub database: Option<Uuid>,
    /// Whether it is being deleted: somebody's finalizer holds it.
    pub deleting: bool,
    /// Whether Kopf's finalizer holds it.
    pub held_by_kopf: bool,
    /// Whether a person has the desktop left as it is, by annotation.
    pub paused: bool,
    /// Its spec, or why it cannot be read.
    pub spec: Result<CyberdeskSpec, String>,
    /// Whether its status could be read. A later version's, or somebody else's, may not be.
    pub status_readable: bool,
    /// Its status as we last wrote it.
    pub status: CyberdeskStatus,
}

impl Cr {
    /// Whether the Kopf operator holds it, and it has not been adopted.
    pub fn is_kopfs(&self) -> bool {
        self.held_by_kopf && self.owner.is_none() && self.status.virtual_machine_ref.is_none()
    }
}

/// `spec.runStrategy` of a VM: what KubeVirt does when the guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunStrategy {
    /// Starts it anew, however it ended.
    Always,
    /// Starts it anew after a crash only.
    RerunOnFailure,
    /// Leaves it ended.
    Once,
    /// Leaves it ended, and starts it when asked.
    Manual,
    /// Ends it: somebody has stopped it (`virtctl stop`), or the template never has it started.
    Halted,
    /// A word that we do not know: somebody else decides.
    Other,
}

/// What makes a guest ready for its user. It is the template's to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadyBy {
    /// The VMI's condition `Ready`, which follows the readiness probe where the template has one.
    #[default]
    Vmi,
    /// That, and its guest agent is connected.
    Agent,
}

/// What a template says of starts, as stamped on the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartRules {
    /// What makes its guest ready.
    pub ready: ReadyBy,
    /// How long a start may take.
    pub deadline: SignedDuration,
    /// Where the running desktop is used. `None`: somebody else tells the row, or nobody does.
    pub stream_url: Option<String>,
}

impl Default for StartRules {
    fn default() -> Self {
        Self { ready: ReadyBy::default(), deadline: SignedDuration::from_mins(10), stream_url: None }
    }
}

impl StartRules {
    /// Reads the annotations of a VM. One that cannot be read counts as none.
    pub fn read(annotations: &BTreeMap<String, String>) -> Self {
        let default = Self::default();
        let seconds = annotations.get(ANNOTATION_START_DEADLINE).and_then(|text| text.parse::<u32>().ok());
        Self {
            ready: match annotations.get(ANNOTATION_READY).map(String::as_str) {
                Some("agent") => ReadyBy::Agent,
                _ => ReadyBy::Vmi,
            },
            deadline: seconds
                .filter(|seconds| *seconds > 0)
                .map_or(default.deadline, |seconds| SignedDuration::from_secs(i64::from(seconds))),
            stream_url: annotations.get(ANNOTATION_STREAM_URL).filter(|url| !url.is_empty()).cloned(),
        }
    }
}

/// A KubeVirt `VirtualMachine`, as far as we read it.
#[derive(Clone, Debug, PartialEq)]
pub struct Vm {
    /// Its UID.
    pub uid: String,
    /// Its name, if it was adopted and so has not the one that we give.
    pub adopted_name: Option<String>,
    /// Whom we made it for. `None`: it is not ours, though it has our name.
    pub owner: Option<Owner>,
    /// The database that this owner is a row of, as it is marked.
    pub database: Option<Uuid>,
    /// When it was made, by the API server's clock.
    pub created: Timestamp,
    /// What its template says of starts.
    pub start: StartRules,
    /// Whether KubeVirt has taken notice of it: it puts a finalizer on each VM before anything else, and no
    /// template may.
    pub noticed: bool,
    /// Its version, while no finalizer holds it. A delete must then mean this version: the API server looks for
    /// finalizers first and deletes by UID afterwards, whatever has come in between (`Store.Delete` of its generic
    /// registry). A VM to which KubeVirt adds its finalizer just then would go at once, and its VMI come when all is
    /// thought to be gone.
    pub unheld: Option<String>,
    /// Whether it is being deleted. It stays until its VMI is gone.
    pub deleting: bool,
    /// What KubeVirt does when the guest ends.
    pub run_strategy: RunStrategy,
    /// Whether KubeVirt is about to start it anew (`status.stateChangeRequests`).
    pub restart_pending: bool,
    /// KubeVirt's words for why it cannot make a VMI (condition `Failure`).
    pub failure: Option<String>,
    /// How many starts in a row ended before the guest ran (`status.startFailure`).
    pub failed_starts: i64,
}

impl Vm {
    /// Its name, and that of its VMI.
    pub fn name(&self, key: &Key) -> String {
        self.adopted_name.clone().unwrap_or_else(|| key.vm_name())
    }
}

/// `status.phase` of a VMI. `Other` holds for `WaitingForSync` and every word we have never heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmiPhase {
    /// No phase yet, or `Pending`: no pod.
    Pending,
    /// The pod exists.
    Scheduling,
    /// The pod is ready, the guest is not started.
    Scheduled,
    /// The guest runs (or is paused).
    Running,
    /// The guest powered off, or was shut down in time.
    Succeeded,
    /// The guest crashed, or did not shut down in time, or never started.
    Failed,
    /// No news to us.
    Other,
}

/// A KubeVirt `VirtualMachineInstance`, as far as we read it.
#[derive(Clone, Debug, PartialEq)]
pub struct Vmi {
    /// Its UID. A restart is another UID under the same name.
    pub uid: String,
    /// Its name, if its VM was adopted.
    pub adopted_name: Option<String>,
    /// Whom it was made for: the VM's template carries the mark.
    pub owner: Option<Owner>,
    /// The database that this owner is a row of, as it is marked.
    pub database: Option<Uuid>,
    /// When it was made, by the API server's clock.
    pub created: Timestamp,
    /// Whether it is being deleted: it stays `Running` until the guest has shut down.
    pub deleting: bool,
    /// When it should be gone, if it is being deleted: its grace is over then, and its pod's.
    pub gone_by: Option<Timestamp>,
    /// Where KubeVirt says it is. Never `printableStatus`, which is for people.
    pub phase: VmiPhase,
    /// Condition `Ready`.
    pub ready: bool,
    /// Why `Ready` does not hold while the guest runs: reason and message.
    pub unready: Option<(String, String)>,
    /// Condition `AgentConnected`.
    pub agent: bool,
    /// Condition `Paused`: the guest stands still, though its phase is `Running`.
    pub paused: bool,
    /// Whether it is to leave its node (condition `EvictionRequested`).
    pub evicted: bool,
    /// Whether its node was lost (`status.reason`).
    pub node_lost: bool,
    /// Its node. A live migration changes it under the same UID.
    pub node: Option<String>,
    /// The first address.
    pub ip: Option<String>,
    /// What KubeVirt says holds it up, if it says so: reason and message of the condition.
    pub waiting: Option<(String, String)>,
}

/// The instant of a decision, by both clocks that deadlines are judged by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Now {
    /// The database's: for rows.
    pub database: Timestamp,
    /// The API server's: for CRs applied by hand.
    pub cluster: Timestamp,
}

/// For how long the database has left unanswered what it was asked. Zero: it answers, or was asked nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Silence {
    /// What is read.
    pub reads: SignedDuration,
    /// What it is told: reports, and desktops that are due.
    pub writes: SignedDuration,
}

/// A sum that ends at the last instant there is, rather than in a panic on a huge timeoutMs.
pub(crate) fn later(at: Timestamp, by: SignedDuration) -> Timestamp {
    at.checked_add(by).unwrap_or(Timestamp::MAX)
}

/// What is to be told to the database about one desktop, in one entry of one batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Whose.
    pub id: Uuid,
    /// The generation that was looked at when this was decided.
    pub generation: i64,
    /// The VM made for it.
    pub vm_uid: Option<String>,
    /// Its new status. `None`: no news.
    pub status: Option<RowStatus>,
    /// Why.
    pub reason: Option<String>,
    /// The same for people. Empty: what it said before is no longer so.
    pub message: Option<String>,
    /// Where it is used, told together with `running`.
    pub stream_url: Option<String>,
    /// It is over: VM, VMI and Secret are gone, and someone looked.
    pub ended: bool,
}
