//! Lazy file systems over indexed container layers: everything a node needs to read an image without unpacking it.
//!
//! Six rooms, each on the ones before it: a [`tree`] says which files a layer has, [`layer`] fetches, keeps and verifies
//! its bytes, [`foresight`] asks for them ahead of the program, [`open`] turns an image into readers of its layers,
//! [`fuse`] shows them to the kernel, and [`node`] does so for all containers of a node.
//!
//! The last two are features of their own names, both on by default: a program that reads layers without the kernel's help
//! needs neither, nor what they depend on.

// What only the rooms above use is not worth a mark of its own.
#![cfg_attr(not(feature = "node"), allow(dead_code, unused_imports))]

pub mod foresight;
#[cfg(feature = "fuse")]
pub mod fuse;
pub mod layer;
#[cfg(feature = "node")]
pub mod node;
pub mod open;
pub mod tree;
