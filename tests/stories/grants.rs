//! Least privilege, told by what happened: what the manifests and the migrations grant to the daemon, and no story
//! ever had it use, is too much. Only all stories together can tell.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use cyberdesk_testbed::postgres::SUPERUSER;
use cyberdesk_testbed::{Database, Testbed};
use kube::api::DynamicObject;
use serde::Deserialize;

use crate::account::ACCOUNT;
use crate::manifests;

/// The daemon's role in the database.
const ROLE: &str = "cyberdesk_daemon";

/// Granted, and in no story used: each with the reason why it stays.
const KEPT: [(&str, &str); 1] = [(
    "get cyberdesks.cyberdesk.io",
    "asked when a write meets another CR of that name than the cache knew: a race that no story can call up at will",
)];

/// What an audited API server writes down of one request, as far as it matters here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Asked {
    verb: String,
    user: User,
    object_ref: Option<Object>,
    #[serde(default)]
    annotations: Decision,
}

#[derive(Deserialize)]
struct User {
    username: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct Object {
    api_group: String,
    resource: String,
    subresource: String,
    name: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Decision {
    #[serde(rename = "authorization.k8s.io/decision")]
    authorization: String,
}

/// One verb on one kind; an empty name stands for all names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    group: String,
    resource: String,
    name: String,
    verb: String,
}

impl Right {
    fn covers(&self, used: &Self) -> bool {
        self.is_alike(used) && (self.name.is_empty() || self.name == used.name)
    }

    /// The same but for the object's name.
    fn is_alike(&self, other: &Self) -> bool {
        (&self.group, &self.resource, &self.verb) == (&other.group, &other.resource, &other.verb)
    }
}

impl std::fmt::Display for Right {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dot = if self.group.is_empty() { "" } else { "." };
        write!(f, "{} {}{dot}{}", self.verb, self.resource, self.group)?;
        if self.name.is_empty() { Ok(()) } else { write!(f, " {}", self.name) }
    }
}

/// What the Roles of `deploy/` grant is what the daemons of all stories asked for, and no less.
pub(crate) fn of_the_cluster(testbed: &Testbed) -> Result<()> {
    let mut used = BTreeSet::new();
    let mut refused = BTreeSet::new();
    let log = std::fs::read_to_string(testbed.control_plane.audit_log())?;
    // The last line may be on its way.
    for line in log.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let asked: Asked = serde_json::from_str(line)?;
        let is_ours = asked.user.username.rsplit(':').next() == Some(ACCOUNT);
        let Some(object) = asked.object_ref.filter(|object| is_ours && !object.resource.is_empty()) else { continue };
        let resource = match object.subresource.as_str() {
            "" => object.resource,
            subresource => format!("{}/{subresource}", object.resource),
        };
        let right = Right { group: object.api_group, resource, name: object.name, verb: asked.verb };
        let list = if asked.annotations.authorization == "forbid" { &mut refused } else { &mut used };
        list.insert(right);
    }
    let granted = granted(&manifests::objects("deploy", "any")?);
    ensure!(!granted.is_empty() && !used.is_empty(), "{} rights, {} uses", granted.len(), used.len());

    let unused = |right: &&Right| !used.iter().any(|used| right.covers(used));
    let unused = granted.iter().filter(unused).map(Right::to_string).filter(|right| !is_kept(right));
    let unused: Vec<String> = unused.collect();
    ensure!(unused.is_empty(), "deploy/rbac.yaml grants what no story used:\n  {}", unused.join("\n  "));
    // A template may name a Secret that the Role does not. And what is granted may be refused for a moment, while the
    // API server has yet to hear of a new Role.
    let missing = |right: &&Right| !granted.iter().any(|granted| granted.is_alike(right));
    let missing: Vec<String> = refused.iter().filter(missing).map(Right::to_string).collect();
    ensure!(
        missing.is_empty(),
        "the daemon asked for what deploy/rbac.yaml does not grant:\n  {}",
        missing.join("\n  ")
    );
    Ok(())
}

fn granted(objects: &[DynamicObject]) -> BTreeSet<Right> {
    let mut granted = BTreeSet::new();
    let words = |value: &serde_json::Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|word| word.as_str().map(str::to_owned)).collect()
    };
    for rule in objects.iter().filter_map(|object| object.data["rules"].as_array()).flatten() {
        let names = words(&rule["resourceNames"]);
        let names = if names.is_empty() { vec![String::new()] } else { names };
        for group in words(&rule["apiGroups"]) {
            for resource in words(&rule["resources"]) {
                for name in &names {
                    let (group, resource, name) = (&group, &resource, name.clone());
                    granted.extend(words(&rule["verbs"]).into_iter().map(|verb| Right {
                        group: group.clone(),
                        resource: resource.clone(),
                        name: name.clone(),
                        verb,
                    }));
                }
            }
        }
    }
    granted
}

fn is_kept(right: &str) -> bool {
    KEPT.iter().any(|(kept, _)| *kept == right)
}

/// The functions that the daemon's role may call: those of our schema.
pub(crate) async fn functions_of(database: &Database) -> Result<BTreeSet<String>> {
    let granted = "select p.proname::text from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                    where n.nspname = 'cyberdesk' and has_function_privilege($1, p.oid, 'execute')";
    names(database, granted, &[&ROLE]).await
}

/// Those of them that were called in this database, as far as its sessions have told yet: they do so every second.
pub(crate) async fn called_in(database: &Database) -> Result<BTreeSet<String>> {
    let called = "select funcname::text from pg_stat_user_functions where schemaname = 'cyberdesk' and calls > 0";
    names(database, called, &[]).await
}

async fn names(
    database: &Database,
    statement: &str,
    parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
) -> Result<BTreeSet<String>> {
    let client = database.connect_as(SUPERUSER).await?;
    Ok(client.query(statement, parameters).await?.iter().map(|row| row.get(0)).collect())
}

/// What the daemon's role may call is what the daemons of all stories had called.
pub(crate) async fn of_the_database(testbed: &Testbed, called: &BTreeSet<String>) -> Result<()> {
    let granted = functions_of(&testbed.postgres.database().await?).await?;
    let unused: Vec<&String> =
        granted.iter().filter(|function| !called.contains(*function) && !is_kept(function)).collect();
    ensure!(!granted.is_empty() && !called.is_empty(), "{} functions, {} called", granted.len(), called.len());
    ensure!(unused.is_empty(), "{ROLE} may call what no daemon called in any story: {unused:?}");
    Ok(())
}
