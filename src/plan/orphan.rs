//! What is left in the cluster of a row whose tombstone is gone too, and what is another database's.

use super::{Action, Plan, View};
use crate::model::Seen;
use crate::names::Owner;
use uuid::Uuid;

/// Something marked as of a row, of which the database knows nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Orphan {
    /// It is this database's: nobody will ever ask for its end.
    Ours,
    /// It is another database's, or nobody knows which: never touched.
    Stranger,
}

/// Whether anything of this name is marked as of a row. There is none, or this is not asked.
pub(super) fn is_marked(view: &View<'_>) -> bool {
    let of_row = |owner: &Option<Owner>| matches!(owner, Some(Owner::Row(_)));
    view.cr.present().is_some_and(|cr| of_row(&cr.owner))
        || view.vm.present().is_some_and(|vm| of_row(&vm.owner))
        || view.vmi.present().is_some_and(|vmi| of_row(&vmi.owner))
}

/// Leaves it alone until its time is over, then removes what is ours: VM first, CR last, as for every desktop.
pub(super) fn collect(view: &View<'_>) -> Plan {
    let Some(id) = view.key.row_id() else { return stranger() };
    let ours = |owner: &Option<Owner>, database: Option<Uuid>| {
        *owner == Some(Owner::Row(id)) && database.is_some() && database == view.database
    };
    let cr = view.cr.present().filter(|cr| ours(&cr.owner, cr.database));
    let vm = view.vm.present().filter(|vm| ours(&vm.owner, vm.database));
    let vmi = view.vmi.present().filter(|vmi| ours(&vmi.owner, vmi.database));
    if cr.is_none() && vm.is_none() && vmi.is_none() {
        return stranger();
    }
    let told = Plan { orphan: Some(Orphan::Ours), ..Plan::default() };
    if !view.orphan_rest.is_zero() {
        return Plan { wait: Some(view.orphan_rest), ..told };
    }
    let secrets = Action::DeleteSecrets { selector: Owner::Row(id).secret_selector(view.key) };
    let actions = match (&view.vm, vm, vmi, cr) {
        (Seen::Unknown, ..) => vec![],
        (_, Some(vm), ..) if vm.deleting => vec![],
        (_, Some(vm), ..) => vec![secrets, Action::delete(vm)],
        (_, None, Some(vmi), _) if vmi.deleting => vec![],
        (_, None, Some(vmi), _) => vec![Action::DeleteVmi { uid: vmi.uid.clone() }],
        (_, None, None, Some(cr)) if !cr.deleting && view.vmi != Seen::Unknown => {
            vec![secrets, Action::DeleteCr { uid: cr.uid.clone() }]
        }
        (_, None, None, _) => vec![],
    };
    Plan { actions, ..told }
}

fn stranger() -> Plan {
    Plan { orphan: Some(Orphan::Stranger), ..Plan::default() }
}
