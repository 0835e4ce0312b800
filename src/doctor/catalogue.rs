//! Whether the schema is whole, as the catalogue tells anybody who asks.

use deadpool_postgres::Pool;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::database::{ROLE, faults, one, seen};
use super::{Check, Fault, Finding, Verdict, schema};
use crate::database::connect::query;
use crate::database::migrate::MIGRATIONS;

/// Brings all that belongs to the schema, if it was never there.
const MIGRATE: &str = "cyberdesk-operator migrate   # with DATABASE_URL of the schema's owner";

const MIGRATED: Check = Check::new("migrations", "this program and the schema must fit each other");
const TABLE: Check = Check::new("columns", "the app's statements and the write-back name these columns");
const TRIGGERS: Check =
    Check::new("triggers", "without them rows are written and nobody hears of it, or a desktop that ended comes back");
const OBJECTS: Check = Check::new("objects", "triggers, the daemon and the app call on all of them");
const GRANTS: Check =
    Check::new("grants", "the daemon's role needs its functions; with more, whoever steals its password can do more");
const INDEXES: Check =
    Check::new("indexes", "without them looking for work, and deleting a user, read all rows there ever were");
const ACCESS: Check = Check::new(
    "access",
    "row-level security and grants keep one user from the desktops of another, and let each at their own",
);
const REALTIME: Check = Check::new("realtime", "browsers hear of changes by this publication, and should hear no more");

/// Looks at all of it.
pub(super) async fn examine(pool: &Pool) -> Vec<Finding> {
    vec![
        seen(MIGRATED, migrations(pool).await),
        seen(TABLE, columns(pool).await),
        seen(TRIGGERS, triggers(pool).await),
        seen(OBJECTS, objects(pool).await),
        seen(INDEXES, indexes(pool).await),
        seen(GRANTS, grants(pool).await),
        seen(ACCESS, access(pool).await),
        seen(REALTIME, realtime(pool).await),
    ]
}

async fn migrations(pool: &Pool) -> anyhow::Result<Finding> {
    let answer = query(pool, "select version, name from cyberdesk.applied_migrations()", &[]).await;
    let rows = match answer {
        Err(error) if lacks_schema(&error) => {
            let found = "the schema is missing, or is older than this check".to_owned();
            return Ok(MIGRATED.finding(Verdict::Failure, found, vec![MIGRATE.to_owned()]));
        }
        answer => answer?,
    };
    let applied: Vec<String> = rows
        .iter()
        .map(|row| Ok(format!("{}_{}", row.try_get::<_, i64>(0)?, row.try_get::<_, String>(1)?)))
        .collect::<anyhow::Result<_>>()?;
    let known: Vec<String> = MIGRATIONS.iter().map(|(version, name, _)| format!("{version}_{name}")).collect();
    let missing = known.iter().filter(|name| !applied.contains(name));
    let missing = missing.map(|name| Fault::new(format!("{name} is not applied"), MIGRATE)).collect();
    let newer = applied.iter().filter(|name| !known.contains(name)).count();
    let beside = if newer > 0 { format!(", and {newer} of a newer release") } else { String::new() };
    Ok(MIGRATED.faults(Verdict::Failure, missing, format!("all {} are applied{beside}", known.len())))
}

fn lacks_schema(error: &anyhow::Error) -> bool {
    let codes = [SqlState::INVALID_SCHEMA_NAME, SqlState::UNDEFINED_FUNCTION, SqlState::UNDEFINED_TABLE];
    let database = error.chain().find_map(|cause| cause.downcast_ref::<tokio_postgres::Error>());
    database.and_then(tokio_postgres::Error::code).is_some_and(|code| codes.contains(code))
}

async fn columns(pool: &Pool) -> anyhow::Result<Finding> {
    let asked = "select a.attname::text, replace(format_type(a.atttypid, a.atttypmod), 'public.', '')
                   from pg_class c join pg_namespace n on n.oid = c.relnamespace
                   join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
                  where n.nspname = 'public' and c.relname = 'cyberdesk_instances'";
    let there: Vec<(String, String)> = query(pool, asked, &[])
        .await?
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<anyhow::Result<_>>()?;
    if there.is_empty() {
        let found = "there is no table public.cyberdesk_instances";
        return Ok(TABLE.finding(Verdict::Failure, found, vec![MIGRATE.to_owned()]));
    }
    let faults = schema::COLUMNS.iter().filter_map(|(name, wanted)| {
        let table = "alter table public.cyberdesk_instances";
        match there.iter().find(|(column, _)| column == name) {
            None => Some(Fault::new(format!("{name} is missing"), format!("{table} add column {name} {wanted};"))),
            Some((_, is)) if is != wanted => {
                let mend = format!("{table} alter column {name} type {wanted} using {name}::{wanted};");
                Some(Fault::new(format!("{name} is {is}, not {wanted}"), mend))
            }
            Some(_) => None,
        }
    });
    let whole = format!("all {} of public.cyberdesk_instances are as they should be", schema::COLUMNS.len());
    Ok(TABLE.faults(Verdict::Failure, faults.collect(), whole))
}

async fn triggers(pool: &Pool) -> anyhow::Result<Finding> {
    let asked = "select n.nspname || '.' || c.relname, t.tgname::text, t.tgenabled in ('O', 'A'),
                        n.nspname = 'public' and c.relname = 'cyberdesk_instances' and t.tgtype & 3 = 3
                   from pg_trigger t join pg_class c on c.oid = t.tgrelid join pg_namespace n on n.oid = c.relnamespace
                  where not t.tgisinternal";
    let there: Vec<(String, String, bool, bool)> = query(pool, asked, &[])
        .await?
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?)))
        .collect::<anyhow::Result<_>>()?;
    let declared = schema::triggers();
    let mut faults = vec![];
    for schema::Part { name, table, statement } in &declared {
        match there.iter().find(|(on, trigger, ..)| on == table && trigger == name) {
            None => faults.push(Fault::new(format!("{name} on {table} is missing"), format!("{statement};"))),
            Some((_, _, false, _)) => faults.push(Fault::new(
                format!("{name} on {table} is disabled"),
                format!("alter table {table} enable trigger {name};"),
            )),
            Some(_) => (),
        }
    }
    let guard = "zzzz_cyberdesk_guard";
    let ours = |name: &str| declared.iter().any(|part| part.name == name);
    for (_, later, ..) in there.iter().filter(|(_, name, _, first)| *first && name.as_str() > guard && !ours(name)) {
        faults.push(Fault::new(
            format!("{later} runs after {guard}, and can undo what it decides"),
            format!("alter trigger {later} on public.cyberdesk_instances rename to aa_{later};"),
        ));
    }
    Ok(TRIGGERS.faults(Verdict::Failure, faults, format!("all {} are there and enabled", declared.len())))
}

async fn objects(pool: &Pool) -> anyhow::Result<Finding> {
    let asked = "select n.nspname || '.' || o.name
                   from (select p.proname as name, p.pronamespace as schema from pg_proc p
                         union all
                         select c.relname, c.relnamespace from pg_class c where c.relkind in ('r', 'p', 'v')) o
                   join pg_namespace n on n.oid = o.schema
                  where n.nspname in ('cyberdesk', 'public')";
    let rows = query(pool, asked, &[]).await?;
    let there: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let declared = schema::objects();
    let missing = declared.iter().filter(|object| !there.contains(&object.name));
    let missing = missing.map(|object| Fault::new(format!("{} is missing", object.name), object.remedy.clone()));
    let whole = format!("all {} tables, views and functions are there", declared.len());
    Ok(OBJECTS.faults(Verdict::Failure, missing.collect(), whole))
}

async fn grants(pool: &Pool) -> anyhow::Result<Finding> {
    let needed = schema::granted_functions();
    let missing = faults(
        pool,
        "select format('%s may not execute %s', $2, p.signature), format('grant execute on function %s to %s;', p.signature, $2)
           from (select p.oid, 'cyberdesk.' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')' as signature
                   from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                  where n.nspname = 'cyberdesk' and p.proname = any ($1)) p
          where exists (select from pg_roles r where r.rolname = $2) and not has_function_privilege($2, p.oid, 'execute')
         union all
         select 'there is no role ' || $2, $3 where not exists (select from pg_roles r where r.rolname = $2)
         union all
         select $2 || ' may not use the schema cyberdesk', 'grant usage on schema cyberdesk to ' || $2 || ';'
           from pg_roles r, pg_namespace n
          where r.rolname = $2 and n.nspname = 'cyberdesk' and not has_schema_privilege(r.oid, n.oid, 'usage')",
        &[(&needed, Type::TEXT_ARRAY), (&ROLE, Type::TEXT), (&MIGRATE, Type::TEXT)],
    )
    .await?;
    if !missing.is_empty() {
        return Ok(GRANTS.faults(Verdict::Failure, missing, ""));
    }
    let too_many = faults(
        pool,
        "select format('%s may also execute %s', r.rolname, p.signature),
                format('revoke execute on function %s from public, %s;', p.signature, r.rolname)
           from pg_roles r,
                (select p.oid, p.proname, 'cyberdesk.' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')' as signature
                   from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname = 'cyberdesk') p
          where r.rolname = $2 and p.proname <> all ($1) and has_function_privilege(r.oid, p.oid, 'execute')
         union all
         select format('%s may also touch %I.%I', r.rolname, n.nspname, c.relname),
                format('revoke all on table %I.%I from public, %s;', n.nspname, c.relname, r.rolname)
           from pg_roles r, pg_class c join pg_namespace n on n.oid = c.relnamespace
          where r.rolname = $2 and c.relkind in ('r', 'p', 'v', 'm')
            and (n.nspname = 'cyberdesk' or (n.nspname = 'public' and c.relname = 'cyberdesk_instances'))
            and has_table_privilege(r.oid, c.oid, 'select, insert, update, delete, truncate, references, trigger')
         union all
         select format('%s is more than an ordinary role', r.rolname),
                format('alter role %s nosuperuser nocreatedb nocreaterole noreplication nobypassrls;', r.rolname)
           from pg_roles r
          where r.rolname = $2 and (r.rolsuper or r.rolcreatedb or r.rolcreaterole or r.rolreplication or r.rolbypassrls)
         union all
         select format('%s belongs to %I', r.rolname, g.rolname), format('revoke %I from %s;', g.rolname, r.rolname)
           from pg_roles r join pg_auth_members m on m.member = r.oid join pg_roles g on g.oid = m.roleid
          where r.rolname = $2",
        &[(&needed, Type::TEXT_ARRAY), (&ROLE, Type::TEXT)],
    )
    .await?;
    let exact = format!("{ROLE} may execute its {} functions and nothing else", needed.len());
    Ok(GRANTS.faults(Verdict::Warning, too_many, exact))
}

/// Who may do what through the API: the role, the verb, the relation, and whether it must be able to.
const ACCESS_MATRIX: &str = "
    ('anon', 'select', 'cyberdesk_instances', false), ('anon', 'insert', 'cyberdesk_instances', false),
    ('anon', 'update', 'cyberdesk_instances', false), ('anon', 'delete', 'cyberdesk_instances', false),
    ('anon', 'select', 'cyberdesk_desktop_history', false),
    ('authenticated', 'select', 'cyberdesk_instances', true), ('authenticated', 'update', 'cyberdesk_instances', false),
    ('authenticated', 'delete', 'cyberdesk_instances', false), ('authenticated', 'truncate', 'cyberdesk_instances', false),
    ('authenticated', 'select', 'cyberdesk_desktop_history', true),
    ('authenticated', 'insert', 'cyberdesk_desktop_history', false),
    ('authenticated', 'update', 'cyberdesk_desktop_history', false),
    ('authenticated', 'delete', 'cyberdesk_desktop_history', false),
    ('service_role', 'select', 'cyberdesk_instances', true), ('service_role', 'insert', 'cyberdesk_instances', true),
    ('service_role', 'update', 'cyberdesk_instances', true), ('service_role', 'delete', 'cyberdesk_instances', true),
    ('service_role', 'select', 'cyberdesk_desktop_history', true)";

async fn access(pool: &Pool) -> anyhow::Result<Finding> {
    let functions: Vec<String> = schema::objects()
        .into_iter()
        .filter(|object| object.is_function)
        .filter_map(|object| object.name.strip_prefix("public.").map(str::to_owned))
        .collect();
    let policies = schema::policies();
    let column = |of: fn(&schema::Part) -> &'static str| policies.iter().map(of).collect::<Vec<&str>>();
    let faults = faults(
        pool,
        &format!(
            "with public as (
               select c.oid, c.relname, c.relrowsecurity from pg_class c join pg_namespace n on n.oid = c.relnamespace
                where n.nspname = 'public')
             select 'row-level security is off for public.cyberdesk_instances',
                    'alter table public.cyberdesk_instances enable row level security;'
               from public where relname = 'cyberdesk_instances' and not relrowsecurity
             union all
             select format('policy %s on %s is missing', w.name, w.relation), w.statement || ';'
               from unnest($2::text[], $3::text[], $4::text[]) as w (name, relation, statement)
              where not exists (
                 select from pg_policies p where p.policyname = w.name and p.schemaname || '.' || p.tablename = w.relation)
             union all
             select format('%s may%s %s %I', r.rolname, case when m.must then ' not' end, m.verb, public.relname),
                    format(case when m.must then 'grant %s on table public.%I to %s;' else 'revoke %s on table public.%I from public, %s;' end,
                           m.verb, public.relname, r.rolname)
               from (values {ACCESS_MATRIX}) as m (role, verb, relation, must)
               join pg_roles r on r.rolname = m.role join public on public.relname = m.relation
              where has_table_privilege(r.oid, public.oid, m.verb) <> m.must
             union all
             select format('%s may%s call %s', r.rolname, case when m.must then ' not' end, f.signature),
                    format(case when m.must then 'grant execute on function %s to %s;' else 'revoke execute on function %s from public, %s;' end,
                           f.signature, r.rolname)
               from (values ('anon', false), ('authenticated', true), ('service_role', true)) as m (role, must)
               join pg_roles r on r.rolname = m.role,
                    (select p.oid, 'public.' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')' as signature
                       from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                      where n.nspname = 'public' and p.proname = any ($1)) f
              where has_function_privilege(r.oid, f.oid, 'execute') <> m.must"
        ),
        &[
            (&functions, Type::TEXT_ARRAY),
            (&column(|policy| policy.name), Type::TEXT_ARRAY),
            (&column(|policy| policy.table), Type::TEXT_ARRAY),
            (&column(|policy| policy.statement), Type::TEXT_ARRAY),
        ],
    )
    .await?;
    Ok(ACCESS.faults(Verdict::Failure, faults, "owners read and end their own desktops, anonymous visitors see none"))
}

async fn indexes(pool: &Pool) -> anyhow::Result<Finding> {
    let asked = "select c.relname::text from pg_index i join pg_class c on c.oid = i.indexrelid
                   join pg_namespace n on n.oid = c.relnamespace
                  where n.nspname in ('cyberdesk', 'public') and i.indisvalid";
    let rows = query(pool, asked, &[]).await?;
    let there: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let declared = schema::indexes();
    let missing = declared.iter().filter(|index| !there.iter().any(|name| name == index.name));
    let missing =
        missing.map(|index| Fault::new(format!("{} is missing", index.name), format!("{};", index.statement)));
    Ok(INDEXES.faults(Verdict::Warning, missing.collect(), format!("all {} are there", declared.len())))
}

async fn realtime(pool: &Pool) -> anyhow::Result<Finding> {
    let there = "select exists (select from pg_publication where pubname = 'supabase_realtime')";
    if !one(pool, there, &[]).await?.try_get(0)? {
        return Ok(REALTIME.ok("there is no publication supabase_realtime: no Realtime here"));
    }
    let faults = faults(
        pool,
        "select 'public.cyberdesk_instances is not in supabase_realtime',
                'alter publication supabase_realtime add table public.cyberdesk_instances;'
          where not exists (select from pg_publication_tables t where t.pubname = 'supabase_realtime'
                              and t.schemaname = 'public' and t.tablename = 'cyberdesk_instances')
         union all
         select format('%I.%I is in %s: every step of bookkeeping is sent out', t.schemaname, t.tablename, t.pubname),
                format('alter publication %I drop table %I.%I;', t.pubname, t.schemaname, t.tablename)
           from pg_publication_tables t where t.pubname = 'supabase_realtime' and t.schemaname = 'cyberdesk'",
        &[],
    )
    .await?;
    Ok(REALTIME.faults(Verdict::Warning, faults, "the app's table is in supabase_realtime, bookkeeping is not"))
}
