//! Who may do what: one written matrix, compared with what the database grants and with what it does.

use anyhow::Result;
use cyberdesk_testbed::{Caller, Postgres};

use super::Story;
use super::fixture::{Fixture, code};

pub(super) const STORIES: &[Story] = &[
    ("each role may do what is written here, and no more", |p| Box::pin(matrix(p))),
    ("the operator's role can touch nothing but its functions", |p| Box::pin(operator_role(p))),
    ("browser users can write nothing", |p| Box::pin(browsers(p))),
    ("functions are safe from whoever calls them", |p| Box::pin(functions(p))),
];

const ROLES: [&str; 4] = ["anon", "authenticated", "service_role", "cyberdesk_daemon"];

async fn matrix(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let granted = fixture
        .app
        .query(
            "select r.role || ' ' || what from unnest($1::text[]) as r (role), lateral (
               select lower(verb) || ' ' || c.oid::regclass as what
                 from pg_class c, unnest(array['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) as v (verb)
                where (c.relnamespace = 'cyberdesk'::regnamespace or starts_with(c.relname, 'cyberdesk_')) and c.relkind in ('r', 'v')
                  and has_table_privilege(r.role, c.oid, verb)
               union all
               select 'execute ' || p.oid::regproc from pg_proc p
                where p.pronamespace in ('cyberdesk'::regnamespace, 'public'::regnamespace)
                  and has_function_privilege(r.role, p.oid, 'EXECUTE')
               union all
               select lower(verb) || ' schema cyberdesk' from unnest(array['USAGE', 'CREATE']) as v (verb)
                where has_schema_privilege(r.role, 'cyberdesk', verb)
             ) as g",
            &[&ROLES.as_slice()],
        )
        .await?;
    let mut granted: Vec<String> = granted.iter().map(|row| row.get(0)).collect();
    granted.sort();
    assert_eq!(
        granted,
        [
            "authenticated execute cyberdesk.request_shutdown",
            "authenticated execute cyberdesk.request_shutdown_all",
            "authenticated execute cyberdesk.service_state",
            "authenticated execute cyberdesk.set_desktop_timeout",
            "authenticated execute cyberdesk.touch_desktop",
            "authenticated execute desktop_service_state",
            "authenticated execute extend_desktop",
            "authenticated execute request_shutdown",
            "authenticated execute request_shutdown_all",
            "authenticated execute set_desktop_timeout",
            "authenticated execute touch_desktop",
            "authenticated select cyberdesk.history",
            "authenticated select cyberdesk_desktop_history",
            "authenticated select cyberdesk_instances",
            "authenticated usage schema cyberdesk",
            "cyberdesk_daemon execute cyberdesk.\"trim\"",
            "cyberdesk_daemon execute cyberdesk.acquire",
            "cyberdesk_daemon execute cyberdesk.desktops_by_id",
            "cyberdesk_daemon execute cyberdesk.dirty_desktops",
            "cyberdesk_daemon execute cyberdesk.expire",
            "cyberdesk_daemon execute cyberdesk.fence_epoch",
            "cyberdesk_daemon execute cyberdesk.identity",
            "cyberdesk_daemon execute cyberdesk.live_desktops",
            "cyberdesk_daemon execute cyberdesk.paused",
            "cyberdesk_daemon execute cyberdesk.reconcile_projection",
            "cyberdesk_daemon execute cyberdesk.report",
            "cyberdesk_daemon execute cyberdesk.sign_of_life",
            "cyberdesk_daemon execute cyberdesk.warn",
            "cyberdesk_daemon usage schema cyberdesk",
            "service_role delete cyberdesk_instances",
            "service_role execute cyberdesk.request_shutdown",
            "service_role execute cyberdesk.request_shutdown_all",
            "service_role execute cyberdesk.service_state",
            "service_role execute cyberdesk.set_desktop_timeout",
            "service_role execute cyberdesk.touch_desktop",
            "service_role execute desktop_service_state",
            "service_role execute extend_desktop",
            "service_role execute request_shutdown",
            "service_role execute request_shutdown_all",
            "service_role execute set_desktop_timeout",
            "service_role execute touch_desktop",
            "service_role insert cyberdesk_instances",
            "service_role select cyberdesk.history",
            "service_role select cyberdesk_desktop_history",
            "service_role select cyberdesk_instances",
            "service_role update cyberdesk_instances",
            "service_role usage schema cyberdesk",
        ]
    );
    Ok(())
}

async fn operator_role(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    for statement in [
        "select * from public.cyberdesk_instances",
        "update public.cyberdesk_instances set status = 'terminated'",
        "insert into public.cyberdesk_instances (user_id) values (gen_random_uuid())",
        "delete from public.cyberdesk_instances",
        "select * from cyberdesk.desktop",
        "select * from cyberdesk.desktop_state",
        "update cyberdesk.fence set epoch = 9",
        "select * from cyberdesk.refinery_schema_history",
        "select cyberdesk.stop(array[]::uuid[], 'x', 'x')",
        "select cyberdesk.adopt_rows(1)",
        "select cyberdesk.lock_desktops(array[]::uuid[])",
        "select public.request_shutdown(gen_random_uuid())",
        "select * from auth.users",
        "create table cyberdesk.mine ()",
        "create table public.mine ()",
        "create schema mine",
        "set role service_role",
    ] {
        assert_eq!(code(fixture.operator.client.execute(statement, &[]).await), "42501", "{statement}");
    }
    Ok(())
}

async fn browsers(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let id = fixture.insert().await?;
    for statement in [
        format!("insert into public.cyberdesk_instances (user_id) values ('{}')", fixture.user),
        format!("update public.cyberdesk_instances set status = 'running' where id = '{id}'"),
        format!("delete from public.cyberdesk_instances where id = '{id}'"),
        "truncate public.cyberdesk_instances".to_owned(),
        "select * from cyberdesk.desktop".to_owned(),
        "select * from cyberdesk.live_desktops()".to_owned(),
        "select cyberdesk.acquire(9, gen_random_uuid(), 'x')".to_owned(),
    ] {
        for caller in [Caller::Anon, Caller::User(fixture.user)] {
            let refused = code(fixture.database.request(caller, &statement, &[]).await);
            assert_eq!(refused, "42501", "{caller:?}: {statement}");
        }
    }
    Ok(())
}

/// What Supabase's linter would say, as far as it concerns us: 0010, 0011, 0013, 0028, 0029, 0003, 0006.
async fn functions(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let faults = fixture
        .app
        .query(
            "select p.oid::regprocedure || ' can be led astray by a search path' from pg_proc p
              where p.pronamespace in ('cyberdesk'::regnamespace, 'public'::regnamespace)
                and not coalesce(p.proconfig @> array['search_path=\"\"'], false)
             union all
             select p.oid::regprocedure || ' can be executed by everybody' from pg_proc p
              where p.pronamespace in ('cyberdesk'::regnamespace, 'public'::regnamespace)
                and has_function_privilege('public', p.oid, 'EXECUTE')
             union all
             select p.oid::regprocedure || ' is exposed with its owner''s rights' from pg_proc p
              where p.pronamespace = 'public'::regnamespace and p.prosecdef
             union all
             select c.oid::regclass || ' is exposed without row-level security' from pg_class c
              where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and not c.relrowsecurity
             union all
             select c.oid::regclass || ' is exposed with its owner''s rights' from pg_class c
              where c.relnamespace = 'public'::regnamespace and c.relkind in ('v', 'm')
                and not coalesce(c.reloptions @> array['security_invoker=true'], false)
             union all
             select policyname || ' asks who it is once a row' from pg_policies
              where schemaname = 'public' and qual !~* 'select auth\\.uid\\(\\)'
             union all
             select 'two permissive policies for ' || cmd from pg_policies
              where schemaname = 'public' group by cmd having count(*) > 1",
            &[],
        )
        .await?;
    let faults: Vec<String> = faults.iter().map(|row| row.get(0)).collect();
    assert_eq!(faults, Vec::<String>::new());
    Ok(())
}
