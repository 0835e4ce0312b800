use std::collections::BTreeSet;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn key(name: &str) -> Key {
    Key::new(name)
}

fn open() -> Core {
    let mut core = Core::default();
    core.open();
    core
}

fn depth(core: &Core) -> usize {
    [Lane::Ends, Lane::Makes].map(|lane| core.waiting(lane).0).iter().sum()
}

fn taken(core: &mut Core, now: Instant) -> Vec<String> {
    std::iter::from_fn(|| core.take(now, Lane::Looks)).map(|(key, _)| key.to_string()).collect()
}

#[test]
fn a_key_is_taken_once_however_often_it_is_woken() {
    let (mut core, now) = (open(), Instant::now());
    for _ in 0..3 {
        core.wake(&key("a"), Lane::Makes, now);
    }
    assert_eq!(depth(&core), 1);
    assert_eq!(taken(&mut core, now), ["a"]);
}

#[test]
fn a_key_woken_in_flight_is_looked_at_again_and_never_twice_at_once() {
    let (mut core, now) = (open(), Instant::now());
    core.wake(&key("a"), Lane::Makes, now);
    assert_eq!(taken(&mut core, now), ["a"]);
    core.wake(&key("a"), Lane::Makes, now);
    core.wake(&key("a"), Lane::Ends, now);
    assert_eq!(taken(&mut core, now), [""; 0], "it is being worked on");
    core.done(&key("a"), Lane::Makes, Outcome::Settled(None), now, 0.0);
    assert_eq!(core.take(now, Lane::Ends), Some((key("a"), Lane::Ends)));
}

#[test]
fn ends_go_before_makes_and_each_lane_is_first_come_first_served() {
    let (mut core, now) = (open(), Instant::now());
    for (name, lane) in [("m1", Lane::Makes), ("m2", Lane::Makes), ("e1", Lane::Ends), ("e2", Lane::Ends)] {
        core.wake(&key(name), lane, now);
    }
    core.wake(&key("m2"), Lane::Ends, now);
    assert_eq!(taken(&mut core, now), ["e1", "e2", "m2", "m1"]);
}

#[test]
fn a_new_desktop_does_not_wait_for_all_that_are_only_looked_at() {
    let (mut core, now) = (open(), Instant::now());
    let fleet: Vec<Key> = (0..100).map(|number| key(&format!("old-{number}"))).collect();
    fleet.iter().for_each(|key| core.wake(key, Lane::Looks, now));
    core.due_by(&fleet[99], now);
    core.wake(&key("new"), Lane::Makes, now);
    core.wake(&fleet[98], Lane::Ends, now);
    core.wake(&fleet[97], Lane::Makes, now);
    assert_eq!(taken(&mut core, now)[..5], ["old-99", "old-98", "new", "old-97", "old-0"]);
}

#[test]
fn however_many_are_made_those_that_are_only_looked_at_get_their_turn() {
    let (mut core, now) = (open(), Instant::now());
    for number in 0..10 {
        core.wake(&key(&format!("old-{number}")), Lane::Looks, now);
    }
    let mut lanes = vec![];
    for number in 0..10 * LOOKS_SHARE {
        core.wake(&key(&format!("new-{number}")), Lane::Makes, now);
        lanes.extend(core.take(now, Lane::Looks).map(|(_, lane)| lane));
    }
    assert!(
        lanes.chunks(LOOKS_SHARE as usize).all(|round| round.iter().filter(|lane| **lane == Lane::Looks).count() == 1)
    );
    assert_eq!(core.waiting(Lane::Looks).0, 0);
}

#[test]
fn without_room_for_makes_only_ends_are_taken() {
    let (mut core, now) = (open(), Instant::now());
    core.wake(&key("m"), Lane::Makes, now);
    core.wake(&key("l"), Lane::Looks, now);
    assert_eq!(core.take(now, Lane::Ends), None);
    core.wake(&key("e"), Lane::Ends, now);
    assert_eq!(core.take(now, Lane::Ends), Some((key("e"), Lane::Ends)));
    assert_eq!(core.take(now, Lane::Looks), Some((key("m"), Lane::Makes)));
}

#[test]
fn a_settled_key_comes_back_at_its_deadline_as_an_end() {
    let (mut core, now) = (open(), Instant::now());
    let deadline = now + Duration::from_secs(10);
    core.wake(&key("a"), Lane::Makes, now);
    taken(&mut core, now);
    core.done(&key("a"), Lane::Makes, Outcome::Settled(Some(deadline)), now, 0.0);
    assert_eq!(core.next_timer(), Some(deadline));
    assert_eq!(core.take(deadline - Duration::from_millis(1), Lane::Looks), None);
    assert_eq!(core.take(deadline, Lane::Ends), Some((key("a"), Lane::Due)));
}

#[test]
fn a_failed_key_backs_off_longer_each_time_but_an_end_does_not_wait() {
    let (mut core, mut now) = (open(), Instant::now());
    let failed = Outcome::Failed { at_least: Duration::ZERO, deadline: None };
    let mut waits = vec![];
    core.wake(&key("a"), Lane::Makes, now);
    for _ in 0..12 {
        assert_eq!(taken(&mut core, now), ["a"]);
        core.done(&key("a"), Lane::Makes, failed, now, 1.0);
        core.wake(&key("a"), Lane::Makes, now);
        assert_eq!(depth(&core), 0, "a wake does not shorten the back-off");
        let next = core.next_timer().expect("it comes back");
        waits.push(next - now);
        now = next;
    }
    assert_eq!(waits[..3], [FIRST_BACKOFF, FIRST_BACKOFF * 2, FIRST_BACKOFF * 4]);
    assert_eq!(waits.last(), Some(&LONGEST_BACKOFF));

    let early = now - Duration::from_secs(1);
    core.wake(&key("a"), Lane::Ends, now);
    assert_eq!(core.take(early, Lane::Ends), Some((key("a"), Lane::Ends)));
    core.done(&key("a"), Lane::Ends, Outcome::Settled(None), early, 0.0);
    assert_eq!(core.next_timer(), None, "nothing is left of a key that settled");
}

#[test]
fn the_other_side_s_wish_to_wait_longer_is_obeyed() {
    let (mut core, now) = (open(), Instant::now());
    core.wake(&key("a"), Lane::Makes, now);
    taken(&mut core, now);
    let wish = Duration::from_secs(30);
    core.done(&key("a"), Lane::Makes, Outcome::Failed { at_least: wish, deadline: None }, now, 0.0);
    assert_eq!(core.next_timer(), Some(now + wish));
}

#[test]
fn a_key_that_is_due_leaves_the_line_it_stands_in() {
    let mut core = open();
    let now = Instant::now();
    for name in ["a", "b", "c"] {
        core.wake(&key(name), Lane::Makes, now);
    }
    core.wake(&key("b"), Lane::Ends, now);
    core.due_by(&key("c"), now + SECOND);
    core.due_by(&key("c"), now + 2 * SECOND);
    assert_eq!(core.take(now + SECOND, Lane::Looks), Some((key("c"), Lane::Due)));
    assert_eq!(core.take(now + SECOND, Lane::Looks), Some((key("b"), Lane::Ends)));
    assert_eq!(core.take(now + SECOND, Lane::Looks), Some((key("a"), Lane::Makes)));
    core.done(&key("c"), Lane::Due, Outcome::Settled(None), now, 0.0);
    assert_eq!(core.take(now + 9 * SECOND, Lane::Looks), None, "and is taken once");
}

#[test]
fn a_key_in_flight_hears_of_its_deadline_from_whoever_works_on_it() {
    let mut core = open();
    let now = Instant::now();
    core.wake(&key("a"), Lane::Makes, now);
    core.due_by(&key("a"), now + SECOND);
    assert_eq!(core.take(now, Lane::Looks), Some((key("a"), Lane::Makes)));
    core.due_by(&key("a"), now + SECOND);
    assert_eq!(core.take(now + 2 * SECOND, Lane::Looks), None, "never twice at once");
    core.done(&key("a"), Lane::Makes, Outcome::Settled(None), now, 0.0);
    assert_eq!(core.take(now + 2 * SECOND, Lane::Looks), None);
}

#[test]
fn those_who_were_asked_to_wait_alike_come_back_apart_and_never_before_nor_much_later() {
    let now = Instant::now();
    let wait = |wish: u64, jitter: f64| {
        let mut core = open();
        core.wake(&key("a"), Lane::Makes, now);
        taken(&mut core, now);
        let failed = Outcome::Failed { at_least: Duration::from_secs(wish), deadline: None };
        core.done(&key("a"), Lane::Makes, failed, now, jitter);
        core.next_timer().expect("it comes back") - now
    };
    for wish in [1, 30, 60] {
        let waits: BTreeSet<Duration> = (0..=255).map(|byte| wait(wish, f64::from(byte) / 255.0)).collect();
        assert_eq!(waits.len(), 256, "each jitter is another instant");
        assert!(waits.iter().all(|wait| (wish * 10..=wish * 15).contains(&(wait.as_millis() as u64 / 100))));
    }
    assert!(wait(1_000_000, 1.0) <= LONGEST_BACKOFF.mul_f64(1.5), "no wish lasts for days");
}

#[test]
fn the_back_off_is_spread_over_half_of_it_and_never_longer_than_the_longest() {
    for failures in 0..40 {
        let (least, most) = (backoff(failures, 0.0), backoff(failures, 1.0));
        assert!(least * 2 == most && most <= LONGEST_BACKOFF, "{failures}: {least:?} to {most:?}");
        assert!(least >= FIRST_BACKOFF / 2 && backoff(failures + 1, 0.0) >= least);
        assert!(backoff(failures, -1.0) == least && backoff(failures, 2.0) == most, "whatever the jitter is");
    }
}

#[test]
fn desktops_that_fail_together_come_back_apart() {
    let queue = Queue::default();
    queue.open();
    let failed = Outcome::Failed { at_least: Duration::ZERO, deadline: None };
    let keys: Vec<Key> = (0..200).map(|number| key(&format!("desk-{number}"))).collect();
    let before = Instant::now();
    for key in &keys {
        queue.wake(key, Lane::Makes);
        assert_eq!(queue.core().take(before, Lane::Looks), Some((key.clone(), Lane::Makes)));
        queue.done(key, Lane::Makes, failed);
    }
    let due: Vec<Instant> = queue.core().timers.iter().map(|(at, _)| *at).collect();
    let (first, last) = (due.first().expect("all wait"), due.last().expect("all wait"));
    assert_eq!(due.len(), keys.len());
    assert!(*last - *first >= FIRST_BACKOFF / 4, "they are spread over {:?}", *last - *first);
}

#[test]
fn a_deadline_does_not_wait_for_the_back_off() {
    let (mut core, mut now) = (open(), Instant::now());
    let deadline = now + Duration::from_secs(3);
    core.wake(&key("a"), Lane::Makes, now);
    for _ in 0..20 {
        let Some((taken, lane)) = core.take(now, Lane::Looks) else { break };
        if now >= deadline {
            assert_eq!((now, lane), (deadline, Lane::Due));
            return;
        }
        core.done(&taken, lane, Outcome::Failed { at_least: Duration::ZERO, deadline: Some(deadline) }, now, 1.0);
        now = core.next_timer().expect("it comes back");
    }
    panic!("the deadline went by");
}

#[test]
fn an_end_wanted_during_an_end_that_fails_is_tried_again_soon() {
    let (mut core, mut now) = (open(), Instant::now());
    let failed = Outcome::Failed { at_least: Duration::ZERO, deadline: None };
    core.wake(&key("a"), Lane::Ends, now);
    for _ in 0..6 {
        let (taken, lane) = core.take(now, Lane::Looks).expect("it is due");
        core.done(&taken, lane, failed, now, 1.0);
        now = core.next_timer().expect("it comes back");
    }
    let (taken, lane) = core.take(now, Lane::Looks).expect("it is due");
    core.wake(&key("a"), Lane::Ends, now);
    core.done(&taken, lane, failed, now, 1.0);
    assert_eq!(core.next_timer(), Some(now + FIRST_BACKOFF));
}

#[test]
fn a_hot_key_does_not_starve_others() {
    let (mut core, now) = (open(), Instant::now());
    for name in ["hot", "a", "b"] {
        core.wake(&key(name), Lane::Makes, now);
    }
    let mut served = vec![];
    for _ in 0..3 {
        let (taken, lane) = core.take(now, Lane::Looks).expect("there is work");
        core.wake(&key("hot"), Lane::Makes, now);
        core.done(&taken, lane, Outcome::Settled(None), now, 0.0);
        served.push(taken.to_string());
    }
    assert_eq!(served, ["hot", "a", "b"]);
}

#[tokio::test(start_paused = true)]
async fn a_waiter_gets_a_key_when_it_is_woken_or_due() {
    let queue = std::sync::Arc::new(Queue::default());
    queue.open();
    let waiter = tokio::spawn({
        let queue = queue.clone();
        async move { queue.next(|| Lane::Looks).await }
    });
    tokio::task::yield_now().await;
    queue.wake(&key("a"), Lane::Makes);
    let (taken, lane) = waiter.await.expect("the waiter ends");
    assert_eq!(taken, key("a"));

    let before = Instant::now();
    queue.done(&taken, lane, Outcome::Settled(Some(before + Duration::from_secs(5))));
    assert_eq!(queue.next(|| Lane::Ends).await, (key("a"), Lane::Due));
    assert_eq!(before.elapsed(), Duration::from_secs(5));
}

#[test]
fn a_closed_queue_keeps_no_keys_and_what_was_in_flight_ends_without_a_trace() {
    let (mut core, now) = (open(), Instant::now());
    for name in ["a", "b", "c"] {
        core.wake(&key(name), Lane::Makes, now);
    }
    assert_eq!(core.take(now, Lane::Looks), Some((key("a"), Lane::Makes)));
    core.done(&key("a"), Lane::Makes, Outcome::Settled(Some(now)), now, 0.0);
    assert_eq!(core.take(now, Lane::Looks), Some((key("a"), Lane::Due)), "its timer");
    core.close();
    core.wake(&key("d"), Lane::Ends, now);
    core.done(&key("a"), Lane::Ends, Outcome::Settled(Some(now)), now, 0.0);
    assert_eq!((depth(&core), core.next_timer()), (0, None));
    core.open();
    assert_eq!(taken(&mut core, now), [""; 0]);
}

#[test]
fn a_key_waits_since_it_was_first_woken_in_each_lane() {
    let (mut core, now) = (open(), Instant::now());
    let later = |seconds| now + Duration::from_secs(seconds);
    core.wake(&key("a"), Lane::Makes, later(1));
    core.wake(&key("a"), Lane::Makes, later(2));
    core.wake(&key("b"), Lane::Makes, later(3));
    core.wake(&key("c"), Lane::Ends, later(4));
    assert_eq!(core.waiting(Lane::Makes), (2, Some(later(1))));
    assert_eq!(core.waiting(Lane::Ends), (1, Some(later(4))));
    core.wake(&key("a"), Lane::Ends, later(5));
    assert_eq!(core.waiting(Lane::Ends), (2, Some(later(1))), "it waits since before it moved");
    assert_eq!(taken(&mut core, later(6)), ["c", "a", "b"]);
    assert_eq!(core.woken(&key("a")), Some(later(1)), "while it is worked on, it is known what for");
    assert_eq!(core.waiting(Lane::Makes), (0, None));
}

/// A clock's ticks: the key is woken at each, taken if it can be, and worked on for some time of it.
fn looks(core: &mut Core, (name, lane): (&str, Lane), start: Instant, ticks: u32, tick: Duration) -> Vec<Instant> {
    let mut looks = vec![];
    for number in 0..ticks {
        let now = start + tick * number;
        core.wake(&key(name), lane, now);
        while let Some((taken, lane)) = core.take(now, Lane::Looks) {
            looks.push(now);
            core.done(&taken, lane, Outcome::Settled(None), now, 0.0);
        }
    }
    looks
}

#[test]
fn a_key_that_is_woken_all_the_time_is_looked_at_a_burst_of_times_and_then_once_a_second() {
    for lane in [Lane::Makes, Lane::Ends] {
        let (mut core, now) = (open(), Instant::now());
        let looks = looks(&mut core, ("hot", lane), now, 50 * 60, SECOND / 50);
        let most = usize::try_from(BURST + 60).expect("it is small");
        assert!(looks.len() <= most && looks.len() > most - 3, "{lane:?}: {} looks in a minute", looks.len());
        assert!(
            looks.windows(2).all(|pair| pair[1] - pair[0] <= SPACING + SECOND / 50),
            "it is never left alone for longer"
        );
    }
}

#[test]
fn a_key_that_is_woken_all_the_time_for_its_end_delays_no_other_s() {
    let (mut core, now) = (open(), Instant::now());
    looks(&mut core, ("hot", Lane::Ends), now, 100, SECOND / 50);
    let now = now + SECOND / 50 * 99;
    for lane in [Lane::Ends, Lane::Makes] {
        core.wake(&key("hot"), lane, now);
        core.wake(&key("other"), lane, now);
        assert_eq!(core.take(now, Lane::Looks), Some((key("other"), lane)));
        core.done(&key("other"), lane, Outcome::Settled(None), now, 0.0);
        assert_eq!(core.take(now, Lane::Looks), None, "it cools down, whatever it is woken for");
    }
    core.due_by(&key("hot"), now);
    assert_eq!(core.take(now, Lane::Ends), Some((key("hot"), Lane::Due)), "but for its deadline");
}

#[test]
fn a_day_of_failures_costs_each_key_a_try_or_two_a_minute() {
    let (mut core, start) = (open(), Instant::now());
    let (keys, day) = ([Lane::Makes, Lane::Ends].map(|lane| (key(&format!("{lane:?}")), lane)), 86_400 * SECOND);
    let (mut now, mut tries) = (start, 0);
    for (key, lane) in &keys {
        core.wake(key, *lane, now);
    }
    while now < start + day {
        while let Some((taken, lane)) = core.take(now, Lane::Looks) {
            tries += 1;
            core.done(&taken, lane, Outcome::Failed { at_least: Duration::ZERO, deadline: None }, now, 0.5);
        }
        assert!(core.entries.len() == 2 && core.timers.len() == 2 && core.ends.len() + core.makes.len() == 0);
        assert!(core.heat.cool_at.len() <= 2 && core.cooling.is_empty());
        now = core.next_timer().expect("each comes again");
    }
    let each = tries / 2;
    assert!((24 * 60..=2 * 24 * 60).contains(&each), "{each} tries in a day");
}

#[test]
fn an_end_that_fails_is_not_tried_again_at_each_change() {
    let (mut core, start) = (open(), Instant::now());
    let mut tries = 0;
    for tick in 0..50 * 600 {
        let now = start + SECOND / 50 * tick;
        core.wake(&key("stuck"), Lane::Ends, now);
        while let Some((taken, lane)) = core.take(now, Lane::Looks) {
            tries += 1;
            core.done(&taken, lane, Outcome::Failed { at_least: Duration::ZERO, deadline: None }, now, 0.0);
        }
    }
    assert!(tries <= BURST + 601, "{tries} tries in ten minutes");
}

#[test]
fn what_changed_last_while_a_key_cools_down_is_looked_at() {
    let (mut core, now) = (open(), Instant::now());
    let looks = looks(&mut core, ("hot", Lane::Makes), now, 100, SECOND / 50);
    let last = *looks.last().expect("it was looked at");
    core.wake(&key("hot"), Lane::Makes, now + 2 * SECOND);
    let next = core.next_timer().expect("its time comes");
    assert!(next > last && next <= last + SPACING);
    assert_eq!(core.take(next, Lane::Looks), Some((key("hot"), Lane::Makes)));
    core.done(&key("hot"), Lane::Makes, Outcome::Settled(None), next, 0.0);
    assert_eq!((core.next_timer(), core.entries.len()), (None, 0), "and nothing is left of it in the queue");
}

#[test]
fn ends_and_deadlines_of_a_key_that_cools_down_do_not_wait() {
    for (lane, name) in [(Lane::Ends, "end"), (Lane::Due, "deadline")] {
        let (mut core, now) = (open(), Instant::now());
        looks(&mut core, ("hot", Lane::Makes), now, 100, SECOND / 50);
        let now = now + SECOND / 50 * 99;
        core.wake(&key("hot"), Lane::Makes, now);
        assert_eq!(core.take(now, Lane::Looks), None, "it cools down");
        match lane {
            Lane::Due => core.due_by(&key("hot"), now),
            _ => core.wake(&key("hot"), lane, now),
        }
        assert_eq!(core.take(now, Lane::Ends), Some((key("hot"), lane)), "{name}");
        assert_eq!(core.take(now + 2 * SECOND, Lane::Looks), None, "never twice at once");
    }
}

#[test]
fn looks_of_one_turn_count_as_those_of_many_do() {
    let (mut core, now) = (open(), Instant::now());
    core.wake(&key("hot"), Lane::Makes, now);
    let (taken, lane) = core.take(now, Lane::Looks).expect("it was woken");
    let more = (0..1000).take_while(|_| core.another_look(&taken, lane, now)).count();
    assert_eq!(more + 1, usize::try_from(BURST).expect("it is small"));
    core.done(&taken, lane, Outcome::Settled(Some(now + SECOND / 2)), now, 0.0);
    assert_eq!(core.take(now, Lane::Looks), None, "it cools down");
    assert_eq!(core.take(now + SECOND / 2, Lane::Looks), Some((key("hot"), Lane::Due)), "and its deadline holds");
    let ends = (0..1000).take_while(|_| core.another_look(&taken, Lane::Ends, now)).count();
    assert_eq!(ends, usize::try_from(BURST).expect("it is small"), "those of its end are counted by themselves");
}

#[test]
fn a_deadline_holds_while_its_key_cools_down() {
    let (mut core, now) = (open(), Instant::now());
    let deadline = now + 3 * SECOND + SECOND / 100;
    let mut lateness = None;
    for number in 0..500 {
        let now = now + SECOND / 50 * number;
        core.wake(&key("hot"), Lane::Makes, now);
        while let Some((taken, lane)) = core.take(now, Lane::Looks) {
            core.wake(&key("hot"), Lane::Makes, now);
            if lane == Lane::Due {
                lateness.get_or_insert(now - deadline);
            }
            let again = (now < deadline).then_some(deadline);
            core.done(&taken, lane, Outcome::Settled(again), now, 0.0);
        }
    }
    assert!(lateness.is_some_and(|lateness| lateness <= SECOND / 50), "{lateness:?}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 64, ..Default::default() })]

    /// However often and for whatever keys are woken, time and again: what is kept is bounded by their number, each is
    /// looked at within its bound, none for ever waits, and in the end nothing is left.
    #[test]
    fn any_wakes_of_some_keys_keep_no_more_than_those_keys(
        wakes in proptest::collection::vec((0..5_u8, 0..4_u8, 0..4_u8, 0..300_u64), 1..400),
    ) {
        let (mut core, start) = (open(), Instant::now());
        let (mut now, mut in_flight) = (start, vec![]);
        let mut looks: HashMap<(Key, Lane), u32> = HashMap::new();
        for (number, lane, then, pause) in wakes {
            let woken = key(&format!("desk-{number}"));
            match lane {
                0 => core.due_by(&woken, now + SECOND),
                1 => core.wake(&woken, Lane::Ends, now),
                2 => core.wake(&woken, Lane::Makes, now),
                _ => core.wake(&woken, Lane::Looks, now),
            }
            if let Some((taken, lane)) = core.take(now, Lane::Looks) {
                assert!(!in_flight.iter().any(|(other, _)| *other == taken), "never twice at once");
                *looks.entry((taken.clone(), lane)).or_default() += u32::from(lane != Lane::Due);
                in_flight.push((taken, lane));
            }
            if then > 0 && let Some((done, lane)) = in_flight.pop() {
                let outcome = match then {
                    1 => Outcome::Settled(None),
                    2 => Outcome::Settled(Some(now + SECOND)),
                    _ => Outcome::Failed { at_least: Duration::ZERO, deadline: None },
                };
                core.done(&done, lane, outcome, now, 0.5);
            }
            assert!(core.entries.len() <= 5 && core.heat.cool_at.len() <= 15);
            assert!(core.timers.len() <= 5 && core.cooling.len() <= 5);
            now += Duration::from_millis(pause);
        }
        let seconds = u32::try_from((now - start).as_secs()).expect("it is small");
        looks.values().for_each(|looks| assert!(*looks <= BURST + seconds + 1, "{looks} looks in {seconds} s"));
        in_flight.into_iter().for_each(|(key, lane)| core.done(&key, lane, Outcome::Settled(None), now, 0.5));
        while let Some((key, lane)) = core.take(now, Lane::Looks) {
            core.done(&key, lane, Outcome::Settled(None), now, 0.5);
            now = core.next_timer().unwrap_or(now).max(now);
        }
        for _ in 0..10 {
            now = core.next_timer().unwrap_or(now).max(now);
            while let Some((key, lane)) = core.take(now, Lane::Looks) {
                core.done(&key, lane, Outcome::Settled(None), now, 0.5);
            }
        }
        assert!(core.entries.is_empty() && core.next_timer().is_none(), "each had its turn: {core:?}");
        core.take(now + 2 * BURST * SPACING, Lane::Looks);
        assert!(core.heat.cool_at.is_empty(), "and all are cool");
    }
}
