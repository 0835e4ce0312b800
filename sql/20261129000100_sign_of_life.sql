-- The sign of life is also how a leader notices that the database was restored in place within its term: what the database had
-- acknowledged is not in an earlier state of it. While the brake holds it stays as it is, which seen_at does not.

alter table cyberdesk.service add column last_sign_of_life timestamptz;
comment on column cyberdesk.service.last_sign_of_life is
  'The last sign of life of an operator that may write. Less than one that was acknowledged shows that the database has gone back.';

-- An operator of the release before takes no notice of what it returns.
drop function cyberdesk.sign_of_life(bigint, uuid);
create function cyberdesk.sign_of_life(epoch bigint, token uuid) returns timestamptz
  language plpgsql security definer set search_path = '' as
$$
declare
  at_now constant timestamptz := clock_timestamp();
begin
  perform cyberdesk.check_fence(sign_of_life.epoch, sign_of_life.token);
  update cyberdesk.service s set seen_at = at_now, last_sign_of_life = at_now;
  return at_now;
end
$$;
comment on function cyberdesk.sign_of_life(bigint, uuid) is
  'Tells desktop_service_state that an operator serves. The operator remembers what it returns: a database that says less later has gone back.';

create function cyberdesk.last_sign_of_life() returns timestamptz
  language sql stable security definer set search_path = '' as
$$ select s.last_sign_of_life from cyberdesk.service s $$;
comment on function cyberdesk.last_sign_of_life() is 'What sign_of_life last returned, as far as this database knows.';

revoke all on function cyberdesk.sign_of_life(bigint, uuid), cyberdesk.last_sign_of_life() from public;
grant execute on function cyberdesk.sign_of_life(bigint, uuid), cyberdesk.last_sign_of_life() to cyberdesk_daemon;
