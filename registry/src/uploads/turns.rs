//! Whose turn it is to write: so many uploads at once, each of which holds a thread or memory.
//!
//! More wait for a while, and are then told to come again. While any wait, an upload that hardly moves gives its turn
//! up, so nobody can keep all turns by sending a byte now and then: what it sent is acknowledged, and it can go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::errors::{Answer, Refusal, internal};

/// How long to wait for a turn. Clients give up at some 60 s.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// The turns.
pub(super) struct Turns {
    places: Arc<Semaphore>,
    /// Who waits now.
    waiting: AtomicUsize,
    /// Uploads that waited too long.
    refused: AtomicU64,
    /// Uploads that were too slow while others waited.
    slow: AtomicU64,
}

impl Turns {
    pub(super) fn new(places: usize) -> Turns {
        let (waiting, refused, slow) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
        Turns { places: Arc::new(Semaphore::new(places)), waiting, refused, slow }
    }

    /// A turn, which lasts as long as what is returned.
    pub(super) async fn take(&self) -> Answer<OwnedSemaphorePermit> {
        if let Ok(turn) = self.places.clone().try_acquire_owned() {
            return Ok(turn);
        }
        let _waiting = Waiting::among(&self.waiting);
        match tokio::time::timeout(WAIT_MAX, self.places.clone().acquire_owned()).await {
            Ok(turn) => turn.map_err(|e| internal("writing an upload", e)),
            Err(_) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                Err(Refusal::busy("too many uploads are being written; try again soon"))
            }
        }
    }

    /// Asked by one that is slow: an error if others wait for its turn.
    pub(super) fn leave_to_others(&self) -> Answer<()> {
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        self.slow.fetch_add(1, Ordering::Relaxed);
        Err(Refusal::busy(
            "other uploads wait, and this one hardly moves; ask for its offset, and go on from there",
        ))
    }

    pub(super) fn counters(&self) -> [(&'static str, &'static str, &AtomicU64); 2] {
        [
            ("uploads_refused", "Uploads that waited for their turn for too long", &self.refused),
            ("uploads_slow", "Uploads that were too slow while others waited", &self.slow),
        ]
    }
}

/// One that waits, also while its client goes away.
struct Waiting<'a>(&'a AtomicUsize);

impl Waiting<'_> {
    fn among(waiting: &AtomicUsize) -> Waiting<'_> {
        waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How fast a client sends, over the time in which only it was waited for: a slow disk is not its fault.
#[derive(Default)]
pub(super) struct Pace {
    waited: Duration,
    bytes: usize,
}

impl Pace {
    /// Over so much waiting it is judged.
    pub(super) const WINDOW: Duration = Duration::from_secs(5);
    /// Less than this in it, 32 KiB a second, is slow.
    const LEAST_BYTES: usize = 160 << 10;

    /// Adds what came, and says whether that ends a window in which too little did.
    pub(super) fn is_slow(&mut self, waited: Duration, bytes: usize) -> bool {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < Pace::WINDOW {
            return false;
        }
        let slow = self.bytes < Pace::LEAST_BYTES;
        *self = Pace::default();
        slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_waits_too_long_is_told_and_only_then_the_slow_ones_leave() {
        let turns = Turns::new(1);
        let first = turns.take().await.unwrap();
        assert!(turns.leave_to_others().is_ok());
        {
            let second = turns.take();
            tokio::pin!(second);
            assert!(tokio::time::timeout(WAIT_MAX / 2, second.as_mut()).await.is_err());
            assert!(turns.leave_to_others().is_err());
            assert!(second.await.is_err());
        }
        assert!(turns.leave_to_others().is_ok());
        drop(first);
        drop(turns.take().await.unwrap());
        assert_eq!(turns.counters().map(|(_, _, count)| count.load(Ordering::Relaxed)), [1, 1]);
    }

    #[test]
    fn a_client_is_slow_over_the_time_that_it_was_waited_for() {
        let mut pace = Pace::default();
        let second = Duration::from_secs(1);
        // Five seconds for 160 KiB are fast enough, and one byte less is not.
        assert!((0..5).all(|_| !pace.is_slow(second, Pace::LEAST_BYTES / 5)));
        assert!((0..4).all(|_| !pace.is_slow(second, Pace::LEAST_BYTES / 5)));
        assert!(pace.is_slow(second, Pace::LEAST_BYTES / 5 - 1));
        // However little came, if it was not waited for.
        assert!((0..1_000).all(|_| !pace.is_slow(Duration::ZERO, 0)));
    }
}
