//! One run of each piece of work, however many ask for it at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};

use super::Failure;

type Outcome = Result<(), Failure>;
type Running = HashMap<String, Shared<BoxFuture<'static, Outcome>>>;

/// The work that is running, by key.
#[derive(Default)]
pub(super) struct Flights {
    running: Arc<Mutex<Running>>,
}

impl Flights {
    /// Runs `work`, or joins the run with the same key. The run goes on when all who wait for it go away.
    pub(super) async fn join(
        &self,
        key: String,
        work: impl Future<Output = Outcome> + Send + 'static,
    ) -> Outcome {
        let flight = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            match running.get(&key) {
                Some(flight) => flight.clone(),
                None => {
                    let (table, name) = (self.running.clone(), key.clone());
                    // The lock is held until the run is in the table, so it can't be removed before it is there.
                    let task = tokio::spawn(async move {
                        let outcome = work.await;
                        table.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
                        outcome
                    });
                    let flight =
                        task.map(|ended| ended.unwrap_or_else(|e| Err(Failure::Failed(e.to_string()))));
                    let flight = flight.boxed().shared();
                    running.insert(key, flight.clone());
                    flight
                }
            }
        };
        flight.await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn those_who_ask_together_share_one_run() {
        let (flights, runs) = (Arc::new(Flights::default()), Arc::new(AtomicUsize::new(0)));
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
    }
}
