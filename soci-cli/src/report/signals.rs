//! The signals that end a program: SIGTERM and SIGINT.
//!
//! Caught from the moment that a [`Signals`] is made, so that what must be undone, a mount for example, is undone also
//! if a signal comes before the program waits for one.

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Both of them.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches them from now on, for the rest of the process's life.
    ///
    /// # Errors
    /// When no handler can be installed.
    pub fn catch() -> anyhow::Result<Self> {
        let catch = |kind| signal(kind).context("cannot wait for signals");
        Ok(Self { terminate: catch(SignalKind::terminate())?, interrupt: catch(SignalKind::interrupt())? })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
