//! What an ELF file names, and what of it a loader reads: a machine that says which bytes it wants next.
//!
//! From the System V ABI (gabi 4.1, chapters 4 and 5): the program headers name the interpreter and say where the
//! dynamic section is; that one names libraries and where they may lie, as offsets into a table of strings. A loader
//! writes into all writable segments when it applies relocations, which it reads one after the other.
//!
//! Only 64-bit little-endian files are understood, which is what images for amd64, arm64, riscv64 and ppc64le have; of
//! others nothing is said. Total: any bytes are an answer, and each step wants a bounded number of them.

use std::ops::Range;

use crate::foresight::mentions::Mention;

/// Bytes of the beginning that are looked at: headers, and mostly the interpreter's name.
const HEAD_BYTES: u64 = 4096;
/// Most bytes of a dynamic section: four thousand entries.
const DYNAMIC_BYTES_MAX: u64 = 64 << 10;
/// Most bytes of the strings that are looked at.
const STRINGS_BYTES_MAX: u64 = 64 << 10;
/// Longest name.
const NAME_BYTES_MAX: usize = 4096;

/// Program headers.
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const PF_W: u32 = 2;
/// Entries of the dynamic section.
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const DT_RPATH: u64 = 15;
const DT_JMPREL: u64 = 23;
const DT_PLTRELSZ: u64 = 2;
const DT_RUNPATH: u64 = 29;

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Give these bytes of the file to [`Elf::step`]; fewer when the file has no more.
    Read(Range<u64>),
    /// That was all.
    Done(ElfFindings),
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ElfFindings {
    /// The interpreter, and the libraries.
    pub mentions: Vec<Mention>,
    /// Bytes of the file that a loader reads: relocations, and segments that it writes to. Within any file, or not.
    pub ranges: Vec<Range<u64>>,
}

/// The machine.
#[derive(Debug, Clone)]
pub struct Elf {
    state: ElfState,
    found: ElfFindings,
    loads: Vec<Load>,
}

#[derive(Debug, Clone)]
enum ElfState {
    Head,
    Dynamic,
    Strings { start: u64, needed: Vec<u64>, paths: Option<u64> },
}

/// A part of the file that is put into memory.
#[derive(Debug, Clone)]
struct Load {
    file: Range<u64>,
    address: u64,
}

impl Elf {
    /// A machine, and what it wants first.
    #[must_use]
    pub fn new() -> (Self, Step) {
        (Self { state: ElfState::Head, found: ElfFindings::default(), loads: Vec::new() }, Step::Read(0..HEAD_BYTES))
    }

    /// Takes the bytes that were asked for.
    #[must_use]
    pub fn step(&mut self, bytes: &[u8]) -> Step {
        let next = match std::mem::replace(&mut self.state, ElfState::Head) {
            ElfState::Head => self.head(bytes).map(|range| (ElfState::Dynamic, range)),
            ElfState::Dynamic => self.dynamic(bytes),
            ElfState::Strings { start, needed, paths } => {
                self.strings(bytes, start, &needed, paths);
                None
            }
        };
        match next {
            Some((state, range)) => {
                self.state = state;
                Step::Read(range)
            }
            None => Step::Done(std::mem::take(&mut self.found)),
        }
    }

    /// Reads headers; where the dynamic section is.
    fn head(&mut self, bytes: &[u8]) -> Option<Range<u64>> {
        let is_known = bytes.starts_with(b"\x7fELF\x02\x01");
        let (table, size, count) = (u64_at(bytes, 32)?, u16_at(bytes, 54)?, u16_at(bytes, 56)?);
        if !is_known || size < 56 {
            return None;
        }
        let mut dynamic = None;
        for number in 0..u64::from(count) {
            let place = number.checked_mul(size.into())?.checked_add(table)?;
            let Some(header) = bytes.get(usize::try_from(place).ok()?..) else { break };
            let (Some(kind), Some(flags)) = (u32_at(header, 0), u32_at(header, 4)) else { break };
            let (Some(offset), Some(address), Some(length)) =
                (u64_at(header, 8), u64_at(header, 16), u64_at(header, 32))
            else {
                break;
            };
            let file = offset..offset.saturating_add(length);
            match kind {
                PT_LOAD => {
                    if flags & PF_W != 0 {
                        self.found.ranges.push(file.clone());
                    }
                    self.loads.push(Load { file, address });
                }
                PT_DYNAMIC => dynamic = Some(file.start..file.end.min(file.start.saturating_add(DYNAMIC_BYTES_MAX))),
                PT_INTERP => {
                    let path = usize::try_from(file.start).ok().and_then(|start| string(bytes.get(start..)?));
                    self.found.mentions.extend(path.map(Mention::Path));
                }
                _ => {}
            }
        }
        dynamic
    }

    /// Reads the dynamic section; where its names are.
    fn dynamic(&mut self, bytes: &[u8]) -> Option<(ElfState, Range<u64>)> {
        let (mut needed, mut paths, mut strings) = (Vec::new(), None, None);
        let (mut relocations, mut sizes) = ([None; 2], [0; 2]);
        for entry in bytes.chunks_exact(16) {
            let (tag, value) = (u64_at(entry, 0)?, u64_at(entry, 8)?);
            match tag {
                0 => break,
                DT_NEEDED => needed.push(value),
                DT_STRTAB => strings = Some(value),
                DT_RPATH | DT_RUNPATH => paths = Some(value),
                DT_RELA => relocations[0] = Some(value),
                DT_RELASZ => sizes[0] = value,
                DT_JMPREL => relocations[1] = Some(value),
                DT_PLTRELSZ => sizes[1] = value,
                _ => {}
            }
        }
        for (address, size) in relocations.into_iter().zip(sizes) {
            let start = address.and_then(|address| self.offset_of(address));
            self.found.ranges.extend(start.map(|start| start..start.saturating_add(size)));
        }
        let table = self.offset_of(strings?)?;
        let first = needed.iter().chain(&paths).min()?;
        let last = needed.iter().chain(&paths).max()?;
        let length = (last - first).saturating_add(NAME_BYTES_MAX as u64).min(STRINGS_BYTES_MAX);
        let (start, from) = (*first, table.checked_add(*first)?);
        Some((ElfState::Strings { start, needed, paths }, from..from.saturating_add(length)))
    }

    fn strings(&mut self, bytes: &[u8], start: u64, needed: &[u64], paths: Option<u64>) {
        let name = |offset: &u64| string(bytes.get(usize::try_from(offset.checked_sub(start)?).ok()?..)?);
        let paths = paths.as_ref().and_then(name).unwrap_or_default();
        let directories: Box<[Box<[u8]>]> =
            paths.split(|byte| *byte == b':').filter(|path| !path.is_empty()).map(Box::from).collect();
        for name in needed.iter().filter_map(name) {
            self.found.mentions.push(if name.contains(&b'/') {
                Mention::Path(name)
            } else {
                Mention::Library { name, directories: directories.clone() }
            });
        }
    }

    /// Where in the file an address of memory is.
    fn offset_of(&self, address: u64) -> Option<u64> {
        let holds = |load: &&Load| address >= load.address && address - load.address < load.file.end - load.file.start;
        let load = self.loads.iter().find(holds)?;
        Some(load.file.start + (address - load.address))
    }
}

/// A string that ends with a zero byte.
fn string(bytes: &[u8]) -> Option<Box<[u8]>> {
    let length = bytes.iter().take(NAME_BYTES_MAX).position(|byte| *byte == 0)?;
    (length > 0).then(|| bytes[..length].into())
}

fn u16_at(bytes: &[u8], place: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(place..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], place: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(place..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], place: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(place..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn walk(file: &[u8]) -> ElfFindings {
        let (mut elf, mut step) = Elf::new();
        for _ in 0..8 {
            match step {
                Step::Done(found) => return found,
                Step::Read(range) => {
                    assert!(range.end - range.start <= DYNAMIC_BYTES_MAX, "{range:?}");
                    let end = usize::try_from(range.end).unwrap_or(usize::MAX).min(file.len());
                    let start = usize::try_from(range.start).unwrap_or(usize::MAX).min(end);
                    step = elf.step(&file[start..end]);
                }
            }
        }
        panic!("it goes on and on");
    }

    /// A file by hand: an interpreter, two segments, two libraries and where to look for them.
    fn made() -> Vec<u8> {
        let mut file = vec![0; 0x3000];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[32..40].copy_from_slice(&64_u64.to_le_bytes());
        file[54..56].copy_from_slice(&56_u16.to_le_bytes());
        let headers: [(u32, u32, u64, u64, u64); 4] = [
            (PT_INTERP, 4, 0x400, 0x40_0400, 20),
            (PT_LOAD, 5, 0, 0x40_0000, 0x1000),
            (PT_LOAD, 6, 0x2000, 0x60_2000, 0x800),
            (PT_DYNAMIC, 6, 0x2100, 0x60_2100, 0x100),
        ];
        file[56..58].copy_from_slice(&4_u16.to_le_bytes());
        for (number, (kind, flags, offset, address, length)) in headers.into_iter().enumerate() {
            let at = 64 + 56 * number;
            file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            file[at + 4..at + 8].copy_from_slice(&flags.to_le_bytes());
            for (place, value) in [(8, offset), (16, address), (32, length)] {
                file[at + place..at + place + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        file[0x400..0x400 + 11].copy_from_slice(b"/lib/ld.so\0");
        let strings = b"\0libc.so.6\0libm.so.6\0$ORIGIN/../lib:/opt/lib\0";
        file[0x500..0x500 + strings.len()].copy_from_slice(strings);
        let entries = [
            (DT_NEEDED, 1),
            (DT_NEEDED, 11),
            (DT_RUNPATH, 21),
            (DT_STRTAB, 0x40_0500),
            (DT_RELA, 0x40_0800),
            (DT_RELASZ, 0x240),
        ];
        for (number, (tag, value)) in entries.into_iter().enumerate() {
            let at = 0x2100 + 16 * number;
            file[at..at + 8].copy_from_slice(&tag.to_le_bytes());
            file[at + 8..at + 16].copy_from_slice(&u64::to_le_bytes(value));
        }
        file
    }

    #[test]
    fn libraries_interpreter_and_what_a_loader_reads() {
        let found = walk(&made());
        let directories: Box<[Box<[u8]>]> = [b"$ORIGIN/../lib".as_slice(), b"/opt/lib"].map(Box::from).into();
        let library = |name: &str| Mention::Library { name: name.as_bytes().into(), directories: directories.clone() };
        let interpreter = Mention::Path(b"/lib/ld.so".as_slice().into());
        assert_eq!(found.mentions, [interpreter, library("libc.so.6"), library("libm.so.6")]);
        assert_eq!(found.ranges, [0x2000..0x2800, 0x800..0xa40]);
    }

    /// The program that runs this test is a real one.
    #[test]
    #[cfg(all(target_os = "linux", target_pointer_width = "64", target_endian = "little"))]
    fn a_real_program() {
        let file = std::fs::read("/proc/self/exe").unwrap();
        let found = walk(&file);
        let names = |mention: &Mention| matches!(mention, Mention::Library { name, .. } if name.starts_with(b"libc."));
        assert!(found.mentions.iter().any(names), "{found:?}");
        assert!(matches!(found.mentions.first(), Some(Mention::Path(_))), "{found:?}");
        let length = file.len() as u64;
        assert!(found.ranges.len() >= 2 && found.ranges.iter().all(|range| range.end <= length), "{found:?}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer(noise in prop::collection::vec((0_usize..0x3000, any::<u8>()), 0..60), cut in 0_usize..0x3000) {
            let mut file = made();
            for (place, value) in noise {
                file[place] = value;
            }
            file.truncate(cut);
            let _ = walk(&file);
        }
    }
}
