//! The table of contents: JSON, in the field names that other tools write and read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The table of contents of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Toc {
    /// Always 1.
    pub version: u32,
    /// Entries in the archive's order; a file of several chunks is followed by its `chunk` entries.
    pub entries: Vec<Entry>,
    /// `sha256:...` of the uncompressed tar-split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tar_split_digest: Option<String>,
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

/// One entry. Offsets are in the compressed blob, sizes uncompressed, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: EntryType,
    /// Path in the archive.
    pub name: String,
    /// Target of a link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_name: Option<String>,
    /// Permission bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<i64>,
    /// Size of the whole file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u64>,
    /// Group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u64>,
    /// Time of change, RFC 3339.
    #[serde(default, rename = "modtime", skip_serializing_if = "Option::is_none")]
    pub mod_time: Option<String>,
    /// Major number of a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev_major: Option<u64>,
    /// Minor number of a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev_minor: Option<u64>,
    /// Extended attributes, values in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xattrs: Option<BTreeMap<String, String>>,
    /// `sha256:...` of the whole file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Where the chunk begins in the blob.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Where the file's last chunk ends in the blob; only on a file's first entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_offset: Option<u64>,
    /// Size of the chunk; absent where the file has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_size: Option<u64>,
    /// Where the chunk begins in the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_offset: Option<u64>,
    /// `sha256:...` of the chunk's bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_digest: Option<String>,
    /// What the chunk's content is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_type: Option<ChunkType>,
}
