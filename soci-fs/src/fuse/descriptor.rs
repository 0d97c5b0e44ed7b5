//! Descriptors known by number only: the one place of this crate where the compiler cannot check ownership.

#![allow(unsafe_code, reason = "a number can become an owned descriptor in no other way")]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use rustix::io::{DupFlags, FdFlags};

/// Puts `new` in the place of the descriptor that `holder` holds: the number stays, what it refers to changes.
pub(crate) fn replace(holder: &impl AsFd, new: &impl AsFd) -> io::Result<()> {
    let number = holder.as_fd().as_raw_fd();
    // SAFETY: `holder` owns the number and outlives this function, and `ManuallyDrop` keeps the second owner from ever
    // closing it. `dup3` changes what the number refers to in one step, so `holder` owns an open descriptor throughout.
    let mut held = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
    Ok(rustix::io::dup3(new, &mut held, DupFlags::CLOEXEC)?)
}

/// Takes the `count` descriptors from 3 on, as a service manager passes them, each checked to be open and from now on
/// closed on `exec`.
pub(crate) fn adopt_passed(count: usize) -> io::Result<Vec<OwnedFd>> {
    const FIRST: usize = 3;
    let mut adopted = Vec::new();
    for number in FIRST..FIRST.saturating_add(count) {
        let number = RawFd::try_from(number).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: by the protocol the descriptors from 3 on belong to this process's main program, which calls this
        // once, before it opens anything. A number that is not open fails the next call and is then not dropped as
        // open.
        let descriptor = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
        rustix::io::fcntl_setfd(&*descriptor, FdFlags::CLOEXEC)?;
        adopted.push(ManuallyDrop::into_inner(descriptor));
    }
    Ok(adopted)
}
