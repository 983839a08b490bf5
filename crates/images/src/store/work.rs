//! What the pool does for a partial pull: puts files together from their pieces, verifies and writes them.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::Bytes;

use super::import::INLINE_MAX_BYTES;
use super::objects::{ObjectId, Objects, write_with_holes};
use super::plan::{CHUNK_MAX_BYTES, From, Missing, Work};
use super::pool::Worker;
use super::table::{self, Content};
use crate::error::{Error, Result};

/// Work whose parts are here.
pub(super) enum Ready {
    Files(Vec<ReadyFile>),
    Segment { first: bool, size: u64, file: ReadyFile },
}

pub(super) struct ReadyFile {
    entry: usize,
    id: ObjectId,
    size: u64,
    chunks: Vec<table::Chunk>,
    pieces: Vec<ReadyPiece>,
}

struct ReadyPiece {
    offset: u64,
    size: u64,
    id: ObjectId,
    from: ReadyFrom,
}

enum ReadyFrom {
    Frame(Bytes),
    Object(ObjectId, u64),
    Inline(Arc<[u8]>),
    Zeros,
}

/// What a piece of work gave.
pub(super) struct Done {
    /// Contents in the archive's order.
    pub(super) contents: Vec<Run>,
    /// Files that are complete: entry, what the table says of it, bytes written.
    pub(super) files: Vec<(usize, table::File, u64)>,
}

/// A run of contents.
pub(super) enum Run {
    Bytes(Arc<Vec<u8>>),
    Zeros(u64),
}

impl Ready {
    /// `parts` begins with part number `first`.
    pub(super) fn new(work: Work, parts: &VecDeque<Bytes>, first: usize) -> Result<Ready> {
        let file = |missing: Missing| -> Result<ReadyFile> {
            let mut pieces = Vec::with_capacity(missing.pieces.len());
            for piece in missing.pieces {
                let from = match piece.from {
                    From::Part(number, range) => {
                        let part = number.checked_sub(first).and_then(|at| parts.get(at));
                        let part = part.filter(|part| range.end <= part.len()).ok_or(Error::Cancelled)?;
                        ReadyFrom::Frame(part.slice(range))
                    }
                    From::Object { object, offset } => ReadyFrom::Object(object, offset),
                    From::Inline(bytes) => ReadyFrom::Inline(bytes),
                    From::Zeros => ReadyFrom::Zeros,
                };
                pieces.push(ReadyPiece { offset: piece.offset, size: piece.size, id: piece.id, from });
            }
            let Missing { entry, id, size, chunks, .. } = missing;
            Ok(ReadyFile { entry, id, size, chunks, pieces })
        };
        Ok(match work {
            Work::Files(files) => Ready::Files(files.into_iter().map(file).collect::<Result<_>>()?),
            Work::Segment { first, file: missing } => {
                Ready::Segment { first, size: missing.size, file: file(missing)? }
            }
        })
    }
}

/// Does a piece of work. `out` is the large file that a segment belongs to.
pub(super) fn run(worker: &mut Worker, objects: &Objects, ready: Ready, out: Option<&File>) -> Result<Done> {
    match ready {
        Ready::Files(files) => {
            let mut done =
                Done { contents: Vec::with_capacity(files.len()), files: Vec::with_capacity(files.len()) };
            for file in files {
                let mut bytes = Vec::with_capacity(usize::try_from(file.size).unwrap_or(0));
                for piece in &file.pieces {
                    append(worker, objects, piece, &mut bytes)?;
                }
                let found = ObjectId::of(&bytes);
                if found != file.id {
                    return Err(mismatch("a file of a layer", file.id, found));
                }
                let written = if file.size <= INLINE_MAX_BYTES {
                    let content = Content::Inline(bytes.clone());
                    done.files.push((file.entry, table::File { id: file.id, size: file.size, content }, 0));
                    done.contents.push(Run::Bytes(Arc::new(bytes)));
                    continue;
                } else {
                    objects.put(&file.id, &bytes)?
                };
                let content = Content::Object(file.chunks);
                let written = if written { file.size } else { 0 };
                done.files.push((file.entry, table::File { id: file.id, size: file.size, content }, written));
                done.contents.push(Run::Bytes(Arc::new(bytes)));
            }
            Ok(done)
        }
        Ready::Segment { file, .. } => {
            let out = out.ok_or(Error::Cancelled)?;
            let mut done = Done { contents: Vec::new(), files: Vec::new() };
            let failed = |e| Error::io("writing", "a large file of a layer")(e);
            let mut bytes = Vec::new();
            let mut start = None;
            for piece in &file.pieces {
                if matches!(piece.from, ReadyFrom::Zeros) && piece.size > CHUNK_MAX_BYTES {
                    // Alone in its segment, and a hole in the file, whose length is set.
                    done.contents.push(Run::Zeros(piece.size));
                    continue;
                }
                start.get_or_insert(piece.offset);
                append(worker, objects, piece, &mut bytes)?;
            }
            if let Some(start) = start {
                write_with_holes(out, start, &bytes).map_err(failed)?;
                done.contents.push(Run::Bytes(Arc::new(bytes)));
            }
            Ok(done)
        }
    }
}

/// Appends a piece; its own digest is checked only where it comes from this store.
fn append(worker: &mut Worker, objects: &Objects, piece: &ReadyPiece, bytes: &mut Vec<u8>) -> Result<()> {
    let size = usize::try_from(piece.size).map_err(|_| Error::Cancelled)?;
    let at = bytes.len();
    match &piece.from {
        ReadyFrom::Zeros => {
            bytes.resize(at + size, 0);
            return Ok(());
        }
        ReadyFrom::Inline(inline) => bytes.extend_from_slice(inline),
        ReadyFrom::Object(object, offset) => {
            bytes.resize(at + size, 0);
            let read = objects.open_object(object).and_then(|file| {
                file.read_exact_at(&mut bytes[at..], *offset).map_err(Error::io("reading", "an object"))
            });
            if let Err(error) = read {
                tracing::warn!(?object, %error, "can't read a chunk of the store");
                return Err(Error::Damaged { what: format!("object {object:?}") });
            }
        }
        ReadyFrom::Frame(frame) => {
            bytes.resize(at + size, 0);
            let zstd = worker.zstd.as_mut().ok_or(Error::Cancelled)?;
            let decoded = zstd.decompress_to_buffer(frame, &mut bytes[at..]);
            return match decoded {
                Ok(found) if found == size => Ok(()),
                Ok(found) => Err(Error::SizeMismatch {
                    what: "a chunk of a layer".to_owned(),
                    expected: piece.size,
                    found: found as u64,
                }),
                Err(e) => Err(Error::InvalidLayer { reason: format!("a chunk can't be decoded: {e}") }),
            };
        }
    }
    let found = ObjectId::of(&bytes[at..]);
    if bytes.len() - at != size || found != piece.id {
        return Err(Error::Damaged { what: format!("the chunk {:?} in the store", piece.id) });
    }
    Ok(())
}

pub(super) fn mismatch(what: &str, expected: ObjectId, found: ObjectId) -> Error {
    Error::DigestMismatch { what: what.to_owned(), expected: expected.digest(), found: found.digest() }
}
