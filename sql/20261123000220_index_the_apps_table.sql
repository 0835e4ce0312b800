-- Whose desktops there are, and which are not over. `migrate` makes these beforehand, `concurrently`: a large table takes
-- minutes, and nobody may wait for that. Here, in a transaction, that is not possible.
create index if not exists cyberdesk_instances_user_created_idx on public.cyberdesk_instances (user_id, created_at desc);
create index if not exists cyberdesk_instances_not_over_idx on public.cyberdesk_instances (id) where ended_at is null;
