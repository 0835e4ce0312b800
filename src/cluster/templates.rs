//! Which VM templates are in use: those of the ConfigMap that were found good.
//!
//! An edit takes effect on the next VM. Before that, each template is read, rendered with sample values, and shown
//! to the API server (a dry run, in which KubeVirt's webhooks are asked and unknown fields refused). One that does
//! not pass changes nothing: its last good version stays in use, and the others are not touched. What was found good
//! is kept in a ConfigMap of ours, so that this holds over restarts too; its annotation has a condition per template.
//!
//! An API server or webhook that does not answer says nothing about a template. It is asked again; meanwhile the last
//! good version stays in use or, where there is none, the new one: making a VM then is the check. One whose Secret
//! cannot be read stays as it was read before; if it never was by this leader, its desktops wait, and others do not.

mod verdict;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference};
use kube::api::{Patch, PatchParams};
use kube::runtime::events::EventType;
use kube::runtime::watcher::Event;
use kube::{Api, Client, Resource};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use super::relist::Relisting;
use super::{CALL_DEADLINE, server_time};
use crate::config::Config;
use crate::events::News;
use crate::names::MANAGER;
use crate::operator::Operator;
use crate::reason::cut;
use crate::telemetry::chain;
use crate::template::{self, Refusal, Source, Sources, Template, Templates, bad_template, not_read};
use verdict::{Secrets, read, read_secrets, show};
pub(crate) use verdict::{Verdict, examine, in_use};

/// The ConfigMap with the VM templates, which people edit.
const CONFIG_MAP: &str = "cyberdesk-vm-template";
/// The ConfigMap with what was accepted of it, which is ours.
const RECORD: &str = "cyberdesk-vm-template-accepted";
/// The record's annotation with a condition per template.
const CONDITIONS: &str = "cyberdesk.io/conditions";

/// A template that was refused is looked at again after this time: what it waited for may have come.
const REFUSED_AGAIN: Duration = Duration::from_secs(300);
/// So is a Secret with user data, which nobody watches.
const SECRET_AGAIN: Duration = Duration::from_secs(30);
/// What could not be asked or written is tried again, less and less often.
const RETRY: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(30);

/// Most templates that the API server is shown at once.
const AT_ONCE: usize = 8;

/// How a template as the ConfigMap has it stands.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
struct Condition {
    template: String,
    /// The version that this speaks of.
    hash: String,
    #[serde(rename = "type")]
    kind: String,
    /// `True`, `False` or `Unknown`, as in Kubernetes' own.
    status: String,
    reason: String,
    message: String,
    last_transition_time: Option<Timestamp>,
}

impl Condition {
    fn of(template: &str, source: &Source, verdict: &Verdict) -> Self {
        let (status, reason, message) = match verdict {
            Verdict::Accepted(_, warnings) => ("True", "Accepted", warnings.join("; ")),
            Verdict::Refused(fault) => ("False", "Refused", fault.clone()),
            Verdict::Unchecked(_, why) => ("Unknown", "Unchecked", why.clone()),
        };
        Self {
            template: template.to_owned(),
            hash: source.hash(),
            kind: "Accepted".to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: cut(message),
            last_transition_time: None,
        }
    }

    fn accepted(&self) -> bool {
        self.status == "True"
    }
}

/// Whose templates are wanted.
#[derive(Clone, PartialEq)]
enum Wanted {
    /// Those of the ConfigMap.
    OfPeople(Sources, Box<ObjectReference>),
    /// Those of a folder or of the binary: there is nothing to go back to, and nobody to tell.
    Fixed(Sources),
}

impl Wanted {
    fn sources(&self) -> &Sources {
        match self {
            Self::OfPeople(sources, _) | Self::Fixed(sources) => sources,
        }
    }
}

/// Keeps the templates in use true to what is wanted, for as long as this daemon leads.
pub(crate) struct Keeper<'a> {
    operator: &'a Operator,
    client: &'a Client,
    /// Of the ConfigMaps and of Secrets with user data.
    namespace: &'a str,
    vm_namespace: &'a str,
    /// Time between two reads of the ConfigMap, whatever the watch tells.
    relist: Duration,
    /// The files of the good ones, and what was made of them.
    accepted: Sources,
    good: BTreeMap<String, Arc<Template>>,
    conditions: BTreeMap<String, Condition>,
    /// Whether the record cannot be written, and that was told.
    trouble: bool,
    /// The Secrets that templates name cannot be read, which was told.
    blind: bool,
    /// As last read or written. `None`: it has to be written.
    recorded: Option<(Sources, BTreeMap<String, Condition>)>,
}

impl<'a> Keeper<'a> {
    /// One that knows nothing yet.
    pub(crate) fn new(operator: &'a Operator, config: &'a Config, client: &'a Client) -> Self {
        let (namespace, vm_namespace) = (config.namespace.as_str(), config.vm_namespace.as_str());
        let (relist, recorded) = (config.resync_interval, None);
        let (accepted, good, conditions, trouble, blind) = Default::default();
        Self { operator, client, namespace, vm_namespace, relist, accepted, good, conditions, trouble, blind, recorded }
    }

    /// Keeps the templates as the ConfigMap has them, without one those that ship with the binary; or as a folder
    /// has them. Goes on for ever.
    pub(crate) async fn run(mut self, folder: Option<Sources>) {
        let mut wanted = folder.map(Wanted::Fixed);
        let follows = wanted.is_none();
        if follows {
            self.read_record().await;
        }
        let selector = format!("metadata.name={CONFIG_MAP}");
        let mut changes = Relisting::new(self.config_maps(), &selector, self.relist);
        let mut found = None;
        let mut due = Instant::now();
        let mut retry = *RETRY.start();
        loop {
            let event = tokio::select! {
                event = changes.next(), if follows => Some(event),
                () = sleep_until(due), if wanted.is_some() => None,
            };
            let map = match event {
                Some(Ok(Event::Init)) => {
                    found = None;
                    continue;
                }
                Some(Ok(Event::InitApply(map))) => {
                    found = Some(map);
                    continue;
                }
                Some(Ok(Event::InitDone)) => Some(found.take()),
                Some(Ok(Event::Apply(map))) => Some(Some(map)),
                Some(Ok(Event::Delete(_))) => Some(None),
                Some(Err(trouble)) => {
                    if trouble.is_news {
                        warn!(config_map = CONFIG_MAP, error = %chain(&trouble.error), "cannot watch; will try again");
                    }
                    continue;
                }
                None => None,
            };
            if let Some(map) = map {
                let next = map.map_or_else(|| Wanted::Fixed(template::built_in()), of_config_map);
                if wanted.as_ref() == Some(&next) {
                    continue;
                }
                // What was accepted of a ConfigMap means nothing to the templates of the binary, and the other way round.
                if !matches!((&wanted, &next), (None | Some(Wanted::OfPeople(..)), Wanted::OfPeople(..))) {
                    self.accepted.clear();
                    self.good.clear();
                }
                wanted = Some(next);
                retry = *RETRY.start();
            }
            let Some(wanted) = &wanted else { continue };
            let pause = match self.review(wanted, follows).await {
                Some(pause) => {
                    retry = *RETRY.start();
                    pause
                }
                None => {
                    let pause = retry;
                    retry = (retry * 2).min(*RETRY.end());
                    pause
                }
            };
            due = Instant::now() + pause;
        }
    }

    fn config_maps(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), self.namespace)
    }

    /// Judges all templates and takes what is good into use. Answers when to do so again, or `None` if something has
    /// to be tried again soon.
    async fn review(&mut self, wanted: &Wanted, has_record: bool) -> Option<Duration> {
        let secrets = self.secrets(wanted.sources()).await;
        let unread = secrets.values().find_map(|answer| answer.as_ref().err());
        if let Some(error) = unread.filter(|_| !self.blind) {
            warn!(error = %chain(error), "cannot read the Secrets that VM templates name; will try again");
        }
        self.blind = unread.is_some();
        let judged = wanted.sources().iter().map(|(name, source)| self.judge(name, source, &secrets));
        let verdicts: Vec<Verdict> = stream::iter(judged).buffered(AT_ONCE).collect().await;
        let mut templates = BTreeMap::new();
        let mut conditions = BTreeMap::new();
        let mut unchecked = self.blind;
        for ((name, source), verdict) in wanted.sources().iter().zip(verdicts) {
            conditions.insert(name.clone(), Condition::of(name, source, &verdict));
            // After a restart there is only the record. What a Secret held that was spoilt since, only memory has.
            let last_good = || {
                let recorded = || Some(read(self.vm_namespace, name, self.accepted.get(name)?, &secrets));
                let good = self.good.get(name).cloned().map(Ok).or_else(recorded);
                good.filter(|good| good.as_ref().err().is_none_or(Refusal::is_for_now))
            };
            let template = match verdict {
                Verdict::Accepted(template, _) => {
                    self.accepted.insert(name.clone(), source.clone());
                    self.good.insert(name.clone(), template.clone());
                    Ok(template)
                }
                Verdict::Refused(fault) => last_good().unwrap_or_else(|| Err(bad_template(cut(fault)))),
                Verdict::Unchecked(template, why) => {
                    unchecked = true;
                    last_good().unwrap_or_else(|| template.ok_or_else(|| not_read(cut(why))))
                }
            };
            templates.insert(name.clone(), template);
        }
        self.accepted.retain(|name, _| wanted.sources().contains_key(name));
        self.good.retain(|name, _| wanted.sources().contains_key(name));
        let unusable =
            templates.iter().filter_map(|(name, it)| Some((name.clone(), it.as_ref().err()?.clone()))).collect();
        self.publish(templates.into_iter().collect());
        self.tell(wanted, conditions, &unusable).await;
        let recorded = !has_record || self.write_record(wanted).await;
        let refused = self.conditions.values().any(|condition| !condition.accepted());
        match (unchecked || !recorded, secrets.is_empty(), refused) {
            (true, ..) => None,
            (false, false, _) => Some(SECRET_AGAIN),
            (false, true, true) => Some(REFUSED_AGAIN),
            // Nothing changes but by an edit.
            (false, true, false) => Some(Duration::from_secs(86_400)),
        }
    }

    /// Takes these into use.
    fn publish(&self, templates: Templates) {
        let templates = Arc::new(templates);
        let before = self.operator.templates.send_replace(Some(templates.clone()));
        if before.is_some_and(|before| templates.know_more_than(&before)) {
            // Each desktop that waits for its template has a CR.
            self.operator.wake_cluster();
        }
    }

    async fn judge(&self, name: &str, source: &Source, secrets: &Secrets) -> Verdict {
        let was_accepted = self.accepted.get(name) == Some(source);
        let template = match (read(self.vm_namespace, name, source, secrets), self.good.get(name)) {
            (Ok(template), _) => template,
            // What its Secret held when it was last read stays in use.
            (Err(refusal), Some(good)) if refusal.is_for_now() && was_accepted => good.clone(),
            (Err(refusal), _) => return Verdict::unread(refusal),
        };
        if was_accepted {
            // The warnings of that time still hold.
            let before = self.conditions.get(name).filter(|before| before.accepted() && !before.message.is_empty());
            return Verdict::Accepted(template, before.map(|before| before.message.clone()).into_iter().collect());
        }
        show(&self.operator.cluster, name, template).await
    }

    /// What is under the keys of Secrets that the templates, or their last good versions, take user data from.
    async fn secrets(&self, sources: &Sources) -> Secrets {
        read_secrets(self.client, self.namespace, sources.values().chain(self.accepted.values())).await
    }

    /// Tells what is new, in the log, as Events on the ConfigMap, and in figures.
    /// `unusable`: why it has to be done without, of those that are not in use.
    async fn tell(
        &mut self,
        wanted: &Wanted,
        mut conditions: BTreeMap<String, Condition>,
        unusable: &BTreeMap<String, Refusal>,
    ) {
        let time = server_time(self.client).await.ok().map(|reading| reading.time);
        for (name, condition) in &mut conditions {
            let before = self.conditions.get(name);
            let since = before.filter(|before| before.status == condition.status);
            condition.last_transition_time = since.map_or(time, |before| before.last_transition_time);
            if since.is_some_and(|before| (&before.hash, &before.message) == (&condition.hash, &condition.message)) {
                continue;
            }
            let (kind, note) = match (condition.status.as_str(), unusable.get(name)) {
                ("True", _) if condition.message.is_empty() => {
                    (EventType::Normal, format!("template {name} is in use"))
                }
                ("True", _) => (
                    EventType::Warning,
                    format!("template {name} is in use; the API server warns: {}", condition.message),
                ),
                ("False", None) => {
                    (EventType::Warning, format!("{}. The last good version stays in use", condition.message))
                }
                ("False", Some(refusal)) if refusal.is_for_now() => (
                    EventType::Warning,
                    format!("{}. Its last good version waits: {}", condition.message, refusal.message),
                ),
                ("False", Some(_)) => {
                    (EventType::Warning, format!("{}. There is no good version of it to use", condition.message))
                }
                _ => (EventType::Warning, format!("template {name} cannot be checked: {}", condition.message)),
            };
            match kind {
                EventType::Normal => info!(template = name, "VM template taken into use"),
                EventType::Warning => warn!(template = name, condition = condition.reason, "{note}"),
            }
            if condition.status == "False" {
                self.operator.metrics.template_refusals.inc();
            }
            if let Wanted::OfPeople(_, config_map) = wanted {
                let reason = format!("Template{}", condition.reason);
                self.operator.events.tell(config_map, "CheckTemplate", News { kind, reason, note }).await;
            }
        }
        self.operator.metrics.templates(conditions.iter().map(|(name, condition)| (name, condition.accepted())));
        self.conditions = conditions;
    }

    /// Reads what was accepted before. Without it, every template is new.
    async fn read_record(&mut self) {
        let (mut pause, mut trouble) = (*RETRY.start(), false);
        let map = loop {
            match within(self.config_maps().get_opt(RECORD)).await {
                Ok(map) => break map,
                Err(kube::Error::Api(status)) if status.code == 403 => break None,
                Err(error) if std::mem::replace(&mut trouble, true) => {
                    debug!(config_map = RECORD, error = %chain(&error), "still cannot read which VM templates were accepted");
                }
                Err(error) => {
                    warn!(config_map = RECORD, error = %chain(&error), "cannot read which VM templates were accepted; will try again");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(*RETRY.end());
        };
        let Some(map) = map else { return };
        self.accepted = template::sources(map.data.unwrap_or_default());
        let annotation = map.metadata.annotations.unwrap_or_default().remove(CONDITIONS).unwrap_or_default();
        let conditions: Vec<Condition> = serde_json::from_str(&annotation).unwrap_or_default();
        self.conditions = conditions.into_iter().map(|condition| (condition.template.clone(), condition)).collect();
        self.recorded = Some((self.accepted.clone(), self.conditions.clone()));
    }

    /// Writes what was accepted, and how each template stands. Whether that is so now.
    async fn write_record(&mut self, wanted: &Wanted) -> bool {
        let accepted = match wanted {
            Wanted::OfPeople(..) => self.accepted.clone(),
            Wanted::Fixed(_) => Sources::new(),
        };
        let next = (accepted, self.conditions.clone());
        if self.recorded.as_ref() == Some(&next) {
            return true;
        }
        let conditions: Vec<&Condition> = next.1.values().collect();
        let record = json!({
            "apiVersion": ConfigMap::api_version(&()), "kind": ConfigMap::kind(&()),
            "metadata": { "name": RECORD, "annotations": { CONDITIONS: json!(conditions).to_string() } },
            "data": template::files(&next.0),
        });
        let params = PatchParams::apply(MANAGER).force();
        let (maps, record) = (self.config_maps(), Patch::Apply(record));
        let written = self.operator.leadership.tenure.while_held(within(maps.patch(RECORD, &params, &record))).await;
        let Some(written) = written else { return false };
        match written {
            Ok(_) => {
                self.recorded = Some(next);
                self.trouble = false;
                true
            }
            Err(error) if std::mem::replace(&mut self.trouble, true) => {
                debug!(config_map = RECORD, error = %chain(&error), "still cannot keep which VM templates were accepted");
                false
            }
            Err(error) => {
                warn!(config_map = RECORD, error = %chain(&error), "cannot keep which VM templates were accepted (deploy/accepted-templates.yaml makes the ConfigMap for it); will try again");
                false
            }
        }
    }
}

fn of_config_map(map: ConfigMap) -> Wanted {
    // Of another version of the map it would be another object each time.
    let about = ObjectReference { resource_version: None, ..map.object_ref(&()) };
    Wanted::OfPeople(template::sources(map.data.unwrap_or_default()), Box::new(about))
}

async fn within<T>(call: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    match tokio::time::timeout(CALL_DEADLINE, call).await {
        Ok(answer) => answer,
        Err(_) => Err(kube::Error::Service("no answer in time".into())),
    }
}
