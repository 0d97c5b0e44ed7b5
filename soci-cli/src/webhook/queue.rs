//! What is done when: the queue of images, stepped from outside.
//!
//! Pure: the time comes in with every step, and what is to be started goes out. One image, one job: a second push of a
//! tag replaces its waiting job; during a running job it schedules another run afterwards, for what the tag names then.
//! A failure that may pass is retried after the times of [`PAUSES`]. What a policy forbids passes when an administrator
//! changes something, which may take days: such a job rests for the times of [`RESTS`], and is retried at once when its
//! repository has another event. The others end the job. Invariants: no tag is worked on twice at the same time; what
//! was accepted stays in [`Queue::pending`] until it has ended or was replaced; what is refused changes nothing.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::webhook::event::Push;

/// Seconds before another attempt: the registry restarts, credentials are renewed, quotas are raised.
pub const PAUSES: [u64; 4] = [30, 120, 600, 1800];
/// Seconds that a job rests which a policy forbids: an image is signed within minutes, a quota is raised on Monday.
pub const RESTS: [u64; 8] = [120, 600, 1800, 7200, 21_600, 86_400, 86_400, 86_400];
/// Seconds before a resting job is retried when its repository has another event: what we push ourselves is one, too.
const STIRRING: u64 = 10;
/// Ended jobs that are remembered.
const ENDED_MAX: usize = 100;

/// How much is done and kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Jobs that run at the same time.
    pub jobs: usize,
    /// Jobs that wait. Keeps senders of events from filling the memory and the disk.
    pub waiting: usize,
}

/// Work on one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Job {
    /// The image.
    #[serde(flatten)]
    pub push: Push,
    /// Attempts that failed.
    #[serde(default)]
    pub attempts: u32,
    /// Not before this second of the Unix clock.
    #[serde(default)]
    pub due: u64,
    /// Whether it rests until a policy of the registry admits it.
    #[serde(default)]
    pub rests: bool,
    /// Whether it was begun before: part of it may be done already.
    #[serde(default)]
    pub begun: bool,
}

/// What came of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// An index was published.
    Published,
    /// It was there already.
    UpToDate,
    /// There is nothing in it that can be indexed: small layers, or no image at all.
    Nothing,
    /// The tag names something else by now, or was pushed again: that one's job does it.
    Superseded,
    /// It failed for good, or too often.
    Failed,
}

/// How a run of a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// For good.
    Done {
        /// With this result.
        outcome: Outcome,
        /// One line about it.
        message: String,
    },
    /// It failed, and may succeed later.
    Again {
        /// Why it failed.
        message: String,
    },
    /// A policy of the registry forbids it for now.
    Rest { message: String },
}

/// A job that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Ended {
    /// The image.
    #[serde(flatten)]
    pub push: Push,
    /// What came of it.
    pub outcome: Outcome,
    /// One line about it.
    pub message: String,
    /// Attempts that failed before.
    pub attempts: u32,
    /// When, in seconds of the Unix clock.
    pub at: u64,
}

/// Something happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Images were pushed: all of them are accepted, or none.
    Pushed(Vec<Push>),
    /// Something happened in these repositories.
    Stirred(Vec<String>),
    /// A run of this image's job has ended.
    Ended(Push, End),
    /// Time has passed.
    Clock,
    /// Nothing is started any more.
    Close,
}

/// What is to be done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The images were not accepted: too many wait.
    Full,
    Go {
        start: Vec<Job>,
        /// When to step next, if nothing else happens.
        wake: Option<u64>,
    },
}

/// Sums since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Images accepted.
    pub queued: u64,
    /// Jobs that published.
    pub published: u64,
    /// Jobs with nothing to do.
    pub up_to_date: u64,
    /// Jobs with nothing to index.
    pub nothing: u64,
    /// Jobs that another one does.
    pub superseded: u64,
    /// Jobs that failed.
    pub failed: u64,
    /// Attempts that failed and are repeated.
    pub retried: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Running {
    job: Job,
    /// What was pushed meanwhile.
    next: Option<Push>,
}

#[derive(Debug, Clone)]
pub struct Queue {
    bounds: Bounds,
    waiting: VecDeque<Job>,
    running: Vec<Running>,
    ended: VecDeque<Ended>,
    counters: Counters,
    closed: bool,
}

/// What is seen of a queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QueueStatus {
    /// Jobs that wait, the first one first.
    pub waiting: Vec<Job>,
    /// Jobs that run.
    pub running: Vec<Job>,
    /// Jobs that have ended, the last one first.
    pub ended: Vec<Ended>,
    /// Sums.
    #[serde(skip)]
    pub counters: Counters,
}

fn is_same(one: &Push, other: &Push) -> bool {
    (&one.repository, &one.tag) == (&other.repository, &other.tag)
}

impl Queue {
    /// A queue with what was left of another one.
    #[must_use]
    pub fn new(bounds: Bounds, left: Vec<Job>, now: u64) -> Self {
        let mut queue = Self {
            bounds,
            waiting: VecDeque::new(),
            running: Vec::new(),
            ended: VecDeque::new(),
            counters: Counters::default(),
            closed: false,
        };
        for job in left {
            let pauses: &[u64] = if job.rests { &RESTS } else { &PAUSES };
            let longest = pauses.last().copied().unwrap_or_default();
            // A clock that was set back must not delay a job indefinitely.
            let job = Job { due: job.due.min(now + longest), ..job };
            queue.waiting.retain(|known| !is_same(&known.push, &job.push));
            queue.waiting.push_back(job);
        }
        queue
    }

    /// Takes in what happens, and says what is to be done.
    pub fn step(&mut self, now: u64, input: Input) -> Step {
        match input {
            Input::Pushed(pushes) => {
                if !self.has_room(&pushes) {
                    return Step::Full;
                }
                let repositories: Vec<String> = pushes.iter().map(|push| push.repository.clone()).collect();
                pushes.into_iter().for_each(|push| self.accept(push));
                self.stir(now, &repositories);
            }
            Input::Stirred(repositories) => self.stir(now, &repositories),
            Input::Ended(push, end) => self.end(now, &push, end),
            Input::Clock => {}
            Input::Close => self.closed = true,
        }
        Step::Go { start: self.start(now), wake: self.wake() }
    }

    /// What must not be forgotten.
    #[must_use]
    pub fn pending(&self) -> Vec<Job> {
        let running = self.running.iter().map(|running| match &running.next {
            Some(push) => fresh(push.clone()),
            None => Job { begun: true, ..running.job.clone() },
        });
        running.chain(self.waiting.iter().cloned()).collect()
    }

    #[must_use]
    pub fn seen(&self) -> QueueStatus {
        let next = self.running.iter().filter_map(|running| running.next.clone()).map(fresh);
        QueueStatus {
            waiting: self.waiting.iter().cloned().chain(next).collect(),
            running: self.running.iter().map(|running| running.job.clone()).collect(),
            ended: self.ended.iter().rev().cloned().collect(),
            counters: self.counters,
        }
    }

    /// Whether nothing runs.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    fn has_room(&self, pushes: &[Push]) -> bool {
        let is_known = |push: &Push| {
            self.waiting.iter().any(|job| is_same(&job.push, push))
                || self.running.iter().any(|running| running.next.as_ref().is_some_and(|next| is_same(next, push)))
        };
        let is_first = |at: usize, push: &Push| !pushes.iter().take(at).any(|earlier| is_same(earlier, push));
        let new = pushes.iter().enumerate().filter(|(at, push)| !is_known(push) && is_first(*at, push)).count();
        let waiting = self.waiting.len() + self.running.iter().filter(|running| running.next.is_some()).count();
        new == 0 || waiting + new <= self.bounds.waiting
    }

    fn accept(&mut self, push: Push) {
        self.counters.queued += 1;
        if let Some(running) = self.running.iter_mut().find(|running| is_same(&running.job.push, &push)) {
            running.next = Some(push);
        } else if let Some(job) = self.waiting.iter_mut().find(|job| is_same(&job.push, &push)) {
            *job = fresh(push);
        } else {
            self.waiting.push_back(fresh(push));
        }
    }

    fn stir(&mut self, now: u64, repositories: &[String]) {
        let stirred = |job: &&mut Job| job.rests && repositories.contains(&job.push.repository);
        self.waiting.iter_mut().filter(stirred).for_each(|job| job.due = job.due.min(now + STIRRING));
    }

    fn end(&mut self, now: u64, push: &Push, end: End) {
        let Some(at) = self.running.iter().position(|running| is_same(&running.job.push, push)) else { return };
        let Running { mut job, next } = self.running.swap_remove(at);
        let rests = matches!(end, End::Rest { .. });
        let pauses: &[u64] = if rests { &RESTS } else { &PAUSES };
        let pause = usize::try_from(job.attempts).ok().and_then(|done| pauses.get(done));
        let (outcome, message) = match (end, pause) {
            (End::Done { outcome, message }, _) => (outcome, message),
            (End::Again { message } | End::Rest { message }, _) if next.is_some() => (Outcome::Superseded, message),
            (End::Again { message } | End::Rest { message }, None) => (Outcome::Failed, message),
            (End::Again { .. } | End::Rest { .. }, Some(pause)) => {
                self.counters.retried += 1;
                job = Job { attempts: job.attempts + 1, due: now + pause, rests, begun: true, ..job };
                self.waiting.push_back(job);
                return;
            }
        };
        *self.sum(outcome) += 1;
        self.ended.push_back(Ended { push: job.push, outcome, message, attempts: job.attempts, at: now });
        if self.ended.len() > ENDED_MAX {
            self.ended.pop_front();
        }
        if let Some(push) = next {
            self.waiting.push_back(fresh(push));
        }
    }

    fn sum(&mut self, outcome: Outcome) -> &mut u64 {
        match outcome {
            Outcome::Published => &mut self.counters.published,
            Outcome::UpToDate => &mut self.counters.up_to_date,
            Outcome::Nothing => &mut self.counters.nothing,
            Outcome::Superseded => &mut self.counters.superseded,
            Outcome::Failed => &mut self.counters.failed,
        }
    }

    fn start(&mut self, now: u64) -> Vec<Job> {
        let mut started = Vec::new();
        while !self.closed && self.running.len() < self.bounds.jobs {
            let Some(at) = self.waiting.iter().position(|job| job.due <= now) else { break };
            let Some(job) = self.waiting.remove(at) else { break };
            started.push(job.clone());
            self.running.push(Running { job, next: None });
        }
        started
    }

    /// What is due is started as soon as there is room; for the rest, the time will come.
    fn wake(&self) -> Option<u64> {
        let has_room = !self.closed && self.running.len() < self.bounds.jobs;
        self.waiting.iter().map(|job| job.due).min().filter(|_| has_room)
    }
}

fn fresh(push: Push) -> Job {
    Job { push, attempts: 0, due: 0, rests: false, begun: false }
}

#[cfg(test)]
mod tests;
