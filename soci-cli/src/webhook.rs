//! `soci serve-webhook`: indexes each image that a registry announces by a webhook, without a change to any pipeline.
//!
//! Four parts. [`event`] reads what Harbor and the distribution project's registry send, and says what is of no
//! interest and why; [`queue`] decides what is done when, and is stepped from outside; [`journal`] keeps on disk what
//! was accepted; [`clerk`] owns the two and runs the jobs. [`server`] speaks HTTP. What a job does is given from
//! outside as a function ([`Work`]).
//!
//! Invariants: nothing that a body says is ever connected to: the one registry is named on the command line, and a name
//! from a body becomes part of a reference only by way of the reference grammar. What was answered with 202 is on disk.
//! Our own pushes lead to no work: a SOCI manifest has no tag, and an image that we made is up to date.

pub mod clerk;
pub mod door;
pub mod event;
pub mod journal;
pub mod queue;
pub mod server;

use std::pin::Pin;
use std::sync::Arc;

use self::queue::{End, Job};

/// Indexes one image, and says how it went.
pub type Work = Arc<dyn Fn(Job) -> Pin<Box<dyn Future<Output = End> + Send>> + Send + Sync>;
