//! What is in `deploy/monitoring` can be read by Prometheus, asks for figures that are served, and each alert has its
//! entry in the runbook.

#![expect(clippy::unwrap_used, reason = "a test says so by failing")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const ALERTS: &str = include_str!("../deploy/monitoring/alerts.yaml");
const ALERTS_TEST: &str = include_str!("../deploy/monitoring/alerts.test.yaml");
const DASHBOARD: &str = include_str!("../deploy/monitoring/dashboard.json");
const RUNBOOK: &str = include_str!("../docs/runbook.md");
/// A test beside the figures holds it to what is served.
const METRICS: &str = include_str!("../docs/metrics.md");

/// What a PrometheusRule holds is what Prometheus reads.
fn rules() -> Value {
    let manifest: Value = serde_saphyr::from_str(ALERTS).unwrap();
    manifest["spec"].clone()
}

fn alerts() -> Vec<Value> {
    rules()["groups"][0]["rules"].as_array().unwrap().clone()
}

/// The queries of all panels, with Grafana's own words replaced as it does.
fn queries() -> Vec<String> {
    let board: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = board["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    targets.map(|target| target["expr"].as_str().unwrap().replace("$__rate_interval", "5m")).collect()
}

/// Whether promtool is missed, which CI must not. It comes with Debian's package prometheus.
#[expect(clippy::disallowed_methods, reason = "what CI must not skip is no setting of the operator")]
fn is_missed(test: &str) -> bool {
    let missed = Command::new("promtool").arg("--version").output().is_err();
    let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!(missed && ci), "there is no promtool here: apt-get install prometheus");
    if missed {
        eprintln!("SKIPPED: {test}: there is no promtool here: apt-get install prometheus");
    }
    missed
}

fn promtool(folder: &Path, arguments: &[&str]) {
    let output = Command::new("promtool").args(arguments).current_dir(folder).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "promtool {arguments:?}:\n{out}{err}");
}

#[test]
fn each_alert_fires_in_its_trouble_and_none_while_all_is_well() {
    if is_missed("each alert fires in its trouble") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // JSON is YAML.
    std::fs::write(folder.path().join("rules.yaml"), rules().to_string()).unwrap();
    std::fs::write(folder.path().join("test.yaml"), ALERTS_TEST).unwrap();
    promtool(folder.path(), &["check", "rules", "rules.yaml"]);
    promtool(folder.path(), &["test", "rules", "test.yaml"]);
    for alert in alerts() {
        let name = alert["alert"].as_str().unwrap();
        assert!(ALERTS_TEST.contains(&format!("  - name: {name}\n")), "{name} has no test");
    }
}

#[test]
fn each_query_of_the_dashboard_can_be_read() {
    if is_missed("each query of the dashboard can be read") {
        return;
    }
    let queries = queries();
    let rules: Vec<Value> = queries
        .iter()
        .enumerate()
        .map(|(number, query)| serde_json::json!({ "record": format!("query:{number}"), "expr": query }))
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let text = serde_json::json!({ "groups": [{ "name": "dashboard", "rules": rules }] }).to_string();
    std::fs::write(folder.path().join("dashboard.yaml"), text).unwrap();
    promtool(folder.path(), &["check", "rules", "dashboard.yaml"]);
}

#[test]
fn dashboard_and_alerts_ask_for_figures_that_are_served() {
    let documented = METRICS.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let known: BTreeSet<&str> = documented.map(|(name, _)| name).collect();
    let alerts = alerts();
    let asked = alerts.iter().map(|alert| alert["expr"].as_str().unwrap().to_owned()).chain(queries());
    for query in asked {
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let names = query.match_indices("cyberdesk_").map(|(at, _)| query[at..].split(|c| !is_part(c)).next().unwrap());
        for name in names {
            let stem = ["_bucket", "_count", "_sum"].iter().find_map(|suffix| name.strip_suffix(suffix));
            assert!(known.contains(stem.unwrap_or(name)), "{name} is not served: {query}");
        }
    }
}

#[test]
fn each_alert_has_its_entry_in_the_runbook_and_leads_there() {
    let alerts = alerts();
    let names: Vec<&str> = alerts.iter().map(|alert| alert["alert"].as_str().unwrap()).collect();
    let entries: Vec<&str> = RUNBOOK.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    assert_eq!(names, entries, "the alerts, and the entries of docs/runbook.md");
    for alert in &alerts {
        let (name, url) = (alert["alert"].as_str().unwrap(), alert["annotations"]["runbook_url"].as_str().unwrap());
        assert!(url.ends_with(&format!("docs/runbook.md#{}", name.to_lowercase())), "{name} leads to {url}");
        assert!(alert["annotations"]["summary"].is_string() && alert["labels"]["severity"].is_string(), "{alert}");
    }
}
