//! What each part is doing while everything starts.
//!
//! Parts start side by side. On a terminal each has a line that changes in place; piped, each change of step is one
//! plain line. Tests are quiet, except for work that is slow and happens once (a download, a build of minutes):
//! silence would look like a hang.

use std::borrow::Cow;
use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Between two plain lines about the same slow step.
const REMINDER: Duration = Duration::from_secs(15);

/// Where progress is shown.
#[derive(Clone, Debug)]
pub struct Progress(Shown);

#[derive(Clone, Debug)]
enum Shown {
    Lines { quiet: bool },
    Terminal(MultiProgress),
}

impl Progress {
    /// On standard error: live on a terminal, plain lines elsewhere.
    pub fn shown() -> Self {
        if std::io::stderr().is_terminal() {
            Self(Shown::Terminal(MultiProgress::new()))
        } else {
            Self(Shown::Lines { quiet: false })
        }
    }

    /// Nothing but slow first-time work.
    pub fn quiet() -> Self {
        Self(Shown::Lines { quiet: true })
    }

    /// Nothing more is shown: what is printed next begins a line.
    pub fn end(&self) {
        if let Shown::Terminal(_) = self.0 {
            eprintln!();
        }
    }

    /// A part that starts now.
    pub fn part(&self, name: impl Into<Cow<'static, str>>) -> Part {
        let name = name.into();
        let bar = match &self.0 {
            Shown::Lines { .. } => None,
            Shown::Terminal(all) => {
                let style = ProgressStyle::with_template("{spinner:.cyan} {prefix:<16} {wide_msg}")
                    .expect("the template is well formed")
                    .tick_strings(&["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏", "✓"]);
                let bar = all.add(ProgressBar::new_spinner().with_style(style).with_prefix(name.clone()));
                bar.enable_steady_tick(Duration::from_millis(100));
                Some(bar)
            }
        };
        let quiet = matches!(self.0, Shown::Lines { quiet: true });
        Part(Arc::new(Inner { name, quiet, bar, began: Instant::now(), last: Mutex::new(Last::default()) }))
    }
}

/// One part's line. Clones are the same line.
#[derive(Clone, Debug)]
pub struct Part(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: Cow<'static, str>,
    quiet: bool,
    bar: Option<ProgressBar>,
    began: Instant,
    last: Mutex<Last>,
}

/// What was said last, and when.
#[derive(Debug, Default)]
struct Last {
    step: String,
    slow: bool,
    said: Option<Instant>,
}

impl Part {
    /// The part now does this.
    pub fn step(&self, what: impl Into<String>) {
        self.change(what.into(), false);
    }

    /// The part now does this, which takes long and is worth a line even in quiet mode.
    pub fn slow(&self, what: impl Into<String>) {
        self.change(what.into(), true);
    }

    /// How far the step is: at once on a terminal, now and then in plain lines.
    pub fn detail(&self, how_far: &str) {
        let mut last = self.last();
        if let Some(bar) = &self.0.bar {
            bar.set_message(format!("{}: {how_far}", last.step));
        } else if last.said.is_none_or(|said| said.elapsed() >= REMINDER) {
            last.said = Some(Instant::now());
            self.say(&format!("{}: {how_far}", last.step), last.slow);
        }
    }

    /// The part is ready.
    pub fn done(&self, what: &str) {
        let took = self.0.began.elapsed().as_secs_f32();
        match &self.0.bar {
            Some(bar) => bar.finish_with_message(format!("{what} ({took:.1} s)")),
            None => self.say(&format!("{what} ({took:.1} s)"), false),
        }
    }

    fn change(&self, step: String, slow: bool) {
        if let Some(bar) = &self.0.bar {
            bar.set_message(step.clone());
        } else {
            self.say(&step, slow);
        }
        *self.last() = Last { step, slow, said: Some(Instant::now()) };
    }

    fn last(&self) -> std::sync::MutexGuard<'_, Last> {
        self.0.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn say(&self, what: &str, slow: bool) {
        if slow || !self.0.quiet {
            eprintln!("{:<16} {what}", self.0.name);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.as_ref().filter(|bar| !bar.is_finished()) {
            bar.abandon();
        }
    }
}
