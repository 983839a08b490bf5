//! Inodes: 32 bytes where owner, size and links are small and the time is the image's own, else 64.

use super::{BLOCK, BLOCK_BITS};
use crate::tree::{Content, Kind, Node};

pub(super) const COMPACT_BYTES: u64 = 32;
pub(super) const EXTENDED_BYTES: u64 = 64;
/// A hole in the map of a file.
pub(super) const HOLE: [u8; 4] = [0xff; 4];
/// A map's entry may stand for up to 2^31 blocks.
const CHUNK_BITS_MAX: u32 = 31;

/// Where an inode's contents are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// In whole blocks, the last one padded with zeros.
    Blocks,
    /// The last part follows the inode, whole blocks before it are elsewhere.
    Inline,
    /// Nowhere: a map of holes, each of 2^bits blocks.
    Holes { bits: u32 },
}

impl Layout {
    fn code(self) -> u16 {
        match self {
            Layout::Blocks => 0,
            Layout::Inline => 2,
            Layout::Holes { .. } => 4,
        }
    }
}

/// The smallest holes that make the map one entry, and their number, for a size above 0.
pub(super) fn holes(size: u64) -> (u32, u64) {
    let blocks = size.div_ceil(BLOCK);
    let bits = blocks.next_power_of_two().trailing_zeros().min(CHUNK_BITS_MAX);
    (bits, size.div_ceil(1 << (bits + u32::from(BLOCK_BITS))))
}

/// All that an inode says.
pub(super) struct Inode<'a> {
    pub(super) node: &'a Node,
    pub(super) layout: Layout,
    /// As said by [`super::xattr::body_count`].
    pub(super) xattr_count: u16,
    pub(super) size: u64,
    pub(super) nlink: u32,
    /// First of its blocks.
    pub(super) block: u32,
    /// A number for 32-bit programs.
    pub(super) serial: u32,
}

/// Whether 32 bytes suffice; `time` is the image's.
pub(super) fn is_compact(node: &Node, size: u64, nlink: u32, time: (i64, u32)) -> bool {
    let meta = &node.meta;
    (meta.mtime_s, meta.mtime_ns) == time
        && [meta.uid, meta.gid, nlink].iter().all(|n| *n <= u32::from(u16::MAX))
        && size <= u64::from(u32::MAX)
}

impl Inode<'_> {
    pub(super) fn bytes(&self, compact: bool) -> Vec<u8> {
        let meta = &self.node.meta;
        // Linux ignores a link's mode, and shows this one.
        let permissions = if matches!(self.node.kind, Kind::Symlink(_)) { 0o777 } else { meta.mode };
        let mode = (file_type(self.node).1 | permissions) as u16;
        let mut out = Vec::with_capacity(EXTENDED_BYTES as usize);
        let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
        put(&(self.layout.code() << 1 | u16::from(!compact)).to_le_bytes());
        put(&self.xattr_count.to_le_bytes());
        put(&mode.to_le_bytes());
        if compact {
            put(&(self.nlink as u16).to_le_bytes());
            put(&(self.size as u32).to_le_bytes());
            put(&[0; 4]);
        } else {
            put(&[0; 2]);
            put(&self.size.to_le_bytes());
        }
        put(&self.place().to_le_bytes());
        put(&self.serial.to_le_bytes());
        if compact {
            put(&(meta.uid as u16).to_le_bytes());
            put(&(meta.gid as u16).to_le_bytes());
            put(&[0; 4]);
        } else {
            put(&meta.uid.to_le_bytes());
            put(&meta.gid.to_le_bytes());
            put(&meta.mtime_s.to_le_bytes());
            put(&meta.mtime_ns.to_le_bytes());
            put(&self.nlink.to_le_bytes());
            put(&[0; 16]);
        }
        out
    }

    /// The field that means something else for each kind.
    fn place(&self) -> u32 {
        match (&self.node.kind, self.layout) {
            // As Linux encodes a device number in 32 bits.
            (Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor }, _) => {
                minor & 0xff | major << 8 | (minor & !0xff) << 12
            }
            (_, Layout::Holes { bits }) => bits,
            _ => self.block,
        }
    }
}

/// The code of a node's kind in folders, and in its mode.
pub(super) fn file_type(node: &Node) -> (u8, u32) {
    match node.kind {
        Kind::File(_) => (1, 0o100_000),
        Kind::Directory(_) => (2, 0o040_000),
        Kind::CharDevice { .. } => (3, 0o020_000),
        Kind::BlockDevice { .. } => (4, 0o060_000),
        Kind::Fifo => (5, 0o010_000),
        Kind::Symlink(_) => (7, 0o120_000),
    }
}

/// Contents that the image itself holds, without folders'.
pub(super) fn contents(node: &Node) -> &[u8] {
    match &node.kind {
        Kind::File(Content::Inline(bytes)) | Kind::Symlink(bytes) => bytes,
        _ => b"",
    }
}
