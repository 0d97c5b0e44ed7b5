//! What `soci demo` needs besides the product itself: an image made of this machine's files, a registry to keep it in,
//! and a stop watch.

pub mod measure;
pub mod process;
pub mod recipe;
pub mod registry;
pub mod report;
pub mod stage;
