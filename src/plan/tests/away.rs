//! While the database is away.

use super::*;

fn due_cr() -> Cr {
    Cr { spec: Ok(CyberdeskSpec { expires_at: Some(at(-1)), ..Default::default() }), ..recorded_cr() }
}

fn recorded_cr() -> Cr {
    let mut cr = row_cr();
    cr.status.virtual_machine_ref = Some(VirtualMachineRef { name: "cyberdesk-x".into(), uid: "vm".into() });
    cr
}

fn due_row() -> Row {
    Row { expires_at: at(-1), timeout_at: at(-1), ..served_row() }
}

fn silent_for(milliseconds: i64, situation: Situation) -> Situation {
    let silence = SignedDuration::from_millis(milliseconds);
    Situation { silence: Silence { reads: silence, writes: silence }, ..situation }
}

#[test]
fn a_row_that_cannot_be_read_is_served_by_its_cr_and_nothing_is_made_of_it() {
    let unread = Situation::unread;
    let crashed = || vmi(VmiPhase::Failed, false);
    let hand = |cr: Cr| Cr { owner: None, ..cr };
    let hands = || Vm { owner: Some(Owner::Hand("cr".into())), ..vm() };
    let cases = [
        ("it may just not have been read yet", silent_for(4999, unread(Present(due_cr()), Present(vm()), Absent)), ""),
        ("it lives on", unread(Present(recorded_cr()), Present(vm()), Present(up())), "say Running"),
        (
            "its deadline comes",
            unread(Present(due_cr()), Present(vm()), Present(up())),
            "say Stopping(timeout), delete vm",
        ),
        (
            "it crashes: that is so, whatever the row says",
            unread(Present(recorded_cr()), Present(vm()), Present(crashed())),
            "say Stopping(guest-crashed), delete vm",
        ),
        (
            "its end goes on",
            unread(Present(with_end(due_cr(), Reason::Timeout)), Absent, Present(up())),
            "say Stopping(timeout), delete vmi",
        ),
        (
            "it is over, and its CR stays until the row has it",
            unread(Present(with_end(due_cr(), Reason::Timeout)), Absent, Absent).live(),
            "delete Secret, say Terminated(timeout)",
        ),
        ("its VM seems to be gone", unread(Present(recorded_cr()), Absent, Absent), "look live"),
        ("its VM is yet to be made", unread(Present(row_cr()), Absent, Absent), ""),
        ("its VM is yet to be made, for sure", unread(Present(row_cr()), Absent, Absent).live(), ""),
        ("there is not even a CR", unread(Absent, Present(vm()), Present(up())), ""),
        ("whose CR is it?", unread(Present(hand(row_cr())), Absent, Absent), ""),
        (
            "a CR by hand with an id for a name, that was served before",
            unread(Present(hand(recorded_cr())), Present(hands()), Absent),
            "say Starting",
        ),
        (
            "the same at its deadline",
            unread(Present(hand(due_cr())), Present(hands()), Absent),
            "say Stopping(timeout), delete vm",
        ),
        (
            "another row's CR",
            unread(Present(Cr { owner: Some(Owner::Row(Uuid::nil())), ..due_cr() }), Present(vm()), Absent),
            "",
        ),
        (
            "a status that cannot be read",
            unread(Present(Cr { status_readable: false, ..due_cr() }), Present(vm()), Absent),
            "",
        ),
    ];
    for (case, situation, wanted) in cases {
        assert_eq!(situation.told(), wanted, "{case}");
    }
}

#[test]
fn a_deadline_that_the_database_does_not_hear_of_is_kept_by_the_row_as_it_was_read() {
    let due = |cr, vm| Situation::of_row(due_row(), cr, vm, Absent);
    let away = |cr, vm| due(cr, vm).away();
    let never_made = Row { vm_uid: None, ..due_row() };
    let idle = Row { timeout_at: at(600), ..due_row() };
    let cases = [
        ("it answers", due(Present(recorded_cr()), Present(vm())), "expire"),
        ("it may still answer", silent_for(999, due(Present(recorded_cr()), Present(vm()))), "expire"),
        (
            "it does not answer",
            silent_for(1000, due(Present(recorded_cr()), Present(vm()))),
            "say Stopping(timeout), delete vm",
        ),
        ("the end has no place to stand in", away(Absent, Present(vm())), "create CR"),
        (
            "there is nothing to end",
            Situation { row: Present(never_made), ..away(Present(row_cr()), Absent) },
            "expire",
        ),
        (
            "an idle timeout needs the database",
            Situation::of_row(idle, Present(recorded_cr()), Present(vm()), Absent).away(),
            "expire",
        ),
        (
            "what was decided so is told when it is back, whatever the row says by then",
            Situation::of_row(
                Row { generation: 2, expires_at: at(900), timeout_at: at(900), ..served_row() },
                Present(with_end(due_cr(), Reason::Timeout)),
                Absent,
                Absent,
            )
            .live(),
            "delete Secret, report over terminated(timeout)",
        ),
    ];
    for (case, situation, wanted) in cases {
        assert_eq!(situation.told(), wanted, "{case}");
    }
}

#[test]
fn it_is_looked_at_again_when_the_database_has_been_silent_for_too_long() {
    let wait = |situation: Situation| situation.plan().wait;
    let milliseconds = |count| Some(Duration::from_millis(count));
    let due = Situation::of_row(due_row(), Present(recorded_cr()), Present(vm()), Absent);
    assert_eq!(wait(due.clone()), milliseconds(1000));
    assert_eq!(wait(silent_for(400, due)), milliseconds(600));
    let idle = Row { timeout_at: at(600), ..due_row() };
    let idle = Situation::of_row(idle, Present(recorded_cr()), Present(vm()), Absent);
    assert_eq!(wait(idle.away()), milliseconds(600_000));
    let unread = Situation::unread(Present(recorded_cr()), Present(vm()), Present(up()));
    assert_eq!(wait(silent_for(0, unread.clone())), milliseconds(5000));
    assert_eq!(wait(silent_for(3000, unread.clone())), milliseconds(2000));
    assert_eq!(wait(unread), milliseconds(600_000), "and at the deadline that its CR has");
}
