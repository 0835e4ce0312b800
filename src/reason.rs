//! Why a desktop ends, or is not ready: one table of stable words, the same in rows, CRs, Events, figures, logs and docs.

use std::fmt;

use jiff::Timestamp;

use crate::crd::{End, Phase};

/// Why a desktop ends, or what it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Somebody asked for its end: in SQL, or by writing a terminal status.
    Requested,
    /// Its deadline came.
    Timeout,
    /// Nobody used it for as long as its idle timeout.
    Idle,
    /// Its row was deleted, by itself or with its user.
    RowDeleted,
    /// Its guest powered off.
    GuestShutdown,
    /// Its guest crashed, or never came up.
    GuestCrashed,
    /// Its node was drained, and it could not move.
    Evicted,
    /// Its node does not answer.
    NodeLost,
    /// Somebody deleted its VM.
    VmDeleted,
    /// Somebody stopped its VM.
    VmStopped,
    /// A VM that is not ours has its name.
    NameTaken,
    /// The template cannot be rendered.
    BadTemplate,
    /// The desktop's params are not what the template offers.
    BadParams,
    /// The spec of a CR applied by hand cannot be read.
    BadSpec,
    /// The API server refused the VM, and always will.
    Refused,
    /// The API server refuses the VM, for now.
    NotCreated,
    /// A quota of the namespace is used up.
    Quota,
    /// KubeVirt cannot make the VMI.
    VmiRefused,
    /// KubeVirt cannot make the pod.
    PodRefused,
    /// No node takes it.
    Unschedulable,
    /// An image cannot be pulled.
    ImagePull,
    /// A disk of it is not there.
    Storage,
    /// Its guest ends again and again before it runs.
    CrashLoop,
    /// KubeVirt says of it that something does not work.
    NotSynchronized,
    /// Its guest is paused.
    Paused,
    /// Its pod does not get ready, and KubeVirt does not say why.
    PodNotReady,
    /// Its guest runs and does not get ready.
    GuestNotReady,
    /// Its guest's agent does not connect.
    AgentNotConnected,
    /// It was not ready in time, and nobody says why.
    StartTimeout,
    /// We make no more VMs until KubeVirt has caught up.
    Throttled,
    /// An administrator has us make no more VMs for now.
    MakingPaused,
    /// Somebody has us leave it as it is.
    DesktopPaused,
    /// The API server, an admission webhook or KubeVirt as a whole does not work.
    ClusterUnavailable,
    /// Its VMI is still there though its grace is over.
    TeardownStuck,
}

/// One line of the table.
struct Line {
    /// The stable word.
    word: &'static str,
    /// The phase of a desktop that ends for it. `None`: it is waited for.
    end: Option<Phase>,
    /// What happened, for people, when nobody had better words.
    words: &'static str,
    /// What to do.
    advice: &'static str,
}

impl Reason {
    /// All of them, for tables and tests.
    pub const ALL: [Self; 34] = [
        Self::Requested,
        Self::Timeout,
        Self::Idle,
        Self::RowDeleted,
        Self::GuestShutdown,
        Self::GuestCrashed,
        Self::Evicted,
        Self::NodeLost,
        Self::VmDeleted,
        Self::VmStopped,
        Self::NameTaken,
        Self::BadTemplate,
        Self::BadParams,
        Self::BadSpec,
        Self::Refused,
        Self::NotCreated,
        Self::Quota,
        Self::VmiRefused,
        Self::PodRefused,
        Self::Unschedulable,
        Self::ImagePull,
        Self::Storage,
        Self::CrashLoop,
        Self::NotSynchronized,
        Self::Paused,
        Self::PodNotReady,
        Self::GuestNotReady,
        Self::AgentNotConnected,
        Self::StartTimeout,
        Self::Throttled,
        Self::MakingPaused,
        Self::DesktopPaused,
        Self::ClusterUnavailable,
        Self::TeardownStuck,
    ];

    fn line(self) -> Line {
        let line = |word, end, words, advice| Line { word, end, words, advice };
        let (terminated, error) = (Some(Phase::Terminated), Some(Phase::Error));
        match self {
            Self::Requested => line("requested", terminated, "shutdown was requested", "nothing"),
            Self::Timeout => line(
                "timeout",
                terminated,
                "the deadline of the desktop came",
                "nothing; set a later `timeout_at` on a desktop that should live longer",
            ),
            Self::Idle => line(
                "idle",
                terminated,
                "nobody used the desktop for as long as its idle timeout",
                "nothing; `touch_desktop` tells that a desktop is in use",
            ),
            Self::RowDeleted => line("row-deleted", terminated, "the row of the desktop was deleted", "nothing"),
            Self::GuestShutdown => line("guest-shutdown", terminated, "the guest powered off", "nothing"),
            Self::GuestCrashed => line(
                "guest-crashed",
                error,
                "the guest crashed or did not come up",
                "look at the guest's console; `runStrategy: RerunOnFailure` in the template has KubeVirt start it anew",
            ),
            Self::Evicted => line(
                "evicted",
                error,
                "the node was drained, and the guest had to end",
                "`evictionStrategy: LiveMigrateIfPossible` in the template lets a guest move that can",
            ),
            Self::NodeLost => line(
                "node-lost",
                error,
                "the node does not answer",
                "bring the node back or remove it; a guest that restarts elsewhere needs `runStrategy: RerunOnFailure`",
            ),
            Self::VmDeleted => line(
                "vm-deleted",
                terminated,
                "somebody deleted the VirtualMachine",
                "end desktops by their row, or by their Cyberdesk if they have none",
            ),
            Self::VmStopped => line(
                "vm-stopped",
                error,
                "somebody stopped the VirtualMachine",
                "`virtctl start` it, or end the desktop; one whose template never starts it ends by itself",
            ),
            Self::NameTaken => line(
                "name-taken",
                error,
                "a VirtualMachine that is not of this desktop has its name",
                "delete or rename the stranger; ours carry the label `cyberdesk.io/owner`",
            ),
            Self::BadTemplate => line(
                "bad-template",
                error,
                "the VM template cannot be rendered",
                "mend the template: the message says where",
            ),
            Self::BadParams => line(
                "bad-params",
                error,
                "the params are not what the VM template takes",
                "insert another row with params as the message says",
            ),
            Self::BadSpec => line(
                "bad-spec",
                error,
                "the spec cannot be read",
                "apply the Cyberdesk anew, mended as the message says",
            ),
            Self::Refused => line(
                "refused",
                error,
                "the API server refused the VirtualMachine",
                "mend the template: the message names the field",
            ),
            Self::NotCreated => line(
                "not-created",
                error,
                "the API server does not let the VirtualMachine be made",
                "see the message: a Role, a policy, or an object of the same name that is still being deleted",
            ),
            Self::Quota => line(
                "quota",
                error,
                "a quota of the namespace is used up",
                "raise the ResourceQuota, or let other desktops end first",
            ),
            Self::VmiRefused => line(
                "vmi-refused",
                error,
                "KubeVirt cannot make the VirtualMachineInstance",
                "mend the template: KubeVirt takes it for a VM and not for an instance",
            ),
            Self::PodRefused => line(
                "pod-refused",
                error,
                "KubeVirt cannot make the pod of the guest",
                "see the message: Pod Security, a policy or a LimitRange of the namespace",
            ),
            Self::Unschedulable => line(
                "unschedulable",
                error,
                "no node takes the guest",
                "add nodes, or ask for less memory, fewer cores or another node in the template",
            ),
            Self::ImagePull => line(
                "image-pull",
                error,
                "an image cannot be pulled",
                "check the image's name, the registry and the pull secret",
            ),
            Self::Storage => line(
                "storage",
                error,
                "a disk of the guest is not there",
                "look at the PersistentVolumeClaims and DataVolumes that the template names",
            ),
            Self::CrashLoop => line(
                "crash-loop",
                error,
                "the guest ends again and again before it runs",
                "look at `kubectl describe vmi` and the log of its virt-launcher pod",
            ),
            Self::NotSynchronized => line(
                "not-synchronized",
                error,
                "KubeVirt cannot bring the guest to what its manifest says",
                "see the message; often a Secret, ConfigMap or device that the template names is not as it should be",
            ),
            Self::Paused => line(
                "paused",
                error,
                "the guest is paused",
                "`virtctl unpause vmi`; a template with `startStrategy: Paused` never starts by itself",
            ),
            Self::PodNotReady => line(
                "pod-not-ready",
                error,
                "the pod of the guest does not get ready",
                "`kubectl describe pod` tells: often a Secret, ConfigMap or volume that is missing",
            ),
            Self::GuestNotReady => line(
                "guest-not-ready",
                error,
                "the guest runs and does not get ready",
                "look at the readiness probe of the template and at the guest's console",
            ),
            Self::AgentNotConnected => line(
                "agent-not-connected",
                error,
                "the guest agent does not connect",
                "have `qemu-guest-agent` started by the image or its cloud-init, or take `cyberdesk.io/ready: agent` out of the template",
            ),
            Self::StartTimeout => line(
                "start-timeout",
                error,
                "the guest was not ready in time",
                "`kubectl describe` its VM and VMI; a slow first boot needs a later `cyberdesk.io/start-deadline`",
            ),
            Self::Throttled => line(
                "throttled",
                None,
                "KubeVirt has many VirtualMachines to start already",
                "wait: it is made as soon as KubeVirt has caught up; `CYBERDESK_MAX_UNSTARTED` is the limit",
            ),
            Self::MakingPaused => line(
                "making-paused",
                None,
                "an administrator has paused the making of new desktops",
                "wait, or have `paused` in `cyberdesk.settings` taken back",
            ),
            Self::DesktopPaused => line(
                "desktop-paused",
                None,
                "somebody has paused the desktop",
                "`kubectl annotate cd/ID cyberdesk.io/paused-` or `cyberdesk.pause_desktop(ID, false)`, as the message says",
            ),
            Self::ClusterUnavailable => line(
                "cluster-unavailable",
                None,
                "the API server, an admission webhook or KubeVirt does not work",
                "look at what the message names: the pods of KubeVirt, a webhook, a Secret, the API server; the start goes on by itself",
            ),
            Self::TeardownStuck => line(
                "teardown-stuck",
                None,
                "the guest should have ended and is still there",
                "look at its node; if that is lost for good, remove it and its pods (`kubectl delete pod --force`)",
            ),
        }
    }

    /// The stable word.
    pub fn as_str(self) -> &'static str {
        self.line().word
    }

    /// Reads the stable word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == word)
    }

    /// The phase that a desktop ends in for this reason. `None`: no desktop ends for it.
    pub fn phase(self) -> Option<Phase> {
        self.line().end
    }

    /// Whether a desktop waits for it because of us: that is no news to its owner.
    pub fn is_our_own_doing(self) -> bool {
        matches!(self, Self::Throttled | Self::MakingPaused)
    }

    /// What to tell people when nobody had better words.
    pub fn words(self) -> &'static str {
        self.line().words
    }

    /// What to do about it.
    pub fn advice(self) -> &'static str {
        self.line().advice
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An end for this reason, decided at this instant.
pub fn end(reason: Reason, message: Option<String>, at: Timestamp) -> End {
    let message = message.unwrap_or_else(|| reason.words().to_owned());
    let phase = reason.phase().unwrap_or(Phase::Error);
    End { phase, reason: reason.as_str().to_owned(), message: Some(cut(message)), at }
}

/// Longest message that is passed on, in characters. An API server's refusal echoes what it was given, and
/// a condition that is too long is refused itself.
const LONGEST_MESSAGE: usize = 2000;

/// A message of a length that everyone takes.
pub fn cut(message: String) -> String {
    match message.char_indices().nth(LONGEST_MESSAGE - 1) {
        Some((end, last)) if end + last.len_utf8() < message.len() => format!("{}…", &message[..end]),
        _ => message,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_reason_has_a_word_of_its_own_that_leads_back_to_it() {
        let words: HashSet<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(words.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.as_str()), Some(reason));
        }
    }

    /// People read the page, programs the table: they say the same.
    #[test]
    fn the_page_of_reasons_is_the_table() {
        let page = include_str!("../docs/reasons.md");
        let line = |reason: Reason| {
            let status = match reason.phase() {
                Some(Phase::Terminated) => "`terminated`",
                Some(_) => "`error`",
                None => "none: it waits",
            };
            format!("| `{reason}` | {status} | {} | {} |", reason.words(), reason.advice())
        };
        let table: Vec<String> = Reason::ALL.into_iter().map(line).collect();
        let after_the_head = page.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
        let told: Vec<&str> = after_the_head.take_while(|line| !line.is_empty()).collect();
        assert!(told == table, "docs/reasons.md is out of date; its table should be:\n{}", table.join("\n"));
    }

    #[test]
    fn a_message_that_is_cut_is_as_long_as_the_longest() {
        assert_eq!(cut("ä".repeat(2000)), "ä".repeat(2000));
        assert_eq!(cut("ä".repeat(2001)), format!("{}…", "ä".repeat(1999)));
    }
}
