//! zstd:chunked layers: ordinary zstd layers to everyone else, with a table of contents that lists each file's chunks.
//!
//! This crate stands alone: it knows archives and compression, not registries, stores or images.

mod toc;

pub use toc::{ChunkType, Entry, EntryType, Toc};
