//! Lays the board out in the width there is: pure, and so are its colours.

use std::time::Duration;

use super::board::{About, Board, Desktop, Line, Row, Side, duration, row_text};
use super::fate::Expected;

/// What a piece of text feels like; the screen knows colours for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Title,
    Quiet,
    Waiting,
    Good,
    Ending,
    Bad,
}

/// Text of one tone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) text: String,
    pub(crate) tone: Tone,
}

fn span(tone: Tone, text: impl Into<String>) -> Span {
    Span { text: text.into(), tone }
}

/// One line on the screen.
pub(crate) type Spans = Vec<Span>;

/// A column: its title and how wide it is. All text here is one cell a character.
struct Column {
    title: &'static str,
    width: usize,
    right: bool,
    cell: fn(&Desktop) -> Span,
}

const fn left(title: &'static str, width: usize, cell: fn(&Desktop) -> Span) -> Column {
    Column { title, width, right: false, cell }
}

const fn time(title: &'static str, cell: fn(&Desktop) -> Span) -> Column {
    Column { title, width: 6, right: true, cell }
}

/// What every screen shows. With one space in between it fits into 79 characters.
const ALWAYS: [Column; 7] = [
    left("DESKTOP", 9, |desktop| span(Tone::Title, desktop.fate.nickname())),
    left("ROW", 24, row_cell),
    left("CYBERDESK", 10, cr_cell),
    left("VM", 12, vm_cell),
    time("MADE", |desktop| measured(desktop.marks.commit_to_vm())),
    time("RUNS", |desktop| measured(desktop.marks.commit_to_running())),
    time("OVER", |desktop| measured(desktop.marks.told_to_over())),
];

const MESSAGE: Column = left("MESSAGE", 44, message_cell);
const MESSAGE_LEAST: usize = 20;
const ADDRESS: Column = left("ADDRESS", 14, address_cell);

/// What the times in the table are.
const LEGEND: [&str; 2] = [
    "● lives  ◐ is ending  ✓ is over: nothing of it is left in the cluster",
    "MADE, RUNS: since the commit of its row   OVER: since it was told to end",
];

/// Lines that are always there: title, a gap, the table with its head, a gap, a gap and the legend.
const FRAME: usize = 1 + 1 + 1 + 6 + 1 + 1 + LEGEND.len();

/// Lines for what is done to the desktops: their making, one use and six ends.
const DEEDS: usize = 8;

/// The whole picture, no line longer than the width and no more lines than the height.
pub(crate) fn picture(board: &Board, now: Duration, width: usize, height: usize) -> Vec<Spans> {
    let columns = columns(width);
    let gap = if total(&columns, 2) <= width { 2 } else { 1 };
    let title = "cyberdesk-operator: six desktops, from insert to end";
    let clock = duration(now);
    let room = width.saturating_sub(title.chars().count());
    let mut lines = vec![
        vec![span(Tone::Title, title), span(Tone::Quiet, format!("{clock:>room$}"))],
        vec![],
        row_of(&columns, gap, |column| span(Tone::Quiet, column.title)),
    ];
    for desktop in &board.desktops {
        lines.push(row_of(&columns, gap, |column| (column.cell)(desktop)));
    }
    lines.push(vec![]);
    let deeds = board.lines.iter().filter(|line| line.about == About::Deed);
    let mut deeds: Vec<Spans> = std::iter::once(births(board)).chain(deeds.map(deed)).collect();
    let room = height.saturating_sub(FRAME).min(DEEDS);
    deeds.drain(..deeds.len().saturating_sub(room));
    // Always the same height, so that nothing jumps.
    deeds.resize(room, vec![]);
    lines.extend(deeds);
    lines.push(vec![]);
    lines.extend(LEGEND.map(|text| vec![span(Tone::Quiet, text)]));
    lines.truncate(height);
    lines.into_iter().map(|line| cut(line, width)).collect()
}

/// The columns that fit, the most telling ones first.
fn columns(width: usize) -> Vec<Column> {
    let mut columns = Vec::from(ALWAYS);
    let with = |columns: &[Column], more: usize| total(columns, 2) + 2 + more;
    if with(&columns, ADDRESS.width) <= width && width >= 140 {
        columns.insert(4, ADDRESS);
    }
    if with(&columns, MESSAGE_LEAST) <= width {
        let room = width - total(&columns, 2) - 2;
        columns.push(Column { width: MESSAGE.width.min(room), ..MESSAGE });
    }
    columns
}

fn total(columns: &[Column], gap: usize) -> usize {
    let widths: usize = columns.iter().map(|column| column.width).sum();
    widths + gap * columns.len().saturating_sub(1)
}

fn row_of(columns: &[Column], gap: usize, cell: impl Fn(&Column) -> Span) -> Spans {
    let mut line = vec![];
    for (index, column) in columns.iter().enumerate() {
        let Span { text, tone } = cell(column);
        let text = shorten(&text, column.width);
        let width = column.width;
        let text = if column.right { format!("{text:>width$}") } else { format!("{text:<width$}") };
        if index > 0 {
            line.push(span(Tone::Plain, " ".repeat(gap)));
        }
        line.push(span(tone, text));
    }
    line
}

/// The births on one line: the app's and the person's first deeds.
fn births(board: &Board) -> Spans {
    let of = |line: &&Line| line.about == About::Birth;
    let Some(last) = board.lines.iter().rfind(of) else {
        return vec![];
    };
    let births = board.lines.iter().filter(of);
    let (crs, rows): (Vec<&Line>, Vec<&Line>) =
        births.partition(|line| matches!(line.fate.expected(), Expected::Cr { .. }));
    let (rows, crs) = (rows.len(), crs.len());
    vec![
        span(Tone::Quiet, format!("{:>7}  ", duration(last.at))),
        span(Tone::Plain, format!("{rows} rows inserted by the app, {crs} Cyberdesk applied with kubectl")),
    ]
}

fn deed(line: &Line) -> Spans {
    vec![
        span(Tone::Quiet, format!("{:>7}  ", duration(line.at))),
        span(Tone::Title, format!("{:<9}  ", line.fate.nickname())),
        span(Tone::Plain, line.text.clone()),
    ]
}

/// A line for a pipe: time, desktop, side and what changed.
pub(crate) fn plain(line: &Line) -> String {
    let side = match line.about {
        About::Birth | About::Deed => "->",
        About::Row => "row",
        About::Cr => "CR",
        About::Vm => "VM",
    };
    let at = line.at.as_secs_f64();
    let nickname = line.fate.nickname();
    format!("{at:>7.3} s  {nickname:<9}  {side:<3}  {}", line.text)
}

fn row_cell(desktop: &Desktop) -> Span {
    match &desktop.row {
        Side::Never if desktop.key.is_some() && desktop.cr != Side::Never => {
            span(Tone::Quiet, "  none, applied as YAML")
        }
        Side::Never | Side::Gone => span(Tone::Quiet, "–"),
        Side::There(row) => {
            let (mark, tone) = row_mark(row);
            span(tone, format!("{mark} {}", row_text(row)))
        }
    }
}

fn row_mark(row: &Row) -> (char, Tone) {
    match (row.over, row.ending, row.status.as_deref()) {
        (true, _, Some("error")) => ('✓', Tone::Bad),
        (true, ..) => ('✓', Tone::Quiet),
        (false, _, Some("error")) => ('◐', Tone::Bad),
        (false, true, _) | (false, _, None | Some("terminated" | "completed")) => ('◐', Tone::Ending),
        (false, false, Some("running")) => ('●', Tone::Good),
        (false, false, Some(_)) => ('●', Tone::Waiting),
    }
}

fn cr_cell(desktop: &Desktop) -> Span {
    side_cell(&desktop.cr, |cr| cr.phase.as_deref())
}

fn vm_cell(desktop: &Desktop) -> Span {
    side_cell(&desktop.vm, |vm| vm.status.as_deref())
}

fn side_cell<T>(side: &Side<T>, words: impl Fn(&T) -> Option<&str>) -> Span {
    match side {
        Side::Never => span(Tone::Quiet, "–"),
        Side::Gone => span(Tone::Quiet, "gone"),
        Side::There(seen) => {
            let words = words(seen).unwrap_or("made");
            let tone = match words {
                "Running" => Tone::Good,
                "Stopping" | "Terminating" => Tone::Ending,
                "Terminated" | "Stopped" => Tone::Quiet,
                "Error" | "CrashLoopBackOff" => Tone::Bad,
                _ => Tone::Waiting,
            };
            span(tone, words)
        }
    }
}

fn message_cell(desktop: &Desktop) -> Span {
    let of_row = desktop.row.there().and_then(|row| row.message.as_deref());
    let of_cr = || desktop.cr.there().and_then(|cr| cr.message.as_deref());
    span(Tone::Quiet, of_row.or_else(of_cr).unwrap_or_default())
}

fn address_cell(desktop: &Desktop) -> Span {
    let ip = desktop.cr.there().and_then(|cr| cr.ip.as_deref());
    span(Tone::Quiet, ip.unwrap_or_default())
}

fn measured(time: Option<Duration>) -> Span {
    match time {
        Some(time) => span(Tone::Plain, duration(time)),
        None => span(Tone::Quiet, "–"),
    }
}

fn shorten(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept = text.chars().take(width.saturating_sub(1));
    kept.chain(['…']).collect()
}

/// Cuts a line off at the width, and the spaces at its end.
fn cut(line: Spans, width: usize) -> Spans {
    let mut room = width;
    let mut kept: Spans = vec![];
    for Span { text, tone } in line {
        if room == 0 {
            break;
        }
        let text = shorten(&text, room);
        room -= text.chars().count();
        kept.push(span(tone, text));
    }
    while let Some(last) = kept.last_mut() {
        last.text.truncate(last.text.trim_end().len());
        if !last.text.is_empty() {
            break;
        }
        kept.pop();
    }
    kept
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::super::board::{Cr, News, Vm};
    use super::super::fate::Fate;
    use super::*;

    fn text(lines: &[Spans]) -> Vec<String> {
        let line = |line: &Spans| line.iter().map(|span| span.text.as_str()).collect();
        lines.iter().map(line).collect()
    }

    /// A board on which everything is as long as it gets.
    fn full() -> Board {
        let began = Instant::now();
        let mut board = Board::new(began);
        for fate in Fate::ALL {
            let key = fate.nickname().to_owned();
            let row = Row {
                status: Some("terminated".to_owned()),
                reason: Some("guest-shutdown".to_owned()),
                message: Some("a message that somebody wrote at length, and then some more".to_owned()),
                ending: true,
                over: fate == Fate::Crash,
            };
            let cr =
                Cr { phase: Some("Terminated".to_owned()), ip: Some("10.244.196.128".to_owned()), ..Cr::default() };
            let vm = Vm { status: Some("ErrorUnschedulable".to_owned()) };
            let all = [
                News::Made { fate, key: key.clone() },
                News::Vm { key: key.clone(), vm: Some(vm) },
                News::Cr { key: key.clone(), cr: Some(cr) },
                News::Row { key, row },
                News::Told(fate),
            ];
            for news in all {
                board.take(began + Duration::from_millis(9999), news);
            }
        }
        board
    }

    #[test]
    fn every_width_shows_every_desktop_and_overflows_nowhere() {
        for width in [20, 40, 79, 80, 100, 120, 160, 200] {
            let lines = text(&picture(&full(), Duration::from_secs(12), width, 24));
            assert!(lines.len() <= 24);
            for line in &lines {
                assert!(line.chars().count() <= width, "{width}: {line}");
            }
            for fate in Fate::ALL {
                assert!(lines.iter().any(|line| line.starts_with(fate.nickname())), "{width}: {fate:?} is missing");
            }
        }
    }

    #[test]
    fn a_terminal_of_80_columns_shows_row_cr_vm_and_times() {
        let lines = text(&picture(&full(), Duration::from_secs(12), 80, 24));
        assert_eq!(
            lines[2..5],
            [
                "DESKTOP   ROW                      CYBERDESK  VM             MADE   RUNS   OVER",
                "shut-down ◐ terminated · guest-sh… Terminated ErrorUnsche…   0 ms      –      –",
                "crash     ✓ terminated · guest-sh… Terminated ErrorUnsche…   0 ms      –   0 ms",
            ]
        );
    }

    #[test]
    fn a_wide_terminal_shows_the_message_and_the_address() {
        let head = |width| text(&picture(&full(), Duration::ZERO, width, 24))[2].clone();
        assert!(head(120).ends_with("MESSAGE") && !head(120).contains("ADDRESS"));
        assert!(head(160).contains("ADDRESS") && head(160).ends_with("MESSAGE"));
    }

    #[test]
    fn a_low_terminal_drops_deeds_first() {
        let lines = text(&picture(&full(), Duration::ZERO, 80, FRAME));
        assert_eq!(lines.len(), FRAME);
        assert!(lines.iter().all(|line| !line.contains("timeoutMs")));
        assert!(lines.last().is_some_and(|line| line.starts_with("MADE, RUNS")));
    }

    #[test]
    fn a_pipe_gets_one_line_a_change() {
        let board = full();
        assert_eq!(plain(&board.lines[0]), "  9.999 s  shut-down  ->   the app inserts its row");
    }
}
