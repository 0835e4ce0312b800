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
    /// The same thing at its best, measured in the same run, and what that is.
    pub(crate) limit: Option<(f64, &'static str)>,
    pub(crate) goal: Goal,
}

/// What is wanted of a figure.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    /// The value is at least this part of the limit.
    RatioAtLeast(f64),
    /// The value is at most this many times the limit.
    RatioAtMost(f64),
    /// The value is at least this, in its unit.
    ValueAtLeast(f64),
    /// The value is at most this, in its unit.
    ValueAtMost(f64),
    /// None: it is told to understand the others.
    Told,
}

impl Figure {
    fn ratio(&self) -> Option<f64> {
        self.limit.map(|(limit, _)| self.value / limit)
    }

    fn met(&self) -> Option<bool> {
        match (self.goal, self.ratio()) {
            (Goal::RatioAtLeast(least), Some(ratio)) => Some(ratio >= least),
            (Goal::RatioAtMost(most), Some(ratio)) => Some(ratio <= most),
            (Goal::ValueAtLeast(least), _) => Some(self.value >= least),
            (Goal::ValueAtMost(most), _) => Some(self.value <= most),
            (Goal::RatioAtLeast(_) | Goal::RatioAtMost(_) | Goal::Told, _) => None,
        }
    }

    fn goal(&self) -> String {
        match self.goal {
            Goal::RatioAtLeast(least) => format!("ratio >= {least}"),
            Goal::RatioAtMost(most) => format!("ratio <= {most}"),
            Goal::ValueAtLeast(least) => format!(">= {least} {}", self.unit),
            Goal::ValueAtMost(most) => format!("<= {most} {}", self.unit),
            Goal::Told => String::new(),
        }
    }
}

/// The middle one; of an even number the upper of the two.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    percentile(values, 50)
}

/// The value that so many percent are below.
pub(crate) fn percentile(values: impl IntoIterator<Item = f64>, percent: usize) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let at = (values.len() * percent / 100).min(values.len().saturating_sub(1));
    values.get(at).copied().unwrap_or(f64::NAN)
}

/// Tells the figures on standard output.
pub(crate) fn print(figures: &[Figure], as_json: bool) {
    if as_json {
        for figure in figures {
            let line = json!({
                "figure": figure.name, "value": figure.value, "unit": figure.unit,
                "limit": figure.limit.map(|(limit, _)| limit), "limit_is": figure.limit.map(|(_, what)| what),
                "ratio": figure.ratio(), "goal": figure.goal(), "met": figure.met(),
            });
            println!("{line}");
        }
        return;
    }
    println!("{:<50} {:>12} {:>12} {:>6}  {:<13} MET", "FIGURE", "VALUE", "LIMIT", "RATIO", "GOAL");
    for figure in figures {
        let amount = |value: f64| format!("{} {}", significant(value), figure.unit);
        println!(
            "{:<50} {:>12} {:>12} {:>6}  {:<13} {}",
            figure.name,
            amount(figure.value),
            figure.limit.map(|(limit, _)| amount(limit)).unwrap_or_default(),
            figure.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            figure.goal(),
            figure.met().map_or("", |met| if met { "yes" } else { "NO" }),
        );
        if let Some((_, what)) = figure.limit {
            println!("{:<50} limit: {what}", "");
        }
    }
}

/// Three digits that mean something.
fn significant(value: f64) -> String {
    let digits = if value >= 100.0 { 0 } else { 2 };
    format!("{value:.digits$}")
}
