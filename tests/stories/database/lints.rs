//! What Supabase's linter (splinter) asks of a database, each of its rules as a check of our own, where it makes sense
//! stricter than the rule; and for each a fault that it must find.

use anyhow::{Context as _, Result};
use cyberdesk_testbed::Postgres;
use cyberdesk_testbed::postgres::SUPERUSER;
use tokio_postgres::Client;

use super::Story;

pub(super) const STORIES: &[Story] = &[
    ("Supabase's linter has nothing to say", |p| Box::pin(nothing_to_say(p))),
    ("each check of the linter finds its fault", |p| Box::pin(each_finds_its_fault(p))),
];

/// A rule by splinter's number, the query that finds what breaks it, and statements that break it.
struct Lint(&'static str, &'static str, &'static str);

/// What a query may use: what is ours or beside us, what API users can read, and each policy with its expressions.
const WORDS: &str = "
set search_path = '';
create temporary view relation as
select c.*, has_table_privilege('anon', c.oid, 'select') as anon_reads, has_table_privilege('authenticated', c.oid, 'select') as user_reads,
       coalesce(lower(c.reloptions::text) ~ 'security_invoker=(1|on|true|yes)', false) as with_its_readers_rights
  from pg_class c where c.relnamespace in ('public'::regnamespace, 'cyberdesk'::regnamespace);
create temporary view rule as
select p.tablename, p.policyname, p.permissive = 'PERMISSIVE' as permissive, r.role, v.verb, concat_ws(' and ', p.qual, p.with_check) as says,
       p.qual, p.with_check
  from pg_policies p,
       unnest(p.roles) as r (role),
       unnest(case p.cmd when 'ALL' then array['SELECT', 'INSERT', 'UPDATE', 'DELETE'] else array[p.cmd] end) as v (verb)
 where p.schemaname in ('public', 'cyberdesk')";

const LINTS: &[Lint] = &[
    Lint(
        "0001 unindexed_foreign_keys",
        // A partial index cannot serve a cascade, whatever the linter thinks.
        "select f.conname::text from pg_constraint f join relation r on r.oid = f.conrelid
          where f.contype = 'f' and not exists (
            select from pg_index i where i.indrelid = r.oid and i.indisvalid and i.indpred is null
              and (i.indkey::int2[])[0:cardinality(f.conkey) - 1] @> f.conkey)",
        "drop index public.cyberdesk_instances_user_created_idx;
         create index on public.cyberdesk_instances (user_id) where ended_at is null",
    ),
    Lint(
        "0002 auth_users_exposed",
        "select r.oid::regclass::text from relation r join pg_rewrite w on w.ev_class = r.oid
           join pg_depend d on d.objid = w.oid and d.refobjid = 'auth.users'::regclass
          where r.relkind in ('v', 'm') and (r.anon_reads or r.user_reads)",
        "create view public.v as select id from auth.users; grant select on public.v to authenticated",
    ),
    Lint(
        "0003 auth_rls_initplan",
        "select policyname::text from rule
          where regexp_replace(says, 'select (auth|cyberdesk)\\.\\w+\\(\\)', '', 'gi') ~* '(auth|cyberdesk)\\.\\w+\\(|current_setting\\('",
        "alter policy cyberdesk_owners_read on public.cyberdesk_instances using (auth.uid() = user_id)",
    ),
    Lint(
        "0004 no_primary_key",
        "select r.oid::regclass::text from relation r
          where r.relkind in ('r', 'p') and not exists (select from pg_index i where i.indrelid = r.oid and i.indisprimary)",
        "create table cyberdesk.t (id int)",
    ),
    Lint(
        "0006 multiple_permissive_policies",
        "select tablename || ' ' || verb from rule where permissive group by tablename, role, verb having count(*) > 1",
        "create policy p on public.cyberdesk_instances for all to authenticated using ((select auth.uid()) = user_id)",
    ),
    Lint(
        "0007 policy_exists_rls_disabled",
        "select r.oid::regclass::text from relation r
          where not r.relrowsecurity and exists (select from pg_policy p where p.polrelid = r.oid)",
        "alter table public.cyberdesk_instances disable row level security",
    ),
    Lint(
        "0008 rls_enabled_no_policy",
        "select r.oid::regclass::text from relation r
          where r.relrowsecurity and not exists (select from pg_policy p where p.polrelid = r.oid)",
        "alter table cyberdesk.settings enable row level security",
    ),
    Lint(
        "0009 duplicate_index",
        "select string_agg(x.indexname, ' is ') from pg_indexes x where x.schemaname in ('public', 'cyberdesk')
          group by x.schemaname, x.tablename, regexp_replace(x.indexdef, 'INDEX \\S+ ON', '') having count(*) > 1",
        "create index again on public.cyberdesk_instances (user_id, created_at desc)",
    ),
    Lint(
        "0010 security_definer_view",
        "select r.oid::regclass::text from relation r
          where r.relkind = 'v' and (r.anon_reads or r.user_reads) and not r.with_its_readers_rights",
        "alter view public.cyberdesk_desktop_history reset (security_invoker)",
    ),
    Lint(
        "0011 function_search_path_mutable",
        "select p.oid::regprocedure::text from pg_proc p
          where p.pronamespace in ('public'::regnamespace, 'cyberdesk'::regnamespace)
            and not coalesce(p.proconfig @> array['search_path=\"\"'], false)",
        "alter function cyberdesk.guard() reset search_path",
    ),
    Lint(
        // No query of splinter's: its rule is that who signed in without a name is told apart. Ours is that nobody
        // reaches more than their own rows.
        "0012 auth_allow_anonymous_sign_ins",
        "select policyname::text from rule where says not like '%auth.uid() AS uid) = user_id%'",
        "create policy p on public.cyberdesk_instances for select to authenticated using (status = 'running')",
    ),
    Lint(
        "0013 rls_disabled_in_public",
        "select r.oid::regclass::text from relation r
          where r.relkind in ('r', 'p') and not r.relrowsecurity and (r.relnamespace = 'public'::regnamespace or r.anon_reads or r.user_reads)",
        "create table public.t (id int primary key)",
    ),
    Lint(
        "0014 extension_in_public",
        "select extname::text from pg_extension where extnamespace in ('public'::regnamespace, 'cyberdesk'::regnamespace)",
        "update pg_extension set extnamespace = 'public'::regnamespace where extname = 'plpgsql'",
    ),
    Lint(
        "0015 rls_references_user_metadata",
        "select policyname::text from rule where says ~ 'user_metadata'",
        "create policy p on public.cyberdesk_instances for delete to authenticated
           using ((select auth.jwt()) -> 'user_metadata' ->> 'role' = 'admin')",
    ),
    Lint(
        "0016 materialized_view_in_api",
        "select r.oid::regclass::text from relation r where r.relkind = 'm' and (r.anon_reads or r.user_reads)",
        "create materialized view public.m as select id from public.cyberdesk_instances; grant select on public.m to anon",
    ),
    Lint(
        "0017 foreign_table_in_api",
        "select r.oid::regclass::text from relation r where r.relkind = 'f' and (r.anon_reads or r.user_reads)",
        "create foreign data wrapper w; create server s foreign data wrapper w;
         create foreign table public.f (id int) server s; grant select on public.f to authenticated",
    ),
    Lint(
        "0018 unsupported_reg_types",
        "select a.attrelid::regclass || '.' || a.attname from pg_attribute a join relation r on r.oid = a.attrelid
          where a.atttypid::regtype::text in ('regcollation', 'regconfig', 'regdictionary', 'regnamespace', 'regoper', 'regoperator',
                                              'regproc', 'regprocedure')",
        "create table cyberdesk.t (id int primary key, f regprocedure)",
    ),
    Lint(
        "0019 insecure_queue_exposed_in_api",
        "select c.oid::regclass::text from pg_class c
          where c.relnamespace = to_regnamespace('pgmq') and c.relkind in ('r', 'p') and c.relname like 'q\\_%' and not c.relrowsecurity",
        "create schema pgmq; create table pgmq.q_desktops (id int primary key)",
    ),
    Lint(
        // By what a row takes on average, as far as it is known, against what the table takes on disk.
        "0020 table_bloat",
        "select r.oid::regclass::text from relation r
          where r.relkind = 'r' and r.relpages > 100
            and r.relpages > 2 * r.reltuples / 8000 * (28 + (select sum(s.avg_width) from pg_stats s
                 where s.schemaname = r.relnamespace::regnamespace::text and s.tablename = r.relname))",
        "create table cyberdesk.t (id int primary key);
         insert into cyberdesk.t select generate_series(1, 60000); delete from cyberdesk.t where id % 20 > 0; analyze cyberdesk.t",
    ),
    Lint(
        "0021 fkey_to_auth_unique",
        "select f.conname::text from pg_constraint f join relation r on r.oid = f.conrelid
           join pg_class target on target.oid = f.confrelid and target.relnamespace = 'auth'::regnamespace
           join pg_index i on i.indexrelid = f.conindid and not i.indisprimary
          where f.contype = 'f'",
        "create unique index one on auth.users (email);
         create table cyberdesk.t (id int primary key, email varchar(255) references auth.users (email))",
    ),
    Lint(
        "0022 extension_versions_outdated",
        "select e.extname::text from pg_extension e join pg_available_extensions a on a.name = e.extname
          where a.default_version <> e.extversion",
        "update pg_extension set extversion = '0.9' where extname = 'plpgsql'",
    ),
    Lint(
        // Whether row-level security is on or not: what is in such a column is for no browser.
        "0023 sensitive_columns_exposed",
        "select r.oid::regclass || '.' || a.attname from relation r join pg_attribute a on a.attrelid = r.oid and a.attnum > 0
          where (r.anon_reads or r.user_reads) and a.attname ~
            '(^|_)(pass(word|wd|phrase)|pwd|secret|token|jwt|otp|ssn|cvv|iban|(private|api|auth|ssh|pgp|gpg|license)_?key|credit_card|card_number)(_|$)'",
        "alter table public.cyberdesk_instances add column access_token text",
    ),
    Lint(
        "0024 rls_policy_always_true",
        "select policyname::text from rule
          where permissive and verb <> 'SELECT' and role in ('public', 'anon', 'authenticated')
            and regexp_replace(coalesce(with_check, qual, 'true'), '[() ]', '', 'g') in ('true', '1=1')",
        "create policy p on public.cyberdesk_instances for update to authenticated using (true)",
    ),
    Lint(
        "0025 public_bucket_allows_listing",
        "select p.policyname::text from pg_policies p
          where p.schemaname = 'storage' and p.tablename = 'objects' and p.cmd in ('SELECT', 'ALL')
            and p.roles && array['public', 'anon', 'authenticated']::name[]",
        "create schema storage; create table storage.objects (bucket_id text);
         create policy p on storage.objects for select to anon using (bucket_id = 'desktops')",
    ),
    Lint(
        "0026 pg_graphql_anon_table_exposed",
        "select r.oid::regclass::text from relation r where r.relkind in ('r', 'p', 'v', 'm') and r.anon_reads",
        "grant select on cyberdesk.history to anon",
    ),
    Lint(
        // What signed-in users shall read shows in pg_graphql's introspection to them, where a project has it: the
        // linter asks that each be meant. These are.
        "0027 pg_graphql_authenticated_table_exposed",
        "select r.oid::regclass::text from relation r
          where r.relkind in ('r', 'p', 'v', 'm') and r.user_reads
            and r.oid::regclass::text not in
              ('public.cyberdesk_instances', 'public.cyberdesk_desktop_history', 'cyberdesk.history')",
        "grant select on cyberdesk.settings to authenticated",
    ),
    Lint(
        "0028 anon_security_definer_function_executable",
        "select p.oid::regprocedure::text from pg_proc p
          where p.prosecdef and has_function_privilege('anon', p.oid, 'execute')
            and p.pronamespace in ('public'::regnamespace, 'cyberdesk'::regnamespace)",
        "grant execute on function cyberdesk.wake() to anon",
    ),
    Lint(
        // In the private schema some are, on purpose: it is exposed through no API.
        "0029 authenticated_security_definer_function_executable",
        "select p.oid::regprocedure::text from pg_proc p
          where p.prosecdef and has_function_privilege('authenticated', p.oid, 'execute') and p.pronamespace = 'public'::regnamespace",
        "alter function public.request_shutdown(uuid, text) security definer",
    ),
];

async fn found(client: &Client, lint: &Lint) -> Result<Vec<String>> {
    let Lint(name, query, _) = lint;
    let rows = client.query(*query, &[]).await.with_context(|| (*name).to_owned())?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// 0005, unused_index, needs a database at work: `growth.rs` shows that each index serves a statement.
async fn nothing_to_say(postgres: &Postgres) -> Result<()> {
    let database = postgres.database().await?;
    let client = database.connect_as(SUPERUSER).await?;
    client.batch_execute(WORDS).await?;
    for lint in LINTS {
        let faults = found(&client, lint).await?;
        assert_eq!(faults, Vec::<String>::new(), "{}", lint.0);
    }
    Ok(())
}

async fn each_finds_its_fault(postgres: &Postgres) -> Result<()> {
    let database = postgres.database().await?;
    let client = database.connect_as(SUPERUSER).await?;
    client.batch_execute(WORDS).await?;
    for lint in LINTS {
        let Lint(name, _, break_it) = lint;
        client.batch_execute("begin").await?;
        client.batch_execute(break_it).await.with_context(|| format!("{name}: {break_it}"))?;
        let faults = found(&client, lint).await?;
        client.batch_execute("rollback").await?;
        assert!(!faults.is_empty(), "{name} finds nothing after {break_it}");
    }
    Ok(())
}
