//! Markers around deletions: the collector's side of the protocol that `storage` describes.
//!
//! A hold puts its markers, deletes within [`USE_MAX`], and removes them. A deletion that failed may still be done by
//! the store later, so its marker stays; the next collection removes it when it is [`STALE_AFTER`] old. The same
//! goes for what a crash leaves. Between the two lengths lies all the time that a request on its way may take, with
//! retries: a process that was stopped in the middle finds its hold over when it goes on, and deletes nothing.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::sync::Mutex;
use std::task::Poll;
use std::time::Duration;

use anyplace_registry_core::clock::TOLERANCE_MS;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::time::Instant;

use super::run::Context;
use crate::storage::{Marked, Result};

/// How long after its marker a deletion may begin.
pub(super) const USE_MAX: Duration = Duration::from_secs(60);
/// How old a marker is, by the store's clock, when nobody can be behind it any more.
pub(super) const STALE_AFTER: Duration = Duration::from_secs(15 * 60);
/// Most markers of a hold: writers wait for all of it.
pub(super) const MARKED_MAX: usize = 128;
/// Requests at once.
pub(super) const AT_ONCE: usize = 16;

/// Markers that are there.
pub(super) struct Hold {
    marked: BTreeSet<Marked>,
    since: Instant,
    unsure: Mutex<BTreeSet<Marked>>,
}

impl Hold {
    /// Puts the markers.
    pub(super) async fn open(cx: &Context<'_>, marked: BTreeSet<Marked>) -> anyhow::Result<Hold> {
        let since = Instant::now();
        let hold = Hold { marked, since, unsure: Mutex::default() };
        let put = async |marked: Marked| cx.storage.put_marker(&marked, &cx.run).await;
        let opening = async {
            stream::iter(hold.marked.clone()).map(put).buffered(AT_ONCE).try_collect::<()>().await?;
            goes_on(cx).await
        };
        match opening.await {
            Ok(()) => Ok(hold),
            Err(error) => {
                hold.close(cx).await;
                Err(error)
            }
        }
    }

    /// Does a deletion at one of the marked, as long as it isn't too late: each of its requests begins in time, or not at
    /// all.
    pub(super) async fn delete(
        &self,
        marked: &Marked,
        deletion: impl Future<Output = Result<bool>>,
    ) -> anyhow::Result<bool> {
        self.change(|unsure| unsure.insert(marked.clone()));
        let mut deletion = std::pin::pin!(deletion);
        let deleted = poll_fn(|cx| match self.check() {
            Ok(()) => deletion.as_mut().poll(cx).map_err(anyhow::Error::from),
            Err(error) => Poll::Ready(Err(error)),
        });
        let deleted = deleted.await?;
        self.change(|unsure| unsure.remove(marked));
        Ok(deleted)
    }

    fn check(&self) -> anyhow::Result<()> {
        let elapsed = self.since.elapsed();
        #[cfg(test)]
        let elapsed = match crate::storage::mutant::is(crate::storage::mutant::Mutant::NoDeadline) {
            true => Duration::ZERO,
            false => elapsed,
        };
        anyhow::ensure!(
            elapsed < USE_MAX,
            "the store or this process was too slow: {} s passed since the marker was put, at most {} s may; \
             nothing more is deleted behind it, and the next collection goes on",
            elapsed.as_secs(),
            USE_MAX.as_secs()
        );
        Ok(())
    }

    /// Removes the markers, but of deletions that may still happen.
    pub(super) async fn close(self, cx: &Context<'_>) {
        let unsure = self.unsure.into_inner().unwrap_or_default();
        let remove = async |marked: Marked| {
            if let Err(error) = cx.storage.remove_marker(&marked, &cx.run).await {
                cx.report(|report| report.problem(error));
            }
        };
        let sure = self.marked.into_iter().filter(|marked| !unsure.contains(marked));
        stream::iter(sure).map(remove).buffer_unordered(AT_ONCE).collect::<()>().await;
    }

    fn change(&self, change: impl FnOnce(&mut BTreeSet<Marked>) -> bool) {
        if let Ok(mut unsure) = self.unsure.lock() {
            change(&mut unsure);
        }
    }
}

/// Whether the store's clock is after the collection's start. What was put before the markers, after the clock was set back,
/// would look old.
async fn goes_on(cx: &Context<'_>) -> anyhow::Result<()> {
    let now = cx.storage.now().await?;
    #[cfg(test)]
    if crate::storage::mutant::is(crate::storage::mutant::Mutant::NoLookAtClock) {
        return Ok(());
    }
    let back = cx.ages.now().duration_since(now).unwrap_or_default();
    anyhow::ensure!(
        back <= Duration::from_millis(TOLERANCE_MS),
        "the store's clock was set back by {} s while the collection ran, so ages aren't known; nothing more is deleted, \
         and the next collection goes on",
        back.as_secs()
    );
    Ok(())
}

/// Removes the markers that nobody can be behind any more, and says how many there were.
pub(super) async fn remove_stale(storage: &crate::storage::Storage) -> Result<u64> {
    let markers = storage.markers().await?;
    if markers.is_empty() {
        return Ok(0);
    }
    let ages = storage.ages().await?;
    let mut removed = 0;
    for marker in markers {
        if ages.of_past(marker.put) >= STALE_AFTER {
            removed += u64::from(storage.remove_stale_marker(&marker).await?);
        }
    }
    Ok(removed)
}
