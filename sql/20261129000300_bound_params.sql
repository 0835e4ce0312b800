-- Params that are too large to be those of a desktop are not handed to the operator: it ends the row as bad-params, as
-- it does with all that is no object.

create or replace view cyberdesk.desktop_state as
select d.id,
       d.user_id,
       d.desired,
       case when d.desired = 'absent' then coalesce(d.reason, 'requested') end as reason,
       d.message,
       d.expires_at,
       d.generation,
       d.observed_generation,
       case
         when octet_length(c.params::text) > 65536
           then to_jsonb(format('unreadable: %s bytes, where 65536 are allowed', octet_length(c.params::text)))
         when jsonb_typeof(c.params) = 'object' then c.params - 'idle_timeout'
         else c.params
       end as params,
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

-- Of what is over and has no private row the operator reads no params.
create or replace function cyberdesk.desktops_by_id(ids uuid[]) returns setof cyberdesk.desktop_state
  language sql stable security definer set search_path = '' as
$$
  select s.* from cyberdesk.desktop_state s where s.id = any (ids)
  union all
  -- Rows without a private row: over before we came, or for longer than that is kept.
  select f.id, f.user_id, f.desired, case when f.desired = 'absent' then coalesce(f.reason, 'requested') end, f.message, f.expires_at,
         1, f.observed_generation, null::jsonb,
         c.status::text, null, f.ended_at, c.created_at at time zone 'utc', f.ended_at, true, f.expires_at, false
    from cyberdesk.first_state f
    join public.cyberdesk_instances c on c.id = f.id
   where f.id = any (ids) and f.ended_at is not null and not exists (select from cyberdesk.desktop d where d.id = f.id)
$$;
