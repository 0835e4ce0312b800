use super::*;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).expect("a time")
}

fn key(name: &str) -> Key {
    Key::new(name)
}

fn at_stage(stage: Stage) -> Progress {
    let unstarted = stage < Stage::Instance;
    Progress { stage, trouble: None, unstarted, throttled: false }
}

/// In trouble before a stage, since an instant.
fn held(stage: Stage, before: Stage, since: i64) -> Progress {
    let words = format!("no {before:?}");
    Progress { trouble: Some(Trouble { since: at(since), before, words }), ..at_stage(stage) }
}

fn waiting() -> Progress {
    Progress { unstarted: false, throttled: true, ..at_stage(Stage::Wanted) }
}

impl Fleet {
    fn tell(&mut self, name: &str, progress: Progress, second: i64) -> Vec<String> {
        let mut woken: Vec<String> =
            self.note(&key(name), Some(progress), false, at(second)).iter().map(Key::to_string).collect();
        woken.sort();
        woken
    }

    fn trouble_of(&self, name: &str, second: i64) -> Option<Timestamp> {
        self.standing(&key(name), at(second)).trouble.map(|(since, _)| since)
    }
}

#[test]
fn one_start_that_the_cluster_holds_up_holds_all_until_it_gets_on() {
    let mut fleet = Fleet::new(10);
    fleet.tell("other", at_stage(Stage::Pod), 0);
    assert_eq!(fleet.tell("a", held(Stage::Made, Stage::Noticed, 0), 30), ["other"], "all are told");
    assert_eq!(fleet.trouble_of("other", 30), Some(at(0)), "from when it began, not from when it was noticed");
    assert_eq!(fleet.tell("a", at_stage(Stage::Instance), 50), ["other"], "all go on");
    let after = fleet.standing(&key("other"), at(60));
    assert_eq!(after.trouble, None);
    assert_eq!(after.stood_still(at(-10), at(60)), SignedDuration::from_secs(50));
    assert_eq!(after.stood_still(at(20), at(40)), SignedDuration::from_secs(20));
    assert_eq!(after.stood_still(at(55), at(60)), SignedDuration::ZERO);
}

#[test]
fn a_start_that_others_pass_is_alone_with_its_trouble() {
    let mut fleet = Fleet::new(10);
    fleet.tell("a", held(Stage::Wanted, Stage::Made, 0), 1);
    fleet.tell("b", at_stage(Stage::Made), 2);
    assert_eq!(fleet.trouble_of("b", 2), Some(at(0)), "it has passed that stage before anyone looked");
    fleet.tell("c", at_stage(Stage::Wanted), 3);
    let woken = fleet.tell("c", at_stage(Stage::Made), 4);
    assert!(woken.contains(&"a".to_owned()), "{woken:?}");
    assert_eq!(fleet.trouble_of("b", 4), None);
    let trouble = |since| Trouble { since: at(since), before: Stage::Made, words: String::new() };
    let standing = fleet.standing(&key("a"), at(5));
    assert!(!standing.is_shared(&trouble(0)));
    assert!(standing.is_shared(&trouble(5)), "what began since may be the cluster again");
    let silence = Trouble { before: Stage::Noticed, ..trouble(0) };
    assert!(standing.is_shared(&silence), "that a VM can be made does not say that KubeVirt looks at it");
}

#[test]
fn a_start_that_ends_takes_its_trouble_along() {
    let mut fleet = Fleet::new(10);
    fleet.tell("a", held(Stage::Wanted, Stage::Made, 0), 1);
    fleet.note(&key("a"), None, false, at(2));
    assert_eq!(fleet.trouble_of("b", 3), None);
    fleet.tell("a", held(Stage::Made, Stage::Noticed, 10), 11);
    fleet.note(&key("a"), None, true, at(12));
    assert_eq!(fleet.trouble_of("b", 13), None, "one that is ready too");
}

#[test]
fn outages_that_touch_are_one_and_the_oldest_are_forgotten() {
    let mut fleet = Fleet::new(10);
    for (from, until) in [(0, 10), (20, 30), (5, 25)] {
        fleet.remember(Outage { from: at(from), until: at(until) });
    }
    assert_eq!(fleet.outages, [Outage { from: at(0), until: at(30) }]);
    for second in 0..200 {
        fleet.remember(Outage { from: at(100 + 2 * second), until: at(101 + 2 * second) });
    }
    assert_eq!(fleet.outages.len(), REMEMBERED);
    let open = Standing {
        trouble: Some((at(5), String::new())),
        outages: vec![Outage { from: at(0), until: at(10) }],
        ..Standing::default()
    };
    assert_eq!(open.stood_still(at(0), at(20)), SignedDuration::from_secs(20), "no second counts twice");
}

#[test]
fn a_watch_that_is_cut_for_long_is_an_outage() {
    let mut fleet = Fleet::new(10);
    fleet.tell("a", at_stage(Stage::Pod), 0);
    fleet.watched("vms", false, at(0));
    fleet.watched("vmis", false, at(3));
    assert_eq!(fleet.trouble_of("a", 4), None, "a watch is made anew every so often");
    assert_eq!(fleet.trouble_of("a", 5), Some(at(0)));
    assert!(fleet.watched("vms", true, at(20)).is_empty(), "the other is still cut");
    assert_eq!(fleet.watched("vmis", true, at(21)), [key("a")]);
    assert_eq!(fleet.standing(&key("a"), at(30)).outages, [Outage { from: at(0), until: at(21) }]);
    fleet.watched("vms", false, at(40));
    assert!(fleet.watched("vms", true, at(41)).is_empty());
    assert_eq!(fleet.outages.len(), 1, "a short cut is none");
}

#[test]
fn a_new_term_begins_without_the_starts_of_the_last() {
    let mut fleet = Fleet::new(1);
    fleet.remember(Outage { from: at(0), until: at(10) });
    fleet.tell("a", held(Stage::Made, Stage::Noticed, 20), 21);
    fleet.tell("b", waiting(), 22);
    fleet.begin();
    let standing = fleet.standing(&key("c"), at(30));
    assert_eq!((standing.trouble, standing.throttled), (None, None));
    assert_eq!(standing.outages.len(), 1, "that the cluster was away stays true");
}

#[test]
fn vms_that_kubevirt_has_yet_to_start_make_others_wait_in_line() {
    let mut fleet = Fleet::new(2);
    let waits = |fleet: &Fleet, name: &str| fleet.standing(&key(name), at(9)).throttled;
    for name in ["a", "b"] {
        assert_eq!(waits(&fleet, name), None);
        fleet.tell(name, at_stage(Stage::Wanted), 0);
    }
    assert_eq!(waits(&fleet, "a"), None, "it does not wait for itself");
    for (name, second) in [("c", 1), ("d", 2), ("e", 3)] {
        assert_eq!(waits(&fleet, name), Some(at(9)));
        fleet.tell(name, waiting(), second);
    }
    assert_eq!(waits(&fleet, "d"), Some(at(2)), "since it came");
    assert_eq!(fleet.tell("a", at_stage(Stage::Instance), 4), ["c"], "the first in line");
    assert_eq!((waits(&fleet, "c"), waits(&fleet, "d")), (None, Some(at(2))));
    assert_eq!(waits(&fleet, "new"), Some(at(9)), "nobody overtakes");
    fleet.tell("c", at_stage(Stage::Wanted), 5);
    fleet.note(&key("d"), None, false, at(6));
    assert_eq!(fleet.tell("b", at_stage(Stage::Instance), 7), ["e"], "who was stopped is out of the line");
    assert_eq!(fleet.tell("c", at_stage(Stage::Instance), 8), ["e"], "told again until it takes its turn");
}
