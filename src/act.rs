//! The hands: one match from an action to one call. Nothing is decided here.

use std::collections::BTreeMap;

use prometheus_client::metrics::histogram::Histogram;
use tracing::info;

use crate::cluster::{Created, Error, Written};
use crate::database::store::Remembered;
use crate::events::News;
use crate::model::{Seen, Vm, Vmi};
use crate::names::{ANNOTATION_DATABASE, Key, Owner};
use crate::operator::Operator;
use crate::plan::{Action, Fault};

/// What became of an action.
#[derive(Debug)]
pub(crate) enum Acted {
    /// Done.
    Done,
    /// Handed to the write-back, whose answer wakes the desktop again.
    Told,
    /// What it was meant for is gone, or another by now: what comes after it was decided on something that is no
    /// longer so.
    Overtaken,
    /// VM and VMI as the API server has them now.
    Looked(Box<(Seen<Vm>, Seen<Vmi>)>),
    /// Nothing of the desktop is left.
    Forgotten,
}

impl Operator {
    /// Does as told, if this process leads. This is the one place where the cluster is written.
    pub(crate) async fn act(&self, key: &Key, action: Action) -> Result<Acted, Error> {
        self.leadership.tenure.while_held(self.perform(key, action)).await.unwrap_or(Err(Error::NotLeading))
    }

    async fn perform(&self, key: &Key, action: Action) -> Result<Acted, Error> {
        match action {
            Action::CreateCr { owner: (id, user), spec } => {
                let labels = Owner::Row(id).labels(key, Some(user));
                self.cluster.create_cr(key, labels, self.row_annotations(), &spec).await?;
                info!(desktop = %key, "made the CR");
                self.count_step(key, &self.metrics.insert_to_cr);
            }
            Action::ApplyCr { uid, owner: (id, user), spec } => {
                let labels = Owner::Row(id).labels(key, Some(user));
                if self.cluster.apply_cr(key, &uid, labels, self.row_annotations(), &spec).await? == Written::Overtaken
                {
                    return Ok(Acted::Overtaken);
                }
                info!(desktop = %key, "brought the CR in line with its row");
            }
            Action::WriteCrStatus { uid, version, status } => {
                let before = self.cluster.cr_cache.get(key);
                if self.cluster.write_cr_status(key, (&uid, &version), &status).await? == Written::Overtaken {
                    return Ok(Acted::Overtaken);
                }
                let phase = status.phase.map(|phase| format!("{phase:?}"));
                info!(desktop = %key, phase, reason = status.reason, "wrote the CR's status");
                let before = before.present().map(|cr| cr.status.clone()).unwrap_or_default();
                if let Some(news) = News::of_desktop(&before, &status) {
                    self.events.tell_aside(self.cluster.reference_to(key, &uid), "Reconcile", news);
                }
                if let Some(end) = status.end.as_ref().filter(|_| before.end.is_none()) {
                    self.metrics.ended(&end.reason);
                }
            }
            Action::DeleteCr { uid } => {
                if self.cluster.delete_cr(key, &uid).await? == Written::Overtaken {
                    return Ok(Acted::Overtaken);
                }
                info!(desktop = %key, "deleted the CR");
            }
            Action::CreateVm { owner, manifests } => {
                let annotations = match &owner {
                    Owner::Row(_) => self.row_annotations(),
                    Owner::Hand(_) => BTreeMap::new(),
                };
                let made = self.cluster.create_vm(key, &manifests, &annotations).await;
                let failure = match &made {
                    Ok(Created::There) => None,
                    Ok(Created::Refused(words)) => Some((words.clone(), Fault::Refused)),
                    Err(error) => Some(error.fault()),
                };
                match failure {
                    None => {
                        info!(desktop = %key, "made the VM");
                        self.count_step(key, &self.metrics.insert_to_vm);
                        self.failures().remove(key);
                    }
                    Some((words, fault)) => {
                        info!(desktop = %key, words, ?fault, "the VM could not be made");
                        self.remember_failure(key, owner, words, fault);
                    }
                }
                made?;
            }
            Action::DeleteVm { uid, version } => {
                if self.cluster.delete_vm(key, &uid, version).await? == Written::Overtaken {
                    return Ok(Acted::Overtaken);
                }
                info!(desktop = %key, "deleted the VM; its guest shuts down");
            }
            Action::DeleteVmi { uid } => {
                if self.cluster.delete_vmi(key, &uid).await? == Written::Overtaken {
                    return Ok(Acted::Overtaken);
                }
                info!(desktop = %key, "deleted a VMI that its VM left behind");
            }
            Action::DeleteSecrets { selector } => self.cluster.delete_secrets(key, &selector).await?,
            Action::LookLive => {
                return Ok(Acted::Looked(Box::new(self.cluster.look_live(key).await?)));
            }
            Action::Expire(id) => {
                self.write_back.expire(id);
                return Ok(Acted::Told);
            }
            Action::Report(report) => {
                self.write_back.report(report, self.queue.woken(key));
                return Ok(Acted::Told);
            }
            Action::Forget => {
                self.failures().remove(key);
                if let Some(id) = key.row_id() {
                    self.store.forget(id);
                }
                return Ok(Acted::Forgotten);
            }
        }
        Ok(Acted::Done)
    }

    /// The first time that this is reached by a row, how long after its insert.
    fn count_step(&self, key: &Key, steps: &Histogram) {
        if let (Remembered::Row(row), Some(now)) = (self.store.get(key), self.clock.now())
            && row.vm_uid.is_none()
            && row.observed_generation == 0
        {
            steps.observe(now.database.duration_since(row.created_at).as_secs_f64().max(0.0));
        }
    }

    /// The database that an object's row is in.
    fn row_annotations(&self) -> BTreeMap<String, String> {
        self.database_id().map(|id| (ANNOTATION_DATABASE.to_owned(), id.to_string())).into_iter().collect()
    }
}
