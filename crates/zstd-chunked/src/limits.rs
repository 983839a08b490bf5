//! What a reader accepts at most. Everything in a layer is written by strangers.

/// The most that is accepted of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the uncompressed table of contents.
    pub toc_bytes: u64,
    /// Bytes of the uncompressed tar-split.
    pub tar_split_bytes: u64,
    /// Entries of the table of contents, chunks included.
    pub entries: usize,
    /// Bytes of an entry's name or link target.
    pub name_bytes: usize,
    /// Bytes of all files together.
    pub content_bytes: u64,
}

impl Limits {
    /// 150 MiB of table, which is where the tools of github.com/containers stop too.
    pub const TOC_BYTES: u64 = 150 << 20;
    /// About 850 bytes for each entry, so enough for as many as [`Limits::ENTRIES`]. It's read as a stream.
    pub const TAR_SPLIT_BYTES: u64 = 1 << 30;
    /// A million entries; the largest public images have about 300,000. About 400 bytes of memory each.
    pub const ENTRIES: usize = 1_000_000;
    /// PATH_MAX of Linux.
    pub const NAME_BYTES: usize = 4096;
    /// 16 TiB: the largest file of ext4.
    pub const CONTENT_BYTES: u64 = 16 << 40;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            toc_bytes: Self::TOC_BYTES,
            tar_split_bytes: Self::TAR_SPLIT_BYTES,
            entries: Self::ENTRIES,
            name_bytes: Self::NAME_BYTES,
            content_bytes: Self::CONTENT_BYTES,
        }
    }
}

/// Refuses a value above its limit.
pub(crate) fn at_most(what: &'static str, found: u64, limit: u64) -> crate::Result<()> {
    if found > limit { Err(crate::Error::Limit { what, found, limit }) } else { Ok(()) }
}
