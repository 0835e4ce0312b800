//! What the migrations declare, read from their own text: there is no second list to keep.

use crate::database::migrate::MIGRATIONS;

/// Columns of `public.cyberdesk_instances`: name and type. The first seven are the app's; see `sql/README.md`.
pub(super) const COLUMNS: [(&str, &str); 13] = [
    ("id", "uuid"),
    ("user_id", "uuid"),
    ("created_at", "timestamp without time zone"),
    ("updated_at", "timestamp without time zone"),
    ("status", "instance_status"),
    ("timeout_at", "timestamp without time zone"),
    ("stream_url", "character varying(1024)"),
    ("reason", "text"),
    ("message", "text"),
    ("shutdown_requested_at", "timestamp with time zone"),
    ("ended_at", "timestamp with time zone"),
    ("params", "jsonb"),
    ("warned_at", "timestamp with time zone"),
];

/// What belongs to a table, and is made by a statement of its own.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) name: &'static str,
    /// With its schema.
    pub(super) table: &'static str,
    /// What makes it.
    pub(super) statement: &'static str,
}

/// Every trigger that the migrations make, and do not drop again.
pub(super) fn triggers() -> Vec<Part> {
    parts("trigger", &["or", "replace", "constraint"])
}

/// Every index that the migrations make, and do not drop again.
pub(super) fn indexes() -> Vec<Part> {
    parts("index", &["unique"])
}

/// Every policy that the migrations make.
pub(super) fn policies() -> Vec<Part> {
    parts("policy", &[])
}

/// `create [QUALIFIER…] KIND [concurrently] [if not exists] NAME … on TABLE …;`, by the last text of each, and
/// `drop KIND NAME on TABLE;`, or of an index `drop index SCHEMA.NAME;`
fn parts(kind: &str, qualifiers: &[&str]) -> Vec<Part> {
    let mut parts: Vec<Part> = vec![];
    for (_, _, text) in MIGRATIONS {
        let mut verbs: Vec<_> = text.match_indices("create ").chain(text.match_indices("drop ")).collect();
        verbs.sort_unstable();
        for (begins, verb) in verbs {
            let statement = text[begins..].split(';').next().unwrap_or_default();
            let mut words = statement.split_whitespace().skip(1).skip_while(|word| qualifiers.contains(word));
            if words.next() != Some(kind) {
                continue;
            }
            let name = words.find(|word| !["concurrently", "if", "not", "exists"].contains(word));
            let Some(name) = name.and_then(|name| name.rsplit('.').next()) else { continue };
            let table = words.skip_while(|word| *word != "on").nth(1);
            parts.retain(|known| known.name != name || table.is_some_and(|table| known.table != table));
            if let ("create ", Some(table)) = (verb, table) {
                parts.push(Part { name, table, statement });
            }
        }
    }
    parts
}

/// A table, view or function.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Object {
    /// With its schema.
    pub(super) name: String,
    pub(super) is_function: bool,
    /// What makes it: the statement itself, or for a function where it is to be found.
    pub(super) remedy: String,
}

/// Every table, view and function that the migrations make, by the last text of each; but the app's own table.
pub(super) fn objects() -> Vec<Object> {
    let mut objects: Vec<Object> = vec![];
    for (version, migration, text) in MIGRATIONS {
        for (kind, schema) in
            ["table", "view", "function"].iter().flat_map(|kind| [(kind, "cyberdesk"), (kind, "public")])
        {
            for prefix in [format!("create {kind} {schema}."), format!("create or replace {kind} {schema}.")] {
                for (begins, _) in text.match_indices(&prefix) {
                    let rest = &text[begins..];
                    let name = rest[prefix.len()..].split(|c: char| !c.is_ascii_lowercase() && c != '_').next();
                    let name = format!("{schema}.{}", name.unwrap_or_default());
                    let remedy = match *kind {
                        "function" => {
                            format!("-- run the statement that creates {name} in sql/{version}_{migration}.sql")
                        }
                        _ => format!("{};", rest.split(';').next().unwrap_or_default()),
                    };
                    objects.retain(|known| known.name != name);
                    objects.push(Object { name, is_function: *kind == "function", remedy });
                }
            }
        }
    }
    objects
}

/// The functions of the private schema that the daemon's role is granted, by name.
pub(super) fn granted_functions() -> Vec<&'static str> {
    let mut granted = vec![];
    for (_, _, text) in MIGRATIONS {
        for before in text.split("to cyberdesk_daemon;") {
            let Some((_, names)) = before.rsplit_once("grant execute on function") else { continue };
            // A later grant, to another role, has its own semicolon.
            if names.contains(';') {
                continue;
            }
            granted.extend(names.split("cyberdesk.").skip(1).filter_map(|name| name.split('(').next()));
        }
    }
    granted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declarations_are_read_from_the_migrations() {
        let triggers = triggers();
        let guard = triggers.iter().find(|trigger| trigger.name == "zzzz_cyberdesk_guard").expect("the guard");
        assert_eq!(guard.table, "public.cyberdesk_instances");
        assert!(guard.statement.contains(" before update on "), "the last of its texts: {}", guard.statement);
        assert!(guard.statement.ends_with("execute function cyberdesk.guard()"), "{}", guard.statement);
        assert!(triggers.iter().all(|trigger| trigger.name != "zzzz_cyberdesk_inserted"), "it was dropped");
        assert!(triggers.iter().any(|trigger| trigger.name == "wake_on_new_work"));
        assert!(indexes().iter().any(|index| index.name == "cyberdesk_instances_not_over_idx"), "{:?}", indexes());
        assert!(indexes().iter().all(|index| index.name != "desktop_not_over_idx"), "it was dropped");
        assert!(policies().iter().any(|policy| policy.name == "cyberdesk_owners_read"), "{:?}", policies());
        let objects = objects();
        let remedy =
            |name: &str| objects.iter().find(|object| object.name == name).map(|object| object.remedy.as_str());
        assert!(remedy("cyberdesk.wake").is_some_and(|remedy| remedy.ends_with("_triggers.sql")), "{objects:?}");
        assert!(
            remedy("cyberdesk.first_state").is_some_and(|remedy| remedy.contains("view cyberdesk.first_state as")),
            "{objects:?}"
        );
        assert!(remedy("cyberdesk.fence").is_some(), "{objects:?}");
        let granted = granted_functions();
        assert!(granted.contains(&"acquire") && granted.contains(&"reconcile_projection"), "{granted:?}");
        assert!(!granted.contains(&"guard") && !granted.contains(&"stop"), "{granted:?}");
    }
}
