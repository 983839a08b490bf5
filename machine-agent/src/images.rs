//! The machine's images: fetching them, and keeping those warm that the location scheduler asked for.

mod queue;
mod scrub;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyplace_images::{
    Client, Digest, Error, Item, Progress, PullClass, PullOptions, PulledImage, Reference, SharedProgress,
    Store,
};
use anyplace_model::{Condition, ImageState, PRIORITY_AWAITED, ReasonCode};
use anyplace_service::Backoff;
use tokio::sync::{Semaphore, watch};

use crate::board::Board;
use queue::Queue;

/// Images of a class that are fetched at once; each uses several connections and cores.
const PARALLEL: usize = 4;
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// How soon an image is tried again that had no room: looking for some reads what every image has.
const NO_ROOM_RETRY: Duration = Duration::from_secs(60);
/// How often leftovers are looked for; a pull that is tried again goes on with them until then.
const TIDY_EVERY: Duration = Duration::from_secs(3_600);
/// Progress is a report to the scheduler each time.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// The images.
pub(crate) struct Images {
    store: Store,
    client: Client,
    board: Arc<Board>,
    /// Prewarming, which may be slow on purpose, keeps no live pull waiting.
    live: Semaphore,
    prewarm: Queue,
}

/// Why an image can't be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageProblem {
    pub(crate) reason: ReasonCode,
    pub(crate) message: String,
    /// Trying again can't help.
    pub(crate) permanent: bool,
}

impl Images {
    pub(crate) fn new(store: Store, client: Client, board: Arc<Board>) -> Self {
        Self { store, client, board, live: Semaphore::new(PARALLEL), prewarm: Queue::new(PARALLEL) }
    }

    /// The image of an instance that an earlier agent started, so that it stays.
    pub(crate) fn hold(&self, manifest: &Digest) -> Option<PulledImage> {
        self.store.hold(manifest).unwrap_or_else(|error| {
            tracing::warn!(%manifest, %error, "can't find the image of an instance");
            None
        })
    }

    /// Every image in use is held: from now on others may go.
    pub(crate) fn start_evicting(&self) {
        self.store.start_evicting();
    }

    /// Removes what pulls left that never came to their end, every now and then.
    pub(crate) async fn tidy(&self) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(TIDY_EVERY).await;
            let store = self.store.clone();
            match tokio::task::spawn_blocking(move || store.collect()).await {
                Ok(Ok(0)) => {}
                Ok(Ok(bytes)) => tracing::info!(bytes, "removed what belongs to no image"),
                Ok(Err(error)) => tracing::warn!(%error, "can't tidy the image store"),
                Err(error) => tracing::error!(%error, "tidying the image store panicked"),
            }
        }
    }

    /// Makes sure that an image is here, for something that waits for it.
    pub(crate) async fn ensure(&self, reference: &str) -> Result<PulledImage, ImageProblem> {
        // Never closed; without a permit the fetch is only less polite.
        let _permit = self.live.acquire().await;
        self.pull(reference, PullClass::Live).await
    }

    async fn pull(&self, reference: &str, class: PullClass) -> Result<PulledImage, ImageProblem> {
        let name: Reference = reference.parse().map_err(|error| explain(&error))?;
        let progress: SharedProgress = Arc::new(Meter::new(self.board.clone(), reference));
        let begun = Instant::now();
        let options = PullOptions { progress, class };
        let image = self.store.pull(&name, &self.client, &options).await.map_err(|error| explain(&error))?;
        if image.stats.layers > 0 {
            let (stats, ms) = (image.stats, begun.elapsed().as_millis());
            tracing::info!(reference, ?class, ms, ?stats, "fetched an image");
        }
        Ok(image)
    }

    /// Makes an image warm, however often it takes, and says on the board how it stands. It waits for its turn by its
    /// priority, except where something waits for it.
    pub(crate) async fn keep(&self, reference: &str, mut priority: watch::Receiver<u8>) {
        let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
        self.board.set_image(reference, ImageState::Cold);
        loop {
            let awaited = *priority.borrow_and_update() == PRIORITY_AWAITED;
            let fetch = async {
                if awaited {
                    self.board.set_image(reference, ImageState::Pulling { done: 0, total: 0 });
                    return self.ensure(reference).await;
                }
                let _turn = self.prewarm.turn(priority.clone()).await;
                self.board.set_image(reference, ImageState::Pulling { done: 0, total: 0 });
                self.pull(reference, PullClass::Prewarm).await
            };
            let fetched = tokio::select! {
                fetched = fetch => fetched,
                // What it has fetched stays, and the next try goes on from there.
                () = turns(priority.clone(), awaited) => continue,
            };
            let pause = match fetched {
                Ok(image) => {
                    let warm = self.store.keep_warm(image);
                    self.board.set_image(reference, ImageState::Warm);
                    // Usually it stays for as long as it is wanted.
                    warm.gone().await;
                    tracing::info!(reference, "an image that was kept warm went");
                    self.board.set_image(reference, ImageState::Cold);
                    LAST_RETRY
                }
                Err(ImageProblem { reason, message, permanent }) => {
                    tracing::warn!(reference, message, "can't fetch an image");
                    self.board.set_image(reference, ImageState::Failed(Condition { reason, message }));
                    if permanent {
                        return;
                    }
                    if reason == ReasonCode::InsufficientDisk { NO_ROOM_RETRY } else { retry.pause() }
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = turns(priority.clone(), awaited) => {}
            }
        }
    }
}

/// Returns when something waits for the image that didn't before, or nothing any more that did.
async fn turns(mut priority: watch::Receiver<u8>, awaited: bool) {
    if priority.wait_for(|priority| (*priority == PRIORITY_AWAITED) != awaited).await.is_err() {
        // Nobody can change it any more.
        std::future::pending().await
    }
}

/// An error as users see it. Those that don't pass by themselves are the image's own.
fn explain(error: &Error) -> ImageProblem {
    let (reason, permanent) = match error {
        Error::RepositoryOrTagNotFound { .. } | Error::BlobNotFound { .. } => {
            (ReasonCode::ImageNotFound, false)
        }
        Error::DigestMismatch { .. } | Error::SizeMismatch { .. } => (ReasonCode::DigestMismatch, false),
        Error::Unauthorized { .. } => (ReasonCode::RegistryUnauthorized, false),
        Error::NoRoom { .. } | Error::DiskFull { .. } => (ReasonCode::InsufficientDisk, false),
        Error::RegistryUnreachable { .. } | Error::Registry { .. } => {
            (ReasonCode::RegistryUnreachable, false)
        }
        Error::InvalidReference { .. } | Error::InvalidDigest { .. } => (ReasonCode::ImageNotFound, true),
        Error::Unsupported { .. }
        | Error::NoPlatform { .. }
        | Error::InvalidManifest { .. }
        | Error::LayerLimit { .. }
        | Error::UnsafeEntry { .. } => (ReasonCode::StartFailed, true),
        _ => (ReasonCode::StartFailed, false),
    };
    let mut message = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        source = cause.source();
    }
    ImageProblem { reason, message, permanent }
}

/// Adds up the layers' progress.
struct Meter {
    board: Arc<Board>,
    reference: String,
    layers: Mutex<Layers>,
}

struct Layers {
    /// Bytes that are done, and all; a layer that begins anew is no second one.
    by_item: HashMap<Item, (u64, u64)>,
    told: Instant,
}

impl Layers {
    fn sums(&self) -> (u64, u64) {
        self.by_item.values().fold((0, 0), |sums, of| (sums.0 + of.0, sums.1 + of.1))
    }
}

impl Meter {
    fn new(board: Arc<Board>, reference: &str) -> Self {
        let layers = Layers { by_item: HashMap::new(), told: Instant::now() };
        Self { board, reference: reference.into(), layers: Mutex::new(layers) }
    }

    fn layers(&self) -> MutexGuard<'_, Layers> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress for Meter {
    fn started(&self, item: &Item, total_bytes: u64) {
        self.layers().by_item.insert(item.clone(), (0, total_bytes));
    }

    fn advanced(&self, item: &Item, bytes: u64) {
        let mut layers = self.layers();
        if let Some((done, _)) = layers.by_item.get_mut(item) {
            *done += bytes;
        }
        if layers.told.elapsed() >= PROGRESS_EVERY {
            layers.told = Instant::now();
            let (done, total) = layers.sums();
            self.board.advance_image(&self.reference, done, total);
        }
    }

    fn finished(&self, _: &Item) {}

    fn skipped(&self, item: &Item, total_bytes: u64) {
        self.layers().by_item.insert(item.clone(), (total_bytes, total_bytes));
    }
}

#[cfg(test)]
mod tests {
    use anyplace_images::Stage;

    use super::*;

    #[test]
    fn a_layer_that_begins_anew_counts_once() {
        let meter = Meter::new(Arc::new(Board::new(Vec::new())), "app:v1");
        let item = |name: &str| Item { stage: Stage::Fetch, name: name.into() };
        meter.skipped(&item("a"), 50);
        meter.started(&item("b"), 100);
        meter.advanced(&item("b"), 60);
        assert_eq!(meter.layers().sums(), (110, 150));
        meter.started(&item("b"), 120);
        meter.advanced(&item("b"), 30);
        assert_eq!(meter.layers().sums(), (80, 170));
    }
}
