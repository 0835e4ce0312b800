-- What the operator does besides writing back: deadlines with idle timeouts, warnings, its sign of life, retention.

-- The database keeps params.idle_timeout to itself: a template is not asked about it.
create or replace view cyberdesk.desktop_state as
select d.id,
       d.user_id,
       d.desired,
       case when d.desired = 'absent' then coalesce(d.reason, 'requested') end as reason,
       d.message,
       d.expires_at,
       d.generation,
       d.observed_generation,
       case when jsonb_typeof(c.params) = 'object' then c.params - 'idle_timeout' else c.params end as params,
       coalesce(d.status, c.status)::text as status,
       d.vm_uid,
       d.ended_at,
       d.created_at,
       d.changed_at,
       c.id is not null as row_exists,
       coalesce(least(greatest(c.timeout_at, '1970-01-01'), '9000-01-01') at time zone 'utc', d.expires_at) as timeout_at
  from cyberdesk.desktop d
  left join public.cyberdesk_instances c on c.id = d.id;

create function cyberdesk.move_deadlines(ids uuid[]) returns setof uuid
  language sql security definer set search_path = '' as
$$
  update cyberdesk.desktop d
     set expires_at = s.due_at, generation = d.generation + 1, changed_at = clock_timestamp()
    from (select t.id, least(t.timeout_at, p.touched_at + p.idle_timeout) as due_at
            from cyberdesk.desktop_state t join cyberdesk.desktop p on p.id = t.id
           where t.id = any (ids) and t.desired = 'present' and p.idle_timeout is not null) s
   where d.id = s.id and d.expires_at < s.due_at
  returning d.id
$$;
comment on function cyberdesk.move_deadlines(uuid[]) is 'Takes in the touches since the idle deadline of these was last looked at. Whose it moved. The caller holds the locks.';

create or replace function cyberdesk.expire(epoch bigint, token uuid, ids uuid[]) returns table (id uuid, answer text)
  language plpgsql security definer set search_path = '' as
$$
#variable_conflict use_column
declare
  known uuid[];
  free uuid[];
  touched uuid[];
  live uuid[];
  due uuid[];
  out_of_time uuid[];
  at_now timestamptz;
begin
  perform cyberdesk.check_fence(expire.epoch, expire.token);
  select coalesce(array_agg(l.id), '{}'), coalesce(array_agg(l.id) filter (where l.free), '{}')
    into known, free from cyberdesk.lock_desktops(ids) l;
  -- Read under the lock: an extension or touch that committed before is seen, one that comes later finds the latch.
  touched := array(select cyberdesk.move_deadlines(free));
  at_now := clock_timestamp();
  select coalesce(array_agg(s.id), '{}'),
         coalesce(array_agg(s.id) filter (where s.expires_at <= at_now), '{}'),
         coalesce(array_agg(s.id) filter (where s.timeout_at <= at_now), '{}')
    into live, due, out_of_time
    from cyberdesk.desktop_state s where s.id = any (free) and s.desired = 'present';
  perform cyberdesk.stop(out_of_time, 'timeout', null);
  perform cyberdesk.stop(array(select d from unnest(due) as d where d <> all (out_of_time)), 'idle', null);
  return query
    select e.id,
           case
             when e.id <> all (known) then 'missing'
             when e.id <> all (free) then 'busy'
             when e.id = any (due) then 'expired'
             when e.id = any (touched) then 'touched'
             when e.id = any (live) then 'extended'
             else 'same'
           end
      from unnest(ids) as e (id);
end
$$;
comment on function cyberdesk.expire(bigint, uuid, uuid[]) is
  'Ends those of these that are due: as timeout if timeout_at has come, else as idle. Says of each: expired; touched '
  '(its idle deadline has moved); extended (it is not due); same (ending already); busy; missing.';

create function cyberdesk.warn(epoch bigint, token uuid, max int)
  returns table (warned bigint, next_in_seconds double precision)
  language plpgsql security definer set search_path = '' as
$$
#variable_conflict use_column
declare
  notice constant interval := (select s.warn_before from cyberdesk.settings s);
  at_now timestamptz;
  near uuid[];
begin
  perform cyberdesk.check_fence(warn.epoch, warn.token);
  if notice is null then
    return query select 0::bigint, null::double precision;
    return;
  end if;
  at_now := clock_timestamp();
  near := array(
    select d.id from cyberdesk.desktop d
     where d.desired = 'present' and d.warned_at is null
       and d.expires_at > at_now and d.expires_at <= at_now + notice
       and d.expires_at - least(notice, d.idle_timeout / 2) <= at_now
     order by d.expires_at
     limit warn.max);
  near := array(select l.id from cyberdesk.lock_desktops(near) l where l.free);
  perform cyberdesk.move_deadlines(near);
  with told as (
    update cyberdesk.desktop d set warned_at = clock_timestamp()
     where d.id = any (near) and d.desired = 'present' and d.warned_at is null
       and d.expires_at > at_now and d.expires_at - least(notice, d.idle_timeout / 2) <= at_now
    returning d.id
  )
  select coalesce(array_agg(t.id), '{}') into near from told t;
  update public.cyberdesk_instances c set updated_at = c.updated_at where c.id = any (near); -- its guard mirrors the private row
  return query
    select cardinality(near)::bigint,
           (select extract(epoch from min(d.expires_at - least(notice, d.idle_timeout / 2)) - at_now)::double precision
              from cyberdesk.desktop d
             where d.desired = 'present' and d.warned_at is null
               and d.expires_at > at_now and d.expires_at <= at_now + notice + interval '1 minute');
end
$$;
comment on function cyberdesk.warn(bigint, uuid, int) is
  'Fills warned_at of desktops whose end is near, at most max, the nearest first. How many it warned, and the seconds to the next that it can tell of: '
  'null if there is none within a minute.';

create function cyberdesk.sign_of_life(epoch bigint, token uuid) returns void
  language plpgsql security definer set search_path = '' as
$$
begin
  perform cyberdesk.check_fence(sign_of_life.epoch, sign_of_life.token);
  update cyberdesk.service s set seen_at = clock_timestamp();
end
$$;
comment on function cyberdesk.sign_of_life(bigint, uuid) is 'Tells desktop_service_state that an operator serves.';

create function cyberdesk.paused() returns boolean
  language sql stable security definer set search_path = '' as
$$ select coalesce((select s.paused from cyberdesk.settings s), false) $$;
comment on function cyberdesk.paused() is 'Whether new desktops shall wait (settings.paused).';

create function cyberdesk.trim(epoch bigint, token uuid) returns bigint
  language plpgsql security definer set search_path = '' as
$$
declare
  trimmed bigint;
begin
  perform cyberdesk.check_fence(trim.epoch, trim.token);
  -- Oldest first by the key, which is all that a batch reads; nobody waits for it, and it waits for nobody.
  with oldest as (
    select h.id, h.at from cyberdesk.history h order by h.id limit 1000 for update skip locked
  )
  delete from cyberdesk.history h
   using oldest o
   where h.id = o.id and o.at < now() - (select s.history_retention from cyberdesk.settings s);
  get diagnostics trimmed = row_count;
  return trimmed;
end
$$;
comment on function cyberdesk.trim(bigint, uuid) is 'Deletes a batch of what is kept for a time only and is older. How many entries; as long as there were any, there may be more.';

create or replace function cyberdesk.reconcile_projection(epoch bigint, token uuid) returns bigint
  language plpgsql security definer set search_path = '' as
$$
declare
  repaired bigint;
  vanished uuid[];
  touched bigint;
begin
  perform cyberdesk.check_fence(reconcile_projection.epoch, reconcile_projection.token);
  repaired := cyberdesk.adopt_rows(10000);

  -- Rows that went without their trigger. A few are somebody's repair work; many are a lost or empty table,
  -- which no function but a person may take for the app's wish.
  vanished := array(
    select d.id from cyberdesk.desktop d
     where d.ended_at is null and d.desired = 'present'
       and not exists (select from public.cyberdesk_instances c where c.id = d.id)
       for no key update of d skip locked);
  if cardinality(vanished) <= greatest(10, (select count(*) / 10 from cyberdesk.desktop d where d.ended_at is null)) then
    perform cyberdesk.stop(vanished, 'row-deleted', null);
    repaired := repaired + cardinality(vanished);
  end if;

  -- Rows that differ from what the private row knows: an update that changes nothing has the triggers settle it.
  with differing as (
    select c.id
      from public.cyberdesk_instances c
      join cyberdesk.desktop d on d.id = c.id
      join cyberdesk.first_state f on f.id = c.id
     where c.id in (
             select o.id from public.cyberdesk_instances o where o.ended_at is null
             union
             select o.id from cyberdesk.desktop o where o.ended_at is null)
       and ((d.desired, d.status, d.reason, d.message, d.shutdown_requested_at, d.ended_at, d.warned_at)
            is distinct from (f.desired, f.status, f.reason, f.message, f.shutdown_requested_at, f.ended_at, f.warned_at)
            or f.expires_at <> c.timeout_at at time zone 'utc'
            -- An idle desktop is due before its timeout_at, and never after.
            or case when d.touched_at is null or d.ended_at is not null then d.expires_at <> f.expires_at else d.expires_at > f.expires_at end)
     order by c.id
     limit 10000
       for no key update of c skip locked
  )
  update public.cyberdesk_instances c set updated_at = c.updated_at from differing w where c.id = w.id;
  get diagnostics touched = row_count;
  return repaired + touched;
end
$$;

revoke all on function
  cyberdesk.move_deadlines(uuid[]),
  cyberdesk.warn(bigint, uuid, int),
  cyberdesk.sign_of_life(bigint, uuid),
  cyberdesk.paused(),
  cyberdesk.trim(bigint, uuid)
from public;
grant execute on function
  cyberdesk.warn(bigint, uuid, int),
  cyberdesk.sign_of_life(bigint, uuid),
  cyberdesk.paused(),
  cyberdesk.trim(bigint, uuid)
to cyberdesk_daemon;
