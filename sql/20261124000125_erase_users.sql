-- Whoever is deleted takes their history along. A migration of its own: it locks GoTrue's table, and holds no lock of the app's meanwhile.

create function cyberdesk.erase_user() returns trigger
  language plpgsql security definer set search_path = '' as
$$
begin
  delete from cyberdesk.history h where h.user_id = old.id;
  update cyberdesk.history h set actor_sub = null where h.actor_sub = old.id::text and h.actor_sub <> h.user_id::text;
  delete from cyberdesk.insert_turns t where t.user_id = old.id;
  return null;
end
$$;
comment on function cyberdesk.erase_user() is 'Erases the history of a user who is deleted.';

revoke all on function cyberdesk.erase_user() from public;

do $$ begin
  -- At commit: the deletes of the user's rows that the foreign key causes, and their entries of history, come after all that is immediate.
  create constraint trigger cyberdesk_erase_user after delete on auth.users
    deferrable initially deferred for each row execute function cyberdesk.erase_user();
exception when insufficient_privilege then
  raise warning 'cannot make a trigger on auth.users: the history of a deleted user stays until its retention ends';
end $$;
