//! Stands in for a node's parts in a program that is built without the feature `node`: nothing is found there, and the
//! error names the feature.

use std::sync::Arc;

use soci_index::format::digest::Digest;
use soci_index::format::model::Descriptor;
use soci_index::image::foreign::{ContentStore, ContentTarget};
use soci_index::publish::Report;
use soci_index::publish::local::Keep;

use crate::args::config::Config;
use crate::args::{Doctor, Global};
use crate::commands::finding::Finding;
use crate::report::exit::{Exit, fail};

fn absent<T>(what: &str) -> anyhow::Result<T> {
    Err(fail(Exit::Usage, format!("this soci is built without the feature `node`: {what}")))
}

const CONTAINERD: &str = "it does not speak to containerd";

/// Not here.
///
/// # Errors
/// Always.
pub async fn image(_: &str, _: &Global) -> anyhow::Result<Arc<dyn ContentStore>> {
    absent(CONTAINERD)
}

/// Not here.
///
/// # Errors
/// Always.
pub async fn content(_: &Global, _: &str) -> anyhow::Result<Arc<dyn ContentStore>> {
    absent(CONTAINERD)
}

/// Not here.
///
/// # Errors
/// Always.
pub async fn delete(_: &Digest, _: &Global, _: &str) -> anyhow::Result<()> {
    absent(CONTAINERD)
}

/// Not here.
///
/// # Errors
/// Always.
pub async fn indexes(_: &Global, _: &str) -> anyhow::Result<Vec<Descriptor>> {
    absent(CONTAINERD)
}

/// Not here.
///
/// # Errors
/// Always.
pub fn target(_: &str, _: &Global) -> anyhow::Result<Arc<dyn ContentTarget>> {
    absent(CONTAINERD)
}

/// An image of containerd, of which there is none.
#[derive(Debug)]
pub enum ContainerdIndexStore {}

impl ContainerdIndexStore {
    /// Not here.
    ///
    /// # Errors
    /// Always.
    pub async fn open(_: &str, _: &Global) -> anyhow::Result<Self> {
        absent(CONTAINERD)
    }

    /// Where indexes are kept.
    #[must_use]
    pub fn keep(&self) -> Keep {
        match *self {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub async fn close(&self, _: &[(String, Report)]) -> anyhow::Result<()> {
        match *self {}
    }
}

/// Whether this machine is a node: not one that this program knows.
pub(super) fn is_one(_: &Doctor, _: &Config) -> bool {
    false
}

/// The checks of a machine, which are not here.
///
/// # Errors
/// Always.
pub(super) fn findings(_: &Doctor, _: &Config) -> anyhow::Result<Vec<Finding>> {
    absent("it checks no machine; name an image to have that one and its registry checked")
}

/// What a snapshotter has noted of a container, which is not here.
///
/// # Errors
/// Always.
#[cfg(feature = "mount")]
pub(super) fn run(_: &crate::args::Record, _: &str, _: &Config, _: &Global) -> anyhow::Result<()> {
    absent("it knows no containers; name an image and a command to record that one")
}
