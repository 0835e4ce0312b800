-- Browser users may insert desktops of their own, if the setting allows it. Which columns they may name is a grant, not a
-- policy: never id or status, nor what the gateway and the operator write.

create function cyberdesk.browsers_may_insert() returns boolean
  language sql stable security definer set search_path = '' as
$$ select s.browsers_may_insert from cyberdesk.settings s $$;
comment on function cyberdesk.browsers_may_insert() is 'What the setting of this name says, for the policy: browser users cannot read the settings.';
revoke all on function cyberdesk.browsers_may_insert() from public;
grant execute on function cyberdesk.browsers_may_insert() to authenticated;

create policy cyberdesk_owners_insert on public.cyberdesk_instances
  for insert to authenticated with check ((select auth.uid()) = user_id and (select cyberdesk.browsers_may_insert()));
comment on policy cyberdesk_owners_insert on public.cyberdesk_instances is
  'Owners insert their own desktops while cyberdesk.settings.browsers_may_insert is on. It is off at first.';
grant insert (user_id, timeout_at, params) on table public.cyberdesk_instances to authenticated;
