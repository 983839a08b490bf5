//! The pull-through cache: fetches from another registry what this one doesn't have, verifies it, and keeps it.
//!
//! However many ask for the same thing at once, one fetch runs; it goes on when the one who asked first goes away.
//! After the upstream was out of reach, it is left alone for a moment, so that not every request waits for it.

mod flights;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use anyplace_images::{Algorithm, Client, Credentials, Digest, Error, Reference};
use axum::http::StatusCode;
use futures_util::stream;

use crate::config::Upstream;
use crate::errors::Refusal;
use crate::references;
use crate::storage::{Linked, NewManifest, Storage};
use crate::uploads::Uploads;
use flights::Flights;

/// How long a question about a tag or a blob may take before the local answer counts: several round trips around
/// the Earth.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a manifest (at most 4 MiB) may take.
const MANIFEST_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the upstream is left alone after it was out of reach.
const LEFT_ALONE: Duration = Duration::from_secs(3);

/// What the upstream says about a tag.
pub(crate) enum Resolved {
    Found(Digest),
    Absent,
    /// No answer; the refusal is for where there is no local answer either.
    Unreachable(Refusal),
}

/// Why a fetch brought nothing.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    Absent,
    Unreachable(String),
    Corrupt(String),
    Failed(String),
}

#[derive(Clone)]
pub(crate) struct Cache {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    storage: Storage,
    uploads: Arc<Uploads>,
    flights: Flights,
    left_alone_until: Mutex<Option<Instant>>,
}

impl Cache {
    pub(crate) fn new(config: &Upstream, storage: Storage, uploads: Arc<Uploads>) -> anyhow::Result<Cache> {
        let credentials = config.credentials_file.as_deref().map(Credentials::from_file).transpose();
        let client = Client::new(&config.url, credentials.context("upstream.credentials_file")?);
        let inner = Inner {
            client: client.context("upstream.url")?,
            storage,
            uploads,
            flights: Flights::default(),
            left_alone_until: Mutex::new(None),
        };
        Ok(Cache { inner: Arc::new(inner) })
    }

    /// The digest that a tag has upstream.
    pub(crate) async fn resolve_tag(&self, repository: &str, tag: &str) -> Resolved {
        let mut reference = named(repository);
        reference.tag = Some(tag.to_owned());
        let client = &self.inner.client;
        let asked = self.ask(ASK_TIMEOUT, async {
            match client.head_manifest(&reference).await?.digest {
                Some(digest) => Ok(digest),
                None => Ok(client.get_manifest(&reference).await?.digest),
            }
        });
        match asked.await {
            Ok(digest) => Resolved::Found(digest),
            Err(Failure::Absent) => Resolved::Absent,
            Err(failure) => Resolved::Unreachable(failure.into()),
        }
    }

    /// The size that a blob has upstream, if it is known to be there.
    pub(crate) async fn blob_size(&self, repository: &str, digest: &Digest) -> Option<u64> {
        let reference = named(repository);
        self.ask(ASK_TIMEOUT, self.inner.client.head_blob(&reference, digest)).await.ok().flatten()
    }

    /// Makes sure that the manifest is here.
    pub(crate) async fn ensure_manifest(&self, repository: &str, digest: &Digest) -> Result<(), Refusal> {
        let (cache, reference, wanted) = (self.clone(), named(repository).at(digest), digest.clone());
        let fetch = async move {
            let storage = &cache.inner.storage;
            let name = &reference.repository;
            if storage.manifest_entry(name, &wanted).await.map_err(failed)?.is_some() {
                return Ok(());
            }
            let manifest = cache.ask(MANIFEST_TIMEOUT, cache.inner.client.get_manifest(&reference)).await?;
            let read = references::read(Some(&manifest.media_type), &manifest.bytes);
            let read = read.map_err(|reason| Failure::Corrupt(format!("manifest {wanted}: {reason}")))?;
            let mut new = NewManifest::of(read, manifest.bytes);
            // They are fetched when somebody asks for them.
            new.blobs.clear();
            storage.put_manifest(name, &wanted, new).await.map(drop).map_err(failed)
        };
        let key = format!("manifest {repository} {digest}");
        self.inner.flights.join(key, fetch).await.map_err(Refusal::from)
    }

    /// Makes sure that the blob is here.
    pub(crate) async fn ensure_blob(&self, repository: &str, digest: &Digest) -> Result<(), Refusal> {
        let (cache, reference, wanted) = (self.clone(), named(repository), digest.clone());
        let fetch = async move { cache.fetch_blob(&reference, &wanted).await };
        self.inner.flights.join(format!("blob {repository} {digest}"), fetch).await.map_err(|failure| {
            match failure {
                Failure::Absent => Refusal::blob_unknown(repository, digest),
                other => other.into(),
            }
        })
    }

    async fn fetch_blob(&self, reference: &Reference, digest: &Digest) -> Result<(), Failure> {
        let Inner { client, storage, uploads, .. } = &*self.inner;
        let name = &reference.repository;
        if storage.blob_size(name, digest).await.map_err(failed)?.is_some() {
            return Ok(());
        }
        if storage.has_content(digest).await.map_err(failed)? {
            // Another repository has the content; whether this one may have it, the upstream knows.
            let known = self.ask(ASK_TIMEOUT, client.head_blob(reference, digest)).await?;
            known.ok_or(Failure::Absent)?;
            if let Linked::Yes(_) = storage.put_link(name, digest).await.map_err(failed)? {
                return Ok(());
            }
        }
        let blob = self.ask(MANIFEST_TIMEOUT, client.get_blob(reference, digest, None)).await?;
        let session = uploads.start_whole(Algorithm::default()).await;
        let session = session.map_err(|refusal| Failure::Failed(format!("{refusal:?}")))?;
        let chunks =
            stream::try_unfold(blob, async |mut blob| Ok(blob.chunk().await?.map(|chunk| (chunk, blob))));
        // The stream ends with an error when the digest is wrong; the message is kept for the answer.
        let broken = Mutex::new(None);
        let chunks = futures_util::StreamExt::map(chunks, |chunk: Result<_, Error>| {
            chunk.map_err(|error| {
                let failure = Failure::of(error);
                let text = format!("{failure:?}");
                if let Ok(mut broken) = broken.lock() {
                    *broken = Some(failure);
                }
                text
            })
        });
        let outcome = match uploads.append(session, chunks, None).await {
            Ok(session) => uploads.finish(session, name, digest).await,
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = outcome {
            let broken = broken.into_inner().ok().flatten();
            return Err(broken.unwrap_or_else(|| Failure::Failed(format!("{refusal:?}"))));
        }
        Ok(())
    }

    /// Asks the upstream, within a time limit, unless it is being left alone.
    async fn ask<T>(
        &self,
        limit: Duration,
        question: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Failure> {
        let url = self.inner.client.registry();
        let now = Instant::now();
        if self.left_alone().is_some_and(|until| now < until) {
            return Err(Failure::Unreachable(format!(
                "the upstream registry {url} didn't answer a moment ago"
            )));
        }
        let (failure, silent) = match tokio::time::timeout(limit, question).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => {
                let silent = matches!(error, Error::RegistryUnreachable { .. });
                (Failure::of(error), silent)
            }
            Err(_) => {
                (Failure::Unreachable(format!("no answer from {url} within {} s", limit.as_secs())), true)
            }
        };
        if let Failure::Unreachable(reason) = &failure {
            tracing::warn!(reason, "the upstream can't be asked; serving what is here");
        }
        // One that answers with an error may be well for the next question.
        if silent && let Ok(mut until) = self.inner.left_alone_until.lock() {
            *until = Some(Instant::now() + LEFT_ALONE);
        }
        Err(failure)
    }

    fn left_alone(&self) -> Option<Instant> {
        self.inner.left_alone_until.lock().ok().and_then(|until| *until)
    }
}

impl Failure {
    fn of(error: Error) -> Failure {
        let text = error.to_string();
        match error {
            error if error.is_not_found() => Failure::Absent,
            error if error.is_unreachable() => Failure::Unreachable(text),
            Error::DigestMismatch { .. } | Error::SizeMismatch { .. } => Failure::Corrupt(text),
            Error::Unauthorized { .. } => Failure::Unreachable(text),
            _ => Failure::Failed(text),
        }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        match failure {
            Failure::Absent => {
                Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "neither here nor upstream")
            }
            Failure::Unreachable(reason) => {
                let message = format!("it is not here, and the upstream can't be asked: {reason}");
                Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "UNKNOWN", message)
            }
            Failure::Corrupt(reason) => {
                let message = format!("what the upstream sent was refused: {reason}");
                Refusal::new(StatusCode::BAD_GATEWAY, "DIGEST_INVALID", message)
            }
            Failure::Failed(reason) => {
                let message = format!("fetching from the upstream failed: {reason}");
                Refusal::new(StatusCode::BAD_GATEWAY, "UNKNOWN", message)
            }
        }
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    tracing::error!(%error, "the cache can't keep what it fetched");
    Failure::Failed(error.to_string())
}

fn named(repository: &str) -> Reference {
    Reference { registry: None, repository: repository.to_owned(), tag: None, digest: None }
}
