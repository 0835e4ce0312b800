-- What an administrator may decide. One row, changed by a plain update as the owner of the schema:
--   update cyberdesk.settings set max_lifetime = '8 hours', desktops_per_user = 3;

create table cyberdesk.settings (
  only_row boolean primary key default true check (only_row),
  min_lifetime interval
    constraint min_lifetime_is_from_0_to_1_year check (min_lifetime between '0' and '1 year'),
  max_lifetime interval
    constraint max_lifetime_is_from_1_second_to_100_years check (max_lifetime between '1 second' and '100 years'),
  desktops_per_user integer
    constraint desktops_per_user_is_not_negative check (desktops_per_user >= 0),
  browsers_may_insert boolean not null default false,
  idle_timeout interval
    constraint idle_timeout_is_from_1_second_to_1_year check (idle_timeout between '1 second' and '1 year'),
  warn_before interval
    constraint warn_before_is_from_1_second_to_1_year check (warn_before between '1 second' and '1 year'),
  history_retention interval not null default '90 days'
    constraint history_retention_is_from_1_day_to_100_years check (history_retention between '1 day' and '100 years'),
  paused boolean not null default false,
  constraint min_lifetime_is_at_most_max_lifetime check (min_lifetime <= max_lifetime)
);
insert into cyberdesk.settings default values;

comment on table cyberdesk.settings is
  'What an administrator may decide, in one row. A change holds for the next statement; null means off, and all is off at first.';
comment on column cyberdesk.settings.only_row is 'Keeps the table to one row.';
comment on column cyberdesk.settings.min_lifetime is
  'Least time from insert to timeout_at; a row inserted with less is refused (CD004). Ending a desktop early stays possible.';
comment on column cyberdesk.settings.max_lifetime is
  'Most time from insert to timeout_at, extensions included; more is refused (CD004). If it is below 24 hours, lower the default of timeout_at too.';
comment on column cyberdesk.settings.desktops_per_user is
  'Most desktops of one user at a time; one more is refused (CD005). A desktop counts until its ended_at is set. Fewer than a user has already ends none.';
comment on column cyberdesk.settings.browsers_may_insert is 'Whether signed-in users may insert desktops of their own from a browser.';
comment on column cyberdesk.settings.idle_timeout is
  'How long a desktop may run without touch_desktop before it ends as idle; params.idle_timeout of a row takes its place. Holds for rows inserted later.';
comment on column cyberdesk.settings.warn_before is
  'How long before its end a desktop''s warned_at is filled: at most half its idle timeout, if it has one.';
comment on column cyberdesk.settings.history_retention is 'How long history is kept.';
comment on column cyberdesk.settings.paused is 'Whether new desktops wait instead of being made. Those that are there live on, and end as usual.';

revoke all on table cyberdesk.settings from public;
