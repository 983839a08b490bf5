//! Imports an ordinary layer (gzip, zstd or plain tar) while it arrives.
//!
//! One thread decompresses, one hashes the archive and reads its headers, and the pool hashes and writes the files;
//! bounded queues lie between them. Small files are collected in memory before they get a name; large ones are
//! written to a temporary file by a thread of their own.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use sha2::{Digest as _, Sha256};

use super::archive::Archive;
use super::dirty::Writing;
use super::entry::{self, Shape, Usage};
use super::objects::{ObjectId, Objects, Pins, write_with_holes};
use super::pool::{Pools, Priority, spawn};
use super::room::Expected;
use super::stream::ChannelReader;
use super::table::{self, Content, Kind, Table};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};

/// Files up to this size live in tables and in the image's metadata: as files of their own they would take a block
/// and an inode each, and creating them would be most of the time of a pull.
pub(super) const INLINE_MAX_BYTES: u64 = 1024;
/// Files up to this size are hashed and written from memory.
const MEMORY_MAX_BYTES: u64 = 8 << 20;
/// Small files go to the pool together, up to this many bytes.
const BATCH_BYTES: usize = 256 << 10;
/// What the decompressor gives at a time, and how many wait.
const BLOCK_BYTES: usize = 512 << 10;
const BLOCKS_WAITING: usize = 4;
/// Buffer between the download and the decompressor.
const INPUT_BYTES: usize = 128 << 10;
/// Largest zstd window: what the zstd tool accepts by default.
const WINDOW_LOG_MAX: u32 = 27;

/// What imports share.
pub(super) struct Target<'a> {
    pub(super) objects: &'a Arc<Objects>,
    pub(super) pins: &'a Arc<Pins>,
    pub(super) pools: &'a Pools,
    pub(super) priority: &'a Priority,
    pub(super) expected: &'a Arc<Expected>,
    /// Held by whatever writes.
    pub(super) writing: &'a Arc<Writing>,
}

/// What an import did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) files: u64,
    /// Bytes of objects that were written.
    pub(super) bytes: u64,
}

/// A file's result, by its entry's index.
type Finished = Result<(usize, table::File, u64)>;

/// Imports the layer that `reader` gives, whose blob has `layer_bytes`; its archive must have the digest `diff_id`.
/// Blocks.
pub(super) fn import(
    reader: ChannelReader,
    layer_bytes: u64,
    diff_id: &Digest,
    target: &Target<'_>,
) -> Result<(Table, Written)> {
    let (blocks, decompressed) = sync_channel(BLOCKS_WAITING);
    let priority = target.priority.clone();
    spawn(target.priority.now(), "images-decode", move || decompress(reader, &blocks, &priority))?;
    let input =
        Blocks { receiver: decompressed, current: Vec::new(), at: 0, hasher: diff_id.hasher(), end: false };
    let mut archive = Archive::new(input);
    let (finished, results) = channel();
    let mut files = Files { target, finished, batch: Vec::new(), batch_bytes: 0 };
    let (mut table, mut usage) = (Table::default(), Usage::default());
    let (mut written, mut expected) = (Written::default(), 0);
    let contents_max = entry::contents_max(layer_bytes);
    let failed = |e: io::Error| invalid_or_io(e);
    while let Some(found) = archive.next_entry().map_err(failed)? {
        match entry::read(found)? {
            Shape::Entry(entry) => {
                usage.add(&entry, 0, contents_max)?;
                table.entries.push(entry);
            }
            Shape::File(entry, size) => {
                usage.add(&entry, size, contents_max)?;
                if size <= INLINE_MAX_BYTES {
                    usage.memory(size)?;
                }
                files.file(table.entries.len(), size, &mut archive)?;
                table.entries.push(entry);
                expected += 1;
            }
        }
        target.priority.keep_up();
        // A write that failed ends the import at once.
        while let Ok(done) = results.try_recv() {
            settle(&mut table, done, &mut written)?;
        }
    }
    files.flush()?;
    drop(files);
    // What follows the archive's end (padding) counts for the digests too.
    let found = archive.into_reader().finish().map_err(failed)?;
    for done in results {
        settle(&mut table, done, &mut written)?;
    }
    if written.files != expected {
        return Err(Error::Cancelled);
    }
    if found != *diff_id {
        let what = "the archive inside a layer".to_owned();
        return Err(Error::DigestMismatch { what, expected: diff_id.clone(), found });
    }
    Ok((table, written))
}

fn settle(table: &mut Table, done: Finished, written: &mut Written) -> Result<()> {
    let (index, file, bytes) = done?;
    written.files += 1;
    written.bytes += bytes;
    if let Some(entry) = table.entries.get_mut(index) {
        entry.kind = Kind::File(file);
    }
    Ok(())
}

/// Hands files' contents over to the pool.
struct Files<'a> {
    target: &'a Target<'a>,
    finished: Sender<Finished>,
    batch: Vec<(usize, Vec<u8>)>,
    batch_bytes: usize,
}

impl Files<'_> {
    fn file(&mut self, index: usize, size: u64, contents: &mut impl Read) -> Result<()> {
        if size > MEMORY_MAX_BYTES {
            return self.large(index, size, contents);
        }
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len];
        contents.read_exact(&mut bytes).map_err(invalid_or_io)?;
        self.batch_bytes += len;
        self.batch.push((index, bytes));
        if self.batch_bytes >= BATCH_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        if batch.is_empty() {
            return Ok(());
        }
        let (objects, pins) = (self.target.objects.clone(), self.target.pins.clone());
        let (finished, writing) = (self.finished.clone(), self.target.writing.clone());
        let expected = self.target.expected.clone();
        self.target.pools.of(self.target.priority.now()).run(move |_| {
            let _writing = writing;
            for (index, bytes) in batch {
                let done = store_small(&objects, &pins, ObjectId::of(&bytes), bytes, Vec::new());
                expected.wrote(done.as_ref().map_or(0, |(_, written)| *written));
                // Nobody listens where the import has failed already.
                let _ = finished.send(done.map(|(file, written)| (index, file, written)));
            }
        })
    }

    fn large(&mut self, index: usize, size: u64, contents: &mut impl Read) -> Result<()> {
        let file = self.target.objects.temporary()?;
        let (blocks, waiting) = sync_channel::<Vec<u8>>(BLOCKS_WAITING);
        let (objects, pins) = (self.target.objects.clone(), self.target.pins.clone());
        let (finished, writing) = (self.finished.clone(), self.target.writing.clone());
        let expected = self.target.expected.clone();
        let writer = spawn(self.target.priority.now(), "images-large", move || {
            let _writing = writing;
            let done = write_large(&objects, &pins, &expected, file, size, &waiting);
            let _ = finished.send(done.map(|(file, written)| (index, file, written)));
        })?;
        let mut left = size;
        while left > 0 {
            let mut block = vec![0; BLOCK_BYTES.min(usize::try_from(left).unwrap_or(usize::MAX))];
            contents.read_exact(&mut block).map_err(invalid_or_io)?;
            left -= block.len() as u64;
            if blocks.send(block).is_err() {
                // The writer gave up, and said why.
                break;
            }
        }
        drop(blocks);
        // One at a time: each has its thread and its buffers.
        let _ = writer.join();
        Ok(())
    }
}

/// Keeps a file that is in memory and was hashed; its bytes become inline content or an object.
pub(super) fn store_small(
    objects: &Objects,
    pins: &Pins,
    id: ObjectId,
    bytes: Vec<u8>,
    chunks: Vec<table::Chunk>,
) -> Result<(table::File, u64)> {
    let size = bytes.len() as u64;
    if size <= INLINE_MAX_BYTES {
        return Ok((table::File { id, size, content: Content::Inline(bytes) }, 0));
    }
    pins.add(&id);
    let written = if objects.put(&id, &bytes)? { size } else { 0 };
    Ok((table::File { id, size, content: Content::Object(chunks) }, written))
}

fn write_large(
    objects: &Objects,
    pins: &Pins,
    expected: &Expected,
    file: tempfile::NamedTempFile,
    size: u64,
    blocks: &Receiver<Vec<u8>>,
) -> Result<(table::File, u64)> {
    let mut hasher = Sha256::new();
    let mut at = 0;
    let failed = |e| Error::io("writing", file.path())(e);
    while let Ok(block) = blocks.recv() {
        hasher.update(&block);
        write_with_holes(file.as_file(), at, &block).map_err(failed)?;
        expected.wrote(block.len() as u64);
        at += block.len() as u64;
    }
    if at != size {
        return Err(Error::Cancelled);
    }
    file.as_file().set_len(size).map_err(failed)?;
    let id = ObjectId(hasher.finalize().into());
    pins.add(&id);
    let written = if objects.keep(&id, size, file)? { size } else { 0 };
    Ok((table::File { id, size, content: Content::Object(Vec::new()) }, written))
}

/// Decompressed blocks, or why there are no more; an empty block is the end.
type Block = io::Result<Vec<u8>>;

fn decompress(reader: ChannelReader, blocks: &SyncSender<Block>, priority: &Priority) {
    let result = decompressor(reader).and_then(|mut input| {
        loop {
            priority.keep_up();
            let mut block = vec![0; BLOCK_BYTES];
            let mut filled = 0;
            while filled < block.len() {
                match input.read(&mut block[filled..]) {
                    Ok(0) => break,
                    Ok(read) => filled += read,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
            block.truncate(filled);
            let end = filled == 0;
            if blocks.send(Ok(block)).is_err() || end {
                return Ok(());
            }
        }
    });
    if let Err(e) = result {
        let _ = blocks.send(Err(e));
    }
}

/// Tells the compression by the first bytes, since media types are not always right about it.
fn decompressor(reader: ChannelReader) -> io::Result<Box<dyn Read>> {
    let mut reader = BufReader::with_capacity(INPUT_BYTES, reader);
    Ok(match reader.fill_buf()? {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
        // A frame, or one of the sixteen skippable frames.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let mut decoder = zstd::Decoder::with_buffer(reader)?;
            decoder.window_log_max(WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
        _ => Box::new(reader),
    })
}

/// Reads what was decompressed, and hashes it.
struct Blocks {
    receiver: Receiver<Block>,
    current: Vec<u8>,
    at: usize,
    hasher: Hasher,
    end: bool,
}

impl Blocks {
    fn fill(&mut self) -> io::Result<()> {
        if self.at < self.current.len() || self.end {
            return Ok(());
        }
        let given_up = || io::Error::new(io::ErrorKind::UnexpectedEof, "the decompressor was given up");
        self.current = self.receiver.recv().map_err(|_| given_up())??;
        self.at = 0;
        self.end = self.current.is_empty();
        self.hasher.update(&self.current);
        Ok(())
    }

    /// The digest of everything, to the end.
    fn finish(mut self) -> io::Result<Digest> {
        while !self.end {
            self.at = self.current.len();
            self.fill()?;
        }
        Ok(self.hasher.finish())
    }
}

impl Read for Blocks {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.fill()?;
        let rest = &self.current[self.at..];
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        self.at += len;
        Ok(len)
    }
}

/// What is wrong with the archive or its compression, or what was wrong with reading it.
fn invalid_or_io(e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::Other => {
            Error::InvalidLayer { reason: e.to_string() }
        }
        _ => Error::io("reading", "a layer")(e),
    }
}
