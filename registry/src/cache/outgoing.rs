//! Parts of pieces on their way to clients: copies, so that a client that takes its time keeps a part, and no piece.
//!
//! All of them together have a share of the cache's memory. The more clients there are, the smaller their parts: an
//! eighth of an equal share each, within bounds. So those who came first and had more leave enough for those who come
//! later (1 + 1/2 + 1/3 + ... up to 1,500 is less than 8), and nobody waits for others before there are some thousands.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Bytes of a part. A socket takes the largest in a few writes; 4,096 connections have one of the smallest each in the
/// default memory's share.
const PART_MIN_BYTES: usize = 16 << 10;
const PART_MAX_BYTES: usize = 512 << 10;
/// What part of its equal share one may have.
const OF_EQUAL_SHARE: usize = 8;

/// The memory of parts.
pub(crate) struct Outgoing {
    share: usize,
    free: Arc<Semaphore>,
    /// Parts that there are, or that are waited for.
    parts: Arc<AtomicUsize>,
}

/// One of the parts.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Room for a part.
pub(crate) struct Room {
    len: usize,
    _free: Option<OwnedSemaphorePermit>,
    _counted: Counted,
}

/// Ends when the client's connection has taken a part, or is gone.
pub(crate) struct Taken(oneshot::Receiver<()>);

struct Part {
    bytes: Vec<u8>,
    _room: Room,
    _taken: oneshot::Sender<()>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Outgoing {
    /// Parts that have `share` bytes together.
    pub(crate) fn new(share: usize) -> Outgoing {
        Outgoing { share, free: Arc::new(Semaphore::new(share)), parts: Arc::default() }
    }

    /// Room for a part, in the order of asking.
    pub(crate) async fn room(&self) -> Room {
        let parts = self.parts.fetch_add(1, Ordering::Relaxed) + 1;
        let counted = Counted(self.parts.clone());
        let len = (self.share / (OF_EQUAL_SHARE * parts)).clamp(PART_MIN_BYTES, PART_MAX_BYTES);
        let permits = u32::try_from(len).unwrap_or(u32::MAX);
        // It is never closed.
        let free = self.free.clone().acquire_many_owned(permits).await.ok();
        Room { len, _free: free, _counted: counted }
    }

    /// Bytes of the parts that there are.
    #[cfg(test)]
    pub(crate) fn used(&self) -> usize {
        self.share - self.free.available_permits()
    }
}

impl Room {
    /// The first bytes of these that there is room for, copied.
    pub(crate) fn copy(self, bytes: &[u8]) -> (Bytes, Taken) {
        let bytes = bytes[..bytes.len().min(self.len)].to_vec();
        let (sender, taken) = oneshot::channel();
        (Bytes::from_owner(Part { bytes, _room: self, _taken: sender }), Taken(taken))
    }
}

impl Taken {
    pub(crate) async fn wait(self) {
        // The other end only goes away.
        let _ = self.0.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn parts_shrink_so_that_many_fit_and_never_more_than_the_share() {
        let outgoing = Outgoing::new(64 << 20);
        let mut rooms = Vec::new();
        for _ in 0..1_500 {
            rooms.push(outgoing.room().await);
        }
        assert_eq!(rooms[0].len, PART_MAX_BYTES);
        assert!(rooms.windows(2).all(|two| two[0].len >= two[1].len));
        assert_eq!(rooms[1_499].len, PART_MIN_BYTES);
        assert_eq!(outgoing.used(), rooms.iter().map(|room| room.len).sum::<usize>());
        // Those that had large ones get small ones when they are sent, so that all connections have one.
        for at in 0..1_500 {
            rooms.push(outgoing.room().await);
            drop(rooms.swap_remove(at));
        }
        while rooms.len() < 4_096 {
            rooms.push(outgoing.room().await);
        }
        assert_eq!(outgoing.used(), 64 << 20);
        drop(rooms);
        assert_eq!((outgoing.used(), outgoing.parts.load(Ordering::Relaxed)), (0, 0));
        assert_eq!(outgoing.room().await.len, PART_MAX_BYTES);
    }

    #[tokio::test]
    async fn a_part_is_a_copy_that_says_when_it_is_taken() {
        let outgoing = Outgoing::new(1 << 20);
        let piece = vec![7; 300_000];
        let room = outgoing.room().await;
        let len = room.len;
        let (part, taken) = room.copy(&piece);
        drop(piece);
        assert_eq!(part, vec![7; len]);
        let waiting = tokio::spawn(taken.wait());
        let slice = part.slice(1..2);
        drop(part);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished() && outgoing.used() == len);
        drop(slice);
        waiting.await.unwrap();
        assert_eq!(outgoing.used(), 0);
    }
}
