//! The calls that change the cluster, and the live reads that an end needs. Each is made once, with a
//! deadline. Creates are POST and deletes carry the UID, so a call that lands late can do no harm that
//! the next look does not see.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::future::Future;

use anyhow::Context;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Namespace, ObjectReference, Secret};
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::client::Body;
use kube::core::{ApiResource, DynamicObject, Request, Status, request};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::CALL_DEADLINE;
use super::answers::{Created, Error, Tried, Written};
use super::cache::Cache;
use super::objects::{CrObject, Observed, VmObject, VmiObject, version};
use crate::crd::{CyberdeskSpec, CyberdeskStatus};
use crate::model::{Cr, Seen, Vm, Vmi};
use crate::names::{Key, MANAGER};
use crate::template::Manifests;

/// The cluster as we write it, and the caches that hear of every answer at once.
#[derive(Debug)]
pub struct Cluster {
    crs: Api<CrObject>,
    vms: Api<VmObject>,
    vmis: Api<VmiObject>,
    raw_crs: Api<DynamicObject>,
    raw_vms: Api<DynamicObject>,
    secrets: Api<Secret>,
    namespaces: Api<Namespace>,
    /// CRs, by key.
    pub cr_cache: Cache<Cr>,
    /// VMs, by key.
    pub vm_cache: Cache<Vm>,
    /// VMIs, by key.
    pub vmi_cache: Cache<Vmi>,
}

impl Cluster {
    /// CRs live in `namespace`, VMs, VMIs and Secrets in `vm_namespace`.
    pub fn new(client: &Client, namespace: &str, vm_namespace: &str) -> Self {
        let raw = |resource: ApiResource, namespace: &str| Api::namespaced_with(client.clone(), namespace, &resource);
        Self {
            crs: Api::namespaced(client.clone(), namespace),
            vms: Api::namespaced(client.clone(), vm_namespace),
            vmis: Api::namespaced(client.clone(), vm_namespace),
            raw_crs: raw(ApiResource::erase::<CrObject>(&()), namespace),
            raw_vms: raw(ApiResource::erase::<VmObject>(&()), vm_namespace),
            secrets: Api::namespaced(client.clone(), vm_namespace),
            namespaces: Api::all(client.clone()),
            cr_cache: Cache::default(),
            vm_cache: Cache::default(),
            vmi_cache: Cache::default(),
        }
    }

    /// Points an Event at a CR.
    pub fn reference_to(&self, key: &Key, uid: &str) -> ObjectReference {
        ObjectReference {
            api_version: Some(CrObject::api_version(&()).into_owned()),
            kind: Some(CrObject::kind(&()).into_owned()),
            name: Some(key.to_string()),
            namespace: self.crs.namespace().map(str::to_owned),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        }
    }

    /// Points an Event at a VM.
    pub fn reference_to_vm(&self, key: &Key, uid: &str) -> ObjectReference {
        ObjectReference {
            api_version: Some(VmObject::api_version(&()).into_owned()),
            kind: Some(VmObject::kind(&()).into_owned()),
            name: Some(self.vm_name(key)),
            namespace: self.vms.namespace().map(str::to_owned),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        }
    }

    /// The name of a desktop's VM and VMI: what those that were seen have, or what was recorded of one that is gone.
    fn vm_name(&self, key: &Key) -> String {
        let vm = || self.vm_cache.get(key).present().map(|vm| vm.name(key));
        let vmi = || self.vmi_cache.get(key).present().and_then(|vmi| vmi.adopted_name.clone());
        let recorded = || Some(self.cr_cache.get(key).present()?.status.virtual_machine_ref.as_ref()?.name.clone());
        vm().or_else(vmi).or_else(recorded).unwrap_or_else(|| key.vm_name())
    }

    /// The UID of the namespace that CRs live in: as which cluster it is bound to a database.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub async fn namespace_id(&self) -> anyhow::Result<String> {
        let namespace = self.crs.namespace().context("CRs live in a namespace")?;
        let read = tokio::time::timeout(CALL_DEADLINE, self.namespaces.get_metadata(namespace)).await;
        read.context("no answer")??.metadata.uid.context("it has none")
    }

    /// For the watches.
    pub fn apis(&self) -> (Api<CrObject>, Api<VmObject>, Api<VmiObject>) {
        (self.crs.clone(), self.vms.clone(), self.vmis.clone())
    }

    /// Makes the CR of a row.
    ///
    /// # Errors
    ///
    /// If it is not there afterwards, as far as we know.
    pub async fn create_cr(
        &self,
        key: &Key,
        labels: BTreeMap<String, String>,
        annotations: BTreeMap<String, String>,
        spec: &CyberdeskSpec,
    ) -> Result<(), Error> {
        let body = cr_body(key, labels, annotations, spec);
        match self.create(post(&self.raw_crs, &body, ""), &self.crs, &self.cr_cache, key, &key.to_string()).await? {
            Created::There => Ok(()),
            // Our own spec: nobody's input could mend it.
            Created::Refused(words) => Err(Error::Refused { verb: "create", object: key.to_string(), words }),
        }
    }

    /// Makes labels and spec of the row's CR what the row wants.
    ///
    /// # Errors
    ///
    /// If it was not done, and the CR of this UID is still there.
    pub async fn apply_cr(
        &self,
        key: &Key,
        uid: &str,
        labels: BTreeMap<String, String>,
        annotations: BTreeMap<String, String>,
        spec: &CyberdeskSpec,
    ) -> Result<Written, Error> {
        let mut body = cr_body(key, labels, annotations, spec);
        // With the UID, a CR that is gone is an error; without it, apply would make it again.
        body["metadata"]["uid"] = uid.into();
        let params = PatchParams::apply(MANAGER).force();
        let applied = self.call("apply", key, self.crs.patch(&key.to_string(), &params, &Patch::Apply(body))).await;
        self.take_in_cr(key, |cr| cr.uid == uid, applied).await
    }

    /// Writes the status of the CR of this UID, if it is still of this version.
    ///
    /// # Errors
    ///
    /// If it was not done, and the CR is as it was.
    pub async fn write_cr_status(
        &self,
        key: &Key,
        (uid, version): (&str, &str),
        status: &CyberdeskStatus,
    ) -> Result<Written, Error> {
        // In a merge patch the UID would be ignored: the status strategy keeps the old metadata.
        let patch = json!([
            { "op": "test", "path": "/metadata/uid", "value": uid },
            { "op": "test", "path": "/metadata/resourceVersion", "value": version },
            { "op": "add", "path": "/status", "value": status },
        ]);
        let patch = Patch::<()>::Json(serde_json::from_value(patch).expect("this is a JSON patch"));
        let params = PatchParams::default();
        let written =
            self.call("write the status of", key, self.crs.patch_status(&key.to_string(), &params, &patch)).await;
        self.take_in_cr(key, |cr| cr.uid == uid && cr.version == version, written).await
    }

    /// What follows from the answer to a write that was meant for such a CR. Where there is none any more, the cache
    /// learns what is there instead.
    async fn take_in_cr(
        &self,
        key: &Key,
        is_meant: impl Fn(&Cr) -> bool,
        written: Result<CrObject, Error>,
    ) -> Result<Written, Error> {
        match written {
            Ok(object) => {
                take_in(&self.cr_cache, key, &object);
                Ok(Written::There)
            }
            Err(error) if error.is(404) || error.is(409) || error.is(422) => {
                let there = self.get(&self.crs, &self.cr_cache, key, &key.to_string()).await?;
                if there.present().is_some_and(is_meant) { Err(error) } else { Ok(Written::Overtaken) }
            }
            Err(error) => Err(error),
        }
    }

    /// Deletes the CR of this UID.
    ///
    /// # Errors
    ///
    /// If it may still be there.
    pub async fn delete_cr(&self, key: &Key, uid: &str) -> Result<Written, Error> {
        self.delete(&self.crs, &self.cr_cache, key, &key.to_string(), exactly(uid, None)).await
    }

    /// Makes the Secret with the user data, then the VM.
    ///
    /// # Errors
    ///
    /// If the VM is not there afterwards, as far as we know.
    pub async fn create_vm(
        &self,
        key: &Key,
        manifests: &Manifests,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Created, Error> {
        if let Some(data) = &manifests.user_data {
            let secret = Secret {
                metadata: ObjectMeta {
                    name: Some(manifests.secret_name.clone()),
                    labels: Some(manifests.labels.clone()),
                    annotations: Some(annotations.clone()),
                    ..ObjectMeta::default()
                },
                data: Some(data.iter().map(|(name, bytes)| (name.clone(), ByteString(bytes.clone()))).collect()),
                ..Secret::default()
            };
            match self.call("create the Secret of", key, self.secrets.create(&PostParams::default(), &secret)).await {
                Ok(_) => (),
                // Of an earlier try at the same desktop: nobody else's has this name.
                Err(error) if error.is(409) => (),
                Err(error) => match error.refusal() {
                    Some(words) => return Ok(Created::Refused(words)),
                    None => return Err(error),
                },
            }
        }
        let mut body = manifests.vm.clone();
        for (name, value) in annotations {
            // The VMI has what the VM's template has: it may be left when the VM is gone.
            for path in ["/metadata", "/spec/template/metadata"] {
                if let Some(metadata) = body.pointer_mut(path) {
                    metadata["annotations"][name] = value.as_str().into();
                }
            }
        }
        let made = post(&self.raw_vms, &body, STRICTLY);
        self.create(made, &self.vms, &self.vm_cache, key, &key.vm_name()).await
    }

    /// Shows the API server a VM as if to make it, and asks KubeVirt's webhooks too.
    ///
    /// # Errors
    ///
    /// If nothing is known afterwards: it could not be asked, or a webhook is away.
    pub async fn try_vm(&self, key: &Key, vm: &Value) -> Result<Tried, Error> {
        let query = format!("{STRICTLY}&dryRun=All");
        match self.call("try to make a VM like", key, post(&self.raw_vms, vm, &query)).await {
            Ok((_, warnings)) => Ok(Tried::Taken(warnings)),
            // Admission is over by then.
            Err(error) if error.is(409) => Ok(Tried::Taken(vec![])),
            // Somebody's webhook that cannot be asked without consequences. KubeVirt's can.
            Err(error) if error.refusal().is_some_and(|words| words.contains("does not support dry run")) => {
                Ok(Tried::Taken(error.refusal().into_iter().collect()))
            }
            Err(error) => error.refusal().map(Tried::Refused).ok_or(error),
        }
    }

    /// Deletes the VM of this UID, if it is still of this version. KubeVirt keeps it until its guest has shut down.
    ///
    /// # Errors
    ///
    /// If the deletion was not accepted.
    pub async fn delete_vm(&self, key: &Key, uid: &str, version: Option<String>) -> Result<Written, Error> {
        self.delete(&self.vms, &self.vm_cache, key, &self.vm_name(key), exactly(uid, version)).await
    }

    /// Deletes the VMI of this UID, which its VM left behind.
    ///
    /// # Errors
    ///
    /// If the deletion was not accepted.
    pub async fn delete_vmi(&self, key: &Key, uid: &str) -> Result<Written, Error> {
        self.delete(&self.vmis, &self.vmi_cache, key, &self.vm_name(key), exactly(uid, None)).await
    }

    /// Deletes the Secrets that these labels select: so that nothing secret needs to be read.
    ///
    /// # Errors
    ///
    /// If one may still be there.
    pub async fn delete_secrets(&self, key: &Key, selector: &str) -> Result<(), Error> {
        let selected = ListParams::default().labels(selector);
        let params = DeleteParams::default();
        self.call("delete the Secret of", key, self.secrets.delete_collection(&params, &selected)).await.map(drop)
    }

    /// The same for Secrets of many desktops.
    ///
    /// # Errors
    ///
    /// If one may still be there.
    pub async fn sweep_secrets(&self, selector: &str) -> anyhow::Result<()> {
        let selected = ListParams::default().labels(selector);
        let params = DeleteParams::default();
        let deleted = self.secrets.delete_collection(&params, &selected);
        tokio::time::timeout(CALL_DEADLINE, deleted).await.context("no answer")??;
        Ok(())
    }

    /// Asks the API server, not a cache, for VM and VMI.
    ///
    /// They are as they were at one time, for which a VMI that is not there is asked for again: while a guest is
    /// restarted KubeVirt notes it in the VM before the old VMI is gone, and until the new one is there.
    ///
    /// # Errors
    ///
    /// If one of them cannot be read: then nothing is known of it.
    pub async fn look_live(&self, key: &Key) -> Result<(Seen<Vm>, Seen<Vmi>), Error> {
        let name = self.vm_name(key);
        let vmi = async || self.get(&self.vmis, &self.vmi_cache, key, &name).await;
        let first = vmi().await?;
        let vm = self.get(&self.vms, &self.vm_cache, key, &name).await?;
        let again = first == Seen::Absent && vm != Seen::Absent;
        Ok((vm, if again { vmi().await? } else { first }))
    }

    async fn get<K>(&self, api: &Api<K>, cache: &Cache<K::Seen>, key: &Key, name: &str) -> Result<Seen<K::Seen>, Error>
    where
        K: Observed + Clone + DeserializeOwned + Debug,
    {
        match self.call("get", key, api.get(name)).await {
            Ok(object) => {
                take_in(cache, key, &object);
                Ok(Seen::Present(object.seen()))
            }
            Err(error) if error.is_absent(name) => {
                cache.forget(key);
                Ok(Seen::Absent)
            }
            Err(error) => Err(error),
        }
    }

    async fn create<K>(
        &self,
        made: impl Future<Output = kube::Result<(Value, Vec<String>)>>,
        api: &Api<K>,
        cache: &Cache<K::Seen>,
        key: &Key,
        name: &str,
    ) -> Result<Created, Error>
    where
        K: Observed + Clone + DeserializeOwned + Debug,
    {
        match self.call("create", key, made).await {
            Ok((made, _)) => {
                if let Ok(object) = serde_json::from_value::<K>(made) {
                    take_in(cache, key, &object);
                }
                Ok(Created::There)
            }
            // The cache did not know of it yet, or it is not ours: the next look sees which.
            Err(error) if error.is(409) => match self.get(api, cache, key, name).await? {
                Seen::Present(_) => Ok(Created::There),
                Seen::Absent | Seen::Unknown => Err(error),
            },
            Err(error) => error.refusal().map(Created::Refused).ok_or(error),
        }
    }

    async fn delete<K>(
        &self,
        api: &Api<K>,
        cache: &Cache<K::Seen>,
        key: &Key,
        name: &str,
        meant: Preconditions,
    ) -> Result<Written, Error>
    where
        K: Observed + Clone + DeserializeOwned + Debug,
    {
        let params = DeleteParams { preconditions: Some(meant), ..DeleteParams::background() };
        match self.call("delete", key, api.delete(name, &params)).await {
            Ok(answer) => {
                match answer.left() {
                    // It stays until its finalizers are done.
                    Some(object) if object.meta().deletion_timestamp.is_some() => take_in(cache, key, &object),
                    _ => cache.forget(key),
                }
                Ok(Written::There)
            }
            // Gone, or another object or version is there by now.
            Err(error) if error.is(404) || error.is(409) => {
                self.get(api, cache, key, name).await.map(|_| Written::Overtaken)
            }
            Err(error) => Err(error),
        }
    }

    async fn call<T>(
        &self,
        verb: &'static str,
        key: &Key,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, Error> {
        let object = || key.to_string();
        match tokio::time::timeout(CALL_DEADLINE, call).await {
            Ok(answer) => answer.map_err(|source| Error::Call { verb, object: object(), source: Box::new(source) }),
            Err(_) => Err(Error::Deadline { verb, object: object() }),
        }
    }
}

fn exactly(uid: &str, version: Option<String>) -> Preconditions {
    Preconditions { uid: Some(uid.to_owned()), resource_version: version }
}

/// Has the API server refuse fields that it does not know. Otherwise it drops them, and KubeVirt says nothing.
const STRICTLY: &str = "&fieldValidation=Strict";

/// POSTs an object, and answers it as it was made, with the API server's warnings.
async fn post(api: &Api<DynamicObject>, object: &Value, query: &str) -> kube::Result<(Value, Vec<String>)> {
    let body = serde_json::to_vec(object).map_err(kube::Error::SerdeError)?;
    let bare = Request::new(api.resource_url()).create(&PostParams::default(), body);
    let mut request = bare.map_err(kube::Error::BuildRequest)?;
    let uri = format!("{}{query}", request.uri()).parse::<http::Uri>();
    *request.uri_mut() = uri.map_err(|error| kube::Error::BuildRequest(request::Error::BuildRequest(error.into())))?;
    let answer = api.clone().into_client().send(request.map(Body::from)).await?;
    let (head, body) = answer.into_parts();
    let body = body.collect_bytes().await?;
    if head.status.is_success() {
        let warnings =
            head.headers.get_all(http::header::WARNING).iter().filter_map(|value| warning(value.to_str().ok()?));
        return Ok((serde_json::from_slice(&body).map_err(kube::Error::SerdeError)?, warnings.collect()));
    }
    // A proxy in between answers in its own way.
    let status = serde_json::from_slice::<Status>(&body).unwrap_or_else(|_| {
        Status::failure(String::from_utf8_lossy(&body).trim(), "not a Status").with_code(head.status.as_u16())
    });
    Err(kube::Error::Api(status.boxed()))
}

/// The words in a header such as `299 - "unknown field"` (RFC 7234, 5.5).
fn warning(header: &str) -> Option<String> {
    let (_, words) = header.split_once('"')?;
    Some(words.trim_end().strip_suffix('"')?.replace("\\\"", "\"").replace("\\\\", "\\"))
}

fn take_in<K: Observed>(cache: &Cache<K::Seen>, key: &Key, object: &K) {
    cache.learn(key, version(object.meta()), object.seen());
}

fn cr_body(
    key: &Key,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    spec: &CyberdeskSpec,
) -> Value {
    json!({
        "apiVersion": CrObject::api_version(&()),
        "kind": CrObject::kind(&()),
        "metadata": { "name": key.to_string(), "labels": labels, "annotations": annotations },
        "spec": spec,
    })
}
