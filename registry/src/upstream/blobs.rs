//! Blobs from upstream, piece by piece.

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::Duration;

use anyplace_images::{Digest, Reference};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};

use super::remote::{Kind, Remote};
use super::{Cache, Failure, Inner};
use crate::cache::counters::CacheCounters;
use crate::cache::layout::Layout;
use crate::cache::memory::Lease;
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
            _ => self.read(repository, digest, 0..size).await?.right_stream(),
        };
        let session = app.uploads.start_whole(digest.kind()).await?;
        let session = app.uploads.append(session, content, Some(size)).await?;
        app.uploads.finish(session, repository, digest).await
    }

    /// The bytes `range` of a blob, verified. The first of them are here when this returns.
    pub(crate) async fn read(
        &self,
        repository: &str,
        digest: &Digest,
        range: Range<u64>,
    ) -> Result<impl Stream<Item = Result<Bytes, Failure>> + Send + 'static, Failure> {
        let inner = &self.inner;
        let mut blob = inner.blob(repository, digest).await?;
        let index = blob.layout.index_of(range.start);
        let last = blob.layout.index_of(range.end - 1);
        inner.begin_pieces(repository, &blob, index + 1..=last);
        let mut first = inner.piece(repository, &blob, index).await;
        if let Err(Failure::Corrupt(_) | Failure::NoRanges(_)) = &first {
            // Either the upstream sends nothing right, or the manifest's list is wrong, or there are no ranges: the
            // blob's own digest tells.
            blob = inner.whole(repository, digest, blob.layout.size).await?;
            first = inner.piece(repository, &blob, blob.layout.index_of(range.start)).await;
        }
        let reading = Reading {
            inner: inner.clone(),
            repository: repository.to_owned(),
            blob,
            rest: range,
            first: Some(first?),
        };
        Ok(stream::try_unfold(reading, async |mut reading| {
            let bytes = reading.next().await?;
            Ok(bytes.map(|bytes| (bytes, reading)))
        }))
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

/// A blob on its way to a client.
struct Reading {
    inner: Arc<Inner>,
    repository: String,
    blob: Arc<Blob>,
    rest: Range<u64>,
    first: Option<Bytes>,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let layout = &self.blob.layout;
        let index = layout.index_of(self.rest.start);
        let last = layout.index_of(self.rest.end - 1);
        self.inner.begin_pieces(&self.repository, &self.blob, index + 1..=last);
        let piece = match self.first.take() {
            Some(piece) => piece,
            None => self.inner.piece(&self.repository, &self.blob, index).await.inspect_err(|failure| {
                tracing::warn!(digest = %self.blob.digest, index, reason = %failure, "a download breaks off");
            })?,
        };
        let lies = layout.range(index);
        let end = lies.end.min(self.rest.end);
        let part = |position: u64| usize::try_from(position - lies.start).unwrap_or(usize::MAX);
        let bytes = piece.slice(part(self.rest.start)..part(end));
        self.rest.start = end;
        Ok(Some(bytes))
    }
}

impl Inner {
    /// A blob whose pieces are known; where nobody says them, it is fetched whole.
    async fn blob(self: &Arc<Inner>, repository: &str, digest: &Digest) -> Result<Arc<Blob>, Failure> {
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
    async fn piece(
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
    fn begin_pieces(self: &Arc<Inner>, repository: &str, blob: &Arc<Blob>, indexes: RangeInclusive<u32>) {
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
    let lease = inner.memory.reserve(blob.layout.len(index)).await;
    let bytes = match read(&inner, &blob, index, &lease).await? {
        Some(bytes) => {
            CacheCounters::one(&inner.counters.disk_hits);
            bytes
        }
        None => {
            CacheCounters::one(&inner.counters.misses);
            let fetched = inner.ask_any(Kind::Piece, &inner.remotes, &repository, |remote, reference| {
                fetch(inner.clone(), remote, reference, blob.clone(), index, lease.buffer())
            });
            fetched.await?
        }
    };
    let bytes = lease.hold(bytes);
    inner.memory.keep(key, bytes.clone());
    Ok(bytes)
}

async fn read(
    inner: &Arc<Inner>,
    blob: &Arc<Blob>,
    index: u32,
    lease: &Lease,
) -> Result<Option<Vec<u8>>, Failure> {
    if !blob.has(index) {
        return Ok(None);
    }
    let (inner, blob, buffer) = (inner.clone(), blob.clone(), lease.buffer());
    let reading = tokio::task::spawn_blocking(move || inner.pieces.read(&blob, index, buffer));
    reading.await.map_err(|e| Failure::here("reading a piece", e))
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
