//! Blobs from upstream, piece by piece.

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::Duration;

use anyplace_images::{Digest, Reference};
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::remote::{Kind, Remote};
use super::{Cache, Failure, Inner};
use crate::cache::counters::CacheCounters;
use crate::cache::layout::Layout;
use crate::cache::pieces::Blob;
use crate::errors::Answer;
use crate::server::App;

/// Pieces that are got ready while one is sent: enough to hide the time to the upstream, few enough for memory.
const READ_AHEAD: usize = 3;
/// How long an upstream may take to begin with a piece: another cache may have to fetch that piece first.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(20);
/// The same for a blob whose pieces nobody says: another cache may have to fetch all of it first.
pub(super) const BEGIN_WHOLE_TIMEOUT: Duration = Duration::from_secs(300);
/// How long it may take for the rest, and the slowest rate.
const REST_TIMEOUT: Duration = Duration::from_secs(15);
const RATE_MIN: u64 = 128 << 10;

impl Cache {
    /// The size of a blob, if it is here or upstream.
    pub(crate) async fn blob_size(&self, repository: &str, digest: &Digest) -> Result<u64, Failure> {
        self.inner.find(repository, digest).await.map(|known| known.size)
    }

    /// Makes a blob from upstream this registry's own, so that it stays as long as a pushed manifest names it.
    pub(crate) async fn adopt(&self, app: &App, repository: &str, digest: &Digest) -> Answer<()> {
        let size = self.blob_size(repository, digest).await?;
        let content = match size {
            0 => stream::empty().left_stream(),
            // An upload keeps some of what it gets.
            _ => {
                let content = self.read(repository, digest, 0..size).await?;
                content.map_ok(|bytes| Bytes::copy_from_slice(&bytes)).right_stream()
            }
        };
        let session = app.uploads.start_whole(digest.kind()).await?;
        let session = app.uploads.append(session, content, Some(size)).await?;
        app.uploads.finish(session, repository, digest).await
    }
}

/// What to ask an upstream for.
pub(super) struct Part<'a> {
    pub(super) digest: &'a Digest,
    /// Of the whole blob.
    pub(super) size: u64,
    pub(super) range: Range<u64>,
    /// How long the upstream may take to begin.
    pub(super) begin: Duration,
    /// Empty, with room for the part.
    pub(super) buffer: Vec<u8>,
}

impl Inner {
    /// A blob whose pieces are known; where nobody says them, it is fetched whole.
    pub(super) async fn blob(
        self: &Arc<Inner>,
        repository: &str,
        digest: &Digest,
    ) -> Result<Arc<Blob>, Failure> {
        let known = self.find(repository, digest).await?;
        let single = Layout::single(known.size, digest);
        let blob = match self.pieces.blob(digest) {
            Some(blob) => blob,
            None => {
                let layout = match single.clone() {
                    Some(layout) => Some(layout),
                    None => self.list_of(repository, digest, &known).await,
                };
                let Some(layout) = layout else { return self.whole(repository, digest, known.size).await };
                let (inner, digest) = (self.clone(), digest.clone());
                let learning = tokio::task::spawn_blocking(move || inner.pieces.learn(&digest, layout));
                learning.await.map_err(|e| Failure::here("remembering a blob's pieces", e))?
            }
        };
        if blob.layout.proven {
            let (size, said) = (blob.layout.size, known.size);
            if size == said {
                return Ok(blob);
            }
            let text = format!("blob {digest} has {size} bytes, a manifest of `{repository}` says {said}");
            return Err(Failure::Corrupt(text));
        }
        // A list that a manifest says counts where this repository's manifest says the same.
        let said = single.map(|layout| layout.fingerprint()).or(known.list);
        if said == Some(blob.fingerprint) {
            return Ok(blob);
        }
        // Another repository's manifest was wrong, or this one's is: the blob's own digest will tell.
        self.whole(repository, digest, known.size).await
    }

    /// A verified piece, from memory, disk or upstream.
    pub(super) async fn piece(
        self: &Arc<Inner>,
        repository: &str,
        blob: &Arc<Blob>,
        index: u32,
    ) -> Result<Bytes, Failure> {
        if let Some(bytes) = self.memory.get(&blob.key(index)) {
            CacheCounters::one(&self.counters.memory_hits);
            return Ok(bytes);
        }
        let loading = load(self.clone(), repository.to_owned(), blob.clone(), index);
        self.piece_flights.join(flight_key(blob, index), loading).await
    }

    /// Gets the first few of these pieces ready.
    pub(super) fn begin_pieces(
        self: &Arc<Inner>,
        repository: &str,
        blob: &Arc<Blob>,
        indexes: RangeInclusive<u32>,
    ) {
        for index in indexes.take(READ_AHEAD) {
            if !self.memory.has(&blob.key(index)) {
                let loading = load(self.clone(), repository.to_owned(), blob.clone(), index);
                drop(self.piece_flights.begin(flight_key(blob, index), loading));
            }
        }
    }

    /// A part of a blob as an upstream sends it: the right number of bytes, but not verified.
    pub(super) async fn part_from(
        &self,
        remote: &Remote,
        reference: &Reference,
        part: Part<'_>,
    ) -> Result<Vec<u8>, Failure> {
        let Part { digest, size, range, begin, buffer: mut bytes } = part;
        let len = range.end - range.start;
        let begun = remote.client.get_blob_range(reference, digest, range.clone());
        let mut blob = remote.ask(Kind::Piece, begin, begun).await?;
        if blob.ignores_range() {
            return Err(remote.without_ranges());
        }
        let failed = |failure: Failure| {
            remote.note(&failure);
            failure
        };
        if let Some(found) = blob.blob_size().filter(|found| *found != size) {
            let text = format!("blob {digest} at {}: {found} bytes, expected {size}", remote.name());
            return Err(failed(Failure::Corrupt(text)));
        }
        let limit = REST_TIMEOUT + Duration::from_secs(len / RATE_MIN);
        let reading = async {
            while let Some(chunk) = blob.chunk().await? {
                CacheCounters::add(&self.counters.upstream_bytes, chunk.len() as u64);
                bytes.extend_from_slice(&chunk);
            }
            Ok(())
        };
        match tokio::time::timeout(limit, reading).await {
            Ok(Ok(())) => Ok(bytes),
            Ok(Err(error)) => Err(remote.failed(error)),
            Err(_) => {
                let text = format!("{} took more than {} s for {len} bytes", remote.name(), limit.as_secs());
                Err(failed(Failure::Unreachable(text)))
            }
        }
    }
}

/// Those who have another list of the blob's pieces don't wait for one another.
fn flight_key(blob: &Blob, index: u32) -> String {
    format!("{} {} {index}", blob.digest, hex::encode(blob.fingerprint))
}

async fn load(inner: Arc<Inner>, repository: String, blob: Arc<Blob>, index: u32) -> Result<Bytes, Failure> {
    let key = blob.key(index);
    // It may have come since it was looked for.
    if let Some(bytes) = inner.memory.get(&key) {
        CacheCounters::one(&inner.counters.memory_hits);
        return Ok(bytes);
    }
    let bytes = match read(&inner, &blob, index).await? {
        Some(bytes) => {
            CacheCounters::one(&inner.counters.disk_hits);
            bytes
        }
        None => {
            CacheCounters::one(&inner.counters.misses);
            let lease = inner.memory.reserve_to_fetch(blob.layout.len(index)).await;
            let fetched = inner.ask_any(Kind::Piece, &inner.remotes, &repository, |remote, reference| {
                fetch(inner.clone(), remote, reference, blob.clone(), index, lease.buffer())
            });
            let bytes = fetched.await?;
            lease.hold(bytes)
        }
    };
    inner.memory.keep(key, bytes.clone());
    Ok(bytes)
}

/// A piece that is on disk, and right.
async fn read(inner: &Arc<Inner>, blob: &Arc<Blob>, index: u32) -> Result<Option<Bytes>, Failure> {
    if !blob.has(index) {
        return Ok(None);
    }
    let lease = inner.memory.reserve(blob.layout.len(index)).await;
    let (inner, blob, buffer) = (inner.clone(), blob.clone(), lease.buffer());
    let reading = tokio::task::spawn_blocking(move || inner.pieces.read(&blob, index, buffer));
    let bytes = reading.await.map_err(|e| Failure::here("reading a piece", e))?;
    Ok(bytes.map(|bytes| lease.hold(bytes)))
}

/// Fetches one piece from one upstream, and keeps it if it is right.
async fn fetch(
    inner: Arc<Inner>,
    remote: Arc<Remote>,
    reference: Reference,
    blob: Arc<Blob>,
    index: u32,
    buffer: Vec<u8>,
) -> Result<Vec<u8>, Failure> {
    let layout = &blob.layout;
    let part = Part {
        digest: &blob.digest,
        size: layout.size,
        range: layout.range(index),
        begin: BEGIN_TIMEOUT,
        buffer,
    };
    let fetched = inner.part_from(&remote, &reference, part);
    let bytes = fetched.await?;
    let (inner, kept) = (inner.clone(), blob.clone());
    let checking = tokio::task::spawn_blocking(move || {
        let right = kept.layout.is_right(index, &bytes);
        if right {
            inner.pieces.write(&kept, index, &bytes);
        }
        right.then_some(bytes)
    });
    let checked = checking.await.map_err(|e| Failure::here("keeping a piece", e))?;
    checked.ok_or_else(|| {
        let range = blob.layout.range(index);
        let text = format!(
            "bytes {} to {} of blob {} from {} are not what its manifest says",
            range.start,
            range.end - 1,
            blob.digest,
            remote.name()
        );
        let failure = Failure::Corrupt(text);
        remote.note(&failure);
        failure
    })
}
