//! Lazy file systems over indexed container layers: everything a node needs to read an image without unpacking it.
//!
//! Six rooms, each on the ones before it: a [`tree`] says which files a layer has, [`layer`] fetches, keeps and
//! verifies its bytes, [`foresight`] asks for them ahead of the program, [`open`] turns an image into readers of its
//! layers, [`fuse`] shows them to the kernel, and [`node`] does so for all containers of a node.

pub mod foresight;
pub mod fuse;
pub mod layer;
pub mod node;
pub mod open;
pub mod tree;
