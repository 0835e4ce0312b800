//! Figures for Prometheus: all that are served as `/metrics`, in one place. `docs/metrics.md` has the list.
//!
//! What happens is counted where it happens; what is so at the moment is taken when somebody asks. Every label has a
//! bounded number of values: none is made of a desktop, a user or a text that somebody else writes.

use std::sync::LazyLock;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry, Unit};

use crate::crd::Phase;
use crate::queue::Lane;
use crate::reason::Reason;

/// Most templates that have a figure of their own. Whoever edits the ConfigMap chooses their names.
const MOST_TEMPLATES: usize = 100;

/// The phases that desktops are counted by.
const PHASES: [(&str, Phase); 6] = [
    ("pending", Phase::Pending),
    ("starting", Phase::Starting),
    ("running", Phase::Running),
    ("stopping", Phase::Stopping),
    ("terminated", Phase::Terminated),
    ("error", Phase::Error),
];

/// Calls to the API server and statements of the process: their clients are made before there is a daemon.
static API_CALLS: LazyLock<Family<ApiCall, Counter>> = LazyLock::new(Family::default);
static STATEMENTS: LazyLock<Family<Statement, Counter>> = LazyLock::new(Family::default);

type Seconds = Gauge<f64, AtomicU64>;

/// All figures. Cheap to set from anywhere.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    templates: Family<OfTemplate, Gauge>,
    ends: Family<ForReason, Counter>,
    desktops: Family<InPhase, Gauge>,
    queue_depth: Family<InLane, Gauge>,
    queue_oldest: Family<InLane, Seconds>,
    watches: Family<OfKind, Gauge>,
    /// Edits of templates that were refused.
    pub(crate) template_refusals: Counter,
    /// From the insert of a row to each step of its start.
    pub(crate) insert_to_cr: Histogram,
    pub(crate) insert_to_vm: Histogram,
    pub(crate) insert_to_running: Histogram,
    /// From a deadline to the end that the database decided on.
    pub(crate) deadline_lateness: Histogram,
    /// From what was seen to the row that tells it.
    pub(crate) change_to_row: Histogram,
    pub(crate) batch: Histogram,
    pub(crate) retries: Counter,
    pub(crate) heartbeat: Histogram,
    pub(crate) leader: Gauge,
    pub(crate) paused: Gauge,
    /// Desktops that a person has paused, each by itself.
    pub(crate) desktops_paused: Gauge,
    pub(crate) notified: Gauge,
    pub(crate) rows_age: Seconds,
    pub(crate) lag: Gauge,
    pub(crate) lag_oldest: Seconds,
    /// Whether a person must confirm that database and cluster belong together.
    pub(crate) braked: Gauge,
    /// Desktops in the cluster whose row and tombstone are gone.
    pub(crate) orphans: Gauge,
    /// Desktops in the cluster that are of another database.
    pub(crate) strangers: Gauge,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfTemplate {
    template: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ForReason {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct InPhase {
    phase: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct InLane {
    lane: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfKind {
    kind: &'static str,
}

/// A call to the API server. `code` is the status of the answer, or `none` where there was no answer.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct ApiCall {
    pub(crate) verb: &'static str,
    pub(crate) resource: String,
    pub(crate) code: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Statement {
    statement: String,
    result: &'static str,
}

/// From a millisecond to an hour: starts and ends, which may wait for a quota or an image.
fn long() -> Histogram {
    Histogram::new([
        0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0,
    ])
}

/// From a millisecond to a minute: what should take no time to speak of.
fn short() -> Histogram {
    Histogram::new([0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0])
}

/// Puts figures on the list, and hands them on.
struct List(Registry);

impl List {
    fn plain<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }

    fn seconds<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register_with_unit(name, help, Unit::Seconds, metric.clone());
        metric
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut list = List(Registry::with_prefix("cyberdesk"));
        list.0.register("build", "The version of this daemon", Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]));
        list.plain(
            "api_calls",
            "Calls to the API server, by verb, resource and status of the answer (none: no answer)",
            API_CALLS.clone(),
        );
        list.plain(
            "sql_statements",
            "SQL statements, by the function of the schema that they call, and result (ok or error)",
            STATEMENTS.clone(),
        );
        Self {
            templates: list.plain(
                "template_accepted",
                "Whether the VM template is in use as the ConfigMap has it (1), or was refused or not checked yet (0)",
                Family::default(),
            ),
            template_refusals: list.plain(
                "template_refusals",
                "Edits of VM templates that were refused",
                Counter::default(),
            ),
            ends: list.plain("desktop_ends", "Desktops whose end was decided, by reason", Family::default()),
            desktops: list.plain(
                "desktops",
                "Desktops that have a Cyberdesk in the cluster, by its phase",
                Family::default(),
            ),
            insert_to_cr: list.seconds("insert_to_cr", "From the insert of a row to its Cyberdesk", long()),
            insert_to_vm: list.seconds("insert_to_vm", "From the insert of a row to its VirtualMachine", long()),
            insert_to_running: list.seconds(
                "insert_to_running",
                "From the insert of a row until it says running",
                long(),
            ),
            deadline_lateness: list.seconds(
                "deadline_lateness",
                "From the deadline of a row until the database had ended it, by the database's clock alone",
                short(),
            ),
            change_to_row: list.seconds(
                "change_to_row",
                "From what woke a desktop (a watch event, a changed row, a timer) until its row told what came of it",
                short(),
            ),
            queue_depth: list.plain(
                "queue_depth",
                "Desktops that are ready to be looked at, by lane",
                Family::default(),
            ),
            queue_oldest: list.seconds("queue_oldest", "How long the first of them has been ready", Family::default()),
            lag: list.plain(
                "write_back_entries",
                "Entries that the database has not answered for good",
                Gauge::default(),
            ),
            lag_oldest: list.seconds("write_back_oldest", "How long the first of them has waited", Seconds::default()),
            batch: list.plain(
                "write_back_batch_size",
                "Entries in one statement of the write-back",
                Histogram::new(exponential_buckets(1.0, 2.0, 10)),
            ),
            retries: list.plain(
                "write_back_retries",
                "Entries that must be told again: the app held their row locked, or the statement failed",
                Counter::default(),
            ),
            heartbeat: list.seconds("heartbeat_round_trip", "From sending a NOTIFY until it was heard", short()),
            notified: list.plain(
                "notifications_arrive",
                "Whether notifications are proven to arrive (1)",
                Gauge::default(),
            ),
            rows_age: list.seconds(
                "rows_read_age",
                "How long ago the rows that changed were last read; 0 on a standby",
                Seconds::default(),
            ),
            watches: list.plain(
                "watch_up",
                "Whether a kind of object is listed and its watch goes on (1), or is cut (0)",
                Family::default(),
            ),
            leader: list.plain("leader", "Whether this daemon leads (1) or stands by (0)", Gauge::default()),
            paused: list.plain("paused", "Whether an administrator has new desktops wait (1)", Gauge::default()),
            desktops_paused: list.plain(
                "desktops_paused",
                "Desktops that somebody has paused, each by itself",
                Gauge::default(),
            ),
            braked: list.plain(
                "braked",
                "Whether nothing is made or ended until a person confirms that database and cluster belong together",
                Gauge::default(),
            ),
            orphans: list.plain(
                "orphans",
                "Desktops in the cluster whose row and tombstone are gone: collected after a grace period",
                Gauge::default(),
            ),
            strangers: list.plain(
                "strangers",
                "Desktops in the cluster of another database: never touched",
                Gauge::default(),
            ),
            registry: list.0,
        }
    }
}

impl Metrics {
    /// Says of all templates there are whether they are in use as the ConfigMap has them.
    pub fn templates<'t>(&self, accepted: impl IntoIterator<Item = (&'t String, bool)>) {
        self.templates.clear();
        for (template, accepted) in accepted.into_iter().take(MOST_TEMPLATES) {
            self.templates.get_or_create(&OfTemplate { template: template.clone() }).set(accepted.into());
        }
    }

    /// Counts a desktop whose end was decided. Words that are not in the table of reasons are counted as one.
    pub fn ended(&self, reason: &str) {
        let reason = Reason::parse(reason).map_or("other", Reason::as_str);
        self.ends.get_or_create(&ForReason { reason }).inc();
    }

    /// How many desktops are in each phase. One without a phase was not looked at yet.
    pub(crate) fn phases(&self, of: &[Option<Phase>]) {
        for (word, phase) in PHASES {
            let count = of.iter().filter(|there| there.unwrap_or(Phase::Pending) == phase).count();
            self.desktops.get_or_create(&InPhase { phase: word }).set(whole(count));
        }
    }

    /// What waits in a lane of the queue, and how long the first of it has.
    pub(crate) fn queue(&self, lane: Lane, depth: usize, oldest: f64) {
        let lane = InLane { lane: lane.as_str() };
        self.queue_depth.get_or_create(&lane).set(whole(depth));
        self.queue_oldest.get_or_create(&lane).set(oldest);
    }

    /// Whether a watch goes on.
    pub(crate) fn watch(&self, kind: &'static str, up: bool) {
        self.watches.get_or_create(&OfKind { kind }).set(up.into());
    }

    /// All figures, as Prometheus reads them.
    pub(crate) fn show(&self) -> String {
        let mut shown = String::new();
        text::encode(&mut shown, &self.registry).expect("a String takes all that is written to it");
        shown
    }
}

/// A number as gauges have them.
pub(crate) fn whole(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Counts a call to the API server.
pub(crate) fn called(call: &ApiCall) {
    API_CALLS.get_or_create(call).inc();
}

/// Counts a statement. Its name is that of the function of ours that it calls; all others are counted as one.
pub(crate) fn stated(statement: &str, ok: bool) {
    let name = statement.split_once("cyberdesk.").map_or("other", |(_, rest)| {
        rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default()
    });
    let result = if ok { "ok" } else { "error" };
    STATEMENTS.get_or_create(&Statement { statement: name.to_owned(), result }).inc();
}

#[cfg(test)]
mod tests;
