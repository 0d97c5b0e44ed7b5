//! A strict reader of EROFS images, written from the format's documentation and not from our writer.
//!
//! It knows what the writer may use and nothing else: blocks of 512 bytes, inodes of 64, plain, inline and chunk-based
//! files, one device table. Whatever can be wrong is looked for: ranges that overlap, bytes that belong to nothing,
//! names out of order, counts that do not agree.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use anyhow::{Context as _, Result, bail, ensure};

const BLOCK: usize = 512;

/// An image that was read whole.
#[derive(Debug)]
pub struct Image {
    /// Inode number of the root.
    pub root: u64,
    /// All inodes that can be reached, by number.
    pub inodes: BTreeMap<u64, Inode>,
    /// Size of each device in blocks.
    pub devices: Vec<u32>,
}

/// One inode.
#[derive(Debug)]
pub struct Inode {
    /// Kind and permissions.
    pub mode: u16,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Seconds since 1970 and nanoseconds.
    pub modified: (i64, u32),
    /// Device number as the kernel packs it.
    pub device: u32,
    /// Full name to value.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub content: Content,
}

/// What an inode leads to.
#[derive(Debug)]
pub enum Content {
    Nothing,
    /// Names and inode numbers in the image's order, `.` and `..` apart.
    Directory(Vec<(Vec<u8>, u64)>),
    Symlink(Vec<u8>),
    /// Chunks of so many bytes: device (from 1) and block, or a hole.
    File {
        chunk_bytes: u64,
        chunks: Vec<Option<(u16, u32)>>,
    },
}

impl Inode {
    /// The kind, as the mode states it.
    #[must_use]
    pub const fn kind(&self) -> u16 {
        self.mode & 0o170_000
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// CRC-32C bit by bit, not inverted at the end.
fn crc32c(bytes: impl Iterator<Item = u8>) -> u32 {
    bytes.fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

struct Reader<'a> {
    bytes: &'a [u8],
    inode_base: usize,
    xattr_base: usize,
    /// What belongs to something.
    used: Vec<Range<usize>>,
    /// Shared attributes that were seen.
    shared: BTreeSet<usize>,
}

/// Reads an image.
///
/// # Errors
/// What is wrong with it.
pub fn read(bytes: &[u8]) -> Result<Image> {
    ensure!(bytes.len() >= 3 * BLOCK && bytes.len().is_multiple_of(BLOCK), "{} bytes", bytes.len());
    let superblock = &bytes[1024..1152];
    ensure!(u32_at(superblock, 0) == 0xe0f5_e1e2, "magic");
    let summed = superblock[..4].iter().chain(&[0; 4]).chain(&bytes[1032..1536]);
    ensure!(crc32c(summed.copied()) == u32_at(superblock, 4), "checksum");
    ensure!(u32_at(superblock, 8) == 3 && u32_at(superblock, 80) == 0xc, "features");
    ensure!(superblock[12..14] == [9, 0], "block size");
    ensure!(u32_at(superblock, 36) as usize * BLOCK == bytes.len(), "number of blocks");
    ensure!(is_zero(&superblock[24..36]) && is_zero(&superblock[48..80]), "time and names");
    ensure!(u16_at(superblock, 84) == 0 && is_zero(&superblock[90..]), "what is not used");
    let devices = usize::from(u16_at(superblock, 86));
    let table = usize::from(u16_at(superblock, 88)) * 128;
    ensure!(table == 1152, "place of the device table");
    let mut reader = Reader {
        bytes,
        inode_base: u32_at(superblock, 40) as usize * BLOCK,
        xattr_base: u32_at(superblock, 44) as usize * BLOCK,
        used: Vec::new(),
        shared: BTreeSet::new(),
    };
    reader.claim(1024..table)?;
    let table = reader.claim(table..table + 128 * devices)?;
    let mut sizes = Vec::new();
    for slot in table.chunks(128) {
        ensure!(is_zero(&slot[..64]) && is_zero(&slot[68..]), "a device slot");
        sizes.push(u32_at(slot, 64));
    }
    let root = u64::from(u16_at(superblock, 14));
    let inodes = reader.walk(root)?;
    ensure!(inodes.len() as u64 == u64_at(superblock, 16), "number of inodes");
    reader.check_use()?;
    let image = Image { root, inodes, devices: sizes };
    image.check_links()?;
    image.check_chunks()?;
    Ok(image)
}

impl<'a> Reader<'a> {
    /// Bytes that nothing else may claim.
    fn claim(&mut self, range: Range<usize>) -> Result<&'a [u8]> {
        let found = self.bytes.get(range.clone()).with_context(|| format!("{range:?} is not in the image"))?;
        if !range.is_empty() {
            self.used.push(range);
        }
        Ok(found)
    }

    fn walk(&mut self, root: u64) -> Result<BTreeMap<u64, Inode>> {
        let mut inodes: BTreeMap<u64, Inode> = BTreeMap::new();
        let mut queue = VecDeque::from([(root, root, 0o040_000)]);
        while let Some((number, parent, kind)) = queue.pop_front() {
            if let Some(known) = inodes.get(&number) {
                ensure!(known.kind() != 0o040_000, "inode {number}: a second name of a directory");
                ensure!(known.kind() == kind, "inode {number}: another kind");
                continue;
            }
            let (inode, entries) = self.inode(number, parent).with_context(|| format!("inode {number}"))?;
            ensure!(inode.kind() == kind, "inode {number} has mode {:o}, the directory says {kind:o}", inode.mode);
            queue.extend(entries.into_iter().map(|(child, kind)| (child, number, kind)));
            inodes.insert(number, inode);
        }
        Ok(inodes)
    }

    /// An inode, and the inodes that it names, with the kind that it says they have.
    fn inode(&mut self, number: u64, parent: u64) -> Result<(Inode, Vec<(u64, u16)>)> {
        ensure!(number > 0, "number 0");
        let start = self.inode_base + usize::try_from(number)? * 32;
        let head = self.claim(start..start + 64)?;
        let format = u16_at(head, 0);
        ensure!(format & !0xe == 1, "format {format:x}");
        ensure!(is_zero(&head[6..8]) && is_zero(&head[48..]), "reserved bytes");
        let units = usize::from(u16_at(head, 2));
        let xattr_bytes = if units == 0 { 0 } else { 12 + 4 * (units - 1) };
        let behind = start + 64 + xattr_bytes;
        let xattrs = self.xattrs(start + 64..behind)?;
        let mut inode = Inode {
            mode: u16_at(head, 4),
            links: u32_at(head, 44),
            uid: u32_at(head, 24),
            gid: u32_at(head, 28),
            size: u64_at(head, 8),
            modified: (u64_at(head, 32).cast_signed(), u32_at(head, 40)),
            device: 0,
            xattrs,
            content: Content::Nothing,
        };
        ensure!(inode.modified.1 < 1_000_000_000, "nanoseconds");
        let (layout, place) = (format >> 1, u32_at(head, 16));
        let mut children = Vec::new();
        match (inode.kind(), layout) {
            (0o040_000, 0 | 2) => {
                let data = self.data(start, behind, &inode, layout, place)?;
                let (names, kinds) = directory(&data, number, parent)?;
                children = names.iter().map(|(_, child)| *child).zip(kinds).collect();
                inode.content = Content::Directory(names);
            }
            (0o120_000, 0 | 2) => {
                inode.content = Content::Symlink(self.data(start, behind, &inode, layout, place)?);
            }
            (0o100_000, 4) => inode.content = self.chunks(behind, &inode, place)?,
            (0o100_000 | 0o010_000, 0) => ensure!(inode.size == 0 && place == 0, "data in the image"),
            (0o020_000 | 0o060_000, 0) => {
                ensure!(inode.size == 0, "a device with data");
                inode.device = place;
            }
            (kind, layout) => bail!("kind {kind:o} in layout {layout}"),
        }
        Ok((inode, children))
    }

    /// The data of a directory or a link: whole blocks elsewhere, and its end behind the inode or in one more block.
    fn data(&mut self, start: usize, behind: usize, inode: &Inode, layout: u16, place: u32) -> Result<Vec<u8>> {
        let size = usize::try_from(inode.size)?;
        ensure!(size > 0 && size <= self.bytes.len(), "size {size}");
        let inline = if layout == 2 { size % BLOCK } else { 0 };
        ensure!(layout == 0 || inline > 0, "nothing behind the inode");
        let at = place as usize * BLOCK;
        ensure!(size > inline || place == 0, "a place of no data");
        let mut data = self.claim(at..at + (size - inline))?.to_vec();
        if inline > 0 {
            // Older kernels want the end of the inode in the same block, too.
            ensure!((start + 63) / BLOCK == (behind + inline - 1) / BLOCK, "data behind the inode cross a block");
            data.extend(self.claim(behind..behind + inline)?);
        }
        Ok(data)
    }

    fn chunks(&mut self, behind: usize, inode: &Inode, place: u32) -> Result<Content> {
        ensure!(place & !0x1f == 0x20, "chunk format {place:x}");
        let chunk_bytes = 512_u64 << (place & 0x1f);
        ensure!(inode.size > 0, "chunks of an empty file");
        let count = usize::try_from(inode.size.div_ceil(chunk_bytes))?;
        ensure!(count > 1 || chunk_bytes == 512 || chunk_bytes / 2 < inode.size, "a larger chunk than needed");
        let start = behind.next_multiple_of(8);
        let indexes = self.claim(start..start + 8 * count)?;
        let mut chunks = Vec::new();
        for index in indexes.chunks(8) {
            let (high, device, block) = (u16_at(index, 0), u16_at(index, 2), u32_at(index, 4));
            ensure!(high == 0, "a block beyond 32 bits");
            ensure!((block == u32::MAX) == (device == 0), "block {block} of device {device}");
            chunks.push((device > 0).then_some((device, block)));
        }
        Ok(Content::File { chunk_bytes, chunks })
    }

    fn xattrs(&mut self, range: Range<usize>) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
        let body = self.claim(range)?;
        let mut found = BTreeMap::new();
        if body.is_empty() {
            return Ok(found);
        }
        ensure!(is_zero(&body[..4]) && is_zero(&body[5..12]), "the attributes' header");
        let shared = usize::from(body[4]);
        ensure!(body.len() > 12 && body.len() >= 12 + 4 * shared, "attributes without any");
        for place in body[12..12 + 4 * shared].chunks(4) {
            let at = self.xattr_base + u32_at(place, 0) as usize * 4;
            ensure!(at < self.inode_base + BLOCK, "shared attributes stand before the inodes");
            let bytes = self.bytes.get(at..).context("a shared attribute outside of the image")?;
            let (name, value, length) = xattr(bytes)?;
            // Several files have it.
            if self.shared.insert(at) {
                self.claim(at..at + length)?;
            }
            ensure!(found.insert(name, value).is_none(), "the same attribute twice");
        }
        let mut rest = &body[12 + 4 * shared..];
        while !rest.is_empty() {
            let (name, value, length) = xattr(rest)?;
            ensure!(found.insert(name, value).is_none(), "the same attribute twice");
            rest = &rest[length..];
        }
        Ok(found)
    }

    /// Nothing is used twice, and what is not used is zero.
    fn check_use(&mut self) -> Result<()> {
        self.used.sort_unstable_by_key(|range| range.start);
        let mut end = 0;
        for range in &self.used {
            ensure!(range.start >= end, "{range:?} is used twice");
            ensure!(is_zero(&self.bytes[end..range.start]), "{end}..{} belongs to nothing", range.start);
            end = range.end;
        }
        ensure!(is_zero(&self.bytes[end..]) && self.bytes.len() - end < BLOCK, "{end}.. belongs to nothing");
        Ok(())
    }
}

/// Name, value and length of an attribute.
fn xattr(bytes: &[u8]) -> Result<(Vec<u8>, Vec<u8>, usize)> {
    ensure!(bytes.len() >= 4, "half an attribute");
    let (name_bytes, value_bytes) = (usize::from(bytes[0]), usize::from(u16_at(bytes, 2)));
    let prefix: &[u8] = match bytes[1] {
        1 => b"user.",
        2 => b"system.posix_acl_access",
        3 => b"system.posix_acl_default",
        4 => b"trusted.",
        6 => b"security.",
        other => bail!("name space {other}"),
    };
    ensure!((name_bytes == 0) == matches!(bytes[1], 2 | 3), "a name of {name_bytes} bytes");
    let end = 4 + name_bytes + value_bytes;
    let length = end.next_multiple_of(4);
    ensure!(bytes.len() >= length && is_zero(&bytes[end..length]), "the end of an attribute");
    let name = [prefix, &bytes[4..4 + name_bytes]].concat();
    ensure!(name.len() <= 255 && !name.contains(&0), "the name of an attribute");
    Ok((name, bytes[4 + name_bytes..end].to_vec(), length))
}

/// The names of a directory with their inodes, and the kinds that it says these have.
type Listed = (Vec<(Vec<u8>, u64)>, Vec<u16>);

fn directory(data: &[u8], own: u64, parent: u64) -> Result<Listed> {
    let (mut names, mut kinds, mut before) = (Vec::new(), Vec::new(), Vec::new());
    let (mut dots, mut blocks) = (0, data.chunks(BLOCK).peekable());
    while let Some(block) = blocks.next() {
        ensure!(block.len() > 12, "a block of {} bytes", block.len());
        let first = usize::from(u16_at(block, 8));
        ensure!(first >= 12 && first.is_multiple_of(12) && first < block.len(), "first name at {first}");
        let mut at = first;
        for record in 0..first / 12 {
            let record_at = 12 * record;
            ensure!(usize::from(u16_at(block, record_at + 8)) == at, "a gap between names");
            ensure!(block[record_at + 11] == 0, "reserved byte");
            let is_last = record_at + 12 == first;
            let end = match is_last {
                false => usize::from(u16_at(block, record_at + 20)),
                true => block[at..].iter().position(|byte| *byte == 0).map_or(block.len(), |length| at + length),
            };
            ensure!(end > at && end <= block.len(), "an empty name");
            let (name, number) = (block[at..end].to_vec(), u64_at(block, record_at));
            ensure!(name.len() <= 255 && !name.contains(&0) && !name.contains(&b'/'), "a name");
            ensure!(name > before, "names out of order");
            before.clone_from(&name);
            at = end;
            let kind = match block[record_at + 10] {
                1 => 0o100_000,
                2 => 0o040_000,
                3 => 0o020_000,
                4 => 0o060_000,
                5 => 0o010_000,
                7 => 0o120_000,
                other => bail!("file type {other}"),
            };
            match &name[..] {
                b"." => ensure!(number == own && kind == 0o040_000, "`.`"),
                b".." => ensure!(number == parent && kind == 0o040_000, "`..`"),
                _ => {
                    names.push((name, number));
                    kinds.push(kind);
                    continue;
                }
            }
            dots += 1;
        }
        ensure!(is_zero(&block[at..]), "padding");
        ensure!(at == block.len() || blocks.peek().is_some(), "the last block is longer than its names");
    }
    ensure!(dots == 2, "`.` and `..`");
    Ok((names, kinds))
}

impl Image {
    /// Link counts: names of a file; two and the subdirectories of a directory.
    fn check_links(&self) -> Result<()> {
        let mut counted: BTreeMap<u64, u32> = BTreeMap::new();
        for (number, inode) in &self.inodes {
            let Content::Directory(names) = &inode.content else { continue };
            *counted.entry(*number).or_default() += 2;
            for (_, child) in names {
                let is_directory = self.inodes[child].kind() == 0o040_000;
                *counted.entry(if is_directory { *number } else { *child }).or_default() += 1;
            }
        }
        for (number, inode) in &self.inodes {
            ensure!(counted.get(number) == Some(&inode.links), "inode {number} has {} links", inode.links);
        }
        Ok(())
    }

    /// Chunks lie in their devices, and no two files have the same block.
    fn check_chunks(&self) -> Result<()> {
        let mut used = Vec::new();
        for inode in self.inodes.values() {
            let Content::File { chunk_bytes, chunks } = &inode.content else { continue };
            for (chunk, offset) in chunks.iter().zip((0..).step_by(usize::try_from(*chunk_bytes)?)) {
                let Some((device, block)) = *chunk else { continue };
                let blocks = (inode.size - offset).min(*chunk_bytes).div_ceil(512);
                let range = u64::from(block)..u64::from(block) + blocks;
                let size = self.devices.get(usize::from(device) - 1).context("no such device")?;
                ensure!(range.end <= u64::from(*size), "{range:?} of a device of {size} blocks");
                used.push((device, range.start, range.end));
            }
        }
        used.sort_unstable();
        ensure!(used.windows(2).all(|pair| pair[0].0 != pair[1].0 || pair[0].2 <= pair[1].1), "files share blocks");
        Ok(())
    }
}
