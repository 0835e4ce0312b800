-- What people at the operator's command line look at under its own role: `status` and `diff` write nothing.

create function cyberdesk.history_of(desktop_id uuid)
  returns table (at timestamptz, event text, from_status text, to_status text, reason text, timeout_at timestamptz, actor text, actor_role text)
  language sql stable security definer set search_path = '' as
$$
  select h.at, h.event, h.from_status::text, h.to_status::text, h.reason, h.timeout_at, h.actor, h.actor_role
    from cyberdesk.history h where h.desktop_id = history_of.desktop_id order by h.id
$$;
comment on function cyberdesk.history_of(uuid) is
  'What became of one desktop, oldest first. Who acted is told by role, not by person.';

revoke all on function cyberdesk.history_of(uuid) from public;
grant execute on function cyberdesk.history_of(uuid), cyberdesk.service_state() to cyberdesk_daemon;
