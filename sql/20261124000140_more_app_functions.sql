-- The rest of what the app and its users can call. Each function of schema public is a thin one with its caller's rights, over a half in schema
-- cyberdesk that has its owner's and knows its caller by itself.

do $$
declare
  taken text;
begin
  select string_agg(distinct format('public.%s', p.proname), ', ') into taken
    from pg_catalog.pg_proc p
   where p.pronamespace = 'public'::regnamespace
     and p.proname in ('request_shutdown_all', 'extend_desktop', 'set_desktop_timeout', 'touch_desktop', 'desktop_service_state');
  if taken is not null then
    raise exception 'there is already a function of our name, which is not ours: %', taken using
      errcode = 'CD003',
      hint = 'rename or drop it, then migrate again: PostgREST cannot tell two functions of one name apart';
  end if;
end $$;

-- ===== whose desktop it is =====

create function cyberdesk.may_act_for(owner_id uuid) returns boolean
  language sql stable set search_path = '' as
$$ select current_setting('role') not in ('anon', 'authenticated') or owner_id is not distinct from auth.uid() $$;
comment on function cyberdesk.may_act_for(uuid) is 'Whether the caller may act on desktops of this user: browser users on their own, whatever policies the app has made; servers on all.';

create function cyberdesk.take(desktop_id uuid) returns boolean
  language plpgsql security definer set search_path = '' as
$$
declare
  owner_id uuid;
begin
  select c.user_id into owner_id from public.cyberdesk_instances c where c.id = desktop_id for no key update;
  if not found or not cyberdesk.may_act_for(owner_id) then
    return false;
  end if;
  perform cyberdesk.adopt(desktop_id);
  return true;
end
$$;
comment on function cyberdesk.take(uuid) is 'Locks the row of a desktop that the caller may act on. False: there is none, or none of theirs.';

-- ===== the privileged halves =====

create or replace function cyberdesk.request_shutdown(desktop_id uuid, words text) returns boolean
  language plpgsql security definer set search_path = '' as
$$
declare
  present boolean;
begin
  if not cyberdesk.take(desktop_id) then
    return false;
  end if;
  select d.desired = 'present' into present from cyberdesk.desktop d where d.id = desktop_id for no key update;
  if present then
    perform cyberdesk.stop(array[desktop_id], 'requested', nullif(left(words, 2000), ''));
  end if;
  return present;
end
$$;

create function cyberdesk.request_shutdown_all(owner_id uuid) returns table (id uuid, changed boolean)
  language plpgsql security definer set search_path = '' as
$$
#variable_conflict use_column
declare
  desktop_id uuid;
begin
  if not cyberdesk.may_act_for(owner_id) then
    return;
  end if;
  -- In one order, so that two who end the same desktops wait for each other in a line.
  for desktop_id in
    select c.id from public.cyberdesk_instances c where c.user_id = owner_id and c.ended_at is null order by c.id
  loop
    return query select desktop_id, cyberdesk.request_shutdown(desktop_id, null);
  end loop;
end
$$;
comment on function cyberdesk.request_shutdown_all(uuid) is 'The privileged half of public.request_shutdown_all.';

create function cyberdesk.set_desktop_timeout(desktop_id uuid, at timestamptz, by_interval interval) returns boolean
  language plpgsql security definer set search_path = '' as
$$
begin
  if not cyberdesk.take(desktop_id) then
    return false;
  end if;
  update public.cyberdesk_instances c
     set timeout_at = w.timeout_at
    from cyberdesk.desktop d,
         lateral (select least(greatest(coalesce(
                    at at time zone 'utc',
                    (select n.timeout_at + by_interval from public.cyberdesk_instances n where n.id = desktop_id)
                  ), '1970-01-01'), '9000-01-01') as timeout_at) w
   where c.id = desktop_id and d.id = desktop_id and d.desired = 'present' and c.timeout_at <> w.timeout_at;
  return found;
end
$$;
comment on function cyberdesk.set_desktop_timeout(uuid, timestamptz, interval) is
  'The privileged half of public.set_desktop_timeout, and, with no time but an interval, of public.extend_desktop.';

create function cyberdesk.touch_desktop(desktop_id uuid) returns boolean
  language plpgsql security definer set search_path = '' as
$$
declare
  known cyberdesk.desktop;
  still_near boolean;
begin
  select d.* into known from cyberdesk.desktop d where d.id = desktop_id;
  -- Most touches end here, and lock and write nothing.
  if known.desired is distinct from 'present' or known.touched_at is null
    or known.warned_at is null and known.touched_at > clock_timestamp() - least(known.idle_timeout / 20, interval '30 seconds')
    or not cyberdesk.take(desktop_id)
  then
    return false;
  end if;
  update cyberdesk.desktop d set touched_at = clock_timestamp()
   where d.id = desktop_id and d.desired = 'present'
  returning d.* into known;
  if not found then
    return false;
  end if;
  if known.warned_at is not null then
    select s.timeout_at - least(o.warn_before, known.idle_timeout / 2) <= clock_timestamp() into still_near
      from cyberdesk.desktop_state s, cyberdesk.settings o where s.id = desktop_id;
    if not still_near then
      update cyberdesk.desktop d set warned_at = null where d.id = desktop_id;
      update public.cyberdesk_instances c set updated_at = c.updated_at where c.id = desktop_id; -- its guard mirrors the private row
    end if;
  end if;
  return true;
end
$$;
comment on function cyberdesk.touch_desktop(uuid) is 'The privileged half of public.touch_desktop.';

create function cyberdesk.service_state()
  returns table (state text, message text, served boolean, paused boolean, braked boolean, seen_at timestamptz)
  language sql stable security definer set search_path = '' as
$$
  select case when not k.served then 'away' when k.braked then 'braked' when k.paused then 'paused' else 'serving' end,
         case
           when k.seen_at is null then 'no operator has served this database yet: new desktops stay pending until one does'
           when not k.served then format(
             'no operator has been heard since %s UTC: new desktops stay pending, and nothing ends, until one serves again',
             to_char(k.seen_at at time zone 'utc', 'YYYY-MM-DD HH24:MI:SS'))
           when k.braked then 'the operator makes and ends nothing until a person confirms: ' || k.braked_because
           when k.paused then 'an administrator has paused the making of new desktops: they stay pending meanwhile'
           else 'an operator serves this database'
         end,
         k.served, k.paused, k.braked, k.seen_at
    from (select coalesce(s.seen_at > clock_timestamp() - interval '45 seconds', false) as served,
                 coalesce((select o.paused from cyberdesk.settings o), false) as paused,
                 s.braked_because is not null as braked,
                 s.braked_because,
                 s.seen_at
            from cyberdesk.service s) k
$$;
comment on function cyberdesk.service_state() is 'The privileged half of public.desktop_service_state. An operator shows itself every ten seconds.';

-- ===== what is called =====

create function public.request_shutdown_all(owner_id uuid default null)
  returns table (desktop public.cyberdesk_instances, changed boolean)
  language plpgsql security invoker set search_path = '' as
$$
begin
  owner_id := coalesce(owner_id, auth.uid());
  if owner_id is null then
    raise null_value_not_allowed using
      message = 'owner_id is missing',
      hint = 'name the user whose desktops shall end; it may be left out only by a signed-in user, for all of their own';
  end if;
  return query
    select c, r.changed
      from cyberdesk.request_shutdown_all(owner_id) r
      join public.cyberdesk_instances c on c.id = r.id
     order by c.created_at, c.id;
end
$$;
comment on function public.request_shutdown_all(uuid) is
  'Asks all desktops of a user to end: your own, or on a server those of the user named. Returns each that is not over yet, and whether this call '
  'changed it. Asking twice does no harm.';

create function public.extend_desktop(desktop_id uuid, by_interval interval)
  returns table (desktop public.cyberdesk_instances, changed boolean)
  language plpgsql security invoker set search_path = '' as
$$
begin
  if by_interval is null then
    raise null_value_not_allowed using message = 'by_interval is missing', hint = 'say by how much, such as "30 minutes"';
  end if;
  if by_interval <= interval '0' then
    raise invalid_parameter_value using
      message = format('by_interval must be more than nothing, and is %s', by_interval),
      hint = 'set_desktop_timeout sets an earlier deadline, request_shutdown ends the desktop';
  end if;
  if exists (select from public.cyberdesk_instances c where c.id = desktop_id) then
    -- More than any deadline can take would overflow.
    changed := cyberdesk.set_desktop_timeout(desktop_id, null, least(by_interval, interval '8000 years'));
    for desktop in select c.* from public.cyberdesk_instances c where c.id = desktop_id loop
      return next;
    end loop;
  end if;
end
$$;
comment on function public.extend_desktop(uuid, interval) is
  'Moves a desktop''s timeout_at later by an interval. Returns its row and whether it moved: not once a shutdown was requested or the desktop is over; '
  'no row if there is none of yours. Each call adds; where a call may be repeated, set_desktop_timeout is safe.';

create function public.set_desktop_timeout(desktop_id uuid, at timestamptz)
  returns table (desktop public.cyberdesk_instances, changed boolean)
  language plpgsql security invoker set search_path = '' as
$$
begin
  if at is null then
    raise null_value_not_allowed using message = 'at is missing', hint = 'say when the desktop shall end, such as "2026-11-24T18:00:00Z"';
  end if;
  if exists (select from public.cyberdesk_instances c where c.id = desktop_id) then
    changed := cyberdesk.set_desktop_timeout(desktop_id, at, null);
    for desktop in select c.* from public.cyberdesk_instances c where c.id = desktop_id loop
      return next;
    end loop;
  end if;
end
$$;
comment on function public.set_desktop_timeout(uuid, timestamptz) is
  'Sets when a desktop ends, sooner or later than before; a time that has passed ends it now. Returns its row and whether anything changed: not once a '
  'shutdown was requested or the desktop is over; no row if there is none of yours.';

create function public.touch_desktop(desktop_id uuid)
  returns table (desktop public.cyberdesk_instances, changed boolean)
  language plpgsql security invoker set search_path = '' as
$$
begin
  if exists (select from public.cyberdesk_instances c where c.id = desktop_id) then
    changed := cyberdesk.touch_desktop(desktop_id);
    for desktop in select c.* from public.cyberdesk_instances c where c.id = desktop_id loop
      return next;
    end loop;
  end if;
end
$$;
comment on function public.touch_desktop(uuid) is
  'Says that a desktop is in use: its idle timeout, if it has one, starts anew; timeout_at stays. Call it as often as you like: what comes within a '
  'twentieth of the idle timeout (at most 30 seconds) of the last one is not written. Returns the row and whether it was written; no row if there is none of yours.';

create function public.desktop_service_state()
  returns table (state text, message text, served boolean, paused boolean, braked boolean, seen_at timestamptz)
  language sql stable security invoker set search_path = '' as
$$ select s.state, s.message, s.served, s.paused, s.braked, s.seen_at from cyberdesk.service_state() s $$;
comment on function public.desktop_service_state() is
  'Whether new desktops are served, and if not, why: state is serving, paused, braked or away, message says the same in words for people.';

-- ===== grants; explicit both ways, since projects differ in their default privileges =====

revoke all on function cyberdesk.may_act_for(uuid), cyberdesk.take(uuid) from public;
do $$
declare
  halves constant text := 'cyberdesk.request_shutdown_all(uuid), cyberdesk.set_desktop_timeout(uuid, timestamptz, interval), '
    'cyberdesk.touch_desktop(uuid), cyberdesk.service_state()';
  wholes constant text := 'public.request_shutdown_all(uuid), public.extend_desktop(uuid, interval), public.set_desktop_timeout(uuid, timestamptz), '
    'public.touch_desktop(uuid), public.desktop_service_state()';
begin
  execute format('revoke all on function %s, %s from public, anon, authenticated, service_role', halves, wholes);
  execute format('grant execute on function %s, %s to authenticated, service_role', halves, wholes);
end $$;
