//! Whether two sequences of events tell the same story, races aside.
//!
//! KubeVirt's VM controller, its VMI controller, its snapshot controller and the node write without waiting for one
//! another, so two runs of the real thing differ too. What may differ, and why, is said here and nowhere else; all
//! else must be equal, event by event, for the VM and for the VMI (how the two interleave is not compared).
//!
//! First both sequences are **made alike** ([`normalise`]):
//!
//! - events that repeat the one before are one event;
//! - the `Ready` reason of a VMI that has ended, and of its VM, is `gone`: which of `GuestNotRunning`,
//!   `PodTerminating` and `PodNotExists` is seen depends on when the pod ends and on when each controller looks;
//! - which finalizer a deleted VMI had last, and whether it was called ready to the end, is not compared: its two
//!   controllers let go independently, sometimes before one has looked;
//! - nor is whether `Synchronized` still says at a guest's end why it never ran: its pod's end takes that away, and
//!   the VMI may be gone before anybody has looked;
//! - whether an orphaning VM still sees its VMI is not compared: the garbage collector takes that away and lets go;
//! - how far a VM had come when it was deleted while it started is not compared: the user was a race, too;
//! - before its first condition, a VM's printableStatus is not compared: the CRD's default `Stopped` appears with the
//!   first status write, and whose that is, is a race.
//!
//! Then they are **aligned** ([`differences`]): events in one sequence only are let pass if they are [`passing`], each
//! with its reason. An event that is not is a difference.
//!
//! The end of a VMI is a race of three writers (deletion mark, two finalizers, readiness), so its events are passing;
//! instead the sequence itself must keep [`order at the end`](broken_order): finalizers go one at a time, `Ready` only
//! falls.

use crate::event::{Event, Kind};

/// The reasons why a guest that is over is not ready, in the order in which they can be seen.
const GONE: [&str; 3] = ["F(GuestNotRunning)", "F(PodTerminating)", "F(PodNotExists)"];

/// Compares two runs of one life, each with a word for where it comes from.
pub(crate) fn alike(one: (&str, &[Event]), other: (&str, &[Event])) -> Result<(), String> {
    let mut complaints = Vec::new();
    for kind in [Kind::Vm, Kind::Vmi] {
        let of_kind = |events: &[Event]| events.iter().filter(|event| event.kind == kind).cloned().collect::<Vec<_>>();
        let (first, second) = (of_kind(one.1), of_kind(other.1));
        for (whose, events) in [(one.0, &first), (other.0, &second)] {
            complaints.extend(broken_order(events).map(|broken| format!("{whose}: {broken}")));
        }
        if let Err(diff) = differences(&normalise(&first), &normalise(&second)) {
            complaints.push(format!("{} (-) and {} (+) differ:\n{diff}", one.0, other.0));
        }
    }
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n\n")) }
}

/// Makes one object's events comparable.
fn normalise(events: &[Event]) -> Vec<Event> {
    let mut alike: Vec<Event> = events.iter().map(without_races).collect();
    if let Some(deleted) = alike.iter().position(|event| event.kind == Kind::Vm && event.deleting) {
        let start = alike[..=deleted].iter_mut().rev();
        for event in start.take_while(|event| event.state == "Starting" && event.marked("created")) {
            set_ready(event, "starting");
        }
    }
    alike.dedup();
    alike
}

fn without_races(event: &Event) -> Event {
    let mut event = event.clone();
    let over = event.is_final() || ["Terminating", "Stopped", "CrashLoopBackOff"].contains(&event.state.as_str());
    if over && event.condition("Ready").is_some_and(|ready| GONE.contains(&ready)) {
        set_ready(&mut event, "gone");
    }
    let goes = match event.kind {
        Kind::Vm => event.deleting && event.state == "Terminating" && event.condition("Ready") == Some("gone"),
        Kind::Vmi => event.is_final() || event.sign == '-',
    };
    if goes {
        event.conditions.retain(|(name, _)| name != "Synchronized");
    }
    match event.kind {
        Kind::Vm if event.conditions.is_empty() => event.state.clear(),
        Kind::Vm if event.finalizers == ["orphan"] && event.state == "Terminating" => {
            event.marks.retain(|mark| mark != "created" && mark != "ready");
            set_ready(&mut event, "orphaned");
        }
        Kind::Vmi if event.sign == '-' => {
            event.finalizers.clear();
            set_ready(&mut event, "gone");
        }
        _ => {}
    }
    event
}

fn set_ready(event: &mut Event, value: &str) {
    for (_, ready) in event.conditions.iter_mut().filter(|(name, _)| name == "Ready") {
        *ready = value.to_owned();
    }
}

/// Why the event at this place may be missing from the other run, if it may.
fn passing(events: &[Event], at: usize) -> Option<&'static str> {
    let (event, before) = (&events[at], at.checked_sub(1).map(|before| &events[before]));
    let next = events.get(at + 1);
    let more = next.is_some();
    if event.sign != '~' {
        return None;
    }
    if event.is_final() && (before.is_some_and(Event::is_final) || next.is_some_and(Event::is_final)) {
        return Some("three writers tidy up after a guest, in any order");
    }
    let going = event.condition("Ready") == Some("F(PodTerminating)");
    if event.kind == Kind::Vmi {
        return (going && next.is_some_and(Event::is_final))
            .then_some("a guest may be over before its pod is seen to go");
    }
    if more && event.state == "Terminating" && event.condition("Ready") == Some("gone") {
        return Some("a VM that goes samples how its VMI ends");
    }
    if going && event.state == "Running" && next.is_some_and(|next| next.state != "Running") {
        return Some("a VM samples how its guest goes");
    }
    if event.conditions.is_empty() && more {
        return Some("version note, first status and finalizer are written in any order");
    }
    let waits = ["Stopped", "Starting", "CrashLoopBackOff"].contains(&event.state.as_str());
    if more
        && waits
        && event.condition("Ready").is_some_and(|ready| ready == "gone" || ready == "F(VMINotExists)")
        && !event.marked("created")
    {
        return Some("whether a VM writes its status between two VMIs is a matter of milliseconds");
    }
    if more && event.state == "Stopped" && event.marked("ready") {
        return Some("a VM that has stopped is called ready until the VMI controller has looked");
    }
    if more && event.state == "Stopped" && event.marked("created") && event.condition("Ready") == Some("gone") {
        return Some("a VM samples its VMI's last moments: they may be over before it looks");
    }
    if more && event.state == "Stopping" && !event.marked("ready") {
        return Some("a VM samples how its guest shuts down");
    }
    if event.marked("rs=Halted") && event.state == "Running" && next.is_some_and(|next| next.state == "Stopping") {
        return Some("a VM that has deleted its VMI may write its status before it sees that");
    }
    if next.is_some_and(|next| only_readiness_differs(event, next)) {
        return Some("a VM samples its VMI's readiness: it may miss a value, never the last");
    }
    None
}

fn only_readiness_differs(one: &Event, other: &Event) -> bool {
    let rest = |event: &Event| {
        let mut event = event.clone();
        event.marks.retain(|mark| mark != "ready");
        event.conditions.retain(|(name, _)| name != "Ready");
        event.sign = '~';
        event
    };
    rest(one) == rest(other)
}

/// The lines of a diff: `  ` in both, `- ` only recorded, `+ ` only seen, each difference marked with `!`, each let-pass
/// with its reason. `Err` if there is a difference.
fn differences(recorded: &[Event], seen: &[Event]) -> Result<(), String> {
    let (rows, columns) = (recorded.len(), seen.len());
    let cost = |events: &[Event], at: usize| {
        if passing(events, at).is_some() { 1 } else { 1000 }
    };
    // The cheapest way to align the tails from (row, column) on.
    let mut best = vec![vec![0u32; columns + 1]; rows + 1];
    for row in (0..=rows).rev() {
        for column in (0..=columns).rev() {
            let mut ways = Vec::new();
            if row < rows {
                ways.push(best[row + 1][column] + cost(recorded, row));
            }
            if column < columns {
                ways.push(best[row][column + 1] + cost(seen, column));
            }
            if row < rows && column < columns && recorded[row] == seen[column] {
                ways.push(best[row + 1][column + 1]);
            }
            best[row][column] = ways.into_iter().min().unwrap_or(0);
        }
    }
    let (mut row, mut column, mut lines) = (0, 0, Vec::new());
    let explain =
        |events: &[Event], at: usize| passing(events, at).map_or("   <-- !".to_owned(), |why| format!("   ({why})"));
    while row < rows || column < columns {
        if row < rows
            && column < columns
            && recorded[row] == seen[column]
            && best[row][column] == best[row + 1][column + 1]
        {
            lines.push(format!("    {}", seen[column]));
            (row, column) = (row + 1, column + 1);
        } else if row < rows && best[row][column] == best[row + 1][column] + cost(recorded, row) {
            lines.push(format!("  - {}{}", recorded[row], explain(recorded, row)));
            row += 1;
        } else {
            lines.push(format!("  + {}{}", seen[column], explain(seen, column)));
            column += 1;
        }
    }
    if best[0][0] >= 1000 { Err(lines.join("\n")) } else { Ok(()) }
}

/// What the end of a VMI must keep, whoever is quicker.
fn broken_order(events: &[Event]) -> Option<String> {
    let rank = |event: &Event| match event.condition("Ready") {
        Some("T") => 0,
        Some(reason) => 1 + GONE.iter().position(|known| *known == reason).unwrap_or(0),
        None => 0,
    };
    for pair in events.windows(2) {
        let [before, after] = pair else { continue };
        if !before.is_final() || after.sign == '+' {
            continue;
        }
        let held = |event: &Event| event.finalizers.len();
        // A deletion shows the object as it was before its last finalizer went: with that one.
        let together = if after.sign == '-' { held(after) > 1 } else { held(before) > held(after) + 1 };
        let wrong = if together {
            "finalizers go one at a time"
        } else if rank(after) < rank(before) {
            "readiness only falls"
        } else if before.deleting && !after.deleting {
            "a deletion is not taken back"
        } else if before.state != after.state {
            "an end is for ever"
        } else {
            continue;
        };
        return Some(format!("{wrong}: {before} | {after}"));
    }
    None
}
