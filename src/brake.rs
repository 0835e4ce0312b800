//! The brake: whether the database and the cluster belong together. Pure.
//!
//! They are a bound pair, each storing who the other is: the database the UID of our namespace and what it was
//! itself when it was bound, the Lease which database that is and the last epoch that it accepted. Where the two
//! disagree, or where far more is missing than anyone deletes without leaving a tombstone, nothing may be made,
//! deleted or ended on a row's account until a person says which is right.
//!
//! What must stay true: only absence *without* a tombstone counts. An app that stops or deletes everything says so
//! row by row, and is obeyed.

use std::fmt;

use jiff::{SignedDuration, Timestamp};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// Which database it is. A copy has the same `id`, so the three count together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Database {
    /// Drawn once, when the schema was made.
    pub id: Uuid,
    /// The server's (`pg_control_system()`): a restored dump has another, a standby the same.
    pub system: String,
    /// Its oid: a copy within one server has another.
    pub oid: i64,
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.id, self.system, self.oid)
    }
}

impl Database {
    /// Reads what `Display` writes.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, rest) = text.split_once('/')?;
        let (system, oid) = rest.split_once('/')?;
        Some(Self { id: id.parse().ok()?, system: system.to_owned(), oid: oid.parse().ok()? })
    }
}

/// What the database says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseSide {
    /// Which it is.
    pub itself: Database,
    /// The last epoch that it accepted.
    pub epoch: i64,
    /// The cluster that it is bound to, and as what: server and oid.
    pub bond: Option<(String, (String, i64))>,
    /// A person's confirmation, by SQL.
    pub confirmation: Option<String>,
    /// The leader's last sign of life that it knows of, by its own clock.
    pub sign_of_life: Option<Timestamp>,
}

/// What the cluster says, in the Lease and by its namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterSide {
    /// UID of our namespace.
    pub id: String,
    /// The counter of the Lease, which is ours.
    pub term: i64,
    /// The database that it is bound to, and the last epoch that that one accepted.
    pub bond: Option<(Database, i64)>,
    /// A person's confirmation, by `kubectl annotate`.
    pub confirmation: Option<String>,
    /// When a person last confirmed: what was without a row then is known to be.
    pub confirmed_at: Option<Timestamp>,
    /// The last sign of life that the database acknowledged, by its clock.
    pub sign_of_life: Option<Timestamp>,
}

/// What is missing on the one side of what the other has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Desktops in the cluster that are marked as of a row of this database.
    pub marked: usize,
    /// Those of them that it has never heard of: no row, no tombstone, no used id.
    pub unknown: usize,
    /// Desktops in the cluster that are marked as of another database.
    pub strangers: usize,
    /// Desktops in the database that are not over.
    pub live: usize,
    /// Those of them whose row has gone without a word: TRUNCATE, or a restored table.
    pub vanished: usize,
}

/// Why database and cluster do not seem to belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The database is bound to another cluster.
    OtherCluster,
    /// The cluster is bound to another database.
    OtherDatabase,
    /// The database is a copy of the one that the cluster is bound to.
    Copy,
    /// The database is in an earlier state than the one that the cluster knows.
    DatabaseWentBack,
    /// The cluster is in an earlier state than the one that the database knows.
    ClusterWentBack,
    /// Much is in the cluster, or in the private tables, that has no row, and nobody deleted it.
    RowsLost,
}

/// What is to be done about the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Each is what the other knows.
    Bound,
    /// They may be bound now, or anew: nothing speaks against it, or a person has confirmed it.
    Bind {
        /// A person has.
        confirmed: bool,
    },
    /// A person must say so.
    Braked(Cause),
}

/// Few are somebody's repair work, or what a confirmation has left. `cyberdesk.reconcile_projection` draws the same line.
const FEW: usize = 10;

/// More than ten, and more than every tenth: nobody loses so many one by one, and an app that ends all of its
/// desktops leaves a tombstone for each.
fn too_many(missing: usize, of: usize) -> bool {
    missing > FEW.max(of / 10)
}

/// How far behind what it acknowledged a database may be. A standby that takes over may lack the last seconds, and a sign
/// of life is up to ten seconds older than what came after it. Who restores goes back further: an archive of the
/// write-ahead log is mostly minutes old.
const TAKEOVER_MAY_LACK: SignedDuration = SignedDuration::from_secs(30);

/// Whether a database that knows of this sign of life as the last is in an earlier state than one that has acknowledged
/// that one. Both are by the database's clock.
pub fn has_gone_back(knows: Option<Timestamp>, acknowledged: Option<Timestamp>) -> bool {
    let behind =
        |acknowledged: Timestamp| knows.is_none_or(|knows| acknowledged.duration_since(knows) > TAKEOVER_MAY_LACK);
    acknowledged.is_some_and(behind)
}

/// Judges the pair.
pub fn judge(database: &DatabaseSide, cluster: &ClusterSide, missing: Missing) -> Verdict {
    match doubt(database, cluster, missing) {
        Some(cause) => {
            let asked = confirmation(cause, database, cluster, missing);
            let confirmed = [&database.confirmation, &cluster.confirmation].contains(&&Some(asked));
            if confirmed { Verdict::Bind { confirmed } } else { Verdict::Braked(cause) }
        }
        None if database.bond.is_some() && cluster.bond.is_some() => Verdict::Bound,
        // The first meeting; or a Lease that somebody deleted, while the database still knows the cluster.
        None => Verdict::Bind { confirmed: false },
    }
}

fn doubt(database: &DatabaseSide, cluster: &ClusterSide, missing: Missing) -> Option<Cause> {
    if let Some((bound_to, (system, oid))) = &database.bond {
        if *bound_to != cluster.id {
            return Some(Cause::OtherCluster);
        }
        // Also where the Lease has been lost, a copy knows itself by this.
        if (system, *oid) != (&database.itself.system, database.itself.oid) {
            return Some(Cause::Copy);
        }
    }
    match &cluster.bond {
        Some((known, _)) if known.id != database.itself.id => return Some(Cause::OtherDatabase),
        Some((known, _)) if *known != database.itself => return Some(Cause::Copy),
        Some((_, accepted)) if *accepted > database.epoch => return Some(Cause::DatabaseWentBack),
        // The Lease's counter is raised before the database accepts it: a lesser one is an older Lease.
        Some(_) if database.epoch > cluster.term => return Some(Cause::ClusterWentBack),
        Some(_) if has_gone_back(database.sign_of_life, cluster.sign_of_life) => return Some(Cause::DatabaseWentBack),
        None if database.bond.is_none() && missing.strangers > 0 => return Some(Cause::OtherDatabase),
        Some(_) | None => (),
    }
    let lost = too_many(missing.unknown, missing.marked) || too_many(missing.vanished, missing.live);
    lost.then_some(Cause::RowsLost)
}

/// What a person gives to confirm the pair in spite of this cause. Another cause, or the same one of another pair,
/// has another.
pub fn confirmation(cause: Cause, database: &DatabaseSide, cluster: &ClusterSide, missing: Missing) -> String {
    let known = cluster.bond.as_ref().map(|(known, _)| known.to_string());
    let accepted = cluster.bond.as_ref().map(|(_, accepted)| *accepted);
    let bound_to = database.bond.as_ref().map(|(bound_to, _)| bound_to);
    let mut hasher = Sha256::new();
    hasher.update(format!("{} {} {known:?} {bound_to:?}", database.itself, cluster.id));
    match cause {
        Cause::DatabaseWentBack => hasher
            .update(format!("{} {accepted:?} {:?} {:?}", database.epoch, database.sign_of_life, cluster.sign_of_life)),
        Cause::ClusterWentBack => {
            hasher.update(format!("{} {}", database.epoch, cluster.bond.as_ref().map_or(0, |b| b.1)))
        }
        Cause::RowsLost => {
            hasher.update(format!("{} {} {:?}", missing.unknown, missing.vanished, cluster.confirmed_at));
        }
        Cause::OtherCluster | Cause::OtherDatabase | Cause::Copy => (),
    }
    let digest: String = hasher.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{digest}", cause.as_str())
}

impl Cause {
    /// A stable word, which begins the confirmation.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OtherCluster => "other-cluster",
            Self::OtherDatabase => "other-database",
            Self::Copy => "copy",
            Self::DatabaseWentBack => "database-went-back",
            Self::ClusterWentBack => "cluster-went-back",
            Self::RowsLost => "rows-lost",
        }
    }

    /// What is wrong, and what else than confirming would mend it.
    fn words(self, database: &DatabaseSide, cluster: &ClusterSide, missing: Missing) -> String {
        let known = cluster.bond.as_ref().map_or_else(|| "another".to_owned(), |(known, _)| known.to_string());
        let accepted = cluster.bond.as_ref().map_or(0, |(_, accepted)| *accepted);
        match self {
            Self::OtherCluster => format!(
                "the database is bound to another cluster (namespace UID {}, ours is {}): see that DATABASE_URL leads to this cluster's",
                database.bond.as_ref().map_or("", |(bound_to, _)| bound_to),
                cluster.id
            ),
            Self::OtherDatabase => format!(
                "the desktops of this cluster are of another database ({known}, this is {}): see that DATABASE_URL leads to it",
                database.itself
            ),
            Self::Copy => {
                let (system, oid) = match (&cluster.bond, &database.bond) {
                    (Some((known, _)), _) => (&known.system, known.oid),
                    (None, Some((_, (system, oid)))) => (system, *oid),
                    (None, None) => (&database.itself.system, database.itself.oid),
                };
                format!(
                    "the database is a copy of the one that this cluster is bound to (that is {oid} on server {system}, this is {} on \
                     {}): see that DATABASE_URL leads to the original",
                    database.itself.oid, database.itself.system
                )
            }
            Self::DatabaseWentBack if accepted > database.epoch => format!(
                "the database is in an earlier state than it was (it knows epoch {}, and had accepted {accepted}): what was \
                 written since is missing",
                database.epoch
            ),
            Self::DatabaseWentBack => format!(
                "the database is in an earlier state than it was (the last sign of life that it knows of is of {}, and it had \
                 acknowledged one of {}): what was written since is missing",
                time(database.sign_of_life),
                time(cluster.sign_of_life)
            ),
            Self::ClusterWentBack => format!(
                "the cluster is in an earlier state than it was (its Lease had come to {accepted}, the database knows epoch {})",
                database.epoch
            ),
            Self::RowsLost => format!(
                "rows are missing that nobody deleted: {} of {} desktops in the cluster are unknown to the database, and {} of {} \
                 in its private tables have no row",
                missing.unknown, missing.marked, missing.vanished, missing.live
            ),
        }
    }

    /// The whole message: why, what it means, and how a person goes on. `namespace` is that of the Lease.
    pub fn message(self, database: &DatabaseSide, cluster: &ClusterSide, missing: Missing, namespace: &str) -> String {
        let value = confirmation(self, database, cluster, missing);
        format!(
            "{}. No desktop of a row is made or ended meanwhile. If the two are right as they are, confirm it: kubectl annotate lease \
             cyberdesk-operator -n {namespace} {CONFIRM}={value} --overwrite - or in the database: select \
             cyberdesk.confirm_pair('{value}'). Then what is in the cluster without a row is ended too, after a grace period",
            self.words(database, cluster, missing)
        )
    }
}

fn time(at: Option<Timestamp>) -> String {
    at.map_or_else(|| "never".to_owned(), |at| format!("{at:.0}"))
}

/// Annotation of the Lease: the database that this cluster is bound to.
pub const BOUND: &str = "cyberdesk.io/bound-database";
/// Annotation of the Lease: the last epoch that the database accepted.
pub const ACCEPTED: &str = "cyberdesk.io/accepted-epoch";
/// Annotation of the Lease: the last sign of life that the database acknowledged, by its clock.
pub const SIGN_OF_LIFE: &str = "cyberdesk.io/sign-of-life";
/// Annotation of the Lease: a person's confirmation.
pub const CONFIRM: &str = "cyberdesk.io/confirm";
/// Annotation of the Lease: when a person last confirmed, by the API server's clock.
pub const CONFIRMED_AT: &str = "cyberdesk.io/confirmed-at";

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: &str = "namespace-uid";

    fn it() -> Database {
        Database { id: Uuid::from_u128(1), system: "7000".to_owned(), oid: 16_384 }
    }

    fn database() -> DatabaseSide {
        let bond = Some((HERE.to_owned(), ("7000".to_owned(), 16_384)));
        DatabaseSide { itself: it(), epoch: 5, bond, confirmation: None, sign_of_life: at(1000) }
    }

    fn cluster() -> ClusterSide {
        ClusterSide {
            id: HERE.to_owned(),
            term: 6,
            bond: Some((it(), 5)),
            sign_of_life: at(1000),
            ..ClusterSide::default()
        }
    }

    fn at(second: i64) -> Option<Timestamp> {
        Timestamp::from_second(second).ok()
    }

    #[test]
    fn each_meeting_has_one_verdict() {
        use Verdict::{Bind, Bound, Braked};
        let fresh = DatabaseSide { epoch: 0, bond: None, ..database() };
        let free = ClusterSide { bond: None, ..cluster() };
        let copied = DatabaseSide { itself: Database { oid: 9, ..it() }, ..database() };
        let dumped = DatabaseSide { itself: Database { system: "8".to_owned(), ..it() }, ..database() };
        let other = DatabaseSide { itself: Database { id: Uuid::from_u128(2), ..it() }, ..database() };
        let moved = ClusterSide { id: "other-uid".to_owned(), ..free.clone() };
        let none = Missing::default();
        let missing = |unknown, marked| Missing { unknown, marked, ..none };
        let vanished = |vanished, live| Missing { vanished, live, ..none };
        let bind = Bind { confirmed: false };
        let cases = [
            ("as always", database(), cluster(), none, Bound),
            (
                "the standby that took over has lost nothing",
                DatabaseSide { epoch: 6, ..database() },
                cluster(),
                none,
                Bound,
            ),
            ("both are new", fresh.clone(), free.clone(), none, bind),
            ("the first meeting was cut short", DatabaseSide { bond: None, ..database() }, cluster(), none, bind),
            (
                "somebody deleted the Lease",
                DatabaseSide { epoch: 40, ..database() },
                ClusterSide { term: 1, ..free.clone() },
                none,
                bind,
            ),
            (
                "both are new, but for another's desktops",
                fresh.clone(),
                free.clone(),
                Missing { strangers: 1, ..none },
                Braked(Cause::OtherDatabase),
            ),
            ("strangers are told of, and no more", database(), cluster(), Missing { strangers: 50, ..none }, Bound),
            ("a copy on the same server", copied.clone(), cluster(), none, Braked(Cause::Copy)),
            ("a copy, and the Lease is gone", copied, free.clone(), none, Braked(Cause::Copy)),
            ("a restored dump", dumped, cluster(), none, Braked(Cause::Copy)),
            (
                "a copy from before the first meeting",
                DatabaseSide { itself: Database { oid: 9, ..it() }, ..fresh.clone() },
                cluster(),
                none,
                Braked(Cause::Copy),
            ),
            (
                "an empty database",
                DatabaseSide { bond: None, epoch: 0, ..other.clone() },
                cluster(),
                none,
                Braked(Cause::OtherDatabase),
            ),
            ("another database", other, cluster(), none, Braked(Cause::OtherDatabase)),
            ("another cluster", database(), moved, none, Braked(Cause::OtherCluster)),
            (
                "restored in place to a point in time",
                DatabaseSide { epoch: 4, ..database() },
                cluster(),
                none,
                Braked(Cause::DatabaseWentBack),
            ),
            (
                "restored in place to a point within the term",
                DatabaseSide { sign_of_life: at(969), ..database() },
                cluster(),
                none,
                Braked(Cause::DatabaseWentBack),
            ),
            (
                "restored to before the term's first sign of life, and the epoch is one of a later leader",
                DatabaseSide { sign_of_life: None, epoch: 6, ..database() },
                cluster(),
                none,
                Braked(Cause::DatabaseWentBack),
            ),
            (
                "a standby that took over without the last seconds",
                DatabaseSide { sign_of_life: at(970), ..database() },
                cluster(),
                none,
                Bound,
            ),
            (
                "a sign of life whose acknowledgement was lost",
                DatabaseSide { sign_of_life: at(1010), ..database() },
                cluster(),
                none,
                Bound,
            ),
            (
                "the leader before was of a release that noted no sign of life",
                database(),
                ClusterSide { sign_of_life: None, ..cluster() },
                none,
                Bound,
            ),
            (
                "a cluster restored from a backup",
                DatabaseSide { epoch: 9, ..database() },
                cluster(),
                none,
                Braked(Cause::ClusterWentBack),
            ),
            ("a few orphans", database(), cluster(), missing(10, 10), Bound),
            ("a tenth of many", database(), cluster(), missing(100, 1000), Bound),
            ("more than a tenth", database(), cluster(), missing(101, 1000), Braked(Cause::RowsLost)),
            ("all of a dozen", database(), cluster(), missing(12, 12), Braked(Cause::RowsLost)),
            ("lost with the Lease deleted", database(), free, missing(12, 12), Braked(Cause::RowsLost)),
            ("a truncated table", database(), cluster(), vanished(200, 200), Braked(Cause::RowsLost)),
            ("a few rows that went round the triggers", database(), cluster(), vanished(3, 200), Bound),
        ];
        for (case, database, cluster, missing, wanted) in cases {
            assert_eq!(judge(&database, &cluster, missing), wanted, "{case}");
        }
    }

    #[test]
    fn a_person_confirms_one_brake_and_no_other() {
        let copied = DatabaseSide { itself: Database { oid: 9, ..it() }, ..database() };
        let none = Missing::default();
        let value = confirmation(Cause::Copy, &copied, &cluster(), none);
        let confirmed = Verdict::Bind { confirmed: true };
        let by_sql = DatabaseSide { confirmation: Some(value.clone()), ..copied.clone() };
        assert_eq!(judge(&by_sql, &cluster(), none), confirmed);
        let by_kubectl = ClusterSide { confirmation: Some(value), ..cluster() };
        assert_eq!(judge(&copied, &by_kubectl, none), confirmed);

        let other_copy = DatabaseSide { itself: Database { oid: 10, ..it() }, ..database() };
        assert_eq!(judge(&other_copy, &by_kubectl, none), Verdict::Braked(Cause::Copy));
        let back = |epoch| DatabaseSide { epoch, ..database() };
        let value = confirmation(Cause::DatabaseWentBack, &back(4), &cluster(), none);
        let by_kubectl = ClusterSide { confirmation: Some(value), ..cluster() };
        assert_eq!(judge(&back(4), &by_kubectl, none), confirmed);
        assert_eq!(judge(&back(3), &by_kubectl, none), Verdict::Braked(Cause::DatabaseWentBack));

        let back = |second| DatabaseSide { sign_of_life: at(second), ..database() };
        let value = confirmation(Cause::DatabaseWentBack, &back(500), &cluster(), none);
        let by_kubectl = ClusterSide { confirmation: Some(value), ..cluster() };
        assert_eq!(judge(&back(500), &by_kubectl, none), confirmed);
        assert_eq!(judge(&back(499), &by_kubectl, none), Verdict::Braked(Cause::DatabaseWentBack));
    }

    #[test]
    fn the_message_fits_an_event_and_holds_both_ways_to_confirm() {
        let mut other = database();
        other.bond = Some(("0".repeat(36), ("7".repeat(20), i64::from(u32::MAX))));
        let id = "1".repeat(36);
        let itself = Database { system: "7".repeat(20), oid: i64::from(u32::MAX), ..it() };
        let cluster = ClusterSide { id, bond: Some((itself, i64::MAX)), ..cluster() };
        let missing = Missing { marked: 99_999, unknown: 99_999, strangers: 0, live: 99_999, vanished: 99_999 };
        use Cause::{ClusterWentBack, Copy, DatabaseWentBack, OtherCluster, OtherDatabase, RowsLost};
        for cause in [OtherCluster, OtherDatabase, Copy, DatabaseWentBack, ClusterWentBack, RowsLost] {
            let message = cause.message(&other, &cluster, missing, &"n".repeat(63));
            let value = confirmation(cause, &other, &cluster, missing);
            assert!(message.contains(&format!("{CONFIRM}={value} ")), "{message}");
            assert!(message.contains(&format!("confirm_pair('{value}')")), "{message}");
            assert!(message.len() <= 1024, "{} bytes: {message}", message.len());
        }
    }

    #[test]
    fn a_database_is_read_back_from_its_annotation() {
        assert_eq!(Database::parse(&it().to_string()), Some(it()));
        assert_eq!(Database::parse("7/8"), None);
    }
}
