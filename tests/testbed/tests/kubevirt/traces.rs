//! The simulator is held to traces of the real KubeVirt: the same actions must lead to the same watch events.
//!
//! Each scenario does on the simulator what was done on the real virt-api and virt-controller when `recorded.txt` was
//! recorded, and compares the whole sequences of events, not only the ends (`compare.rs` says what races may change).

use anyhow::{Result, bail};
use kube::Client;
use libtest_mimic::Failed;
use tokio::runtime::Runtime;

use crate::compare;
use crate::event::{Event, Kind};
use crate::lives::{self, Life};

const RECORDED: &str = include_str!("recorded.txt");

/// Plays a scenario and compares.
pub(crate) fn hold(runtime: &Runtime, client: Client, life: &Life) -> Result<(), Failed> {
    let seen = runtime.block_on(lives::told(client, life)).map_err(|error| format!("{error:#}"))?;
    let recorded = recorded(life.code())?;
    compare::alike(("recorded", &recorded), ("seen", &seen)).map_err(Failed::from)
}

fn recorded(code: &str) -> Result<Vec<Event>> {
    let heading = format!("== {code} ");
    let mut lines = RECORDED.lines().skip_while(|line| !line.starts_with(&heading)).skip(1);
    let events: Vec<Event> = lines.by_ref().take_while(|line| !line.is_empty()).map(parse).collect();
    if events.is_empty() {
        bail!("recorded.txt has no {code}");
    }
    Ok(events)
}

/// Reads a line of `recorded.txt`.
fn parse(line: &str) -> Event {
    let mut words = line.split_whitespace();
    let kind = if words.next() == Some("vm") { Kind::Vm } else { Kind::Vmi };
    let sign = words.next().and_then(|word| word.chars().next()).expect("a line has an event");
    let mut event = Event {
        kind,
        sign,
        deleting: false,
        finalizers: Vec::new(),
        state: String::new(),
        marks: Vec::new(),
        conditions: Vec::new(),
    };
    for word in words {
        match word.split_once('=') {
            Some(("rs" | "asked" | "failures", _)) => event.marks.push(word.to_owned()),
            Some((name, value)) => event.conditions.push((name.to_owned(), value.to_owned())),
            None if word == "deleting" => event.deleting = true,
            None if ["created", "ready"].contains(&word) => event.marks.push(word.to_owned()),
            None if word.split(',').all(|part| ["VMC", "FG", "orphan"].contains(&part)) => {
                event.finalizers = word.split(',').map(str::to_owned).collect();
            }
            None => event.state = word.to_owned(),
        }
    }
    event
}
