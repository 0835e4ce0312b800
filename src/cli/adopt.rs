//! `adopt`: takes over what the Kopf operator before this one made.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::ApiResource;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::Shown;
use crate::adopt::{Adoption, Found, FoundVm, Verdict, decide};
use crate::cluster::{self, Cluster, CrObject, Observed, VmObject, VmiObject, Written};
use crate::config::Config;
use crate::crd::Cyberdesk;
use crate::model::{Cr, Seen};
use crate::names::{ANNOTATION_ADOPTED, ANNOTATION_DATABASE, KOPF_FINALIZER, Key, Owner};
use crate::survey::{Database, read_database, row_word};
use crate::telemetry::chain;

const EXAMPLES: &str = "\
Examples:
  cyberdesk-operator adopt
  cyberdesk-operator adopt --yes

Scale the Kopf operator to 0 first: while it runs it takes back what is taken over. It is run with the daemon's settings,
of which CYBERDESK_VM_NAMESPACE is the namespace of that operator's VMs, and may be run again at any time: what is taken
over is not touched again. docs/migrate-from-kopf.md has the whole way.

The exit code is 0 if everything was taken over, or would be, and 1 if something was left for a person to look at.";

/// Tries to write a status that somebody else writes to as well.
const TRIES: usize = 5;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Adopt {
    /// Do it.
    #[arg(long)]
    yes: bool,
    /// It is so that no VM is left of any desktop: have all of them ended.
    #[arg(long)]
    none_left: bool,
}

/// What there is, of both sides.
struct Everything {
    crs: BTreeMap<Key, Cr>,
    vms: BTreeMap<Key, Vec<FoundVm>>,
    /// Desktops with a VM of our making.
    made: BTreeSet<Key>,
    database: Database,
}

impl Adopt {
    pub(super) async fn run(self) -> anyhow::Result<Shown> {
        let variables = super::variables();
        let (namespace, vm_namespace) = Config::namespaces(&variables).map_err(|faults| anyhow!(faults))?;
        let target = Config::target(&variables).map_err(|faults| anyhow!(faults))?;
        let pool = target.pool(&Arc::default())?;
        let client = cluster::connect().await.context("read how to reach the Kubernetes API server")?;
        let hands = Hands::new(&client, &namespace, &vm_namespace);
        let (crs, vms) = hands.list().await?;
        let found: Vec<FoundVm> = vms.iter().filter_map(FoundVm::of).collect();
        let asked = crs.keys().cloned().chain(found.iter().map(FoundVm::key)).filter_map(|key| key.row_id());
        let database = read_database(&pool, asked.collect()).await?;
        let made = vms.iter().filter(|vm| FoundVm::of(vm).is_none()).filter_map(|vm| Key::of_vm(&vm.metadata));
        let everything = Everything::of(crs, found, made.collect(), database);

        let verdicts = everything.verdicts();
        let gone = verdicts.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Adopt(it) if it.is_gone())).count();
        ensure!(
            gone == 0 || self.none_left || !everything.vms.is_empty(),
            "{gone} desktops have had a VM, and none of that operator's VMs is in the namespace {vm_namespace}: is \
             CYBERDESK_VM_NAMESPACE the one where it made them (its KUBEVIRT_NAMESPACE, by default kubevirt)? If it is \
             so that none is left, --none-left has these desktops ended. Nothing was done"
        );
        let mut text = format!("Cyberdesks in {namespace}, VirtualMachines in {vm_namespace}\n");
        let (mut adopted, mut left) = (0, 0);
        for (key, verdict) in &verdicts {
            let row = everything.database.rows.get(key);
            let words = match verdict {
                Verdict::Nothing => continue,
                Verdict::Leave(why) => {
                    left += 1;
                    format!("LEFT: {why}")
                }
                Verdict::Adopt(adoption) => {
                    let done = if self.yes { hands.perform(key, adoption, &everything).await } else { Ok(()) };
                    match done {
                        Ok(()) => {
                            adopted += 1;
                            adoption.words(row)
                        }
                        Err(error) => {
                            left += 1;
                            format!("FAILED: {}", chain(error.as_ref()))
                        }
                    }
                }
            };
            let row = row.map_or_else(|| "-".to_owned(), |row| row_word(&Seen::Present(row.clone())));
            let _ = writeln!(text, "{:<36}  {row:<10}  {words}", key.to_string());
        }
        let _ = match self.yes {
            true => writeln!(text, "{adopted} desktops taken over, {left} left"),
            false => {
                writeln!(text, "{adopted} desktops would be taken over, {left} left; nothing was done: --yes does it")
            }
        };
        let again = if self.yes { hands.held_again(&verdicts).await? } else { 0 };
        if again > 0 {
            left += 1;
            let _ = writeln!(
                text,
                "Kopf's finalizer is back on {again} of them: its operator still runs. Scale it to 0, and run this again"
            );
        }
        Ok(Shown { text, code: u8::from(left > 0) })
    }
}

impl Everything {
    fn of(crs: BTreeMap<Key, Cr>, found: Vec<FoundVm>, made: BTreeSet<Key>, database: Database) -> Self {
        let mut vms = BTreeMap::<Key, Vec<FoundVm>>::new();
        for vm in found {
            let key = vm.key();
            // The names of other people's VMs tell nothing.
            if vm.desktop.is_some() || crs.contains_key(&key) || database.rows.contains_key(&key) {
                vms.entry(key).or_default().push(vm);
            }
        }
        Self { crs, vms, made, database }
    }

    fn verdicts(&self) -> BTreeMap<Key, Verdict> {
        let keys: BTreeSet<&Key> = self.crs.keys().chain(self.vms.keys()).chain(self.database.rows.keys()).collect();
        keys.into_iter()
            .map(|key| {
                let found = Found {
                    key,
                    row: self.database.rows.get(key),
                    cr: self.crs.get(key),
                    vms: self.vms.get(key).map_or(&[], Vec::as_slice),
                    is_made: self.made.contains(key),
                };
                // One that is there and cannot be read is not absent.
                let unread = found.row.is_none() && key.row_id().is_some() && !self.database.missing.contains(key);
                let verdict = match unread {
                    true => Verdict::Leave("its row cannot be read".to_owned()),
                    false => decide(&found, self.database.now),
                };
                (key.clone(), verdict)
            })
            .collect()
    }
}

/// The calls.
struct Hands {
    cluster: Cluster,
    crs: Api<CrObject>,
    new_crs: Api<Cyberdesk>,
    vms: Api<DynamicObject>,
    vmis: Api<DynamicObject>,
    secrets: Api<Secret>,
}

impl Hands {
    fn new(client: &Client, namespace: &str, vm_namespace: &str) -> Self {
        let in_vms = |kind| Api::namespaced_with(client.clone(), vm_namespace, &kind);
        Self {
            cluster: Cluster::new(client, namespace, vm_namespace),
            crs: Api::namespaced(client.clone(), namespace),
            new_crs: Api::namespaced(client.clone(), namespace),
            vms: in_vms(ApiResource::erase::<VmObject>(&())),
            vmis: in_vms(ApiResource::erase::<VmiObject>(&())),
            secrets: Api::namespaced(client.clone(), vm_namespace),
        }
    }

    async fn list(&self) -> anyhow::Result<(BTreeMap<Key, Cr>, Vec<DynamicObject>)> {
        let all = ListParams::default();
        let crs = self.crs.list(&all).await.context("list cyberdesks")?;
        let vms = self.vms.list(&all).await.context("list virtualmachines")?;
        Ok((crs.items.iter().filter_map(|cr| Some((cr.key()?, cr.seen()))).collect(), vms.items))
    }

    /// Takes a desktop over. Kopf's finalizer, until which the daemon leaves it alone, goes last.
    async fn perform(&self, key: &Key, adoption: &Adoption, everything: &Everything) -> anyhow::Result<()> {
        if let Some(vm) = &adoption.vm {
            self.mark(key, adoption, vm, everything.database.id.to_string()).await?;
        }
        if let Some(spec) = &adoption.cr {
            if everything.crs.contains_key(key) {
                // It is being deleted, and is gone with this.
                self.release(key).await?;
            }
            let cr = Cyberdesk {
                metadata: ObjectMeta {
                    name: Some(key.to_string()),
                    finalizers: Some(vec![KOPF_FINALIZER.to_owned()]),
                    ..ObjectMeta::default()
                },
                spec: spec.clone(),
                status: None,
            };
            self.new_crs.create(&PostParams::default(), &cr).await.context("make its Cyberdesk")?;
        }
        if adoption.record.is_some() {
            self.record(key, adoption, everything.database.now).await?;
        }
        if adoption.release {
            self.release(key).await?;
        }
        Ok(())
    }

    /// Writes the VM into the CR's status. A daemon that saw the mark may have done so already.
    async fn record(&self, key: &Key, adoption: &Adoption, now: Timestamp) -> anyhow::Result<()> {
        for _ in 0..TRIES {
            let cr = self.crs.get(&key.to_string()).await.context("read its Cyberdesk")?.seen();
            if cr.status.virtual_machine_ref.is_some() {
                return Ok(());
            }
            let status = adoption.status(cr.status, now);
            if self.cluster.write_cr_status(key, (&cr.uid, &cr.version), &status).await? == Written::There {
                return Ok(());
            }
        }
        bail!("its Cyberdesk is being written to all the time: run this again")
    }

    /// Marks VM, VMI and Secret as that desktop's. KubeVirt makes further VMIs from the VM's template.
    async fn mark(&self, key: &Key, adoption: &Adoption, vm: &FoundVm, database: String) -> anyhow::Result<()> {
        let labels = adoption.owner.labels(key, adoption.user);
        let mut annotations = BTreeMap::from([(ANNOTATION_ADOPTED, vm.name.clone())]);
        if let Owner::Row(_) = adoption.owner {
            annotations.insert(ANNOTATION_DATABASE, database);
        }
        let marks = json!({ "labels": labels, "annotations": annotations });
        let mut marked = json!({ "metadata": marks, "spec": { "template": { "metadata": marks } } });
        // Another of its name is refused.
        marked["metadata"]["uid"] = vm.uid.as_str().into();
        patch(&self.vms, &vm.name, &marked).await.context("mark its VirtualMachine")?;
        let marked = json!({ "metadata": marks });
        if_there(patch(&self.vmis, &vm.name, &marked).await).context("mark its VirtualMachineInstance")?;
        let marked = json!({ "metadata": { "labels": labels } });
        let secret = format!("cloud-init-{}", vm.name);
        if_there(patch(&self.secrets, &secret, &marked).await).context("mark its Secret")?;
        Ok(())
    }

    /// Takes Kopf's finalizer off, and leaves those of others.
    async fn release(&self, key: &Key) -> anyhow::Result<()> {
        let cr = self.crs.get_metadata(&key.to_string()).await.context("read its Cyberdesk")?;
        let Some(at) = cr.finalizers().iter().position(|name| name == KOPF_FINALIZER) else { return Ok(()) };
        let path = format!("/metadata/finalizers/{at}");
        let patch = json!([
            { "op": "test", "path": path, "value": KOPF_FINALIZER },
            { "op": "remove", "path": path },
        ]);
        let patch = Patch::<()>::Json(serde_json::from_value(patch).context("a JSON patch")?);
        let released = self.crs.patch_metadata(&key.to_string(), &PatchParams::default(), &patch).await;
        released.context("take Kopf's finalizer off its Cyberdesk").map(drop)
    }

    /// How many of those that were released Kopf holds again.
    async fn held_again(&self, verdicts: &BTreeMap<Key, Verdict>) -> anyhow::Result<usize> {
        let released = |key: &Key| matches!(verdicts.get(key), Some(Verdict::Adopt(adoption)) if adoption.release);
        let (crs, _) = self.list().await?;
        Ok(crs.iter().filter(|(key, cr)| cr.held_by_kopf && released(key)).count())
    }
}

async fn patch<K>(api: &Api<K>, name: &str, change: &Value) -> kube::Result<()>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    api.patch_metadata(name, &PatchParams::default(), &Patch::Merge(change)).await.map(drop)
}

/// What is not there needs no mark.
fn if_there(answer: kube::Result<()>) -> kube::Result<()> {
    match answer {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        answer => answer,
    }
}
