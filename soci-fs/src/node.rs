//! A node: containerd's snapshotter, over one FUSE mount for all layers.
//!
//! | what | modules |
//! |---|---|
//! | containerd asks for snapshots | [`grpc`], [`snapshots`] |
//! | layers for them, opened on demand, proven and swept | [`remote`], [`rpull`], [`content`] |
//! | processes that come and go under the mount | [`supervisor`] |
//! | credentials of pulls, plugins and the cluster | [`keychain`] |
//! | figures, by AWS's names | [`metrics`] |
//!
//! The room is the top of the crate and uses every other.

pub mod content;
pub mod grpc;
pub mod keychain;
pub mod metrics;
pub mod remote;
pub mod rpull;
pub mod snapshots;
pub mod supervisor;
