//! The members of a tar file that holds an image, found without reading what is in them.
//!
//! One pass over the headers, which seeks past the content. Invariants: every range lies inside the file; the number of
//! members and the bytes of extended headers are bounded, so that no archive, however made, fills the memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::image::names::printable;
use crate::image::store::StoreError;

/// Members of one archive. Stops a file of empty members from filling the memory.
const MEMBERS_MAX: usize = 1_000_000;
/// Bytes of all extended headers of one archive. Stops a sparse file whose one name is gigabytes long. Real archives
/// have some hundreds of bytes for each member with a long name.
const EXTENDED_BYTES_MAX: u64 = 64 << 20;
/// Characters of a reason that has names of an archive in it.
const REASON_CHARACTERS_MAX: usize = 300;
/// Bytes of a header block, which are not counted as extended headers.
const BLOCK_BYTES: usize = 512;

/// What a member is. Directories, devices and the like are not reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Member<'m> {
    /// A regular file.
    File {
        /// Where its content begins.
        offset: u64,
        /// How long it is.
        length: u64,
    },
    /// A symbolic link to this path.
    Symlink(&'m [u8]),
    /// Another name of this member.
    HardLink(&'m [u8]),
}

/// Calls `visit` for each member of the tar file `path`, which is open as `file`: its name, without `./` before it, and
/// what it is. Blocks.
///
/// # Errors
/// [`StoreError`] when it is no tar file, or what `visit` says.
pub(crate) fn walk(
    path: &Path,
    file: &File,
    mut visit: impl FnMut(&[u8], Member<'_>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let io = |what| move |error: io::Error| StoreError::io(path, what, &error);
    let refuse = |reason: String| StoreError::NotALayout { path: path.to_owned(), reason };
    let total = file.metadata().map_err(io("cannot read"))?.len();
    // It may have been looked at before.
    (&*file).seek(SeekFrom::Start(0)).map_err(io("cannot read"))?;
    let mut archive = tar::Archive::new(Frugal { file, left: EXTENDED_BYTES_MAX });
    let entries = archive.entries_with_seek().map_err(io("is not a tar file"))?;
    for (count, entry) in entries.enumerate() {
        let entry = entry.map_err(|error| not_a_tar(path, file, &error))?;
        if count >= MEMBERS_MAX {
            return Err(refuse(format!("it has more than {MEMBERS_MAX} members")));
        }
        let kind = entry.header().entry_type();
        let (name, target) = (entry.path_bytes(), entry.link_name_bytes());
        let name = name.strip_prefix(b"./").unwrap_or(&name);
        let member = match &target {
            _ if kind.is_file() => {
                let (offset, length) = (entry.raw_file_position(), entry.size());
                if offset.checked_add(length).is_none_or(|end| end > total) {
                    return Err(refuse("a member goes beyond the end of the file".to_owned()));
                }
                Member::File { offset, length }
            }
            Some(target) if kind.is_symlink() => Member::Symlink(target),
            Some(target) if kind.is_hard_link() => Member::HardLink(target),
            _ => continue,
        };
        visit(name, member)?;
    }
    Ok(())
}

/// What a file is that is no tar file, by its first bytes, else what is wrong with it.
fn not_a_tar(path: &Path, file: &File, error: &io::Error) -> StoreError {
    let mut first = [0; 6];
    let read = std::os::unix::fs::FileExt::read_at(file, &mut first, 0).unwrap_or(0);
    let how = match first.get(..read).unwrap_or_default() {
        [0x1f, 0x8b, ..] => "gzip",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0xfd, b'7', b'z', b'X', b'Z', 0] => "xz",
        [b'B', b'Z', b'h', ..] => "bzip2",
        // The library's words have names of members in them.
        _ => {
            let reason = printable(&error.to_string(), REASON_CHARACTERS_MAX);
            return StoreError::Io { path: path.to_owned(), what: "is not a tar file", kind: error.kind(), reason };
        }
    };
    let (kind, reason) = (io::ErrorKind::InvalidData, format!("it is compressed ({how}) and must be unpacked first"));
    StoreError::Io { path: path.to_owned(), what: "is not a tar file", kind, reason }
}

/// A file of which only so many bytes are read in pieces longer than a header block.
struct Frugal<'f> {
    file: &'f File,
    left: u64,
}

impl Read for Frugal<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        if buffer.len() > BLOCK_BYTES {
            let left = self.left.checked_sub(count as u64);
            let too_much = || io::Error::new(io::ErrorKind::InvalidData, "its extended headers are too long");
            self.left = left.ok_or_else(too_much)?;
        }
        Ok(count)
    }
}

impl Seek for Frugal<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn walked(file: &File) -> Result<Vec<String>, StoreError> {
        let mut found = Vec::new();
        walk(Path::new("x.tar"), file, |name, member| {
            found.push(format!("{} {member:?}", String::from_utf8_lossy(name)));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn files_and_links() {
        let mut builder = tar::Builder::new(tempfile::tempfile().unwrap());
        let mut header = tar::Header::new_gnu();
        header.set_size(3);
        builder.append_data(&mut header, "./a", &b"abc"[..]).unwrap();
        for (kind, name) in [(tar::EntryType::Symlink, "s"), (tar::EntryType::Link, "h")] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            builder.append_link(&mut header, name, "a").unwrap();
        }
        let mut file = builder.into_inner().unwrap();
        file.rewind().unwrap();
        let expected = ["a File { offset: 512, length: 3 }", "s Symlink([97])", "h HardLink([97])"];
        assert_eq!(walked(&file).unwrap(), expected);
        // The last member is cut off.
        file.set_len(513).unwrap();
        file.rewind().unwrap();
        assert!(matches!(walked(&file), Err(StoreError::NotALayout { .. })));
    }

    #[test]
    fn what_is_no_tar() {
        let mut named = vec![0; 2048];
        named[..11].copy_from_slice(b"\x1b]0;x\x07\x1b[31m");
        named[148..156].fill(0xff);
        for (content, expected) in [
            (
                &b"\x1f\x8b\x08 and more"[..],
                "x.tar: is not a tar file: it is compressed (gzip) and must be unpacked first",
            ),
            (b"\x28\xb5\x2f\xfd and more", "it is compressed (zstd)"),
            (&named, "x.tar: is not a tar file: "),
        ] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(content).unwrap();
            file.write_all(&[1; 2048]).unwrap();
            let error = walked(&file).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.chars().any(char::is_control), "{error:?}");
        }
    }

    /// A name of a gigabyte costs a kilobyte on the disk.
    #[test]
    fn long_names_are_bounded() {
        let mut file = tempfile::tempfile().unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(1 << 30);
        header.set_cksum();
        file.write_all(header.as_bytes()).unwrap();
        file.set_len((1 << 30) + 4096).unwrap();
        file.rewind().unwrap();
        let error = walked(&file).unwrap_err().to_string();
        assert!(error.contains("extended headers are too long"), "{error}");
    }
}
