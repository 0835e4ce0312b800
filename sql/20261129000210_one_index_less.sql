-- Those that are not over are found by desktop_of_user_idx as well, which has the same condition. A migration of its own: it
-- holds no lock of the app's meanwhile.
drop index cyberdesk.desktop_not_over_idx;
