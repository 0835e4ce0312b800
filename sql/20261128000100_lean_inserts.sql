-- An insert costs the app less: what is mostly not so is asked without a call, and what follows from a row is written for
-- all rows of a statement at once.

-- The app's writers lock the table first, and then what its triggers read. So do we: the other way round they would be the victims.
lock table public.cyberdesk_instances in share row exclusive mode;

-- ===== guard: normalises, never loses the statement's row, and raises only for a limit that the administrator has set =====

create or replace function cyberdesk.guard() returns trigger
  language plpgsql security definer set search_path = '' as
$$
declare
  -- Deadlines stay within what every client can read. A null is let through, for the table's own not null to speak.
  earliest constant timestamp := '1970-01-01';
  latest constant timestamp := '9000-01-01';
  known cyberdesk.desktop;
  stopping boolean;
begin
  if tg_op = 'INSERT' then
    -- An upsert or COPY of a row that is there: its update branch, or the primary key, decides.
    if exists (select from public.cyberdesk_instances c where c.id = new.id) then
      return new;
    end if;
    if new.status = 'running' then
      new.status := 'pending';
    end if;
    new.timeout_at := case when new.timeout_at is not null then least(greatest(new.timeout_at, earliest), latest) end;
    new.reason := null;
    new.message := null;
    new.shutdown_requested_at := null;
    new.warned_at := null;
    new.ended_at := case when new.status not in ('pending', 'running') then now() end;
    if new.ended_at is null
      and coalesce(jsonb_typeof(new.params -> 'idle_timeout'), 'null') <> 'null' and cyberdesk.idle_timeout_of(new.params) is null
    then
      raise invalid_parameter_value using
        message = format('params.idle_timeout must be a time from 1 second to 1 year, and is %s', new.params -> 'idle_timeout'),
        hint = 'write it as "15 minutes"; null means none';
    end if;
    return new;
  end if;

  -- The update holds the row's lock by now, and so does all that writes the private row of a living one.
  select d.* into known from cyberdesk.desktop d where d.id = old.id;
  if not found then -- made before us, or while triggers were off; the projection adopts it
    known.reason := old.reason;
    known.message := old.message;
    known.shutdown_requested_at := old.shutdown_requested_at;
    known.ended_at := old.ended_at;
    known.warned_at := old.warned_at;
    known.desired := case when old.status in ('pending', 'running') and old.shutdown_requested_at is null and old.ended_at is null
      then 'present' else 'absent' end;
  end if;
  stopping := known.desired = 'absent';

  new.id := old.id;
  new.user_id := old.user_id;
  new.created_at := old.created_at;
  new.params := old.params;
  new.updated_at := now() at time zone 'utc';
  new.status := cyberdesk.next_status(coalesce(known.status, old.status), new.status, stopping);
  if stopping then
    new.timeout_at := old.timeout_at;
    if new.stream_url is not null then
      new.stream_url := old.stream_url;
    end if;
  end if;
  new.timeout_at := case when new.timeout_at is not null then least(greatest(new.timeout_at, earliest), latest) end;
  new.warned_at := known.warned_at;
  if new.timeout_at <> old.timeout_at then
    -- Another deadline has a warning of its own.
    new.warned_at := null;
    if new.timeout_at > old.timeout_at then
      perform cyberdesk.check_lifetime(new.timeout_at - known.created_at at time zone 'utc', null, s.max_lifetime)
        from cyberdesk.settings s where s.max_lifetime is not null;
    end if;
  end if;

  if not stopping and new.status not in ('pending', 'running') then
    new.reason := 'requested';
    new.message := null;
    new.shutdown_requested_at := now();
    new.ended_at := null;
  else
    new.reason := known.reason;
    new.message := known.message;
    new.shutdown_requested_at := known.shutdown_requested_at;
    new.ended_at := known.ended_at;
  end if;
  return new;
end
$$;
comment on function cyberdesk.guard() is
  'Coerces what is written to the app''s table into what may be: terminal for ever, deadlines finite, a later one within the limit, '
  'the operator''s columns as the private row has them.';

-- ===== projection: what the app's row means to us =====

create or replace function cyberdesk.project() returns trigger
  language plpgsql security definer set search_path = '' as
$$
declare
  known cyberdesk.desktop;
  next cyberdesk.desktop;
  is_running boolean;
begin
  if tg_op = 'DELETE' then
    update cyberdesk.desktop d
       set desired = 'absent',
           status = coalesce(d.status, old.status),
           reason = case when d.desired = 'present' then 'row-deleted' else d.reason end,
           message = case when d.desired = 'present' then null else d.message end,
           shutdown_requested_at = case when d.desired = 'present' then clock_timestamp() else d.shutdown_requested_at end,
           generation = d.generation + (d.desired = 'present')::int,
           changed_at = case when d.desired = 'present' then clock_timestamp() else d.changed_at end
     where d.id = old.id;
    if not found then
      insert into cyberdesk.desktop
        (id, user_id, desired, status, reason, shutdown_requested_at, ended_at, expires_at, observed_generation)
      values
        (old.id, old.user_id, 'absent', old.status, coalesce(old.reason, 'row-deleted'), old.shutdown_requested_at, old.ended_at,
         least(greatest(old.timeout_at, '1970-01-01'), '9000-01-01') at time zone 'utc', case when old.ended_at is null then 0 else 1 end);
    end if;
    return null;
  end if;

  select d.* into known from cyberdesk.desktop d where d.id = new.id;
  if not found then
    perform cyberdesk.adopt(new.id);
    return null;
  end if;
  -- The row as it is now, not NEW: another trigger may have written to it since.
  next := known;
  select least(known.desired, f.desired), -- absent < present: once absent, always absent
         coalesce(f.status, known.status), f.reason, f.message, f.shutdown_requested_at, f.warned_at, f.expires_at, c.status = 'running'
    into next.desired, next.status, next.reason, next.message, next.shutdown_requested_at, next.warned_at, next.expires_at, is_running
    from cyberdesk.first_state f join public.cyberdesk_instances c on c.id = f.id
   where f.id = new.id;
  if not found then
    return null;
  end if;
  if is_running and known.idle_timeout is not null and known.touched_at is null then
    next.touched_at := clock_timestamp();
  end if;
  next.expires_at := least(next.expires_at, next.touched_at + known.idle_timeout);
  if (known.desired, known.expires_at) is distinct from (next.desired, next.expires_at) then
    next.generation := known.generation + 1;
    next.changed_at := clock_timestamp();
  end if;
  if known is distinct from next then
    update cyberdesk.desktop d
       set desired = next.desired, status = next.status, reason = next.reason, message = next.message,
           shutdown_requested_at = next.shutdown_requested_at, warned_at = next.warned_at, touched_at = next.touched_at,
           expires_at = next.expires_at, generation = next.generation, changed_at = next.changed_at
     where d.id = new.id;
  end if;
  return null;
end
$$;
comment on function cyberdesk.project() is
  'Carries a change of the app''s row over to the private one, raises its generation if what is wanted changed, and leaves a tombstone when the row goes.';

create or replace function cyberdesk.inserted() returns trigger
  language plpgsql security definer set search_path = '' as
$$
declare
  claims jsonb;
  shortest interval;
  longest interval;
  most integer;
  new_rows bigint;
  made uuid[];
  used uuid;
  owner_id uuid;
  has bigint;
begin
  if current_setting('request.jwt.claims', true) <> '' then
    claims := cyberdesk.claims();
  end if;

  -- What first_state says of rows that the guard has just let in, without reading them again: inserts are many.
  with made as (
    insert into cyberdesk.desktop (id, user_id, desired, status, ended_at, expires_at, observed_generation, idle_timeout)
    select i.id, i.user_id,
           case when i.ended_at is null then 'present' else 'absent' end,
           case when i.ended_at is not null then i.status end,
           i.ended_at,
           i.timeout_at at time zone 'utc',
           case when i.ended_at is null then 0 else 1 end,
           case when jsonb_typeof(i.params) = 'object' and i.params ? 'idle_timeout' then cyberdesk.idle_timeout_of(i.params)
             else (select s.idle_timeout from cyberdesk.settings s) end
      from inserted i
    on conflict (id) do nothing
    returning id
  ), told as (
    insert into cyberdesk.history (desktop_id, user_id, event, to_status, timeout_at, actor_role, actor_sub)
    select i.id, i.user_id, 'created', i.status, i.timeout_at at time zone 'utc', claims ->> 'role', left(claims ->> 'sub', 200)
      from inserted i
  )
  select (select count(*) from inserted), (select array_agg(m.id) from made m), s.min_lifetime, s.max_lifetime, s.desktops_per_user
    into new_rows, made, shortest, longest, most
    from (select) as always left join cyberdesk.settings s on true;

  -- In this order: a tombstone that is trimmed meanwhile makes the insert wait, and is found among the used ids then.
  -- A trigger of the app's that wrote to a row at once has had it adopted: by this transaction, and alive.
  if new_rows <> coalesce(cardinality(made), 0) then
    select i.id into used
      from inserted i
     where i.id <> all (coalesce(made, '{}'))
       and not exists (
         select from cyberdesk.desktop d where d.id = i.id and d.desired = 'present' and d.xmin = pg_catalog.pg_current_xact_id()::xid)
     limit 1;
  end if;
  used := coalesce(used, (select u.id from cyberdesk.used_id u where u.id = any (made) limit 1));
  if used is not null then
    raise unique_violation using
      message = format('desktop id %s has been used before', used),
      hint = 'leave id out: each desktop gets an id of its own',
      schema = 'public', table = 'cyberdesk_instances', column = 'id';
  end if;

  if shortest is not null or longest is not null then
    perform cyberdesk.check_lifetime(i.timeout_at - now() at time zone 'utc', shortest, longest)
      from inserted i where i.ended_at is null;
  end if;
  if most is null then
    return null;
  end if;
  -- In one order, so that two statements with the same users never wait for each other in a circle.
  for owner_id in select distinct i.user_id from inserted i where i.ended_at is null order by i.user_id loop
    insert into cyberdesk.insert_turns as t (user_id, taken_at) values (owner_id, clock_timestamp())
      on conflict (user_id) do update set taken_at = excluded.taken_at;
    -- A statement of its own: it sees what was committed while we waited.
    select count(*) into has from cyberdesk.desktop d where d.user_id = owner_id and d.ended_at is null;
    if has > most then
      raise exception using
        errcode = 'CD005',
        message = format('a user may have %s at a time, and this would make %s', case most when 1 then '1 desktop' else most || ' desktops' end, has),
        hint = 'end one and wait until its ended_at is set; the limit is desktops_per_user in cyberdesk.settings';
    end if;
  end loop;
  return null;
end
$$;
comment on function cyberdesk.inserted() is
  'Makes the private rows of new rows and writes their history. Raises 23505 if an id was used before, CD004 and CD005 for a limit.';

create or replace trigger zzzz_cyberdesk_guard before update on public.cyberdesk_instances
  for each row execute function cyberdesk.guard();
-- Mostly there is nothing to coerce in a new row, and to ask here takes no call.
create trigger zzzz_cyberdesk_guard_insert before insert on public.cyberdesk_instances
  for each row
  when (new.status <> 'pending' or new.params is not null or new.timeout_at not between '1970-01-01' and '9000-01-01'
        or num_nonnulls(new.reason, new.message, new.shutdown_requested_at, new.warned_at, new.ended_at) > 0)
  execute function cyberdesk.guard();
create or replace trigger zzzz_cyberdesk_project after update or delete on public.cyberdesk_instances
  for each row execute function cyberdesk.project();
drop trigger zzzz_cyberdesk_inserted on public.cyberdesk_instances;
create trigger aaaa_cyberdesk_inserted after insert on public.cyberdesk_instances
  referencing new table as inserted for each statement execute function cyberdesk.inserted();
comment on trigger zzzz_cyberdesk_guard_insert on public.cyberdesk_instances is 'Must sort last among the before triggers.';
comment on trigger aaaa_cyberdesk_inserted on public.cyberdesk_instances is
  'Tells the operator''s side of all new rows of a statement; their history and limits. Sorts first: a trigger of the app''s may end them at once.';
