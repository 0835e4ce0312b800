//! Plain data: what is known of a desktop, on each side. No clients, no clock.

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use crate::crd::{CyberdeskSpec, CyberdeskStatus};
use crate::names::Owner;

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
}

/// A `Cyberdesk` object, as far as we read it.
#[derive(Clone, Debug, PartialEq)]
pub struct Cr {
    /// Its UID.
    pub uid: String,
    /// Its generation, raised by the API server with every change of the spec.
    pub generation: i64,
    /// When it was created, by the API server's clock.
    pub created: Timestamp,
    /// The row that we made it for. `None`: a person applied it.
    pub owner: Option<Owner>,
    /// Whether it is being deleted: somebody's finalizer holds it.
    pub deleting: bool,
    /// Its spec, or why it cannot be read.
    pub spec: Result<CyberdeskSpec, String>,
    /// Whether its status could be read. A later version's, or somebody else's, may not be.
    pub status_readable: bool,
    /// Its status as we last wrote it.
    pub status: CyberdeskStatus,
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
    /// `Halted`, `Manual` and words we do not know: somebody else decides.
    Other,
}

/// A KubeVirt `VirtualMachine`, as far as we read it.
#[derive(Clone, Debug, PartialEq)]
pub struct Vm {
    /// Its UID.
    pub uid: String,
    /// Whom we made it for. `None`: it is not ours, though it has our name.
    pub owner: Option<Owner>,
    /// Whether it is being deleted. It stays until its VMI is gone.
    pub deleting: bool,
    /// What KubeVirt does when the guest ends.
    pub run_strategy: RunStrategy,
    /// Whether KubeVirt is about to start it anew (`status.stateChangeRequests`).
    pub restart_pending: bool,
    /// KubeVirt's words for why it cannot make a VMI (condition `Failure`).
    pub failure: Option<String>,
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
    /// Whom it was made for: the VM's template carries the mark.
    pub owner: Option<Owner>,
    /// Whether it is being deleted: it stays `Running` until the guest has shut down.
    pub deleting: bool,
    /// Where KubeVirt says it is. Never `printableStatus`, which is for people.
    pub phase: VmiPhase,
    /// Condition `Ready`.
    pub ready: bool,
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
    /// The same for people.
    pub message: Option<String>,
    /// It is over: VM, VMI and Secret are gone, and someone looked.
    pub ended: bool,
}
