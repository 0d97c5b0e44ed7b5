//! Cold starts of containers, measured: what `soci bench` does, and what the project's own benchmarks use of it.
//!
//! A start has three phases, each a call of containerd's: the image is pulled, a container is created, its program runs
//! to its end. The registry is reached through a relay of ours (`relay`), which counts bytes and can be as slow and as
//! far away as a network (`link` decides when what arrives, and knows no clock). `node` drives containerd, `run` does
//! the starts, `waits` asks our daemon how long reads waited, `series` holds what came of all and shows it in rows,
//! `picture` as bars.
//!
//! Invariants: nothing is reported of a start whose layers did not come as the snapshotter promises (`honesty`); all
//! snapshotters go through the same relay, and the kernel's caches are dropped before each start.

pub mod honesty;
pub mod link;
pub mod node;
pub mod picture;
pub mod relay;
pub mod run;
pub mod series;
pub mod waits;
