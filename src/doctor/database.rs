//! The database's half: the way there, whether notifications arrive, clocks, limits, and (in [`catalogue`]) the schema.
//!
//! It is looked at under the daemon's own role, which may read the catalogue and little else. Each check asks for its
//! facts in one statement; what follows from them is decided here.

use std::sync::Arc;

use anyhow::{Context, bail};
use deadpool_postgres::Pool;
use jiff::{SignedDuration, Timestamp};
use tokio_postgres::Row;
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::types::Type;

use super::{Check, Fault, Finding, Verdict, catalogue};
use crate::database::connect::{Param, Route, Target, query};
use crate::database::listen::{Ear, Wakeups};
use crate::telemetry::chain;

/// Whom the daemon connects as.
pub(super) const ROLE: &str = "cyberdesk_daemon";
/// The oldest server that the schema applies to.
const OLDEST_SERVER: i32 = 150_000;
/// Clocks further apart than this make logs hard to read side by side. Nothing is decided by this machine's.
const SKEW: SignedDuration = SignedDuration::from_secs(2);
/// Connections that a replica takes.
const CONNECTIONS: i64 = 4;

const WAY: Check =
    Check::new("database-url", "the way decides whether changes are heard at once, and who can listen in");
const CONNECTION: Check = Check::new(
    "connection",
    "without the database no row is served; desktops that run go on, and end at their deadline",
);
const TLS: Check = Check::new("tls", "in plain text anybody on the way reads and changes what is sent");
const NOTIFICATIONS: Check =
    Check::new("notifications", "without them a change is seen within a second instead of at once");
const ROLE_SETTINGS: Check =
    Check::new("role-settings", "they keep the daemon from holding up the app, and times in UTC");
const CLOCK: Check = Check::new("clock", "deadlines follow the database's clock; logs here follow this machine's");
const CAPACITY: Check = Check::new("connections", "each replica takes up to four; where none is left it waits");

/// Looks at all of it. Where there is no connection, the rest is left out.
pub(super) async fn examine(target: &Target) -> Vec<Finding> {
    let mut findings = vec![way(target)];
    let pool = match target.pool(&Default::default()) {
        Ok(pool) => pool,
        Err(error) => return [findings, vec![CONNECTION.unseen(format!("{error:#}"))]].concat(),
    };
    match connection(&pool).await {
        Ok(found) => findings.push(found),
        Err(error) => {
            findings.push(CONNECTION.finding(Verdict::Failure, chain(error.as_ref()).to_string(), vec![]));
            return findings;
        }
    }
    findings.push(seen(TLS, tls(&pool, target).await));
    findings.push(notifications(&pool, target).await);
    findings.extend(catalogue::examine(&pool).await);
    findings.push(seen(ROLE_SETTINGS, role_settings(&pool).await));
    findings.push(seen(CLOCK, clock(&pool).await));
    findings.push(seen(CAPACITY, capacity(&pool).await));
    findings
}

pub(super) fn seen(check: Check, looked: anyhow::Result<Finding>) -> Finding {
    looked.unwrap_or_else(|error| check.unseen(format!("it cannot be looked at: {}", chain(error.as_ref()))))
}

pub(super) async fn one(pool: &Pool, statement: &str, params: &[Param<'_>]) -> anyhow::Result<Row> {
    query(pool, statement, params).await?.into_iter().next().context("the database gave no answer")
}

/// Rows of a fault and the line that mends it, as a statement makes them out.
pub(super) async fn faults(pool: &Pool, statement: &str, params: &[Param<'_>]) -> anyhow::Result<Vec<Fault>> {
    let rows = query(pool, statement, params).await?;
    rows.iter().map(|row| Ok(Fault { found: row.try_get(0)?, mend: row.try_get(1)? })).collect()
}

fn way(target: &Target) -> Finding {
    let config = target.config();
    let hosts: Vec<String> = config
        .get_hosts()
        .iter()
        .zip(config.get_ports().iter().chain(std::iter::repeat(&5432)))
        .map(|(host, port)| match host {
            Host::Tcp(name) if name.contains(':') => format!("[{name}]:{port}"),
            Host::Tcp(name) => format!("{name}:{port}"),
            Host::Unix(path) => format!("{}:{port}", path.display()),
        })
        .collect();
    let way = match target.route() {
        Route::Direct => "directly",
        Route::SessionPooler => "through a session pooler",
        Route::TransactionPooler => "through a transaction pooler",
    };
    let user = config.get_user().unwrap_or_default();
    let mut told = vec![format!("{way} to {} as {user}", hosts.join(", "))];
    if target.route() == Route::Direct && hosts.iter().any(|host| host.contains(".supabase.co:")) {
        told[0].push_str(", which has an IPv6 address only, unless the project has the IPv4 add-on");
    }
    told.extend_from_slice(target.warnings());
    if user.split('.').next() != Some(ROLE) {
        told.push(format!("the daemon needs no more than the role {ROLE}"));
    }
    match told.len() {
        1 => WAY.ok(told.concat()),
        _ => WAY.finding(Verdict::Warning, told.join("; "), vec![]),
    }
}

async fn connection(pool: &Pool) -> anyhow::Result<Finding> {
    let asked = "select current_setting('server_version_num')::int, current_setting('server_version'),
                        session_user::text, current_database()::text, pg_is_in_recovery()
                          or current_setting('transaction_read_only')::boolean";
    let row = one(pool, asked, &[]).await?;
    let (number, version, user): (i32, String, String) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let database: String = row.try_get(3)?;
    if row.try_get(4)? {
        bail!("the server takes no writes: it is a standby, or was made read-only");
    }
    if number < OLDEST_SERVER {
        bail!("PostgreSQL {version} is too old; 15 is the oldest that this program works with");
    }
    Ok(CONNECTION.ok(format!("PostgreSQL {version} lets {user} into {database}")))
}

async fn tls(pool: &Pool, target: &Target) -> anyhow::Result<Finding> {
    let is_here = target.is_here();
    if target.config().get_ssl_mode() == SslMode::Disable {
        return Ok(match is_here {
            true => TLS.ok("none, to this machine"),
            false => TLS.finding(
                Verdict::Warning,
                "none, as DATABASE_URL has sslmode=disable",
                vec!["take sslmode=disable out of DATABASE_URL".to_owned()],
            ),
        });
    }
    let row = one(pool, "select s.version, s.cipher from pg_stat_ssl s where s.pid = pg_backend_pid()", &[]).await?;
    let at_the_server = match (row.try_get::<_, Option<String>>(0)?, target.route()) {
        (Some(version), Route::Direct) => version,
        // What the server sees is the pooler's connection.
        (Some(version), _) => format!("up to the pooler, and {version} from there"),
        (None, _) => "up to a pooler, and none from there to the server".to_owned(),
    };
    Ok(TLS.ok(format!("certificate and host name are verified: {at_the_server}")))
}

async fn notifications(pool: &Pool, target: &Target) -> Finding {
    let proven = async { Ear::open(target, Arc::new(Wakeups::default())).await?.prove(pool).await };
    match proven.await {
        Ok(took) => NOTIFICATIONS.ok(format!("a heartbeat arrived after {:.1} ms", took.as_secs_f64() * 1e3)),
        Err(error) => NOTIFICATIONS.finding(Verdict::Warning, chain(error.as_ref()).to_string(), vec![]),
    }
}

async fn role_settings(pool: &Pool) -> anyhow::Result<Finding> {
    // The role's own, for it may be another that looks; what the session has is the role's, or was set over it.
    let faults = faults(
        pool,
        "with wanted (name, value) as (
           values ('statement_timeout', '10s'), ('lock_timeout', '400ms'),
                  ('idle_in_transaction_session_timeout', '15s'), ('TimeZone', 'UTC'), ('search_path', '\"\"')),
         given as (
           select w.name, w.value,
                  case when session_user = $1 then current_setting(w.name) else
                    (select split_part(c, '=', 2) from pg_roles r, unnest(r.rolconfig) c
                      where r.rolname = $1 and lower(split_part(c, '=', 1)) = lower(w.name)) end as has
             from wanted w)
         select format('%s is %s, not %s', g.name, coalesce(g.has, 'not set'), g.value),
                format('alter role %s set %s = %s;', $1, lower(g.name), case g.name when 'search_path' then '''''' else quote_literal(g.value) end)
           from given g where lower(g.has) is distinct from lower(g.value)",
        &[(&ROLE, Type::TEXT)],
    )
    .await?;
    Ok(ROLE_SETTINGS.faults(Verdict::Warning, faults, format!("time limits, time zone and search path of {ROLE}")))
}

#[expect(clippy::disallowed_methods, reason = "this machine's clock is what is looked at, and judges nothing")]
async fn clock(pool: &Pool) -> anyhow::Result<Finding> {
    let asked = Timestamp::now();
    let there: Timestamp = one(pool, "select clock_timestamp()", &[]).await?.try_get(0)?;
    Ok(compare_clocks(asked, there, Timestamp::now()))
}

/// The database read its clock at some time between these two of ours: a slow answer tells little.
fn compare_clocks(asked: Timestamp, there: Timestamp, answered: Timestamp) -> Finding {
    let half = asked.duration_until(answered) / 2;
    let skew = asked.duration_until(there) - half;
    let found = format!(
        "the database is {:.3} s {} this machine",
        skew.unsigned_abs().as_secs_f64(),
        if skew.is_negative() { "behind" } else { "ahead of" }
    );
    if skew.abs() > SKEW.max(half) {
        CLOCK.finding(Verdict::Warning, found, vec!["timedatectl set-ntp true".to_owned()])
    } else {
        CLOCK.ok(found)
    }
}

async fn capacity(pool: &Pool) -> anyhow::Result<Finding> {
    // Of others' sessions an ordinary role sees little more than that they are there, and where.
    let asked = "select (select count(*) from pg_stat_activity where usename = $1),
                        (select rolconnlimit from pg_roles where rolname = $1)::bigint,
                        (select count(*) from pg_stat_activity where datname is not null),
                        current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint";
    let row = one(pool, asked, &[(&ROLE, Type::TEXT)]).await?;
    let (ours, limit): (i64, Option<i64>) = (row.try_get(0)?, row.try_get(1)?);
    let (all, most): (i64, i64) = (row.try_get(2)?, row.try_get(3)?);
    let limit = limit.filter(|limit| *limit >= 0).unwrap_or(most);
    let found = format!("{ROLE} has {ours} of {limit}, all together {all} of {most}");
    Ok(if limit - ours < CONNECTIONS {
        CAPACITY.finding(Verdict::Warning, found, vec![format!("alter role {ROLE} connection limit 20;")])
    } else if most - all < CONNECTIONS {
        CAPACITY.finding(Verdict::Warning, found, vec![])
    } else {
        CAPACITY.ok(found)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_compared_as_far_as_the_answer_was_quick() {
        let at = |seconds: i64| Timestamp::from_second(1_700_000_000 + seconds).expect("a time");
        for (answered, there, verdict, found) in [
            (0, 1, Verdict::Ok, "1.000 s ahead of"),
            (0, 3, Verdict::Warning, "3.000 s ahead of"),
            (0, -3, Verdict::Warning, "3.000 s behind"),
            (10, 9, Verdict::Ok, "4.000 s ahead of"),
            (10, 11, Verdict::Warning, "6.000 s ahead of"),
        ] {
            let finding = compare_clocks(at(0), at(there), at(answered));
            assert_eq!(finding.verdict, verdict, "{finding:?}");
            assert!(finding.found.contains(found), "{finding:?}");
        }
    }
}
