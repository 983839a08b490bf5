//! zstd:chunked layers: ordinary zstd layers to everyone else, with a table of contents that lists each file's chunks.
//!
//! This crate stands alone: it knows archives and compression, not registries, stores or images.
//!
//! # The format
//!
//! A blob is a sequence of zstd frames that decode to the layer's tar archive. Headers and padding lie in frames of
//! their own, and each chunk of a file starts a frame, so that a chunk can be fetched by its range and decoded alone.
//! Three skippable frames follow, which zstd ignores:
//!
//! | Frame | Content | Verified by |
//! |---|---|---|
//! | table of contents ([`Toc`]) | zstd of JSON: every entry's metadata, digests, and where its chunks lie | annotation `manifest-checksum` |
//! | tar-split ([`TarSplit`]) | zstd of JSON lines: every byte of the archive that is not a file's content | `tarSplitDigest` in the table |
//! | footer ([`Footer`]) | 64 bytes: where the other two lie | nothing: prefer the annotations |
//!
//! The layer's descriptor carries [`Annotations`]. A reader fetches table and tar-split by range, verifies both,
//! requires that they agree, takes the chunks that it lacks, and can still rebuild the exact archive.
//!
//! # Example
//!
//! ```
//! use zstd_chunked::{ChunkDecoder, Limits, Options, pack, read_tar_split, read_toc};
//!
//! let tar = [0; 1024]; // An empty archive.
//! let mut blob = Vec::new();
//! let packed = pack(&tar[..], &mut blob, &Options::default())?;
//!
//! // A puller gets the annotations with the manifest, and these ranges from the registry.
//! let annotations = packed.annotations.expect("nothing in it that a table can't describe");
//! let section = |range: std::ops::Range<u64>| &blob[range.start as usize..range.end as usize];
//! let limits = Limits::default();
//! let toc = read_toc(section(annotations.positions.toc.range()), &annotations, &limits)?;
//! let tar_split = section(annotations.positions.tar_split.range()).to_vec();
//! let tar_split = read_tar_split(tar_split, &toc, &annotations, &limits)?;
//! tar_split.check(&toc)?;
//!
//! let mut decoder = ChunkDecoder::new()?;
//! let mut bytes = Vec::new();
//! for file in toc.files() {
//!     for chunk in file.chunks() {
//!         decoder.decode(section(chunk.range.clone()), &chunk, &mut bytes)?;
//!     }
//! }
//! # Ok::<(), zstd_chunked::Error>(())
//! ```

mod annotations;
mod chunk;
mod digest;
mod error;
mod footer;
mod limits;
mod names;
mod pack;
mod tar;
mod tar_split;
mod time;
mod toc;

pub use annotations::{Annotations, Positions, Section};
pub use chunk::{ChunkDecoder, read_plain};
pub use digest::Digest;
pub use error::Error;
pub use footer::Footer;
pub use limits::Limits;
pub use names::clean_path;
pub use pack::{Options, Packed, Stats, pack};
pub use tar_split::{Span, SpanKind, TarSplit, read_tar_split};
pub use time::Time;
pub use toc::{Chunk, ChunkType, Entry, EntryType, File, Toc, read_toc};

/// A result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The README's examples are tested.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// First bytes of a skippable frame; zstd passes over it.
pub(crate) const SKIPPABLE_MAGIC: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];
/// Bytes before a skippable frame's content: magic and length.
pub(crate) const SKIPPABLE_HEADER: u64 = 8;
