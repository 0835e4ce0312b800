-- All that the operator's role can do. Each function runs as one statement in autocommit, at read committed.
-- Locks are taken `skip locked`, the app's row before the private one: the app never waits for a cycle with us.

create view cyberdesk.desktop_state as
select d.id,
       d.user_id,
       d.desired,
       case when d.desired = 'absent' then coalesce(d.reason, 'requested') end as reason,
       d.message,
       d.expires_at,
       d.generation,
       d.observed_generation,
       c.params,
       coalesce(d.status, c.status)::text as status,
       d.vm_uid,
       d.ended_at,
       d.created_at,
       d.changed_at,
       c.id is not null as row_exists
  from cyberdesk.desktop d
  left join public.cyberdesk_instances c on c.id = d.id;
comment on view cyberdesk.desktop_state is 'A desktop as the operator sees it. A tombstone keeps its last status and has no params.';

-- ===== who may write =====

create function cyberdesk.fence_epoch() returns bigint
  language sql stable security definer set search_path = '' as
$$ select f.epoch from cyberdesk.fence f $$;
comment on function cyberdesk.fence_epoch() is 'The last epoch that this database accepted.';

create function cyberdesk.acquire(epoch bigint, token uuid, holder text) returns boolean
  language plpgsql security definer set search_path = '' as
$$
begin
  update cyberdesk.fence f
     set epoch = acquire.epoch, token = acquire.token, holder = acquire.holder, acquired_at = clock_timestamp()
   where f.epoch < acquire.epoch or (f.epoch = acquire.epoch and f.token = acquire.token);
  return found;
end
$$;
comment on function cyberdesk.acquire(bigint, uuid, text) is
  'Takes over writing: only with a greater epoch, or again with the same pair. Waits for the write in flight, after which the predecessor writes no more.';

create function cyberdesk.check_fence(epoch bigint, token uuid) returns void
  language plpgsql security definer set search_path = '' as
$$
begin
  -- Shared until commit, so that a takeover cannot pass a write in flight.
  perform from cyberdesk.fence f where f.epoch = check_fence.epoch and f.token = check_fence.token for share;
  if not found then
    raise exception 'epoch % is not, or no longer, the one that may write', check_fence.epoch using
      errcode = 'CD001',
      hint = 'another operator leads, or this database is a copy: step down and look at the Lease';
  end if;
end
$$;
comment on function cyberdesk.check_fence(bigint, uuid) is 'Raises CD001 unless this pair holds the fence.';

create function cyberdesk.identity() returns table (database_id uuid, system_identifier text, database_oid bigint, epoch bigint)
  language sql stable security definer set search_path = '' as
$$
  select i.database_id,
         (select s.system_identifier::text from pg_catalog.pg_control_system() s),
         (select d.oid::bigint from pg_catalog.pg_database d where d.datname = current_database()),
         (select f.epoch from cyberdesk.fence f)
    from cyberdesk.database_identity i
$$;
comment on function cyberdesk.identity() is
  'Which database this is. database_id travels with every copy; the system identifier changes with a dump, the oid with a template.';

-- ===== looking =====

create function cyberdesk.live_desktops() returns setof cyberdesk.desktop_state
  language sql stable security definer set search_path = '' as
$$ select s.* from cyberdesk.desktop_state s where s.ended_at is null $$;
comment on function cyberdesk.live_desktops() is 'All that are not over: for the start and for a resync.';

create function cyberdesk.dirty_desktops(max int) returns setof cyberdesk.desktop_state
  language sql stable security definer set search_path = '' as
$$
  select s.* from cyberdesk.desktop_state s
   where s.generation > s.observed_generation
   order by s.changed_at, s.id
   limit max
$$;
comment on function cyberdesk.dirty_desktops(int) is 'Those whose wish changed since the operator last acted on it, oldest change first.';

create function cyberdesk.desktops_by_id(ids uuid[]) returns setof cyberdesk.desktop_state
  language sql stable security definer set search_path = '' as
$$ select s.* from cyberdesk.desktop_state s where s.id = any (ids) $$;
comment on function cyberdesk.desktops_by_id(uuid[]) is 'These, tombstones and those that are over included.';

-- ===== writing =====

create function cyberdesk.lock_desktops(ids uuid[]) returns table (id uuid, free boolean)
  language plpgsql security definer set search_path = '' as
$$
#variable_conflict use_column
declare
  rows_held uuid[];
  desktops_held uuid[];
begin
  rows_held := array(
    select c.id from public.cyberdesk_instances c where c.id = any (ids) for no key update skip locked);
  desktops_held := array(
    select d.id from cyberdesk.desktop d where d.id = any (ids) for no key update skip locked);
  return query
    select d.id,
           d.id = any (desktops_held)
             and (d.id = any (rows_held) or not exists (select from public.cyberdesk_instances c where c.id = d.id))
      from cyberdesk.desktop d where d.id = any (ids);
end
$$;
comment on function cyberdesk.lock_desktops(uuid[]) is
  'Locks the rows and private rows of these as far as nobody else holds them. Not free: somebody does. Not listed: unknown.';

create function cyberdesk.report(
  epoch bigint, token uuid,
  ids uuid[], generations bigint[], vm_uids text[], statuses text[], reasons text[], messages text[], stream_urls text[], ended boolean[]
) returns table (id uuid, answer text)
  language plpgsql security definer set search_path = '' as
$$
#variable_conflict use_column
declare
  known uuid[];
  free uuid[];
  ahead uuid[];
  written uuid[];
  also_written uuid[];
begin
  perform cyberdesk.check_fence(report.epoch, report.token);
  if (select count(*) <> count(distinct e.id) from unnest(ids) as e (id)) then
    raise invalid_parameter_value using message = 'each id may stand once in a report, and never be null';
  end if;
  if array[cardinality(generations), cardinality(vm_uids), cardinality(statuses), cardinality(reasons), cardinality(messages),
           cardinality(stream_urls), cardinality(ended)] <> array_fill(cardinality(ids), array[7]) then
    raise invalid_parameter_value using message = 'the lists of a report must be of one length';
  end if;
  if 'completed' = any (statuses) then
    raise invalid_parameter_value using message = 'completed is the app''s to write, not the operator''s';
  end if;

  select coalesce(array_agg(l.id), '{}'), coalesce(array_agg(l.id) filter (where l.free), '{}')
    into known, free from cyberdesk.lock_desktops(ids) l;
  ahead := array(
    select e.id from unnest(ids, generations) as e (id, generation)
      join cyberdesk.desktop d on d.id = e.id where d.id = any (free) and e.generation > d.generation);

  -- First the private row, which is the truth; then the app's, whose guard mirrors it.
  with entry as (
    select e.* from unnest(ids, generations, vm_uids, statuses, reasons, messages, ended)
        as e (id, generation, vm_uid, status, reason, message, ended)
     where e.id = any (free) and e.id <> all (ahead)
  ), judged as (
    select e.id, e.generation, e.vm_uid, coalesce(e.ended, false) as ended, e.reason, left(e.message, 2000) as message,
           case
             when coalesce(d.status, c.status) not in ('pending', 'running') then coalesce(d.status, c.status) -- for ever
             else cyberdesk.next_status(
               coalesce(d.status, c.status),
               case
                 when e.ended and coalesce(e.status in ('pending', 'running'), true) then 'terminated'
                 else e.status::public.instance_status
               end,
               d.desired = 'absent')
           end as status
      from entry e
      join cyberdesk.desktop d on d.id = e.id
      left join public.cyberdesk_instances c on c.id = e.id
  ), outcome as (
    select j.id,
           case when j.ended or j.status not in ('pending', 'running') then 'absent' else d.desired end as desired,
           case when j.status not in ('pending', 'running') then j.status else d.status end as status,
           case when j.ended then d.generation else greatest(d.observed_generation, j.generation) end as observed_generation,
           coalesce(d.vm_uid, j.vm_uid) as vm_uid,
           coalesce(d.ended_at, case when j.ended then clock_timestamp() end) as ended_at,
           j.reason,
           j.message
      from judged j join cyberdesk.desktop d on d.id = j.id
  ), final as (
    select o.id, o.desired, o.status, o.observed_generation, o.vm_uid, o.ended_at,
           case when o.desired = 'absent' then coalesce(d.reason, o.reason) end as reason,
           -- A message belongs to its reason: the first cause brings its own; a note on a living desktop may be
           -- replaced, and taken away by an empty one.
           case
             when o.desired = 'present' then nullif(coalesce(o.message, d.message), '')
             when d.desired = 'present' then nullif(o.message, '')
             else coalesce(d.message, nullif(o.message, ''))
           end as message
      from outcome o join cyberdesk.desktop d on d.id = o.id
  ), changed as (
    update cyberdesk.desktop d
       set desired = f.desired, status = f.status, observed_generation = f.observed_generation, vm_uid = f.vm_uid,
           ended_at = f.ended_at, reason = f.reason, message = f.message
      from final f
     where d.id = f.id
       and (d.desired, d.status, d.observed_generation, d.vm_uid, d.ended_at, d.reason, d.message)
           is distinct from (f.desired, f.status, f.observed_generation, f.vm_uid, f.ended_at, f.reason, f.message)
    returning d.id
  )
  select coalesce(array_agg(h.id), '{}') into written from changed h;

  with final as (
    select d.id,
           coalesce(d.status, cyberdesk.next_status(c.status, e.status::public.instance_status, d.desired = 'absent'), c.status) as status,
           case when d.desired = 'absent' then c.stream_url else coalesce(left(e.stream_url, 1024), c.stream_url) end as stream_url,
           d.reason, d.message, d.shutdown_requested_at, d.ended_at
      from unnest(ids, statuses, stream_urls) as e (id, status, stream_url)
      join cyberdesk.desktop d on d.id = e.id
      join public.cyberdesk_instances c on c.id = e.id
     where e.id = any (free) and e.id <> all (ahead)
  ), changed as (
    update public.cyberdesk_instances c
       set status = f.status, stream_url = f.stream_url
      from final f
     where c.id = f.id
       and (c.status, c.stream_url, c.reason, c.message, c.shutdown_requested_at, c.ended_at)
           is distinct from (f.status, f.stream_url, f.reason, f.message, f.shutdown_requested_at, f.ended_at)
    returning c.id
  )
  select coalesce(array_agg(h.id), '{}') into also_written from changed h;

  return query
    select e.id,
           case
             when e.id <> all (known) then 'missing'
             when e.id <> all (free) then 'busy'
             when e.id = any (ahead) then 'ahead'
             when e.id = any (written) or e.id = any (also_written) then 'written'
             else 'same'
           end
      from unnest(ids) as e (id);
end
$$;
comment on function cyberdesk.report(bigint, uuid, uuid[], bigint[], text[], text[], text[], text[], text[], boolean[]) is
  'Writes a batch back, one entry an id, null meaning no news. Says of each: written; same (known already); busy (locked by the app: try again); '
  'missing (no such desktop, ever); ahead (a generation that this database never had: a restored copy). Raises no generation and notifies nobody.';

create function cyberdesk.stop(ids uuid[], reason text, message text) returns void
  language plpgsql security definer set search_path = '' as
$$
begin
  update cyberdesk.desktop d
     set desired = 'absent', reason = stop.reason, message = stop.message, shutdown_requested_at = clock_timestamp(),
         generation = d.generation + 1, changed_at = clock_timestamp()
   where d.id = any (ids) and d.desired = 'present';
  update public.cyberdesk_instances c set updated_at = c.updated_at where c.id = any (ids); -- its guard mirrors the private row
end
$$;
comment on function cyberdesk.stop(uuid[], text, text) is 'Latches these to absent and shows it in their rows. The caller holds the locks.';

create function cyberdesk.expire(epoch bigint, token uuid, ids uuid[]) returns table (id uuid, answer text)
  language plpgsql security definer set search_path = '' as
$$
#variable_conflict use_column
declare
  known uuid[];
  free uuid[];
  live uuid[];
  due uuid[];
begin
  perform cyberdesk.check_fence(expire.epoch, expire.token);
  select coalesce(array_agg(l.id), '{}'), coalesce(array_agg(l.id) filter (where l.free), '{}')
    into known, free from cyberdesk.lock_desktops(ids) l;
  -- Read under the lock: an extension that committed before is seen, one that comes later finds the latch.
  select coalesce(array_agg(d.id), '{}'), coalesce(array_agg(d.id) filter (where d.expires_at <= clock_timestamp()), '{}')
    into live, due
    from cyberdesk.desktop d where d.id = any (free) and d.desired = 'present';
  perform cyberdesk.stop(due, 'timeout', null);
  return query
    select e.id,
           case
             when e.id <> all (known) then 'missing'
             when e.id <> all (free) then 'busy'
             when e.id = any (due) then 'expired'
             when e.id = any (live) then 'extended'
             else 'same'
           end
      from unnest(ids) as e (id);
end
$$;
comment on function cyberdesk.expire(bigint, uuid, uuid[]) is
  'Ends those of these whose deadline has passed. Says of each: expired; extended (its deadline is ahead); same (ending already); busy; missing.';

create function cyberdesk.reconcile_projection(epoch bigint, token uuid) returns bigint
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
       and ((d.desired, d.status, d.reason, d.message, d.shutdown_requested_at, d.ended_at, d.expires_at)
            is distinct from (f.desired, f.status, f.reason, f.message, f.shutdown_requested_at, f.ended_at, f.expires_at)
            or f.expires_at <> c.timeout_at at time zone 'utc')
     order by c.id
     limit 10000
       for no key update of c skip locked
  )
  update public.cyberdesk_instances c set updated_at = c.updated_at from differing w where c.id = w.id;
  get diagnostics touched = row_count;
  return repaired + touched;
end
$$;
comment on function cyberdesk.reconcile_projection(bigint, uuid) is
  'Repairs what went round the triggers (TRUNCATE, replica mode, a restore), as far as it can be told from a lost table. How many rows it repaired.';

revoke all on all functions in schema cyberdesk from public;
revoke all on all tables in schema cyberdesk from public;

-- ===== the operator's role =====

do $$
declare
  setting text;
  value text;
begin
  if to_regrole('cyberdesk_daemon') is null then
    begin
      create role cyberdesk_daemon login noinherit connection limit 20;
    exception when duplicate_object or unique_violation then null; -- roles are shared: another database's migrate was quicker
    end;
  end if;
  -- lock_timeout stays below deadlock_timeout (1s): the app is never the victim of a cycle with us.
  for setting, value in
    values ('statement_timeout', '10s'), ('lock_timeout', '400ms'), ('idle_in_transaction_session_timeout', '15s'),
           ('timezone', 'UTC'), ('search_path', '')
  loop
    begin
      execute format('alter role cyberdesk_daemon set %I = %L', setting, value);
    exception
      when internal_error then null; -- "tuple concurrently updated": another database's migrate sets the same
      when insufficient_privilege then
        raise warning 'cannot set % of role cyberdesk_daemon, which another administrator made: set it to % yourself', setting, value;
    end;
  end loop;
end $$;

grant usage on schema cyberdesk to cyberdesk_daemon;
grant execute on function
  cyberdesk.fence_epoch(),
  cyberdesk.acquire(bigint, uuid, text),
  cyberdesk.identity(),
  cyberdesk.live_desktops(),
  cyberdesk.dirty_desktops(int),
  cyberdesk.desktops_by_id(uuid[]),
  cyberdesk.report(bigint, uuid, uuid[], bigint[], text[], text[], text[], text[], text[], boolean[]),
  cyberdesk.expire(bigint, uuid, uuid[]),
  cyberdesk.reconcile_projection(bigint, uuid)
to cyberdesk_daemon;
