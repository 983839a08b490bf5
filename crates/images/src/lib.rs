//! OCI images: packing a directory, pushing to and pulling from any registry, and the machine's image store.
//!
//! The parts, from the bottom up:
//! - [`Reference`] and [`Digest`]: how images and blobs are named.
//! - [`manifest`]: the documents of the OCI image specification, as far as they are needed here.
//! - [`Client`]: one registry over HTTP, each byte checked against its digest.
//! - [`pack`] and [`push`]: from a directory, a layout or archive, a daemon, another registry or a build to a registry.
//! - [`Pieces`]: hashes that let a cache verify a part of a blob.
//! - [`tree`], [`erofs`] and [`mount`]: all layers' files as one tree, and the tree as a mount.
//! - [`Store`]: a machine's images: files by their content, fetched once, ready to be mounted.
//!
//! This crate must not know about machines, schedulers or runtimes: it moves and keeps images.

mod client;
mod digest;
pub mod erofs;
mod error;
pub mod manifest;
pub mod mount;
#[cfg(test)]
mod mutations;
mod pack;
mod pieces;
mod progress;
mod push;
mod reference;
mod store;
pub mod tree;

pub use client::{
    BlobStream, Client, ClientStats, Credentials, ManifestInfo, Patience, PutOutcome, RawManifest, RemoteBlob,
};
pub use digest::{Algorithm, Digest, Hasher};
pub use error::{Error, Result};
pub use pack::{
    BlobFile, Build, BuildOptions, BuildSecret, Daemon, ImageSpec, PackOptions, PackedImage, Source, pack,
    pack_with,
};
pub use pieces::{PIECES_ANNOTATION, Pieces};
pub use progress::{Item, NoProgress, Progress, SharedProgress, Stage};
pub use push::{Journal, PushOptions, PushSummary, push, push_with};
pub use reference::{Reference, check_repository, check_tag};
pub use store::{
    Diff, Inspected, InspectedLayer, Options, PullClass, PullOptions, PullStats, PulledImage, Scrub,
    Scrubbed, Store, StoredImage, Usage, Verified, WarmImage,
};
