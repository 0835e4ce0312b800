use std::collections::BTreeMap;

use jiff::SignedDuration;
use serde_json::json;

use super::*;

const ID: Uuid = Uuid::from_u128(7);
const NOON: Timestamp = Timestamp::constant(1_700_000_000, 0);

fn key() -> Key {
    Key::of_row(ID)
}

fn row(status: RowStatus) -> Row {
    Row {
        id: ID,
        exists: true,
        user_id: Uuid::from_u128(8),
        desired: Desired::Present,
        reason: None,
        message: None,
        expires_at: later(NOON, SignedDuration::from_hours(1)),
        timeout_at: later(NOON, SignedDuration::from_hours(1)),
        created_at: NOON,
        changed_at: NOON,
        generation: 1,
        observed_generation: 0,
        params: None,
        status,
        vm_uid: None,
        ended: false,
        paused: false,
    }
}

fn cr(vm: Option<&str>) -> Cr {
    let legacy = vm.map(|name| KopfStatus { virtual_machine_ref: Some(name.to_owned()), expiry_time: None });
    Cr {
        uid: "cr".into(),
        version: "1".into(),
        generation: 1,
        created: NOON,
        owner: None,
        database: None,
        deleting: false,
        held_by_kopf: true,
        paused: false,
        spec: Ok(CyberdeskSpec { timeout_ms: Some(60_000), ..CyberdeskSpec::default() }),
        status_readable: true,
        status: CyberdeskStatus { cyberdesk_create: legacy, ..CyberdeskStatus::default() },
    }
}

fn vm(name: &str) -> FoundVm {
    FoundVm { name: name.to_owned(), uid: format!("uid of {name}"), desktop: Some(key()), adopted: false }
}

/// What is decided, in words: what is marked, what is made, what is recorded, and whether Kopf's finalizer goes.
fn told(row: Option<&Row>, cr: Option<&Cr>, vms: &[FoundVm], is_made: bool) -> String {
    let key = key();
    match decide(&Found { key: &key, row, cr, vms, is_made }, NOON) {
        Verdict::Nothing => "nothing".to_owned(),
        Verdict::Leave(why) => format!("leave: {why}"),
        Verdict::Adopt(it) => {
            let owner = match &it.owner {
                Owner::Row(_) => "row",
                Owner::Hand(_) => "hand",
            };
            let mut told = vec![];
            told.extend(it.vm.as_ref().map(|vm| format!("mark {} for {owner}", vm.name)));
            told.extend(it.cr.as_ref().map(|_| "make CR".to_owned()));
            told.extend(it.record.as_ref().map(|vm| format!("record {} ({})", vm.name, vm.uid)));
            told.extend(it.release.then(|| "release".to_owned()));
            told.join(", ")
        }
    }
}

#[test]
fn each_state_that_kopf_may_have_left_a_desktop_in_has_its_steps() {
    use RowStatus::{Pending, Running, Terminated};
    let (pending, running) = (row(Pending), row(Running));
    let over = Row { ended: true, desired: Desired::Absent, ..row(Terminated) };
    let ending = Row { desired: Desired::Absent, ..row(Running) };
    let due = Row { expires_at: NOON, ..row(Running) };
    let vanished = Row { exists: false, ..row(Running) };
    let of_another = Row { vm_uid: Some("another".into()), ..row(Running) };
    let id = key().to_string();
    let (with_vm, without, deleting) = (cr(Some(&id)), cr(None), Cr { deleting: true, ..cr(Some(&id)) });
    let pool = cr(Some("pool-0"));
    let ours = Cr { owner: Some(Owner::Row(ID)), held_by_kopf: false, ..cr(None) };
    let back = Cr { held_by_kopf: true, ..ours.clone() };
    let its = [vm(&id)];
    let adopted = [FoundVm { adopted: true, ..vm(&id) }];
    let recorded = Cr {
        status: CyberdeskStatus {
            virtual_machine_ref: Some(VirtualMachineRef { name: id.clone(), uid: format!("uid of {id}") }),
            ..CyberdeskStatus::default()
        },
        ..cr(Some(&id))
    };
    let marked = |name: &str| format!("mark {name} for row, record {name} (uid of {name}), release");
    let gone = format!("record {id} (unknown), release");

    let cases = [
        ("it runs", Some(&running), Some(&with_vm), &its[..], marked(&id)),
        ("it runs, and its row was never told", Some(&pending), Some(&with_vm), &its, marked(&id)),
        ("its CR was never told", Some(&running), Some(&without), &its, marked(&id)),
        ("of a warm pool", Some(&running), Some(&pool), &[vm("pool-1"), vm("pool-0")], marked("pool-0")),
        ("its VM is gone", Some(&running), Some(&with_vm), &[], gone.clone()),
        ("its VM is gone, and its row was never told", Some(&pending), Some(&with_vm), &[], gone.clone()),
        ("its VM is gone, and nothing else says so", Some(&running), Some(&without), &[], gone),
        ("Kopf never came to it", Some(&pending), Some(&without), &[], "release".to_owned()),
        (
            "no CR",
            Some(&running),
            None,
            &its,
            format!("mark {id} for row, make CR, record {id} (uid of {id}), release"),
        ),
        ("neither CR nor VM", Some(&running), None, &[], format!("make CR, record {id} (unknown), release")),
        ("new", Some(&pending), None, &[], "nothing".to_owned()),
        ("it ran out while nobody looked", Some(&due), None, &[], "nothing".to_owned()),
        ("its VM leaked", Some(&over), None, &its, format!("mark {id} for row")),
        ("it is over, and its CR is left", Some(&over), Some(&with_vm), &[], "release".to_owned()),
        ("it is ending", Some(&ending), Some(&with_vm), &its, format!("mark {id} for row, release")),
        (
            "its CR is being deleted",
            Some(&running),
            Some(&deleting),
            &its,
            format!("mark {id} for row, make CR, record {id} (uid of {id}), release"),
        ),
        ("by hand", None, Some(&with_vm), &its, format!("mark {id} for hand, record {id} (uid of {id}), release")),
        ("by hand, deleted", None, Some(&deleting), &its, format!("mark {id} for hand, release")),
        ("interrupted after the mark", Some(&running), Some(&with_vm), &adopted, marked(&id)),
        ("interrupted before the release", Some(&running), Some(&recorded), &adopted, "release".to_owned()),
        ("a daemon was here first", Some(&running), Some(&ours), &[], format!("record {id} (unknown)")),
        ("Kopf has come back", Some(&pending), Some(&back), &[], "release".to_owned()),
        ("nobody's", None, None, &its, format!("leave: VirtualMachine {id} has neither a row nor a Cyberdesk")),
        (
            "its row vanished",
            Some(&vanished),
            Some(&with_vm),
            &its,
            "leave: its row has gone without a word".to_owned(),
        ),
        (
            "two claim it",
            Some(&running),
            Some(&without),
            &[vm("a"), vm("b")],
            "leave: several VirtualMachines say that they are its: a, b".to_owned(),
        ),
        (
            "another was recorded",
            Some(&of_another),
            Some(&with_vm),
            &its,
            format!("leave: its row has had another VirtualMachine (another) than {id}"),
        ),
    ];
    for (case, row, cr, vms, wanted) in cases {
        assert_eq!(told(row, cr, vms, false), wanted, "{case}");
    }
    let two = format!("leave: it has two VirtualMachines, {id} and cyberdesk-{id}");
    assert_eq!(told(Some(&running), Some(&with_vm), &its, true), two);
}

#[test]
fn a_guest_that_is_not_ready_gets_the_time_of_a_start_and_one_that_ran_needs_none() {
    let key = key();
    for (status, has_clock) in [(RowStatus::Pending, true), (RowStatus::Running, false)] {
        let (row, cr, vms) = (row(status), cr(None), [vm("its")]);
        let found = Found { key: &key, row: Some(&row), cr: Some(&cr), vms: &vms, is_made: false };
        let Verdict::Adopt(adoption) = decide(&found, NOON) else { panic!("it is adopted") };
        let status = adoption.status(CyberdeskStatus::default(), NOON);
        assert_eq!(status.start_clock.is_some(), has_clock);
        assert!(status.start_clock.is_none_or(|clock| clock.since == NOON), "not that of a VM that is days old");
    }
}

#[test]
fn a_vm_says_whose_it_is_by_its_labels_or_by_those_of_its_template() {
    let object = |metadata: Value, template: Value| -> DynamicObject {
        let spec = json!({ "template": { "metadata": { "labels": template } } });
        let mut metadata = metadata;
        metadata["name"] = "pool-0".into();
        metadata["uid"] = "uid".into();
        serde_json::from_value(json!({ "metadata": metadata, "spec": spec })).expect("an object")
    };
    let read = |metadata, template| FoundVm::of(&object(metadata, template));
    let label = json!({ "labels": { "cyberdesk-instance": "a" } });
    assert_eq!(read(label, json!({})).map(|vm| vm.key()), Some(Key::new("a")));
    assert_eq!(read(json!({}), json!({ "cyberdesk-instance": "b" })).map(|vm| vm.key()), Some(Key::new("b")));
    assert_eq!(read(json!({}), json!({})).map(|vm| (vm.key(), vm.desktop)), Some((Key::new("pool-0"), None)));
    let labels = Owner::Row(ID).labels(&key(), None);
    assert_eq!(read(json!({ "labels": labels }), json!({})), None, "it is ours");
    let kept = BTreeMap::from([("cyberdesk.io/adopted", "pool-0")]);
    let adopted = read(json!({ "labels": labels, "annotations": kept }), json!({})).expect("it was adopted");
    assert!(adopted.adopted && adopted.key() == key());
}
