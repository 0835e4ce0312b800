//! What is found of a template: by reading it with its Secret, and by a dry run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::future::join_all;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::ListParams;
use kube::{Api, Client};

use super::{CONFIG_MAP, RECORD, within};
use crate::cluster::Cluster;
use crate::cluster::answers::Tried;
use crate::reason::cut;
use crate::telemetry::chain;
use crate::template::{self, Refusal, SecretKey, Source, Sources, Template, Templates, not_read};

/// What Secrets hold under the keys that templates name, or what is wrong with them; or why that is not known.
pub(super) type Secrets = BTreeMap<SecretKey, kube::Result<Result<String, String>>>;

/// What was found of a template.
pub(crate) enum Verdict {
    /// It can be used; the API server warns of this.
    Accepted(Arc<Template>, Vec<String>),
    /// It cannot.
    Refused(String),
    /// Nobody could be asked. Without a template, its Secret could not be read.
    Unchecked(Option<Arc<Template>>, String),
}

impl Verdict {
    /// That of a template that cannot be read.
    pub(super) fn unread(refusal: Refusal) -> Self {
        if refusal.is_for_now() { Self::Unchecked(None, refusal.message) } else { Self::Refused(refusal.message) }
    }
}

/// Reads a template; refuses it for now where its Secret could not be read.
pub(super) fn read(
    vm_namespace: &str,
    name: &str,
    source: &Source,
    secrets: &Secrets,
) -> Result<Arc<Template>, Refusal> {
    if let Some(key) = template::secret(source)
        && let Some(Err(error)) = secrets.get(&key)
    {
        return Err(not_read(cut(format!("{name}.yaml: the Secret {} cannot be read: {}", key.secret, chain(error)))));
    }
    let look_up = |key: &SecretKey| match secrets.get(key) {
        Some(Ok(answer)) => answer.clone(),
        _ => Err("its Secret was not read".to_owned()),
    };
    Template::read(vm_namespace, name, source, look_up).map(Arc::new)
}

/// Shows a template's samples to the API server.
pub(super) async fn show(cluster: &Cluster, name: &str, template: Arc<Template>) -> Verdict {
    let samples = match template.samples() {
        Ok(samples) => samples,
        Err(faults) => return Verdict::Refused(faults.join("; ")),
    };
    let mut warnings = BTreeSet::new();
    for sample in samples {
        match cluster.try_vm(&template::sample_key(), &sample.vm).await {
            Ok(Tried::Taken(more)) => warnings.extend(more),
            Ok(Tried::Refused(words)) => {
                return Verdict::Refused(format!("{name}.yaml: the API server refuses its VM: {words}"));
            }
            Err(error) => return Verdict::Unchecked(Some(template), chain(&error).to_string()),
        }
    }
    Verdict::Accepted(template, warnings.into_iter().collect())
}

/// Reads what the Secrets hold that these name, all at once: one that hangs holds up no other.
pub(super) async fn read_secrets<'s>(
    client: &Client,
    namespace: &str,
    sources: impl Iterator<Item = &'s Source>,
) -> Secrets {
    let keys: BTreeSet<SecretKey> = sources.filter_map(template::secret).collect();
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let read = keys.into_iter().map(async |key| {
        let answer = match within(api.get_opt(&key.secret)).await {
            Ok(Some(secret)) => Ok(secret
                .data
                .and_then(|mut data| data.remove(&key.key))
                .and_then(|bytes| String::from_utf8(bytes.0).ok())
                .ok_or_else(|| format!("the Secret {} has no text under the key {:?}", key.secret, key.key))),
            Ok(None) => Ok(Err(format!("there is no Secret {} in the namespace {namespace}", key.secret))),
            Err(kube::Error::Api(status)) if status.code == 403 => Ok(Err(format!(
                "the operator may not read the Secret {}: add its name to the Role (deploy/rbac.yaml)",
                key.secret
            ))),
            Err(error) => Err(error),
        };
        (key, answer)
    });
    join_all(read).await.into_iter().collect()
}

/// The templates as people have them now: those of the ConfigMap, or without one those that ship with the binary.
async fn wanted(client: &Client, namespace: &str) -> kube::Result<Sources> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let list = within(maps.list(&ListParams::default().fields(&format!("metadata.name={CONFIG_MAP}")))).await?;
    Ok(list
        .items
        .into_iter()
        .next()
        .map_or_else(template::built_in, |map| template::sources(map.data.unwrap_or_default())))
}

/// Judges each template as people have it now, without a record: by a dry run.
///
/// # Errors
///
/// If they cannot be read.
pub(crate) async fn examine(
    client: &Client,
    cluster: &Cluster,
    (namespace, vm_namespace): (&str, &str),
    folder: Option<Sources>,
) -> kube::Result<BTreeMap<String, Verdict>> {
    let sources = match folder {
        Some(sources) => sources,
        None => wanted(client, namespace).await?,
    };
    let secrets = read_secrets(client, namespace, sources.values()).await;
    let mut verdicts = BTreeMap::new();
    for (name, source) in &sources {
        let verdict = match read(vm_namespace, name, source, &secrets) {
            Ok(template) => show(cluster, name, template).await,
            Err(refusal) => Verdict::unread(refusal),
        };
        verdicts.insert(name.clone(), verdict);
    }
    Ok(verdicts)
}

/// The templates that are in use: of each the last version that was accepted, as far as that was kept.
///
/// # Errors
///
/// If they cannot be read.
pub(crate) async fn in_use(client: &Client, (namespace, vm_namespace): (&str, &str)) -> kube::Result<Templates> {
    let mut sources = wanted(client, namespace).await?;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let record = within(maps.get_opt(RECORD)).await?.and_then(|map| map.data).unwrap_or_default();
    let accepted = template::sources(record).into_iter().filter(|(name, _)| sources.contains_key(name));
    sources.extend(accepted.collect::<Vec<_>>());
    let secrets = read_secrets(client, namespace, sources.values()).await;
    Ok(sources.iter().map(|(name, source)| (name.clone(), read(vm_namespace, name, source, &secrets))).collect())
}
