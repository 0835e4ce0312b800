//! What is known of the six desktops, and what each piece of news changes. Pure: instants come with the news.

use std::time::Duration;

use tokio::time::Instant;

use super::fate::{Expected, Fate};

/// One side of a desktop: its row, its CR or its VM.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Side<T> {
    /// Not seen yet.
    #[default]
    Never,
    /// As last seen.
    There(T),
    /// It was there, and was removed.
    Gone,
}

impl<T> Side<T> {
    /// What is there now.
    pub(crate) fn there(&self) -> Option<&T> {
        match self {
            Self::There(seen) => Some(seen),
            Self::Never | Self::Gone => None,
        }
    }
}

/// A row of the app's table, or the tombstone of one.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Row {
    /// `None`: the app's row is deleted.
    pub(crate) status: Option<String>,
    pub(crate) reason: Option<String>,
    pub(crate) message: Option<String>,
    /// `shutdown_requested_at` is filled.
    pub(crate) ending: bool,
    /// `ended_at` is filled.
    pub(crate) over: bool,
}

/// A `Cyberdesk`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Cr {
    pub(crate) phase: Option<String>,
    pub(crate) reason: Option<String>,
    pub(crate) message: Option<String>,
    pub(crate) ip: Option<String>,
    /// Its condition `Ended` is true.
    pub(crate) over: bool,
}

/// A `VirtualMachine`: the status that kubectl prints.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Vm {
    pub(crate) status: Option<String>,
}

/// Something that happened, and was seen by one who watches.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum News {
    /// The desktop was asked for: its row is committed, or its YAML applied.
    Made { fate: Fate, key: String },
    /// Something is done to it that is no end.
    Done { fate: Fate, what: &'static str },
    /// It was told to end.
    Told(Fate),
    /// Its row is so.
    Row { key: String, row: Row },
    /// Its CR is so; `None`: removed.
    Cr { key: String, cr: Option<Cr> },
    /// Its VM is so; `None`: removed.
    Vm { key: String, vm: Option<Vm> },
}

/// When what happened first to a desktop.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Marks {
    /// The app's insert had returned.
    pub(crate) committed: Option<Instant>,
    /// The VM was there.
    pub(crate) made: Option<Instant>,
    /// The row, or the CR of one without a row, said that it runs.
    pub(crate) running: Option<Instant>,
    /// What ends it had happened.
    pub(crate) told: Option<Instant>,
    /// Row or CR said that it is over and all of it removed.
    pub(crate) over: Option<Instant>,
}

impl Marks {
    /// From the insert's commit to the VM created.
    pub(crate) fn commit_to_vm(&self) -> Option<Duration> {
        between(self.committed, self.made)
    }

    /// From the insert's commit to running.
    pub(crate) fn commit_to_running(&self) -> Option<Duration> {
        between(self.committed, self.running)
    }

    /// From being told to end to being over.
    pub(crate) fn told_to_over(&self) -> Option<Duration> {
        between(self.told, self.over)
    }
}

fn between(from: Option<Instant>, to: Option<Instant>) -> Option<Duration> {
    Some(to?.saturating_duration_since(from?))
}

/// One desktop.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Desktop {
    pub(crate) fate: Fate,
    pub(crate) key: Option<String>,
    pub(crate) row: Side<Row>,
    pub(crate) cr: Side<Cr>,
    pub(crate) vm: Side<Vm>,
    pub(crate) marks: Marks,
}

impl Desktop {
    /// Whether nothing more is to come: it is over, and the cluster shows no more of it than it should.
    pub(crate) fn is_over(&self) -> bool {
        let cr_is_right = match self.fate.expected() {
            Expected::Cr { .. } => self.cr.there().is_some_and(|cr| cr.over),
            Expected::Row { .. } | Expected::NoRow { .. } => self.cr == Side::Gone,
        };
        self.marks.over.is_some() && cr_is_right && self.vm == Side::Gone
    }
}

/// One line of the story.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Line {
    pub(crate) at: Duration,
    pub(crate) fate: Fate,
    pub(crate) about: About,
    pub(crate) text: String,
}

/// What a line tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum About {
    /// It is asked for.
    Birth,
    /// Somebody outside did something to it.
    Deed,
    Row,
    Cr,
    Vm,
}

/// All desktops, and the story so far.
#[derive(Clone, Debug)]
pub(crate) struct Board {
    began: Instant,
    pub(crate) desktops: Vec<Desktop>,
    pub(crate) lines: Vec<Line>,
    /// News of keys that nobody has claimed yet: an insert's answer may be later than what it leads to.
    unclaimed: Vec<(Instant, News)>,
}

impl Board {
    pub(crate) fn new(began: Instant) -> Self {
        let desktop = |fate| Desktop {
            fate,
            key: None,
            row: Side::Never,
            cr: Side::Never,
            vm: Side::Never,
            marks: Marks::default(),
        };
        Self { began, desktops: Fate::ALL.map(desktop).to_vec(), lines: vec![], unclaimed: vec![] }
    }

    /// Time since the story began.
    pub(crate) fn since_began(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.began)
    }

    pub(crate) fn all_over(&self) -> bool {
        self.desktops.iter().all(Desktop::is_over)
    }

    pub(crate) fn desktop(&self, fate: Fate) -> &Desktop {
        let found = self.desktops.iter().find(|desktop| desktop.fate == fate);
        found.expect("every fate has its desktop")
    }

    /// Takes in what happened at this instant.
    pub(crate) fn take(&mut self, at: Instant, news: News) {
        // News that waited to be claimed is older than the line that claims it; the story is told in order.
        let last = self.lines.last().map_or(Duration::ZERO, |line| line.at);
        let since = self.since_began(at).max(last);
        let found = match &news {
            News::Made { fate, .. } | News::Done { fate, .. } | News::Told(fate) => {
                let fate = *fate;
                self.desktops.iter_mut().find(|desktop| desktop.fate == fate)
            }
            News::Row { key, .. } | News::Cr { key, .. } | News::Vm { key, .. } => {
                self.desktops.iter_mut().find(|desktop| desktop.key.as_ref() == Some(key))
            }
        };
        let Some(desktop) = found else {
            self.unclaimed.push((at, news));
            return;
        };
        let claimed = matches!(news, News::Made { .. });
        let told = desktop.take(at, news);
        let fate = desktop.fate;
        self.lines.extend(told.into_iter().map(|(about, text)| Line { at: since, fate, about, text }));
        if claimed {
            for (at, news) in std::mem::take(&mut self.unclaimed) {
                self.take(at, news);
            }
        }
    }
}

impl Desktop {
    fn take(&mut self, at: Instant, news: News) -> Option<(About, String)> {
        let marks = &mut self.marks;
        match news {
            News::Made { key, .. } => {
                self.key = Some(key);
                marks.committed = Some(at);
                let how = match self.fate.expected() {
                    Expected::Cr { .. } => "is applied as YAML",
                    Expected::Row { .. } | Expected::NoRow { .. } => "the app inserts its row",
                };
                Some((About::Birth, how.to_owned()))
            }
            News::Done { what, .. } => Some((About::Deed, what.to_owned())),
            News::Told(fate) => {
                marks.told = Some(at);
                Some((About::Deed, fate.told().to_owned()))
            }
            News::Row { row, .. } => {
                let mut text = row_text(&row);
                if row.status.as_deref() == Some("running") && marks.running.is_none() {
                    marks.running = Some(at);
                    text += &after(marks.commit_to_running(), "after the commit");
                }
                if row.over && marks.over.is_none() {
                    marks.over = Some(at);
                    text += &after(marks.told_to_over(), "after it was told to end: over");
                }
                let shown = |row: &Row| (row_text(row), row.over);
                let news = self.row.there().map(shown) != Some(shown(&row));
                self.row = Side::There(row);
                news.then_some((About::Row, text))
            }
            News::Cr { cr: None, .. } => {
                self.cr = Side::Gone;
                Some((About::Cr, "gone".to_owned()))
            }
            News::Cr { cr: Some(cr), .. } => {
                let mut text = cr_text(&cr);
                if matches!(self.fate.expected(), Expected::Cr { .. }) {
                    if cr.phase.as_deref() == Some("Running") && marks.running.is_none() {
                        marks.running = Some(at);
                        text += &after(marks.commit_to_running(), "after it was applied");
                    }
                    if cr.over && marks.over.is_none() {
                        marks.over = Some(at);
                        text += &after(marks.told_to_over(), "after it was told to end: over");
                    }
                }
                let news = self.cr.there().map(cr_text) != Some(cr_text(&cr));
                self.cr = Side::There(cr);
                news.then_some((About::Cr, text))
            }
            News::Vm { vm: None, .. } => {
                self.vm = Side::Gone;
                Some((About::Vm, "gone".to_owned()))
            }
            News::Vm { vm: Some(vm), .. } => {
                let mut text = vm_text(&vm).to_owned();
                if marks.made.is_none() {
                    marks.made = Some(at);
                    text += &after(marks.commit_to_vm(), "after the commit");
                }
                let news = self.vm.there().map(vm_text) != Some(vm_text(&vm));
                self.vm = Side::There(vm);
                news.then_some((About::Vm, text))
            }
        }
    }
}

fn after(time: Option<Duration>, what: &str) -> String {
    time.map_or_else(String::new, |time| format!(", {} {what}", duration(time)))
}

/// What the row says, in its own words.
pub(crate) fn row_text(row: &Row) -> String {
    match (&row.status, &row.reason) {
        (None, _) => "deleted".to_owned(),
        (Some(status), None) => status.clone(),
        (Some(status), Some(reason)) => format!("{status} · {reason}"),
    }
}

fn cr_text(cr: &Cr) -> String {
    let phase = cr.phase.as_deref().unwrap_or("made");
    match &cr.ip {
        Some(ip) if phase == "Running" => format!("{phase} at {ip}"),
        _ => phase.to_owned(),
    }
}

fn vm_text(vm: &Vm) -> &str {
    vm.status.as_deref().unwrap_or("made")
}

/// A time in at most six characters, up to a quarter of an hour.
pub(crate) fn duration(time: Duration) -> String {
    match time.as_millis() {
        ms @ ..1000 => format!("{ms} ms"),
        ms @ ..10_000 => format!("{}.{:02} s", ms / 1000, ms % 1000 / 10),
        ms => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(status: &str, over: bool) -> News {
        News::Row {
            key: "k".to_owned(),
            row: Row { status: Some(status.to_owned()), ending: over, over, ..Row::default() },
        }
    }

    #[test]
    fn a_life_is_told_once_each_with_its_times() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let mut board = Board::new(began);
        let vm = |vm| News::Vm { key: "k".to_owned(), vm };
        let cr = |cr| News::Cr { key: "k".to_owned(), cr };
        // The VM was seen before the app's side came to say whose it is.
        board.take(at(40), vm(Some(Vm::default())));
        board.take(at(10), News::Made { fate: Fate::Crash, key: "k".to_owned() });
        board.take(at(50), row("pending", false));
        board.take(at(55), row("pending", false));
        board.take(at(1010), row("running", false));
        board.take(at(2000), News::Told(Fate::Crash));
        board.take(at(2500), row("error", true));
        board.take(at(2510), cr(Some(Cr::default())));
        board.take(at(2520), cr(None));
        assert!(!board.desktop(Fate::Crash).is_over(), "its VM is still there");
        board.take(at(2530), vm(None));
        assert!(board.desktop(Fate::Crash).is_over());
        let told: Vec<&str> = board.lines.iter().map(|line| line.text.as_str()).collect();
        assert_eq!(
            told,
            [
                "the app inserts its row",
                "made, 30 ms after the commit",
                "pending",
                "running, 1.00 s after the commit",
                "its guest crashes",
                "error, 500 ms after it was told to end: over",
                "made",
                "gone",
                "gone",
            ]
        );
        assert!(!board.all_over(), "five others never lived");
    }

    #[test]
    fn durations_are_short() {
        let text = |ms| duration(Duration::from_millis(ms));
        assert_eq!(
            [text(7), text(999), text(1234), text(10_049), text(600_000)],
            ["7 ms", "999 ms", "1.23 s", "10.0 s", "600.0 s"]
        );
    }
}
