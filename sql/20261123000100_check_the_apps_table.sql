-- Refuses an app's table that is not what we need, with one message that names every fault, before anything is touched.
-- `migrate` runs this text first each time, also when all migrations are applied, so that a lost column is found.
do $$
declare
  instances constant regclass := to_regclass('public.cyberdesk_instances');
  status constant regtype := to_regtype('public.instance_status');
  labels text;
  faults text[] := '{}';
begin
  if status is not null then
    select string_agg(e.enumlabel, ', ' order by e.enumsortorder) into labels
      from pg_catalog.pg_enum e where e.enumtypid = status;
    if labels is distinct from 'pending, running, completed, error, terminated' then
      faults := faults || format('type public.instance_status must be the enum of pending, running, completed, error, terminated, but has %s',
        coalesce(labels, 'no labels'));
    end if;
  end if;

  if instances is not null then
    if (select c.relkind from pg_catalog.pg_class c where c.oid = instances) <> 'r' then
      faults := faults || 'it must be an ordinary table'::text;
    end if;
    faults := faults || array(
      select case
          when a.attname is null then format('column %s %s is missing', wanted.name, wanted.type)
          else format('column %s must be %s, but is %s', wanted.name, wanted.type, pg_catalog.format_type(a.atttypid, a.atttypmod))
        end
        from (values
          (1, 'id', 'uuid', true),
          (2, 'user_id', 'uuid', true),
          (3, 'created_at', 'timestamp without time zone', true),
          (4, 'updated_at', 'timestamp without time zone', true),
          (5, 'status', 'instance_status', true),
          (6, 'timeout_at', 'timestamp without time zone', true),
          (7, 'stream_url', 'character varying(1024)', true),
          (8, 'reason', 'text', false),
          (9, 'message', 'text', false),
          (10, 'shutdown_requested_at', 'timestamp with time zone', false),
          (11, 'ended_at', 'timestamp with time zone', false),
          (12, 'params', 'jsonb', false)
        ) as wanted (position, name, type, required)
        left join pg_catalog.pg_attribute a
          on a.attrelid = instances and a.attname = wanted.name and a.attnum > 0 and not a.attisdropped
       where case
           when a.attname is null then wanted.required or to_regclass('cyberdesk.desktop') is not null
           when wanted.name = 'status' then a.atttypid is distinct from status::oid
           else pg_catalog.format_type(a.atttypid, a.atttypmod) <> wanted.type
         end
       order by wanted.position);
    if not exists (
      select from pg_catalog.pg_index i
        join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
       where i.indrelid = instances and i.indisprimary and i.indnkeyatts = 1 and a.attname = 'id'
    ) then
      faults := faults || 'id must be the primary key'::text;
    end if;
  end if;

  if to_regnamespace('auth') is not null then
    if to_regclass('auth.users') is null then
      faults := faults || 'schema auth exists, but has no table auth.users to refer to'::text;
    end if;
    if to_regprocedure('auth.uid()') is null then
      faults := faults || 'schema auth exists, but has no function auth.uid() that tells who asks'::text;
    end if;
  end if;

  if cardinality(faults) > 0 then
    raise exception 'public.cyberdesk_instances is not as needed: %', array_to_string(faults, '; ')
      using errcode = 'CD002',
        hint = 'Nothing was changed. Bring the table back to the columns listed in sql/README.md, then migrate again.';
  end if;
end $$;
