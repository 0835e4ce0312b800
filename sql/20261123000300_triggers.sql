-- The guard (what may be written to the app's table), the projection (what it means to us) and the wake-up.
-- All trigger functions are security definer: GoTrue's role, deleting a user, executes some of them.

-- ===== words =====

create function cyberdesk.next_status(was public.instance_status, written public.instance_status, stopping boolean)
  returns public.instance_status
  language sql immutable set search_path = '' as
$$ select case
     when written is null then null
     when was = 'terminated' then was
     when was in ('error', 'completed') then case when written = 'terminated' then written else was end
     when written = 'running' and stopping then was
     when written = 'pending' and was = 'running' then was
     else written
   end $$;
comment on function cyberdesk.next_status(public.instance_status, public.instance_status, boolean) is
  'What a written status leads to. Late and backward writes are absorbed, never refused: the app takes an error or no row for a lost desktop.';

create view cyberdesk.first_state as
select c.id,
       c.user_id,
       case when c.status in ('pending', 'running') and c.shutdown_requested_at is null and c.ended_at is null
         then 'present' else 'absent' end as desired,
       case when c.status not in ('pending', 'running') then c.status end as status,
       c.reason,
       c.message,
       c.shutdown_requested_at,
       c.ended_at,
       least(greatest(c.timeout_at, '1970-01-01'), '9000-01-01') at time zone 'utc' as expires_at,
       case when c.ended_at is null then 0 else 1 end::bigint as observed_generation
  from public.cyberdesk_instances c;
comment on view cyberdesk.first_state is 'Each row of the app as the private row that it gives rise to when first seen.';

-- ===== guard: normalises, never raises, never loses the statement's row =====

create function cyberdesk.guard() returns trigger
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
    new.ended_at := case when new.status not in ('pending', 'running') then now() end;
    return new;
  end if;

  -- The update holds the row's lock by now, and so does all that writes the private row of a living one.
  select d.* into known from cyberdesk.desktop d where d.id = old.id;
  if not found then -- made before us, or while triggers were off; the projection adopts it
    known.reason := old.reason;
    known.message := old.message;
    known.shutdown_requested_at := old.shutdown_requested_at;
    known.ended_at := old.ended_at;
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
  'Coerces what is written to the app''s table into what may be: terminal for ever, deadlines finite, the operator''s columns as the private row has them.';

-- ===== projection: what the app's row means to us =====

create function cyberdesk.project() returns trigger
  language plpgsql security definer set search_path = '' as
$$
begin
  if tg_op = 'INSERT' then
    insert into cyberdesk.desktop
      (id, user_id, desired, status, reason, message, shutdown_requested_at, ended_at, expires_at, observed_generation)
    select f.id, f.user_id, f.desired, f.status, f.reason, f.message, f.shutdown_requested_at, f.ended_at, f.expires_at, f.observed_generation
      from cyberdesk.first_state f where f.id = new.id
    on conflict (id) do nothing;
    if not found then
      raise unique_violation using
        message = format('desktop id %s has been used before', new.id),
        hint = 'leave id out: each desktop gets an id of its own',
        schema = 'public', table = 'cyberdesk_instances', column = 'id';
    end if;
    return null;
  end if;

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

  update cyberdesk.desktop d
     set desired = least(d.desired, f.desired), -- absent < present: once absent, always absent
         status = coalesce(f.status, d.status),
         reason = f.reason,
         message = f.message,
         shutdown_requested_at = f.shutdown_requested_at,
         expires_at = f.expires_at,
         generation = d.generation + ((d.desired, d.expires_at) is distinct from (least(d.desired, f.desired), f.expires_at))::int,
         changed_at = case when (d.desired, d.expires_at) is distinct from (least(d.desired, f.desired), f.expires_at)
           then clock_timestamp() else d.changed_at end
    from cyberdesk.first_state f
   where f.id = new.id
     and d.id = new.id
     and (d.desired, d.status, d.reason, d.message, d.shutdown_requested_at, d.expires_at)
         is distinct from (least(d.desired, f.desired), coalesce(f.status, d.status), f.reason, f.message, f.shutdown_requested_at, f.expires_at);
  if not found and not exists (select from cyberdesk.desktop d where d.id = new.id) then
    perform cyberdesk.adopt(new.id);
  end if;
  return null;
end
$$;
comment on function cyberdesk.project() is
  'Carries the app''s row over to the private one, raises its generation if what is wanted changed, and leaves a tombstone when the row goes.';

create function cyberdesk.adopt(desktop_id uuid) returns void
  language sql security definer set search_path = '' as
$$
  insert into cyberdesk.desktop
    (id, user_id, desired, status, reason, message, shutdown_requested_at, ended_at, expires_at, observed_generation)
  select f.id, f.user_id, f.desired, f.status, f.reason, f.message, f.shutdown_requested_at, f.ended_at, f.expires_at, f.observed_generation
    from cyberdesk.first_state f where f.id = desktop_id
  on conflict (id) do nothing
$$;
comment on function cyberdesk.adopt(uuid) is 'Makes the private row of an app''s row that has none.';

create function cyberdesk.refuse_truncate() returns trigger
  language plpgsql security definer set search_path = '' as
$$
begin
  raise exception 'public.cyberdesk_instances cannot be truncated' using
    errcode = 'feature_not_supported',
    hint = 'delete the rows instead: each may have a VM that must be ended';
end
$$;
comment on function cyberdesk.refuse_truncate() is 'TRUNCATE fires no row trigger; VMs would run on without rows.';

-- ===== wake-up: a hint without data =====

create function cyberdesk.wake() returns trigger
  language plpgsql security definer set search_path = '' as
$$
begin
  -- A committing transaction that notifies holds a lock of the whole server through its flush to disk. So only one at a
  -- time does (1128481604 spells CCDD); the others rely on the operator's looking again shortly after each wake-up.
  if pg_try_advisory_xact_lock(1128481604, 1) then
    perform pg_notify('cyberdesk', '');
  end if;
  return null;
end
$$;
comment on function cyberdesk.wake() is 'Tells the operator to look. Runs at commit, and never waits.';

revoke all on all functions in schema cyberdesk from public;

-- The guard sorts last: an app's own trigger must not undo it.
create trigger zzzz_cyberdesk_guard before insert or update on public.cyberdesk_instances
  for each row execute function cyberdesk.guard();
create trigger zzzz_cyberdesk_project after insert or update or delete on public.cyberdesk_instances
  for each row execute function cyberdesk.project();
create trigger zzzz_cyberdesk_refuse_truncate before truncate on public.cyberdesk_instances
  for each statement execute function cyberdesk.refuse_truncate();
create constraint trigger wake_on_new_work after insert on cyberdesk.desktop
  deferrable initially deferred for each row
  when (new.generation > new.observed_generation) execute function cyberdesk.wake();
create constraint trigger wake_on_changed_work after update on cyberdesk.desktop
  deferrable initially deferred for each row
  when (new.generation is distinct from old.generation) execute function cyberdesk.wake();

comment on trigger zzzz_cyberdesk_guard on public.cyberdesk_instances is 'Must sort last among the before triggers.';
comment on trigger zzzz_cyberdesk_project on public.cyberdesk_instances is 'Tells the operator''s side.';
comment on trigger zzzz_cyberdesk_refuse_truncate on public.cyberdesk_instances is 'Deletes only, please.';
comment on trigger wake_on_new_work on cyberdesk.desktop is 'At commit.';
comment on trigger wake_on_changed_work on cyberdesk.desktop is 'At commit.';
