//! Writes an image's file tree as an EROFS file system of metadata only, to be mounted below overlayfs.
//!
//! EROFS holds names, owners, modes, times, links and attributes; a regular file is a hole of the right size with the
//! attributes `trusted.overlay.metacopy` (empty) and `trusted.overlay.redirect` (`/ab/cdef...`, the sha256 of its
//! bytes), which send overlayfs to a data-only lower layer, the folder of objects. That is the way of composefs.
//! Small files are held whole. An image's own `trusted.overlay.*` attributes are escaped.
//!
//! Layout, in blocks of 4 KiB and little endian ("Core on-disk format" of the EROFS documentation):
//! - byte 1024: superblock; then inodes, each at a multiple of 32 bytes, which is its number. An inode is 32 or 64
//!   bytes, its attributes, and either the last part of its contents or the map of its holes.
//! - attributes that several inodes share
//! - whole blocks of large folders
//!
//! The same tree gives the same bytes: nothing depends on the clock, the machine or the layers it came from.

mod dir;
mod inode;
mod plan;
mod xattr;

use std::io::{self, BufWriter, Write};

use crate::error::{Error, Result};
use crate::tree::Tree;
use plan::Plan;

/// Bytes in a block: the page size, so that every kernel takes it.
const BLOCK: u64 = 4096;
const BLOCK_BITS: u8 = 12;
/// Inodes start at multiples of this.
const SLOT: u64 = 32;
const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Times are those of contents, not of inodes.
const COMPAT_MTIME: u32 = 2;
const INCOMPAT_CHUNKED_FILE: u32 = 4;
/// Largest image: a million files have a few hundred MB of metadata.
const IMAGE_MAX_BYTES: u64 = 4 << 30;

/// Writes `tree` to `out`, which must be at its start.
///
/// # Errors
/// If the tree is none (see [`crate::tree::Builder`], which makes only sound ones) or can't be held, and if writing
/// fails.
pub fn write(tree: &Tree, out: &mut impl Write) -> Result<()> {
    tree.check()?;
    let plan = Plan::new(tree)?;
    let failed = Error::io("writing", "EROFS image");
    let mut out = Out { to: BufWriter::with_capacity(256 << 10, out), at: 0 };
    plan.write(&mut out).and_then(|()| out.to.flush()).map_err(failed)
}

/// Writes in order, and knows where it is.
struct Out<W: Write> {
    to: BufWriter<W>,
    at: u64,
}

impl<W: Write> Out<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.to.write_all(bytes)
    }

    /// Zeros up to a place.
    fn pad_to(&mut self, at: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
        while self.at < at {
            let step = (at - self.at).min(BLOCK);
            self.put(&ZEROS[..step as usize])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
