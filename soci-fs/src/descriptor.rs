//! Descriptors known by number only: the one place of this crate where the compiler cannot see who owns one.

#![allow(unsafe_code, reason = "a number can become an owned descriptor in no other way")]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use rustix::io::DupFlags;

/// Puts `new` in the place of the descriptor that `holder` holds: the number stays, what it refers to changes.
pub(crate) fn replace(holder: &impl AsFd, new: &impl AsFd) -> io::Result<()> {
    let number = holder.as_fd().as_raw_fd();
    // SAFETY: `holder` owns the number and outlives this function, and `ManuallyDrop` keeps the second owner from ever
    // closing it. `dup3` changes what the number refers to in one step, so `holder` owns an open descriptor throughout.
    let mut held = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
    Ok(rustix::io::dup3(new, &mut held, DupFlags::CLOEXEC)?)
}
