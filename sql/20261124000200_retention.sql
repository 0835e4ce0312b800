-- What is kept for a time only: history, and the private rows of desktops that are over.

alter table cyberdesk.settings
  add column tombstone_retention interval not null default '30 days'
    -- A write of a leader long deposed, landing late, is still told by the tombstone.
    constraint tombstone_retention_is_from_1_day_to_100_years check (tombstone_retention between '1 day' and '100 years');
comment on column cyberdesk.settings.tombstone_retention is
  'How long the private row of a desktop is kept after it is over. The app''s rows are the app''s: they stay until it deletes them.';

create index desktop_over_idx on cyberdesk.desktop (ended_at) where ended_at is not null;

create or replace function cyberdesk.trim(epoch bigint, token uuid) returns bigint
  language plpgsql security definer set search_path = '' as
$$
declare
  trimmed bigint;
  entries bigint;
begin
  perform cyberdesk.check_fence(trim.epoch, trim.token);

  -- Found by key, whatever the planner thinks of a thousand: a join might read the whole table instead.
  -- Where the app's row is still there, it holds the id, and its own triggers make a private row anew if it is written or deleted.
  with gone as (
    delete from cyberdesk.desktop d
     where d.id = any (array(
       select o.id from cyberdesk.desktop o
        where o.ended_at < now() - (select s.tombstone_retention from cyberdesk.settings s)
        order by o.ended_at limit 1000
          for update skip locked))
    returning d.id
  ), kept as (
    insert into cyberdesk.used_id (id)
    select g.id from gone g where not exists (select from public.cyberdesk_instances c where c.id = g.id)
    on conflict (id) do nothing
  )
  select count(*) into trimmed from gone;

  -- Oldest first by the key, which is all that a batch reads; nobody waits for it, and it waits for nobody.
  delete from cyberdesk.history h
   where h.id = any (array(select o.id from cyberdesk.history o order by o.id limit 1000 for update skip locked))
     and h.at < now() - (select s.history_retention from cyberdesk.settings s);
  get diagnostics entries = row_count;
  return trimmed + entries;
end
$$;
comment on function cyberdesk.trim(bigint, uuid) is
  'Deletes a batch of what is older than it is kept: history, and private rows of desktops that are over. How many; as long as there were any, there may be more.';

create or replace function cyberdesk.desktops_by_id(ids uuid[]) returns setof cyberdesk.desktop_state
  language sql stable security definer set search_path = '' as
$$
  select s.* from cyberdesk.desktop_state s where s.id = any (ids)
  union all
  -- Rows without a private row: over before we came, or for longer than that is kept.
  select f.id, f.user_id, f.desired, case when f.desired = 'absent' then coalesce(f.reason, 'requested') end, f.message, f.expires_at,
         1, f.observed_generation, case when jsonb_typeof(c.params) = 'object' then c.params - 'idle_timeout' else c.params end,
         c.status::text, null, f.ended_at, c.created_at at time zone 'utc', f.ended_at, true, f.expires_at
    from cyberdesk.first_state f
    join public.cyberdesk_instances c on c.id = f.id
   where f.id = any (ids) and f.ended_at is not null and not exists (select from cyberdesk.desktop d where d.id = f.id)
$$;
comment on function cyberdesk.desktops_by_id(uuid[]) is 'These, tombstones and those that are over included.';
