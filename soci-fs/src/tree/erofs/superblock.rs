//! The superblock and the device table behind it.

/// Where the superblock stands in the image.
pub(super) const SUPERBLOCK_OFFSET: u64 = 1024;

/// Size of the superblock, of a slot of the device table, and the unit in which that table's place is given.
const SLOT_BYTES: usize = 128;

const MAGIC: u32 = 0xE0F5_E1E2;

/// The superblock has a checksum; inodes have times of their own.
const FEATURE_COMPAT: u32 = 0x1 | 0x2;
/// Files are made of chunks (Linux 5.15); there is a device table (5.16).
const FEATURE_INCOMPAT: u32 = 0x4 | 0x8;

/// What the checksum begins with: CRC-32C, not inverted at its end, of the magic number and four zeros.
const CHECKSUM_SEED: u32 = 0x5045_B54A;

/// Where in the superblock the checksum stands.
const CHECKSUM: std::ops::Range<usize> = 4..8;

/// What differs from one superblock to another. Addresses and sizes are in blocks of the image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Superblock {
    /// Size of the image.
    pub(super) blocks: u32,
    /// Number of inodes.
    pub(super) inodes: u64,
    pub(super) root: u16,
    /// The address that inode numbers count from.
    pub(super) inode_address: u32,
    pub(super) xattr_address: u32,
    pub(super) devices: u16,
}

/// Bytes of superblock and device table.
pub(super) fn length(devices: u16) -> u64 {
    SLOT_BYTES as u64 * (u64::from(devices) + 1)
}

/// The superblock, and a device table with the size of each device in blocks.
///
/// The checksum covers the rest of the first block, part of the table included, so they are made together.
pub(super) fn encode(superblock: &Superblock, block_bits: u8, device_blocks: impl Iterator<Item = u32>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let slots = (SUPERBLOCK_OFFSET as usize / SLOT_BYTES) as u16 + 1;
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(FEATURE_COMPAT.to_le_bytes());
    bytes.extend([block_bits, 0]);
    bytes.extend(superblock.root.to_le_bytes());
    bytes.extend(superblock.inodes.to_le_bytes());
    // The time of making and the UUID (at 48) are zero: the same tree gives the same bytes.
    bytes.resize(36, 0);
    bytes.extend(superblock.blocks.to_le_bytes());
    bytes.extend(superblock.inode_address.to_le_bytes());
    bytes.extend(superblock.xattr_address.to_le_bytes());
    bytes.resize(80, 0);
    bytes.extend(FEATURE_INCOMPAT.to_le_bytes());
    bytes.resize(86, 0);
    bytes.extend(superblock.devices.to_le_bytes());
    bytes.extend(slots.to_le_bytes());
    bytes.resize(SLOT_BYTES, 0);
    for blocks in device_blocks {
        // A tag of 64 bytes, and the size; the rest is zero: no device is part of another's address space.
        let start = bytes.len();
        bytes.resize(start + 64, 0);
        bytes.extend(blocks.to_le_bytes());
        bytes.resize(start + SLOT_BYTES, 0);
    }
    let checksum = checksum(&bytes, 1 << block_bits);
    bytes[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// The checksum of the first block, or what there is of it; what is missing is zeros.
fn checksum(bytes: &[u8], block_bytes: usize) -> u32 {
    let mut block = bytes[..bytes.len().min(block_bytes)].to_vec();
    block.resize(block_bytes, 0);
    // The library inverts at both ends.
    !crc32c::crc32c_append(!CHECKSUM_SEED, &block[CHECKSUM.end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seed is the state after the magic number and zeros in the place of the checksum.
    #[test]
    fn checksum_seed() {
        let mut head = MAGIC.to_le_bytes().to_vec();
        head.extend([0; 4]);
        assert_eq!(!crc32c::crc32c(&head), CHECKSUM_SEED);
    }
}
