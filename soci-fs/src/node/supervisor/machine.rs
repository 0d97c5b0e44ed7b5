//! When to start, end and hand over to workers: decisions only, no process, clock or signal.
//!
//! At most one worker serves. A second one exists while an upgrade is in progress: the *successor*, which has started
//! and waits. Only when it has shown that it can start is the old one ended, and only when the old one is gone does the
//! successor get the descriptors. So a new version that does not start harms nothing, and two never serve at once.
//!
//! Invariants: it never gives up on its own; every worker that does not do what was asked is killed after a limit.

use std::time::Duration;

/// A worker that lived longer has died of something that does not happen at every start.
const QUICK_DEATH: Duration = Duration::from_secs(1);
/// Deaths in quick succession that are no reason to wait yet.
const QUICK_DEATHS_MAX: u32 = 3;
/// The first wait, doubled with every further death.
const DELAY_FIRST: Duration = Duration::from_millis(100);
/// The longest wait.
const DELAY_MAX: Duration = Duration::from_secs(10);
/// How long a process may take until it says that it runs.
pub(super) const START_LIMIT: Duration = Duration::from_secs(30);

/// Workers are numbered as they are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Worker(pub(super) u32);

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Input {
    /// Everything is prepared.
    Begin,
    /// A worker runs and requests the descriptors.
    Hello(Worker),
    /// A worker serves.
    Ready(Worker),
    /// A worker is gone, or could not be started.
    Exited {
        worker: Worker,
        lived: Duration,
        /// By a signal that no program sends to itself.
        killed: bool,
    },
    /// The program was replaced.
    Upgrade,
    /// The end is wanted.
    Stop,
    /// A timer has run down.
    Elapsed(Timer),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Timer {
    /// Time to start this worker.
    Start(Worker),
    /// This worker should have done what it was asked to.
    Overdue(Worker),
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Start(Worker),
    /// Give it the descriptors.
    Hand(Worker),
    /// Ask it to end.
    Terminate(Worker),
    Kill(Worker),
    After(Duration, Timer),
    /// Notify the service manager.
    AnnounceReady,
    AnnounceStopping,
    /// Say that an upgrade has come to nothing.
    UpgradeFailed,
    Finish,
}

#[derive(Debug, Clone, Copy)]
struct Serving {
    worker: Worker,
    handed: bool,
    ready: bool,
    /// It was asked to end.
    ending: bool,
}

#[derive(Debug, Clone, Copy)]
struct Successor {
    worker: Worker,
    greeted: bool,
}

#[derive(Debug)]
pub(super) struct Machine {
    /// How long a worker may take to end.
    end_limit: Duration,
    last: u32,
    serving: Option<Serving>,
    successor: Option<Successor>,
    /// The worker to be started when its time has come.
    waiting: Option<Worker>,
    quick_deaths: u32,
    stopping: bool,
}

impl Machine {
    pub(super) const fn new(end_limit: Duration) -> Self {
        Self { end_limit, last: 0, serving: None, successor: None, waiting: None, quick_deaths: 0, stopping: false }
    }

    /// Takes what happened and says what to do, in this order.
    pub(super) fn step(&mut self, input: Input) -> Vec<Step> {
        match input {
            Input::Begin => self.start(),
            Input::Hello(worker) => self.hello(worker),
            Input::Ready(worker) => match &mut self.serving {
                Some(serving) if serving.worker == worker && !self.stopping => {
                    serving.ready = true;
                    vec![Step::AnnounceReady]
                }
                _ => Vec::new(),
            },
            Input::Exited { worker, lived, killed } => self.exited(worker, lived, killed),
            Input::Upgrade => self.upgrade(),
            Input::Stop => self.stop(),
            Input::Elapsed(timer) => self.elapsed(timer),
        }
    }

    const fn number(&mut self) -> Worker {
        self.last += 1;
        Worker(self.last)
    }

    fn start(&mut self) -> Vec<Step> {
        let worker = self.number();
        self.serve_with(worker, false);
        vec![Step::Start(worker), Step::After(START_LIMIT, Timer::Overdue(worker))]
    }

    const fn serve_with(&mut self, worker: Worker, handed: bool) {
        self.serving = Some(Serving { worker, handed, ready: false, ending: false });
    }

    fn hello(&mut self, worker: Worker) -> Vec<Step> {
        if let Some(serving) = self.serving.as_mut().filter(|serving| serving.worker == worker && !serving.handed) {
            serving.handed = true;
            return vec![Step::Hand(worker)];
        }
        let Some(successor) = self.successor.as_mut().filter(|successor| successor.worker == worker) else {
            return Vec::new();
        };
        successor.greeted = true;
        match &mut self.serving {
            Some(old) if !old.ending => {
                old.ending = true;
                vec![Step::Terminate(old.worker), Step::After(self.end_limit, Timer::Overdue(old.worker))]
            }
            _ => Vec::new(),
        }
    }

    fn exited(&mut self, worker: Worker, lived: Duration, killed: bool) -> Vec<Step> {
        if self.successor.is_some_and(|successor| successor.worker == worker) {
            self.successor = None;
            return match (self.stopping, self.serving) {
                (true, None) => vec![Step::Finish],
                (true, Some(_)) => Vec::new(),
                (false, _) => vec![Step::UpgradeFailed],
            };
        }
        let Some(gone) = self.serving.take_if(|serving| serving.worker == worker) else {
            return Vec::new();
        };
        if self.stopping {
            return if self.successor.is_none() { vec![Step::Finish] } else { Vec::new() };
        }
        if let Some(Successor { worker, greeted }) = self.successor.take() {
            self.quick_deaths = 0;
            self.serve_with(worker, greeted);
            return if greeted { vec![Step::Hand(worker)] } else { Vec::new() };
        }
        // One that served and was killed from outside has done nothing wrong.
        let is_quick = lived < QUICK_DEATH && !gone.ending && !(gone.ready && killed);
        self.quick_deaths = if is_quick { self.quick_deaths.saturating_add(1) } else { 0 };
        match delay(self.quick_deaths) {
            Duration::ZERO => self.start(),
            delay => {
                let worker = self.number();
                self.waiting = Some(worker);
                vec![Step::After(delay, Timer::Start(worker))]
            }
        }
    }

    fn upgrade(&mut self) -> Vec<Step> {
        if self.stopping || self.successor.is_some() {
            return Vec::new();
        }
        if self.serving.is_none() {
            // The new version may be the one that does not die.
            (self.waiting, self.quick_deaths) = (None, 0);
            return self.start();
        }
        let worker = self.number();
        self.successor = Some(Successor { worker, greeted: false });
        vec![Step::Start(worker), Step::After(START_LIMIT, Timer::Overdue(worker))]
    }

    fn stop(&mut self) -> Vec<Step> {
        let successor = self.successor.map(|successor| Step::Kill(successor.worker));
        if self.stopping {
            // A second signal forces a fast end.
            let serving = self.serving.map(|serving| Step::Kill(serving.worker));
            return serving.into_iter().chain(successor).collect();
        }
        self.stopping = true;
        self.waiting = None;
        let mut steps = vec![Step::AnnounceStopping];
        steps.extend(successor);
        if let Some(Serving { worker, .. }) = self.serving {
            steps.extend([Step::Terminate(worker), Step::After(self.end_limit, Timer::Overdue(worker))]);
        } else if successor.is_none() {
            steps.push(Step::Finish);
        }
        steps
    }

    fn elapsed(&mut self, timer: Timer) -> Vec<Step> {
        match timer {
            Timer::Start(worker) => {
                if self.waiting.take_if(|waiting| *waiting == worker).is_none() {
                    return Vec::new();
                }
                self.serve_with(worker, false);
                vec![Step::Start(worker), Step::After(START_LIMIT, Timer::Overdue(worker))]
            }
            Timer::Overdue(worker) => {
                let is_late = match (self.serving, self.successor) {
                    (Some(serving), _) if serving.worker == worker => {
                        !serving.handed || serving.ending || self.stopping
                    }
                    (_, Some(successor)) if successor.worker == worker => !successor.greeted,
                    _ => false,
                };
                if is_late { vec![Step::Kill(worker)] } else { Vec::new() }
            }
        }
    }
}

/// How long to wait after so many quick deaths.
fn delay(quick_deaths: u32) -> Duration {
    match quick_deaths.checked_sub(QUICK_DEATHS_MAX + 1) {
        None => Duration::ZERO,
        Some(doublings) => DELAY_FIRST.saturating_mul(1 << doublings.min(20)).min(DELAY_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);
    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(10);

    const fn exited(worker: u32, lived: Duration) -> Input {
        Input::Exited { worker: Worker(worker), lived, killed: false }
    }

    const fn killed(worker: u32) -> Input {
        Input::Exited { worker: Worker(worker), lived: SHORT, killed: true }
    }

    fn started(worker: u32) -> Vec<Step> {
        vec![Step::Start(Worker(worker)), Step::After(START_LIMIT, overdue(worker))]
    }

    const fn overdue(worker: u32) -> Timer {
        Timer::Overdue(Worker(worker))
    }

    fn terminated(worker: u32) -> [Step; 2] {
        [Step::Terminate(Worker(worker)), Step::After(LIMIT, overdue(worker))]
    }

    /// Feeds inputs and compares what each is answered with.
    fn check(script: &[(Input, Vec<Step>)]) {
        let mut machine = Machine::new(LIMIT);
        for (number, (input, expected)) in script.iter().enumerate() {
            assert_eq!(machine.step(*input), *expected, "step {number}: {input:?}");
        }
    }

    /// Worker 1 started and serving.
    fn serving() -> Vec<(Input, Vec<Step>)> {
        vec![
            (Input::Begin, started(1)),
            (Input::Hello(Worker(1)), vec![Step::Hand(Worker(1))]),
            (Input::Ready(Worker(1)), vec![Step::AnnounceReady]),
        ]
    }

    fn then(rest: Vec<(Input, Vec<Step>)>) {
        check(&[serving(), rest].concat());
    }

    #[test]
    fn a_dead_worker_is_replaced_at_once() {
        then(vec![
            (exited(1, LONG), started(2)),
            (exited(1, LONG), vec![]),
            (Input::Hello(Worker(1)), vec![]),
            (Input::Hello(Worker(2)), vec![Step::Hand(Worker(2))]),
            (Input::Hello(Worker(2)), vec![]),
            (Input::Elapsed(overdue(2)), vec![]),
            (exited(2, SHORT), started(3)),
        ]);
    }

    #[test]
    fn delays_grow_with_quick_deaths_only() {
        let table = [(0, 0), (1, 0), (3, 0), (4, 100), (5, 200), (8, 1600), (11, 10_000), (99, 10_000)];
        for (deaths, expected) in table {
            assert_eq!(delay(deaths), Duration::from_millis(expected), "{deaths}");
        }
        let wait = |worker| vec![Step::After(DELAY_FIRST, Timer::Start(Worker(worker)))];
        check(&[
            (Input::Begin, started(1)),
            (exited(1, SHORT), started(2)),
            (exited(2, SHORT), started(3)),
            (exited(3, SHORT), started(4)),
            (exited(4, SHORT), wait(5)),
            (Input::Elapsed(Timer::Start(Worker(4))), vec![]),
            (Input::Elapsed(Timer::Start(Worker(5))), started(5)),
            (Input::Elapsed(Timer::Start(Worker(5))), vec![]),
            (exited(5, LONG), started(6)),
            (exited(6, SHORT), started(7)),
        ]);
    }

    #[test]
    fn being_killed_while_serving_is_no_quick_death() {
        let mut script = vec![(Input::Begin, started(1))];
        for worker in 1..20 {
            script.push((Input::Hello(Worker(worker)), vec![Step::Hand(Worker(worker))]));
            script.push((Input::Ready(Worker(worker)), vec![Step::AnnounceReady]));
            script.push((killed(worker), started(worker + 1)));
        }
        check(&script);
        // Before it serves, it is.
        check(&[
            (Input::Begin, started(1)),
            (killed(1), started(2)),
            (killed(2), started(3)),
            (killed(3), started(4)),
            (killed(4), vec![Step::After(DELAY_FIRST, Timer::Start(Worker(5)))]),
            (Input::Upgrade, started(6)),
            (Input::Elapsed(Timer::Start(Worker(5))), vec![]),
        ]);
    }

    #[test]
    fn an_upgrade_hands_over_when_the_old_one_is_gone() {
        then(vec![
            (Input::Upgrade, started(2)),
            (Input::Upgrade, vec![]),
            (Input::Hello(Worker(2)), terminated(1).to_vec()),
            (exited(1, LONG), vec![Step::Hand(Worker(2))]),
            (Input::Ready(Worker(2)), vec![Step::AnnounceReady]),
            (Input::Elapsed(overdue(1)), vec![]),
            (exited(2, LONG), started(3)),
        ]);
        // The old one does not exit.
        then(vec![
            (Input::Upgrade, started(2)),
            (Input::Hello(Worker(2)), terminated(1).to_vec()),
            (Input::Elapsed(overdue(1)), vec![Step::Kill(Worker(1))]),
            (exited(1, LONG), vec![Step::Hand(Worker(2))]),
        ]);
        // The old one dies before the new one has said a word.
        then(vec![
            (Input::Upgrade, started(2)),
            (exited(1, LONG), vec![]),
            (Input::Hello(Worker(2)), vec![Step::Hand(Worker(2))]),
        ]);
    }

    #[test]
    fn an_upgrade_that_does_not_start_harms_nothing() {
        then(vec![
            (Input::Upgrade, started(2)),
            (exited(2, SHORT), vec![Step::UpgradeFailed]),
            (Input::Upgrade, started(3)),
            (Input::Elapsed(overdue(3)), vec![Step::Kill(Worker(3))]),
            (exited(3, LONG), vec![Step::UpgradeFailed]),
            (exited(1, LONG), started(4)),
        ]);
        // It started, and dies while the old one ends.
        then(vec![
            (Input::Upgrade, started(2)),
            (Input::Hello(Worker(2)), terminated(1).to_vec()),
            (exited(2, SHORT), vec![Step::UpgradeFailed]),
            (exited(1, SHORT), started(3)),
        ]);
    }

    #[test]
    fn stopping() {
        let stopping = || [&[Step::AnnounceStopping][..], &terminated(1)].concat();
        then(vec![
            (Input::Stop, stopping()),
            (Input::Upgrade, vec![]),
            (Input::Elapsed(overdue(1)), vec![Step::Kill(Worker(1))]),
            (exited(1, LONG), vec![Step::Finish]),
        ]);
        then(vec![(Input::Stop, stopping()), (Input::Stop, vec![Step::Kill(Worker(1))])]);
        then(vec![
            (Input::Upgrade, started(2)),
            (Input::Stop, [&[Step::AnnounceStopping, Step::Kill(Worker(2))][..], &terminated(1)].concat()),
            (exited(1, LONG), vec![]),
            (exited(2, LONG), vec![Step::Finish]),
        ]);
        check(&[
            (Input::Begin, started(1)),
            (exited(1, SHORT), started(2)),
            (exited(2, SHORT), started(3)),
            (exited(3, SHORT), started(4)),
            (exited(4, SHORT), vec![Step::After(DELAY_FIRST, Timer::Start(Worker(5)))]),
            (Input::Stop, vec![Step::AnnounceStopping, Step::Finish]),
            (Input::Elapsed(Timer::Start(Worker(5))), vec![]),
        ]);
    }

    #[test]
    fn a_worker_that_never_speaks_is_killed() {
        check(&[
            (Input::Begin, started(1)),
            (Input::Elapsed(overdue(1)), vec![Step::Kill(Worker(1))]),
            (exited(1, START_LIMIT), started(2)),
        ]);
    }
}
