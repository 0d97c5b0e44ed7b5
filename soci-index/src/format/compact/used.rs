//! Which bytes of a window are referred to.
//!
//! A deflate stream may refer to any of the 32,768 bytes before a checkpoint, and usually refers to a tenth of them,
//! all within the next 32,768 bytes of output: later on nothing reaches back that far. So that much of the stream is
//! read once more, symbols only, without making output. The stream has been inflated before by a real decoder; whatever
//! looks wrong here only means that all bytes count as used.

use crate::format::checkpoint::WINDOW_BYTES;

/// Marks of the bytes of a window, oldest first.
pub(crate) type Mask = Box<[bool; WINDOW_BYTES]>;

/// Marks the bytes of the window before a checkpoint that what follows refers to. `compressed` begins with the first
/// byte of the span; `bits` of its top bits belong to the span, 0 for all eight. `None` when the stream cannot be
/// followed far enough, so that all bytes may be used.
#[must_use]
pub fn used(compressed: &[u8], bits: u8) -> Option<Mask> {
    let mut walk = Walk { input: Bits::new(compressed, bits), output: 0, mask: Box::new([false; WINDOW_BYTES]) };
    while walk.output < WINDOW_BYTES {
        if walk.block()? {
            // What follows a member's last block begins anew.
            break;
        }
    }
    Some(walk.mask)
}

/// A window whose unreferenced bytes are zero.
pub fn keep(window: &mut [u8; WINDOW_BYTES], mask: &Mask) {
    for (byte, used) in window.iter_mut().zip(mask.iter()) {
        if !used {
            *byte = 0;
        }
    }
}

/// Bits of a stream, lowest first.
struct Bits<'a> {
    bytes: &'a [u8],
    held: u64,
    count: u32,
}

impl<'a> Bits<'a> {
    fn new(bytes: &'a [u8], bits: u8) -> Self {
        let mut this = Self { bytes, held: 0, count: 0 };
        if let (1..=7, Some((first, rest))) = (bits, bytes.split_first()) {
            (this.held, this.count, this.bytes) = (u64::from(first >> (8 - bits)), bits.into(), rest);
        }
        this
    }

    fn fill(&mut self, wanted: u32) {
        if self.count >= wanted {
            return;
        }
        if let Some((eight, _)) = self.bytes.split_first_chunk::<8>() {
            // As many whole bytes as there is room for.
            self.held |= u64::from_le_bytes(*eight) << self.count;
            let taken = (63 - self.count) / 8;
            self.count += taken * 8;
            self.held &= u64::MAX >> (64 - self.count);
            self.bytes = self.bytes.get(taken as usize..).unwrap_or_default();
            return;
        }
        while self.count < wanted {
            let Some((first, rest)) = self.bytes.split_first() else { return };
            self.held |= u64::from(*first) << self.count;
            (self.count, self.bytes) = (self.count + 8, rest);
        }
    }

    /// The next `wanted` bits, at most 32, without taking them; zeros stand for what is missing.
    fn peek(&mut self, wanted: u32) -> usize {
        self.fill(wanted);
        (self.held & ((1 << wanted) - 1)) as usize
    }

    fn drop(&mut self, taken: u32) -> Option<()> {
        self.count = self.count.checked_sub(taken)?;
        self.held >>= taken;
        Some(())
    }

    fn take(&mut self, wanted: u32) -> Option<usize> {
        let bits = self.peek(wanted);
        self.drop(wanted)?;
        Some(bits)
    }

    /// Drops what is left of the current byte.
    fn align(&mut self) {
        let odd = self.count % 8;
        (self.held, self.count) = (self.held >> odd, self.count - odd);
    }
}

/// Bits of a code that one look into a table decodes. Nearly all symbols have codes no longer than that.
const QUICK_BITS: u32 = 9;

/// A Huffman code (RFC 1951, section 3.2.2).
struct Code {
    /// How many symbols have each length.
    counts: [u16; 16],
    /// The symbols by length, then by value.
    symbols: Vec<u16>,
    /// For the next bits as they come: the symbol and its length; length 0 where the code is longer or none.
    quick: Box<[(u16, u8); 1 << QUICK_BITS]>,
}

impl Code {
    fn new(lengths: &[u8]) -> Self {
        let mut counts = [0_u16; 16];
        for length in lengths {
            counts[usize::from(*length & 15)] += 1;
        }
        counts[0] = 0;
        let mut symbols: Vec<u16> =
            (0..lengths.len() as u16).filter(|symbol| lengths[usize::from(*symbol)] != 0).collect();
        symbols.sort_by_key(|symbol| lengths[usize::from(*symbol)]);
        let quick = Self::quick(&counts, &symbols);
        Self { counts, symbols, quick }
    }

    fn quick(counts: &[u16; 16], symbols: &[u16]) -> Box<[(u16, u8); 1 << QUICK_BITS]> {
        let mut quick = Box::new([(0, 0); 1 << QUICK_BITS]);
        let (mut code, mut rest) = (0_u32, symbols);
        for length in 1..=QUICK_BITS {
            let (these, longer) = rest.split_at(rest.len().min(counts[length as usize].into()));
            for symbol in these {
                // Codes come highest bit first, all else lowest.
                let mut place = (code.reverse_bits() >> (32 - length)) as usize;
                while let Some(entry) = quick.get_mut(place) {
                    *entry = (*symbol, length as u8);
                    place += 1 << length;
                }
                code += 1;
            }
            (code, rest) = (code << 1, longer);
        }
        quick
    }

    fn symbol(&self, bits: &mut Bits<'_>) -> Option<u16> {
        let (symbol, length) = self.quick[bits.peek(QUICK_BITS)];
        if length == 0 {
            return self.long_symbol(bits);
        }
        bits.drop(length.into())?;
        Some(symbol)
    }

    fn long_symbol(&self, bits: &mut Bits<'_>) -> Option<u16> {
        let (mut code, mut first, mut index) = (0_usize, 0_usize, 0_usize);
        for count in &self.counts[1..] {
            code |= bits.take(1)?;
            let count = usize::from(*count);
            if code < first + count {
                return self.symbols.get(index + code.checked_sub(first)?).copied();
            }
            index += count;
            first = (first + count) << 1;
            code <<= 1;
        }
        None
    }
}

/// First lengths of the length symbols, and their extra bits (RFC 1951, section 3.2.5).
const LENGTHS: [(usize, u32); 29] = [
    (3, 0),
    (4, 0),
    (5, 0),
    (6, 0),
    (7, 0),
    (8, 0),
    (9, 0),
    (10, 0),
    (11, 1),
    (13, 1),
    (15, 1),
    (17, 1),
    (19, 2),
    (23, 2),
    (27, 2),
    (31, 2),
    (35, 3),
    (43, 3),
    (51, 3),
    (59, 3),
    (67, 4),
    (83, 4),
    (99, 4),
    (115, 4),
    (131, 5),
    (163, 5),
    (195, 5),
    (227, 5),
    (258, 0),
];

/// The same for distances.
const DISTANCES: [(usize, u32); 30] = [
    (1, 0),
    (2, 0),
    (3, 0),
    (4, 0),
    (5, 1),
    (7, 1),
    (9, 2),
    (13, 2),
    (17, 3),
    (25, 3),
    (33, 4),
    (49, 4),
    (65, 5),
    (97, 5),
    (129, 6),
    (193, 6),
    (257, 7),
    (385, 7),
    (513, 8),
    (769, 8),
    (1025, 9),
    (1537, 9),
    (2049, 10),
    (3073, 10),
    (4097, 11),
    (6145, 11),
    (8193, 12),
    (12289, 12),
    (16385, 13),
    (24577, 13),
];

/// In which order the lengths of the code for lengths come (RFC 1951, section 3.2.7).
const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

struct Walk<'a> {
    input: Bits<'a>,
    /// Bytes of output so far.
    output: usize,
    mask: Mask,
}

impl Walk<'_> {
    /// Follows one block; answers whether it was the last of its member.
    fn block(&mut self) -> Option<bool> {
        let last = self.input.take(1)? == 1;
        match self.input.take(2)? {
            0 => self.stored()?,
            1 => {
                let (literals, distances) = fixed();
                self.symbols(&literals, &distances)?;
            }
            2 => {
                let (literals, distances) = self.dynamic()?;
                self.symbols(&literals, &distances)?;
            }
            _ => return None,
        }
        Some(last)
    }

    fn stored(&mut self) -> Option<()> {
        self.input.align();
        let length = self.input.take(16)?;
        let inverse = self.input.take(16)?;
        if length ^ inverse != 0xffff {
            return None;
        }
        for _ in 0..length {
            self.input.take(8)?;
        }
        self.output += length;
        Some(())
    }

    fn dynamic(&mut self) -> Option<(Code, Code)> {
        let (literals, distances) = (self.input.take(5)? + 257, self.input.take(5)? + 1);
        let mut lengths = [0_u8; 19];
        for place in ORDER.iter().take(self.input.take(4)? + 4) {
            lengths[*place] = self.input.take(3)? as u8;
        }
        let code = Code::new(&lengths);
        let mut lengths: Vec<u8> = Vec::with_capacity(literals + distances);
        while lengths.len() < literals + distances {
            let (length, times) = match code.symbol(&mut self.input)? {
                symbol @ 0..=15 => (symbol as u8, 1),
                16 => (*lengths.last()?, 3 + self.input.take(2)?),
                17 => (0, 3 + self.input.take(3)?),
                _ => (0, 11 + self.input.take(7)?),
            };
            lengths.extend(std::iter::repeat_n(length, times));
        }
        let (literals, distances) = lengths.split_at_checked(literals)?;
        Some((Code::new(literals), Code::new(distances)))
    }

    /// Follows the symbols of a block, as far as they may refer to the window.
    fn symbols(&mut self, literals: &Code, distances: &Code) -> Option<()> {
        while self.output < WINDOW_BYTES {
            let symbol = usize::from(literals.symbol(&mut self.input)?);
            match symbol {
                0..256 => self.output += 1,
                256 => return Some(()),
                _ => {
                    let (length, extra) = *LENGTHS.get(symbol - 257)?;
                    let length = length + self.input.take(extra)?;
                    let (distance, extra) = *DISTANCES.get(usize::from(distances.symbol(&mut self.input)?))?;
                    let distance = distance + self.input.take(extra)?;
                    self.mark(length, distance);
                    self.output += length;
                }
            }
        }
        Some(())
    }

    /// A copy of `length` bytes from `distance` back: those before the checkpoint are used. What a copy makes itself it
    /// may copy again, which refers to nothing new.
    fn mark(&mut self, length: usize, distance: usize) {
        let Some(back) = distance.checked_sub(self.output) else { return };
        let start = WINDOW_BYTES.saturating_sub(back);
        let end = (start + length).min(WINDOW_BYTES);
        if let Some(marks) = self.mask.get_mut(start..end) {
            marks.fill(true);
        }
    }
}

/// The codes that need not be sent (RFC 1951, section 3.2.6).
fn fixed() -> (Code, Code) {
    let mut lengths = [8_u8; 288];
    lengths[144..256].fill(9);
    lengths[256..280].fill(7);
    (Code::new(&lengths), Code::new(&[5; 30]))
}
