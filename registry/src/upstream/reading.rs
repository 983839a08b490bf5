//! A blob on its way to a client, part by part.
//!
//! A client has no piece, only a copy of one part at a time (see [`crate::cache::outgoing`], decision 11); the next is copied when it
//! has taken that. Meanwhile a piece is held in memory for it only if it keeps up. For one that doesn't, such as one
//! that warms images in the background, the piece is read again when that is needed.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyplace_images::Digest;
use bytes::Bytes;
use futures_util::{Stream, stream};

use super::{Cache, Failure, Inner};
use crate::cache::memory::Hold;
use crate::cache::outgoing::Taken;
use crate::cache::pieces::Blob;

/// Who takes so many bytes a second keeps up.
const KEEPS_UP: u64 = 1 << 20;
/// How long a client may have taken before that is asked: sockets take the first parts.
const NOT_ASKED: Duration = Duration::from_secs(1);

/// What is read for one client.
struct Reading {
    inner: Arc<Inner>,
    repository: String,
    blob: Arc<Blob>,
    rest: Range<u64>,
    /// The piece that it is in.
    within: Option<u32>,
    hold: Option<Hold>,
    /// Made before it is asked for.
    first: Option<Bytes>,
    /// The part that the client has, its bytes, and when it got it.
    sent: Option<Taken>,
    sent_bytes: u64,
    sent_at: Instant,
    /// Bytes that it has taken, and how long it took for them.
    taken_bytes: u64,
    took: Duration,
}

impl Cache {
    /// The bytes `range` of a blob, verified. The first of them are here when this returns. Whoever reads has to let go
    /// of what it got before there is more.
    pub(crate) async fn read(
        &self,
        repository: &str,
        digest: &Digest,
        range: Range<u64>,
    ) -> Result<impl Stream<Item = Result<Bytes, Failure>> + Send + 'static, Failure> {
        let inner = &self.inner;
        let blob = inner.blob(repository, digest).await?;
        let mut reading = Reading::new(inner, repository, blob, range.clone());
        let mut first = reading.part().await;
        if let Err(Failure::Corrupt(_) | Failure::NoRanges(_)) = &first {
            // Either the upstream sends nothing right, or the manifest's list is wrong, or there are no ranges: the
            // blob's own digest tells.
            let blob = inner.whole(repository, digest, reading.blob.layout.size).await?;
            reading = Reading::new(inner, repository, blob, range);
            first = reading.part().await;
        }
        reading.first = Some(first?);
        Ok(stream::try_unfold(reading, async |mut reading| {
            let bytes = reading.next().await?;
            Ok(bytes.map(|bytes| (bytes, reading)))
        }))
    }
}

impl Reading {
    fn new(inner: &Arc<Inner>, repository: &str, blob: Arc<Blob>, range: Range<u64>) -> Reading {
        Reading {
            inner: inner.clone(),
            repository: repository.to_owned(),
            blob,
            rest: range,
            within: None,
            hold: None,
            first: None,
            sent: None,
            sent_bytes: 0,
            sent_at: Instant::now(),
            taken_bytes: 0,
            took: Duration::ZERO,
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        let bytes = match self.first.take() {
            Some(first) => first,
            None if self.rest.is_empty() => return Ok(None),
            None => {
                if let Some(sent) = self.sent.take() {
                    sent.wait().await;
                    self.taken_bytes += self.sent_bytes;
                    self.took += self.sent_at.elapsed();
                }
                self.part().await.inspect_err(|failure| {
                    let (digest, position) = (&self.blob.digest, self.rest.start);
                    tracing::warn!(%digest, position, reason = %failure, "a download breaks off");
                })?
            }
        };
        self.sent_at = Instant::now();
        Ok(Some(bytes))
    }

    /// The next part.
    async fn part(&mut self) -> Result<Bytes, Failure> {
        let layout = &self.blob.layout;
        let index = layout.index_of(self.rest.start);
        let keeps_up = self.took < NOT_ASKED || self.taken_bytes >= self.took.as_secs() * KEEPS_UP;
        let is_new = self.within.replace(index) != Some(index);
        if is_new && keeps_up {
            let last = layout.index_of(self.rest.end - 1);
            self.inner.begin_pieces(&self.repository, &self.blob, index + 1..=last);
        }
        // It has to be here before it gets room for a part: who waits for an upstream needs none.
        self.piece(index, is_new).await?;
        self.hold = if keeps_up { self.inner.memory.hold(&self.blob.key(index)) } else { None };
        let room = self.inner.memory.outgoing.room().await;
        let piece = self.piece(index, false).await?;
        let lies = self.blob.layout.range(index);
        let within = |position: u64| usize::try_from(position - lies.start).unwrap_or(usize::MAX);
        let (bytes, taken) = room.copy(&piece[within(self.rest.start)..within(lies.end.min(self.rest.end))]);
        self.sent_bytes = bytes.len() as u64;
        self.rest.start += self.sent_bytes;
        self.sent = Some(taken);
        Ok(bytes)
    }

    /// A piece that is counted as asked for, or one that was already.
    async fn piece(&self, index: u32, is_new: bool) -> Result<Bytes, Failure> {
        let there = if is_new { None } else { self.inner.memory.get(&self.blob.key(index)) };
        match there {
            Some(piece) => Ok(piece),
            None => self.inner.piece(&self.repository, &self.blob, index).await,
        }
    }
}
