//! What files name: a program that reads a file often reads next what that file names.
//!
//! The loader reads the libraries that an executable names, and what they name; the kernel the interpreter of a script;
//! Python the modules that a module imports. Each of them is asked for when the one before it has come, so a start-up
//! on a lazy file system is a long chain of round trips. But a name is there as soon as the file that has it: so what
//! was read is looked through for names, those that lead to files of the image are fetched, and looked through in turn.
//! The chain is walked at the speed of the line, ahead of the program, with nothing recorded before and by whatever
//! index.
//!
//! [`elf`] and [`python`] find names in bytes, [`Names`] finds files by names in an image's trees, both without I/O; a
//! [`Follower`] listens to an image's readers and fetches. How far it may be wrong is bounded there.
//!
//! Roads not taken: to find the names when an index is made (every layer would have to be indexed anew, and names lead
//! from layer to layer); to understand the compiled code of Python's many versions (its constants have all names).

pub mod elf;
mod follow;
mod names;
pub mod python;
mod stems;

pub use follow::{Follower, Reach};
pub use names::{FileAt, Names, Resolved};

/// What a file names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Mention {
    /// A file, by its absolute path.
    Path(Box<[u8]>),
    /// A shared library.
    Library {
        /// Its name: one component.
        name: Box<[u8]>,
        /// Where to look for it before the usual places; `$ORIGIN` is the directory of the file that names it.
        directories: Box<[Box<[u8]>]>,
    },
    /// A module of Python, or what may be one: names with dots between them.
    Module(Box<[u8]>),
}

/// The interpreter that the first line of a script names: `#!/path arguments`.
#[must_use]
pub fn script(head: &[u8]) -> Option<Mention> {
    let line = head.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let path = line.split(|byte| byte.is_ascii_whitespace()).find(|word| !word.is_empty())?;
    path.starts_with(b"/").then(|| Mention::Path(path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_name_interpreters() {
        let path = |path: &str| Some(Mention::Path(path.as_bytes().into()));
        for (head, expected) in [
            ("#!/bin/sh\nrm -rf /\n", path("/bin/sh")),
            ("#! /usr/bin/env python3", path("/usr/bin/env")),
            ("#!", None),
            ("#!sh\n", None),
            ("#\n!/bin/sh", None),
            ("", None),
        ] {
            assert_eq!(script(head.as_bytes()), expected, "{head}");
        }
    }
}
