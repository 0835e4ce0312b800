-- The operator's role may not read the history of migrations, but must be able to tell whether it is complete.

create function cyberdesk.applied_migrations() returns table (version bigint, name text)
  language plpgsql stable security definer set search_path = '' as
$$
begin
  return query select h.version::bigint, h.name::text from cyberdesk.refinery_schema_history h order by 1;
end
$$;
comment on function cyberdesk.applied_migrations() is 'Which migrations this database has, oldest first.';

revoke all on function cyberdesk.applied_migrations() from public;
grant execute on function cyberdesk.applied_migrations() to cyberdesk_daemon;
