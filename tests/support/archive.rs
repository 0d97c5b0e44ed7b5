//! Writes any tar and any gzip of it, block by block, and knows what is in them.
//!
//! The writers are of our own making and share nothing with the readers under test, so that both can only agree by
//! being right. What is known about an archive is kept beside its bytes: see [`Archive::files`].

use flate2::{Compress, Compression, FlushCompress};
use proptest::prelude::*;
use proptest::sample::Index;

/// How an entry says what its header has no room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Name and prefix; what does not fit is cut.
    Ustar,
    /// `././@LongLink` entries and base-256 numbers.
    Gnu,
    /// Extended headers.
    Pax,
}

/// One entry to write.
#[derive(Debug, Clone)]
pub struct Member {
    pub dialect: Dialect,
    pub flag: u8,
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub content: Vec<u8>,
    pub mode: u32,
    pub owner: (u32, u32),
    pub seconds: u32,
    pub nanoseconds: u32,
    pub device: (u32, u32),
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// A size field without data behind it (for entries that hold none).
    pub idle_size: u32,
}

/// How an archive ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Two zero blocks, then zeros to a multiple of this.
    Blocks(usize),
    OneZeroBlock,
    Nothing,
    /// Not even the padding of the last file.
    NoPadding,
}

/// What an archive has.
#[derive(Clone)]
pub struct Archive {
    pub tar: Vec<u8>,
    pub files: Vec<Known>,
    /// Whether some entry has a size that nothing follows.
    pub idle_sizes: bool,
    ending: Ending,
}

/// A failing case is shown by what it was made of, not by its bytes.
impl std::fmt::Debug for Archive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} bytes of tar, {:?}", self.tar.len(), self.ending)?;
        for known in &self.files {
            let (name, link) = (known.name.escape_ascii(), known.link.escape_ascii());
            let (flag, size, at) = (char::from(known.flag), known.content.len(), known.header_offset);
            writeln!(f, "  {flag:?} \"{name}\" -> \"{link}\" {size} bytes, header at {at}, {:?}", known.xattrs)?;
        }
        Ok(())
    }
}

/// An archive and a gzip of it.
#[derive(Clone)]
pub struct Layer {
    pub archive: Archive,
    pub blob: Vec<u8>,
    members: String,
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}  in {} bytes of gzip: {}", self.archive, self.blob.len(), self.members)
    }
}

/// What is known about an entry.
#[derive(Debug, Clone)]
pub struct Known {
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub flag: u8,
    pub header_offset: usize,
    pub data_offset: usize,
    pub content: Vec<u8>,
    pub mode: u32,
    pub owner: (u32, u32),
    pub time: (i64, u32),
    pub device: (u32, u32),
    pub xattrs: Vec<(String, Vec<u8>)>,
}

/// Writes the archive.
pub fn write_tar(members: &[Member], ending: Ending) -> Archive {
    let (mut tar, mut files, mut idle_sizes) = (Vec::new(), Vec::new(), false);
    for (index, member) in members.iter().enumerate() {
        let header_offset = tar.len();
        let known = write_headers(&mut tar, member);
        let data_offset = tar.len();
        idle_sizes |= !is_file(member.flag) && member.idle_size > 0;
        tar.extend(&member.content);
        if index + 1 < members.len() || ending != Ending::NoPadding {
            pad(&mut tar);
        }
        files.push(Known { header_offset, data_offset, ..known });
    }
    match ending {
        Ending::Blocks(multiple) => {
            let end = tar.len() + 1024;
            tar.resize(end.next_multiple_of(multiple), 0);
        }
        Ending::OneZeroBlock => tar.resize(tar.len() + 512, 0),
        Ending::Nothing | Ending::NoPadding => {}
    }
    Archive { tar, files, idle_sizes, ending }
}

fn is_file(flag: u8) -> bool {
    matches!(flag, b'0' | 0)
}

fn pad(tar: &mut Vec<u8>) {
    tar.resize(tar.len().next_multiple_of(512), 0);
}

fn write_headers(tar: &mut Vec<u8>, member: &Member) -> Known {
    let mut known = Known {
        name: member.name.clone(),
        link: member.link.clone(),
        flag: member.flag,
        header_offset: 0,
        data_offset: 0,
        content: member.content.clone(),
        mode: member.mode,
        owner: member.owner,
        time: (member.seconds.into(), 0),
        device: member.device,
        xattrs: Vec::new(),
    };
    let (mut name, mut prefix, mut link) = (member.name.clone(), Vec::new(), member.link.clone());
    match member.dialect {
        Dialect::Ustar => {
            link.truncate(100);
            (prefix, name) = split(&name);
            known.link = link.clone();
            known.name = if prefix.is_empty() { name.clone() } else { [&prefix[..], b"/", &name].concat() };
        }
        Dialect::Gnu => {
            for (flag, text) in [(b'K', &link), (b'L', &name)] {
                if text.len() > 100 {
                    let data = [&text[..], b"\0"].concat();
                    extension(tar, flag, Dialect::Gnu, &data);
                }
            }
        }
        Dialect::Pax => {
            let mut records = Vec::new();
            if name.len() > 100 {
                record(&mut records, "path", &name);
            }
            if link.len() > 100 {
                record(&mut records, "linkpath", &link);
            }
            if member.nanoseconds > 0 {
                let time = format!("{}.{:09}", member.seconds, member.nanoseconds);
                record(&mut records, "mtime", time.as_bytes());
                known.time.1 = member.nanoseconds;
            }
            for (key, value) in &member.xattrs {
                record(&mut records, &format!("SCHILY.xattr.{key}"), value);
            }
            known.xattrs = member.xattrs.clone();
            if !records.is_empty() {
                extension(tar, b'x', Dialect::Ustar, &records);
            }
        }
    }
    name.truncate(100);
    link.truncate(100);
    let size = if is_file(member.flag) { member.content.len() } else { member.idle_size as usize };
    let fields = Fields { flag: member.flag, dialect: member.dialect, name, prefix, link, size };
    tar.extend(block(&fields, member));
    known
}

/// Prefix and name of a ustar header; what fits in neither is left out.
fn split(name: &[u8]) -> (Vec<u8>, Vec<u8>) {
    if name.len() <= 100 {
        return (Vec::new(), name.to_vec());
    }
    let slash = (1..name.len().min(156)).rev().find(|at| name[*at] == b'/' && name.len() - at - 1 <= 100);
    match slash {
        Some(at) if at + 1 < name.len() => (name[..at].to_vec(), name[at + 1..].to_vec()),
        // A name that ends in a slash would make a directory of an entry of the oldest kind.
        _ => (Vec::new(), name[..if name[99] == b'/' { 99 } else { 100 }].to_vec()),
    }
}

fn record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let length = (1..8).map(|digits| rest + digits).find(|length| length.to_string().len() + rest == *length).unwrap();
    records.extend(format!("{length} {key}=").bytes());
    records.extend(value);
    records.push(b'\n');
}

fn extension(tar: &mut Vec<u8>, flag: u8, dialect: Dialect, data: &[u8]) {
    let fields = Fields {
        flag,
        dialect,
        name: b"././@LongLink".to_vec(),
        prefix: Vec::new(),
        link: Vec::new(),
        size: data.len(),
    };
    tar.extend(block(&fields, &plain(dialect, b"x", Vec::new())));
    tar.extend(data);
    pad(tar);
}

/// An ordinary file.
pub fn plain(dialect: Dialect, name: &[u8], content: Vec<u8>) -> Member {
    Member {
        dialect,
        flag: b'0',
        name: name.to_vec(),
        link: Vec::new(),
        content,
        mode: 0o644,
        owner: (0, 0),
        seconds: 0,
        nanoseconds: 0,
        device: (0, 0),
        xattrs: Vec::new(),
        idle_size: 0,
    }
}

/// What a header block needs beside its [`Member`].
struct Fields {
    flag: u8,
    dialect: Dialect,
    name: Vec<u8>,
    prefix: Vec<u8>,
    link: Vec<u8>,
    size: usize,
}

fn block(fields: &Fields, member: &Member) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &fields.name);
    put(100, format!("{:07o}\0", member.mode).as_bytes());
    put(108, &number(member.owner.0, 8, fields.dialect));
    put(116, &number(member.owner.1, 8, fields.dialect));
    put(124, format!("{:011o}\0", fields.size).as_bytes());
    put(136, format!("{:011o}\0", member.seconds).as_bytes());
    put(156, &[fields.flag]);
    put(157, &fields.link);
    put(257, if fields.dialect == Dialect::Gnu { b"ustar  \0" } else { b"ustar\x0000" });
    put(265, b"root");
    put(329, &number(member.device.0, 8, fields.dialect));
    put(337, &number(member.device.1, 8, fields.dialect));
    put(345, &fields.prefix);
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum::<u32>() + 8 * 32;
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// Octal where it fits, else base-256 (GNU only; the generators keep to what fits elsewhere).
fn number(value: u32, length: usize, dialect: Dialect) -> Vec<u8> {
    let octal = format!("{value:0width$o}\0", width = length - 1);
    if octal.len() <= length {
        return octal.into_bytes();
    }
    assert_eq!(dialect, Dialect::Gnu, "{value} fits no octal field");
    let mut field = vec![0; length];
    field[0] = 0x80;
    field[length - 4..].copy_from_slice(&value.to_be_bytes());
    field
}

/// How one gzip member is made.
#[derive(Debug, Clone)]
pub struct Wrapping {
    /// Deflate level; 10 writes stored blocks by hand, empty ones among them.
    pub level: u32,
    /// FHCRC 2, FEXTRA 4, FNAME 8, FCOMMENT 16.
    pub flags: u8,
    pub flushes: Vec<(Index, u8)>,
}

/// Compresses `data` in members that end at the given places.
pub fn write_gzip(data: &[u8], splits: &[Index], wrappings: &[Wrapping], padding: usize) -> Vec<u8> {
    let mut ends: Vec<usize> = splits.iter().map(|split| split.index(data.len() + 1)).collect();
    ends.push(data.len());
    ends.sort_unstable();
    let (mut gzip, mut start) = (Vec::new(), 0);
    for (end, wrapping) in ends.into_iter().zip(wrappings.iter().cycle()) {
        gzip_member(&mut gzip, &data[start..end], wrapping);
        start = end;
    }
    gzip.resize(gzip.len() + padding, 0);
    gzip
}

fn gzip_member(gzip: &mut Vec<u8>, data: &[u8], wrapping: &Wrapping) {
    let start = gzip.len();
    gzip.extend([0x1f, 0x8b, 8, wrapping.flags, 1, 2, 3, 4, 0, 0xff]);
    if wrapping.flags & 4 != 0 {
        gzip.extend(b"\x06\0ab\x02\0xy");
    }
    if wrapping.flags & 8 != 0 {
        gzip.extend(b"layer.tar\0");
    }
    if wrapping.flags & 16 != 0 {
        gzip.extend(b"a comment\0");
    }
    if wrapping.flags & 2 != 0 {
        let mut crc = flate2::Crc::new();
        crc.update(&gzip[start..]);
        gzip.extend(&crc.sum().to_le_bytes()[..2]);
    }
    let mut at: Vec<(usize, u8)> =
        wrapping.flushes.iter().map(|(place, how)| (place.index(data.len() + 1), *how)).collect();
    at.sort_unstable();
    if wrapping.level == 10 {
        stored(gzip, data, &at)
    } else {
        deflate(gzip, data, wrapping.level, &at)
    }
    let mut crc = flate2::Crc::new();
    crc.update(data);
    gzip.extend(crc.sum().to_le_bytes());
    gzip.extend((data.len() as u32).to_le_bytes());
}

fn deflate(gzip: &mut Vec<u8>, data: &[u8], level: u32, flushes: &[(usize, u8)]) {
    let mut compress = Compress::new(Compression::new(level), false);
    let mut start = 0;
    for (end, how) in flushes {
        let how = match how % 4 {
            0 => FlushCompress::None,
            1 => FlushCompress::Partial,
            2 => FlushCompress::Sync,
            _ => FlushCompress::Full,
        };
        run(&mut compress, gzip, &data[start..*end], how);
        start = *end;
    }
    run(&mut compress, gzip, &data[start..], FlushCompress::Finish);
}

fn run(compress: &mut Compress, gzip: &mut Vec<u8>, data: &[u8], flush: FlushCompress) {
    let start = compress.total_in();
    loop {
        gzip.reserve(70_000);
        let used = usize::try_from(compress.total_in() - start).unwrap();
        let (room, before) = (gzip.capacity(), gzip.len());
        let status = compress.compress_vec(&data[used..], gzip, flush).unwrap();
        let done = compress.total_in() - start == data.len() as u64 && gzip.len() < room;
        if status == flate2::Status::StreamEnd || (flush != FlushCompress::Finish && done) {
            return;
        }
        assert!(gzip.len() > before || compress.total_in() - start > used as u64, "the compressor makes no progress");
    }
}

fn stored(gzip: &mut Vec<u8>, data: &[u8], cuts: &[(usize, u8)]) {
    let mut ends: Vec<usize> = cuts.iter().map(|(at, _)| *at).chain((0..data.len()).step_by(60_000)).collect();
    ends.push(data.len());
    ends.sort_unstable();
    let mut start = 0;
    for (index, end) in ends.iter().enumerate() {
        let length = u16::try_from(end - start).unwrap();
        gzip.push(u8::from(index + 1 == ends.len()));
        gzip.extend(length.to_le_bytes());
        gzip.extend((!length).to_le_bytes());
        gzip.extend(&data[start..*end]);
        start = *end;
    }
}

/// Bytes that do not compress, or a little, or very much.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![
        2 => Just(0usize),
        3 => prop::sample::select(vec![1usize, 511, 512, 513, 1023, 1024, 1025, 10_240]),
        3 => 0usize..3000,
        2 => 20_000usize..70_000,
    ];
    (length, 0u8..3, any::<u64>()).prop_map(|(length, kind, seed)| {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        };
        match kind {
            0 => vec![seed as u8; length],
            1 => (0..length).map(|_| next()).collect(),
            _ => (0..length).map(|at| if at % 3 == 0 { next() & 15 } else { b'a' + (at % 7) as u8 }).collect(),
        }
    })
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => prop::string::string_regex("(\\./)?[a-c]{1,3}(/[a-c.]{1,3}){0,3}").unwrap().prop_map(String::into_bytes),
        1 => prop::string::string_regex("[a-c]{1,60}(/[a-c]{1,60}){1,4}").unwrap().prop_map(String::into_bytes),
        1 => prop::collection::vec(prop::sample::select(b"a\xff\xc3\xa9 \n=%".to_vec()), 1..140),
        1 => (95usize..106).prop_map(|length| vec![b'n'; length]),
    ]
}

/// Any entry. `idle` allows sizes that nothing follows.
pub fn member(idle: bool) -> impl Strategy<Value = Member> {
    let dialect = prop::sample::select(vec![Dialect::Ustar, Dialect::Gnu, Dialect::Pax]);
    let flag = prop::sample::select([&[b'0'; 6], &[0u8][..], b"1223456"].concat());
    let xattr = (
        prop::string::string_regex("(user|security)\\.[a-z]{1,4}").unwrap(),
        prop::collection::vec(any::<u8>(), 0..30),
    );
    let xattrs = prop::collection::btree_map(xattr.0, xattr.1, 0..3);
    let numbers = (0u32..0o10000, any::<u32>(), any::<u32>(), 0u32..4_000_000, 0u32..1_000_000_000);
    (dialect, flag, name(), name(), content(), numbers, xattrs, 0u32..2000).prop_map(
        move |(dialect, flag, name, link, content, (mode, uid, gid, seconds, nanoseconds), xattrs, size)| {
            let small = |id: u32| if dialect == Dialect::Gnu { id } else { id & 0o7_777_777 };
            let (file, device) = (is_file(flag), matches!(flag, b'3' | b'4'));
            Member {
                dialect,
                flag,
                link: if matches!(flag, b'1' | b'2') { link } else { Vec::new() },
                content: if file { content } else { Vec::new() },
                mode,
                owner: (small(uid), small(gid)),
                seconds: seconds * 1000,
                nanoseconds: if nanoseconds % 3 == 0 { nanoseconds } else { 0 },
                device: if device { (mode, uid & 0o7_777_777) } else { (0, 0) },
                xattrs: xattrs.into_iter().collect(),
                idle_size: if idle && !file && size % 3 == 0 { size } else { 0 },
                name,
            }
        },
    )
}

/// Any archive. `idle` allows sizes that nothing follows.
pub fn archive(idle: bool) -> impl Strategy<Value = Archive> {
    let ending = prop_oneof![
        4 => prop::sample::select(vec![512usize, 10_240, 65_536]).prop_map(Ending::Blocks),
        1 => Just(Ending::OneZeroBlock),
        1 => Just(Ending::Nothing),
        1 => Just(Ending::NoPadding),
    ];
    (prop::collection::vec(member(idle), 0..9), ending).prop_map(|(members, ending)| write_tar(&members, ending))
}

fn wrapping() -> impl Strategy<Value = Wrapping> {
    let flushes = prop::collection::vec((any::<Index>(), any::<u8>()), 0..12);
    // Flag 1 only says that the content is text.
    (0u32..=10, 0u8..32, flushes).prop_map(|(level, flags, flushes)| Wrapping { level, flags, flushes })
}

/// An archive and a gzip of it, in one or more members.
pub fn layer(idle: bool) -> impl Strategy<Value = Layer> {
    let splits =
        prop_oneof![3 => prop::collection::vec(any::<Index>(), 0..2), 1 => prop::collection::vec(any::<Index>(), 2..8)];
    let padding = prop_oneof![4 => Just(0usize), 1 => 1usize..600];
    (archive(idle), splits, prop::collection::vec(wrapping(), 1..5), padding).prop_map(
        |(archive, splits, wrappings, padding)| {
            let blob = write_gzip(&archive.tar, &splits, &wrappings, padding);
            let members = format!("{wrappings:?}, split at {splits:?}, {padding} zeros behind");
            Layer { archive, blob, members }
        },
    )
}
