//! Extended attributes: those that Linux can have, in the file's inode or, where that saves space, in one place for all.

use std::collections::HashMap;

use crate::tree::NodeKind;
use crate::tree::device::BLOCK_BYTES;
use crate::tree::erofs::{ErofsError, too_large};

/// Header of the attributes of an inode: a filter of names (none), how many are shared, reserved bytes.
const HEADER_BYTES: usize = 12;
/// Header of one attribute.
const ENTRY_HEADER_BYTES: usize = 4;
/// Attributes begin at multiples of this many bytes, and places of shared ones are counted in it.
const UNIT_BYTES: usize = 4;
/// Most attributes of a file that can be shared: the format has 8 bits for their number.
const SHARED_MAX: usize = u8::MAX as usize;
/// Most bytes of attributes in an inode: the format counts units with 16 bits, the first one standing for the header.
const INLINE_BYTES_MAX: usize = HEADER_BYTES + UNIT_BYTES * (u16::MAX as usize - 1);
/// Longest name that Linux has, prefix included.
const NAME_BYTES_MAX: usize = 255;

/// An attribute as the format has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Xattr<'e> {
    /// Which prefix the name has.
    index: u8,
    /// The rest of the name.
    suffix: &'e [u8],
    value: &'e [u8],
}

impl<'e> Xattr<'e> {
    /// The attribute of this name and value; `None` if Linux cannot have it on such a file.
    pub(super) fn new(kind: NodeKind, name: &'e [u8], value: &'e [u8]) -> Option<Self> {
        const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
        let fits = name.len() <= NAME_BYTES_MAX && !name.contains(&0) && u16::try_from(value.len()).is_ok();
        if !fits {
            return None;
        }
        let acl = |index| acl_is_valid(value).then_some(Self { index, suffix: b"", value });
        match name {
            b"system.posix_acl_access" if kind != NodeKind::Symlink => acl(2),
            b"system.posix_acl_default" if kind == NodeKind::Directory => acl(3),
            _ => {
                let found = |(prefix, index): (&[u8], u8)| Some((name.strip_prefix(prefix)?, index));
                let (suffix, index) = PREFIXES.into_iter().find_map(found)?;
                let has_users = matches!(kind, NodeKind::Regular | NodeKind::Directory);
                (!suffix.is_empty() && (has_users || index != 1)).then_some(Self { index, suffix, value })
            }
        }
    }

    const fn bytes(&self) -> usize {
        (ENTRY_HEADER_BYTES + self.suffix.len() + self.value.len()).next_multiple_of(UNIT_BYTES)
    }

    /// Appends the attribute; the place where it begins is a multiple of four.
    fn encode(&self, bytes: &mut Vec<u8>) {
        let end = bytes.len() + self.bytes();
        // Both lengths were checked when the attribute was made.
        bytes.extend([self.suffix.len() as u8, self.index]);
        bytes.extend((self.value.len() as u16).to_le_bytes());
        bytes.extend(self.suffix);
        bytes.extend(self.value);
        bytes.resize(end, 0);
    }
}

/// Whether a value is an access control list as the kernel would have stored it: version 2, then user, named users,
/// group, named groups, mask (needed with named ones) and others, each of 8 bytes: tag, permissions, identity.
fn acl_is_valid(value: &[u8]) -> bool {
    const VERSION: [u8; 4] = 2_u32.to_le_bytes();
    let Some((entries, [])) = value.strip_prefix(&VERSION).map(<[u8]>::as_chunks::<8>) else { return false };
    // What was read last: nothing, users, groups, the mask, all.
    let (mut state, mut needs_mask) = (0, false);
    for entry in entries {
        let (tag, permissions) = (u16::from_le_bytes([entry[0], entry[1]]), u16::from_le_bytes([entry[2], entry[3]]));
        let is_named = matches!(tag, 0x02 | 0x08);
        needs_mask |= is_named;
        state = match (tag, state) {
            (0x01, 0) | (0x02, 1) => 1,
            (0x04, 1) | (0x08, 2) => 2,
            (0x10, 2) => 3,
            (0x20, 2) if !needs_mask => 4,
            (0x20, 3) => 4,
            _ => return false,
        };
        if permissions > 7 || (is_named && entry[4..] == [0xff; 4]) {
            return false;
        }
    }
    state == 4
}

/// The attributes that stand in one place for all files: those that repeat, and long ones. Of a file, only the first 255
/// count, so that all that stand there are used.
#[derive(Debug, Default)]
pub(super) struct SharedXattrs<'e> {
    /// Place of each, in units; `None` for those that were seen once and stay in their inode.
    places: HashMap<Xattr<'e>, Option<u32>>,
    ordered: Vec<Xattr<'e>>,
    bytes: u64,
}

impl<'e> SharedXattrs<'e> {
    /// Notes the attributes of a file. The same files in the same order give the same places.
    pub(super) fn note(&mut self, xattrs: impl Iterator<Item = Xattr<'e>>) -> Result<(), ErofsError> {
        for (_, xattr) in xattrs.enumerate().filter(|(position, _)| *position < SHARED_MAX) {
            let known = self.places.get(&xattr).copied();
            let is_new = match known {
                Some(place) => place.is_none(),
                None => xattr.bytes() as u64 > BLOCK_BYTES,
            };
            if is_new {
                let place = u32::try_from(self.bytes / UNIT_BYTES as u64).map_err(|_| too_large())?;
                self.places.insert(xattr, Some(place));
                self.ordered.push(xattr);
                self.bytes += xattr.bytes() as u64;
            } else if known.is_none() {
                self.places.insert(xattr, None);
            }
        }
        Ok(())
    }

    /// Forgets what is not shared, once all files are noted.
    pub(super) fn finish(&mut self) {
        self.places.retain(|_, place| place.is_some());
        self.places.shrink_to_fit();
    }

    /// Bytes of them all.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Them all, one after the other, each encoded.
    pub(super) fn encoded(&self) -> impl Iterator<Item = Vec<u8>> {
        self.ordered.iter().map(|xattr| {
            let mut bytes = Vec::with_capacity(xattr.bytes());
            xattr.encode(&mut bytes);
            bytes
        })
    }

    /// What an inode has of these attributes of its file.
    pub(super) fn body(&self, xattrs: impl Iterator<Item = Xattr<'e>>) -> XattrBody<'e> {
        let mut body = XattrBody::default();
        for (position, xattr) in xattrs.enumerate() {
            let place = self.places.get(&xattr).copied().flatten().filter(|_| position < SHARED_MAX);
            match place {
                Some(place) if body.grow(UNIT_BYTES) => body.shared.push(place),
                _ if body.grow(xattr.bytes()) => body.inline.push(xattr),
                _ => body.left_out += 1,
            }
        }
        body
    }
}

/// The attributes of an inode.
#[derive(Debug, Default)]
pub(super) struct XattrBody<'e> {
    shared: Vec<u32>,
    inline: Vec<Xattr<'e>>,
    bytes: usize,
    /// How many there was no room for.
    pub(super) left_out: u64,
}

impl XattrBody<'_> {
    /// Bytes in the inode: 0, or the header and what follows.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The number of units as inodes state it: 0, or 1 for the header and one for each that follows.
    pub(super) fn units(&self) -> u16 {
        let units = self.bytes.checked_sub(HEADER_BYTES).map_or(0, |bytes| bytes / UNIT_BYTES + 1);
        u16::try_from(units).unwrap_or(u16::MAX)
    }

    /// Appends them to an inode.
    pub(super) fn encode(&self, bytes: &mut Vec<u8>) {
        if self.bytes == 0 {
            return;
        }
        bytes.extend([0; 4]);
        // At most `SHARED_MAX`.
        bytes.extend([self.shared.len() as u8]);
        bytes.extend([0; 7]);
        bytes.extend(self.shared.iter().flat_map(|place| place.to_le_bytes()));
        self.inline.iter().for_each(|xattr| xattr.encode(bytes));
    }

    /// Makes room for as many bytes; false if there is none.
    fn grow(&mut self, more: usize) -> bool {
        let bytes = self.bytes.max(HEADER_BYTES) + more;
        let fits = bytes <= INLINE_BYTES_MAX;
        if fits {
            self.bytes = bytes;
        }
        fits
    }
}
