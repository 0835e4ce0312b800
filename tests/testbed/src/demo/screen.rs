//! Where the story is shown: a picture that changes in place on a terminal, a line for each change elsewhere.

use std::io::{self, IsTerminal as _, Write as _};

use crossterm::style::{Attribute, Color, ContentStyle, StyledContent};
use crossterm::{cursor, queue, style, terminal};
use tokio::time::Instant;

use super::board::Board;
use super::table::{Span, Spans, Tone, picture, plain};

/// A size for terminals that do not say theirs.
const USUAL: (u16, u16) = (80, 24);

/// Where the story is shown.
pub(crate) enum Screen {
    /// A terminal; how wide the lines of the last picture were, for they are drawn over.
    Terminal { drawn: Vec<usize> },
    /// A pipe or a file; how many lines are written.
    Lines { written: usize },
}

impl Screen {
    /// On standard output. The cursor is hidden until this is dropped.
    pub(crate) fn open() -> io::Result<Self> {
        if !io::stdout().is_terminal() {
            return Ok(Self::Lines { written: 0 });
        }
        let mut out = io::stdout().lock();
        queue!(out, style::Print("\r\n"), cursor::Hide)?;
        out.flush()?;
        Ok(Self::Terminal { drawn: vec![] })
    }

    /// Shows what is new.
    pub(crate) fn show(&mut self, board: &Board) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match self {
            Self::Lines { written } => {
                for line in &board.lines[*written..] {
                    writeln!(out, "{}", plain(line))?;
                }
                *written = board.lines.len();
            }
            Self::Terminal { drawn } => {
                let (width, height) = terminal::size().unwrap_or(USUAL);
                // A terminal that does not know its size says zero.
                let (width, height) = if width == 0 { USUAL } else { (width, height) };
                // One line stays free: the cursor's own, below the picture.
                let (width, height) = (usize::from(width), usize::from(height.max(2)) - 1);
                let now = board.since_began(Instant::now());
                let lines = picture(board, now, width, height);
                queue!(out, terminal::BeginSynchronizedUpdate)?;
                rise(&mut out, drawn, width, height)?;
                for line in &lines {
                    paint(&mut out, line)?;
                    queue!(out, terminal::Clear(terminal::ClearType::UntilNewLine), style::Print("\r\n"))?;
                }
                queue!(out, terminal::Clear(terminal::ClearType::FromCursorDown), terminal::EndSynchronizedUpdate)?;
                *drawn = lines.iter().map(columns).collect();
            }
        }
        out.flush()
    }
}

impl Drop for Screen {
    /// Whatever happened, the terminal is left as it was found.
    fn drop(&mut self) {
        if let Self::Terminal { .. } = self {
            let mut out = io::stdout().lock();
            let _ = queue!(out, cursor::Show).and_then(|()| out.flush());
        }
    }
}

/// Back to the first line of what was drawn, which takes more lines if the terminal has become narrower since.
fn rise(out: &mut impl io::Write, drawn: &[usize], width: usize, height: usize) -> io::Result<()> {
    let lines: usize = drawn.iter().map(|line| line.div_ceil(width).max(1)).sum();
    match u16::try_from(lines.min(height)) {
        Ok(lines @ 1..) => queue!(out, cursor::MoveToColumn(0), cursor::MoveUp(lines)),
        _ => queue!(out, cursor::MoveToColumn(0)),
    }
}

fn columns(line: &Spans) -> usize {
    line.iter().map(|span| span.text.chars().count()).sum()
}

/// Writes a line in its colours; without any where the environment says `NO_COLOR`.
fn paint(out: &mut impl io::Write, line: &Spans) -> io::Result<()> {
    let plain = style::Colored::ansi_color_disabled();
    for Span { text, tone } in line {
        if plain {
            queue!(out, style::Print(text))?;
        } else {
            queue!(out, style::PrintStyledContent(StyledContent::new(look(*tone), text)))?;
        }
    }
    Ok(())
}

fn look(tone: Tone) -> ContentStyle {
    let mut look = ContentStyle::new();
    // The palette's plain colours, which crossterm calls dark: the bright ones vanish on white.
    look.foreground_color = match tone {
        Tone::Plain | Tone::Title | Tone::Quiet => None,
        Tone::Waiting => Some(Color::DarkCyan),
        Tone::Good => Some(Color::DarkGreen),
        Tone::Ending => Some(Color::DarkYellow),
        Tone::Bad => Some(Color::DarkRed),
    };
    match tone {
        Tone::Title => look.attributes.set(Attribute::Bold),
        Tone::Quiet => look.attributes.set(Attribute::Dim),
        _ => (),
    }
    look
}
