-- The app-facing table (made, or extended where the app's ORM made it) and the private tables. No behaviour yet.

-- What Supabase brings, for a plain PostgreSQL: a place for users, and the roles that policies name.
do $$
declare
  api_role text;
begin
  if to_regnamespace('auth') is not null then
    return;
  end if;
  foreach api_role in array array['anon', 'authenticated', 'service_role'] loop
    begin
      if to_regrole(api_role) is null then
        execute format('create role %I nologin', api_role);
      end if;
    exception when duplicate_object or unique_violation then null; -- roles are shared: another database's migrate was quicker
    end;
  end loop;
  create schema auth;
  comment on schema auth is 'Stands in for Supabase''s auth: made by cyberdesk-operator migrate, because there was none.';
  create table auth.users (id uuid primary key default gen_random_uuid(), email text);
  comment on table auth.users is 'Who may own desktops. Deleting a user deletes their desktops.';
  comment on column auth.users.id is 'The user, as the JWT''s sub claim names them.';
  comment on column auth.users.email is 'For people to read; nothing here uses it.';
  create function auth.uid() returns uuid language sql stable set search_path = '' as
    $f$ select (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid $f$;
  comment on function auth.uid() is 'Who asks, by the JWT''s sub claim; null without one.';
  grant usage on schema auth to anon, authenticated, service_role;
end $$;

-- ===== the app's side =====

do $$ begin
  if to_regtype('public.instance_status') is null then
    create type public.instance_status as enum ('pending', 'running', 'completed', 'error', 'terminated');
  end if;
end $$;
comment on type public.instance_status is 'The life of a desktop, as the app sees it. The last three are terminal: there is no way back.';

create table if not exists public.cyberdesk_instances (
  id uuid primary key default gen_random_uuid() not null,
  user_id uuid not null references auth.users (id) on delete cascade,
  created_at timestamp default now(),
  updated_at timestamp,
  status public.instance_status default 'pending' not null,
  timeout_at timestamp default (now() + interval '24 hours') not null,
  stream_url varchar(1024)
);
alter table public.cyberdesk_instances
  add column if not exists reason text,
  add column if not exists message text,
  add column if not exists shutdown_requested_at timestamptz,
  add column if not exists params jsonb;

-- Rows that were terminal before us are over. A column's first default costs no write however many there are; the next
-- file sets the live ones back.
do $$ begin
  if not exists (
    select from pg_catalog.pg_attribute
     where attrelid = 'public.cyberdesk_instances'::regclass and attname = 'ended_at' and not attisdropped
  ) then
    alter table public.cyberdesk_instances add column ended_at timestamptz default now();
    alter table public.cyberdesk_instances alter column ended_at drop default;
  end if;
end $$;

comment on table public.cyberdesk_instances is 'One row, one virtual desktop: insert to get one, call request_shutdown to end it.';
comment on column public.cyberdesk_instances.id is 'The desktop. An id once used is refused for ever; leave it out.';
comment on column public.cyberdesk_instances.user_id is 'Who owns it. Deleting the user deletes the row and ends the desktop.';
comment on column public.cyberdesk_instances.created_at is 'When the row was made, in UTC.';
comment on column public.cyberdesk_instances.updated_at is 'When the row was last written, in UTC; set by trigger.';
comment on column public.cyberdesk_instances.status is 'Where the desktop is in its life. Terminal statuses never go back.';
comment on column public.cyberdesk_instances.timeout_at is 'The deadline, in UTC: the desktop is ended then. Later is possible until a shutdown is requested.';
comment on column public.cyberdesk_instances.stream_url is 'Where the screen can be seen; written by the gateway.';
comment on column public.cyberdesk_instances.reason is 'Why it ends or ended, one stable word (requested, timeout, guest-shutdown, …). Written by the operator.';
comment on column public.cyberdesk_instances.message is 'The reason in words for people. Written by the operator.';
comment on column public.cyberdesk_instances.shutdown_requested_at is 'Since when it has been asked to end, null if nobody did. Written by the operator.';
comment on column public.cyberdesk_instances.ended_at is 'Since when nothing of it is left in the cluster: the one sign that it is over. Written by the operator.';
comment on column public.cyberdesk_instances.params is 'Values for the VM template, fixed once inserted. Its owner can read them: no secrets.';

alter table public.cyberdesk_instances
  set (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000);

-- ===== the operator's side =====

create schema if not exists cyberdesk;
revoke all on schema cyberdesk from public;
comment on schema cyberdesk is 'The operator''s private side. Expose it through no API.';

create table cyberdesk.desktop (
  id uuid primary key,
  user_id uuid not null,
  desired text not null check (desired in ('present', 'absent')),
  status public.instance_status,
  reason text,
  message text,
  shutdown_requested_at timestamptz,
  ended_at timestamptz,
  expires_at timestamptz not null check (isfinite(expires_at)),
  generation bigint not null default 1,
  observed_generation bigint not null default 0,
  vm_uid text,
  created_at timestamptz not null default clock_timestamp(),
  changed_at timestamptz not null default clock_timestamp(),
  check (desired = 'absent' or ended_at is null)
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000);
create index desktop_dirty_idx on cyberdesk.desktop (changed_at, id) where generation > observed_generation;
create index desktop_not_over_idx on cyberdesk.desktop (id) where ended_at is null;

comment on table cyberdesk.desktop is
  'What is wanted of each desktop and what became of it. Outlives the app''s row as its tombstone, so there is no foreign key. '
  'reason, message, shutdown_requested_at and ended_at are the truth of which the app''s columns are the mirror: '
  'they change only together with the app''s row, in one transaction.';
comment on column cyberdesk.desktop.id is 'The app''s row, which may be gone.';
comment on column cyberdesk.desktop.user_id is 'Whose it is or was.';
comment on column cyberdesk.desktop.desired is 'present: it shall have a VM. absent: it shall have none; there is no way back.';
comment on column cyberdesk.desktop.status is 'The terminal status once there is one, or the last status of a row that was deleted; else null.';
comment on column cyberdesk.desktop.reason is 'Why it is to be absent: the first cause wins. Null while present.';
comment on column cyberdesk.desktop.message is 'The reason in words; while present, a note for the owner.';
comment on column cyberdesk.desktop.shutdown_requested_at is 'Since when somebody, or the deadline, has wanted it to end.';
comment on column cyberdesk.desktop.ended_at is 'Since when the cluster is known to be clean of it.';
comment on column cyberdesk.desktop.expires_at is 'The deadline, always finite.';
comment on column cyberdesk.desktop.generation is 'Raised when what is wanted (desired, expires_at) changes, and only then.';
comment on column cyberdesk.desktop.observed_generation is 'The generation that the operator last acted on; below generation means there is work.';
comment on column cyberdesk.desktop.vm_uid is 'UID of its only VM, once made. If that VM goes, it is not made again.';
comment on column cyberdesk.desktop.created_at is 'When we first saw it.';
comment on column cyberdesk.desktop.changed_at is 'When generation was last raised: work is served in this order.';

create table cyberdesk.fence (
  only_row boolean primary key default true check (only_row),
  epoch bigint not null default 0,
  token uuid,
  holder text,
  acquired_at timestamptz
);
insert into cyberdesk.fence default values;
comment on table cyberdesk.fence is 'Who may write back. Every writing function of the operator names the epoch and token found here, or is refused.';
comment on column cyberdesk.fence.only_row is 'Keeps the table to one row.';
comment on column cyberdesk.fence.epoch is 'The counter of the cluster''s Lease; only ever raised.';
comment on column cyberdesk.fence.token is 'Made by the holder for this epoch: a copied database issues the same epochs again.';
comment on column cyberdesk.fence.holder is 'The holder''s name, for people.';
comment on column cyberdesk.fence.acquired_at is 'When it was taken.';

create table cyberdesk.database_identity (
  only_row boolean primary key default true check (only_row),
  database_id uuid not null default gen_random_uuid(),
  created_at timestamptz not null default now()
);
insert into cyberdesk.database_identity default values;
comment on table cyberdesk.database_identity is 'Which database this is. A copy says the same, so it is judged together with system identifier and oid.';
comment on column cyberdesk.database_identity.only_row is 'Keeps the table to one row.';
comment on column cyberdesk.database_identity.database_id is 'Drawn once, when the schema was made.';
comment on column cyberdesk.database_identity.created_at is 'When the schema was made.';
