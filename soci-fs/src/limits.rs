//! The caps of this process on what images may make it hold.
//!
//! An operator raises them once, when the program starts; where they apply, deep in what opens layers, nothing else of an
//! operator's settings is needed. So they are one value of the process, not a parameter of everything in between.

use std::sync::OnceLock;

use soci_index::limits::Limits;

static LIMITS: OnceLock<Limits> = OnceLock::new();

/// Sets the caps, before anything is opened. Once: later calls change nothing.
pub fn set(limits: Limits) {
    if LIMITS.set(limits).is_err() {
        tracing::debug!("the limits of this process are set already");
    }
}

/// The caps for what is said of a layer blob of so many bytes.
#[must_use]
pub fn for_layer(layer_bytes: u64) -> Limits {
    LIMITS.get().unwrap_or(&Limits::DEFAULT).for_layer(layer_bytes)
}
