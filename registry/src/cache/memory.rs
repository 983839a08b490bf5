//! The memory that pieces take: those that are fetched or read from disk, those on their way to clients, and the
//! ones used last, which are kept. One budget bounds all of them together.
//!
//! A piece's bytes carry a [`Lease`], given back when the last who has them lets go. Who needs room waits for its
//! turn, in the order of asking, while kept pieces are dropped, oldest first, and others end up with their clients.
//! Kept pieces are never verified again: only what was verified gets here.
//!
//! Buffers are used again: an allocator keeps freed ones of several MiB for each thread, far over the budget, or gives
//! them back to the system, which costs a page fault for each page of each piece.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyplace_images::Digest;
use bytes::Bytes;
use tokio::sync::Notify;

use super::layout::Hash;

/// A piece of a blob, and its own digest: what was verified by a wrong list is nobody's who has the right one.
pub(crate) type PieceKey = (Digest, Hash);

/// Smallest budget: pieces of the largest kind for a few at once.
pub(crate) const BUDGET_MIN_BYTES: u64 = 64 << 20;

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
    pub(crate) fn hold(self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Held { bytes, lease: self })
    }
}

#[derive(Default)]
struct Kept {
    pieces: HashMap<PieceKey, (Bytes, u64)>,
    by_use: BTreeMap<u64, PieceKey>,
    next: u64,
}

/// The pieces in memory.
pub(crate) struct Memory {
    budget: usize,
    usage: Arc<Usage>,
    kept: Mutex<Kept>,
    turn: tokio::sync::Mutex<()>,
}

impl Memory {
    pub(crate) fn new(budget: u64) -> Memory {
        let budget = usize::try_from(budget.max(BUDGET_MIN_BYTES)).unwrap_or(usize::MAX);
        let (usage, kept, turn) = (Arc::default(), Mutex::default(), tokio::sync::Mutex::default());
        Memory { budget, usage, kept, turn }
    }

    /// A kept piece.
    pub(crate) fn get(&self, key: &PieceKey) -> Option<Bytes> {
        let kept = &mut *self.kept();
        let (bytes, used) = kept.pieces.get_mut(key)?;
        kept.by_use.remove(used);
        *used = kept.next;
        kept.by_use.insert(kept.next, key.clone());
        kept.next += 1;
        Some(bytes.clone())
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
            if let Some((_, before)) = kept.pieces.insert(key.clone(), (bytes, used)) {
                kept.by_use.remove(&before);
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
        kept.pieces.retain(|key, (bytes, used)| {
            let stays = key.0 != *digest;
            if !stays {
                kept.by_use.remove(used);
                dropped.push(std::mem::take(bytes));
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
                return Lease { usage: self.usage.clone(), bytes, spare };
            }
            changed.await;
        }
    }

    /// Bytes in use.
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
        let (_, key) = kept.by_use.pop_first()?;
        kept.pieces.remove(&key).map(|(bytes, _)| bytes)
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

    #[tokio::test]
    async fn the_budget_holds_and_the_oldest_go_first() {
        let memory = Arc::new(Memory::new(0));
        let piece = 8 << 20;
        for index in 0..8 {
            let lease = memory.reserve(piece).await;
            let mut bytes = lease.buffer();
            bytes.resize(16, index as u8);
            let bytes = lease.hold(bytes);
            memory.keep(key(index), bytes);
        }
        assert_eq!(memory.used(), 64 << 20);
        assert_eq!(memory.get(&key(0)).unwrap()[0], 0);
        // Room for one more comes from piece 1, the oldest.
        let lease = memory.reserve(piece).await;
        assert!(memory.get(&key(1)).is_none() && memory.get(&key(0)).is_some());
        // What somebody still reads is not free when it is dropped.
        let read: Vec<_> = [2, 3, 4, 5, 6, 7, 0].map(|index| memory.get(&key(index)).unwrap()).into();
        let waiting = tokio::spawn({
            let memory = memory.clone();
            async move { drop(memory.reserve(piece).await) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        assert_eq!(memory.used(), 64 << 20);
        drop(read);
        waiting.await.unwrap();
        // A kept piece gives way to one who already waits.
        drop(lease);
        let leases: Vec<_> = futures_util::future::join_all((0..8).map(|_| memory.reserve(piece))).await;
        let waiting = tokio::spawn({
            let memory = memory.clone();
            async move { drop(memory.reserve(piece).await) }
        });
        tokio::task::yield_now().await;
        let mut leases = leases.into_iter();
        memory.keep(key(9), leases.next().unwrap().hold(vec![1]));
        waiting.await.unwrap();
        drop(leases);
        memory.forget(&Digest::of(b"x"));
        assert_eq!(memory.used(), 0);
        // Buffers are used again, and make room for others.
        assert!(!memory.usage.pool().is_empty());
        let pooled = memory.usage.pool().iter().map(Vec::capacity).sum::<usize>();
        assert!(pooled <= 64 << 20);
        let lease = memory.reserve(piece).await;
        assert_eq!(memory.usage.pool().iter().map(Vec::capacity).sum::<usize>(), pooled - piece);
        assert_eq!(lease.buffer().capacity(), piece);
        let all = memory.reserve(56 << 20).await;
        assert!(memory.usage.pool().is_empty());
        drop(all);
    }
}
