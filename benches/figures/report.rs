//! A figure, and how it is told.

use serde_json::json;

/// Something measured.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    /// What it is, with the circumstances that matter.
    pub(crate) name: String,
    /// The value and its unit.
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// The same thing at its best, measured in the same run.
    pub(crate) limit: f64,
    /// What that is.
    pub(crate) limit_is: &'static str,
    pub(crate) goal: Goal,
}

/// What is wanted of a figure.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    /// The value is at least this part of the limit.
    RatioAtLeast(f64),
    /// The value is at most this, in its unit.
    ValueAtMost(f64),
}

impl Figure {
    fn ratio(&self) -> f64 {
        self.value / self.limit
    }

    fn met(&self) -> bool {
        match self.goal {
            Goal::RatioAtLeast(least) => self.ratio() >= least,
            Goal::ValueAtMost(most) => self.value <= most,
        }
    }

    fn goal(&self) -> String {
        match self.goal {
            Goal::RatioAtLeast(least) => format!("ratio >= {least}"),
            Goal::ValueAtMost(most) => format!("<= {most} {}", self.unit),
        }
    }
}

/// The middle one; of an even number the upper of the two.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Tells the figures on standard output.
pub(crate) fn print(figures: &[Figure], as_json: bool) {
    if as_json {
        for figure in figures {
            let line = json!({
                "figure": figure.name, "value": figure.value, "unit": figure.unit, "limit": figure.limit,
                "limit_is": figure.limit_is, "ratio": figure.ratio(), "goal": figure.goal(), "met": figure.met(),
            });
            println!("{line}");
        }
        return;
    }
    println!("{:<46} {:>14} {:>14} {:>6}  {:<14} MET", "FIGURE", "VALUE", "LIMIT", "RATIO", "GOAL");
    for figure in figures {
        let amount = |value: f64| format!("{} {}", significant(value), figure.unit);
        println!(
            "{:<46} {:>14} {:>14} {:>6.2}  {:<14} {}",
            figure.name,
            amount(figure.value),
            amount(figure.limit),
            figure.ratio(),
            figure.goal(),
            if figure.met() { "yes" } else { "NO" },
        );
        println!("{:<46} limit: {}", "", figure.limit_is);
    }
}

/// Three digits that mean something.
fn significant(value: f64) -> String {
    let digits = if value >= 100.0 { 0 } else { 2 };
    format!("{value:.digits$}")
}
