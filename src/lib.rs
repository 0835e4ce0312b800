//! `cyberdesk-operator`: keeps a fleet of virtual desktops true to a Postgres table.
