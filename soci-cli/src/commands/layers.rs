//! The layer stores of this user, and how images are opened into one.

use std::path::Path;

use anyhow::Context as _;
use soci_fs::layer::store::{Store, StoreError};
use soci_fs::open::OpenOptions;

use crate::args::config::Config;
use crate::report::exit::{Exit, fail};

/// Layer stores that are tried before giving up: one for each image that is mounted at the same time.
const STORES_MAX: u32 = 256;

/// The first layer store that no other process has open. Images that are mounted one after the other thus share their
/// layers; images that are mounted at the same time have stores of their own.
///
/// # Errors
/// When the directory cannot be used.
pub fn free_store(root: &Path) -> anyhow::Result<Store> {
    for number in 0..STORES_MAX {
        match Store::open(&root.join(number.to_string())) {
            Err(StoreError::Busy { .. }) => {}
            result => return result.with_context(|| format!("opening a layer store below {}", root.display())),
        }
    }
    let hint = format!("all {STORES_MAX} layer stores below {} are in use; unmount some images", root.display());
    Err(fail(Exit::Local, hint))
}

/// How images are opened by the commands that read all they are asked for, or what a program asks for: any index will do.
#[must_use]
pub fn open_options(config: &Config, layer_bytes_min: u64) -> OpenOptions {
    OpenOptions {
        layer_bytes_min,
        index_store: Some(config.index_store()),
        parallel: std::thread::available_parallelism().map_or(2, std::num::NonZero::get).max(4),
        ..OpenOptions::default()
    }
}
