//! The containerd snapshotter.

pub mod config;
