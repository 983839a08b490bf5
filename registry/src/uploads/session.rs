//! Uploads in progress, wherever they are kept: opened by one request at a time, appended to, finished.
//!
//! The bytes of a request go from its connection over a short queue to a task that owns the upload. When the
//! client goes away in the middle, that task stores and acknowledges what it has, so the client can go on from there.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use anyplace_images::{Algorithm, Digest, Hasher};
use axum::http::StatusCode;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use super::local::{self, LocalUpload, Opened};
use super::remote::{self, Appended, RemoteUpload, Shared, Sizes};
use super::turns::{Pace, Turns};
use crate::errors::{Answer, Refusal, internal};
use crate::storage::{self, Place, Storage};

/// Uploads that write to a folder at once; more wait for their turn (see `turns`).
const WRITERS_MAX: usize = 128;
/// Bytes that are handed on together: fewer hops between threads, and not much memory.
const BATCH_BYTES: usize = 256 << 10;
/// Batches that wait for the disk or the store, for each upload.
const WAITING_MAX: usize = 8;
/// How long to wait for a request that holds the upload: one that broke off still syncs what it has.
const HELD_MAX: Duration = Duration::from_secs(10);
/// How soon it is looked for again, at first, and in the end.
const HELD_PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(320));
/// How long a client may send nothing.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// An upload that nobody went on with for so long is removed.
pub(crate) const ABANDONED_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);

/// An upload that is held by one request.
pub(crate) struct Session {
    id: String,
    size: u64,
    hasher: Hasher,
    kept: Kept,
}

/// An upload that can be gone on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unfinished {
    pub(crate) repository: String,
    pub(crate) id: String,
    /// Acknowledged.
    pub(crate) bytes: u64,
    /// When anything was last written of it, by the store's clock; [`Storage::ages`] tells how old that is.
    pub(crate) touched: SystemTime,
}

enum Kept {
    File(LocalUpload),
    Objects(RemoteUpload),
}

impl Session {
    /// Bytes that the upload has, all acknowledged.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }
}

/// The uploads in progress.
pub(crate) struct Uploads {
    storage: Storage,
    turns: Arc<Turns>,
    kept: Arc<KeptIn>,
}

/// Where uploads are kept.
enum KeptIn {
    Folder(PathBuf),
    Bucket(Arc<Shared>),
}

impl Uploads {
    /// Opens the uploads, and removes what was abandoned in a folder.
    pub(crate) fn open(storage: Storage) -> anyhow::Result<Uploads> {
        Uploads::with_sizes(storage, Sizes::default())
    }

    pub(crate) fn with_sizes(storage: Storage, sizes: Sizes) -> anyhow::Result<Uploads> {
        let kept = match storage.place() {
            Place::Folder(folder) => {
                let dir = folder.join("uploads");
                std::fs::create_dir_all(&dir)
                    .and_then(|()| local::sweep(&dir, ABANDONED_AFTER, &storage.ages_as_read()))
                    .with_context(|| format!("can't use {}; check data_dir", dir.display()))?;
                KeptIn::Folder(dir)
            }
            Place::Bucket(parts) => KeptIn::Bucket(Shared::new(storage.clone(), parts.clone(), sizes)),
        };
        let writers = match &kept {
            KeptIn::Folder(_) => WRITERS_MAX,
            KeptIn::Bucket(_) => remote::WRITERS_MAX,
        };
        let turns = Arc::new(Turns::new(writers));
        Ok(Uploads { storage, turns, kept: Arc::new(kept) })
    }

    /// For `/metrics`.
    pub(crate) fn counters(&self) -> [(&'static str, &'static str, &AtomicU64); 2] {
        self.turns.counters()
    }

    /// The uploads that can be gone on with.
    pub(crate) async fn unfinished(&self) -> storage::Result<Vec<Unfinished>> {
        match &*self.kept {
            KeptIn::Folder(dir) => {
                let dir = dir.clone();
                let found = tokio::task::spawn_blocking(move || local::unfinished(&dir)).await;
                let found = found.unwrap_or_else(|e| Err(std::io::Error::other(e)));
                found.map_err(|e| self.storage.failed_io("list", "uploads", e))
            }
            KeptIn::Bucket(shared) => remote::unfinished(shared).await,
        }
    }

    /// Drops uploads that nobody went on with for so long, and says which: whoever sends them begins again.
    pub(crate) async fn drop_idle(
        &self,
        repository: Option<&str>,
        idle: Duration,
    ) -> storage::Result<Vec<Unfinished>> {
        let (ages, mut dropped) = (self.storage.ages().await?, Vec::new());
        for upload in self.unfinished().await? {
            if repository.is_some_and(|wanted| wanted != upload.repository)
                || ages.of(upload.touched).unwrap_or_default() < idle
            {
                continue;
            }
            match self.resume(&upload.repository, &upload.id).await {
                // It went on while others were dropped.
                Ok(session) if session.size() != upload.bytes => {}
                Ok(session) => {
                    self.discard(session).await;
                    dropped.push(upload);
                }
                // A request goes on with it, or ended it.
                Err(refusal) => tracing::debug!(?refusal, id = upload.id, "an upload is not dropped"),
            }
        }
        Ok(dropped)
    }

    /// The shortest part that makes sense here, except for the last.
    pub(crate) fn part_min_bytes(&self) -> u64 {
        match &*self.kept {
            KeptIn::Folder(_) => 1,
            KeptIn::Bucket(shared) => shared.part_bytes() as u64,
        }
    }

    /// Starts an upload into a repository, and gives its id.
    pub(crate) async fn start(&self, repository: &str, algorithm: Algorithm) -> Answer<String> {
        let id = format!("{}{}", random_id(), repository_hash(repository));
        self.create(id.clone(), algorithm, Some(repository)).await?;
        Ok(id)
    }

    /// Starts an upload that nobody can resume: all of its content comes in one go.
    pub(crate) async fn start_whole(&self, algorithm: Algorithm) -> Answer<Session> {
        self.create(format!("whole-{}", random_id()), algorithm, None).await
    }

    async fn create(&self, id: String, algorithm: Algorithm, repository: Option<&str>) -> Answer<Session> {
        let kept = match &*self.kept {
            KeptIn::Folder(dir) => {
                let (path, repository) = (dir.join(&id), repository.map(str::to_owned));
                let room = self.storage.room().clone();
                let create = move || LocalUpload::create(path, algorithm, repository, room);
                Kept::File(self.blocking("start", &id, create).await?)
            }
            KeptIn::Bucket(shared) => {
                Kept::Objects(RemoteUpload::create(shared, &id, algorithm, repository).await?)
            }
        };
        Ok(Session { id, size: 0, hasher: algorithm.hasher(), kept })
    }

    /// Opens an upload of this repository, once no other request of this process holds it.
    pub(crate) async fn resume(&self, repository: &str, id: &str) -> Answer<Session> {
        let unknown = || {
            let message = format!("no upload `{id}` in `{repository}`; start a new one");
            Refusal::new(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", message)
        };
        let well_formed = id.len() == 48 && id.bytes().all(|b| b.is_ascii_hexdigit());
        if !well_formed || !id.ends_with(&repository_hash(repository)) {
            return Err(unknown());
        }
        let session = |size, hasher, kept| Session { id: id.to_owned(), size, hasher, kept };
        match &*self.kept {
            KeptIn::Folder(dir) => {
                let (begun, (mut pause, longest)) = (Instant::now(), HELD_PAUSES);
                loop {
                    let (path, repository) = (dir.join(id), repository.to_owned());
                    let room = self.storage.room().clone();
                    let open = move || LocalUpload::open(path, repository, room);
                    match self.blocking("open", id, open).await? {
                        Opened::Upload(upload, size, hasher) => {
                            return Ok(session(size, hasher, Kept::File(upload)));
                        }
                        Opened::Absent => return Err(unknown()),
                        Opened::Busy if begun.elapsed() > HELD_MAX => return Err(conflict(id)),
                        Opened::Busy => tokio::time::sleep(pause).await,
                    }
                    pause = (pause * 2).min(longest);
                }
            }
            KeptIn::Bucket(shared) => {
                let opened = RemoteUpload::open(shared, id, repository).await?;
                let (upload, size, hasher) = opened.ok_or_else(unknown)?;
                Ok(session(size, hasher, Kept::Objects(upload)))
            }
        }
    }

    /// Appends all of `body` to the upload. What arrived stays there, also when the body breaks off.
    pub(crate) async fn append<E: std::fmt::Display>(
        &self,
        session: Session,
        body: impl Stream<Item = Result<Bytes, E>>,
        declared: Option<u64>,
    ) -> Answer<Session> {
        if declared == Some(0) {
            return Ok(session);
        }
        let permit = self.turns.take().await?;
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let writing = tokio::spawn(self.clone_for_task().write(session, declared, receiver, permit));
        let (received, outcome) = feed(body, declared, sender, &self.turns).await;
        let session = writing.await.map_err(|e| internal("writing an upload", e))??;
        outcome?;
        if declared.is_some_and(|declared| declared != received) {
            return Err(size_invalid(declared, received));
        }
        Ok(session)
    }

    fn clone_for_task(&self) -> Uploads {
        Uploads { storage: self.storage.clone(), turns: self.turns.clone(), kept: self.kept.clone() }
    }

    async fn write(
        self,
        session: Session,
        declared: Option<u64>,
        mut batches: mpsc::Receiver<Vec<Bytes>>,
        _permit: OwnedSemaphorePermit,
    ) -> Answer<Session> {
        let Session { id, size, hasher, kept } = session;
        let (size, hasher, kept) = match kept {
            Kept::File(mut upload) => {
                let append = move || {
                    let (size, hasher) = upload.append(size, hasher, declared, &mut batches)?;
                    Ok((size, hasher, Kept::File(upload)))
                };
                self.blocking("write", &id, append).await?
            }
            Kept::Objects(upload) if upload.is_full() => return Err(full(&id)),
            Kept::Objects(mut upload) => match upload.append(size, hasher, &mut batches).await? {
                Appended::To(size, hasher) => (size, hasher, Kept::Objects(upload)),
                Appended::Conflict => return Err(conflict(&id)),
            },
        };
        Ok(Session { id, size, hasher, kept })
    }

    /// Verifies the upload and makes it content of the repository. A wrong digest discards it.
    pub(crate) async fn finish(&self, session: Session, repository: &str, digest: &Digest) -> Answer<()> {
        let Session { id, hasher, kept, .. } = session;
        let hashed = (hasher.algorithm() == digest.kind()).then(|| hasher.finish());
        match kept {
            Kept::File(upload) => self.finish_file(&id, upload, hashed, repository, digest).await,
            Kept::Objects(mut upload) => {
                let found = match hashed {
                    Some(found) => found,
                    None => upload.digest(digest.kind()).await?,
                };
                if found != *digest {
                    upload.remove().await?;
                    return Err(wrong_digest(&found, digest));
                }
                Ok(upload.finish(repository, digest).await?)
            }
        }
    }

    async fn finish_file(
        &self,
        id: &str,
        mut upload: LocalUpload,
        hashed: Option<Digest>,
        repository: &str,
        digest: &Digest,
    ) -> Answer<()> {
        let wanted = digest.clone();
        let verify = move || {
            let found = match hashed {
                Some(found) => found,
                None => upload.digest(wanted.kind())?,
            };
            if found == wanted {
                upload.sync()?
            } else {
                upload.remove()?
            }
            Ok((upload, found))
        };
        let (upload, found) = self.blocking("verify", id, verify).await?;
        if found != *digest {
            return Err(wrong_digest(&found, digest));
        }
        // The link first: it keeps collectors away from the content. What is there already may be damaged since it was
        // stored, and what came now is right.
        self.storage.put_link(repository, digest).await?;
        self.storage.adopt(upload.path().to_owned(), digest).await?;
        self.blocking("end", id, move || upload.forget()).await
    }

    /// Removes an upload; what fails is left to a sweep.
    pub(crate) async fn discard(&self, session: Session) {
        let Session { id, kept, .. } = session;
        let removed = match kept {
            Kept::File(upload) => self.blocking("remove", &id, move || upload.remove()).await,
            Kept::Objects(mut upload) => upload.remove().await.map_err(Refusal::from),
        };
        if let Err(refusal) = removed {
            tracing::warn!(id, ?refusal, "an upload can't be removed");
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        id: &str,
        work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> Answer<T> {
        let done = tokio::task::spawn_blocking(work).await.map_err(|e| internal("writing an upload", e))?;
        let key = format!("uploads/{id}");
        done.map_err(|e| Refusal::from(self.storage.failed_io(operation, &key, e)))
    }
}

/// Hands a request's bytes on, and says how many came, and how it ended.
async fn feed<E: std::fmt::Display>(
    body: impl Stream<Item = Result<Bytes, E>>,
    declared: Option<u64>,
    sender: mpsc::Sender<Vec<Bytes>>,
    turns: &Turns,
) -> (u64, Answer<()>) {
    let mut body = std::pin::pin!(body);
    let (mut received, mut batch, mut batched) = (0, Vec::new(), 0);
    let (mut pace, mut silent) = (Pace::default(), Duration::ZERO);
    let outcome = loop {
        let asked = Instant::now();
        let next = tokio::time::timeout(Pace::WINDOW, body.next()).await;
        let waited = asked.elapsed();
        let chunk = match next {
            Ok(Some(Ok(chunk))) => chunk,
            Ok(None) => break Ok(()),
            Ok(Some(Err(e))) => break Err(Refusal::upload_invalid(format!("the content broke off: {e}"))),
            Err(_) => Bytes::new(),
        };
        silent = if chunk.is_empty() { silent + waited } else { Duration::ZERO };
        if silent >= IDLE_MAX {
            let message = format!("nothing arrived for {} s", IDLE_MAX.as_secs());
            break Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "BLOB_UPLOAD_INVALID", message));
        }
        let slow = pace.is_slow(waited, chunk.len());
        received += chunk.len() as u64;
        if declared.is_some_and(|declared| received > declared) {
            break Err(size_invalid(declared, received));
        }
        batched += chunk.len();
        if !chunk.is_empty() {
            batch.push(chunk);
        }
        if slow && let Err(refusal) = turns.leave_to_others() {
            break Err(refusal);
        }
        if batched >= BATCH_BYTES {
            batched = 0;
            if sender.send(std::mem::take(&mut batch)).await.is_err() {
                // The writer failed, and says why.
                return (received, Ok(()));
            }
        }
    };
    if !batch.is_empty() {
        let _ = sender.send(batch).await;
    }
    (received, outcome)
}

fn conflict(id: &str) -> Refusal {
    let message =
        format!("another request is writing the upload `{id}`; ask for its offset, and go on from there");
    Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID", message)
}

fn full(id: &str) -> Refusal {
    let message = format!(
        "the upload `{id}` has as many parts as it may; begin another, and send longer ones (at most `OCI-Chunk-Max-Length`)"
    );
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message)
}

fn wrong_digest(found: &Digest, expected: &Digest) -> Refusal {
    let message = format!("the content has the digest {found}, not {expected}; the upload is discarded");
    Refusal::digest_invalid(message)
}

fn size_invalid(declared: Option<u64>, received: u64) -> Refusal {
    let message = format!("{} bytes were declared, {received} or more came", declared.unwrap_or(0));
    Refusal::new(StatusCode::BAD_REQUEST, "SIZE_INVALID", message)
}

fn random_id() -> String {
    hex::encode(rand::random::<[u8; 16]>())
}

fn repository_hash(repository: &str) -> String {
    Digest::of(repository.as_bytes()).hex()[..16].to_owned()
}
