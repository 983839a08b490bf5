//! Plans a partial pull: which of a layer's files and chunks are here, and what to fetch in which requests.
//!
//! A table's chunks lie in the blob in the archive's order, so the plan is a walk: files become pieces of work for the
//! pool, and what they lack becomes parts of the blob, near ones together. Work and parts keep the archive's order,
//! which is the order in which the archive is hashed.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use zstd_chunked::{EntryType, Toc};

use super::Inner;
use super::entry::{self, Usage};
use super::import::INLINE_MAX_BYTES;
use super::known::{Found, Lookup};
use super::objects::{ObjectId, Pins};
use super::table::{self, Content, Entry, Kind};
use crate::error::{Error, Result};

/// Ranges with at most this much between them are fetched together: a request costs more than these bytes.
const GAP_BYTES: u64 = 16 << 10;
/// Most bytes of one request.
const PART_BYTES: u64 = 4 << 20;
/// Files up to this size are put together in memory.
const MEMORY_MAX_BYTES: u64 = 8 << 20;
/// Small files go to the pool together, up to this many bytes and files.
const BATCH_BYTES: u64 = 1 << 20;
const BATCH_FILES: usize = 128;
/// A larger file is worked on in pieces of about this size.
const SEGMENT_BYTES: u64 = 4 << 20;
/// What file systems give files in, usually.
const DISK_BLOCK_BYTES: u64 = 4 << 10;
/// Largest chunk, which is decoded in memory. Other tools' chunks have 64 KiB on average.
pub(super) const CHUNK_MAX_BYTES: u64 = 16 << 20;

/// Where a piece of a file comes from.
#[derive(Clone, Debug)]
pub(super) enum From {
    /// A frame in a part: the part's number and the range in the part.
    Part(usize, Range<usize>),
    /// Part of an object that is here.
    Object {
        object: ObjectId,
        offset: u64,
    },
    /// Bytes of a table that is here.
    Inline(Arc<[u8]>),
    Zeros,
}

/// A piece of a file: one chunk.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) size: u64,
    pub(super) id: ObjectId,
    pub(super) from: From,
}

/// A file that isn't here.
#[derive(Clone, Debug)]
pub(super) struct Missing {
    /// Its entry in the table.
    pub(super) entry: usize,
    pub(super) id: ObjectId,
    pub(super) size: u64,
    pub(super) chunks: Vec<table::Chunk>,
    pub(super) pieces: Vec<Piece>,
}

/// What one thread does at a time.
#[derive(Debug)]
pub(super) enum Work {
    /// Whole files, put together in memory.
    Files(Vec<Missing>),
    /// A part of a large file: of which (by entry), its size, and the pieces.
    Segment { first: bool, file: Missing },
}

/// How the contents of a file get into the archive's hash.
#[derive(Debug)]
pub(super) enum Source {
    Object(ObjectId),
    Inline(Arc<[u8]>),
    /// From the work, in its order.
    Work,
    /// From the work, which also has to be hashed and kept as this object.
    Large(usize, Vec<table::Chunk>),
}

/// A file with contents, in the archive's order.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) source: Source,
    pub(super) id: ObjectId,
}

#[derive(Debug, Default)]
pub(super) struct Plan {
    /// All entries; those of files that are missing get their kind when they are written.
    pub(super) entries: Vec<Entry>,
    pub(super) files: Vec<Planned>,
    pub(super) work: Vec<Work>,
    /// Ranges of the blob to fetch.
    pub(super) parts: Vec<Range<u64>>,
    pub(super) reused: u64,
    /// Objects that contents are taken from.
    pub(super) used: Vec<ObjectId>,
}

/// Plans a layer. None where it can't be pulled in parts, for a reason that isn't hostile.
pub(super) fn plan(inner: &Inner, pins: &Pins, toc: &Toc, layer_bytes: u64) -> Result<Option<Plan>> {
    let mut planner = Planner {
        inner,
        pins,
        known: inner.known()?,
        plan: Plan::default(),
        batch: Vec::new(),
        batch_bytes: 0,
        coming: HashSet::new(),
    };
    let (mut usage, contents_max) = (Usage::default(), entry::contents_max(layer_bytes));
    let mut files = toc.files().peekable();
    for (at, found) in toc.entries.iter().enumerate() {
        if found.kind == EntryType::Chunk {
            continue;
        }
        let file = files.next_if(|file| file.index == at);
        let (index, mut entry) = (planner.plan.entries.len(), table_entry(found)?);
        usage.add(&entry, if file.is_some() { found.size } else { 0 }, contents_max)?;
        let Some(file) = file else {
            planner.plan.entries.push(entry);
            continue;
        };
        if found.size <= INLINE_MAX_BYTES {
            usage.memory(found.size)?;
        }
        if found.size == 0 {
            let content = Content::Inline(Vec::new());
            entry.kind = Kind::File(table::File { id: ObjectId::of(b""), size: 0, content });
            planner.plan.entries.push(entry);
            continue;
        }
        // Checked by the table's reader: a file with contents has a digest.
        let Some(digest) = found.digest else { continue };
        let (id, size) = (ObjectId::from(digest), found.size);
        let pieces: Vec<zstd_chunked::Chunk> = file.chunks().collect();
        for piece in &pieces {
            let length = piece.range.end - piece.range.start;
            if piece.size > CHUNK_MAX_BYTES && !piece.zeros {
                return Ok(None);
            }
            if length > piece.size.saturating_mul(2).saturating_add(64 << 10) {
                let reason = format!("a chunk of {} bytes takes {length}", piece.size);
                return Err(entry::unsafe_entry(found.name.as_bytes(), &reason));
            }
        }
        let chunks: Vec<table::Chunk> = match pieces.len() {
            1 => Vec::new(),
            _ => pieces.iter().map(|p| table::Chunk { size: p.size, id: p.digest.into() }).collect(),
        };
        let source = planner.here(id, size, &chunks, &mut entry);
        planner.plan.entries.push(entry);
        let source = match source {
            Some(source) => source,
            None => {
                let mut missing = Missing { entry: index, id, size, chunks, pieces: Vec::new() };
                for piece in pieces {
                    missing.pieces.push(planner.piece(piece)?);
                }
                planner.missing(missing)
            }
        };
        planner.plan.files.push(Planned { name: found.name.clone(), size, source, id });
    }
    planner.flush();
    Ok(Some(planner.plan))
}

struct Planner<'a> {
    inner: &'a Inner,
    pins: &'a Pins,
    known: Lookup<'a>,
    plan: Plan,
    batch: Vec<Missing>,
    batch_bytes: u64,
    /// Objects that an earlier entry of the layer brings.
    coming: HashSet<ObjectId>,
}

impl Planner<'_> {
    /// A file that is here already.
    fn here(
        &mut self,
        id: ObjectId,
        size: u64,
        chunks: &[table::Chunk],
        entry: &mut Entry,
    ) -> Option<Source> {
        let source = if size <= INLINE_MAX_BYTES {
            match self.known.find(&id, size) {
                Some(Found::Inline(bytes)) => Source::Inline(bytes),
                _ => return None,
            }
        } else {
            if !self.coming.contains(&id) {
                self.pins.add(&id);
                if !self.inner.objects.has(&id, size) {
                    self.coming.insert(id);
                    return None;
                }
                self.plan.used.push(id);
            }
            Source::Object(id)
        };
        let content = match &source {
            Source::Inline(bytes) => Content::Inline(bytes.to_vec()),
            _ => Content::Object(chunks.to_vec()),
        };
        entry.kind = Kind::File(table::File { id, size, content });
        self.plan.reused += size;
        Some(source)
    }

    fn piece(&mut self, chunk: zstd_chunked::Chunk) -> Result<Piece> {
        let (id, size) = (ObjectId::from(chunk.digest), chunk.size);
        let local = match self.known.find(&id, size).filter(|_| !chunk.zeros) {
            Some(Found::Inline(bytes)) => Some(From::Inline(bytes)),
            Some(Found::Object { object, object_size, offset }) => {
                self.pins.add(&object);
                self.inner.objects.has(&object, object_size).then(|| {
                    self.plan.used.push(object);
                    From::Object { object, offset }
                })
            }
            None => None,
        };
        let from = match local {
            Some(from) => {
                self.plan.reused += size;
                from
            }
            None if chunk.zeros => From::Zeros,
            None => self.fetch(chunk.range)?,
        };
        Ok(Piece { offset: chunk.file_offset, size, id, from })
    }

    /// Adds a range to the last part, or to a new one.
    fn fetch(&mut self, range: Range<u64>) -> Result<From> {
        let joins = self.plan.parts.last().is_some_and(|part| {
            range.start >= part.end
                && range.start - part.end <= GAP_BYTES
                && range.end - part.start <= PART_BYTES
        });
        if !joins {
            self.plan.parts.push(range.start..range.start);
        }
        let number = self.plan.parts.len() - 1;
        let part = &mut self.plan.parts[number];
        part.end = range.end;
        let at = |offset: u64| usize::try_from(offset - part.start).map_err(|_| Error::Cancelled);
        Ok(From::Part(number, at(range.start)?..at(range.end)?))
    }

    fn missing(&mut self, file: Missing) -> Source {
        if file.size > MEMORY_MAX_BYTES {
            self.flush();
            return self.large(file);
        }
        self.batch_bytes += file.size;
        self.batch.push(file);
        if self.batch_bytes >= BATCH_BYTES || self.batch.len() >= BATCH_FILES {
            self.flush();
        }
        Source::Work
    }

    fn flush(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        if !batch.is_empty() {
            self.plan.work.push(Work::Files(batch));
        }
    }

    fn large(&mut self, mut file: Missing) -> Source {
        let (mut segment, mut bytes, mut first) = (Vec::new(), 0, true);
        let pieces = std::mem::take(&mut file.pieces);
        let mut pieces = pieces.into_iter().peekable();
        let entry = file.entry;
        while let Some(piece) = pieces.next() {
            bytes += piece.size;
            segment.push(piece);
            let more = pieces.peek().map(|next| next.size);
            // A run of zeros takes no memory, but its length is not bounded: it is a segment of its own.
            let is_run = |size: u64| size > CHUNK_MAX_BYTES;
            if more.is_none_or(|next| bytes + next > SEGMENT_BYTES || is_run(next)) || is_run(bytes) {
                let pieces = std::mem::take(&mut segment);
                let part = Missing { entry, id: file.id, size: file.size, chunks: Vec::new(), pieces };
                self.plan.work.push(Work::Segment { first, file: part });
                (bytes, first) = (0, false);
            }
        }
        Source::Large(entry, file.chunks)
    }
}

impl Plan {
    /// Bytes that this writes to the disk, at most.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.work.iter().map(Work::disk_bytes).sum()
    }
}

impl Work {
    fn files(&self) -> &[Missing] {
        match self {
            Work::Files(files) => files,
            Work::Segment { file, .. } => std::slice::from_ref(file),
        }
    }

    pub(super) fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.files().iter().flat_map(|file| &file.pieces)
    }

    /// Bytes that this writes to the disk, at most.
    pub(super) fn disk_bytes(&self) -> u64 {
        let objects = self.files().iter().filter(|file| file.size > INLINE_MAX_BYTES);
        let data = |piece: &&Piece| !matches!(piece.from, From::Zeros);
        objects
            .map(|file| {
                file.pieces
                    .iter()
                    .filter(data)
                    .map(|piece| piece.size)
                    .sum::<u64>()
                    .next_multiple_of(DISK_BLOCK_BYTES)
            })
            .sum()
    }

    /// The part that must be here last.
    pub(super) fn last_part(&self) -> Option<usize> {
        self.pieces().filter_map(Piece::part).max()
    }

    /// The first part that is needed: none before it is any more.
    pub(super) fn first_part(&self) -> Option<usize> {
        self.pieces().filter_map(Piece::part).min()
    }
}

impl Piece {
    fn part(&self) -> Option<usize> {
        match self.from {
            From::Part(number, _) => Some(number),
            _ => None,
        }
    }
}

fn table_entry(found: &zstd_chunked::Entry) -> Result<Entry> {
    let path = found.path().map_err(Error::Table)?;
    let is_overlay = |name: &str| name.starts_with("trusted.overlay.") || name.starts_with("user.overlay.");
    let kind = match found.kind {
        EntryType::Symlink => Kind::Symlink(found.link_name.clone().into_bytes()),
        EntryType::Hardlink => match found.hardlink_path().map_err(Error::Table)? {
            Some(target) if !target.is_empty() => Kind::HardLink(target.into_bytes()),
            _ => return Err(entry::unsafe_entry(path.as_bytes(), "a hard link to the layer's root")),
        },
        EntryType::Char => Kind::CharDevice(found.dev_major, found.dev_minor),
        EntryType::Block => Kind::BlockDevice(found.dev_major, found.dev_minor),
        EntryType::Fifo => Kind::Fifo,
        EntryType::Dir | EntryType::Reg | EntryType::Chunk => Kind::Directory,
    };
    let time = found.mod_time.unwrap_or_default();
    Ok(Entry {
        path: path.into_bytes(),
        mode: found.mode & 0o7777,
        uid: found.uid,
        gid: found.gid,
        mtime_s: time.secs,
        mtime_ns: time.nanos,
        xattrs: found
            .xattrs
            .iter()
            .filter(|(name, _)| !is_overlay(name))
            .map(|(name, value)| (name.clone().into_bytes(), value.clone()))
            .collect(),
        kind,
    })
}
