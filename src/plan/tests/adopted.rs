//! What the operator before this one made.

use super::*;
use crate::crd::KopfStatus;

fn kopfs() -> Cr {
    Cr { held_by_kopf: true, ..hand_cr() }
}

#[test]
fn what_kopf_holds_is_left_alone_until_it_is_adopted() {
    let due = || Row { expires_at: at(0), ..row() };
    let adopted = || {
        let mut cr = kopfs();
        cr.status.virtual_machine_ref = Some(VirtualMachineRef { name: "desk".into(), uid: "vm".into() });
        cr
    };
    let cases = [
        ("a live row", Situation::of_row(row(), Present(kopfs()), Absent, Absent), ""),
        ("a row that is due", Situation::of_row(due(), Present(kopfs()), Absent, Absent), ""),
        ("a row that is over", Situation::of_row(ended_row(), Present(kopfs()), Absent, Absent), ""),
        ("a row that cannot be read", Situation::unread(Present(kopfs()), Absent, Absent), ""),
        ("no row", Situation::by_hand(Present(kopfs()), Absent, Absent), ""),
        ("adopted", Situation::of_row(row(), Present(adopted()), Present(vm()), Present(up())), "apply CR"),
        (
            "adopted, and its VM is gone",
            Situation::of_row(
                row(),
                Present(Cr { owner: row_cr().owner, spec: row_cr().spec, ..adopted() }),
                Absent,
                Absent,
            )
            .live(),
            "say Stopping(vm-deleted), delete Secret, report over terminated(vm-deleted)",
        ),
        (
            "ours, and Kopf has come back",
            Situation::of_row(row(), Present(Cr { held_by_kopf: true, ..row_cr() }), Absent, Absent),
            "create VM",
        ),
    ];
    for (case, situation, wanted) in cases {
        assert_eq!(situation.told(), wanted, "{case}");
    }
}

#[test]
fn the_status_names_the_vm_as_it_is_called_and_where_the_old_gateway_looks() {
    for (adopted_name, name) in
        [(Some("warm-pool-0".to_owned()), "warm-pool-0".to_owned()), (None, Key::of_row(id()).vm_name())]
    {
        let vm = Vm { adopted_name, ..vm() };
        let plan = Situation::of_row(served_row(), Present(row_cr()), Present(vm), Present(up())).plan();
        let Some(Action::WriteCrStatus { status, .. }) = plan.actions.last() else { panic!("{:?}", plan.actions) };
        let told = status.virtual_machine_ref.as_ref().map(|vm| vm.name.clone());
        assert_eq!(told.as_ref(), Some(&name));
        assert_eq!(status.cyberdesk_create, Some(KopfStatus::of(&name, row().timeout_at)));
    }
}
