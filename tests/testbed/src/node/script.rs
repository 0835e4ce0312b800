//! Guest scripts: what a guest does, told by annotations on its VMI.

use anyhow::{Context, Result, bail};
use kube::api::DynamicObject;
use std::time::Duration;

use crate::kubevirt::annotation;

/// A single thing that a guest, or whoever holds the node, does when told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// The guest powers itself off: the VMI ends `Succeeded`.
    PowerOff,
    /// The guest crashes: the VMI ends `Failed`.
    Crash,
    /// The guest never comes up: the VMI ends `Failed` instead of reaching `Running`.
    FailBeforeRunning,
    /// The guest agent says hello (condition `AgentConnected` appears).
    AgentConnect,
    /// The guest agent falls silent (the condition disappears).
    AgentDisconnect,
    /// Somebody pauses the guest (condition `Paused` appears; the phase stays `Running`).
    Pause,
    /// Somebody lets it go on.
    Unpause,
    /// The guest moves to another node: new pod, node and IP, same VMI.
    Migrate,
    /// Somebody drains the node: the pod is evicted by the API, and the guest shuts down in its grace.
    Drain,
    /// The node runs short: its kubelet ends the pod at once, and the guest with it.
    Evict,
    /// The pod is not ready, as of a lost node, and is then taken out of the cluster without having ended.
    LosePod,
    /// The node falls silent: the pod is not ready, and nothing that is asked of it happens.
    LoseNode,
    /// The silent node is given up: its pod is removed by force, and the VMI ends `Failed`, `NodeUnresponsive`.
    GiveUpNode,
}

/// Why a guest never gets as far as starting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stuck {
    /// No node fits: the pod stays unbound with `PodScheduled=False`.
    Unschedulable,
    /// The image cannot be pulled: the pod is bound and its container waits.
    ImagePull,
    /// A Secret that the pod mounts is not there: the container stays in creation.
    MissingSecret,
    /// The container runs, and is never ready.
    NotReady,
    /// The API server refuses the pod; see `node/quota.rs`.
    Quota,
}

/// A guest's script, as read from its VMI's annotations. The table of them is in the documentation of [`super`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Script {
    /// Time from pod ready to `Running`, where the script says so.
    pub(super) boot: Option<Duration>,
    /// Time from the wish to shut down to `Succeeded`.
    pub(super) shutdown: Option<Duration>,
    /// Time from `Running` to the agent's hello; without it no agent ever connects by itself.
    pub(super) agent: Option<Duration>,
    /// The guest does not listen to the power button.
    pub(super) ignores_acpi: bool,
    /// The guest is paused when it starts, as with `startStrategy: Paused`.
    pub(super) paused: bool,
    /// Its readiness probe fails for ever: the guest runs, and its pod is not ready.
    pub(super) never_ready: bool,
    /// Why it never starts, if it does not.
    pub(super) stuck: Option<Stuck>,
    /// What it was last told to do, as written: a changed text is a new command.
    pub(super) command: Option<(String, Command)>,
}

/// Prefix of the annotations.
pub(super) const PREFIX: &str = "guest.testbed/";
/// Where the node notes the command it has carried out.
pub(super) const DONE: &str = "guest.testbed/done";

impl Script {
    /// Reads a VMI's annotations. A text that is not understood is an error: a test that misspells its script must not
    /// pass by accident.
    pub(super) fn of(vmi: &DynamicObject) -> Result<Self> {
        let mut script = Self::default();
        for (key, text) in vmi.metadata.annotations.iter().flatten() {
            let Some(name) = key.strip_prefix(PREFIX) else {
                continue;
            };
            script.set(name, text).with_context(|| format!("annotation {key}: {text:?}"))?;
        }
        Ok(script)
    }

    fn set(&mut self, name: &str, text: &str) -> Result<()> {
        match name {
            "boot" => self.boot = Some(duration(text)?),
            "shutdown" => self.shutdown = Some(duration(text)?),
            "agent" => self.agent = Some(duration(text)?),
            "ignores-acpi" => self.ignores_acpi = text.parse()?,
            "paused" => self.paused = text.parse()?,
            "never-ready" => self.never_ready = text.parse()?,
            "never-schedules" => {
                self.stuck = Some(match text {
                    "unschedulable" => Stuck::Unschedulable,
                    "image-pull" => Stuck::ImagePull,
                    "missing-secret" => Stuck::MissingSecret,
                    "not-ready" => Stuck::NotReady,
                    "quota" => Stuck::Quota,
                    _ => bail!("expected unschedulable, image-pull, missing-secret, not-ready or quota"),
                });
            }
            "do" => {
                // `crash`, or `crash 2` to say it again: what follows the first word only makes the text a new one.
                let command = match text.split_whitespace().next().unwrap_or_default() {
                    "power-off" => Command::PowerOff,
                    "crash" => Command::Crash,
                    "fail-before-running" => Command::FailBeforeRunning,
                    "agent-connect" => Command::AgentConnect,
                    "agent-disconnect" => Command::AgentDisconnect,
                    "pause" => Command::Pause,
                    "unpause" => Command::Unpause,
                    "migrate" => Command::Migrate,
                    "drain" => Command::Drain,
                    "evict" => Command::Evict,
                    "lose-pod" => Command::LosePod,
                    "lose-node" => Command::LoseNode,
                    "give-up-node" => Command::GiveUpNode,
                    _ => bail!("no such command"),
                };
                self.command = Some((text.to_owned(), command));
            }
            "done" => {}
            _ => bail!("no such annotation"),
        }
        Ok(())
    }

    /// The command that is still to be carried out.
    pub(super) fn due(&self, vmi: &DynamicObject) -> Option<Command> {
        let (text, command) = self.command.as_ref()?;
        (annotation(vmi, DONE) != Some(text)).then_some(*command)
    }

    /// Whether its node has fallen silent and was not given up.
    pub(super) fn node_is_lost(&self, vmi: &DynamicObject) -> bool {
        matches!(self.command, Some((_, Command::LoseNode))) && self.due(vmi).is_none()
    }
}

/// `300ms`, `1s`, `1.5s`, `2m`.
fn duration(text: &str) -> Result<Duration> {
    let end = text.find(|c: char| c.is_alphabetic()).context("a time needs a unit: ms, s or m")?;
    let number: f64 = text[..end].parse()?;
    let unit = match &text[end..] {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        unit => bail!("unknown unit {unit:?}"),
    };
    Ok(Duration::try_from_secs_f64(number * unit)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(annotations: serde_json::Value) -> Result<Script> {
        let vmi = json!({ "metadata": { "annotations": annotations } });
        Script::of(&serde_json::from_value(vmi).expect("a VMI"))
    }

    #[test]
    fn reads_what_the_table_says_and_refuses_the_rest() {
        let script = read(json!({ "guest.testbed/boot": "1.5s", "guest.testbed/do": "crash 2", "other": "x" }));
        let expected = Script {
            boot: Some(Duration::from_millis(1500)),
            command: Some(("crash 2".into(), Command::Crash)),
            ..Script::default()
        };
        assert_eq!(script.expect("valid"), expected);
        for (key, text) in [("boot", "5"), ("do", "dance"), ("ignore-acpi", "true"), ("never-schedules", "no")] {
            let error = read(json!({ format!("guest.testbed/{key}"): text })).expect_err(key);
            assert!(error.to_string().contains(key), "{error}");
        }
    }
}
