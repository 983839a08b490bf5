//! The memory that pieces take: those that are fetched or read from disk, the ones used last, which are kept, and parts on
//! their way to clients. One budget bounds all of them together.
//!
//! A piece's bytes carry a [`Lease`], given back when the last who has them lets go. Who needs room waits for its
//! turn, in the order of asking, while kept pieces are dropped, oldest first. Kept pieces are never verified again:
//! only what was verified gets here.
//!
//! Nobody waits for a client or an upstream to go on:
//! - Clients get copies of a piece's parts (see [`super::outgoing`]), so none has a piece. One that takes part after
//!   part has a [`Hold`] on it, so that it isn't read anew for each; that counts for [`HELD_MAX`] after the last part.
//! - Fetches have a share of the budget, so that pieces that are on disk can be read however many of them hang.
//!
//! Buffers are used again: an allocator keeps freed ones of several MiB for each thread, far over the budget, or gives
//! them back to the system, which costs a page fault for each page of each piece.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyplace_images::Digest;
use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::layout::Hash;
use super::outgoing::Outgoing;

/// A piece of a blob, and its own digest: what was verified by a wrong list is nobody's who has the right one.
pub(crate) type PieceKey = (Digest, Hash);

/// Smallest budget: pieces of the largest kind for a few at once.
pub(crate) const BUDGET_MIN_BYTES: u64 = 64 << 20;
/// Of the budget, a quarter is for parts on their way to clients, and fetches have at most another one: two pieces of the
/// largest kind at least. So half of it is always there for what is read from disk.
const QUARTERS: usize = 4;
/// How long a client may take for a part before its piece gives way to others: longer than a socket's buffer of some MiB
/// lasts for one that keeps up, short for who waits.
const HELD_MAX: Duration = Duration::from_secs(2);
/// How often who waits looks whether that is over for a piece.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Buffers smaller than this are not used again.
const POOLED_MIN_BYTES: usize = 1 << 20;

#[derive(Default)]
struct Usage {
    used: AtomicUsize,
    changed: Notify,
    /// Buffers to be used again. Together with what is used they are within the budget.
    pool: Mutex<Vec<Vec<u8>>>,
}

impl Usage {
    fn pool(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room for some bytes.
pub(crate) struct Lease {
    usage: Arc<Usage>,
    bytes: usize,
    spare: Mutex<Option<Vec<u8>>>,
    /// As long as the bytes are being fetched.
    fetching: Option<OwnedSemaphorePermit>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(buffer) = self.spare.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            self.usage.pool().push(buffer);
        }
        self.usage.used.fetch_sub(self.bytes, Ordering::SeqCst);
        self.usage.changed.notify_waiters();
    }
}

struct Held {
    bytes: Vec<u8>,
    lease: Lease,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut buffer = std::mem::take(&mut self.bytes);
        if buffer.capacity() >= POOLED_MIN_BYTES
            && buffer.capacity() <= self.lease.bytes + self.lease.bytes / 8
        {
            buffer.clear();
            *self.lease.spare.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(buffer);
        }
    }
}

impl Lease {
    /// An empty buffer with room for all of it.
    pub(crate) fn buffer(&self) -> Vec<u8> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).take();
        spare.unwrap_or_else(|| Vec::with_capacity(self.bytes))
    }

    /// The bytes, which hold the lease from now on.
    pub(crate) fn hold(mut self, bytes: Vec<u8>) -> Bytes {
        self.fetching = None;
        Bytes::from_owner(Held { bytes, lease: self })
    }
}

/// Keeps a piece in memory for a client that takes part after part of it.
pub(crate) struct Hold {
    held: Option<Arc<()>>,
    usage: Arc<Usage>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.held = None;
        self.usage.changed.notify_waiters();
    }
}

struct Piece {
    bytes: Bytes,
    /// Its place in the order of use.
    used: u64,
    when: Instant,
    /// Each hold has one.
    held: Arc<()>,
}

impl Piece {
    fn may_go(&self) -> bool {
        Arc::strong_count(&self.held) == 1 || self.when.elapsed() > HELD_MAX
    }
}

#[derive(Default)]
struct Kept {
    pieces: HashMap<PieceKey, Piece>,
    by_use: BTreeMap<u64, PieceKey>,
    next: u64,
}

/// The pieces in memory.
pub(crate) struct Memory {
    /// For pieces.
    budget: usize,
    usage: Arc<Usage>,
    kept: Mutex<Kept>,
    turn: tokio::sync::Mutex<()>,
    fetching: Arc<Semaphore>,
    pub(crate) outgoing: Outgoing,
}

impl Memory {
    pub(crate) fn new(budget: u64) -> Memory {
        let budget = usize::try_from(budget.max(BUDGET_MIN_BYTES)).unwrap_or(usize::MAX);
        let (usage, kept, turn) = (Arc::default(), Mutex::default(), tokio::sync::Mutex::default());
        let quarter = (budget / QUARTERS).min(Semaphore::MAX_PERMITS);
        let (outgoing, fetching) = (Outgoing::new(quarter), Arc::new(Semaphore::new(quarter)));
        Memory { budget: budget - quarter, usage, kept, turn, fetching, outgoing }
    }

    /// A kept piece.
    pub(crate) fn get(&self, key: &PieceKey) -> Option<Bytes> {
        let kept = &mut *self.kept();
        let piece = kept.pieces.get_mut(key)?;
        kept.by_use.remove(&piece.used);
        (piece.used, piece.when) = (kept.next, Instant::now());
        kept.by_use.insert(kept.next, key.clone());
        kept.next += 1;
        Some(piece.bytes.clone())
    }

    /// A hold on a kept piece.
    pub(crate) fn hold(&self, key: &PieceKey) -> Option<Hold> {
        let held = self.kept().pieces.get(key)?.held.clone();
        Some(Hold { held: Some(held), usage: self.usage.clone() })
    }

    pub(crate) fn has(&self, key: &PieceKey) -> bool {
        self.kept().pieces.contains_key(key)
    }

    /// Keeps a verified piece, as long as nobody needs its room.
    pub(crate) fn keep(&self, key: PieceKey, bytes: Bytes) {
        {
            let kept = &mut *self.kept();
            let used = kept.next;
            kept.next += 1;
            let new = Piece { bytes, used, when: Instant::now(), held: Arc::default() };
            if let Some(before) = kept.pieces.insert(key.clone(), new) {
                kept.by_use.remove(&before.used);
            }
            kept.by_use.insert(used, key);
        }
        // Who waits for room may want this one's.
        self.usage.changed.notify_waiters();
    }

    /// Drops the pieces of a blob.
    pub(crate) fn forget(&self, digest: &Digest) {
        let mut dropped = Vec::new();
        let kept = &mut *self.kept();
        kept.pieces.retain(|key, piece| {
            let stays = key.0 != *digest;
            if !stays {
                kept.by_use.remove(&piece.used);
                dropped.push(std::mem::take(&mut piece.bytes));
            }
            stays
        });
    }

    /// Room for `bytes`, once it is this one's turn.
    pub(crate) async fn reserve(&self, bytes: usize) -> Lease {
        let _turn = self.turn.lock().await;
        loop {
            let changed = self.usage.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            while !self.fits(bytes) {
                let Some(oldest) = self.pop_oldest() else { break };
                drop(oldest);
            }
            if self.fits(bytes) {
                self.usage.used.fetch_add(bytes, Ordering::SeqCst);
                let spare = Mutex::new(self.take_buffer(bytes));
                return Lease { usage: self.usage.clone(), bytes, spare, fetching: None };
            }
            // That a hold counts no longer, nobody tells.
            let _ = tokio::time::timeout(LOOK_EVERY, changed).await;
        }
    }

    /// Room for `bytes` that are to be fetched, once it is this one's turn among fetches and among all.
    pub(crate) async fn reserve_to_fetch(&self, bytes: usize) -> Lease {
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        // It is never closed.
        let fetching = self.fetching.clone().acquire_many_owned(permits).await.ok();
        let mut lease = self.reserve(bytes).await;
        lease.fetching = fetching;
        lease
    }

    /// Most bytes in use.
    pub(crate) fn budget(&self) -> usize {
        self.budget
    }

    /// Bytes in use by pieces.
    pub(crate) fn used(&self) -> usize {
        self.usage.used.load(Ordering::SeqCst)
    }

    fn fits(&self, bytes: usize) -> bool {
        self.used() == 0 || self.used() + bytes <= self.budget
    }

    /// A buffer of about this size, if there is one; those that the budget has no room for any more are dropped.
    fn take_buffer(&self, bytes: usize) -> Option<Vec<u8>> {
        let mut pool = self.usage.pool();
        let fitting = |buffer: &Vec<u8>| (bytes..=bytes + bytes / 8).contains(&buffer.capacity());
        let found = pool.iter().position(fitting).map(|at| pool.swap_remove(at));
        let mut pooled: usize = pool.iter().map(Vec::capacity).sum();
        while self.used() + pooled > self.budget
            && let Some(buffer) = pool.pop()
        {
            pooled -= buffer.capacity();
        }
        found
    }

    fn pop_oldest(&self) -> Option<Bytes> {
        let kept = &mut *self.kept();
        let may_go = |key: &PieceKey| kept.pieces.get(key).is_none_or(Piece::may_go);
        let (used, key) = kept.by_use.iter().find(|(_, key)| may_go(key))?;
        let (used, key) = (*used, key.clone());
        kept.by_use.remove(&used);
        kept.pieces.remove(&key).map(|piece| piece.bytes)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(index: u32) -> PieceKey {
        (Digest::of(b"x"), super::super::layout::hash(&index.to_le_bytes()))
    }

    const PIECE: usize = 8 << 20;
    /// Pieces that the smallest budget has room for, beside parts for clients.
    const PIECES: u32 = 6;

    async fn keep(memory: &Memory, index: u32) {
        let lease = memory.reserve(PIECE).await;
        let mut bytes = lease.buffer();
        bytes.resize(16, index as u8);
        memory.keep(key(index), lease.hold(bytes));
    }

    fn waiting(memory: &Arc<Memory>) -> tokio::task::JoinHandle<Lease> {
        let memory = memory.clone();
        tokio::spawn(async move { memory.reserve(PIECE).await })
    }

    #[tokio::test]
    async fn the_budget_holds_and_the_oldest_go_first() {
        let memory = Arc::new(Memory::new(0));
        for index in 0..PIECES {
            keep(&memory, index).await;
        }
        assert_eq!(memory.used(), 48 << 20);
        assert_eq!(memory.get(&key(0)).unwrap()[0], 0);
        // Room for one more comes from piece 1, the oldest.
        let lease = memory.reserve(PIECE).await;
        assert!(memory.get(&key(1)).is_none() && memory.get(&key(0)).is_some());
        // What somebody still reads is not free when it is dropped.
        let read: Vec<_> = [2, 3, 4, 5, 0].map(|index| memory.get(&key(index)).unwrap()).into();
        let waits = waiting(&memory);
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        assert_eq!(memory.used(), 48 << 20);
        drop(read);
        drop(waits.await.unwrap());
        // A kept piece gives way to one who already waits.
        drop(lease);
        let leases: Vec<_> = futures_util::future::join_all((0..PIECES).map(|_| memory.reserve(PIECE))).await;
        let waits = waiting(&memory);
        tokio::task::yield_now().await;
        let mut leases = leases.into_iter();
        memory.keep(key(9), leases.next().unwrap().hold(vec![1]));
        drop(waits.await.unwrap());
        drop(leases);
        memory.forget(&Digest::of(b"x"));
        assert_eq!(memory.used(), 0);
        // Buffers are used again, and make room for others.
        assert!(!memory.usage.pool().is_empty());
        let pooled = memory.usage.pool().iter().map(Vec::capacity).sum::<usize>();
        assert!(pooled <= 48 << 20);
        let lease = memory.reserve(PIECE).await;
        assert_eq!(memory.usage.pool().iter().map(Vec::capacity).sum::<usize>(), pooled - PIECE);
        assert_eq!(lease.buffer().capacity(), PIECE);
        let all = memory.reserve(40 << 20).await;
        assert!(memory.usage.pool().is_empty());
        drop(all);
    }

    #[tokio::test]
    async fn held_pieces_give_way_last_and_in_the_end() {
        let memory = Arc::new(Memory::new(0));
        for index in 0..PIECES {
            keep(&memory, index).await;
        }
        let oldest = memory.hold(&key(0)).unwrap();
        drop(memory.reserve(PIECE).await);
        assert!(memory.get(&key(0)).is_some() && memory.get(&key(1)).is_none());
        keep(&memory, 6).await;
        let holds: Vec<_> = (2..=6).map(|index| memory.hold(&key(index)).unwrap()).collect();
        // One of them is let go.
        let waits = waiting(&memory);
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        drop(oldest);
        let lease = waits.await.unwrap();
        assert!(memory.get(&key(0)).is_none());
        // Or its client takes nothing any more.
        memory.kept().pieces.get_mut(&key(4)).unwrap().when -= HELD_MAX;
        let more = waiting(&memory).await.unwrap();
        let left: Vec<_> = (2..=6).filter(|index| memory.has(&key(*index))).collect();
        assert_eq!(left, [2, 3, 5, 6]);
        assert_eq!(memory.used(), 48 << 20);
        drop((holds, lease, more));
    }

    #[tokio::test]
    async fn fetches_leave_room_for_what_is_on_disk() {
        let memory = Arc::new(Memory::new(0));
        let first = memory.reserve_to_fetch(PIECE).await;
        let second = memory.reserve_to_fetch(PIECE).await;
        let third = tokio::spawn({
            let memory = memory.clone();
            async move { memory.reserve_to_fetch(PIECE).await }
        });
        for _ in 0..PIECES - 2 {
            memory.keep(key(1), memory.reserve(PIECE).await.hold(vec![1]));
        }
        assert!(!third.is_finished());
        // What has come is no fetch any more.
        let here = first.hold(vec![1]);
        drop(third.await.unwrap());
        drop((second, here));
    }
}
