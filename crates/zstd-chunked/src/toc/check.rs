//! The rules that a table of contents must keep before anyone acts on it.

use super::{Entry, EntryType, Toc};
use crate::{Error, Limits, Result, limits::at_most, names::Names};

const WHAT: &str = "table of contents";

impl Toc {
    /// Checks everything that a reader relies on:
    ///
    /// - names are clean paths, unique, within the layer, and not below something that isn't a folder;
    /// - hard links point to earlier entries that aren't folders;
    /// - each file's chunks follow each other without gap, add up to its size, have digests, and lie in the blob in the
    ///   archive's order, without overlap, before `data_end`;
    /// - numbers and names are within the limits.
    pub fn check(&self, limits: &Limits, data_end: u64) -> Result<()> {
        at_most("the number of entries", self.entries.len() as u64, limits.entries as u64)?;
        let mut names = Names::default();
        // At least one header lies before the first file.
        let (mut blob_end, mut total) = (1u64, 0u64);
        let mut at = 0;
        while let Some(entry) = self.entries.get(at) {
            at += 1;
            at_most(
                "a name in bytes",
                entry.name.len().max(entry.link_name.len()) as u64,
                limits.name_bytes as u64,
            )?;
            if entry.kind == EntryType::Chunk {
                return wrong(entry, "is a chunk that follows no regular file");
            }
            names.add(&entry.path()?, entry.kind, entry.hardlink_path()?.as_deref())?;
            entry.check()?;
            let count = self.entries[at..].iter().take_while(|next| next.kind == EntryType::Chunk).count();
            let more = &self.entries[at..at + count];
            at += count;
            if entry.kind == EntryType::Reg && entry.size > 0 {
                blob_end = check_chunks(entry, more, blob_end, data_end)?;
                total = total.saturating_add(entry.size);
                at_most("the size of all files in bytes", total, limits.content_bytes)?;
            } else if count > 0 {
                return wrong(entry, "has chunks, and is no file with content");
            }
        }
        Ok(())
    }
}

impl Entry {
    /// Checks what can be judged without other entries.
    pub(crate) fn check(&self) -> Result<()> {
        match self.kind {
            EntryType::Symlink if self.link_name.is_empty() || self.link_name.contains('\0') => {
                wrong(self, "is a symlink to an empty path or one with a zero byte")
            }
            EntryType::Reg => Ok(()),
            _ if self.digest.is_some() || self.end_offset != 0 => {
                wrong(self, "has content, and is no regular file")
            }
            _ => Ok(()),
        }
    }
}

/// Checks one file's chunks; answers where the last one ends in the blob.
fn check_chunks(entry: &Entry, more: &[Entry], blob_start: u64, data_end: u64) -> Result<u64> {
    if entry.digest.is_none() {
        return wrong(entry, "has content, and no digest");
    }
    let (mut file_offset, mut blob_offset) = (0u64, blob_start);
    for (index, chunk) in std::iter::once(entry).chain(more).enumerate() {
        let size = if more.is_empty() { entry.size } else { chunk.chunk_size };
        if size == 0 || chunk.chunk_offset != file_offset {
            let why = format!(
                "has a chunk at {} of {size} bytes, expected one at {file_offset}",
                chunk.chunk_offset
            );
            return wrong(entry, &why);
        }
        if index > 0 && (chunk.name != entry.name || chunk.chunk_digest.is_none() || chunk.end_offset != 0) {
            return wrong(entry, "is followed by a chunk of another file, without digest, or with an end");
        }
        if index == 0 && !more.is_empty() && chunk.chunk_digest.is_none() {
            return wrong(entry, "has several chunks, and the first has no digest");
        }
        // A file starts where the one before ends or later; each later chunk starts later than the chunk before.
        if chunk.offset < blob_offset || (index > 0 && chunk.offset == blob_offset) {
            let why =
                format!("has a chunk at {} of the blob, expected one after {blob_offset}", chunk.offset);
            return wrong(entry, &why);
        }
        blob_offset = chunk.offset;
        file_offset = file_offset.saturating_add(size);
    }
    if file_offset != entry.size {
        return wrong(entry, &format!("has {} bytes, and chunks of {file_offset}", entry.size));
    }
    if entry.end_offset <= blob_offset || entry.end_offset > data_end {
        let why = format!("ends at {} of the blob, expected {blob_offset} to {data_end}", entry.end_offset);
        return wrong(entry, &why);
    }
    Ok(entry.end_offset)
}

fn wrong<T>(entry: &Entry, why: &str) -> Result<T> {
    Err(Error::invalid(WHAT, format!("{:?} {why}", entry.name)))
}
