//! The containerd snapshotter.

pub mod config;
pub mod operations;
