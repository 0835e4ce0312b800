-- The bound pair: which cluster's desktops these are, so that a copy, an older state, or a second cluster is noticed before anything is done on
-- its word. The operator judges; here is what it judges by, and where a person can confirm.

create table cyberdesk.bond (
  only_row boolean primary key default true check (only_row),
  cluster_id text,
  system_identifier text,
  database_oid bigint,
  bound_at timestamptz,
  confirmation text check (length(confirmation) <= 200)
);
insert into cyberdesk.bond default values;
comment on table cyberdesk.bond is 'The cluster that this database is bound to, and what it was itself when it was bound: a copy is another.';
comment on column cyberdesk.bond.only_row is 'Keeps the table to one row.';
comment on column cyberdesk.bond.cluster_id is 'UID of the operator''s namespace; null: no operator has served this database yet.';
comment on column cyberdesk.bond.system_identifier is 'The server''s at that time: a restored dump has another.';
comment on column cyberdesk.bond.database_oid is 'The database''s at that time: a copy within one server has another.';
comment on column cyberdesk.bond.bound_at is 'Since when.';
comment on column cyberdesk.bond.confirmation is 'A person''s word that another pair is right, by confirm_pair; emptied once the operator has taken it up.';

-- A row that went round its trigger left no last status. What has a VM was running, as far as anyone can tell.
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
       coalesce(least(greatest(c.timeout_at, '1970-01-01'), '9000-01-01') at time zone 'utc', d.expires_at) as timeout_at
  from cyberdesk.desktop d
  left join public.cyberdesk_instances c on c.id = d.id;

-- ===== looking =====

create function cyberdesk.pair()
  returns table (database_id uuid, system_identifier text, database_oid bigint, epoch bigint,
                 cluster_id text, bound_system_identifier text, bound_database_oid bigint, confirmation text)
  language sql stable security definer set search_path = '' as
$$
  select i.database_id, i.system_identifier, i.database_oid, i.epoch, b.cluster_id, b.system_identifier, b.database_oid, b.confirmation
    from cyberdesk.identity() i, cyberdesk.bond b
$$;
comment on function cyberdesk.pair() is 'Which database this is, the last epoch that it accepted, and which cluster it is bound to, as what.';

create function cyberdesk.lost(ids uuid[]) returns table (live bigint, vanished bigint, unknown uuid[])
  language sql stable security definer set search_path = '' as
$$
  select count(*),
         count(*) filter (where d.desired = 'present' and not exists (select from public.cyberdesk_instances c where c.id = d.id)),
         array(
           select e.id from unnest(ids) as e (id)
            where not exists (select from cyberdesk.desktop k where k.id = e.id)
              and not exists (select from public.cyberdesk_instances c where c.id = e.id)
              and not exists (select from cyberdesk.used_id u where u.id = e.id))
    from cyberdesk.desktop d where d.ended_at is null
$$;
comment on function cyberdesk.lost(uuid[]) is
  'What is missing here: how many desktops are not over, how many of them are wanted though their row is gone without a word, and which of these ids were '
  'never heard of: no row, no tombstone, no used id.';

create function cyberdesk.ended_within(seconds double precision) returns setof uuid
  language sql stable security definer set search_path = '' as
$$ select d.id from cyberdesk.desktop d where d.ended_at > now() - make_interval(secs => seconds) $$;
comment on function cyberdesk.ended_within(double precision) is 'Desktops that were over no longer ago than this.';

-- ===== writing =====

create function cyberdesk.bind(epoch bigint, token uuid, cluster text, confirmed boolean) returns void
  language plpgsql security definer set search_path = '' as
$$
begin
  perform cyberdesk.check_fence(bind.epoch, bind.token);
  -- A person has said that the database is right as it stands: what has no row shall have no desktop.
  if confirmed then
    perform cyberdesk.stop(array(
      select d.id from cyberdesk.desktop d
       where d.ended_at is null and d.desired = 'present'
         and not exists (select from public.cyberdesk_instances c where c.id = d.id)
         for no key update of d skip locked), 'row-deleted', null);
  end if;
  update cyberdesk.bond b
     set cluster_id = cluster, system_identifier = i.system_identifier, database_oid = i.database_oid,
         bound_at = case when (b.cluster_id, b.system_identifier, b.database_oid)
                              is distinct from (cluster, i.system_identifier, i.database_oid) then clock_timestamp() else b.bound_at end,
         confirmation = null
    from cyberdesk.identity() i
   where (b.cluster_id, b.system_identifier, b.database_oid) is distinct from (cluster, i.system_identifier, i.database_oid)
      or b.confirmation is not null;
  update cyberdesk.service s set braked_because = null where s.braked_because is not null;
end
$$;
comment on function cyberdesk.bind(bigint, uuid, text, boolean) is
  'Binds this database to a cluster, as an operator that may write has judged it, and takes the brake off. confirmed: a person has said so.';

create function cyberdesk.brake(cluster text, because text) returns boolean
  language sql security definer set search_path = '' as
$$
  update cyberdesk.service s
     set braked_because = left(because, 2000), seen_at = clock_timestamp()
    from cyberdesk.bond b
   where coalesce(b.cluster_id, cluster) = cluster
  returning true
$$;
comment on function cyberdesk.brake(text, text) is
  'Tells desktop_service_state why the operator of this cluster does nothing. A database that another cluster is bound to is not told: its own operator serves it.';

create function cyberdesk.confirm_pair(confirmation text) returns text
  language plpgsql security definer set search_path = '' as
$$
begin
  update cyberdesk.bond b set confirmation = confirm_pair.confirmation;
  return 'noted: the operator goes on within seconds, if this is what it asks to be confirmed';
end
$$;
comment on function cyberdesk.confirm_pair(text) is
  'Confirms, as the operator''s message says, that database and cluster belong together as they are now. For an administrator.';

revoke all on table cyberdesk.bond from public;
revoke all on function
  cyberdesk.pair(),
  cyberdesk.lost(uuid[]),
  cyberdesk.ended_within(double precision),
  cyberdesk.bind(bigint, uuid, text, boolean),
  cyberdesk.brake(text, text),
  cyberdesk.confirm_pair(text)
from public;
grant execute on function
  cyberdesk.pair(),
  cyberdesk.lost(uuid[]),
  cyberdesk.ended_within(double precision),
  cyberdesk.bind(bigint, uuid, text, boolean),
  cyberdesk.brake(text, text)
to cyberdesk_daemon;
