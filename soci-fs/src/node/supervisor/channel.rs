//! What supervisor and worker say to each other, over a socket pair that is the worker's standard input.
//!
//! Messages keep their bounds (`SOCK_SEQPACKET`), so there is nothing to frame. The supervisor's one message carries
//! the descriptors; the worker's two are single words. A later version may add words; unknown ones are ignored, because
//! the two may be of different versions while an upgrade is in progress.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use crate::fuse::mount::device::Negotiated;

/// Room for what a worker may say.
pub(super) const WORD_BYTES_MAX: usize = 64;

/// What a worker says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// It runs, and waits for the descriptors.
    Hello,
    /// It serves.
    Ready,
}

impl Word {
    const fn text(self) -> &'static [u8] {
        match self {
            Self::Hello => b"hello",
            Self::Ready => b"ready",
        }
    }

    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        [Self::Hello, Self::Ready].into_iter().find(|word| word.text() == text)
    }
}

pub(super) fn say(socket: &impl AsFd, word: Word) -> io::Result<()> {
    rustix::net::send(socket, word.text(), SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Descriptors that a worker gets, in this order.
const DESCRIPTORS: usize = 3;

/// What a worker gets.
#[derive(Debug)]
pub(super) struct Handed {
    pub(super) device: OwnedFd,
    pub(super) listener: OwnedFd,
    /// Not from a supervisor of a version before it had one.
    pub(super) memory: Option<OwnedFd>,
    pub(super) agreed: Negotiated,
}

/// Gives a worker the device, the listener and the memory.
pub(super) fn hand(
    socket: &impl AsFd,
    descriptors: &[BorrowedFd<'_>; DESCRIPTORS],
    agreed: Negotiated,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let text = show(agreed);
    rustix::net::sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Waits for [`hand`]; `None` when the supervisor is gone.
pub(super) fn receive(socket: &impl AsFd) -> io::Result<Option<Handed>> {
    let mut text = [0_u8; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(&mut text)];
    let received = rustix::net::recvmsg(socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut descriptors = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let agreed = std::str::from_utf8(&text[..received.bytes]).ok().and_then(parse);
    match (descriptors.next(), descriptors.next(), agreed) {
        (Some(device), Some(listener), Some(agreed)) => {
            Ok(Some(Handed { device, listener, memory: descriptors.next(), agreed }))
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// What was agreed with the kernel, as text.
pub(super) fn show(agreed: Negotiated) -> String {
    format!("fuse 7.{} {:#x}\n", agreed.minor, agreed.flags)
}

/// Reads the text of [`show`].
pub(super) fn parse(text: &str) -> Option<Negotiated> {
    let (minor, flags) = text.strip_prefix("fuse 7.")?.strip_suffix('\n')?.split_once(" 0x")?;
    Some(Negotiated { minor: minor.parse().ok()?, flags: u64::from_str_radix(flags, 16).ok()? })
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn what_was_agreed_survives_as_text() {
        for agreed in [
            Negotiated { minor: 0, flags: 0 },
            Negotiated { minor: 45, flags: 1 << 39 | 0xffff },
            Negotiated { minor: u32::MAX, flags: u64::MAX },
        ] {
            assert_eq!(parse(&show(agreed)), Some(agreed));
        }
        for bad in ["", "fuse 7.1 0x1", "fuse 8.1 0x1\n", "fuse 7.x 0x1\n", "fuse 7.1 1\n", "fuse 7.1 0x\n"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn messages_arrive() {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let next_word = || {
            let mut text = [0; WORD_BYTES_MAX];
            let (length, _) = rustix::net::recv(&ours, &mut text, RecvFlags::empty()).unwrap();
            Word::parse(&text[..length])
        };
        say(&theirs, Word::Hello).unwrap();
        rustix::net::send(&theirs, b"something new", SendFlags::empty()).unwrap();
        say(&theirs, Word::Ready).unwrap();
        assert_eq!([next_word(), next_word(), next_word()], [Some(Word::Hello), None, Some(Word::Ready)]);
        let agreed = Negotiated { minor: 41, flags: 7 };
        let (read, write) = rustix::pipe::pipe().unwrap();
        let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&memory, b"before").unwrap();
        hand(&ours, &[write.as_fd(), read.as_fd(), memory.as_fd()], agreed).unwrap();
        let handed = receive(&theirs).unwrap().unwrap();
        rustix::io::write(&handed.device, b"x").unwrap();
        let mut byte = [0];
        assert_eq!(rustix::io::read(&handed.listener, &mut byte).unwrap(), 1);
        assert_eq!((byte, handed.agreed), (*b"x", agreed));
        let mut text = [0; 9];
        assert_eq!(rustix::io::pread(handed.memory.unwrap(), &mut text, 0).unwrap(), 6);
        assert_eq!(&text[..6], b"before");
        drop(ours);
        assert!(receive(&theirs).unwrap().is_none());
    }
}
