//! Every setting, read once from the environment (and `.env`), checked, and all faults told together.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use jiff::SignedDuration;
use serde::Deserialize;

use crate::database::connect::Target;
use crate::telemetry::Format;

const PREFIX: &str = "CYBERDESK_";
/// Shorter, and a read that went wrong for a moment could cost somebody a desktop.
const LEAST_ORPHAN_GRACE: Duration = Duration::from_secs(10);

/// What the environment says, as text. A field is a variable: `vm_namespace` is `CYBERDESK_VM_NAMESPACE`.
#[derive(Debug, Default, Deserialize)]
struct Given {
    identity: Option<String>,
    namespace: Option<String>,
    vm_namespace: Option<String>,
    templates: Option<String>,
    poll_interval: Option<String>,
    resync_interval: Option<String>,
    orphan_grace: Option<String>,
    concurrency: Option<String>,
    max_unstarted: Option<String>,
    listen: Option<String>,
    log: Option<String>,
    log_format: Option<String>,
}

impl Given {
    fn namespaces(&self) -> (String, String) {
        let namespace = self.namespace.clone().unwrap_or_else(|| "cyberdesk-system".to_owned());
        (namespace.clone(), self.vm_namespace.clone().unwrap_or(namespace))
    }
}

/// Names of the variables above, without prefix.
const NAMES: [&str; 12] = [
    "IDENTITY",
    "NAMESPACE",
    "VM_NAMESPACE",
    "TEMPLATES",
    "POLL_INTERVAL",
    "RESYNC_INTERVAL",
    "ORPHAN_GRACE",
    "CONCURRENCY",
    "MAX_UNSTARTED",
    "LISTEN",
    "LOG",
    "LOG_FORMAT",
];

#[derive(Debug, Default, Deserialize)]
struct GivenDatabase {
    database_url: Option<String>,
    database_password_file: Option<PathBuf>,
    /// The seed's variables: they are told apart from nothing being set.
    supabase_url: Option<String>,
    supabase_key: Option<String>,
}

impl GivenDatabase {
    fn target(self) -> Result<Target, String> {
        match self.database_url {
            Some(url) => Target::from_url(&url, self.database_password_file)
                .map_err(|error| format!("DATABASE_URL: {}", crate::telemetry::chain(error.as_ref()))),
            None if self.supabase_url.is_some() || self.supabase_key.is_some() => Err(
                "DATABASE_URL is not set, only SUPABASE_URL or SUPABASE_KEY, which this program does not use: it speaks \
                 to the database itself, with the connection string that Supabase's dashboard shows under Connect"
                    .to_owned(),
            ),
            None => Err(
                "DATABASE_URL is not set; it is the URL of the database, such as \
                 postgres://cyberdesk_daemon:PASSWORD@HOST:5432/postgres"
                    .to_owned(),
            ),
        }
    }
}

/// The checked settings. Nothing past this point reads the environment.
#[derive(Clone, Debug)]
pub struct Config {
    /// `DATABASE_URL` and `DATABASE_PASSWORD_FILE`: how to reach the database.
    pub database: Target,
    /// This process's name in the Lease: by default the host's, which is the pod's in a cluster.
    pub identity: String,
    /// Where CRs and the template ConfigMap live.
    pub namespace: String,
    /// Where VMs and their Secrets are made.
    pub vm_namespace: String,
    /// A folder with templates, in place of the ConfigMap.
    pub templates: Option<PathBuf>,
    /// Longest time between two looks for changed rows, even if nothing notifies us.
    pub poll_interval: Duration,
    /// Time between two reads of all rows that are not over.
    pub resync_interval: Duration,
    /// How long a desktop whose row and tombstone are gone is left alone, from when the leader first sees that.
    pub orphan_grace: Duration,
    /// Most desktops worked on at once, and so most calls to the API server in flight.
    pub concurrency: usize,
    /// VMs that KubeVirt has yet to make a VMI for, above which no more are made. About: what is being made at the
    /// same time may come on top.
    pub max_unstarted: usize,
    /// Where `/livez`, `/readyz` and `/metrics` are served.
    pub listen: SocketAddr,
    /// What to log.
    pub logging: Logging,
}

/// What to log, and how it looks.
#[derive(Clone, Debug)]
pub struct Logging {
    /// In the syntax of `RUST_LOG`.
    pub filter: String,
    /// `None`: text on a terminal, JSON elsewhere.
    pub format: Option<Format>,
}

/// All that is wrong with the settings.
#[derive(Debug, PartialEq, Eq)]
pub struct Faults(Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the settings are wrong:")?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

impl std::error::Error for Faults {}

/// An empty variable is one that is not set: that is how people unset them in manifests.
fn set(variables: impl IntoIterator<Item = (String, String)>) -> Vec<(String, String)> {
    variables.into_iter().filter(|(_, value)| !value.is_empty()).collect()
}

impl Config {
    /// How to reach the database, whatever is wrong with other settings.
    ///
    /// # Errors
    ///
    /// What is wrong with its own.
    pub fn target(variables: &[(String, String)]) -> Result<Target, String> {
        envy::from_iter::<_, GivenDatabase>(set(variables.to_vec())).map_err(|error| error.to_string())?.target()
    }

    /// The namespaces of CRs and of VMs, whatever is wrong with other settings.
    ///
    /// # Errors
    ///
    /// If a variable cannot be read at all.
    pub fn namespaces(variables: &[(String, String)]) -> Result<(String, String), String> {
        let given: Given =
            envy::prefixed(PREFIX).from_iter(set(variables.to_vec())).map_err(|error| error.to_string())?;
        Ok(given.namespaces())
    }

    /// Reads settings from variables by name. Returns them with warnings about variables that start with
    /// `CYBERDESK_` and mean nothing to us.
    ///
    /// # Errors
    ///
    /// All faults at once.
    pub fn read(variables: impl IntoIterator<Item = (String, String)>) -> Result<(Self, Vec<String>), Faults> {
        let variables = set(variables);
        let mut warnings = unknown(&variables);
        let given: Given =
            envy::prefixed(PREFIX).from_iter(variables.clone()).map_err(|error| Faults(vec![error.to_string()]))?;
        let mut faults = vec![];
        let database = Self::target(&variables).inspect(|target| warnings.extend_from_slice(target.warnings()));
        let database = database.map_err(|fault| faults.push(fault));
        let (namespace, vm_namespace) = given.namespaces();
        let identity =
            given.identity.unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned());
        for (name, value) in [("NAMESPACE", &namespace), ("VM_NAMESPACE", &vm_namespace)] {
            if !is_dns_label(value) {
                faults.push(format!("{PREFIX}{name} is {value:?}; it must be the name of a namespace: a DNS label"));
            }
        }
        let templates = given.templates.map(PathBuf::from);
        if let Some(folder) = templates.as_ref().filter(|folder| !folder.is_dir()) {
            faults.push(format!("{PREFIX}TEMPLATES is {}, which is not a folder", folder.display()));
        }
        let mut duration = |name: &str, text: Option<String>, default: Duration| {
            let Some(text) = text else { return default };
            match text
                .parse::<SignedDuration>()
                .ok()
                .and_then(|span| Duration::try_from(span).ok())
                .filter(|span| !span.is_zero())
            {
                Some(span) => span,
                None => {
                    faults.push(format!("{PREFIX}{name} is {text:?}; it must be a time such as 500ms, 5s or 10m"));
                    default
                }
            }
        };
        let poll_interval = duration("POLL_INTERVAL", given.poll_interval, Duration::from_secs(5));
        let resync_interval = duration("RESYNC_INTERVAL", given.resync_interval, Duration::from_secs(300));
        let orphan_grace = duration("ORPHAN_GRACE", given.orphan_grace, Duration::from_secs(3600));
        if orphan_grace < LEAST_ORPHAN_GRACE {
            faults.push(format!(
                "{PREFIX}ORPHAN_GRACE is {orphan_grace:?}; it must be at least {LEAST_ORPHAN_GRACE:?}: what went round the \
                 database's eyes may still come back"
            ));
        }
        let concurrency = match given.concurrency.as_deref().map(str::parse::<usize>) {
            None => 64,
            Some(Ok(number @ 4..=1000)) => number,
            Some(_) => {
                faults.push(format!("{PREFIX}CONCURRENCY must be a whole number from 4 to 1000"));
                64
            }
        };
        let max_unstarted = match given.max_unstarted.as_deref().map(str::parse::<usize>) {
            None => 100,
            Some(Ok(number @ 1..=100_000)) => number,
            Some(_) => {
                faults.push(format!("{PREFIX}MAX_UNSTARTED must be a whole number from 1 to 100000"));
                100
            }
        };
        let listen = given.listen.unwrap_or_else(|| "0.0.0.0:8080".to_owned());
        let listen = listen.parse::<SocketAddr>().map_err(|_| {
            faults.push(format!("{PREFIX}LISTEN is {listen:?}; it must be an address and a port such as 0.0.0.0:8080"));
        });
        let filter = given.log.unwrap_or_else(|| "info".to_owned());
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&filter) {
            faults.push(format!(
                "{PREFIX}LOG is {filter:?}; it must be a level or a filter such as info,kube=warn ({error})"
            ));
        }
        let format = match given.log_format.as_deref() {
            None => None,
            Some("json") => Some(Format::Json),
            Some("text") => Some(Format::Text),
            Some(other) => {
                faults.push(format!("{PREFIX}LOG_FORMAT is {other:?}; it must be json or text"));
                None
            }
        };
        match (database, listen) {
            (Ok(database), Ok(listen)) if faults.is_empty() => {
                let logging = Logging { filter, format };
                Ok((
                    Self {
                        database,
                        identity,
                        namespace,
                        vm_namespace,
                        templates,
                        poll_interval,
                        resync_interval,
                        orphan_grace,
                        concurrency,
                        max_unstarted,
                        listen,
                        logging,
                    },
                    warnings,
                ))
            }
            _ => Err(Faults(faults)),
        }
    }
}

fn unknown(variables: &[(String, String)]) -> Vec<String> {
    variables
        .iter()
        .filter_map(|(name, _)| name.strip_prefix(PREFIX))
        // Ours by another program: the testbed's own variables.
        .filter(|name| !NAMES.contains(name) && !name.starts_with("TESTBED"))
        .map(|name| {
            let nearest = NAMES.iter().min_by_key(|known| strsim::damerau_levenshtein(known, name)).unwrap_or(&"");
            format!("{PREFIX}{name} means nothing to this program; did you mean {PREFIX}{nearest}?")
        })
        .collect()
}

fn is_dns_label(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&text.len()) && text.chars().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<(Config, Vec<String>), Faults> {
        Config::read(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    const URL: (&str, &str) = ("DATABASE_URL", "postgres://u:p@localhost/postgres");

    #[test]
    fn a_url_is_all_that_is_needed() {
        let (config, warnings) = read(&[URL, ("CYBERDESK_LOG", "")]).expect("enough");
        assert_eq!((config.namespace.as_str(), config.vm_namespace.as_str()), ("cyberdesk-system", "cyberdesk-system"));
        assert_eq!(config.poll_interval, Duration::from_secs(5));
        assert_eq!(warnings, [""; 0]);
    }

    #[test]
    fn all_faults_are_told_at_once() {
        let faults = read(&[
            ("CYBERDESK_NAMESPACE", "Not A Label"),
            ("CYBERDESK_POLL_INTERVAL", "soon"),
            ("CYBERDESK_CONCURRENCY", "0"),
            ("CYBERDESK_LISTEN", "8080"),
            ("CYBERDESK_LOG_FORMAT", "xml"),
        ])
        .expect_err("faults")
        .to_string();
        for wanted in [
            "DATABASE_URL",
            "CYBERDESK_NAMESPACE",
            "CYBERDESK_POLL_INTERVAL",
            "CYBERDESK_CONCURRENCY",
            "CYBERDESK_LISTEN",
            "CYBERDESK_LOG_FORMAT",
        ] {
            assert!(faults.contains(wanted), "{wanted} is missing in: {faults}");
        }
    }

    #[test]
    fn supabases_api_is_not_mistaken_for_its_database() {
        let faults = read(&[("SUPABASE_URL", "https://x.supabase.co"), ("SUPABASE_KEY", "geheim")]);
        let faults = faults.expect_err("no database").to_string();
        assert!(faults.contains("DATABASE_URL is not set") && faults.contains("SUPABASE_KEY"), "{faults}");
        assert!(!faults.contains("geheim"), "{faults}");
        let (_, warnings) = read(&[URL, ("SUPABASE_KEY", "geheim")]).expect("enough");
        assert_eq!(warnings, [""; 0]);
    }

    #[test]
    fn a_transaction_pooler_is_warned_of_at_start() {
        let (_, warnings) = read(&[("DATABASE_URL", "postgres://u:p@h:6543/postgres")]).expect("a warning only");
        assert!(warnings.concat().contains("transaction pooler"), "{warnings:?}");
    }

    #[test]
    fn a_misspelt_variable_is_named_with_the_nearest_known_one() {
        let (_, warnings) = read(&[URL, ("CYBERDESK_NAMESPACES", "x")]).expect("a warning only");
        assert_eq!(warnings, ["CYBERDESK_NAMESPACES means nothing to this program; did you mean CYBERDESK_NAMESPACE?"]);
    }
}
