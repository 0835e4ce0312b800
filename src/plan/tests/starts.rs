//! Starts: what they wait for, when they are given up, and who hears of it.

use super::*;
use crate::crd::StartClock;
use crate::fleet::{Outage, Stage};
use crate::model::{ReadyBy, StartRules};

/// A pending row whose VM was made these seconds ago.
fn starting(ago: i64, change_vm: impl FnOnce(&mut Vm), vmi: Seen<Vmi>) -> Situation {
    let mut vm = Vm { created: at(-ago), ..vm() };
    change_vm(&mut vm);
    Situation::of_row(served_row(), Present(row_cr()), Present(vm), vmi)
}

fn untouched(_: &mut Vm) {}

fn waits(phase: VmiPhase, why: &str, words: &str) -> Seen<Vmi> {
    Present(Vmi { waiting: Some((why.into(), words.into())), ..vmi(phase, false) })
}

fn unready(why: &str) -> Seen<Vmi> {
    Present(Vmi { unready: Some((why.into(), "so it says".into())), ..vmi(VmiPhase::Running, false) })
}

fn failing(fault: Fault, words: &str) -> Situation {
    let failure = CreateFailure { owner: Owner::Row(id()), words: words.into(), fault, since: at(-5) };
    Situation { failure: Some(failure), ..Situation::of_row(row(), Present(row_cr()), Absent, Absent) }
}

fn with_row(situation: Situation, change: impl FnOnce(&mut Row)) -> Situation {
    let Present(mut row) = situation.row else { panic!("a situation of a row") };
    change(&mut row);
    Situation { row: Present(row), ..situation }
}

fn with_status(situation: Situation, change: impl FnOnce(&mut CyberdeskStatus)) -> Situation {
    let Present(mut cr) = situation.cr else { panic!("a situation with a CR") };
    change(&mut cr.status);
    Situation { cr: Present(cr), ..situation }
}

/// The row has run, and the CR knows in which VMI.
fn that_ran(situation: Situation) -> Situation {
    let situation = with_row(situation, |row| row.status = RowStatus::Running);
    with_status(situation, |status| {
        status.start_time = Some(at(-100));
        status.vmi_uid = Some("vmi".into());
    })
}

fn written_status(situation: &Situation) -> Option<CyberdeskStatus> {
    situation.plan().actions.into_iter().find_map(|action| match action {
        Action::WriteCrStatus { status, .. } => Some(*status),
        _ => None,
    })
}

fn report(situation: &Situation) -> Option<Report> {
    situation.plan().actions.into_iter().find_map(|action| match action {
        Action::Report(report) => Some(report),
        _ => None,
    })
}

const NO_MEMORY: &str = "0/1 nodes are available: 1 Insufficient memory.";
const QUOTA: &str = "pods \"x\" is forbidden: exceeded quota: desks";
const NO_WEBHOOK: &str = "Internal error occurred: failed calling webhook \"x\": connection refused";

/// Each way to be stuck, the reason that it is told as, and the one that it ends for.
fn stuck(ago: i64) -> Vec<(&'static str, Situation, Option<&'static str>, &'static str)> {
    let says = |why, words| starting(ago, untouched, waits(VmiPhase::Scheduling, why, words));
    let at_phase = |phase| starting(ago, untouched, Present(vmi(phase, false)));
    let agent = |vm: &mut Vm| vm.start.ready = ReadyBy::Agent;
    vec![
        ("no node", says("Unschedulable", NO_MEMORY), Some("unschedulable"), "unschedulable"),
        ("no image", says("ErrImagePull", "not found"), Some("image-pull"), "image-pull"),
        ("still no image", says("ImagePullBackOff", "back-off"), Some("image-pull"), "image-pull"),
        ("a pod over quota", says("FailedCreate", QUOTA), Some("quota"), "quota"),
        ("a pod that is refused", says("FailedCreate", "violates PodSecurity"), Some("pod-refused"), "pod-refused"),
        ("no disk", says("FailedPvcNotFound", "no PVC"), Some("storage"), "storage"),
        ("a word that we do not know", says("Odd", "odd"), Some("not-synchronized"), "not-synchronized"),
        ("a VMI over quota", starting(ago, |vm| vm.failure = Some(QUOTA.into()), Absent), Some("quota"), "quota"),
        (
            "a VMI that is refused",
            starting(ago, |vm| vm.failure = Some("no memory at all".into()), Absent),
            Some("vmi-refused"),
            "vmi-refused",
        ),
        (
            "a guest that ends before it runs",
            starting(ago, |vm| (vm.failed_starts, vm.run_strategy) = (3, RunStrategy::RerunOnFailure), Absent),
            Some("crash-loop"),
            "crash-loop",
        ),
        (
            "a guest that is paused from the start",
            starting(ago, untouched, Present(Vmi { paused: true, ..up() })),
            Some("paused"),
            "paused",
        ),
        (
            "a VM that the template never starts",
            starting(ago, |vm| vm.run_strategy = RunStrategy::Halted, Absent),
            Some("vm-stopped"),
            "vm-stopped",
        ),
        (
            "a VM that nobody starts",
            starting(ago, |vm| vm.run_strategy = RunStrategy::Manual, Absent),
            Some("vm-stopped"),
            "vm-stopped",
        ),
        ("a node that is lost", starting(ago, untouched, unready("NodeNotReady")), Some("node-lost"), "node-lost"),
        // What is on its way says nothing, until it has been for too long.
        ("a pod that does not get ready", at_phase(VmiPhase::Scheduling), None, "pod-not-ready"),
        ("a guest that is not started", at_phase(VmiPhase::Scheduled), None, "start-timeout"),
        ("a guest that does not get ready", at_phase(VmiPhase::Running), None, "guest-not-ready"),
        ("a probe that fails", starting(ago, untouched, unready("")), None, "guest-not-ready"),
        ("no agent", starting(ago, agent, Present(up())), None, "agent-not-connected"),
        ("disks that are on their way", starting(ago, untouched, Absent), None, "start-timeout"),
    ]
}

#[test]
fn each_way_to_be_stuck_is_told_once_and_ends_for_its_reason() {
    for (case, situation, told, _) in stuck(10) {
        let status = written_status(&situation).expect(case);
        assert_eq!(status.reason.as_deref(), told, "{case}");
        assert_eq!(status.end, None, "{case}: it has time");
        let note = report(&situation).and_then(|report| report.message);
        let reason = note.as_deref().and_then(|note| note.split_once(": ")).map(|(reason, _)| reason);
        assert_eq!(reason, told, "{case}: the row is told");
        let again = with_row(situation, |row| row.message = told.map(|told| format!("{told}: in other words")));
        assert_eq!(report(&again), None, "{case}: once");
    }
    for (case, situation, _, reason) in stuck(601) {
        assert!(situation.told().ends_with("look live"), "{case}: it may be ready by now: {}", situation.told());
        let situation = situation.live();
        let status = written_status(&situation).expect(case);
        let end = status.end.unwrap_or_else(|| panic!("{case}: it is given up"));
        assert_eq!((end.phase, end.reason.as_str()), (Phase::Error, reason), "{case}");
        assert!(end.message.is_some_and(|message| message.contains("not ready within 10m")), "{case}");
        assert_eq!(situation.told(), format!("say Stopping({reason}), delete vm"), "{case}");
    }
}

#[test]
fn the_words_of_a_stuck_start_are_kubevirts() {
    let stuck = starting(601, untouched, waits(VmiPhase::Scheduling, "Unschedulable", NO_MEMORY));
    let end = written_status(&stuck.live()).and_then(|status| status.end).expect("an end");
    assert_eq!(end.message, Some(format!("{NO_MEMORY} (not ready within 10m)")));
}

#[test]
fn what_cannot_be_made_is_judged_by_whose_fault_it_is() {
    let over = |situation: Situation| with_clock(situation, at(-700), Some(at(0)), None);
    let cases = [
        ("a quota", failing(Fault::Quota, QUOTA), "say Pending(quota), note", "say Stopping(quota), look live"),
        (
            "a policy",
            failing(Fault::Forbidden, "denied"),
            "say Pending(not-created), note",
            "say Stopping(not-created), look live",
        ),
        (
            "a webhook that is down",
            failing(Fault::Outage, NO_WEBHOOK),
            "say Pending(cluster-unavailable), note",
            "say Pending(cluster-unavailable), note",
        ),
    ];
    for (case, situation, first, late) in cases {
        assert!(situation.told().starts_with(first), "{case}: {}", situation.told());
        let late_now = over(situation).told();
        assert!(late_now.starts_with(late), "{case}: {late_now}");
        assert!(late_now.contains("look live") || late_now.ends_with("create VM"), "{case}: it is tried again");
    }
    let others = |situation: Situation| {
        let fleet = Standing { passed: [(Stage::Made, at(-1))].into(), ..Standing::default() };
        Situation { fleet, ..situation }
    };
    let alone = others(failing(Fault::Outage, NO_WEBHOOK));
    assert!(alone.told().starts_with("say Pending(not-created)"), "others get past it: {}", alone.told());
    assert!(over(alone).told().starts_with("say Stopping(not-created)"), "so it has a deadline");
}

fn with_clock(
    situation: Situation,
    since: Timestamp,
    deadline: Option<Timestamp>,
    seconds_left: Option<i64>,
) -> Situation {
    with_status(situation, |status| status.start_clock = Some(StartClock { since, deadline, seconds_left }))
}

/// The same for a start whose VM the CR has recorded.
fn with_recorded(situation: Situation) -> Situation {
    with_status(situation, |status| {
        status.virtual_machine_ref = Some(VirtualMachineRef { name: "cyberdesk-x".into(), uid: "vm".into() });
    })
}

fn clock_of(situation: &Situation) -> Option<(i64, Option<i64>, Option<i64>)> {
    let clock = match written_status(situation) {
        Some(status) => status.start_clock,
        None => situation.cr.present().and_then(|cr| cr.status.start_clock.clone()),
    };
    let second = |at: Timestamp| at.as_second() - NOON;
    clock.map(|clock| (second(clock.since), clock.deadline.map(second), clock.seconds_left))
}

#[test]
fn a_start_clock_runs_from_the_vm_and_stands_still_with_the_cluster() {
    let start = || starting(100, untouched, Present(vmi(VmiPhase::Scheduling, false)));
    let recorded = |since, deadline, left| with_recorded(with_clock(start(), since, deadline, left));
    let amid = |since| Standing { trouble: Some((at(since), "away".into())), ..Standing::default() };
    let after = |spans: &[(i64, i64)]| {
        let outages = spans.iter().map(|(from, until)| Outage { from: at(*from), until: at(*until) }).collect();
        Standing { outages, ..Standing::default() }
    };
    let cases = [
        ("it runs from the VM", start(), Standing::default(), (-100, Some(500), None)),
        ("it goes on", recorded(at(-100), Some(at(500)), None), Standing::default(), (-100, Some(500), None)),
        ("it stands still", recorded(at(-100), Some(at(500)), None), amid(-30), (0, None, Some(530))),
        ("an outage from before it", start(), amid(-300), (0, None, Some(600))),
        ("it still stands", recorded(at(-20), None, Some(530)), amid(-30), (-20, None, Some(530))),
        ("it goes on from there", recorded(at(-20), None, Some(530)), Standing::default(), (0, Some(530), None)),
        (
            "an outage that it slept through",
            recorded(at(-100), Some(at(-1)), None),
            after(&[(-50, -20)]),
            (0, Some(29), None),
        ),
        ("two of them", start(), after(&[(-200, -90), (-50, -20)]), (0, Some(540), None)),
        (
            "one that was told to it",
            recorded(at(-10), Some(at(530)), None),
            after(&[(-50, -20)]),
            (-10, Some(530), None),
        ),
    ];
    for (case, situation, fleet, wanted) in cases {
        assert_eq!(clock_of(&Situation { fleet, ..situation }), Some(wanted), "{case}");
    }
    let ready = with_recorded(with_clock(starting(100, untouched, Present(up())), at(-100), Some(at(500)), None));
    assert_eq!(clock_of(&ready), None, "a guest that is ready has no start under way");
    let made_at_last = with_clock(start(), at(-700), Some(at(-50)), None);
    assert_eq!(clock_of(&made_at_last), Some((-100, Some(500), None)), "the VM's time begins with it");
}

#[test]
fn nothing_is_given_up_while_the_cluster_is_the_trouble() {
    for (case, situation, ..) in stuck(10_000) {
        let fleet = Standing { trouble: Some((at(-20_000), "away".into())), ..Standing::default() };
        let told = Situation { fleet, ..situation }.told();
        assert!(told.contains("say Starting"), "{case}: {told}");
        assert!(!told.contains("delete"), "{case}: {told}");
    }
}

#[test]
fn kubevirt_that_is_silent_is_the_cluster_unless_others_get_on() {
    let unseen = |ago| starting(ago, |vm| vm.noticed = false, Absent);
    let no_pod = |ago: i64| {
        let vmi = Vmi { created: at(-ago), ..vmi(VmiPhase::Pending, false) };
        starting(ago + 1, untouched, Present(vmi))
    };
    for (case, early, late, stage) in [
        ("a VM that it does not see", unseen(29), unseen(1000), Stage::Noticed),
        ("a VMI that it makes no pod for", no_pod(28), no_pod(1000), Stage::Pod),
    ] {
        assert_eq!(written_status(&early).and_then(|status| status.reason), None, "{case}: not at once");
        assert!(early.plan().wait.is_some_and(|wait| wait <= Duration::from_secs(2)), "{case}: it is looked at then");
        let status = written_status(&late).expect(case);
        assert_eq!(status.reason.as_deref(), Some("cluster-unavailable"), "{case}");
        let progress = late.plan().progress.expect(case);
        assert!(progress.trouble.is_some_and(|trouble| trouble.before == stage), "{case}: the fleet hears of it");
        let fleet = Standing { passed: [(stage, at(-1))].into(), ..Standing::default() };
        let alone = Situation { fleet, ..late }.live();
        assert!(alone.told().starts_with("say Stopping(start-timeout)"), "{case}: {}", alone.told());
    }
    let no_webhook = starting(1000, |vm| vm.failure = Some(NO_WEBHOOK.into()), Absent);
    assert!(no_webhook.told().ends_with("say Starting(cluster-unavailable)"), "{}", no_webhook.told());
}

#[test]
fn a_guest_is_ready_when_its_template_says_so() {
    let agent = || StartRules { ready: ReadyBy::Agent, ..StartRules::default() };
    let connected = || Vmi { agent: true, ..up() };
    let cases = [
        ("the VMI is ready", StartRules::default(), up(), true),
        ("no agent yet", agent(), up(), false),
        ("the agent is there", agent(), connected(), true),
        ("an agent in a guest that is not ready", agent(), Vmi { ready: false, ..connected() }, false),
        ("a guest that stands still", StartRules::default(), Vmi { paused: true, ..up() }, false),
    ];
    for (case, rules, vmi, ready) in cases {
        let situation = starting(10, |vm| vm.start = rules, Present(vmi));
        assert_eq!(situation.plan().ready, ready, "{case}");
        assert_eq!(situation.told().contains("report running"), ready, "{case}");
    }
}

#[test]
fn the_stream_url_is_told_with_running_and_never_later() {
    let rules = || StartRules { stream_url: Some("https://desks.example/7".into()), ..StartRules::default() };
    let ready = starting(10, |vm| vm.start = rules(), Present(up()));
    let told = report(&ready).expect("it is running");
    assert_eq!((told.status, told.stream_url), (Some(RowStatus::Running), rules().stream_url));
    let gateway_was_first = with_row(ready, |row| row.status = RowStatus::Running);
    assert_eq!(report(&gateway_was_first), None, "what the gateway wrote stays");
    let none = starting(10, untouched, Present(up()));
    assert_eq!(report(&none).and_then(|report| report.stream_url), None, "it is left to the gateway");
}

#[test]
fn a_rows_message_follows_its_cause() {
    let stuck = || starting(10, untouched, waits(VmiPhase::Scheduling, "Unschedulable", NO_MEMORY));
    let told = |row_says: &str, situation: Situation| {
        let situation =
            with_row(situation, |row| row.message = Some(row_says.into()).filter(|text: &String| !text.is_empty()));
        report(&situation).and_then(|report| report.message)
    };
    let moving = || starting(10, untouched, Present(vmi(VmiPhase::Scheduling, false)));
    assert_eq!(told("", stuck()), Some(format!("unschedulable: {NO_MEMORY}")));
    assert_eq!(told("unschedulable: no cores", stuck()), None);
    assert_eq!(told("image-pull: not found", stuck()), Some(format!("unschedulable: {NO_MEMORY}")));
    assert_eq!(told("unschedulable: no cores", moving()), Some(String::new()), "it is no longer so");
    let ready = with_row(starting(10, untouched, Present(up())), |row| row.message = Some("unschedulable: x".into()));
    let running = report(&ready).expect("one report");
    assert_eq!((running.status, running.message.as_deref()), (Some(RowStatus::Running), Some("")), "in one statement");
}

#[test]
fn a_restart_is_another_vmi_and_has_a_clock_of_its_own() {
    let another = |ready| Present(Vmi { uid: "another".into(), ..vmi(VmiPhase::Running, ready) });
    let again = |vmi| that_ran(starting(9000, untouched, vmi));
    assert_eq!(clock_of(&again(another(false))), Some((0, Some(600), None)), "from when it was seen");
    assert_eq!(clock_of(&again(Absent)), Some((0, Some(600), None)), "between two VMIs");
    assert_eq!(clock_of(&again(Present(vmi(VmiPhase::Running, false)))), None, "the same VMI is no restart");
    let status = written_status(&again(another(true))).expect("news");
    assert_eq!((status.restarts, status.vmi_uid.as_deref()), (Some(1), Some("another")));
    assert_eq!(report(&again(another(true))), None, "the row runs as before");
    let migrated = Present(Vmi { node: Some("node02".into()), ip: Some("10.0.0.9".into()), ..up() });
    let status = written_status(&again(migrated)).expect("news");
    assert_eq!((status.restarts, status.node.as_deref()), (None, Some("node02")), "a migration is no restart");
    let late = with_recorded(with_clock(again(another(false)), at(-600), Some(at(0)), None)).live();
    assert!(late.told().starts_with("say Stopping(guest-not-ready), delete vm"), "{}", late.told());
    // A gateway that said `running`, and a CR that somebody deleted: nothing tells of another VMI.
    let unknown = with_row(starting(9000, untouched, Present(vmi(VmiPhase::Running, false))), |row| {
        row.status = RowStatus::Running;
    });
    assert_eq!(clock_of(&unknown), None);
}

#[test]
fn a_vm_that_somebody_stopped_lives_on_until_its_deadline() {
    for (case, strategy) in [("virtctl stop", RunStrategy::Halted), ("a stop under Manual", RunStrategy::Manual)] {
        let stopped = that_ran(starting(9000, |vm| vm.run_strategy = strategy, Absent));
        let told = stopped.told();
        assert!(told.starts_with("note vm-stopped: ") && told.ends_with("say Starting(vm-stopped)"), "{case}: {told}");
        assert_eq!(clock_of(&stopped), None, "{case}: it may be started again");
    }
}

#[test]
fn each_end_of_a_guest_has_its_reason() {
    let said = |reason: Reason, situation| with_status(situation, |status| status.reason = Some(reason.to_string()));
    let once = |vmi: Vmi| that_ran(starting(100, untouched, Present(vmi)));
    let under = |strategy, vmi: Seen<Vmi>| that_ran(starting(100, |vm| vm.run_strategy = strategy, vmi));
    let failed = || vmi(VmiPhase::Failed, false);
    let off = || vmi(VmiPhase::Succeeded, false);
    let deleted = |vmi: Vmi| Vmi { deleting: true, ..vmi };
    let cases = [
        ("power-off", once(off()), "say Stopping(guest-shutdown), delete vm"),
        ("crash", once(failed()), "say Stopping(guest-crashed), delete vm"),
        ("its node was lost", once(Vmi { node_lost: true, ..failed() }), "say Stopping(node-lost), delete vm"),
        ("it was said to be", said(Reason::NodeLost, once(failed())), "say Stopping(node-lost), delete vm"),
        ("a drain, in time", said(Reason::Evicted, once(off())), "say Stopping(evicted), delete vm"),
        ("a drain, too slow", said(Reason::Evicted, once(failed())), "say Stopping(evicted), delete vm"),
        ("an eviction by KubeVirt", once(Vmi { evicted: true, ..off() }), "say Stopping(evicted), delete vm"),
        ("the VMI is deleted by hand", once(deleted(failed())), "say Starting"),
        (
            "power-off under Manual",
            under(RunStrategy::Manual, Present(off())),
            "say Stopping(guest-shutdown), delete vm",
        ),
        ("crash under Manual", under(RunStrategy::Manual, Present(failed())), "say Stopping(guest-crashed), delete vm"),
        ("a stop under Manual", under(RunStrategy::Manual, Present(deleted(off()))), "say Starting"),
        ("crash under RerunOnFailure", under(RunStrategy::RerunOnFailure, Present(failed())), "say Starting"),
        (
            "a drain under RerunOnFailure",
            said(Reason::Evicted, under(RunStrategy::RerunOnFailure, Present(off()))),
            "say Stopping(evicted), delete vm",
        ),
        ("power-off under Always", under(RunStrategy::Always, Present(off())), "say Starting"),
        ("stopped, and its VMI goes", under(RunStrategy::Halted, Present(deleted(off()))), "say Starting(vm-stopped)"),
        ("a drain has begun", that_ran(starting(100, untouched, unready("PodTerminating"))), "say Starting(evicted)"),
        (
            "the pods of a lost node are evicted",
            said(Reason::NodeLost, that_ran(starting(100, untouched, unready("PodTerminating")))),
            "say Starting(node-lost)",
        ),
    ];
    for (case, situation, wanted) in cases {
        assert!(situation.told().contains(wanted), "{case}: {}", situation.told());
    }
}

#[test]
fn a_vmi_that_hangs_in_its_end_is_told_of_and_never_given_up() {
    let ends = |gone_by| {
        let vmi = Vmi { deleting: true, gone_by: Some(at(gone_by)), ..up() };
        let vm = Vm { deleting: true, ..vm() };
        Situation::of_row(stopped_row(), Present(with_end(row_cr(), Reason::Requested)), Present(vm), Present(vmi))
    };
    let ended = |situation: &Situation| {
        let status = written_status(situation).expect("news");
        let conditions = status.conditions.unwrap_or_default();
        conditions.into_iter().find(|condition| condition.type_ == "Ended").expect("a condition")
    };
    assert_eq!(ended(&ends(60)).reason, "requested");
    assert_eq!(ends(60).plan().wait, Some(Duration::from_secs(60)), "it is looked at then");
    let stuck = ended(&ends(-1));
    assert_eq!((stuck.status.as_str(), stuck.reason.as_str()), ("False", "teardown-stuck"));
    assert!(stuck.message.contains("node01"), "{}", stuck.message);
    assert_eq!(ends(-1).told(), "say Stopping(requested)", "nothing more is done, and it is not over");
}

#[test]
fn a_vm_waits_for_its_turn_and_says_so() {
    let waits = |since| {
        let fleet = Standing { throttled: Some(at(since)), ..Standing::default() };
        Situation { fleet, ..Situation::of_row(row(), Present(row_cr()), Absent, Absent) }
    };
    assert_eq!(waits(0).told(), "", "most wait for a moment only");
    assert_eq!(waits(0).plan().wait, Some(Duration::from_secs(2)));
    assert_eq!(waits(-2).told(), "say Pending(throttled)", "the row hears nothing of our queue");
    assert_eq!(clock_of(&waits(-2)), None, "nothing was tried yet");
    assert!(waits(-2).plan().progress.is_some_and(|progress| progress.throttled && !progress.unstarted));
    let failure = failing(Fault::Quota, QUOTA).failure;
    let failed_before = Situation { failure, ..with_clock(waits(-2), at(-300), Some(at(300)), None) };
    assert_eq!(clock_of(&failed_before), Some((0, None, Some(300))), "our own brake costs it nothing");
    let ends = Situation { row: Present(stopped_row()), ..waits(-2) };
    assert!(ends.told().contains("look live"), "ends never wait: {}", ends.told());
    let has_its_vm = Situation { vm: Present(vm()), ..waits(-2) };
    assert_eq!(has_its_vm.told(), "report seen, say Starting");
}

#[test]
fn a_cr_shows_until_when_it_must_be_ready() {
    let status = written_status(&starting(100, untouched, Absent)).expect("news");
    let started = status.conditions.into_iter().flatten().find(|it| it.type_ == "Started").expect("a condition");
    assert_eq!(started.status, "False");
    assert_eq!(started.message, format!("given up at {} if it is not ready by then", at(500)));
    let wait = starting(100, untouched, Present(vmi(VmiPhase::Scheduling, false))).plan().wait;
    assert_eq!(wait, Some(Duration::from_secs(500)), "and is looked at then");
}

#[test]
fn the_clock_of_a_start_that_is_held_up_keeps_the_time_that_is_left() {
    let clock = StartClock { since: at(-5), deadline: Some(at(95)), seconds_left: None };
    let to_make = || Situation::of_row(row(), Present(row_cr()), Absent, Absent);
    let held_up = [
        Situation { paused: true, ..to_make() },
        // A leader that has just begun, and has not tried to make it yet.
        Situation { templates: Templates::unread(), ..to_make() },
    ];
    for situation in held_up {
        let situation = with_status(situation, |status| status.start_clock = Some(clock.clone()));
        let kept = written_status(&situation).expect("it says what it waits for").start_clock;
        assert_eq!(kept, Some(StartClock { since: noon().cluster, deadline: None, seconds_left: Some(95) }));
    }
}
