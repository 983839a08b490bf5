//! Folders: blocks of entries, each block first its entries (12 bytes), then their names.
//!
//! All names, with `.` and `..` among them, are in the order of their bytes, for the kernel's binary search.

use super::BLOCK;

const ENTRY_BYTES: usize = 12;

/// A name, and the inode that it means.
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// Bytes of a folder with these names, in order.
pub(super) fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut blocks, mut used) = (0, 0);
    for name in names {
        let more = (ENTRY_BYTES + name.len()) as u64;
        if used + more > BLOCK {
            blocks += 1;
            used = 0;
        }
        used += more;
    }
    blocks * BLOCK + used
}

/// The folder's bytes; the last block is as long as needed.
pub(super) fn bytes(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let fits = |entry: &&Entry<'_>| {
            used += ENTRY_BYTES + entry.name.len();
            used <= BLOCK as usize
        };
        let (block, later) = rest.split_at(rest.iter().take_while(fits).count());
        out.resize(out.len().next_multiple_of(BLOCK as usize), 0);
        let mut name_at = block.len() * ENTRY_BYTES;
        for entry in block {
            out.extend_from_slice(&entry.nid.to_le_bytes());
            out.extend_from_slice(&(name_at as u16).to_le_bytes());
            out.extend_from_slice(&[entry.file_type, 0]);
            name_at += entry.name.len();
        }
        for entry in block {
            out.extend_from_slice(entry.name);
        }
        rest = later;
    }
    out
}
