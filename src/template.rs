//! Turns a VM template and a desktop into the manifests to create. Pure.
//!
//! A template set is a folder or a ConfigMap. `NAME.yaml` is a VirtualMachine, or two YAML documents: settings of
//! ours, then the VirtualMachine. `NAME.user-data` is the cloud-init user data that goes with it. In all of them
//! `${variable}` stands for a value: see [`syntax`]. What authors of templates need to know is in docs/templates.md.
//!
//! A template is checked as a whole when it is read, and rendered with sample values: what is wrong with it is
//! told then, and a row can only be refused for its own params.

mod cloud_init;
mod params;
mod settings;
mod syntax;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::model::StartRules;
use crate::names::{
    ANNOTATION_READY, ANNOTATION_START_DEADLINE, ANNOTATION_STREAM_URL, ANNOTATION_TEMPLATE, Key, MANAGER, Owner,
};
use crate::reason::Reason;
use cloud_init::{Data, Part};
use params::{Params, TEMPLATE};
pub use settings::SecretKey;
use settings::{DEFAULT_START_DEADLINE, Ready, Settings};
use syntax::Variables;

/// The template that a desktop gets when its params name none.
const DEFAULT: &str = "default";
/// Longest stream URL, in characters: the column of the app's table.
const LONGEST_URL: usize = 1024;
/// What of a param is written as it is in a URL: what RFC 3986 calls unreserved.
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Why no manifest could be made, in words for the one who can mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// `bad-template` or `bad-params`; `cluster-unavailable` if the template is not known yet.
    pub reason: Reason,
    /// What is wrong and what to do.
    pub message: String,
}

impl Refusal {
    /// Whether it is for now: neither template nor params are at fault.
    pub fn is_for_now(&self) -> bool {
        self.reason == Reason::ClusterUnavailable
    }
}

fn bad_params(message: String) -> Refusal {
    Refusal { reason: Reason::BadParams, message }
}

pub(crate) fn bad_template(message: String) -> Refusal {
    Refusal { reason: Reason::BadTemplate, message }
}

pub(crate) fn not_read(message: String) -> Refusal {
    Refusal { reason: Reason::ClusterUnavailable, message }
}

/// The objects to create for one desktop.
///
/// Its `Debug` shows none of it: a template may hold secrets, and logs must not.
#[derive(Clone, PartialEq)]
pub struct Manifests {
    /// The VirtualMachine.
    pub vm: Value,
    /// The name of the Secret.
    pub secret_name: String,
    /// The data of the Secret that it takes its cloud-init from, if it has any.
    pub user_data: Option<BTreeMap<String, Vec<u8>>>,
    /// Labels of both.
    pub labels: BTreeMap<String, String>,
}

impl fmt::Debug for Manifests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manifests").field("secret_name", &self.secret_name).finish_non_exhaustive()
    }
}

impl Manifests {
    /// What the template says of starts.
    pub fn start_rules(&self) -> StartRules {
        let annotations = self.vm.pointer("/metadata/annotations").and_then(Value::as_object);
        let texts = |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
        StartRules::read(&annotations.into_iter().flatten().filter_map(texts).collect())
    }
}

/// The files of one template.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Source {
    vm: Option<String>,
    user_data: Option<String>,
}

impl Source {
    /// Tells one version of the files from another.
    pub fn hash(&self) -> String {
        hash(self.vm.as_deref().unwrap_or_default(), self.user_data.as_deref().unwrap_or_default())
    }
}

/// The files of all templates, by the name of the template.
pub type Sources = BTreeMap<String, Source>;

/// Sorts files by the template they belong to, as a folder or the `data` of a ConfigMap holds them. Names that end
/// neither in `.yaml` nor in `.user-data` are no templates.
pub fn sources<N: AsRef<str>, T: Into<String>>(files: impl IntoIterator<Item = (N, T)>) -> Sources {
    let mut sources = Sources::new();
    for (file, text) in files {
        if let Some(name) = file.as_ref().strip_suffix(".yaml") {
            sources.entry(name.to_owned()).or_default().vm = Some(text.into());
        } else if let Some(name) = file.as_ref().strip_suffix(".user-data") {
            sources.entry(name.to_owned()).or_default().user_data = Some(text.into());
        }
    }
    sources
}

/// The way back from [`sources`].
pub fn files(sources: &Sources) -> BTreeMap<String, String> {
    let of = |(name, source): (&String, &Source)| {
        let named = |suffix: &str, text: &Option<String>| text.clone().map(|text| (format!("{name}.{suffix}"), text));
        named("yaml", &source.vm).into_iter().chain(named("user-data", &source.user_data)).collect::<Vec<_>>()
    };
    sources.iter().flat_map(of).collect()
}

/// The key of a Secret that a template takes its user data from, if it does.
pub fn secret(source: &Source) -> Option<SecretKey> {
    settings::read(source.vm.as_deref()?).ok()?.0.user_data_from
}

/// The files of the templates that ship with the binary.
pub fn built_in() -> Sources {
    sources([
        ("default.yaml", include_str!("../templates/default.yaml")),
        ("default.user-data", include_str!("../templates/default.user-data")),
        ("small.yaml", include_str!("../templates/small.yaml")),
    ])
}

/// All templates there are, by name: one that cannot be used says why. Its `Debug` shows the names only.
#[derive(Clone, Default)]
pub struct Templates {
    named: BTreeMap<String, Result<Arc<Template>, Refusal>>,
    /// Why it is not known which there are, while it is not.
    unread: Option<Refusal>,
}

impl fmt::Debug for Templates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.named.keys()).finish()
    }
}

impl FromIterator<(String, Result<Arc<Template>, Refusal>)> for Templates {
    fn from_iter<T: IntoIterator<Item = (String, Result<Arc<Template>, Refusal>)>>(templates: T) -> Self {
        Self { named: templates.into_iter().collect(), unread: None }
    }
}

impl Templates {
    /// Templates from files by name, none of which takes its user data from a Secret.
    pub fn new<N: AsRef<str>, T: Into<String>>(namespace: &str, files: impl IntoIterator<Item = (N, T)>) -> Self {
        Self::read(namespace, &sources(files), |_| Err("there are no Secrets here".to_owned()))
    }

    /// Templates as their files say, judged by nobody else. VMs are made in `namespace`. `secret` answers what is under
    /// a key of a Secret, or why that is not known, where a template takes its user data from one.
    pub fn read(namespace: &str, sources: &Sources, secret: impl Fn(&SecretKey) -> Result<String, String>) -> Self {
        sources
            .iter()
            .map(|(name, source)| (name.clone(), Template::read(namespace, name, source, &secret).map(Arc::new)))
            .collect()
    }

    /// Which there are is not known yet.
    pub fn unread() -> Self {
        let why = "the VM templates have not been read yet: the operator's log says why".to_owned();
        Self { named: BTreeMap::new(), unread: Some(not_read(why)) }
    }

    /// Why desktops have to wait until more is known of them, if any do.
    pub fn not_known(&self) -> impl Iterator<Item = &Refusal> {
        let named = self.named.values().filter_map(|template| template.as_ref().err());
        self.unread.iter().chain(named.filter(|refusal| refusal.is_for_now()))
    }

    /// Whether a desktop that had to wait before need not any more.
    pub fn know_more_than(&self, before: &Self) -> bool {
        let waits = |it: &Result<_, Refusal>| it.as_ref().is_err_and(Refusal::is_for_now);
        before.unread.is_some()
            || before.named.iter().any(|(name, it)| waits(it) && !self.named.get(name).is_some_and(waits))
    }

    /// What is wrong with each template that cannot be used.
    pub fn faults(&self) -> impl Iterator<Item = &str> {
        self.named.values().filter_map(|template| Some(template.as_ref().err()?.message.as_str()))
    }

    /// Makes the manifests of one desktop. `params` choose among what the template offers.
    ///
    /// # Errors
    ///
    /// If the template cannot be used, or not yet, or does not take these params.
    pub fn render(
        &self,
        key: &Key,
        owner: &Owner,
        user: Option<Uuid>,
        params: Option<&Value>,
    ) -> Result<Manifests, Refusal> {
        let (template, given) = self.choose(params)?;
        template.render(key, owner, user, &given)
    }

    fn choose(&self, params: Option<&Value>) -> Result<(&Template, Map<String, Value>), Refusal> {
        let mut params = match params {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(params)) => params.clone(),
            Some(other) => {
                return Err(bad_params(format!(
                    "params must be an object such as {{\"template\": \"{DEFAULT}\"}}, not {other}"
                )));
            }
        };
        let names = || self.named.keys().cloned().collect::<Vec<_>>().join(", ");
        let named = params.remove(TEMPLATE);
        let name = match &named {
            None => DEFAULT,
            Some(Value::String(name)) => name,
            Some(other) => {
                return Err(bad_params(format!(
                    "params.template must be the name of a template ({}), not {other}",
                    names()
                )));
            }
        };
        let found = self.named.get(name).map(Result::as_ref).or(self.unread.as_ref().map(Err));
        match (found, named.is_some()) {
            (Some(Ok(template)), _) => Ok((template, params)),
            (Some(Err(refusal)), _) => Err(refusal.clone()),
            (None, true) => {
                Err(bad_params(format!("params.template: there is no template {name:?}; there are: {}", names())))
            }
            (None, false) => Err(bad_template(format!("there is no template {DEFAULT}.yaml; there are: {}", names()))),
        }
    }
}

/// One template, read and found to render.
#[derive(Debug)]
pub struct Template {
    namespace: String,
    hash: String,
    settings: Settings,
    params: Params,
    vm: Value,
    cloud_init: Vec<Part>,
}

impl Template {
    /// Reads a template and renders it with sample values.
    ///
    /// # Errors
    ///
    /// All that is wrong with it, each fault with its file and place.
    pub fn read(
        namespace: &str,
        name: &str,
        source: &Source,
        secret: impl Fn(&SecretKey) -> Result<String, String>,
    ) -> Result<Self, Refusal> {
        let file = format!("{name}.yaml");
        let at = |fault: String| bad_template(format!("{file}:{fault}"));
        let Some(text) = source.vm.as_deref() else {
            return Err(bad_template(format!("{name}.user-data has no {file} beside it")));
        };
        let (settings, mut vm) = settings::read(text).map_err(at)?;
        let user_data = user_data(name, source, &settings, secret)?;
        let user_data_text = user_data.as_ref().map(|(_, text)| text.as_str());
        let cloud_init = cloud_init::take(&mut vm, user_data_text).map_err(|fault| match (fault, &user_data) {
            (cloud_init::Fault::UserData(fault), Some((place, _))) => bad_template(format!("{place}:{fault}")),
            (cloud_init::Fault::UserData(fault) | cloud_init::Fault::Vm(fault), _) => at(format!("1:1: {fault}")),
        })?;

        let own = own(namespace, &sample_key());
        let plain = cloud_init.iter().filter_map(|part| match &part.data {
            Data::Text(text) => Some(text),
            Data::Fixed(_) | Data::Yaml(..) => None,
        });
        let plain: BTreeSet<String> = plain
            .flat_map(|text| syntax::names(text))
            .map(|name| name.strip_prefix(syntax::PARAMS).unwrap_or(name).to_owned())
            .collect();
        let params = Params::read(settings.params.as_ref(), &own, &plain);
        let place = |fault: &String| format!("{file}:{}: {fault}", place_of(text, fault));
        let mut faults: Vec<String> = params.as_ref().err().into_iter().flatten().map(place).collect();
        let known = Variables { own, params: settings.param_names().map(|name| (name.clone(), Value::Null)).collect() };
        faults.extend(variable_faults(&known, &file, text, |see| {
            syntax::visit(&vm, see);
            settings.stream_url.iter().for_each(|url| see(url, false));
            cloud_init.iter().filter(|part| !part.is_user_data).for_each(|part| part.data.visit(see));
        }));
        if let Some((place, text)) = &user_data {
            faults.extend(variable_faults(&known, place, text, |see| {
                cloud_init.iter().filter(|part| part.is_user_data).for_each(|part| part.data.visit(see));
            }));
        }
        faults.extend(settings.start_deadline().err().iter().map(place));
        let params = match params {
            Ok(params) if faults.is_empty() => params,
            _ => return Err(bad_template(faults.join("; "))),
        };
        let beside = user_data_text.filter(|_| settings.user_data.is_none());
        let hash = hash(text, beside.unwrap_or_default());
        let template = Self { namespace: namespace.to_owned(), hash, settings, params, vm, cloud_init };
        template.samples().map_err(|faults| bad_template(faults.iter().map(place).collect::<Vec<_>>().join("; ")))?;
        Ok(template)
    }

    /// The manifests of a desktop that there is not, with sample values: what a template is judged by.
    ///
    /// # Errors
    ///
    /// Why it does not render, in one or more sentences.
    pub fn samples(&self) -> Result<Vec<Manifests>, Vec<String>> {
        let key = sample_key();
        let params = self.params.samples(&own(&self.namespace, &key))?;
        let render = |params: &_| self.render(&key, &Owner::Row(Uuid::nil()), None, params);
        params.iter().map(render).collect::<Result<_, _>>().map_err(|refusal| vec![refusal.message])
    }

    fn render(
        &self,
        key: &Key,
        owner: &Owner,
        user: Option<Uuid>,
        given: &Map<String, Value>,
    ) -> Result<Manifests, Refusal> {
        let own = own(&self.namespace, key);
        let params = self.params.resolve(given, &own).map_err(bad_params)?;
        let variables = Variables { own, params };
        let mut vm = syntax::fill(&self.vm, &variables).map_err(bad_template)?;
        let labels = owner.labels(key, user);
        let annotations = self.annotations(&variables).map_err(bad_template)?;
        finish(&mut vm, key, &self.namespace, &labels, annotations).map_err(bad_template)?;

        let secret_name = owner.secret_name();
        let mut user_data = BTreeMap::new();
        for part in &self.cloud_init {
            part.refer(&mut vm, &secret_name);
            user_data.insert(part.key.to_owned(), part.data.render(&variables).map_err(bad_template)?);
        }
        let user_data = (!user_data.is_empty()).then_some(user_data);
        Ok(Manifests { vm, secret_name, user_data, labels })
    }

    /// What a VM carries for all its life, whatever becomes of its template, and whether it stands there even if the
    /// template's VM says otherwise.
    fn annotations(&self, variables: &Variables) -> Result<Vec<(&'static str, String, bool)>, String> {
        let ready = self.settings.ready;
        let deadline = self.settings.start_deadline()?;
        let mut annotations = vec![
            (ANNOTATION_TEMPLATE, self.hash.clone(), true),
            (ANNOTATION_READY, ready.unwrap_or(Ready::Vmi).as_str().to_owned(), ready.is_some()),
            (ANNOTATION_START_DEADLINE, deadline.unwrap_or(DEFAULT_START_DEADLINE).to_string(), deadline.is_some()),
        ];
        if let Some(url) = &self.settings.stream_url {
            annotations.push((ANNOTATION_STREAM_URL, stream_url(url, variables)?, true));
        }
        Ok(annotations)
    }
}

/// Where a desktop's user finds it. Params are encoded: none of them can turn it into another place.
fn stream_url(url: &str, variables: &Variables) -> Result<String, String> {
    let encoded = |value: &Value| match value {
        Value::String(text) => utf8_percent_encode(text, UNRESERVED).to_string().into(),
        other => other.clone(),
    };
    let params = variables.params.iter().map(|(name, value)| (name.clone(), encoded(value))).collect();
    let url = syntax::render(url, &Variables { own: variables.own.clone(), params })?;
    let is_absolute = url.parse::<http::Uri>().is_ok_and(|uri| uri.scheme().is_some() && uri.host().is_some());
    match (is_absolute, url.len() <= LONGEST_URL) {
        (true, true) => Ok(url),
        (true, false) => Err(format!("streamUrl becomes longer than {LONGEST_URL} characters")),
        (false, _) => Err(format!(
            "streamUrl becomes {url:?}; it must be a URL such as https://desktops.example.com/${{cyberdesk_name}}"
        )),
    }
}

/// The desktop that templates are tried with: a row that never is, as rows' ids are made at random. Its name is as
/// long as any row's.
pub(crate) fn sample_key() -> Key {
    Key::of_row(Uuid::nil())
}

/// The variables of ours.
fn own(namespace: &str, key: &Key) -> Map<String, Value> {
    let own = [
        ("vm_name", key.vm_name()),
        ("namespace", namespace.to_owned()),
        ("cyberdesk_name", key.to_string()),
        ("managed_by", MANAGER.to_owned()),
    ];
    own.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
}

/// The template's user data, wherever it is, and what to call that place.
fn user_data(
    name: &str,
    source: &Source,
    settings: &Settings,
    secret: impl Fn(&SecretKey) -> Result<String, String>,
) -> Result<Option<(String, String)>, Refusal> {
    let file = format!("{name}.yaml");
    match (&source.user_data, &settings.user_data, &settings.user_data_from) {
        (None, None, None) => Ok(None),
        (Some(text), None, None) => Ok(Some((format!("{name}.user-data"), text.clone()))),
        (None, Some(text), None) => Ok(Some((format!("{file}, userData"), text.clone()))),
        (None, None, Some(from)) => match secret(from) {
            Ok(text) => Ok(Some((format!("Secret {}, {}", from.secret, from.key), text))),
            Err(why) => Err(bad_template(format!("{file}:1:1: userDataFrom: {why}"))),
        },
        _ => Err(bad_template(format!(
            "{file}:1:1: user data comes from one place: {name}.user-data, userData or userDataFrom"
        ))),
    }
}

/// Faults about variables in the strings that `walk` shows, with their places in the text that they are in.
fn variable_faults<'t>(
    known: &Variables,
    file: &str,
    text: &str,
    walk: impl FnOnce(&mut dyn FnMut(&'t str, bool)),
) -> Vec<String> {
    let mut faults: BTreeMap<&str, String> = BTreeMap::new();
    walk(&mut |string, is_key| {
        for name in syntax::names(string) {
            let fault = match (is_key, known.has(name)) {
                (true, true) => format!("${{{name}}} stands in a key: keys are the template's own"),
                (false, true) => continue,
                (_, false) if name == "user_data_base64" => {
                    format!("${{{name}}} can only be all of userDataBase64 in a cloud-init volume")
                }
                (_, false) => known.unknown(name),
            };
            faults.insert(name, fault);
        }
    });
    faults.into_iter().map(|(name, fault)| format!("{file}:{}: {fault}", syntax::place(text, name))).collect()
}

/// Where the setting or param stands whose name begins a fault: `LINE:COLUMN`. The beginning, if none does.
fn place_of(text: &str, fault: &str) -> String {
    let name = fault.strip_prefix(syntax::PARAMS).unwrap_or(fault);
    let name = name.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default();
    let is_it = |line: &str| line.trim_start().strip_prefix(name).is_some_and(|rest| rest.starts_with(':'));
    match text.lines().enumerate().find(|(_, line)| !name.is_empty() && is_it(line)) {
        Some((number, line)) => format!("{}:{}", number + 1, line.len() - line.trim_start().len() + 1),
        None => "1:1".to_owned(),
    }
}

fn hash(vm: &str, user_data: &str) -> String {
    let mut hasher = Sha256::new();
    for part in [vm, user_data] {
        hasher.update(part);
        hasher.update([0]);
    }
    hasher.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Sets what is ours to set, and refuses what would take the fleet out of our hands.
fn finish(
    vm: &mut Value,
    key: &Key,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    annotations: Vec<(&'static str, String, bool)>,
) -> Result<(), String> {
    if (vm["apiVersion"].as_str(), vm["kind"].as_str()) != (Some("kubevirt.io/v1"), Some("VirtualMachine")) {
        return Err("it must be a VirtualMachine of kubevirt.io/v1".into());
    }
    let metadata = object_at(vm, &["metadata"])?;
    for forbidden in ["ownerReferences", "finalizers"] {
        if metadata.contains_key(forbidden) {
            return Err(format!("metadata.{forbidden} is not allowed: the operator alone decides when the VM goes"));
        }
    }
    metadata.insert("name".into(), key.vm_name().into());
    metadata.insert("namespace".into(), namespace.into());
    let present = object_at(vm, &["metadata", "annotations"])?;
    for (name, value, always) in annotations {
        if always || !present.contains_key(name) {
            present.insert(name.into(), value.into());
        }
    }
    for path in [&["metadata", "labels"][..], &["spec", "template", "metadata", "labels"]] {
        let fields = object_at(vm, path)?;
        fields.extend(labels.iter().map(|(label, value)| (label.clone(), value.clone().into())));
    }
    Ok(())
}

/// The object at this path, made where it is missing.
fn object_at<'a>(mut value: &'a mut Value, path: &[&str]) -> Result<&'a mut Map<String, Value>, String> {
    for step in path {
        let Value::Object(fields) = value else {
            return Err(format!("{} must be an object", path.join(".")));
        };
        let field = fields.entry(*step).or_insert(Value::Null);
        if field.is_null() {
            *field = json!({});
        }
        value = field;
    }
    value.as_object_mut().ok_or_else(|| format!("{} must be an object", path.join(".")))
}

#[cfg(test)]
mod tests;
