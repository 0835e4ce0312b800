//! `doctor`: looks at what must hold for desktops to be served, and says what is wrong, why it matters and what
//! mends it.
//!
//! Each check is one finding; what could not be looked at is said, and is neither right nor wrong. Nothing is ever
//! changed: what is sent to the database is a notification, which nobody keeps; what is sent to the cluster, dry runs.

use std::fmt;

use kube::Client;
use serde::Serialize;

use crate::config::Config;
use crate::operator::templates_of;
use cluster::Places;

mod catalogue;
mod cluster;
mod database;
mod schema;

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Desktops are served, but worse, or with more rights than are needed.
    Warning,
    /// Something does not work, or protects nothing.
    Failure,
    /// It could not be looked at.
    Unseen,
}

/// One check, and what was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name, which stays.
    pub check: &'static str,
    /// What came of it.
    pub verdict: Verdict,
    /// What was found, in a sentence or a few.
    pub found: String,
    /// Why it matters.
    pub why: &'static str,
    /// Lines to paste that mend it; empty where nothing is to be mended, or no line alone can.
    pub mend: Vec<String>,
}

/// A check before it is made: its name, and why it matters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Check {
    name: &'static str,
    why: &'static str,
}

impl Check {
    const fn new(name: &'static str, why: &'static str) -> Self {
        Self { name, why }
    }

    fn finding(self, verdict: Verdict, found: impl Into<String>, mend: Vec<String>) -> Finding {
        Finding { check: self.name, verdict, found: found.into(), why: self.why, mend }
    }

    fn ok(self, found: impl Into<String>) -> Finding {
        self.finding(Verdict::Ok, found, vec![])
    }

    fn unseen(self, found: impl Into<String>) -> Finding {
        self.finding(Verdict::Unseen, found, vec![])
    }

    /// From a list of faults, each with the line that mends it. Without faults it is as said.
    fn faults(self, verdict: Verdict, faults: Vec<Fault>, otherwise: impl Into<String>) -> Finding {
        if faults.is_empty() {
            return self.ok(otherwise);
        }
        let found = faults.iter().map(|fault| fault.found.as_str()).collect::<Vec<_>>().join("; ");
        let mut mend: Vec<String> = vec![];
        for line in faults.into_iter().filter_map(|fault| fault.mend) {
            if !mend.contains(&line) {
                mend.push(line);
            }
        }
        self.finding(verdict, found, mend)
    }
}

/// One thing that is wrong, and the line that mends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    found: String,
    mend: Option<String>,
}

impl Fault {
    fn new(found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { found: found.into(), mend: Some(mend.into()) }
    }
}

/// All findings, in the order in which one would look.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// They name their checks.
    pub findings: Vec<Finding>,
}

impl Report {
    /// How many checks have this verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.findings.iter().filter(|finding| finding.verdict == verdict).count()
    }
}

/// For a terminal: a line a check, and beneath it what is to be done.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Finding { check, verdict, found, why, mend } in &self.findings {
            let mark = match verdict {
                Verdict::Ok => "ok",
                Verdict::Warning => "WARNING",
                Verdict::Failure => "FAILURE",
                Verdict::Unseen => "unseen",
            };
            writeln!(f, "{mark:<8} {check:<15} {found}")?;
            if matches!(verdict, Verdict::Warning | Verdict::Failure) {
                writeln!(f, "{:>23} {why}", "why:")?;
                for line in mend.iter().flat_map(|text| text.lines()) {
                    writeln!(f, "{:>23} {line}", "mend:")?;
                }
            }
        }
        let (failures, warnings) = (self.count(Verdict::Failure), self.count(Verdict::Warning));
        writeln!(f, "\n{} checks, {failures} failed, {warnings} with warnings", self.findings.len())
    }
}

const SETTINGS: Check = Check::new("settings", "the daemon does not start while a setting is wrong");

/// Looks at everything: the settings, the database, and the cluster by this client.
pub async fn examine(variables: Vec<(String, String)>, client: anyhow::Result<Client>) -> Report {
    let mut report = examine_database(variables.clone()).await;
    if let Ok((namespace, vm_namespace)) = Config::namespaces(&variables) {
        let folder = Config::read(variables).ok().and_then(|(config, _)| templates_of(&config.templates?).ok());
        report.findings.extend(cluster::examine(client, &Places { namespace, vm_namespace, folder }).await);
    }
    report
}

/// Looks at the settings and the database.
pub async fn examine_database(variables: Vec<(String, String)>) -> Report {
    let target = Config::target(&variables);
    let mut findings = vec![match Config::read(variables) {
        Ok((_, warnings)) if warnings.is_empty() => SETTINGS.ok("all can be read"),
        Ok((_, warnings)) => SETTINGS.finding(Verdict::Warning, warnings.join("; "), vec![]),
        Err(faults) => SETTINGS.finding(Verdict::Failure, faults.to_string().replace("\n ", ""), vec![]),
    }];
    if let Ok(target) = target {
        findings.extend(database::examine(&target).await);
    }
    Report { findings }
}
