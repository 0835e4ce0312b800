-- Every object of ours, who owns it, and a statement for each verb that tries it and does no more.
create temporary view object as
select format('schema %I', n.nspname) as name, 'schema' as kind, n.oid, n.nspowner::regrole::text as owner, null::text as call
  from pg_namespace n where n.nspname in ('public', 'cyberdesk')
union all
select format('%s %s', case c.relkind when 'S' then 'sequence' else 'table' end, c.oid::regclass),
       case c.relkind when 'S' then 'sequence' else 'table' end, c.oid, c.relowner::regrole::text, c.oid::regclass::text
  from pg_class c where c.relnamespace in ('public'::regnamespace, 'cyberdesk'::regnamespace) and c.relkind in ('r', 'v', 'm', 'f', 'p', 'S')
union all
select format('function %s', p.oid::regprocedure), 'function', p.oid, p.proowner::regrole::text,
       format('%I.%I(%s)', p.pronamespace::regnamespace, p.proname,
         (select string_agg('null::' || t::regtype, ', ' order by at) from unnest(p.proargtypes) with ordinality as a (t, at)))
  from pg_proc p where p.pronamespace in ('public'::regnamespace, 'cyberdesk'::regnamespace)
union all
select format('type %s', t.oid::regtype), 'type', t.oid, t.typowner::regrole::text, t.oid::regtype::text
  from pg_type t where t.typnamespace in ('public'::regnamespace, 'cyberdesk'::regnamespace) and t.typrelid = 0 and t.typcategory <> 'A';

create temporary view attempt as
select o.name, o.oid, v.verb, v.statement
  from object o, lateral (values
    ('schema', 'usage', format('select %L::regclass', substr(o.name, 8) || '.nothing')),
    ('schema', 'create', format('create table %s.nothing ()', substr(o.name, 8))),
    ('table', 'select', format('select from %s limit 0', o.call)),
    ('table', 'insert', format('insert into %s default values', o.call)),
    ('table', 'update', format('update %s set %I = default where false', o.call,
      coalesce((select a.attname from pg_attribute a where a.attrelid = o.oid and a.attnum > 0 and not a.attisdropped order by a.attnum = 2 desc, a.attnum limit 1), '-'))),
    ('table', 'delete', format('delete from %s where false', o.call)),
    ('table', 'truncate', format('truncate %s', o.call)),
    ('table', 'trigger', format('create trigger nothing after insert on %s for each statement execute function pg_catalog.tsvector_update_trigger()', o.call)),
    ('table', 'maintain', format('reindex table %s', o.call)),
    ('sequence', 'usage', format('select nextval(%L)', o.call)),
    ('sequence', 'select', format('select last_value from %s', o.call)),
    ('sequence', 'update', format('select setval(%L, 1)', o.call)),
    ('function', 'execute', format('select %s', o.call)),
    ('type', 'usage', format('create domain pg_temp.nothing as %s', o.call))
  ) as v (kind, verb, statement)
 where v.kind = o.kind;
