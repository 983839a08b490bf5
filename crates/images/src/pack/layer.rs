//! One layer: from a tar archive, compressed or not, to a zstd:chunked blob in a file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::pieces::{PIECES_ANNOTATION, PieceHasher, Pieces};
use crate::progress::{Item, SharedProgress};

/// Read and write size of layers.
const BUFFER_BYTES: usize = 256 << 10;
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// The last three bytes of any skippable frame's magic, with which a zstd stream may begin too.
const SKIPPABLE_MAGIC: &[u8] = &[0x2a, 0x4d, 0x18];

/// A layer that was written.
#[derive(Clone, Debug)]
pub(super) struct PackedLayer {
    /// Digest of the blob.
    pub(super) digest: Digest,
    /// Size of the blob.
    pub(super) size: u64,
    /// Digest of the archive inside.
    pub(super) diff_id: Digest,
    /// What its descriptor says beyond that.
    pub(super) annotations: BTreeMap<String, String>,
    /// The file that holds it.
    pub(super) path: PathBuf,
    /// Where in that file it starts.
    pub(super) offset: u64,
}

/// Ends the work of other threads when it is dropped: nobody waits for their result any more.
#[derive(Debug, Default)]
pub(super) struct Guard(Arc<AtomicBool>);

impl Guard {
    pub(super) fn watch(&self) -> Watch {
        Watch(self.0.clone())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Knows whether the guard was dropped.
#[derive(Clone, Debug)]
pub(super) struct Watch(Arc<AtomicBool>);

impl Watch {
    pub(super) fn check(&self) -> io::Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(io::Error::other("cancelled")) } else { Ok(()) }
    }
}

/// Reads a source: counted, told, hashed where asked, and ended when nobody waits any more.
pub(super) struct SourceReader<R> {
    inner: R,
    hasher: Option<Hasher>,
    item: Item,
    progress: SharedProgress,
    watch: Watch,
}

impl<R: Read> SourceReader<R> {
    pub(super) fn new(
        inner: R,
        hasher: Option<Hasher>,
        item: &Item,
        progress: &SharedProgress,
        watch: &Watch,
    ) -> Self {
        let (item, progress, watch) = (item.clone(), progress.clone(), watch.clone());
        SourceReader { inner, hasher, item, progress, watch }
    }

    /// Compares what was read with the digest that it should have, where it was hashed.
    pub(super) fn verify(self, expected: &Digest) -> Result<()> {
        match self.hasher.map(Hasher::finish).filter(|found| found != expected) {
            None => Ok(()),
            Some(found) => {
                let what = format!("layer {expected}");
                Err(Error::DigestMismatch { what, expected: expected.clone(), found })
            }
        }
    }
}

impl<R: Read> Read for SourceReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.watch.check()?;
        let read = self.inner.read(buffer)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..read]);
        }
        self.progress.advanced(&self.item, read as u64);
        Ok(read)
    }
}

/// What a layer that is packed again must be.
pub(super) struct Expected<'a> {
    /// Digest of the blob as it was.
    pub(super) digest: &'a Digest,
    /// Digest of the archive inside, as the image's configuration has it.
    pub(super) diff_id: Option<&'a Digest>,
}

/// Packs a layer again that was packed otherwise, and verifies it on the way.
pub(super) fn repack<R: Read>(
    source: SourceReader<R>,
    expected: &Expected<'_>,
    to: &Path,
) -> Result<PackedLayer> {
    let mut source = BufReader::with_capacity(BUFFER_BYTES, source);
    let packed = {
        let mut tar = decoder(&mut source).map_err(Error::io("reading the layer for", to))?;
        pack_tar(&mut tar, to)?
    };
    // What follows the archive belongs to the blob.
    io::copy(&mut source, &mut io::sink()).map_err(Error::io("reading the layer for", to))?;
    source.into_inner().verify(expected.digest)?;
    if let Some(diff_id) = expected.diff_id.filter(|diff_id| **diff_id != packed.diff_id) {
        let what = format!("the archive in layer {}", expected.digest);
        return Err(Error::DigestMismatch { what, expected: diff_id.clone(), found: packed.diff_id });
    }
    Ok(packed)
}

/// Undoes the compression that the first bytes show.
fn decoder<'a, R: BufRead + 'a>(source: &'a mut R) -> io::Result<Box<dyn Read + 'a>> {
    let magic = source.fill_buf()?;
    if magic.starts_with(GZIP_MAGIC) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(source)));
    }
    if magic.starts_with(ZSTD_MAGIC) || magic.get(1..4) == Some(SKIPPABLE_MAGIC) {
        return Ok(Box::new(zstd::Decoder::with_buffer(source)?));
    }
    Ok(Box::new(source))
}

/// Whether a layer is a plain archive, by its first bytes.
pub(super) fn is_plain(first: &[u8]) -> bool {
    !(first.starts_with(GZIP_MAGIC)
        || first.starts_with(ZSTD_MAGIC)
        || first.get(1..4) == Some(SKIPPABLE_MAGIC))
}

/// Packs the archive that `tar` gives into the file `to`.
pub(super) fn pack_tar(tar: &mut dyn Read, to: &Path) -> Result<PackedLayer> {
    let file = File::create(to).map_err(Error::io("creating", to))?;
    let mut blob = BlobWriter {
        inner: BufWriter::with_capacity(BUFFER_BYTES, file),
        pieces: PieceHasher::new(Pieces::piece_bytes_for(0)),
        written: 0,
    };
    let packed =
        zstd_chunked::pack(tar, &mut blob, &zstd_chunked::Options::default()).map_err(|e| refused(e, to))?;
    if let Some(why) = &packed.plain {
        tracing::info!(layer = %packed.diff_id, why, "packed as an ordinary zstd layer");
    }
    let mut annotations = packed.annotations.map(|annotations| annotations.to_map()).unwrap_or_default();
    annotations.insert(PIECES_ANNOTATION.to_owned(), blob.finish(to)?.to_string());
    Ok(PackedLayer {
        digest: digest(packed.digest)?,
        size: packed.size,
        diff_id: digest(packed.diff_id)?,
        annotations,
        path: to.to_owned(),
        offset: 0,
    })
}

fn digest(digest: zstd_chunked::Digest) -> Result<Digest> {
    digest.to_string().parse()
}

fn refused(error: zstd_chunked::Error, to: &Path) -> Error {
    match error {
        zstd_chunked::Error::Io { source, .. } => Error::io("packing", to)(source),
        other => Error::Unsupported {
            what: format!("the layer ({other})"),
            help: "--keep-layers pushes an image's layers as they are".to_owned(),
        },
    }
}

/// The blob's file, hashed by pieces as it is written.
struct BlobWriter {
    inner: BufWriter<File>,
    pieces: PieceHasher,
    written: u64,
}

impl BlobWriter {
    fn finish(mut self, path: &Path) -> Result<Pieces> {
        self.inner.flush().map_err(Error::io("writing", path))?;
        let pieces = self.pieces.finish();
        if pieces.piece_bytes() == Pieces::piece_bytes_for(self.written) {
            return Ok(pieces);
        }
        // Only now is it known that the blob is one of the largest, which have larger pieces.
        let mut file = File::open(path).map_err(Error::io("reading", path))?;
        Pieces::read(&mut file, self.written).map_err(Error::io("reading", path))
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.pieces.update(&bytes[..written]);
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
