-- What the app and its users can call and see.

do $$ begin
  if exists (select from pg_catalog.pg_proc where proname = 'request_shutdown' and pronamespace = 'public'::regnamespace) then
    raise exception 'there is already a function public.request_shutdown, which is not ours' using
      errcode = 'CD003',
      hint = 'rename or drop it, then migrate again: PostgREST cannot tell two functions of one name apart';
  end if;
end $$;

create function cyberdesk.request_shutdown(desktop_id uuid, words text) returns boolean
  language plpgsql security definer set search_path = '' as
$$
declare
  owner_id uuid;
  present boolean;
begin
  select c.user_id into owner_id from public.cyberdesk_instances c where c.id = desktop_id for no key update;
  -- A browser user, whatever other policies the app has made, ends only what is theirs.
  if not found or (current_setting('role') in ('anon', 'authenticated') and owner_id is distinct from (select auth.uid())) then
    return false;
  end if;
  perform cyberdesk.adopt(desktop_id);
  select d.desired = 'present' into present from cyberdesk.desktop d where d.id = desktop_id for no key update;
  if present then
    perform cyberdesk.stop(array[desktop_id], 'requested', nullif(left(words, 2000), ''));
  end if;
  return present;
end
$$;
comment on function cyberdesk.request_shutdown(uuid, text) is 'The privileged half of public.request_shutdown.';
revoke all on function cyberdesk.request_shutdown(uuid, text) from public;

create function public.request_shutdown(desktop_id uuid, reason text default null)
  returns table (desktop public.cyberdesk_instances, changed boolean)
  language plpgsql security invoker set search_path = '' as
$$
begin
  -- Row-level security speaks here: a row that the caller cannot see is not there.
  if exists (select from public.cyberdesk_instances c where c.id = desktop_id) then
    changed := cyberdesk.request_shutdown(desktop_id, reason);
    for desktop in select c.* from public.cyberdesk_instances c where c.id = desktop_id loop
      return next;
    end loop;
  end if;
end
$$;
comment on function public.request_shutdown(uuid, text) is
  'Asks a desktop to end. Returns its row and whether this call changed anything; no row if there is none of yours. Asking twice does no harm. '
  'The reason, in your words, shows as the row''s message.';
revoke all on function public.request_shutdown(uuid, text) from public;

-- ===== row-level security and grants; explicit both ways, since projects differ in their default privileges =====

alter table public.cyberdesk_instances enable row level security;
create policy cyberdesk_owners_read on public.cyberdesk_instances
  for select to authenticated using ((select auth.uid()) = user_id);
comment on policy cyberdesk_owners_read on public.cyberdesk_instances is 'Owners see their desktops; anonymous visitors see none.';

revoke all on table public.cyberdesk_instances from public;
do $$
declare
  api_role text;
begin
  foreach api_role in array array['anon', 'authenticated', 'service_role'] loop
    execute format('revoke all on table public.cyberdesk_instances from %I', api_role);
    execute format('revoke all on function public.request_shutdown(uuid, text) from %I', api_role);
  end loop;
end $$;
grant select on table public.cyberdesk_instances to authenticated;
grant select, insert, update, delete on table public.cyberdesk_instances to service_role;
grant execute on function public.request_shutdown(uuid, text) to authenticated, service_role;
grant usage on schema cyberdesk to authenticated, service_role;
grant execute on function cyberdesk.request_shutdown(uuid, text) to authenticated, service_role;

-- ===== Realtime =====

do $$ begin
  if exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime' and not puballtables)
    and not exists (
      select from pg_catalog.pg_publication_tables
       where pubname = 'supabase_realtime' and schemaname = 'public' and tablename = 'cyberdesk_instances')
  then
    alter publication supabase_realtime add table public.cyberdesk_instances;
  end if;
exception when insufficient_privilege then
  raise warning 'cannot add public.cyberdesk_instances to the publication supabase_realtime: browsers will hear no changes until its owner adds it';
end $$;
