//! The machine's images: fetching them, and keeping those warm that the location scheduler asked for.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyplace_images::{Client, Error, Item, Progress, PulledImage, Reference, SharedProgress, Store};
use anyplace_model::{Condition, ImageState, ReasonCode};
use anyplace_service::Backoff;
use tokio::sync::Semaphore;

use crate::board::Board;

/// Images that are fetched at once; each uses several connections and cores.
const PARALLEL: usize = 4;
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// Progress is a report to the scheduler each time.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// The images.
pub(crate) struct Images {
    store: Store,
    client: Client,
    board: Arc<Board>,
    permits: Semaphore,
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
        Self { store, client, board, permits: Semaphore::new(PARALLEL) }
    }

    /// Makes sure that an image is here.
    pub(crate) async fn ensure(&self, reference: &str) -> Result<PulledImage, ImageProblem> {
        let name: Reference = reference.parse().map_err(|error| explain(&error))?;
        let meter: SharedProgress = Arc::new(Meter {
            board: self.board.clone(),
            reference: reference.into(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            told: Mutex::new(Instant::now()),
        });
        // The semaphore is never closed; without a permit the fetch is only less polite.
        let _permit = self.permits.acquire().await;
        self.store.pull(&name, &self.client, &meter).await.map_err(|error| explain(&error))
    }

    /// Makes an image warm, however often it takes, and says on the board how it stands.
    pub(crate) async fn prewarm(&self, reference: &str) {
        let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
        self.board.set_image(reference, ImageState::Pulling { done: 0, total: 0 });
        loop {
            match self.ensure(reference).await {
                Ok(_) => return self.board.set_image(reference, ImageState::Warm),
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
