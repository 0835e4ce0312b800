-- No row that is live is over. `migrate` does this in steps beforehand, so that no row is held for long.
update public.cyberdesk_instances set ended_at = null where ended_at is not null and status in ('pending', 'running');
