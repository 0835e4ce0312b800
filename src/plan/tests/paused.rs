//! Desktops that a person has paused.

use super::*;
use crate::crd::StartClock;

const UNTIL: i64 = 90;

fn annotated(cr: Cr) -> Cr {
    Cr { paused: true, ..cr }
}

/// As `situation`, once its CR has been written as planned.
fn told(situation: Situation) -> Situation {
    let actions = situation.plan().actions;
    let [Action::WriteCrStatus { status, .. }] = actions.as_slice() else { panic!("it says so: {actions:?}") };
    let cr = situation.cr.present().cloned().map(|cr| Cr { status: (**status).clone(), ..cr });
    Situation { cr: cr.map_or(Absent, Present), ..situation }
}

fn by_annotation(row: Row, vm: Seen<Vm>, vmi: Seen<Vmi>) -> Situation {
    Situation::of_row(row, Present(annotated(row_cr())), vm, vmi)
}

fn by_row(row: Row, cr: Cr, vm: Seen<Vm>, vmi: Seen<Vmi>) -> Situation {
    Situation::of_row(Row { paused: true, ..row }, Present(cr), vm, vmi)
}

#[test]
fn nothing_becomes_of_a_paused_desktop_but_that_it_says_so() {
    let due = || Row { expires_at: at(-1), timeout_at: at(-1), ..served_row() };
    let off = || Present(vmi(VmiPhase::Succeeded, false));
    let hand = |vm: Seen<Vm>| Situation::by_hand(Present(annotated(hand_cr())), vm, Absent);
    let expired = || {
        let spec = Ok(CyberdeskSpec { expires_at: Some(at(-1)), ..Default::default() });
        Situation::by_hand(Present(annotated(Cr { spec, ..hand_cr() })), Absent, Absent)
    };
    let pending = "say Pending(desktop-paused)";
    let cases = [
        ("a row whose VM is yet to be made", by_annotation(row(), Absent, Absent), pending),
        ("one whose deadline has come", by_annotation(due(), Present(vm()), Present(up())), pending),
        ("one whose guest is off", by_annotation(served_row(), Present(vm()), off()), pending),
        ("one whose VM is gone", by_annotation(served_row(), Absent, Absent).live(), pending),
        ("one that somebody asked to end", by_annotation(stopped_row(), Present(vm()), Present(up())), pending),
        ("the same in SQL", by_row(stopped_row(), row_cr(), Present(vm()), Present(up())), pending),
        ("a CR by hand", hand(Absent), pending),
        ("one that is due", expired(), pending),
        ("an orphan", Situation { row: Absent, ..by_annotation(row(), Present(vm()), Absent) }, pending),
        ("one that cannot be read", Situation::unread(Present(annotated(row_cr())), Present(vm()), Absent), pending),
    ];
    for (case, situation, want) in cases {
        assert_eq!(situation.told(), want, "{case}");
        let plan = told(situation).plan();
        assert_eq!((plan.actions, plan.wait, plan.progress), (vec![], None, None), "{case}: it says so once");
    }
}

#[test]
fn nothing_is_made_to_say_so_and_no_strangers_object_is_written() {
    let new = Situation::of_row(Row { paused: true, ..row() }, Absent, Absent, Absent);
    let strangers = Cr { database: Some(Uuid::from_u128(6)), ..annotated(row_cr()) };
    let mut over = annotated(with_end(hand_cr(), Reason::Timeout));
    over.status.phase = Some(Phase::Terminated);
    let absent = |cr: Cr| Situation { row: Absent, ..Situation::of_row(row(), Present(cr), Absent, Absent) };
    let cases = [
        ("a row without a CR", new),
        ("a CR of another database", absent(strangers.clone())),
        ("the same, while ours cannot be read", Situation::unread(Present(strangers), Absent, Absent)),
        ("one that is over", Situation::by_hand(Present(over), Absent, Absent)),
    ];
    for (case, situation) in cases {
        assert_eq!(situation.told(), "", "{case}");
    }
}

#[test]
fn what_the_database_said_last_holds_while_it_is_away_and_an_annotation_only_while_it_is_there() {
    let due = || Cr { spec: Ok(CyberdeskSpec { expires_at: Some(at(-1)), ..Default::default() }), ..row_cr() };
    let unread = |situation: Situation| Situation { row: Unknown, ..situation }.away();
    let there = || (Present(vm()), Present(up()));
    let (vm, vmi) = there();
    assert_eq!(unread(told(by_row(served_row(), due(), vm, vmi))).told(), "");

    let (vm, vmi) = there();
    let mut situation = told(Situation::of_row(served_row(), Present(annotated(due())), vm, vmi));
    situation.cr = situation.cr.present().cloned().map_or(Absent, |cr| Present(Cr { paused: false, ..cr }));
    assert_eq!(unread(situation).told(), "say Stopping(timeout), delete vm");
}

#[test]
fn a_row_that_is_over_is_cleared_away_though_it_was_paused() {
    assert_eq!(by_row(ended_row(), row_cr(), Absent, Absent).told(), "delete CR");
}

#[test]
fn a_resumed_desktop_goes_on_with_what_is_left_of_its_start() {
    let mut cr = annotated(row_cr());
    cr.status.virtual_machine_ref = Some(VirtualMachineRef { name: "cyberdesk-x".into(), uid: "vm".into() });
    cr.status.start_clock = Some(StartClock { since: at(-10), deadline: Some(at(UNTIL)), seconds_left: None });
    let starting = Present(vmi(VmiPhase::Running, false));
    let paused = told(Situation::of_row(served_row(), Present(cr), Present(vm()), starting));
    let stands = Some(StartClock { since: at(0), deadline: None, seconds_left: Some(UNTIL) });
    let cr = paused.cr.present().cloned().expect("its CR");
    assert_eq!(cr.status.start_clock, stands);

    let resumed = Situation { cr: Present(Cr { paused: false, ..cr }), ..paused };
    assert_eq!(resumed.told(), "say Starting");
    let actions = resumed.plan().actions;
    let [Action::WriteCrStatus { status, .. }] = actions.as_slice() else { panic!("{actions:?}") };
    assert_eq!(status.start_clock.as_ref().and_then(|clock| clock.deadline), Some(at(UNTIL)));
    assert!(!says_paused(status), "{status:?}");
}
