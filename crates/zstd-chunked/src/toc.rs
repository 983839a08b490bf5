//! The table of contents: JSON, in the field names that other tools write and read.
//!
//! A file of one chunk is one entry, whose digest is also its chunk's. A file of several chunks is followed by `chunk`
//! entries; its own entry then carries the first chunk. Each chunk has its start in the blob only: it ends where the next
//! one starts, the last one at the file's `endOffset`.

mod check;
mod files;
mod json;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use files::{Chunk, File};

use crate::{Annotations, Digest, Error, Limits, Result, Time, clean_path, limits::at_most};

/// The table of contents of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Toc {
    /// Always 1.
    pub version: u32,
    /// Entries in the archive's order; a file of several chunks is followed by its `chunk` entries.
    pub entries: Vec<Entry>,
    /// Digest of the compressed tar-split.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tar_split_digest: Option<Digest>,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryType {
    /// Directory.
    Dir,
    /// Regular file; carries its first chunk.
    Reg,
    /// Symbolic link.
    Symlink,
    /// Link to an earlier entry.
    Hardlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
    /// A later chunk of the file before.
    Chunk,
}

/// What a chunk's content is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChunkType {
    /// Bytes in the blob.
    #[default]
    #[serde(rename = "")]
    Data,
    /// A run of zero bytes, which the blob needn't be read for.
    #[serde(rename = "zeros")]
    Zeros,
}

/// One entry. Offsets are in the compressed blob, sizes uncompressed, in bytes. A zero isn't written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: EntryType,
    /// Name as the archive has it; [`Entry::path`] is its clean path.
    pub name: String,
    /// Target of a link.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub link_name: String,
    /// Permission bits, as the archive has them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub mode: u32,
    /// Size of the whole file.
    #[serde(default, skip_serializing_if = "is_zero_64")]
    pub size: u64,
    /// Owner.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub uid: u32,
    /// Group.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gid: u32,
    /// Time of the last change of content.
    #[serde(default, rename = "modtime", skip_serializing_if = "Option::is_none")]
    pub mod_time: Option<Time>,
    /// Time of the last access, in the few archives that keep it.
    #[serde(default, rename = "accesstime", skip_serializing_if = "Option::is_none")]
    pub access_time: Option<Time>,
    /// Time of the last change of metadata, in the few archives that keep it.
    #[serde(default, rename = "changetime", skip_serializing_if = "Option::is_none")]
    pub change_time: Option<Time>,
    /// Major number of a device.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dev_major: u32,
    /// Minor number of a device.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dev_minor: u32,
    /// Extended attributes (base64 in JSON).
    #[serde(default, with = "json::base64_values", skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// Digest of the whole file; none for an empty one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Where the chunk begins in the blob.
    #[serde(default, skip_serializing_if = "is_zero_64")]
    pub offset: u64,
    /// Where the file's last chunk ends in the blob; only on a file's own entry.
    #[serde(default, skip_serializing_if = "is_zero_64")]
    pub end_offset: u64,
    /// Size of the chunk; absent where the file has one chunk.
    #[serde(default, skip_serializing_if = "is_zero_64")]
    pub chunk_size: u64,
    /// Where the chunk begins in the file.
    #[serde(default, skip_serializing_if = "is_zero_64")]
    pub chunk_offset: u64,
    /// Digest of the chunk's bytes; absent where the file has one chunk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_digest: Option<Digest>,
    /// What the chunk's content is.
    #[serde(default, skip_serializing_if = "is_data")]
    pub chunk_type: ChunkType,
}

impl Entry {
    /// An entry with nothing but a kind and a name.
    pub fn new(kind: EntryType, name: impl Into<String>) -> Self {
        Self {
            kind,
            name: name.into(),
            link_name: String::new(),
            mode: 0,
            size: 0,
            uid: 0,
            gid: 0,
            mod_time: None,
            access_time: None,
            change_time: None,
            dev_major: 0,
            dev_minor: 0,
            xattrs: BTreeMap::new(),
            digest: None,
            offset: 0,
            end_offset: 0,
            chunk_size: 0,
            chunk_offset: 0,
            chunk_digest: None,
            chunk_type: ChunkType::Data,
        }
    }

    /// Its path relative to the layer's root, cleaned (see [`clean_path`]); empty for the root.
    pub fn path(&self) -> Result<String> {
        clean_path(&self.name)
    }

    /// The cleaned path of a hard link's target, else `None`.
    pub fn hardlink_path(&self) -> Result<Option<String>> {
        if self.kind == EntryType::Hardlink { clean_path(&self.link_name).map(Some) } else { Ok(None) }
    }
}

/// Reads the table of contents: the bytes of the blob at `annotations.positions.toc.range()`.
///
/// Its digest is verified before anything is decoded. What is returned has been checked: clean and unique names, links to
/// earlier entries, and chunks that follow each other, lie before the table, and add up to their file's size.
///
/// # Errors
///
/// A wrong digest, broken zstd or JSON, more than the limits, or any of the rules above.
pub fn read_toc(compressed: &[u8], annotations: &Annotations, limits: &Limits) -> Result<Toc> {
    annotations.positions.check(limits)?;
    let expected = annotations.checksum;
    let found = Digest::of(compressed);
    if found != expected {
        return Err(Error::Digest { what: "the table of contents".into(), found, expected });
    }
    let raw_length = annotations.positions.toc.raw_length;
    let what = "decoding the table of contents (damaged, or larger than the annotation says)";
    let capacity = usize::try_from(raw_length).unwrap_or(usize::MAX);
    let raw = zstd::bulk::decompress(compressed, capacity).map_err(Error::io(what))?;
    if raw.len() as u64 != raw_length {
        let why = format!("{} bytes uncompressed, the annotation says {raw_length}", raw.len());
        return Err(Error::invalid("table of contents", why));
    }
    let toc = Toc::from_json(&raw, limits)?;
    toc.check(limits, annotations.positions.data_end())?;
    Ok(toc)
}

impl Toc {
    /// Parses JSON, with a bound on the number of entries only: [`Toc::check`] judges the content.
    pub fn from_json(json: &[u8], limits: &Limits) -> Result<Self> {
        at_most("the table of contents in bytes", json.len() as u64, limits.toc_bytes)?;
        json::parse(json, limits.entries)
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn is_zero_64(number: &u64) -> bool {
    *number == 0
}

fn is_data(kind: &ChunkType) -> bool {
    *kind == ChunkType::Data
}
