-- What the triggers and functions after this need: columns, the history, and where the operator shows that it lives.

alter table public.cyberdesk_instances add column if not exists warned_at timestamptz;
comment on column public.cyberdesk_instances.warned_at is
  'Since when its end is near (settings.warn_before); null again once it is not: after an extension or a touch. Written by the operator.';

alter table cyberdesk.desktop
  add column idle_timeout interval,
  add column touched_at timestamptz,
  add column warned_at timestamptz;
comment on column cyberdesk.desktop.idle_timeout is 'How long it may run untouched: params.idle_timeout, else the setting, as of its insert. Null: for ever.';
comment on column cyberdesk.desktop.touched_at is
  'When it was last known to be in use; since it runs, at first. Null before it runs, or without an idle timeout. A touch moves this alone.';
comment on column cyberdesk.desktop.warned_at is 'Since when its owner has been warned of the end that is near.';
comment on column cyberdesk.desktop.expires_at is
  'When it is due at the earliest, always finite: timeout_at, or the idle timeout after it was touched as far as that is known here. '
  'expire() looks at the touches since, and moves it if there were any.';
create index desktop_of_user_idx on cyberdesk.desktop (user_id) where ended_at is null;
create index desktop_to_warn_idx on cyberdesk.desktop (expires_at) where desired = 'present' and warned_at is null;

-- ===== history =====

do $$ begin
  if to_regclass('public.cyberdesk_desktop_history') is not null then
    raise exception 'there is already a relation public.cyberdesk_desktop_history, which is not ours' using
      errcode = 'CD003',
      hint = 'rename or drop it, then migrate again';
  end if;
end $$;

create table cyberdesk.history (
  id bigint generated always as identity primary key,
  desktop_id uuid not null,
  user_id uuid not null,
  at timestamptz not null default clock_timestamp(),
  event text not null
    check (event in ('created', 'status', 'deadline', 'warned', 'shutdown-requested', 'ended', 'deleted')),
  from_status public.instance_status,
  to_status public.instance_status,
  reason text,
  timeout_at timestamptz,
  actor text not null default session_user,
  actor_role text,
  actor_sub text
);
create index history_of_desktop_idx on cyberdesk.history (desktop_id);
create index history_of_user_idx on cyberdesk.history (user_id);
-- Few: whoever acted on a desktop of somebody else.
create index history_by_others_idx on cyberdesk.history (actor_sub) where actor_sub <> user_id::text;

comment on table cyberdesk.history is
  'What became of each row of the app, one entry for each change that matters. Trimmed by age (settings.history_retention), erased with the user. '
  'No foreign keys: the operator''s writes must not wait for whoever deletes a user.';
comment on column cyberdesk.history.id is 'In the order of writing.';
comment on column cyberdesk.history.desktop_id is 'The desktop, whose row may be gone.';
comment on column cyberdesk.history.user_id is 'Whose desktop it was.';
comment on column cyberdesk.history.at is 'When, by the database''s clock.';
comment on column cyberdesk.history.event is
  'created; status (it changed, and nothing below did); deadline (timeout_at moved); warned; shutdown-requested (by whatever cause); ended; deleted. '
  'Of several at once the last of these.';
comment on column cyberdesk.history.from_status is 'The status before; null when created.';
comment on column cyberdesk.history.to_status is 'The status after; null when deleted.';
comment on column cyberdesk.history.reason is 'Why it ends or ended, as in the row.';
comment on column cyberdesk.history.timeout_at is 'The deadline after the change; before it, when deleted.';
comment on column cyberdesk.history.actor is 'The role that had logged in: authenticator for PostgREST, cyberdesk_daemon for the operator.';
comment on column cyberdesk.history.actor_role is 'The role of the JWT, if there was one.';
comment on column cyberdesk.history.actor_sub is 'The user of the JWT, if there was one. Taken out when that user is deleted.';

alter table cyberdesk.history enable row level security;
create policy cyberdesk_owners_read on cyberdesk.history
  for select to authenticated using ((select auth.uid()) = user_id);
comment on policy cyberdesk_owners_read on cyberdesk.history is 'Owners see what became of their desktops.';

create view public.cyberdesk_desktop_history with (security_invoker = true) as
select h.id, h.desktop_id, h.at, h.event, h.from_status, h.to_status, h.reason, h.timeout_at, h.actor, h.actor_role, h.actor_sub
  from cyberdesk.history h;
comment on view public.cyberdesk_desktop_history is
  'What became of desktops: who did what when, oldest first by id. Owners see their own, also after the row was deleted.';

-- ===== the operator's sign of life =====

create table cyberdesk.service (
  only_row boolean primary key default true check (only_row),
  seen_at timestamptz,
  braked_because text
);
insert into cyberdesk.service default values;
comment on table cyberdesk.service is 'How the operator fares, for desktop_service_state. A table of its own: writers of the fence shall not wait for it.';
comment on column cyberdesk.service.only_row is 'Keeps the table to one row.';
comment on column cyberdesk.service.seen_at is 'When the operator that may write was last heard, every ten seconds.';
comment on column cyberdesk.service.braked_because is 'Why the operator makes and ends nothing until a person confirms; null: it does.';

revoke all on table cyberdesk.history, cyberdesk.service, public.cyberdesk_desktop_history from public;
do $$
declare
  api_role text;
begin
  foreach api_role in array array['anon', 'authenticated', 'service_role'] loop
    execute format('revoke all on table public.cyberdesk_desktop_history from %I', api_role);
  end loop;
end $$;
grant select on table public.cyberdesk_desktop_history, cyberdesk.history to authenticated, service_role;
