mod adopted;
mod away;
mod paused;
mod starts;

use std::sync::LazyLock;

use super::*;
use crate::crd::VirtualMachineRef;
use crate::model::{StartRules, VmiPhase};

const NOON: i64 = 1_800_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(NOON + seconds).expect("a time")
}

fn noon() -> Now {
    Now { database: at(0), cluster: at(0) }
}

const DATABASE: Uuid = Uuid::from_u128(5);

fn id() -> Uuid {
    Uuid::from_u128(7)
}

static TEMPLATES: LazyLock<Templates> = LazyLock::new(|| {
    let vm = "apiVersion: kubevirt.io/v1\nkind: VirtualMachine\nspec: {runStrategy: Once}";
    Templates::new("desks", [("default.yaml", vm)])
});

fn row() -> Row {
    Row {
        id: id(),
        exists: true,
        user_id: Uuid::from_u128(9),
        desired: Desired::Present,
        reason: None,
        message: None,
        expires_at: at(600),
        timeout_at: at(600),
        created_at: at(0),
        changed_at: at(0),
        generation: 1,
        observed_generation: 0,
        params: None,
        status: RowStatus::Pending,
        vm_uid: None,
        ended: false,
        paused: false,
    }
}

/// A row that was told everything about the VM `vm()`.
fn served_row() -> Row {
    Row { observed_generation: 1, vm_uid: Some("vm".into()), ..row() }
}

fn stopped_row() -> Row {
    Row { desired: Desired::Absent, generation: 2, reason: Some("requested".into()), ..served_row() }
}

fn ended_row() -> Row {
    Row { ended: true, status: RowStatus::Terminated, observed_generation: 2, ..stopped_row() }
}

fn row_cr() -> Cr {
    Cr {
        uid: "cr".into(),
        version: "1".into(),
        generation: 1,
        created: at(-10),
        owner: Some(Owner::Row(id())),
        database: Some(DATABASE),
        deleting: false,
        held_by_kopf: false,
        paused: false,
        status_readable: true,
        spec: Ok(CyberdeskSpec { expires_at: Some(at(600)), ..Default::default() }),
        status: CyberdeskStatus::default(),
    }
}

fn hand_cr() -> Cr {
    Cr { owner: None, spec: Ok(CyberdeskSpec { timeout_ms: Some(600_000), ..Default::default() }), ..row_cr() }
}

fn vm() -> Vm {
    Vm {
        uid: "vm".into(),
        adopted_name: None,
        owner: Some(Owner::Row(id())),
        database: Some(DATABASE),
        created: at(-10),
        start: StartRules::default(),
        noticed: true,
        unheld: None,
        deleting: false,
        run_strategy: RunStrategy::Once,
        restart_pending: false,
        failure: None,
        failed_starts: 0,
    }
}

fn vmi(phase: VmiPhase, ready: bool) -> Vmi {
    Vmi {
        uid: "vmi".into(),
        adopted_name: None,
        owner: Some(Owner::Row(id())),
        database: Some(DATABASE),
        created: at(-9),
        deleting: false,
        gone_by: None,
        phase,
        ready,
        unready: None,
        agent: false,
        paused: false,
        evicted: false,
        node_lost: false,
        node: Some("node01".into()),
        ip: Some("10.0.0.1".into()),
        waiting: None,
    }
}

fn up() -> Vmi {
    vmi(VmiPhase::Running, true)
}

fn refused() -> Option<CreateFailure> {
    Some(CreateFailure { owner: Owner::Row(id()), words: "no".into(), fault: Fault::Refused, since: at(-5) })
}

fn with_end(cr: Cr, reason: Reason) -> Cr {
    let end = Some(reason::end(reason, None, at(-1)));
    let status = CyberdeskStatus { end, phase: Some(Phase::Stopping), ..cr.status };
    Cr { status, ..cr }
}

/// A view and what follows from it, told apart from the borrowed [`View`] so that tables can own it.
#[derive(Clone, Debug)]
struct Situation {
    key: Key,
    row: Seen<Row>,
    cr: Seen<Cr>,
    vm: Seen<Vm>,
    vmi: Seen<Vmi>,
    live: bool,
    silence: Silence,
    failure: Option<CreateFailure>,
    fleet: Standing,
    paused: bool,
    braked: bool,
    orphan_rest: Duration,
    templates: Templates,
}

impl Situation {
    fn of_row(row: Row, cr: Seen<Cr>, vm: Seen<Vm>, vmi: Seen<Vmi>) -> Self {
        Self { key: Key::of_row(id()), row: Present(row), ..Self::by_hand(cr, vm, vmi) }
    }

    fn by_hand(cr: Seen<Cr>, vm: Seen<Vm>, vmi: Seen<Vmi>) -> Self {
        Self {
            key: Key::new("desk"),
            row: Absent,
            cr,
            vm,
            vmi,
            live: false,
            silence: Silence::default(),
            failure: None,
            fleet: Standing::default(),
            paused: false,
            braked: false,
            orphan_rest: Duration::ZERO,
            templates: TEMPLATES.clone(),
        }
    }

    /// As `of_row`, in a database that has not answered for a minute.
    fn unread(cr: Seen<Cr>, vm: Seen<Vm>, vmi: Seen<Vmi>) -> Self {
        Self { row: Unknown, ..Self::of_row(row(), cr, vm, vmi) }.away()
    }

    fn away(self) -> Self {
        let minute = SignedDuration::from_mins(1);
        Self { silence: Silence { reads: minute, writes: minute }, ..self }
    }

    fn live(self) -> Self {
        Self { live: true, ..self }
    }

    fn plan(&self) -> Plan {
        let view = View {
            key: &self.key,
            row: self.row.clone(),
            cr: self.cr.clone(),
            vm: self.vm.clone(),
            vmi: self.vmi.clone(),
            live: self.live,
            silence: self.silence,
            failure: self.failure.as_ref(),
            fleet: &self.fleet,
            paused: self.paused,
            braked: self.braked,
            database: Some(DATABASE),
            orphan_rest: self.orphan_rest,
            templates: &self.templates,
        };
        plan(&view, noon())
    }

    /// The plan in words, for tables.
    fn told(&self) -> String {
        let words = |action: &Action| match action {
            Action::WriteCrStatus { status, .. } => {
                let why = status.reason.as_deref().map(|why| format!("({why})"));
                format!("say {:?}{}", status.phase.expect("a phase"), why.unwrap_or_default())
            }
            Action::Report(report) if report.ended => {
                let status = report.status.map(RowStatus::as_str).unwrap_or_default();
                format!("report over {status}({})", report.reason.as_deref().unwrap_or_default())
            }
            Action::Report(Report { status: Some(status), .. }) => format!("report {}", status.as_str()),
            Action::Report(Report { message: Some(message), .. }) => format!("note {message}"),
            Action::Report(_) => "report seen".into(),
            Action::CreateCr { .. } => "create CR".into(),
            Action::ApplyCr { .. } => "apply CR".into(),
            Action::DeleteCr { .. } => "delete CR".into(),
            Action::CreateVm { .. } => "create VM".into(),
            Action::DeleteVm { uid, .. } => format!("delete {uid}"),
            Action::DeleteVmi { uid } => format!("delete {uid}"),
            Action::DeleteSecrets { .. } => "delete Secret".into(),
            Action::LookLive => "look live".into(),
            Action::Expire(_) => "expire".into(),
            Action::Forget => "forget".into(),
        };
        self.plan().actions.iter().map(words).collect::<Vec<_>>().join(", ")
    }
}

use Seen::{Absent, Present, Unknown};

#[test]
fn each_situation_of_a_row_has_its_next_steps() {
    let row_ = Situation::of_row;
    let deleting = |vm: Vm| Vm { deleting: true, ..vm };
    let foreign = || Vm { owner: None, ..vm() };
    let late = || Vm { uid: "late".into(), ..vm() };
    let rerun = || Vm { run_strategy: RunStrategy::RerunOnFailure, ..vm() };
    let always = || Vm { run_strategy: RunStrategy::Always, ..vm() };
    let has_run = || {
        let mut cr = row_cr();
        cr.status.start_time = Some(at(-5));
        cr
    };
    let due = || Row { expires_at: at(0), ..served_row() };
    let running = || Row { status: RowStatus::Running, ..served_row() };
    let truncated = || Row { exists: false, ..row() };
    let extended = || Row { expires_at: at(900), timeout_at: at(900), generation: 2, ..running() };
    let extended_spec = || Ok(CyberdeskSpec { expires_at: Some(at(900)), ..Default::default() });
    let idle_for_long = || Row { expires_at: at(0), ..running() };
    let touched = || Row { expires_at: at(300), generation: 2, ..running() };
    let told = || Row { message: Some("cluster-unavailable: the VM templates".into()), ..row() };
    let due_unmade = || Row { expires_at: at(0), ..row() };
    let just_now = || refused().map(|failure| CreateFailure { fault: Fault::Forbidden, ..failure });
    let gone = |vmi: Vmi| Vmi { deleting: true, ..vmi };

    let cases = [
        // Nothing follows from what could not be seen.
        ("a CR that could not be seen", row_(row(), Unknown, Absent, Absent), ""),
        ("a VM that could not be seen", row_(row(), Present(row_cr()), Unknown, Absent), ""),
        ("a VMI that could not be seen", row_(stopped_row(), Absent, Absent, Unknown), ""),
        ("a row that went without its trigger", row_(truncated(), Absent, Absent, Absent), ""),
        // It comes to be.
        ("a new row", row_(row(), Absent, Absent, Absent), "create CR, create VM"),
        ("a crash after the CR", row_(row(), Present(row_cr()), Absent, Absent), "create VM"),
        ("a crash after the VM", row_(row(), Present(row_cr()), Present(vm()), Absent), "report seen, say Starting"),
        (
            "a guest that boots",
            row_(served_row(), Present(row_cr()), Present(vm()), Present(vmi(VmiPhase::Running, false))),
            "say Starting",
        ),
        (
            "a guest that is ready",
            row_(served_row(), Present(row_cr()), Present(vm()), Present(up())),
            "report running, say Running",
        ),
        (
            "a gateway was first to say so",
            row_(running(), Present(row_cr()), Present(vm()), Present(up())),
            "say Running",
        ),
        ("the deadline was moved", row_(extended(), Present(row_cr()), Present(vm()), Present(up())), "apply CR"),
        (
            "and its CR has it",
            row_(extended(), Present(Cr { spec: extended_spec(), ..row_cr() }), Present(vm()), Present(up())),
            "report seen, say Running",
        ),
        (
            "a touch moves the idle deadline, and nothing that people see",
            row_(touched(), Present(row_cr()), Present(vm()), Present(up())),
            "report seen, say Running",
        ),
        ("its idle deadline came", row_(idle_for_long(), Present(row_cr()), Present(vm()), Present(up())), "expire"),
        (
            "new desktops wait",
            Situation { paused: true, ..row_(row(), Present(row_cr()), Absent, Absent) },
            "say Pending(making-paused)",
        ),
        (
            "those that are there do not",
            Situation { paused: true, ..row_(served_row(), Present(row_cr()), Present(vm()), Present(up())) },
            "report running, say Running",
        ),
        (
            "the templates are not known yet",
            Situation { templates: Templates::unread(), ..row_(row(), Absent, Absent, Absent) },
            "create CR, note cluster-unavailable: the VM templates have not been read yet: the operator's log says why",
        ),
        (
            "they are not for long",
            Situation { templates: Templates::unread(), ..row_(told(), Present(row_cr()), Absent, Absent) },
            "say Pending(cluster-unavailable)",
        ),
        (
            "nor when its deadline comes",
            Situation { templates: Templates::unread(), ..row_(due_unmade(), Present(row_cr()), Absent, Absent) },
            "expire",
        ),
        ("what it was told of last is over", row_(told(), Present(row_cr()), Absent, Absent), "create VM"),
        (
            "those that are there need none",
            Situation {
                templates: Templates::unread(),
                ..row_(served_row(), Present(row_cr()), Present(vm()), Present(up()))
            },
            "report running, say Running",
        ),
        ("somebody deleted the CR", row_(running(), Absent, Present(vm()), Present(up())), "create CR"),
        ("a CR of the old gateway", row_(running(), Present(hand_cr()), Present(vm()), Present(up())), "apply CR"),
        // It cannot come to be.
        (
            "the name is taken",
            row_(row(), Present(row_cr()), Present(foreign()), Absent),
            "say Stopping(name-taken), look live",
        ),
        (
            "the name is taken, for sure",
            row_(row(), Present(with_end(row_cr(), Reason::NameTaken)), Present(foreign()), Absent).live(),
            "delete Secret, report over error(name-taken)",
        ),
        (
            "params that nobody takes",
            row_(Row { params: Some(serde_json::json!({"gpu": 8})), ..row() }, Present(row_cr()), Absent, Absent),
            "say Stopping(bad-params), look live",
        ),
        (
            "the API server refused the VM",
            Situation { failure: refused(), ..row_(row(), Present(row_cr()), Absent, Absent) },
            "say Stopping(refused), look live",
        ),
        (
            "an end must have its CR to stand in",
            Situation { failure: refused(), ..row_(row(), Absent, Absent, Absent) },
            "create CR",
        ),
        // It ends by what the cluster says.
        (
            "the guest powered off",
            row_(running(), Present(row_cr()), Present(vm()), Present(vmi(VmiPhase::Succeeded, false))),
            "say Stopping(guest-shutdown), delete vm",
        ),
        (
            "the guest crashed",
            row_(running(), Present(row_cr()), Present(vm()), Present(vmi(VmiPhase::Failed, false))),
            "say Stopping(guest-crashed), delete vm",
        ),
        (
            "the VMI is being restarted",
            row_(running(), Present(row_cr()), Present(vm()), Present(gone(vmi(VmiPhase::Failed, false)))),
            "say Starting",
        ),
        (
            "a crash that KubeVirt restarts",
            row_(running(), Present(row_cr()), Present(rerun()), Present(vmi(VmiPhase::Failed, false))),
            "say Starting",
        ),
        (
            "a power-off that KubeVirt does not restart",
            row_(running(), Present(row_cr()), Present(rerun()), Present(gone(vmi(VmiPhase::Succeeded, false)))),
            "say Stopping(guest-shutdown), delete vm",
        ),
        (
            "a power-off that was missed",
            row_(running(), Present(has_run()), Present(rerun()), Absent),
            "say Starting, look live",
        ),
        (
            "a power-off that was missed, for sure",
            row_(running(), Present(has_run()), Present(rerun()), Absent).live(),
            "say Stopping(guest-shutdown), delete vm",
        ),
        (
            "between two VMIs",
            row_(running(), Present(has_run()), Present(Vm { restart_pending: true, ..rerun() }), Absent).live(),
            "say Starting",
        ),
        (
            "a power-off under Always",
            row_(running(), Present(row_cr()), Present(always()), Present(vmi(VmiPhase::Succeeded, false))),
            "say Starting",
        ),
        (
            "somebody deletes the VM",
            row_(running(), Present(row_cr()), Present(deleting(vm())), Present(up())),
            "say Stopping(vm-deleted)",
        ),
        ("the VM seems to be gone", row_(running(), Present(row_cr()), Absent, Absent), "look live"),
        (
            "the VM is gone",
            row_(running(), Present(row_cr()), Absent, Absent).live(),
            "say Stopping(vm-deleted), delete Secret, report over terminated(vm-deleted)",
        ),
        (
            "a late create after the VM was gone",
            row_(running(), Present(row_cr()), Present(late()), Absent),
            "say Stopping(vm-deleted), delete late",
        ),
        (
            "a crash before a deadline that was missed",
            row_(due(), Present(row_cr()), Present(vm()), Present(vmi(VmiPhase::Failed, true))),
            "say Stopping(guest-crashed), delete vm",
        ),
        (
            "the VM cannot be made just now",
            Situation { failure: just_now(), ..row_(row(), Present(row_cr()), Absent, Absent) },
            "say Pending(not-created), note not-created: no, create VM",
        ),
        (
            "somebody's finalizer holds the CR of a live row",
            row_(extended(), Present(Cr { deleting: true, ..row_cr() }), Present(vm()), Present(up())),
            "report seen, say Running",
        ),
        (
            "somebody's finalizer holds the CR of an ended row",
            row_(ended_row(), Present(Cr { deleting: true, ..row_cr() }), Absent, Absent),
            "",
        ),
        // It ends by the row.
        ("the deadline", row_(due(), Present(row_cr()), Present(vm()), Present(up())), "expire"),
        (
            "a shutdown was requested",
            row_(stopped_row(), Present(row_cr()), Present(vm()), Present(up())),
            "say Stopping(requested), delete vm",
        ),
        (
            "the VM takes its time",
            row_(stopped_row(), Present(with_end(row_cr(), Reason::Requested)), Present(deleting(vm())), Present(up())),
            "say Stopping(requested)",
        ),
        ("the VM left its VMI behind", row_(stopped_row(), Absent, Absent, Present(up())), "delete vmi"),
        ("the VMI takes its time", row_(stopped_row(), Absent, Absent, Present(gone(up()))), ""),
        ("it seems to be over", row_(stopped_row(), Absent, Absent, Absent), "look live"),
        (
            "it is over",
            row_(stopped_row(), Absent, Absent, Absent).live(),
            "delete Secret, report over terminated(requested)",
        ),
        (
            "the app wrote error",
            row_(Row { status: RowStatus::Error, ..stopped_row() }, Absent, Absent, Absent).live(),
            "delete Secret, report over error(requested)",
        ),
        (
            "the database has the last word on why",
            row_(stopped_row(), Present(with_end(row_cr(), Reason::GuestCrashed)), Absent, Absent).live(),
            "delete Secret, report over terminated(requested)",
        ),
        (
            "a stranger's VM of our name stays",
            row_(stopped_row(), Absent, Present(foreign()), Present(Vmi { owner: None, ..up() })).live(),
            "delete Secret, report over terminated(requested)",
        ),
        // It is over.
        ("the CR is released", row_(ended_row(), Present(row_cr()), Absent, Absent), "delete CR"),
        ("nothing is left", row_(ended_row(), Absent, Absent, Absent), "forget"),
        ("a create landed late", row_(ended_row(), Absent, Present(vm()), Absent), "delete Secret, delete vm"),
        ("a stranger's VM of its name", row_(ended_row(), Absent, Present(foreign()), Absent), "forget"),
    ];
    for (case, situation, wanted) in cases {
        assert_eq!(situation.told(), wanted, "{case}");
    }
}

#[test]
fn a_desktop_by_hand_that_has_said_its_last_word_is_left_as_it_is() {
    let due = Cr { created: at(-600), ..hand_cr() };
    let over = Situation::by_hand(Present(due.clone()), Absent, Absent).live();
    let status = over.plan().actions.into_iter().find_map(|action| match action {
        Action::WriteCrStatus { status, .. } => Some(*status),
        _ => None,
    });
    let cr = Cr { status: status.expect("it says that it is over"), ..due };
    let told = Situation::by_hand(Present(cr), Absent, Absent);
    assert_eq!(told.told(), "");
    assert_eq!(told.live().told(), "", "diff, which looks live, finds nothing to do");
}

#[test]
fn each_situation_of_a_cr_by_hand_has_its_next_steps() {
    let hand = Situation::by_hand;
    let vm = || Vm { owner: Some(Owner::Hand("cr".into())), ..vm() };
    let up = || Vmi { owner: Some(Owner::Hand("cr".into())), ..up() };
    let due = || Cr { created: at(-600), ..hand_cr() };
    let unreadable = || Cr { spec: Err("spec: invalid type".into()), ..hand_cr() };
    let recorded = || {
        let mut cr = hand_cr();
        cr.status.virtual_machine_ref = Some(VirtualMachineRef { name: "cyberdesk-desk".into(), uid: "vm".into() });
        cr
    };
    let held = || Cr { deleting: true, ..hand_cr() };
    let unknown = || Cr { status_readable: false, ..hand_cr() };
    let of_the_last_one = || Vm { owner: Some(Owner::Hand("older".into())), ..vm() };
    let cases = [
        ("a new CR", hand(Present(hand_cr()), Absent, Absent), "create VM"),
        ("its guest is ready", hand(Present(hand_cr()), Present(vm()), Present(up())), "say Running"),
        ("its deadline", hand(Present(due()), Present(vm()), Present(up())), "say Stopping(timeout), delete vm"),
        ("it seems to be over", hand(Present(due()), Absent, Absent), "say Stopping(timeout), look live"),
        ("it is over", hand(Present(due()), Absent, Absent).live(), "delete Secret, say Terminated(timeout)"),
        (
            "its VM is gone",
            hand(Present(recorded()), Absent, Absent).live(),
            "delete Secret, say Terminated(vm-deleted)",
        ),
        (
            "its spec cannot be read",
            hand(Present(unreadable()), Absent, Absent).live(),
            "delete Secret, say Error(bad-spec)",
        ),
        ("it was deleted", hand(Absent, Present(vm()), Present(up())), "delete Secret, delete vm"),
        ("it was deleted, and nothing else is left", hand(Absent, Absent, Absent), "delete Secret, forget"),
        (
            "somebody's finalizer holds its CR",
            hand(Present(held()), Present(vm()), Present(up())),
            "delete Secret, delete vm",
        ),
        ("what was recorded of it cannot be read", hand(Present(unknown()), Absent, Absent), ""),
        (
            "its end while the last one's VM is there",
            hand(Present(due()), Present(of_the_last_one()), Absent),
            "say Stopping(timeout), delete vm",
        ),
        ("it was deleted, and the VM left its VMI", hand(Absent, Absent, Present(up())), "delete vmi"),
        (
            "it was deleted and applied anew",
            hand(Present(hand_cr()), Present(of_the_last_one()), Absent),
            "delete Secret, delete vm, say Pending",
        ),
        ("of a database that does not know it", hand(Present(row_cr()), Present(super::tests::vm()), Absent), ""),
        ("a VM made for a row that nobody knows", hand(Absent, Present(super::tests::vm()), Absent), ""),
        ("a stranger's VM", hand(Absent, Present(Vm { owner: None, ..vm() }), Absent), ""),
    ];
    for (case, situation, wanted) in cases {
        assert_eq!(situation.told(), wanted, "{case}");
    }
}

#[test]
fn what_has_no_row_is_left_alone_for_a_while_and_what_is_of_another_database_for_ever() {
    let orphan = |cr, vm, vmi| Situation { key: Key::of_row(id()), ..Situation::by_hand(cr, vm, vmi) };
    let of_another = || Some(Uuid::from_u128(6));
    let early = Situation { orphan_rest: Duration::from_secs(60), ..orphan(Present(row_cr()), Present(vm()), Absent) };
    let cases = [
        ("it has its grace", early.clone(), "", Some(Orphan::Ours)),
        (
            "all of it",
            orphan(Present(row_cr()), Present(vm()), Present(up())),
            "delete Secret, delete vm",
            Some(Orphan::Ours),
        ),
        (
            "its VM goes",
            orphan(Present(row_cr()), Present(Vm { deleting: true, ..vm() }), Absent),
            "",
            Some(Orphan::Ours),
        ),
        ("the VM left its VMI", orphan(Present(row_cr()), Absent, Present(up())), "delete vmi", Some(Orphan::Ours)),
        ("only its CR", orphan(Present(row_cr()), Absent, Absent), "delete Secret, delete CR", Some(Orphan::Ours)),
        ("only its VM", orphan(Absent, Present(vm()), Absent), "delete Secret, delete vm", Some(Orphan::Ours)),
        ("its VM could not be seen", orphan(Present(row_cr()), Unknown, Absent), "", Some(Orphan::Ours)),
        ("its VMI could not be seen", orphan(Present(row_cr()), Absent, Unknown), "", Some(Orphan::Ours)),
        (
            "another database's VM",
            orphan(Absent, Present(Vm { database: of_another(), ..vm() }), Absent),
            "",
            Some(Orphan::Stranger),
        ),
        (
            "of nobody knows which",
            orphan(Absent, Present(Vm { database: None, ..vm() }), Absent),
            "",
            Some(Orphan::Stranger),
        ),
        (
            "another database's VM beside our CR",
            orphan(Present(row_cr()), Present(Vm { database: of_another(), ..vm() }), Absent),
            "delete Secret, delete CR",
            Some(Orphan::Ours),
        ),
        (
            "of a row, under another's name",
            Situation::by_hand(Absent, Present(vm()), Absent),
            "",
            Some(Orphan::Stranger),
        ),
        ("nobody's VM", orphan(Absent, Present(Vm { owner: None, ..vm() }), Absent), "", None),
    ];
    for (case, situation, wanted, told) in cases {
        assert_eq!((situation.told().as_str(), situation.plan().orphan), (wanted, told), "{case}");
    }
    assert_eq!(early.plan().wait, Some(Duration::from_secs(60)));
}

#[test]
fn the_brake_stops_all_that_may_be_of_a_row_and_nothing_else() {
    for situation in every_situation() {
        let braked = Situation { braked: true, ..situation.clone() };
        if situation.key.row_id().is_some() {
            assert_eq!(braked.plan(), Plan::nothing(), "{situation:?}");
        } else {
            assert_eq!(braked.plan(), situation.plan(), "{situation:?}");
        }
    }
}

#[test]
fn a_desktop_is_looked_at_again_at_its_deadline() {
    let wait = |situation: Situation| situation.plan().wait;
    let ten_minutes = Some(Duration::from_secs(600));
    assert_eq!(wait(Situation::of_row(row(), Absent, Absent, Absent)), ten_minutes);
    let by_hand = Cr { created: at(0), ..hand_cr() };
    assert_eq!(wait(Situation::by_hand(Present(by_hand), Absent, Absent)), ten_minutes);
    let huge = Cr { spec: Ok(CyberdeskSpec { timeout_ms: Some(i64::MAX), ..Default::default() }), ..hand_cr() };
    assert!(wait(Situation::by_hand(Present(huge), Absent, Absent)) > ten_minutes);
}

/// Every situation that the parts can make up together, and many that they should not.
fn every_situation() -> Vec<Situation> {
    let rows = [
        row(),
        served_row(),
        Row { status: RowStatus::Running, ..served_row() },
        Row { vm_uid: Some("another".into()), ..served_row() },
        Row { expires_at: at(0), timeout_at: at(0), ..served_row() },
        Row { expires_at: at(0), timeout_at: at(0), ..row() },
        Row { generation: 2, expires_at: at(900), timeout_at: at(900), ..served_row() },
        Row { params: Some(serde_json::json!([])), ..row() },
        Row { exists: false, ..row() },
        stopped_row(),
        Row { vm_uid: None, ..stopped_row() },
        Row { status: RowStatus::Error, ..stopped_row() },
        Row { exists: false, ..stopped_row() },
        ended_row(),
    ];
    let with_status = |cr: Cr, change: fn(&mut CyberdeskStatus)| {
        let mut cr = cr;
        change(&mut cr.status);
        cr
    };
    let mut crs = vec![Unknown, Absent];
    for cr in [row_cr(), hand_cr(), Cr { spec: Err("odd".into()), ..hand_cr() }, Cr { created: at(-900), ..hand_cr() }]
    {
        crs.push(Present(with_end(cr.clone(), Reason::GuestCrashed)));
        crs.push(Present(with_status(cr.clone(), |status| status.start_time = Some(at(-5)))));
        crs.push(Present(with_status(cr.clone(), |status| {
            status.virtual_machine_ref = Some(VirtualMachineRef { name: "cyberdesk-x".into(), uid: "vm".into() });
        })));
        crs.push(Present(with_status(with_end(cr.clone(), Reason::Timeout), |status| {
            status.phase = Some(Phase::Terminated)
        })));
        crs.push(Present(cr));
    }
    let owners = [None, Some(Owner::Row(id())), Some(Owner::Hand("cr".into())), Some(Owner::Hand("older".into()))];
    let mut vms = vec![Unknown, Absent];
    let mut vmis = vec![Unknown, Absent];
    for owner in owners {
        for (run_strategy, restart_pending, deleting) in [
            (RunStrategy::Once, false, false),
            (RunStrategy::Once, false, true),
            (RunStrategy::Always, false, false),
            (RunStrategy::RerunOnFailure, false, false),
            (RunStrategy::RerunOnFailure, true, false),
            (RunStrategy::Other, false, false),
        ] {
            vms.push(Present(Vm { owner: owner.clone(), run_strategy, restart_pending, deleting, ..vm() }));
        }
        for (phase, ready, deleting) in [
            (VmiPhase::Pending, false, false),
            (VmiPhase::Running, true, false),
            (VmiPhase::Running, true, true),
            (VmiPhase::Succeeded, false, false),
            (VmiPhase::Succeeded, false, true),
            (VmiPhase::Failed, false, false),
            (VmiPhase::Failed, false, true),
        ] {
            let owner = owner.clone();
            vmis.push(Present(Vmi { owner, deleting, ..vmi(phase, ready) }));
        }
    }
    let mut all = vec![];
    for row in rows.into_iter().map(Present).chain([Unknown, Absent]) {
        for cr in &crs {
            for vm in &vms {
                for vmi in &vmis {
                    let key = if row == Absent { Key::new("desk") } else { Key::of_row(id()) };
                    let (row, cr, vm, vmi) = (row.clone(), cr.clone(), vm.clone(), vmi.clone());
                    let situation = Situation { key, row, ..Situation::by_hand(cr, vm, vmi) };
                    // An answer that does not come matters to those who wait for one.
                    let waits = situation.row.present().is_none_or(|row| row.timeout_at <= at(0));
                    all.extend(waits.then(|| situation.clone().away()).into_iter().chain([situation]));
                }
            }
        }
    }
    all
}

#[test]
fn no_view_leads_to_what_must_never_happen() {
    for cached in every_situation() {
        for situation in [cached.clone(), cached.live()] {
            let Plan { actions, .. } = situation.plan();
            let row = situation.row.present();
            let blind_vm = situation.vm == Unknown || situation.vmi == Unknown;
            let mut end_is_written = situation.cr.present().is_some_and(|cr| cr.status.end.is_some());
            for action in &actions {
                match action {
                    Action::WriteCrStatus { status, .. } => end_is_written |= status.end.is_some(),
                    Action::CreateVm { .. } => {
                        assert_eq!(situation.vm, Absent, "a VM is made only where none was seen: {situation:?}");
                        assert!(!blind_vm, "on what could not be seen: {situation:?}");
                        assert!(
                            row.is_none_or(|row| row.desired == Desired::Present && !row.ended && row.vm_uid.is_none()),
                            "a row that is stopped, over or was served gets no VM: {situation:?}"
                        );
                    }
                    Action::DeleteVm { .. } => {
                        let vm = situation.vm.present().expect("only a VM that was seen is deleted");
                        assert!(vm.owner.is_some(), "a stranger's VM is never touched: {situation:?}");
                        assert!(situation.row != Unknown || end_is_written, "for no reason: {situation:?}");
                        if let Some(row) = row {
                            assert_eq!(vm.owner, Some(Owner::Row(row.id)), "{situation:?}");
                            assert!(
                                end_is_written || row.desired == Desired::Absent,
                                "an end of the cluster's stands in the CR before the VM goes: {situation:?}"
                            );
                        }
                    }
                    Action::DeleteVmi { .. } => {
                        assert!(situation.vmi.present().is_some_and(|vmi| vmi.owner.is_some()), "{situation:?}");
                    }
                    Action::Report(report) => {
                        let row = row.expect("only rows are reported of");
                        if report.ended {
                            assert!(situation.live && !blind_vm, "over only after a live look: {situation:?}");
                            let ours = |owner: &Option<Owner>| *owner == Some(Owner::Row(row.id));
                            assert!(situation.vm.present().is_none_or(|vm| !ours(&vm.owner)), "{situation:?}");
                            assert!(
                                situation
                                    .vmi
                                    .present()
                                    .is_none_or(|vmi| !ours(&vmi.owner) || situation.vm.present().is_some()),
                                "{situation:?}"
                            );
                        } else {
                            assert_eq!(
                                row.desired,
                                Desired::Present,
                                "no news of the living from a stopped row: {situation:?}"
                            );
                        }
                        assert!(
                            !matches!(report.status, Some(RowStatus::Pending | RowStatus::Completed)),
                            "{situation:?}"
                        );
                    }
                    Action::DeleteCr { .. } => {
                        assert!(row.is_some_and(|row| row.ended), "{situation:?}")
                    }
                    Action::CreateCr { .. } | Action::ApplyCr { .. } => {
                        assert!(row.is_some_and(|row| row.desired == Desired::Present), "{situation:?}");
                    }
                    _ => (),
                }
            }
            let away = situation.silence != Silence::default();
            let begins = |action: &Action| {
                matches!(action, Action::CreateCr { .. } | Action::ApplyCr { .. } | Action::CreateVm { .. })
            };
            assert!(
                situation.row != Unknown || (away || actions.is_empty()) && !actions.iter().any(begins),
                "nothing is done over the database's head, and nothing made while it is away: {situation:?}"
            );
        }
    }
}

/// Does to the situation what the action does to the world, as far as anyone sees it.
fn obey(situation: &mut Situation, action: Action) {
    situation.live = false;
    let row = match &mut situation.row {
        Present(row) => Some(row),
        Unknown | Absent => None,
    };
    match action {
        Action::CreateCr { spec, .. } => situation.cr = Present(Cr { spec: Ok(spec), ..row_cr() }),
        Action::ApplyCr { spec, .. } => {
            if let Present(cr) = &mut situation.cr {
                *cr = Cr { spec: Ok(spec), owner: Some(Owner::Row(id())), ..cr.clone() };
            }
        }
        Action::WriteCrStatus { status, .. } => {
            if let Present(cr) = &mut situation.cr {
                cr.status = *status;
            }
        }
        Action::DeleteCr { .. } => situation.cr = Absent,
        Action::CreateVm { owner, .. } => {
            situation.vm = Present(Vm { owner: Some(owner.clone()), ..vm() });
            situation.vmi = Present(Vmi { owner: Some(owner), ..up() });
        }
        Action::DeleteVm { .. } => (situation.vm, situation.vmi) = (Absent, Absent),
        Action::DeleteVmi { .. } => situation.vmi = Absent,
        Action::DeleteSecrets { .. } => (),
        Action::LookLive => situation.live = true,
        Action::Expire(_) => {
            if let Some(row) = row {
                *row = Row {
                    desired: Desired::Absent,
                    generation: row.generation + 1,
                    reason: Some("timeout".into()),
                    ..row.clone()
                };
            }
        }
        Action::Report(report) => {
            if let Some(row) = row {
                row.observed_generation = row.observed_generation.max(report.generation);
                row.vm_uid = row.vm_uid.take().or(report.vm_uid);
                row.status = report.status.unwrap_or(row.status);
                row.message = report.message.or(row.message.take()).filter(|message| !message.is_empty());
                if report.ended {
                    row.ended = true;
                    row.desired = Desired::Absent;
                }
            }
        }
        Action::Forget => situation.row = Absent,
    }
}

#[test]
fn from_everywhere_doing_as_told_leads_to_rest() {
    for start in every_situation() {
        let mut situation = start.clone();
        let terminal = start.row.present().is_some_and(|row| row.desired == Desired::Absent);
        let settled = (0..12).any(|_| {
            let Plan { actions, .. } = situation.plan();
            let rest = actions.is_empty() || actions.last() == Some(&Action::Forget);
            actions.into_iter().for_each(|action| obey(&mut situation, action));
            // What is being deleted goes in the end, and a restart that is pending comes.
            if situation.vm.present().is_some_and(|vm| vm.deleting) {
                (situation.vm, situation.vmi) = (Absent, Absent);
                return false;
            }
            if situation.vmi.present().is_some_and(|vmi| vmi.deleting) {
                situation.vmi = Absent;
                return false;
            }
            rest
        });
        assert!(settled, "in circles from {start:?}\nat last {situation:?}");
        if terminal {
            let row = situation.row.present();
            assert!(row.is_none_or(|row| row.desired == Desired::Absent), "a terminal row came back from {start:?}");
        }
    }
}
