//! `status`: the fleet on one screen, or one desktop's whole story.

mod story;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::Shown;
use crate::cluster;
use crate::model::{Desired, Row};
use crate::names::Key;
use crate::survey::{Leader, Service, Survey, span, whole};

const EXAMPLES: &str = "\
Examples:
  kubectl exec -n cyberdesk-system deploy/cyberdesk-operator -- cyberdesk-operator status
  kubectl exec -it -n cyberdesk-system deploy/cyberdesk-operator -- cyberdesk-operator status --watch
  cyberdesk-operator status 3f6e2c      the first letters of an id are enough, while it lives
  cyberdesk-operator status --json | jq .rows

Each side is shown as far as it can be read. The exit code is 0 if something could be, 1 if there is no such desktop,
and 2 if neither the database nor the cluster could be looked at.";

/// Between two pictures.
const REDRAW: Duration = Duration::from_secs(2);
/// Lines of a list, so that all fits on a screen.
const LINES: usize = 5;
/// A row that an administrator has left alone.
const PAUSED: &str = "paused";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Status {
    /// The desktop whose story to tell: the row's id, or the name of a Cyberdesk applied by hand.
    id: Option<String>,
    /// Draw it anew every two seconds, until Ctrl-C.
    #[arg(long, conflicts_with = "json")]
    watch: bool,
    /// For programs: an object.
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(super) async fn run(self) -> anyhow::Result<Shown> {
        if !self.watch {
            return self.look().await;
        }
        let terminal = std::io::stdout().is_terminal();
        loop {
            let shown = self.look().await?;
            let mut out = std::io::stdout().lock();
            if terminal {
                // Over what is there, line by line: a screen that is cleared first flickers.
                write!(out, "\x1b[H{}\x1b[J", shown.text.replace('\n', "\x1b[K\n"))?;
            } else {
                writeln!(out, "{}", shown.text)?;
            }
            out.flush()?;
            drop(out);
            tokio::time::sleep(REDRAW).await;
        }
    }

    async fn look(&self) -> anyhow::Result<Shown> {
        let client = cluster::connect().await;
        let asked = self.id.as_deref().and_then(|id| Key::new(id).row_id());
        let survey = Survey::read(&super::variables(), client, asked).await;
        if let Some(id) = &self.id {
            return story::tell(&survey, id, self.json).await;
        }
        let fleet = Fleet::of(&survey);
        let code = if survey.now().is_some() { 0 } else { 2 };
        let text = if self.json { serde_json::to_string_pretty(&fleet)? + "\n" } else { fleet.print() };
        Ok(Shown { text, code })
    }
}

/// The fleet in figures.
#[derive(Debug, Serialize)]
struct Fleet {
    namespace: String,
    now: Option<Timestamp>,
    /// Who leads.
    leader: Option<Leader>,
    /// What an app is told of the operator.
    service: Option<Service>,
    /// Rows that are not over, by status; of those that no longer want a VM, `ending`; of those left alone in SQL, `paused`.
    rows: BTreeMap<&'static str, usize>,
    /// Cyberdesks by phase.
    cyberdesks: BTreeMap<String, usize>,
    virtual_machines: usize,
    instances: usize,
    /// Cyberdesks that are held up, ending or over, by reason.
    reasons: BTreeMap<String, usize>,
    /// Rows whose change nobody has acted on yet, and since when the first waits, in seconds.
    unheeded: (usize, i64),
    oldest_pending: Vec<Line>,
    next_deadlines: Vec<Line>,
    unseen: Vec<String>,
}

/// A desktop, a time from now or until now in seconds, and what there is to say.
#[derive(Debug, Serialize)]
struct Line {
    desktop: String,
    seconds: i64,
    words: String,
}

impl Fleet {
    fn of(survey: &Survey) -> Self {
        let (database, objects) = (survey.database.as_ref().ok(), survey.cluster.as_ref().ok());
        let mut unseen = vec![];
        unseen.extend(survey.database.as_ref().err().map(|why| format!("the database: {why}")));
        unseen.extend(survey.cluster.as_ref().err().map(|why| format!("the cluster: {why}")));
        let leader = objects.map(|objects| objects.leader.clone());
        unseen.extend(leader.iter().filter_map(|leader| Some(format!("the Lease: {}", leader.as_ref().err()?))));
        let rows: Vec<&Row> = database.iter().flat_map(|it| it.rows.values()).filter(|row| !row.ended).collect();
        let words = ["pending", "running", "ending", PAUSED];
        let by_status = words.map(|word| (word, rows.iter().filter(|row| word_of(row) == word).count()));
        let (mut cyberdesks, mut reasons) = (BTreeMap::new(), BTreeMap::new());
        for cr in objects.iter().flat_map(|it| it.crs.values()) {
            *cyberdesks.entry(cr.status.phase.map_or("new".to_owned(), |phase| format!("{phase:?}"))).or_default() += 1;
            if let Some(reason) = &cr.status.reason {
                *reasons.entry(reason.clone()).or_default() += 1;
            }
        }
        let now = survey.now();
        let unheeded: Vec<&&Row> =
            rows.iter().filter(|row| row.generation > row.observed_generation && !row.paused).collect();
        let waits = unheeded.iter().map(|row| row.changed_at).min().zip(now);
        Self {
            namespace: survey.namespaces.0.clone(),
            now: now.map(|now| now.database),
            leader: leader.and_then(Result::ok).flatten(),
            service: database.map(|it| it.service.clone()),
            rows: by_status.into_iter().filter(|(word, count)| *word != PAUSED || *count > 0).collect(),
            cyberdesks,
            virtual_machines: objects.map_or(0, |it| it.vms.len()),
            instances: objects.map_or(0, |it| it.vmis.len()),
            reasons,
            unheeded: (unheeded.len(), waits.map_or(0, |(since, now)| since.duration_until(now.database).as_secs())),
            oldest_pending: oldest_pending(survey, &rows),
            next_deadlines: next_deadlines(survey, &rows),
            unseen,
        }
    }

    fn print(&self) -> String {
        let mut text = String::new();
        let now = self.now.map(|now| format!("{} UTC", whole(now))).unwrap_or_default();
        let _ = writeln!(text, "{:<55} {now:>24}\n", self.namespace);
        let _ = writeln!(text, "leader     {}", self.leader_words());
        if let Some(service) = &self.service {
            let _ = writeln!(text, "operator   {}: {}", service.state, service.message);
        }
        if self.service.is_some() {
            let lag = match self.unheeded {
                (0, _) => "every change was acted on".to_owned(),
                (rows, seconds) => {
                    format!(
                        "{rows} changed and not acted on yet, the first for {}",
                        span(jiff::SignedDuration::from_secs(seconds))
                    )
                }
            };
            let _ = writeln!(text, "rows       {}; {lag}", counts(self.rows.iter()));
        }
        if self.unseen.iter().all(|why| !why.starts_with("the cluster")) {
            let phases = counts(self.cyberdesks.iter());
            let phases = if phases.is_empty() { "no Cyberdesk".to_owned() } else { phases };
            let _ = writeln!(text, "cluster    {phases}; {} VMs, {} instances", self.virtual_machines, self.instances);
        }
        if !self.reasons.is_empty() {
            let _ = writeln!(text, "reasons    {}", counts(self.reasons.iter()));
        }
        for why in &self.unseen {
            let _ = writeln!(text, "NOT SEEN   {why}");
        }
        list(&mut text, "LONGEST PENDING", "FOR", "WAITS FOR", &self.oldest_pending);
        list(&mut text, "NEXT DEADLINES", "IN", "STATUS", &self.next_deadlines);
        text
    }

    fn leader_words(&self) -> String {
        match &self.leader {
            None => "nobody, as far as can be seen: new desktops wait, and nothing ends".to_owned(),
            Some(leader) if leader.expired => {
                format!("nobody: {} last renewed the Lease {} s ago", leader.name, leader.renewed_seconds_ago)
            }
            Some(leader) => {
                format!("{}, term {}, renewed {} s ago", leader.name, leader.epoch, leader.renewed_seconds_ago)
            }
        }
    }
}

fn word_of(row: &Row) -> &'static str {
    match row.desired {
        _ if row.paused => PAUSED,
        Desired::Absent => "ending",
        Desired::Present => row.status.as_str(),
    }
}

fn counts<'c, N: std::fmt::Display + 'c>(counts: impl Iterator<Item = (N, &'c usize)>) -> String {
    counts.map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
}

fn list(text: &mut String, what: &str, when: &str, words: &str, lines: &[Line]) {
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n{what:<37} {when:>9}  {words}");
    for Line { desktop, seconds, words } in lines {
        let words: String = words.chars().take(30).collect();
        let _ = writeln!(text, "{desktop:<37} {:>9}  {words}", span(jiff::SignedDuration::from_secs(*seconds)));
    }
}

fn oldest_pending(survey: &Survey, rows: &[&Row]) -> Vec<Line> {
    let Some(now) = survey.now() else { return vec![] };
    let mut pending: Vec<&&Row> = rows.iter().filter(|row| word_of(row) == "pending").collect();
    pending.sort_by_key(|row| row.created_at);
    let line = |row: &&&Row| {
        let key = Key::of_row(row.id);
        let cr = survey.seen(&key, |it| &it.crs);
        let words = cr.present().and_then(|cr| cr.status.reason.clone()).or_else(|| row.message.clone());
        let seconds = row.created_at.duration_until(now.database).as_secs();
        Line { desktop: key.to_string(), seconds, words: words.unwrap_or_else(|| "its start".to_owned()) }
    };
    pending.iter().take(LINES).map(line).collect()
}

fn next_deadlines(survey: &Survey, rows: &[&Row]) -> Vec<Line> {
    let Some(now) = survey.now() else { return vec![] };
    let alive = rows.iter().filter(|row| row.desired == Desired::Present);
    let mut due: Vec<(Timestamp, String, String)> =
        alive.map(|row| (row.expires_at, row.id.to_string(), word_of(row).to_owned())).collect();
    // Those by hand end by their Cyberdesk; without the database, so do all that can be seen.
    let by_hand = survey.cluster.iter().flat_map(|objects| &objects.crs);
    let by_hand = by_hand.filter(|(_, cr)| (cr.owner.is_none() || survey.database.is_err()) && cr.status.end.is_none());
    due.extend(by_hand.filter_map(|(key, cr)| {
        let words = cr.status.phase.map(|phase| format!("{phase:?}")).unwrap_or_default();
        Some((cr.status.expiry_time?, key.to_string(), words))
    }));
    due.sort();
    let line = |(at, desktop, words): (Timestamp, String, String)| Line {
        desktop,
        seconds: now.database.duration_until(at).as_secs().max(0),
        words,
    };
    due.into_iter().take(LINES).map(line).collect()
}
