//! What will be read next: recorded [`profile`]s with their packs, and the files that others name ([`mentions`]).
//!
//! Both ask a [`crate::layer::reader`] for bytes ahead of the program. The room uses `layer` and `tree`; `open`, `fuse`
//! and `node` use it.

pub mod mentions;
pub mod profile;
