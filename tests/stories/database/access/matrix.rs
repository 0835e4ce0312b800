//! Who may do what with each object of ours. What is not written here, nobody may but the owner, who is the hosted
//! `postgres`.

/// An object, and its roles with their verbs.
pub(super) type Line = (&'static str, May);
type May = &'static [(&'static str, &'static str)];

/// Whose permissions are written here, beside the owner's: the roles that Supabase's parts log in as or take, ours,
/// and one that is a member of nothing.
pub(super) const ROLES: [&str; 7] =
    ["anon", "authenticated", "service_role", "authenticator", "supabase_auth_admin", "cyberdesk_daemon", STRANGER];
/// A role that has what PUBLIC has.
pub(super) const STRANGER: &str = "a_stranger";

/// For a trigger, a part of another function, or a look by the administrator.
const NOBODY: May = &[];
/// Granted to PUBLIC: by PostgreSQL itself, for what is no secret.
const EVERYBODY: May = &[
    ("anon", "usage"),
    ("authenticated", "usage"),
    ("service_role", "usage"),
    ("authenticator", "usage"),
    ("supabase_auth_admin", "usage"),
    ("cyberdesk_daemon", "usage"),
    (STRANGER, "usage"),
];
/// What the app's users and servers call. Row-level security, or the function itself, tells whose desktop it is.
const APP: May = &[("authenticated", "execute"), ("service_role", "execute")];
/// What the operator calls.
const OPERATOR: May = &[("cyberdesk_daemon", "execute")];
/// What owners and the app's servers look at, under row-level security.
const OWNERS_LOOK: May = &[("authenticated", "select"), ("service_role", "select")];

pub(super) const MATRIX: &[Line] = &[
    ("schema public", EVERYBODY),
    ("schema cyberdesk", &[("authenticated", "usage"), ("service_role", "usage"), ("cyberdesk_daemon", "usage")]),
    ("type public.instance_status", EVERYBODY),
    (
        "table public.cyberdesk_instances",
        &[
            ("authenticated", "select insert(params,timeout_at,user_id)"),
            ("service_role", "select insert update delete"),
        ],
    ),
    ("table public.cyberdesk_desktop_history", OWNERS_LOOK),
    ("function public.desktop_service_state()", APP),
    ("function public.extend_desktop(uuid,interval)", APP),
    ("function public.request_shutdown(uuid,text)", APP),
    ("function public.request_shutdown_all(uuid)", APP),
    ("function public.set_desktop_timeout(uuid,timestamp with time zone)", APP),
    ("function public.touch_desktop(uuid)", APP),
    // The private side.
    ("table cyberdesk.bond", NOBODY),
    ("table cyberdesk.database_identity", NOBODY),
    ("table cyberdesk.desktop", NOBODY),
    ("table cyberdesk.desktop_state", NOBODY),
    ("table cyberdesk.fence", NOBODY),
    ("table cyberdesk.first_state", NOBODY),
    ("table cyberdesk.history", OWNERS_LOOK),
    ("table cyberdesk.insert_turns", NOBODY),
    ("table cyberdesk.refinery_schema_history", NOBODY),
    ("table cyberdesk.service", NOBODY),
    ("table cyberdesk.settings", NOBODY),
    ("table cyberdesk.used_id", NOBODY),
    ("sequence cyberdesk.history_id_seq", NOBODY),
    ("function cyberdesk.browsers_may_insert()", &[("authenticated", "execute")]),
    ("function cyberdesk.request_shutdown(uuid,text)", APP),
    ("function cyberdesk.request_shutdown_all(uuid)", APP),
    (
        "function cyberdesk.service_state()",
        &[("authenticated", "execute"), ("service_role", "execute"), ("cyberdesk_daemon", "execute")],
    ),
    ("function cyberdesk.set_desktop_timeout(uuid,timestamp with time zone,interval)", APP),
    ("function cyberdesk.touch_desktop(uuid)", APP),
    ("function cyberdesk.acquire(bigint,uuid,text)", OPERATOR),
    ("function cyberdesk.bind(bigint,uuid,text,boolean)", OPERATOR),
    ("function cyberdesk.brake(text,text)", OPERATOR),
    ("function cyberdesk.desktops_by_id(uuid[])", OPERATOR),
    ("function cyberdesk.dirty_desktops(integer)", OPERATOR),
    ("function cyberdesk.expire(bigint,uuid,uuid[])", OPERATOR),
    ("function cyberdesk.ended_within(double precision)", OPERATOR),
    ("function cyberdesk.fence_epoch()", OPERATOR),
    ("function cyberdesk.applied_migrations()", OPERATOR),
    ("function cyberdesk.history_of(uuid)", OPERATOR),
    ("function cyberdesk.identity()", OPERATOR),
    ("function cyberdesk.last_sign_of_life()", OPERATOR),
    ("function cyberdesk.live_desktops()", OPERATOR),
    ("function cyberdesk.lost(uuid[])", OPERATOR),
    ("function cyberdesk.pair()", OPERATOR),
    ("function cyberdesk.paused()", OPERATOR),
    ("function cyberdesk.reconcile_projection(bigint,uuid)", OPERATOR),
    ("function cyberdesk.report(bigint,uuid,uuid[],bigint[],text[],text[],text[],text[],text[],boolean[])", OPERATOR),
    ("function cyberdesk.sign_of_life(bigint,uuid)", OPERATOR),
    ("function cyberdesk.\"trim\"(bigint,uuid)", OPERATOR),
    ("function cyberdesk.warn(bigint,uuid,integer)", OPERATOR),
    ("function cyberdesk.adopt(uuid)", NOBODY),
    ("function cyberdesk.adopt_rows(bigint)", NOBODY),
    ("function cyberdesk.check_fence(bigint,uuid)", NOBODY),
    ("function cyberdesk.check_lifetime(interval,interval,interval)", NOBODY),
    ("function cyberdesk.claims()", NOBODY),
    ("function cyberdesk.confirm_pair(text)", NOBODY),
    ("function cyberdesk.pause_desktop(uuid,boolean)", NOBODY),
    ("function cyberdesk.erase_user()", NOBODY),
    ("function cyberdesk.guard()", NOBODY),
    ("function cyberdesk.idle_timeout_of(jsonb)", NOBODY),
    ("function cyberdesk.inserted()", NOBODY),
    ("function cyberdesk.lock_desktops(uuid[])", NOBODY),
    ("function cyberdesk.may_act_for(uuid)", NOBODY),
    ("function cyberdesk.mirror(uuid[],boolean)", NOBODY),
    ("function cyberdesk.move_deadlines(uuid[])", NOBODY),
    ("function cyberdesk.next_status(public.instance_status,public.instance_status,boolean)", NOBODY),
    ("function cyberdesk.project()", NOBODY),
    ("function cyberdesk.record()", NOBODY),
    ("function cyberdesk.refuse_truncate()", NOBODY),
    ("function cyberdesk.refuse_used(uuid)", NOBODY),
    ("function cyberdesk.stop(uuid[],text,text)", NOBODY),
    ("function cyberdesk.take(uuid)", NOBODY),
    ("function cyberdesk.wake()", NOBODY),
];
