-- The guard and the projection, with limits, idle timeouts and warnings; and the triggers that write the history.

-- The app's writers lock the table first, and then what its triggers read. So do we: the other way round they would be the victims.
lock table public.cyberdesk_instances in share row exclusive mode;

-- ===== words =====

create function cyberdesk.idle_timeout_of(params jsonb) returns interval
  language plpgsql stable set search_path = '' as
$$
declare
  given interval;
begin
  given := params ->> 'idle_timeout';
  return case when given between '1 second' and '1 year' then given end;
exception when data_exception then
  return null;
end
$$;
comment on function cyberdesk.idle_timeout_of(jsonb) is 'The idle timeout that a row''s params ask for; null if there is none, or none that can be.';

create or replace view cyberdesk.first_state as
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
       case when c.ended_at is null then 0 else 1 end::bigint as observed_generation,
       c.warned_at,
       case when jsonb_typeof(c.params) = 'object' and c.params ? 'idle_timeout' then cyberdesk.idle_timeout_of(c.params)
         else (select s.idle_timeout from cyberdesk.settings s) end as idle_timeout
  from public.cyberdesk_instances c;
comment on view cyberdesk.first_state is
  'Each row of the app as the private row that it gives rise to when first seen. Its idle clock starts with the next write.';

create function cyberdesk.claims() returns jsonb
  language plpgsql stable set search_path = '' as
$$
begin
  -- Mostly there are none; a block with an exception clause costs each time that it is entered.
  if nullif(current_setting('request.jwt.claims', true), '') is null then
    return null;
  end if;
  begin
    return current_setting('request.jwt.claims')::jsonb;
  exception when data_exception then
    return null; -- set by hand, and no JSON: nobody's statement fails for it
  end;
end
$$;
comment on function cyberdesk.claims() is 'The JWT''s claims, as PostgREST hands them on; null without any.';

-- ===== guard: normalises, never loses the statement's row, and raises only for a limit that the administrator has set =====

create function cyberdesk.check_lifetime(lifetime interval, least_lifetime interval, most_lifetime interval) returns void
  language plpgsql immutable set search_path = '' as
$$
begin
  if lifetime < least_lifetime then
    raise exception using
      errcode = 'CD004',
      message = format('a desktop must be given at least %s, and timeout_at would leave it %s', least_lifetime, date_trunc('second', lifetime)),
      hint = 'choose a later timeout_at; the limit is min_lifetime in cyberdesk.settings';
  end if;
  if lifetime > most_lifetime then
    raise exception using
      errcode = 'CD004',
      message = format('a desktop may live for %s at most, and timeout_at would let it live for %s', most_lifetime, date_trunc('second', lifetime)),
      hint = 'choose an earlier timeout_at; the limit is max_lifetime in cyberdesk.settings';
  end if;
end
$$;
comment on function cyberdesk.check_lifetime(interval, interval, interval) is 'Raises CD004 unless a lifetime is within the limits; a limit that is null is none.';

create or replace function cyberdesk.guard() returns trigger
  language plpgsql security definer set search_path = '' as
$$
declare
  -- Deadlines stay within what every client can read. A null is let through, for the table's own not null to speak.
  earliest constant timestamp := '1970-01-01';
  latest constant timestamp := '9000-01-01';
  settings cyberdesk.settings;
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
    if new.ended_at is null then
      select s.* into settings from cyberdesk.settings s;
      if settings.min_lifetime is not null or settings.max_lifetime is not null then
        perform cyberdesk.check_lifetime(new.timeout_at - now() at time zone 'utc', settings.min_lifetime, settings.max_lifetime);
      end if;
      if jsonb_typeof(new.params -> 'idle_timeout') <> 'null' and cyberdesk.idle_timeout_of(new.params) is null then
        raise invalid_parameter_value using
          message = format('params.idle_timeout must be a time from 1 second to 1 year, and is %s', new.params -> 'idle_timeout'),
          hint = 'write it as "15 minutes"; null means none';
      end if;
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
  'Coerces what is written to the app''s table into what may be: terminal for ever, deadlines finite and within the limits, '
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
  if tg_op = 'INSERT' then
    insert into cyberdesk.desktop
      (id, user_id, desired, status, reason, message, shutdown_requested_at, ended_at, expires_at, observed_generation, warned_at, idle_timeout)
    select f.id, f.user_id, f.desired, f.status, f.reason, f.message, f.shutdown_requested_at, f.ended_at, f.expires_at,
           f.observed_generation, f.warned_at, f.idle_timeout
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

create or replace function cyberdesk.adopt(desktop_id uuid) returns void
  language sql security definer set search_path = '' as
$$
  insert into cyberdesk.desktop
    (id, user_id, desired, status, reason, message, shutdown_requested_at, ended_at, expires_at, observed_generation, warned_at, idle_timeout)
  select f.id, f.user_id, f.desired, f.status, f.reason, f.message, f.shutdown_requested_at, f.ended_at, f.expires_at,
         f.observed_generation, f.warned_at, f.idle_timeout
    from cyberdesk.first_state f where f.id = desktop_id
  on conflict (id) do nothing
$$;

create or replace function cyberdesk.adopt_rows(at_most bigint) returns bigint
  language plpgsql security definer set search_path = '' as
$$
declare
  adopted bigint;
begin
  -- `for share` keeps a delete from slipping between reading and writing; `skip locked` keeps us out of every deadlock.
  -- Who holds a row that is skipped adopts it by its own trigger if it writes, and the next call finds it if not.
  insert into cyberdesk.desktop
    (id, user_id, desired, status, reason, message, shutdown_requested_at, ended_at, expires_at, observed_generation, warned_at, idle_timeout)
  select f.id, f.user_id, f.desired, f.status, f.reason, f.message, f.shutdown_requested_at, f.ended_at, f.expires_at,
         f.observed_generation, f.warned_at, f.idle_timeout
    from cyberdesk.first_state f
   where f.ended_at is null and not exists (select from cyberdesk.desktop d where d.id = f.id)
   limit at_most
     for share of f skip locked
  on conflict (id) do nothing;
  get diagnostics adopted = row_count;
  return adopted;
end
$$;

-- ===== history, and desktops per user =====

create function cyberdesk.record() returns trigger
  language plpgsql security definer set search_path = '' as
$$
declare
  claims constant jsonb := cyberdesk.claims();
begin
  if tg_op = 'DELETE' then
    insert into cyberdesk.history (desktop_id, user_id, event, from_status, reason, timeout_at, actor_role, actor_sub)
    values (old.id, old.user_id, 'deleted', old.status, coalesce(old.reason, 'row-deleted'), old.timeout_at at time zone 'utc',
            claims ->> 'role', left(claims ->> 'sub', 200));
  else
    insert into cyberdesk.history (desktop_id, user_id, event, from_status, to_status, reason, timeout_at, actor_role, actor_sub)
    values (new.id, new.user_id,
            case
              when new.ended_at is distinct from old.ended_at then 'ended'
              when new.shutdown_requested_at is distinct from old.shutdown_requested_at then 'shutdown-requested'
              when new.warned_at > old.warned_at or old.warned_at is null and new.warned_at is not null then 'warned'
              when new.timeout_at <> old.timeout_at then 'deadline'
              else 'status'
            end,
            old.status, new.status, new.reason, new.timeout_at at time zone 'utc', claims ->> 'role', left(claims ->> 'sub', 200));
  end if;
  return null;
end
$$;
comment on function cyberdesk.record() is 'Writes one entry of history for a change of the app''s row that matters.';

create table cyberdesk.insert_turns (
  user_id uuid primary key,
  taken_at timestamptz not null
);
comment on table cyberdesk.insert_turns is
  'By which inserts of one user take turns while their number is limited: who waited counts anew, and whose snapshot is older fails.';
comment on column cyberdesk.insert_turns.user_id is 'The user.';
comment on column cyberdesk.insert_turns.taken_at is 'When their last desktop was inserted.';
revoke all on table cyberdesk.insert_turns from public;

create function cyberdesk.inserted() returns trigger
  language plpgsql security definer set search_path = '' as
$$
declare
  claims constant jsonb := cyberdesk.claims();
  most bigint;
  owner_id uuid;
  has bigint;
begin
  insert into cyberdesk.history (desktop_id, user_id, event, to_status, timeout_at, actor_role, actor_sub)
  select i.id, i.user_id, 'created', i.status, i.timeout_at at time zone 'utc', claims ->> 'role', left(claims ->> 'sub', 200)
    from inserted i;

  select s.desktops_per_user into most from cyberdesk.settings s;
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
comment on function cyberdesk.inserted() is 'Writes the history of new rows, and raises CD005 if a user has more desktops now than may be.';

revoke all on function
  cyberdesk.idle_timeout_of(jsonb),
  cyberdesk.claims(),
  cyberdesk.check_lifetime(interval, interval, interval),
  cyberdesk.record(),
  cyberdesk.inserted()
from public;

create trigger zzzz_cyberdesk_inserted after insert on public.cyberdesk_instances
  referencing new table as inserted for each statement execute function cyberdesk.inserted();
create trigger zzzz_cyberdesk_record_change after update on public.cyberdesk_instances
  for each row
  when ((old.status, old.timeout_at, old.shutdown_requested_at, old.ended_at) is distinct from
        (new.status, new.timeout_at, new.shutdown_requested_at, new.ended_at)
        or new.warned_at is not null and new.warned_at is distinct from old.warned_at)
  execute function cyberdesk.record();
create trigger zzzz_cyberdesk_record_delete after delete on public.cyberdesk_instances
  for each row execute function cyberdesk.record();
comment on trigger zzzz_cyberdesk_inserted on public.cyberdesk_instances is 'History and limits, after all rows of a statement.';
comment on trigger zzzz_cyberdesk_record_change on public.cyberdesk_instances is 'History.';
comment on trigger zzzz_cyberdesk_record_delete on public.cyberdesk_instances is 'History.';
