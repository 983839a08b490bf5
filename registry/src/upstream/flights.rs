//! One run of each piece of work, however many ask for it at once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};

use super::failure::Failure;
use crate::cache::counters::CacheCounters;

/// Most requests that wait for work at once: what a whole location asks for, with several connections a machine.
const WAITERS_MAX: usize = 8_192;

type Outcome<T> = Result<T, Failure>;
type Running<T> = HashMap<String, Shared<BoxFuture<'static, Outcome<T>>>>;

/// The work that is running, by key.
pub(super) struct Flights<T: Clone> {
    running: Arc<Mutex<Running<T>>>,
    waiting: AtomicUsize,
    counters: Arc<CacheCounters>,
}

/// Counts one waiter, until it is dropped.
struct Waiter<'a>(&'a AtomicUsize);

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    pub(super) fn new(counters: Arc<CacheCounters>) -> Flights<T> {
        Flights { running: Arc::default(), waiting: AtomicUsize::default(), counters }
    }

    /// Runs `work`, or joins the run with the same key. The run goes on when all who wait for it go away.
    pub(super) async fn join(
        &self,
        key: String,
        work: impl Future<Output = Outcome<T>> + Send + 'static,
    ) -> Outcome<T> {
        let waiter = Waiter(&self.waiting);
        if waiter.0.fetch_add(1, Ordering::SeqCst) >= WAITERS_MAX {
            CacheCounters::one(&self.counters.refused_waiters);
            return Err(Failure::Here(format!("{WAITERS_MAX} requests are waiting already")));
        }
        self.begin(key, work).await
    }

    /// Like [`Flights::join`]; the run begins now, and need not be waited for.
    pub(super) fn begin(
        &self,
        key: String,
        work: impl Future<Output = Outcome<T>> + Send + 'static,
    ) -> Shared<BoxFuture<'static, Outcome<T>>> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = running.get(&key) {
            return flight.clone();
        }
        let (table, name) = (self.running.clone(), key.clone());
        // The lock is held until the run is in the table, so it can't be removed before it is there.
        let task = tokio::spawn(async move {
            let outcome = std::panic::AssertUnwindSafe(work).catch_unwind().await;
            table.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
            outcome.unwrap_or_else(|_| Err(Failure::Here("a part of the cache broke down".to_owned())))
        });
        let flight = task.map(|ended| ended.unwrap_or_else(|e| Err(Failure::Here(e.to_string()))));
        let flight = flight.boxed().shared();
        running.insert(key, flight.clone());
        flight
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn those_who_ask_together_share_one_run() {
        let flights = Arc::new(Flights::<()>::new(Arc::default()));
        let runs = Arc::new(AtomicUsize::new(0));
        let ask = || {
            let (flights, runs) = (flights.clone(), runs.clone());
            tokio::spawn(async move {
                let work = async move {
                    runs.fetch_add(1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    Err(Failure::Absent)
                };
                flights.join("key".to_owned(), work).await
            })
        };
        let first = ask();
        tokio::task::yield_now().await;
        first.abort();
        for asked in (0..20).map(|_| ask()).collect::<Vec<_>>() {
            assert!(matches!(asked.await.unwrap(), Err(Failure::Absent)));
        }
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        assert!(flights.running.lock().unwrap().is_empty());
        assert_eq!(flights.waiting.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn too_many_waiters_are_refused() {
        let flights = Flights::<()>::new(Arc::default());
        flights.waiting.store(WAITERS_MAX, Ordering::SeqCst);
        assert!(matches!(flights.join("key".to_owned(), async { Ok(()) }).await, Err(Failure::Here(_))));
        assert_eq!(flights.counters.refused_waiters.load(Ordering::Relaxed), 1);
        assert_eq!(flights.waiting.load(Ordering::SeqCst), WAITERS_MAX);
    }
}
