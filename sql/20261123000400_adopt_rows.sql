-- How rows from before the triggers get their private rows. Those that are over need none: while such a row is there its id
-- is taken, and when it goes its trigger leaves the tombstone.

create function cyberdesk.adopt_rows(at_most bigint) returns bigint
  language plpgsql security definer set search_path = '' as
$$
declare
  adopted bigint;
begin
  -- `for share` keeps a delete from slipping between reading and writing; `skip locked` keeps us out of every deadlock.
  -- Who holds a row that is skipped adopts it by its own trigger if it writes, and the next call finds it if not.
  insert into cyberdesk.desktop
    (id, user_id, desired, status, reason, message, shutdown_requested_at, ended_at, expires_at, observed_generation)
  select f.id, f.user_id, f.desired, f.status, f.reason, f.message, f.shutdown_requested_at, f.ended_at, f.expires_at, f.observed_generation
    from cyberdesk.first_state f
   where f.ended_at is null and not exists (select from cyberdesk.desktop d where d.id = f.id)
   limit at_most
     for share of f skip locked
  on conflict (id) do nothing;
  get diagnostics adopted = row_count;
  return adopted;
end
$$;
comment on function cyberdesk.adopt_rows(bigint) is 'Makes the private rows of those app rows that are not over and have none; how many it made.';
revoke all on function cyberdesk.adopt_rows(bigint) from public;
