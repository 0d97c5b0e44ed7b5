//! The task that owns the queue: it takes messages, writes the journal and starts the jobs.
//!
//! A task of its own instead of a lock, because every change is persisted before it is acknowledged. Messages that came
//! meanwhile are taken together, so a burst of events costs one write. When the disk refuses, the event is dropped and
//! its sender is asked to retry; a job that has ended stays ended, and at worst runs once more after a restart.

use std::sync::Arc;
use std::time::Duration;

use soci_index::clock;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::webhook::Work;
use crate::webhook::event::Push;
use crate::webhook::journal::{Journal, JournalError};
use crate::webhook::queue::{End, Input, Job, Outcome, Queue, QueueStatus, Step};

/// Capacity of the mailbox: senders wait beyond that.
const MAILBOX: usize = 256;
/// Messages that share one write.
const TOGETHER: usize = 64;

/// What became of pushes.
#[derive(Debug)]
pub enum Receipt {
    /// They are on disk.
    Accepted,
    /// Too many wait.
    Full,
    /// They could not be kept.
    NotKept(Arc<JournalError>),
}

#[derive(Debug)]
enum Message {
    Pushed(Vec<Push>, oneshot::Sender<Receipt>),
    Stirred(Vec<String>, oneshot::Sender<()>),
    Look(oneshot::Sender<QueueStatus>),
    /// The senders have gone: begin nothing more, and say when all has ended.
    Close(oneshot::Sender<()>),
}

/// A handle to the queue's task.
#[derive(Debug, Clone)]
pub struct Mailbox(mpsc::Sender<Message>);

/// The queue's task has ended: the server is shutting down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server is ending")]
pub struct Gone;

impl Mailbox {
    /// Hands over what was pushed.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn pushed(&self, pushes: Vec<Push>) -> Result<Receipt, Gone> {
        self.ask(|reply| Message::Pushed(pushes, reply)).await
    }

    /// Reports repositories with other events than a push of an image: resting jobs there are retried.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn stirred(&self, repositories: Vec<String>) -> Result<(), Gone> {
        self.ask(|reply| Message::Stirred(repositories, reply)).await
    }

    /// The state of things.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn look(&self) -> Result<QueueStatus, Gone> {
        self.ask(Message::Look).await
    }

    /// Has nothing more begun, and waits until nothing runs.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn close(&self) -> Result<(), Gone> {
        self.ask(Message::Close).await
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T, Gone> {
        let (reply, answer) = oneshot::channel();
        self.0.send(message(reply)).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }
}

/// See the module.
struct Clerk {
    queue: Queue,
    journal: Arc<Journal>,
    work: Work,
    running: JoinSet<(Push, End)>,
    wake: Option<u64>,
    /// The waiter for the end of all jobs.
    closing: Vec<oneshot::Sender<()>>,
}

/// Starts the queue's task.
#[must_use]
pub fn start(queue: Queue, journal: Journal, work: Work) -> Mailbox {
    let (mailbox, messages) = mpsc::channel(MAILBOX);
    let clerk =
        Clerk { queue, journal: Arc::new(journal), work, running: JoinSet::new(), wake: None, closing: Vec::new() };
    tokio::spawn(clerk.serve(messages));
    Mailbox(mailbox)
}

impl Clerk {
    async fn serve(mut self, mut messages: mpsc::Receiver<Message>) {
        let step = self.queue.step(clock::seconds(), Input::Clock);
        self.go_on(step);
        loop {
            let pause = self.wake.map(|wake| Duration::from_secs(wake.saturating_sub(clock::seconds())));
            let clock = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                message = messages.recv() => {
                    let Some(first) = message else { return };
                    let more = std::iter::from_fn(|| messages.try_recv().ok()).take(TOGETHER);
                    let all = std::iter::once(first).chain(more).collect();
                    self.take(all).await;
                }
                Some(ended) = self.running.join_next() => self.ended(ended).await,
                () = clock => {
                    let step = self.queue.step(clock::seconds(), Input::Clock);
                    self.go_on(step);
                }
            }
            if self.queue.is_idle() {
                // The receiver may be gone.
                for reply in self.closing.drain(..) {
                    let _ = reply.send(());
                }
            }
        }
    }

    async fn take(&mut self, messages: Vec<Message>) {
        let mut pushed = Vec::new();
        for message in messages {
            match message {
                Message::Pushed(pushes, reply) => pushed.push((pushes, reply)),
                Message::Stirred(repositories, reply) => {
                    let step = self.queue.step(clock::seconds(), Input::Stirred(repositories));
                    self.go_on(step);
                    let _ = reply.send(());
                }
                Message::Look(reply) => drop(reply.send(self.queue.seen())),
                Message::Close(reply) => {
                    let step = self.queue.step(clock::seconds(), Input::Close);
                    self.go_on(step);
                    self.closing.push(reply);
                }
            }
        }
        if pushed.is_empty() {
            return;
        }
        let before = self.queue.clone();
        let (mut start, mut accepted) = (Vec::new(), Vec::new());
        let mut wake = self.wake;
        for (pushes, reply) in pushed {
            match self.queue.step(clock::seconds(), Input::Pushed(pushes)) {
                Step::Full => drop(reply.send(Receipt::Full)),
                Step::Go { start: more, wake: next } => {
                    start.extend(more);
                    wake = next;
                    accepted.push(reply);
                }
            }
        }
        if accepted.is_empty() {
            return;
        }
        match self.keep().await {
            Ok(()) => {
                self.go_on(Step::Go { start, wake });
                accepted.into_iter().for_each(|reply| drop(reply.send(Receipt::Accepted)));
            }
            Err(error) => {
                tracing::error!(%error, "what was pushed is not accepted");
                self.queue = before;
                let error = Arc::new(error);
                accepted.into_iter().for_each(|reply| drop(reply.send(Receipt::NotKept(Arc::clone(&error)))));
            }
        }
    }

    async fn ended(&mut self, ended: Result<(Push, End), tokio::task::JoinError>) {
        let (push, end) = match ended {
            Ok(ended) => ended,
            // The task catches panics; it is aborted only when all ends.
            Err(error) => return tracing::error!(%error, "a job is lost; it is done after a restart"),
        };
        log(&push, &end);
        let step = self.queue.step(clock::seconds(), Input::Ended(push, end));
        if let Err(error) = self.keep().await {
            tracing::error!(%error, "jobs that have ended may be done once more after a restart");
        }
        self.go_on(step);
    }

    /// Writes down what must not be forgotten.
    async fn keep(&self) -> Result<(), JournalError> {
        let (journal, jobs) = (Arc::clone(&self.journal), self.queue.pending());
        let written = tokio::task::spawn_blocking(move || journal.write(jobs)).await;
        written.unwrap_or_else(|error| {
            Err(JournalError::Io { action: "write", path: "queue.json".to_owned(), cause: error.into() })
        })
    }

    fn go_on(&mut self, step: Step) {
        let Step::Go { start, wake } = step else { return };
        self.wake = wake;
        for job in start {
            let (push, run) = (job.push.clone(), run(&self.work, job));
            self.running.spawn(async move { (push, run.await) });
        }
    }
}

/// A job, whose panic is a failure like others.
fn run(work: &Work, job: Job) -> impl Future<Output = End> + Send + use<> {
    let task = tokio::spawn(work(job));
    let end = AbortOnDrop(task.abort_handle());
    async move {
        let _end = end;
        task.await.unwrap_or_else(|error| End::Done { outcome: Outcome::Failed, message: error.to_string() })
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn log(push: &Push, end: &End) {
    let (repository, tag) = (&push.repository, &push.tag);
    match end {
        End::Done { outcome: Outcome::Failed, message } => tracing::error!("{repository}:{tag}: failed: {message}"),
        End::Done { outcome, message } => tracing::info!(?outcome, "{repository}:{tag}: {message}"),
        End::Again { message } => tracing::warn!("{repository}:{tag}: will be tried again: {message}"),
        End::Rest { message } => {
            tracing::warn!("{repository}:{tag}: rests until the registry admits it, or has another event: {message}");
        }
    }
}
