//! Making the kernel forget what it was shown.
//!
//! What a file system here answers never changes, so the kernel keeps it for ever: pages, attributes, link targets,
//! names. When a layer turns out to be forged that must go. How the kernel is notified is the FUSE adapter's business;
//! which nodes are affected is that of the file system.
//!
//! What cannot be taken back is what a program has read already, and a page that it has locked; the first is said where
//! a claim is condemned, the second is counted here.

use std::fmt;
use std::io;
use std::sync::OnceLock;

use rustix::io::Errno;

use crate::tree::node_id::NodeId;
use crate::tree::{NodeKind, NodeNumber, Tree};

/// A kernel that caches.
pub(crate) trait KernelCache: fmt::Debug + Send + Sync + 'static {
    /// Drops pages and attributes of an inode.
    fn forget_inode(&self, inode: u64) -> io::Result<()>;
    /// Drops a name in a directory.
    fn forget_name(&self, directory: u64, name: &[u8]) -> io::Result<()>;
}

/// The kernel that a file system is mounted in, once it is.
#[derive(Debug, Default)]
pub(crate) struct Mounted(OnceLock<Box<dyn KernelCache>>);

impl Mounted {
    /// Notes the kernel. A file system is mounted once.
    pub(crate) fn set(&self, kernel: Box<dyn KernelCache>) {
        // A second mount of the same file system would be served by the same nodes, and none is made.
        let _ = self.0.set(kernel);
    }

    /// Drops everything that is cached of a tree whose nodes have these ids.
    pub(crate) fn forget(&self, tree: &Tree, id: impl Fn(NodeNumber) -> NodeId) {
        let Some(kernel) = self.0.get() else { return };
        let (mut dropped, mut kept, mut last) = (0_u64, 0_u64, None);
        let mut note = |result: io::Result<()>| match result {
            Ok(()) => dropped += 1,
            // It was not cached.
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
            Err(error) => {
                kept += 1;
                last = Some(error);
            }
        };
        for (number, node) in (0_u32..).map(NodeNumber).zip(tree.nodes()) {
            if node.kind() == NodeKind::Directory {
                for (_, child) in tree.children(number, 0) {
                    note(kernel.forget_name(id(number).pack(), child.name));
                }
            }
            note(kernel.forget_inode(id(number).pack()));
        }
        match last {
            None => tracing::info!(dropped, "what the kernel had cached of a layer is dropped"),
            Some(error) => {
                tracing::error!(dropped, kept, %error, "not everything that the kernel had cached of a layer could be dropped");
            }
        }
    }
}
