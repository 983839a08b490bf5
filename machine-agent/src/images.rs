//! The machine's images: fetching them, and keeping those warm that the location scheduler asked for.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyplace_images::{
    Client, Digest, Error, Item, Progress, PullClass, PullOptions, PulledImage, Reference, SharedProgress,
    Store,
};
use anyplace_model::{Condition, ImageState, ReasonCode};
use anyplace_service::Backoff;
use tokio::sync::Semaphore;

use crate::board::Board;

/// Images of a class that are fetched at once; each uses several connections and cores.
const PARALLEL: usize = 4;
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// How often leftovers are looked for; a pull that is tried again goes on with them until then.
const TIDY_EVERY: Duration = Duration::from_secs(3_600);
/// Progress is a report to the scheduler each time.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// The images.
pub(crate) struct Images {
    store: Store,
    client: Client,
    board: Arc<Board>,
    /// One set for each class: prewarming, which may be slow on purpose, keeps no live pull waiting.
    live: Semaphore,
    prewarm: Semaphore,
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
        Self { store, client, board, live: Semaphore::new(PARALLEL), prewarm: Semaphore::new(PARALLEL) }
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

    /// Makes sure that an image is here.
    pub(crate) async fn ensure(
        &self,
        reference: &str,
        class: PullClass,
    ) -> Result<PulledImage, ImageProblem> {
        let name: Reference = reference.parse().map_err(|error| explain(&error))?;
        let progress: SharedProgress = Arc::new(Meter {
            board: self.board.clone(),
            reference: reference.into(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            told: Mutex::new(Instant::now()),
        });
        // The semaphore is never closed; without a permit the fetch is only less polite.
        let permits = match class {
            PullClass::Live => &self.live,
            PullClass::Prewarm => &self.prewarm,
        };
        let _permit = permits.acquire().await;
        let begun = Instant::now();
        let options = PullOptions { progress, class };
        let image = self.store.pull(&name, &self.client, &options).await.map_err(|error| explain(&error))?;
        if image.stats.layers > 0 {
            let (stats, ms) = (image.stats, begun.elapsed().as_millis());
            tracing::info!(reference, ?class, ms, ?stats, "fetched an image");
        }
        Ok(image)
    }

    /// Makes an image warm, however often it takes, and says on the board how it stands.
    pub(crate) async fn prewarm(&self, reference: &str) {
        let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
        self.board.set_image(reference, ImageState::Pulling { done: 0, total: 0 });
        loop {
            match self.ensure(reference, PullClass::Prewarm).await {
                Ok(image) => {
                    self.board.set_image(reference, ImageState::Warm);
                    // Warm is what it stays for as long as it is wanted.
                    std::future::pending::<()>().await;
                    drop(image);
                }
                Err(ImageProblem { reason, message, permanent }) => {
                    tracing::warn!(reference, message, "can't fetch an image");
                    self.board.set_image(reference, ImageState::Failed(Condition { reason, message }));
                    if permanent {
                        return;
                    }
                }
            }
            tokio::time::sleep(retry.pause()).await;
        }
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
    done: AtomicU64,
    total: AtomicU64,
    told: Mutex<Instant>,
}

impl Progress for Meter {
    fn started(&self, _: &Item, total_bytes: u64) {
        self.total.fetch_add(total_bytes, Ordering::Relaxed);
    }

    fn advanced(&self, _: &Item, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.elapsed() >= PROGRESS_EVERY {
            *told = Instant::now();
            self.board.advance_image(&self.reference, done, self.total.load(Ordering::Relaxed));
        }
    }

    fn finished(&self, _: &Item) {}

    fn skipped(&self, _: &Item, total_bytes: u64) {
        self.total.fetch_add(total_bytes, Ordering::Relaxed);
        self.done.fetch_add(total_bytes, Ordering::Relaxed);
    }
}
