-- Warnings and repairs are written for many rows at once. One that the app's own triggers or checks refuse holds up no
-- other: the rest is written without it, and it is tried again by each repair. (A constraint trigger of the app's that
-- is deferred refuses all, at the commit.)

create function cyberdesk.mirror(ids uuid[], is_part boolean default false, out mirrored bigint, out refused bigint, out one uuid, out why text)
  language plpgsql security definer set search_path = '' as
$$
declare
  half constant int := cardinality(ids) / 2;
  other record;
begin
  refused := 0;
  -- An update that changes nothing: the guard takes over what the private row says.
  begin
    update public.cyberdesk_instances c set updated_at = c.updated_at where c.id = any (ids);
    get diagnostics mirrored = row_count;
    return;
  exception when others then
    if sqlstate ~ '^(08|25|28|3D|3F|40|53|55|57|58|CD|XX)' then
      raise; -- no row's fault
    end if;
    why := sqlerrm;
  end;
  if half = 0 then
    mirrored := 0;
    refused := cardinality(ids);
    one := ids[1];
  else
    select m.mirrored, m.refused, m.one, m.why into mirrored, refused, one, why from cyberdesk.mirror(ids[:half], true) m;
    select m.mirrored, m.refused, m.one, m.why into other from cyberdesk.mirror(ids[half + 1:], true) m;
    mirrored := mirrored + other.mirrored;
    refused := refused + other.refused;
    one := coalesce(one, other.one);
    why := coalesce(why, other.why);
  end if;
  if not is_part and refused > 0 then
    raise warning 'what is to be shown in % rows is refused by triggers or checks of the app''s; in row %: %', refused, one, why;
  end if;
end
$$;
comment on function cyberdesk.mirror(uuid[], boolean) is
  'Has these rows show what their private rows say. In how many it could; and how many the app''s triggers or checks refuse, which stay as they are, '
  'one of them and why. The caller holds the locks.';
revoke all on function cyberdesk.mirror(uuid[], boolean) from public;

create or replace function cyberdesk.warn(epoch bigint, token uuid, max int)
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
  perform cyberdesk.mirror(near);
  return query
    select cardinality(near)::bigint,
           (select extract(epoch from min(d.expires_at - least(notice, d.idle_timeout / 2)) - at_now)::double precision
              from cyberdesk.desktop d
             where d.desired = 'present' and d.warned_at is null
               and d.expires_at > at_now and d.expires_at <= at_now + notice + interval '1 minute');
end
$$;

create or replace function cyberdesk.reconcile_projection(epoch bigint, token uuid) returns bigint
  language plpgsql security definer set search_path = '' as
$$
declare
  repaired bigint;
  vanished uuid[];
  differing uuid[];
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

  -- Rows that differ from what the private row knows: the triggers settle it.
  differing := array(
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
       for no key update of c skip locked);
  return repaired + (select m.mirrored from cyberdesk.mirror(differing) m);
end
$$;
