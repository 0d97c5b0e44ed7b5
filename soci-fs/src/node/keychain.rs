//! Where a node's credentials come from, beside docker's configuration.
//!
//! | source | knows | learns of changes |
//! |---|---|---|
//! | [`cluster`] | pull secrets of a Kubernetes cluster | by watching |
//! | [`pulls`] | what the kubelet sent along with a pull | at the next pull |
//! | [`plugins`] | whatever the kubelet's credential plugins know | when theirs expire, or are refused |
//!
//! All of them name credentials as Kubernetes does, by [`pattern`]s of images, and read them as docker writes them, by
//! [`auths`]. None keeps a connection to a registry or knows what a refusal is: that is the registry client's part,
//! which asks again when it needs to.
//!
//! Invariants: nothing secret is logged or put into an error; nothing that a secret or an answer says makes us run a
//! program or ask another host; every source answers from memory or within the caller's deadline.

pub mod auths;
pub mod cluster;
pub mod pattern;
pub mod plugins;
pub mod pulls;
