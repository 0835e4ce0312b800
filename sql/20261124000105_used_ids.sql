-- What is left of a tombstone once it is trimmed: an id once used is refused for ever.

create table cyberdesk.used_id (
  id uuid primary key
);
comment on table cyberdesk.used_id is
  'Ids of desktops whose row and tombstone are gone: 44 bytes each and their key, for ever, and nothing about anybody.';
comment on column cyberdesk.used_id.id is 'The id, which no desktop gets again.';
revoke all on table cyberdesk.used_id from public;
