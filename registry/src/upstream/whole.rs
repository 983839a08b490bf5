//! Blobs that nobody says the pieces of: fetched whole, in pieces side by side, and verified before any of it is
//! served. What is learnt then, the digest of each piece, is kept.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyplace_images::{Digest, Hasher};
use futures_util::{StreamExt as _, stream};

use super::blobs::{BEGIN_WHOLE_TIMEOUT, Part};
use super::remote::{Kind, Remote};
use super::{Failure, Inner};
use crate::cache::counters::CacheCounters;
use crate::cache::layout::{self, Hash};
use crate::cache::memory::Lease;
use crate::cache::pieces::{Blob, Incoming};

/// Pieces that are fetched at once: over 40 ms, eight of 4 MiB keep 1 Gbit/s busy.
const AT_ONCE: usize = 8;
/// How often the log says how far a fetch is, since those who wait get nothing meanwhile.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);
/// How long an upstream may send nothing.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// What of a blob has arrived.
struct Arrived {
    incoming: Incoming,
    hasher: Hasher,
    hashes: Vec<Hash>,
    position: u64,
    size: u64,
    piece_bytes: u64,
    told: Instant,
}

impl Arrived {
    /// Where the pieces that are yet to come lie.
    fn ranges(&self) -> Vec<Range<u64>> {
        let step = usize::try_from(self.piece_bytes).unwrap_or(usize::MAX);
        let (size, piece_bytes) = (self.size, self.piece_bytes);
        (self.position..size).step_by(step).map(|start| start..(start + piece_bytes).min(size)).collect()
    }

    /// Takes the next piece, on a blocking thread.
    async fn with(mut self, digest: &Digest, bytes: Vec<u8>, lease: Lease) -> Result<Arrived, Failure> {
        let taking = tokio::task::spawn_blocking(move || {
            self.hasher.update(&bytes);
            self.hashes.push(layout::hash(&bytes));
            self.incoming.write_at(&bytes, self.position)?;
            self.position += bytes.len() as u64;
            drop(lease.hold(bytes));
            Ok::<_, std::io::Error>(self)
        });
        let taken = taking.await.map_err(|error| Failure::here("keeping a blob", error))?;
        let mut arrived = taken.map_err(|error| Failure::here("keeping a blob", error))?;
        if arrived.told.elapsed() > PROGRESS_EVERY {
            arrived.told = Instant::now();
            tracing::info!(%digest, fetched = arrived.position, size = arrived.size, "fetching a blob");
        }
        Ok(arrived)
    }
}

impl Inner {
    /// Fetches a blob whole; for those who ask together, once.
    pub(super) async fn whole(
        self: &Arc<Inner>,
        repository: &str,
        digest: &Digest,
        size: u64,
    ) -> Result<Arc<Blob>, Failure> {
        let (inner, name, wanted) = (self.clone(), repository.to_owned(), digest.clone());
        let fetching = async move {
            match inner.pieces.blob(&wanted) {
                Some(blob) if blob.layout.proven && blob.layout.size == size => Ok(blob),
                _ => fetch(&inner, &name, &wanted, size).await,
            }
        };
        // Who expects another size fails for reasons of its own.
        self.whole_flights.join(format!("{digest} {size}"), fetching).await
    }
}

/// From all upstreams together; and if what they sent doesn't fit together, from each alone.
async fn fetch(
    inner: &Arc<Inner>,
    repository: &str,
    digest: &Digest,
    size: u64,
) -> Result<Arc<Blob>, Failure> {
    CacheCounters::one(&inner.counters.whole_fetches);
    tracing::info!(repository, %digest, size, "fetching a blob whole, since nobody says its pieces");
    let with_ranges: Vec<_> = inner.remotes.iter().filter(|remote| remote.has_ranges()).cloned().collect();
    let mut worst = Failure::NoRanges(String::new());
    if !with_ranges.is_empty() {
        match fetch_from(inner, &with_ranges, repository, digest, size).await {
            Err(failure @ (Failure::Corrupt(_) | Failure::NoRanges(_))) => worst = failure,
            result => return result,
        }
    }
    for remote in inner.remotes.iter().filter(|remote| remote.reference(repository).is_some()) {
        match fetch_from(inner, std::slice::from_ref(remote), repository, digest, size).await {
            Ok(blob) => return Ok(blob),
            Err(failure) => worst = worst.max(failure),
        }
    }
    Err(worst)
}

async fn fetch_from(
    inner: &Arc<Inner>,
    remotes: &[Arc<Remote>],
    repository: &str,
    digest: &Digest,
    size: u64,
) -> Result<Arc<Blob>, Failure> {
    let here = |error: std::io::Error| Failure::here("keeping a blob", error);
    let broke = |error: tokio::task::JoinError| Failure::here("keeping a blob", error);
    let piece_bytes = inner.piece_bytes;
    layout::count(size, piece_bytes).map_err(|reason| Failure::Here(format!("{digest}: {reason}")))?;
    let pieces = inner.pieces.clone();
    let begun =
        tokio::task::spawn_blocking(move || pieces.begin(size)).await.map_err(broke)?.map_err(here)?;
    let incoming = begun.map_err(|large| {
        let message = format!(
            "blob {digest} has {} bytes, the cache's disk_budget has {} for it now",
            large.size, large.budget
        );
        Failure::Here(message)
    })?;
    let mut arrived = Arrived {
        incoming,
        hasher: digest.hasher(),
        hashes: Vec::new(),
        position: 0,
        size,
        piece_bytes,
        told: Instant::now(),
    };
    arrived = match remotes {
        [remote] if !remote.has_ranges() => one_by_one(inner, remote, repository, digest, arrived).await?,
        _ => side_by_side(inner, remotes, repository, digest, arrived).await?,
    };
    let found = arrived.hasher.clone().finish();
    if found != *digest {
        CacheCounters::one(&inner.counters.upstream_corrupt);
        let names: Vec<_> = remotes.iter().map(|remote| remote.name()).collect();
        let text = format!("blob {digest} from {} has the digest {found}", names.join(" and "));
        tracing::warn!(reason = text, "an upstream sent the wrong content");
        return Err(Failure::Corrupt(text));
    }
    inner.memory.forget(digest);
    let (digest, hashes) = (digest.clone(), arrived.hashes);
    let committing = move || arrived.incoming.commit(&digest, piece_bytes, hashes);
    tokio::task::spawn_blocking(committing).await.map_err(broke)?.map_err(here)
}

/// From upstreams that know ranges.
async fn side_by_side(
    inner: &Arc<Inner>,
    remotes: &[Arc<Remote>],
    repository: &str,
    digest: &Digest,
    mut arrived: Arrived,
) -> Result<Arrived, Failure> {
    let size = arrived.size;
    // Room is reserved in order, so that a piece never waits for room that later pieces of its blob have.
    let reserved = stream::iter(arrived.ranges()).then(|range| {
        let inner = inner.clone();
        async move { (inner.memory.reserve_to_fetch(len(&range)).await, range) }
    });
    let fetched = reserved.map(|(lease, range)| {
        let (inner, remotes) = (inner.clone(), remotes.to_vec());
        let (repository, digest) = (repository.to_owned(), digest.clone());
        async move {
            let fetched = inner.ask_any(Kind::Piece, &remotes, &repository, |remote, reference| {
                let (inner, digest, range, buffer) =
                    (inner.clone(), digest.clone(), range.clone(), lease.buffer());
                async move {
                    let part = Part { digest: &digest, size, range, begin: BEGIN_WHOLE_TIMEOUT, buffer };
                    inner.part_from(&remote, &reference, part).await
                }
            });
            fetched.await.map(|bytes| (bytes, lease))
        }
    });
    let mut fetched = std::pin::pin!(fetched.buffered(AT_ONCE));
    while let Some(piece) = fetched.next().await {
        let (bytes, lease) = piece?;
        arrived = arrived.with(digest, bytes, lease).await?;
    }
    Ok(arrived)
}

/// From an upstream that knows no ranges.
async fn one_by_one(
    inner: &Arc<Inner>,
    remote: &Remote,
    repository: &str,
    digest: &Digest,
    mut arrived: Arrived,
) -> Result<Arrived, Failure> {
    let reference = remote.reference(repository).ok_or(Failure::Absent)?;
    let begun = remote.client.get_blob(&reference, digest, Some(arrived.size));
    let mut blob = remote.ask(Kind::Piece, BEGIN_WHOLE_TIMEOUT, begun).await?;
    let mut piece: Vec<u8> = Vec::new();
    for range in arrived.ranges() {
        let lease = inner.memory.reserve_to_fetch(len(&range)).await;
        while piece.len() < len(&range) {
            let failed = |failure: Failure| {
                remote.note(&failure);
                failure
            };
            let chunk = tokio::time::timeout(IDLE_TIMEOUT, blob.chunk()).await.map_err(|_| {
                let text = format!("{} sent nothing for {} s", remote.name(), IDLE_TIMEOUT.as_secs());
                failed(Failure::Unreachable(text))
            })?;
            let chunk = chunk.map_err(|error| remote.failed(error))?;
            let chunk = chunk
                .ok_or_else(|| failed(Failure::Corrupt(format!("{} sent too few bytes", remote.name()))))?;
            CacheCounters::add(&inner.counters.upstream_bytes, chunk.len() as u64);
            piece.extend_from_slice(&chunk);
        }
        let rest = piece.split_off(len(&range));
        arrived = arrived.with(digest, std::mem::replace(&mut piece, rest), lease).await?;
    }
    Ok(arrived)
}

/// At most the size of a piece.
fn len(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap_or(usize::MAX)
}
