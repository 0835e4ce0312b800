-- An insert costs the app less once more: plain statements in place of one that joins them.

create function cyberdesk.refuse_used(id uuid) returns text
  language plpgsql set search_path = '' as
$$
begin
  raise unique_violation using
    message = format('desktop id %s has been used before', refuse_used.id),
    hint = 'leave id out: each desktop gets an id of its own',
    schema = 'public', table = 'cyberdesk_instances', column = 'id';
end
$$;
comment on function cyberdesk.refuse_used(uuid) is 'Raises 23505 for an id that was used before.';

create or replace function cyberdesk.inserted() returns trigger
  language plpgsql security definer set search_path = '' as
$$
declare
  claims jsonb;
  settings cyberdesk.settings;
  made bigint;
  told bigint;
  owner_id uuid;
  has bigint;
begin
  if current_setting('request.jwt.claims', true) <> '' then
    claims := cyberdesk.claims();
  end if;
  select s.* into settings from cyberdesk.settings s;

  -- What first_state says of rows that the guard has just let in, without reading them again: inserts are many.
  insert into cyberdesk.desktop (id, user_id, desired, status, ended_at, expires_at, observed_generation, idle_timeout)
  select i.id, i.user_id,
         case when i.ended_at is null then 'present' else 'absent' end,
         case when i.ended_at is not null then i.status end,
         i.ended_at,
         i.timeout_at at time zone 'utc',
         case when i.ended_at is null then 0 else 1 end,
         case when jsonb_typeof(i.params) = 'object' and i.params ? 'idle_timeout' then cyberdesk.idle_timeout_of(i.params)
           else settings.idle_timeout end
    from inserted i
  on conflict (id) do nothing;
  get diagnostics made = row_count;

  -- In this order: a tombstone that is trimmed meanwhile makes the insert wait, and is found among the used ids then.
  insert into cyberdesk.history (desktop_id, user_id, event, to_status, timeout_at, actor_role, actor_sub)
  select i.id, i.user_id,
         coalesce((select cyberdesk.refuse_used(u.id) from cyberdesk.used_id u where u.id = i.id), 'created'),
         i.status, i.timeout_at at time zone 'utc', claims ->> 'role', left(claims ->> 'sub', 200)
    from inserted i;
  get diagnostics told = row_count;

  -- A trigger of the app's that wrote to a row at once has had it adopted: since this transaction began, and it was made
  -- but once. Every other row that was there already is another desktop's.
  if made <> told then
    perform cyberdesk.refuse_used(i.id)
       from inserted i
      where not exists (select from cyberdesk.desktop d where d.id = i.id and d.created_at >= now())
         or (select count(*) from cyberdesk.history h where h.desktop_id = i.id and h.event = 'created') > 1;
  end if;

  if settings.min_lifetime is not null or settings.max_lifetime is not null then
    perform cyberdesk.check_lifetime(i.timeout_at - now() at time zone 'utc', settings.min_lifetime, settings.max_lifetime)
      from inserted i where i.ended_at is null;
  end if;
  if settings.desktops_per_user is null then
    return null;
  end if;
  -- In one order, so that two statements with the same users never wait for each other in a circle.
  for owner_id in select distinct i.user_id from inserted i where i.ended_at is null order by i.user_id loop
    insert into cyberdesk.insert_turns as t (user_id, taken_at) values (owner_id, clock_timestamp())
      on conflict (user_id) do update set taken_at = excluded.taken_at;
    -- A statement of its own: it sees what was committed while we waited.
    select count(*) into has from cyberdesk.desktop d where d.user_id = owner_id and d.ended_at is null;
    if has > settings.desktops_per_user then
      raise exception using
        errcode = 'CD005',
        message = format('a user may have %s at a time, and this would make %s',
          case settings.desktops_per_user when 1 then '1 desktop' else settings.desktops_per_user || ' desktops' end, has),
        hint = 'end one and wait until its ended_at is set; the limit is desktops_per_user in cyberdesk.settings';
    end if;
  end loop;
  return null;
end
$$;

revoke all on function cyberdesk.refuse_used(uuid) from public;
