//! The queue, one step after the other.

use super::*;

const D: [&str; 2] = [
    "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
];

fn push(tag: &str) -> Push {
    Push::new("team/app", tag, D[0]).unwrap()
}

fn newer(tag: &str) -> Push {
    Push::new("team/app", tag, D[1]).unwrap()
}

fn queue(jobs: usize, waiting: usize) -> Queue {
    Queue::new(Bounds { jobs, waiting }, Vec::new(), 0)
}

fn done(outcome: Outcome) -> End {
    End::Done { outcome, message: "said".to_owned() }
}

fn again() -> End {
    End::Again { message: "away".to_owned() }
}

/// Steps, and answers the tags and digests of what is started.
fn started(queue: &mut Queue, now: u64, input: Input) -> Vec<(String, String)> {
    match queue.step(now, input) {
        Step::Go { start, .. } => {
            start.into_iter().map(|job| (job.push.tag.clone(), job.push.digest.to_string())).collect()
        }
        Step::Full => panic!("full"),
    }
}

fn pair(tag: &str, digest: &str) -> (String, String) {
    (tag.to_owned(), digest.to_owned())
}

#[test]
fn so_many_at_a_time_in_their_order() {
    let mut queue = queue(2, 10);
    let all = vec![push("a"), push("b"), push("c"), push("d")];
    assert_eq!(started(&mut queue, 1, Input::Pushed(all)), [pair("a", D[0]), pair("b", D[0])]);
    assert_eq!(started(&mut queue, 1, Input::Clock), []);
    assert_eq!(started(&mut queue, 2, Input::Ended(push("b"), done(Outcome::Published))), [pair("c", D[0])]);
    assert_eq!(queue.pending().len(), 3);
    assert_eq!(started(&mut queue, 3, Input::Ended(push("a"), done(Outcome::UpToDate))), [pair("d", D[0])]);
    for tag in ["c", "d"] {
        assert_eq!(started(&mut queue, 4, Input::Ended(push(tag), done(Outcome::Failed))), []);
    }
    assert!(queue.is_idle() && queue.pending().is_empty());
    let seen = queue.seen();
    let Counters { queued, published, up_to_date, failed, .. } = seen.counters;
    assert_eq!((queued, published, up_to_date, failed), (4, 1, 1, 2));
    let tags: Vec<&str> = seen.ended.iter().map(|ended| ended.push.tag.as_str()).collect();
    assert_eq!(tags, ["d", "c", "a", "b"], "the last one first");
    assert_eq!(started(&mut queue, 5, Input::Ended(push("d"), done(Outcome::Failed))), [], "it is forgotten");
    assert_eq!(queue.seen().counters.failed, 2);
}

#[test]
fn the_newer_push_replaces_the_waiting_one() {
    let mut queue = queue(1, 10);
    let _ = queue.step(1, Input::Pushed(vec![push("a"), push("b"), push("c"), newer("b")]));
    assert_eq!(queue.pending().len(), 3);
    assert_eq!(started(&mut queue, 2, Input::Ended(push("a"), done(Outcome::Published))), [pair("b", D[1])]);
}

#[test]
fn what_comes_while_it_runs_runs_afterwards() {
    for end in [done(Outcome::Published), done(Outcome::Failed), again()] {
        let mut queue = queue(2, 10);
        assert_eq!(started(&mut queue, 1, Input::Pushed(vec![push("a")])), [pair("a", D[0])]);
        assert_eq!(started(&mut queue, 2, Input::Pushed(vec![push("a"), newer("a")])), [], "not at the same time");
        assert_eq!(queue.pending(), [fresh(newer("a"))], "the newer one is what must not be forgotten");
        assert_eq!(queue.seen().waiting.len(), 1);
        assert_eq!(started(&mut queue, 3, Input::Ended(push("a"), end.clone())), [pair("a", D[1])], "{end:?}");
    }
}

#[test]
fn failures_that_pass_are_tried_again() {
    let mut queue = queue(1, 10);
    let mut now = 1000;
    assert_eq!(started(&mut queue, now, Input::Pushed(vec![push("a")])).len(), 1);
    for (at, pause) in PAUSES.into_iter().enumerate() {
        let step = queue.step(now, Input::Ended(push("a"), again()));
        assert_eq!(step, Step::Go { start: Vec::new(), wake: Some(now + pause) });
        assert_eq!(queue.pending()[0].attempts as usize, at + 1);
        assert_eq!(started(&mut queue, now + pause - 1, Input::Clock), []);
        now += pause;
        let Step::Go { start, .. } = queue.step(now, Input::Clock) else { panic!("full") };
        assert!(start.len() == 1 && start[0].begun, "{start:?}");
    }
    assert_eq!(started(&mut queue, now, Input::Ended(push("a"), again())), []);
    let ended = queue.seen().ended.remove(0);
    assert_eq!((ended.outcome, ended.attempts, ended.message.as_str()), (Outcome::Failed, 4, "away"));
    assert_eq!((queue.seen().counters.retried, queue.pending().len()), (4, 0));
}

/// A new push does not wait for the pause of the one before.
#[test]
fn what_a_policy_forbids_rests_until_its_repository_has_an_event() {
    let rest = || End::Rest { message: "unsigned".to_owned() };
    let mut queue = queue(1, 10);
    let _ = queue.step(0, Input::Pushed(vec![push("a")]));
    let mut now = 0;
    for pause in RESTS {
        assert_eq!(started(&mut queue, now, Input::Ended(push("a"), rest())), []);
        assert_eq!(started(&mut queue, now + pause - 1, Input::Clock), []);
        now += pause;
        assert_eq!(started(&mut queue, now, Input::Clock), [pair("a", D[0])]);
    }
    let _ = queue.step(now, Input::Ended(push("a"), rest()));
    assert_eq!(queue.seen().counters.failed, 1, "at last");

    let _ = queue.step(now, Input::Pushed(vec![push("a")]));
    let _ = queue.step(now, Input::Ended(push("a"), rest()));
    let other = Input::Stirred(vec!["team/other".to_owned()]);
    assert_eq!(started(&mut queue, now, other), []);
    assert_eq!(queue.pending()[0].due, now + RESTS[0]);
    let own = || Input::Stirred(vec!["team/app".to_owned()]);
    assert_eq!(started(&mut queue, now, own()), []);
    assert_eq!(started(&mut queue, now + STIRRING, Input::Clock), [pair("a", D[0])]);
    // Another tag's push is an event, too; and what only failed is not hurried.
    let _ = queue.step(now + 20, Input::Ended(push("a"), rest()));
    assert_eq!(started(&mut queue, now + 20, Input::Pushed(vec![push("b")])), [pair("b", D[0])]);
    let _ = queue.step(now + 21, Input::Ended(push("b"), again()));
    let due: Vec<u64> = queue.pending().iter().map(|job| job.due - now).collect();
    assert_eq!(due, [20 + STIRRING, 21 + PAUSES[0]]);
    let _ = queue.step(now + 22, own());
    assert_eq!(queue.pending()[1].due, now + 21 + PAUSES[0]);
}

#[test]
fn a_push_ends_the_pause() {
    let mut queue = queue(1, 10);
    let _ = queue.step(1, Input::Pushed(vec![push("a")]));
    let _ = queue.step(2, Input::Ended(push("a"), again()));
    assert_eq!(started(&mut queue, 3, Input::Pushed(vec![newer("a")])), [pair("a", D[1])]);
}

/// While one waits for its time, others pass.
#[test]
fn others_pass_what_pauses() {
    let mut queue = queue(1, 10);
    let _ = queue.step(1, Input::Pushed(vec![push("a"), push("b"), push("c")]));
    assert_eq!(started(&mut queue, 2, Input::Ended(push("a"), again())), [pair("b", D[0])]);
    assert_eq!(started(&mut queue, 40, Input::Ended(push("b"), done(Outcome::Nothing))), [pair("c", D[0])]);
    assert_eq!(started(&mut queue, 41, Input::Ended(push("c"), done(Outcome::Superseded))), [pair("a", D[0])]);
}

#[test]
fn a_full_queue_takes_all_or_nothing() {
    let mut queue = queue(1, 2);
    assert_eq!(started(&mut queue, 1, Input::Pushed(vec![push("a")])).len(), 1);
    assert!(matches!(queue.step(1, Input::Pushed(vec![push("b")])), Step::Go { .. }));
    let before = queue.pending();
    assert_eq!(queue.step(1, Input::Pushed(vec![push("c"), push("d")])), Step::Full);
    assert_eq!(queue.pending(), before);
    assert!(matches!(queue.step(1, Input::Pushed(vec![newer("b"), push("a"), push("a")])), Step::Go { .. }));
    assert_eq!(queue.step(1, Input::Pushed(vec![push("c")])), Step::Full, "what runs again waits, too");
    assert!(matches!(queue.step(1, Input::Pushed(vec![push("b"), newer("a")])), Step::Go { .. }), "they are known");
}

#[test]
fn what_is_left_of_another_queue() {
    let far = Job { due: 1_000_000, attempts: 2, begun: true, ..fresh(push("far")) };
    let left = vec![fresh(push("a")), far, fresh(newer("a"))];
    let mut queue = Queue::new(Bounds { jobs: 5, waiting: 1 }, left, 100);
    let step = queue.step(100, Input::Clock);
    assert_eq!(step, Step::Go { start: vec![fresh(newer("a"))], wake: Some(100 + 1800) });
    assert_eq!(queue.pending().iter().map(|job| job.attempts).collect::<Vec<_>>(), [0, 2]);
}

#[test]
fn a_closed_queue_starts_nothing() {
    let mut queue = queue(1, 10);
    let _ = queue.step(1, Input::Pushed(vec![push("a"), push("b")]));
    assert_eq!(queue.step(1, Input::Close), Step::Go { start: Vec::new(), wake: None });
    assert_eq!(started(&mut queue, 2, Input::Ended(push("a"), done(Outcome::Published))), []);
    assert!(queue.is_idle());
    assert_eq!(queue.pending(), [fresh(push("b"))]);
}

#[test]
fn a_hundred_are_remembered() {
    let mut queue = queue(1, 10);
    for number in 0..150_u64 {
        let tag = number.to_string();
        assert_eq!(started(&mut queue, number, Input::Pushed(vec![push(&tag)])).len(), 1);
        assert_eq!(started(&mut queue, number, Input::Ended(push(&tag), done(Outcome::Published))), []);
    }
    let ended = queue.seen().ended;
    assert_eq!((ended.len(), ended[0].push.tag.as_str(), ended[99].push.tag.as_str()), (100, "149", "50"));
}
