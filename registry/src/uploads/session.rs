//! One upload's file, size and hash, and the table of those in progress.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use anyplace_images::{Algorithm, Digest, Hasher};
use axum::http::StatusCode;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use tokio::sync::{OwnedMutexGuard, Semaphore, mpsc};

use crate::errors::{Answer, Refusal, internal};
use crate::storage::{Linked, Storage};

/// Uploads that write at once, each with a thread; more wait for their turn.
const WRITERS_MAX: usize = 128;
/// Uploads whose hash is kept in memory; others are hashed again when they are finished.
const REMEMBERED_MAX: usize = 4_096;
/// Chunks that wait for the disk: with 16 to 64 KiB each, at most 1 MiB an upload.
const WAITING_MAX: usize = 16;
/// How long a client may send nothing.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// An upload that nobody went on with for so long is removed at the next start.
const ABANDONED_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);
/// Files with this prefix are downloads from upstream, which can't be resumed.
const FETCH_PREFIX: &str = "fetch-";

struct State {
    path: PathBuf,
    id: String,
    size: u64,
    /// None: what is in the file was not hashed by this process.
    hasher: Option<Hasher>,
    closed: bool,
}

/// An upload that is held by one request.
pub(crate) struct Session(OwnedMutexGuard<State>);

impl Session {
    /// Bytes that the upload has.
    pub(crate) fn size(&self) -> u64 {
        self.0.size
    }

    /// Name of the upload's file.
    pub(crate) fn id(&self) -> String {
        self.0.id.clone()
    }
}

/// The uploads in progress.
pub(crate) struct Uploads {
    storage: Storage,
    sessions: Mutex<HashMap<String, Arc<tokio::sync::Mutex<State>>>>,
    writers: Semaphore,
}

impl Uploads {
    /// Opens the uploads folder, and removes what was abandoned.
    pub(crate) fn open(storage: Storage) -> anyhow::Result<Uploads> {
        let dir = storage.uploads();
        for entry in std::fs::read_dir(&dir).with_context(|| format!("can't read {}", dir.display()))? {
            let entry = entry?;
            let age = SystemTime::now().duration_since(entry.metadata()?.modified()?).unwrap_or_default();
            if entry.file_name().to_string_lossy().starts_with(FETCH_PREFIX) || age > ABANDONED_AFTER {
                std::fs::remove_file(entry.path())
                    .with_context(|| format!("can't remove {}", entry.path().display()))?;
            }
        }
        Ok(Uploads { storage, sessions: Mutex::default(), writers: Semaphore::new(WRITERS_MAX) })
    }

    /// Starts an upload into a repository, and gives its id.
    pub(crate) async fn start(&self, repository: &str, algorithm: Algorithm) -> io::Result<String> {
        let id = format!("{}{}", random_id(), repository_hash(repository));
        self.create(id.clone(), algorithm).await?;
        Ok(id)
    }

    /// Starts a download from upstream, which nobody can resume.
    pub(crate) async fn start_fetch(&self) -> io::Result<Session> {
        let id = format!("{FETCH_PREFIX}{}", random_id());
        let state = self.create(id, Algorithm::default()).await?;
        Ok(Session(state.lock_owned().await))
    }

    /// An upload, once no other request holds it.
    async fn open_for(&self, id: &str) -> Option<Session> {
        let known = self.sessions().get(id).cloned();
        let state = match known {
            Some(state) => state,
            None => {
                let path = self.storage.uploads().join(id);
                let size = tokio::fs::metadata(&path).await.ok()?.len();
                let hasher = (size == 0).then(Hasher::sha256);
                let state = State { path, id: id.to_owned(), size, hasher, closed: false };
                self.sessions().entry(id.to_owned()).or_insert_with(|| Arc::new(state.into())).clone()
            }
        };
        let guard = state.lock_owned().await;
        (!guard.closed).then_some(Session(guard))
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
        let _permit = self.writers.acquire().await.map_err(|e| internal("writing an upload", e))?;
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let writing = tokio::task::spawn_blocking(move || write(session, receiver));
        let mut body = std::pin::pin!(body);
        let mut received = 0;
        let outcome = loop {
            let chunk = match tokio::time::timeout(IDLE_MAX, body.next()).await {
                Ok(Some(Ok(chunk))) => chunk,
                Ok(None) => break Ok(()),
                Ok(Some(Err(e))) => {
                    break Err(Refusal::upload_invalid(format!("the content broke off: {e}")));
                }
                Err(_) => {
                    let message = format!("nothing arrived for {} s", IDLE_MAX.as_secs());
                    break Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "BLOB_UPLOAD_INVALID", message));
                }
            };
            received += chunk.len() as u64;
            if declared.is_some_and(|declared| received > declared) {
                break Err(size_invalid(declared, received));
            }
            if sender.send(chunk).await.is_err() {
                // The writer failed, and says why.
                break Ok(());
            }
        };
        drop(sender);
        let (session, written) = writing.await.map_err(|e| internal("writing an upload", e))?;
        written.map_err(|e| internal("writing an upload", e))?;
        outcome?;
        if declared.is_some_and(|declared| declared != received) {
            return Err(size_invalid(declared, received));
        }
        Ok(session)
    }

    /// Verifies the upload and makes it content of the repository. A wrong digest discards it.
    pub(crate) async fn finish(&self, session: Session, repository: &str, digest: &Digest) -> Answer<()> {
        let algorithm = digest.kind();
        let checking = tokio::task::spawn_blocking(move || {
            let mut session = session;
            let found = session.digest(algorithm);
            (session, found)
        });
        let (mut session, found) = checking.await.map_err(|e| internal("verifying an upload", e))?;
        let found = found.map_err(|e| internal("verifying an upload", e))?;
        let id = session.0.id.clone();
        if found != *digest {
            session.0.closed = true;
            drop(session);
            self.discard(&id).await;
            let message =
                format!("the content has the digest {found}, not {digest}; the upload is discarded");
            return Err(Refusal::digest_invalid(message));
        }
        // The link first: it keeps collectors away from the content.
        match self.storage.put_link(repository, digest).await? {
            Linked::Gone => self.storage.adopt(session.0.path.clone(), digest).await?,
            Linked::Yes(_) => {
                tokio::fs::remove_file(&session.0.path).await.map_err(|e| internal("storing a blob", e))?;
            }
        }
        session.0.closed = true;
        self.sessions().remove(&id);
        Ok(())
    }

    /// Removes an upload, if it is there.
    pub(crate) async fn discard(&self, id: &str) {
        let state = self.sessions().remove(id);
        if let Some(state) = state {
            state.lock().await.closed = true;
        }
        if let Err(error) = tokio::fs::remove_file(self.storage.uploads().join(id)).await
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(id, %error, "an upload can't be removed");
        }
    }

    async fn create(&self, id: String, algorithm: Algorithm) -> io::Result<Arc<tokio::sync::Mutex<State>>> {
        let path = self.storage.uploads().join(&id);
        tokio::fs::OpenOptions::new().write(true).create_new(true).open(&path).await?;
        let state = State { path, id: id.clone(), size: 0, hasher: Some(algorithm.hasher()), closed: false };
        let state = Arc::new(tokio::sync::Mutex::new(state));
        let mut sessions = self.sessions();
        if sessions.len() >= REMEMBERED_MAX {
            // Forgotten ones are hashed again from their files. One that is held stays, or it would have two locks.
            sessions.retain(|_, state| Arc::strong_count(state) > 1);
        }
        sessions.insert(id, state.clone());
        Ok(state)
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<String, Arc<tokio::sync::Mutex<State>>>> {
        // The table holds no invariant that a panic could break.
        self.sessions.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Opens an upload of this repository.
    pub(crate) async fn resume(&self, repository: &str, id: &str) -> Answer<Session> {
        let unknown = || {
            let message = format!("no upload `{id}` in `{repository}`; start a new one");
            Refusal::new(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", message)
        };
        let well_formed = id.len() == 48 && id.bytes().all(|b| b.is_ascii_hexdigit());
        if !well_formed || !id.ends_with(&repository_hash(repository)) {
            return Err(unknown());
        }
        self.open_for(id).await.ok_or_else(unknown)
    }
}

impl Session {
    /// Blocking: the digest of all that the upload has, with all of it on disk.
    fn digest(&mut self, algorithm: Algorithm) -> io::Result<Digest> {
        let state = &mut *self.0;
        let mut file = File::open(&state.path)?;
        file.sync_all()?;
        if let Some(hasher) = &state.hasher {
            let found = hasher.clone().finish();
            // Hashed by another algorithm than the one that is asked for now: once more, from the file.
            if found.kind() == algorithm {
                return Ok(found);
            }
        }
        let mut hasher = algorithm.hasher();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                read => hasher.update(&buffer[..read]),
            }
        }
        state.hasher = Some(hasher.clone());
        Ok(hasher.finish())
    }
}

/// Blocking: writes and hashes what comes. The upload is given back as it is on disk, whatever happened.
fn write(mut session: Session, mut receiver: mpsc::Receiver<Bytes>) -> (Session, io::Result<()>) {
    let state = &mut *session.0;
    let mut run = || {
        let mut file = OpenOptions::new().append(true).open(&state.path)?;
        while let Some(chunk) = receiver.blocking_recv() {
            file.write_all(&chunk)?;
            if let Some(hasher) = &mut state.hasher {
                hasher.update(&chunk);
            }
            state.size += chunk.len() as u64;
        }
        // What is acknowledged must be there after a power failure.
        file.sync_data()
    };
    let result = run();
    if result.is_err() {
        state.hasher = None;
        state.size = file_size(&state.path).unwrap_or(state.size);
    }
    (session, result)
}

fn file_size(path: &Path) -> io::Result<u64> {
    Ok(std::fs::metadata(path)?.len())
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
