use std::collections::BTreeSet;

use super::*;

#[test]
fn a_template_that_is_gone_has_no_figure_and_many_have_a_bounded_number() {
    let metrics = Metrics::default();
    let names: Vec<String> = (0..500).map(|number| format!("t{number}")).collect();
    metrics.templates(names.iter().map(|name| (name, true)));
    assert_eq!(metrics.show().matches("cyberdesk_template_accepted{").count(), MOST_TEMPLATES);
    let default = "default".to_owned();
    metrics.templates([(&default, false)]);
    let shown = metrics.show();
    assert!(shown.contains("cyberdesk_template_accepted{template=\"default\"} 0"), "{shown}");
    assert_eq!(shown.matches("cyberdesk_template_accepted{").count(), 1, "{shown}");
}

#[test]
fn a_statement_is_known_by_the_function_that_it_calls() {
    let metrics = Metrics::default();
    stated("select id, answer from cyberdesk.report($1, $2)", true);
    stated("select clock_timestamp()", false);
    let shown = metrics.show();
    assert!(shown.contains("cyberdesk_sql_statements_total{statement=\"report\",result=\"ok\"}"), "{shown}");
    assert!(shown.contains("cyberdesk_sql_statements_total{statement=\"other\",result=\"error\"}"), "{shown}");
}

/// All figures with one value each, so that those of families are shown too.
fn touched() -> String {
    let metrics = Metrics::default();
    metrics.templates([(&"default".to_owned(), true)]);
    metrics.ended("timeout");
    metrics.phases(&[None]);
    metrics.queue(Lane::Ends, 0, 0.0);
    metrics.watch("vms", true);
    called(&ApiCall { verb: "get", resource: "leases".into(), code: "200".into() });
    stated("select cyberdesk.paused()", true);
    metrics.show()
}

/// A line of the document for each figure: its name as it is asked for, its type, its labels, its meaning.
fn lines(shown: &str) -> BTreeSet<String> {
    let help = |name: &str| {
        let begins = format!("# HELP {name} ");
        shown.lines().find_map(|line| line.strip_prefix(&begins)).expect("each has its help").trim_end_matches('.')
    };
    let types = shown.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let described = types.map(|(name, kind)| {
        let (suffix, sample) = match kind {
            "counter" => ("_total", "_total"),
            "histogram" => ("", "_bucket"),
            "info" => ("_info", "_info"),
            _ => ("", ""),
        };
        let sample = format!("{name}{sample}");
        let is_sample = |rest: &&str| rest.starts_with('{') || rest.starts_with(' ');
        let sample =
            shown.lines().find_map(|line| line.strip_prefix(&sample).filter(is_sample)).expect("it has a value");
        let labels = sample.strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or("", |(labels, _)| labels);
        let labels =
            labels.split(',').filter_map(|label| Some(label.split_once('=')?.0)).filter(|label| *label != "le");
        let labels: Vec<String> = labels.map(|label| format!("`{label}`")).collect();
        format!("| `{name}{suffix}` | {kind} | {} | {} |", labels.join(", "), help(name))
    });
    described.collect()
}

#[test]
fn the_document_has_each_figure_and_no_other() {
    let document = include_str!("../../docs/metrics.md");
    let documented = document.lines().filter(|line| line.starts_with("| `cyberdesk_")).map(str::to_owned).collect();
    let shown = lines(&touched());
    let wanted = shown.iter().map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(shown == documented, "docs/metrics.md is out of date; its table is now:\n{wanted}");
}
