//! A table's regular files, each with its chunks.

use std::ops::Range;

use super::{ChunkType, Entry, EntryType, Toc};
use crate::Digest;

/// A regular file.
#[derive(Clone, Copy, Debug)]
pub struct File<'a> {
    /// Its metadata.
    pub entry: &'a Entry,
    /// Its position in [`Toc::entries`].
    pub index: usize,
    /// Its `chunk` entries: the second chunk and later.
    more: &'a [Entry],
}

/// A piece of a file, compressed by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Where it begins in the file.
    pub file_offset: u64,
    /// Bytes uncompressed.
    pub size: u64,
    /// Its frame in the blob.
    pub range: Range<u64>,
    /// Digest of its bytes, uncompressed.
    pub digest: Digest,
    /// Whether it is zero bytes only, so needn't be fetched.
    pub zeros: bool,
}

impl Toc {
    /// The regular files, in the archive's order. Meant for a table that [`Toc::check`] accepted.
    pub fn files(&self) -> impl Iterator<Item = File<'_>> {
        self.entries.iter().enumerate().filter(|(_, entry)| entry.kind == EntryType::Reg).map(
            |(index, entry)| {
                let after = &self.entries[index + 1..];
                let count = after.iter().take_while(|entry| entry.kind == EntryType::Chunk).count();
                File { entry, index, more: &after[..count] }
            },
        )
    }
}

impl<'a> File<'a> {
    /// How many chunks it has: none if it is empty.
    pub fn chunk_count(&self) -> usize {
        if self.entry.size == 0 { 0 } else { 1 + self.more.len() }
    }

    /// Its chunks, by offset.
    pub fn chunks(&self) -> impl Iterator<Item = Chunk> + use<'a> {
        let File { entry, more, .. } = *self;
        let all = std::iter::once(entry).chain(more);
        // An entry whose digests are missing has no content; `Toc::check` refuses it where it should have some.
        all.enumerate().filter(|_| entry.size > 0).filter_map(move |(at, chunk)| {
            Some(Chunk {
                file_offset: chunk.chunk_offset,
                size: if more.is_empty() { entry.size } else { chunk.chunk_size },
                range: chunk.offset..more.get(at).map_or(entry.end_offset, |next| next.offset),
                digest: if more.is_empty() { entry.digest? } else { chunk.chunk_digest? },
                zeros: !more.is_empty() && chunk.chunk_type == ChunkType::Zeros,
            })
        })
    }
}
