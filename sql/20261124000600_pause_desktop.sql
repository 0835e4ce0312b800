-- One desktop left as it is, for as long as an administrator says.

alter table cyberdesk.desktop add column paused boolean not null default false;
comment on column cyberdesk.desktop.paused is
  'Whether the operator leaves it as it is: makes, deletes and ends nothing of it. Set by pause_desktop.';

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
       coalesce(d.status, c.status, case when d.vm_uid is null then 'pending' else 'running' end::public.instance_status)::text as status,
       d.vm_uid,
       d.ended_at,
       d.created_at,
       d.changed_at,
       c.id is not null as row_exists,
       coalesce(least(greatest(c.timeout_at, '1970-01-01'), '9000-01-01') at time zone 'utc', d.expires_at) as timeout_at,
       d.paused
  from cyberdesk.desktop d
  left join public.cyberdesk_instances c on c.id = d.id;

-- It answers with the view's columns, one by one.
create or replace function cyberdesk.desktops_by_id(ids uuid[]) returns setof cyberdesk.desktop_state
  language sql stable security definer set search_path = '' as
$$
  select s.* from cyberdesk.desktop_state s where s.id = any (ids)
  union all
  -- Rows without a private row: over before we came, or for longer than that is kept.
  select f.id, f.user_id, f.desired, case when f.desired = 'absent' then coalesce(f.reason, 'requested') end, f.message, f.expires_at,
         1, f.observed_generation, case when jsonb_typeof(c.params) = 'object' then c.params - 'idle_timeout' else c.params end,
         c.status::text, null, f.ended_at, c.created_at at time zone 'utc', f.ended_at, true, f.expires_at, false
    from cyberdesk.first_state f
    join public.cyberdesk_instances c on c.id = f.id
   where f.id = any (ids) and f.ended_at is not null and not exists (select from cyberdesk.desktop d where d.id = f.id)
$$;

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
  -- Read under the lock: an extension, touch or pause that committed before is seen, one that comes later finds the latch.
  touched := array(select cyberdesk.move_deadlines(free));
  at_now := clock_timestamp();
  select coalesce(array_agg(s.id), '{}'),
         coalesce(array_agg(s.id) filter (where s.expires_at <= at_now), '{}'),
         coalesce(array_agg(s.id) filter (where s.timeout_at <= at_now), '{}')
    into live, due, out_of_time
    from cyberdesk.desktop_state s where s.id = any (free) and s.desired = 'present' and not s.paused;
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
  '(its idle deadline has moved); extended (it is not due); same (ending already, or paused); busy; missing.';

-- Entries that are there are of the old words: there is nothing to check, however many they are.
alter table cyberdesk.history
  drop constraint history_event_check,
  add constraint history_event_check
    check (event in ('created', 'status', 'deadline', 'warned', 'shutdown-requested', 'ended', 'deleted', 'paused', 'resumed')) not valid;
comment on column cyberdesk.history.event is
  'created; status (it changed, and nothing below did); deadline (timeout_at moved); warned; shutdown-requested (by whatever cause); ended; deleted. '
  'Of several at once the last of these. paused and resumed: by pause_desktop.';

create function cyberdesk.pause_desktop(desktop_id uuid, paused boolean default true) returns boolean
  language plpgsql set search_path = '' as
$$
begin
  -- The app's row first, as its writers lock them. One that was deleted has its tombstone.
  perform cyberdesk.take(desktop_id);
  update cyberdesk.desktop d
     set paused = pause_desktop.paused, generation = d.generation + 1, changed_at = clock_timestamp()
   where d.id = desktop_id and d.ended_at is null and d.paused <> pause_desktop.paused;
  if not found then
    if not exists (select from cyberdesk.desktop d where d.id = desktop_id) then
      raise no_data_found using
        message = format('there is no desktop %s', desktop_id),
        hint = 'the id is that of its row; one without a row is paused by the annotation cyberdesk.io/paused of its Cyberdesk';
    end if;
    return false;
  end if;
  insert into cyberdesk.history (desktop_id, user_id, event, from_status, to_status, reason, timeout_at)
  select s.id, s.user_id, case when s.paused then 'paused' else 'resumed' end,
         s.status::public.instance_status, s.status::public.instance_status, s.reason, s.timeout_at
    from cyberdesk.desktop_state s
   where s.id = desktop_id and s.row_exists;
  return true;
end
$$;
comment on function cyberdesk.pause_desktop(uuid, boolean) is
  'Has the operator leave a desktop as it is, or go on with it (false): meanwhile nothing of it is made or deleted, and neither its deadline nor a shutdown '
  'request ends it. Whether that changed: not if it was so already or is over. For an administrator.';

revoke all on function cyberdesk.pause_desktop(uuid, boolean) from public;
