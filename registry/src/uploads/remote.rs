//! An upload in a bucket, where objects can't grow.
//!
//! Each request's bytes become an object of their own, `data/<upload>/<random>`: one put where they are few, else parts of
//! equal size (some stores insist on that), several at once. The upload's state, `uploads/<upload>/<revision>`, lists
//! those objects, with the offset and the hash up to there; a request is acknowledged when its state is written. So
//! nothing has to be kept in a process, any registry on the bucket can go on, nothing is hashed twice, and at the end the
//! content points to the objects: no byte is copied. A short last object is read again and put before what comes
//! next, so that a chunked upload doesn't end as thousands of objects.
//!
//! A state is put only if there is none with its revision, so one of two requests wins, and the other is told to ask for
//! the offset. Objects of the one that lost, or that a crash left, are removed by a sweep; nothing here deletes what
//! another process could have made content in the meantime.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyplace_images::{Algorithm, Digest, Hasher};
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{ObjectMeta, PutPayload};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::session::Unfinished;
use crate::storage::{Error, Result, Segment, Storage};

/// Size of a part, and how many make an object (stores take 10,000): objects of up to 140 GiB. An upload may have as many
/// of them as a list of content's segments has room for: 1 TiB by the shortest parts that clients are told to send,
/// 32 TB by the longest, more in one request.
const SIZES: Sizes = Sizes { part_bytes: 16 << 20, parts_max: 9_000, objects_max: 65_536 };
/// Parts of one upload that are sent at once.
const SENDING_MAX: usize = 4;
/// Parts of all uploads that are on their way: together 128 MiB. More wait, and so do their clients.
const SENDING_ALL_MAX: usize = 8;
/// Uploads that write at once; more wait for their turn. Each fills one part beside those on their way, so all
/// together have at most 640 MiB in memory; slow clients have little of that.
pub(super) const WRITERS_MAX: usize = 32;
/// Times that a state is looked for again, when it was replaced between the listing and the read.
const STATE_TRIES: usize = 5;

/// How large the pieces are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) part_bytes: usize,
    pub(crate) parts_max: usize,
    pub(crate) objects_max: usize,
}

impl Default for Sizes {
    fn default() -> Sizes {
        SIZES
    }
}

/// What all uploads of this process share.
pub(super) struct Shared {
    storage: Storage,
    parts: Arc<dyn MultipartStore>,
    /// The parts that may be on their way.
    sending: Arc<Semaphore>,
    sizes: Sizes,
}

impl Shared {
    pub(super) fn new(storage: Storage, parts: Arc<dyn MultipartStore>, sizes: Sizes) -> Arc<Shared> {
        Arc::new(Shared { storage, parts, sending: Arc::new(Semaphore::new(SENDING_ALL_MAX)), sizes })
    }

    pub(super) fn part_bytes(&self) -> usize {
        self.sizes.part_bytes
    }
}

/// What `uploads/<upload>/<revision>` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    algorithm: String,
    offset: u64,
    /// Hexadecimal, as [`Hasher::save`] gives it.
    hash: String,
    segments: Vec<Segment>,
    /// Empty in states of earlier versions.
    #[serde(default)]
    repository: String,
    /// Tells two writers of one revision apart.
    writer: String,
}

/// An open upload.
pub(super) struct RemoteUpload {
    shared: Arc<Shared>,
    id: String,
    repository: String,
    /// None: nobody can resume it.
    revision: Option<u64>,
    segments: Vec<Segment>,
    /// The bytes of an upload that nobody can resume, as long as they fit one part.
    pending: Vec<Bytes>,
}

/// What came of an append.
pub(super) enum Appended {
    /// The new offset and hash.
    To(u64, Hasher),
    /// Another request went on with the upload.
    Conflict,
}

impl RemoteUpload {
    /// Without a repository, nobody can resume it.
    pub(super) async fn create(
        shared: &Arc<Shared>,
        id: &str,
        algorithm: Algorithm,
        repository: Option<&str>,
    ) -> Result<RemoteUpload> {
        let mut upload = RemoteUpload::new(shared, id, repository.unwrap_or_default());
        if repository.is_some() {
            upload.revision = Some(0);
            upload.commit(1, 0, &algorithm.hasher(), &[]).await?;
            upload.revision = Some(1);
        }
        Ok(upload)
    }

    fn new(shared: &Arc<Shared>, id: &str, repository: &str) -> RemoteUpload {
        RemoteUpload {
            shared: shared.clone(),
            id: id.to_owned(),
            repository: repository.to_owned(),
            revision: None,
            segments: Vec::new(),
            pending: Vec::new(),
        }
    }

    /// The upload, its acknowledged bytes and their hash, if there is one.
    pub(super) async fn open(
        shared: &Arc<Shared>,
        id: &str,
        repository: &str,
    ) -> Result<Option<(RemoteUpload, u64, Hasher)>> {
        let mut upload = RemoteUpload::new(shared, id, repository);
        for _ in 0..STATE_TRIES {
            let Some(revision) = upload.revisions().await?.into_iter().max() else { return Ok(None) };
            let key = upload.state_key(revision);
            // Gone already: there is a newer one, or it ended.
            let Some(bytes) = shared.storage.read(&key).await? else { continue };
            let state: State = serde_json::from_slice(&bytes).map_err(|e| Error::damaged(&key, e))?;
            let hasher = restore(&state).ok_or_else(|| Error::damaged(&key, "its hash can't be restored"))?;
            (upload.revision, upload.segments) = (Some(revision), state.segments);
            return Ok(Some((upload, state.offset, hasher)));
        }
        Ok(None)
    }

    /// Whether it has as many objects as content may have; it can be finished, but takes no more requests.
    pub(super) fn is_full(&self) -> bool {
        self.segments.len() >= self.shared.sizes.objects_max
    }

    /// Stores all that comes, and acknowledges it. After an error, or a conflict, the upload is as it was before.
    pub(super) async fn append(
        &mut self,
        at: u64,
        hasher: Hasher,
        batches: &mut mpsc::Receiver<Vec<Bytes>>,
    ) -> Result<Appended> {
        let (mut segments, mut hasher, mut offset) = (self.segments.clone(), hasher, at);
        let mut first = std::mem::take(&mut self.pending);
        if let Some(last) = segments.last().filter(|last| last.len < self.shared.part_bytes() as u64) {
            first = vec![self.read_segment(last).await?];
            segments.pop();
        }
        let mut more = true;
        while more {
            let mut object = Sending::new(self, std::mem::take(&mut first));
            more = loop {
                let Some(batch) = batches.recv().await else { break false };
                offset += batch.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
                let hashed = batch.clone();
                let hashing = tokio::task::spawn_blocking(move || {
                    hashed.iter().for_each(|chunk| hasher.update(chunk));
                    hasher
                });
                let sent = object.push(batch).await;
                hasher = hashing.await.map_err(|e| Error::damaged("the hash", e))?;
                if sent? >= self.shared.sizes.parts_max {
                    break true;
                }
            };
            let whole = self.revision.is_none() && segments.is_empty();
            match object.finish(whole).await? {
                Sent::Nothing => {}
                Sent::Object(segment) => segments.push(segment),
                Sent::Short(bytes) => self.pending = bytes,
            }
        }
        if let Some(revision) = self.revision {
            if offset == at {
                return Ok(Appended::To(offset, hasher));
            }
            if !self.commit(revision + 1, offset, &hasher, &segments).await? {
                return Ok(Appended::Conflict);
            }
            self.shared.storage.drop_object(&self.state_key(revision)).await;
            self.revision = Some(revision + 1);
        }
        self.segments = segments;
        Ok(Appended::To(offset, hasher))
    }

    /// The digest by another algorithm than the one that was hashed by.
    pub(super) async fn digest(&self, algorithm: Algorithm) -> Result<Digest> {
        let mut hasher = algorithm.hasher();
        self.pending.iter().for_each(|chunk| hasher.update(chunk));
        for segment in &self.segments {
            let mut stream = self.shared.storage.open_key(&segment.key).await?;
            while let Some(chunk) =
                stream.try_next().await.map_err(|e| self.shared.storage.failed_at("read", &segment.key, e))?
            {
                hasher.update(&chunk);
            }
        }
        Ok(hasher.finish())
    }

    /// Makes the upload, which has this digest, content of the repository, and ends it.
    pub(super) async fn finish(&mut self, repository: &str, digest: &Digest) -> Result<()> {
        // The link first: it keeps collectors away from the content. What is there already may be damaged since it was
        // stored, and what came now is right.
        self.shared.storage.put_link(repository, digest).await?;
        if self.segments.is_empty() {
            let content = std::mem::take(&mut self.pending).concat();
            self.shared.storage.put_content(digest, content.into()).await?;
        } else {
            // Once this may have been done, nothing but a sweep may delete them.
            let segments = std::mem::take(&mut self.segments);
            self.shared.storage.put_segments(digest, &segments).await?;
        }
        self.forget().await
    }

    /// Removes the upload. Objects that another process may know of are left to a sweep.
    pub(super) async fn remove(&mut self) -> Result<()> {
        self.forget().await
    }

    async fn forget(&self) -> Result<()> {
        if self.revision.is_some() {
            for revision in self.revisions().await? {
                self.shared.storage.drop_object(&self.state_key(revision)).await;
            }
        }
        Ok(())
    }

    async fn revisions(&self) -> Result<Vec<u64>> {
        let listed = self.shared.storage.listed(&format!("uploads/{}", self.id)).await?;
        Ok(listed.iter().filter_map(|meta| meta.location.filename()?.parse().ok()).collect())
    }

    /// False: another writer was first.
    async fn commit(
        &self,
        revision: u64,
        offset: u64,
        hasher: &Hasher,
        segments: &[Segment],
    ) -> Result<bool> {
        let key = self.state_key(revision);
        let state = State {
            algorithm: hasher.algorithm().to_string(),
            offset,
            hash: hex::encode(hasher.save()),
            segments: segments.to_vec(),
            repository: self.repository.clone(),
            writer: hex::encode(rand::random::<[u8; 8]>()),
        };
        let json = serde_json::to_vec(&state).map_err(|e| Error::damaged(&key, e))?;
        self.shared.storage.create(&key, json.into()).await
    }

    async fn read_segment(&self, segment: &Segment) -> Result<Bytes> {
        let key = Path::from(segment.key.as_str());
        self.shared
            .storage
            .read(&key)
            .await?
            .ok_or_else(|| Error::damaged(&key, "gone, though an upload has it"))
    }

    fn state_key(&self, revision: u64) -> Path {
        Path::from(format!("uploads/{}/{revision:08}", self.id))
    }
}

impl Drop for RemoteUpload {
    fn drop(&mut self) {
        let segments = std::mem::take(&mut self.segments);
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        // Nobody can go on with it, and no content points to it.
        if self.revision.is_none() && !segments.is_empty() {
            let storage = self.shared.storage.clone();
            runtime.spawn(async move {
                for segment in segments {
                    storage.drop_object(&Path::from(segment.key)).await;
                }
            });
        }
    }
}

/// The uploads that can be gone on with.
pub(super) async fn unfinished(shared: &Shared) -> Result<Vec<Unfinished>> {
    let mut newest: BTreeMap<String, ObjectMeta> = BTreeMap::new();
    for meta in shared.storage.listed("uploads").await? {
        let id = meta.location.as_ref().split('/').nth(1).unwrap_or_default().to_owned();
        let at = newest.entry(id).or_insert_with(|| meta.clone());
        // Revisions are written in eight digits, so the later text is the later state.
        if at.location < meta.location {
            *at = meta;
        }
    }
    let mut found = Vec::new();
    for (id, meta) in newest {
        // Gone already: it went on or ended, which the next look sees.
        let Some(bytes) = shared.storage.read(&meta.location).await? else { continue };
        if let Ok(State { repository, offset: bytes, .. }) = serde_json::from_slice(&bytes) {
            found.push(Unfinished { repository, id, bytes, touched: meta.last_modified.into() });
        }
    }
    Ok(found)
}

fn restore(state: &State) -> Option<Hasher> {
    Hasher::restore(state.algorithm.parse().ok()?, &hex::decode(&state.hash).ok()?)
}

/// What a request's bytes became.
enum Sent {
    Nothing,
    Object(Segment),
    /// Too few for an object; only where the caller keeps them.
    Short(Vec<Bytes>),
}

/// One object on its way.
struct Sending {
    shared: Arc<Shared>,
    key: Path,
    buffer: Vec<Bytes>,
    buffered: usize,
    /// The store's id for the parts, and where it is remembered.
    begun: Option<(String, Path)>,
    count: usize,
    len: u64,
    /// Tasks, so that parts are sent also while the client lets wait.
    sending: JoinSet<object_store::Result<(usize, PartId)>>,
    done: Vec<(usize, PartId)>,
}

impl Sending {
    fn new(upload: &RemoteUpload, first: Vec<Bytes>) -> Sending {
        let random = hex::encode(rand::random::<[u8; 8]>());
        Sending {
            shared: upload.shared.clone(),
            key: Path::from(format!("data/{}/{random}", upload.id)),
            buffered: first.iter().map(Bytes::len).sum(),
            buffer: first,
            begun: None,
            count: 0,
            len: 0,
            sending: JoinSet::new(),
            done: Vec::new(),
        }
    }

    /// Takes bytes, sends what makes a part, and gives the number of parts.
    async fn push(&mut self, batch: Vec<Bytes>) -> Result<usize> {
        for mut chunk in batch {
            while !chunk.is_empty() {
                let fits = chunk.split_to(chunk.len().min(self.shared.part_bytes() - self.buffered));
                self.buffered += fits.len();
                self.buffer.push(fits);
                if self.buffered == self.shared.part_bytes() {
                    self.send().await?;
                }
            }
        }
        Ok(self.count)
    }

    /// The turn of one more part.
    async fn turn(&mut self) -> Result<OwnedSemaphorePermit> {
        while self.sending.len() >= SENDING_MAX {
            self.wait_for_one().await?;
        }
        let all = self.shared.sending.clone();
        all.acquire_owned().await.map_err(|e| Error::damaged("the bound on parts", e))
    }

    /// Waits until one more part is sent; false if there is none.
    async fn wait_for_one(&mut self) -> Result<bool> {
        let Some(sent) = self.sending.join_next().await else { return Ok(false) };
        let sent = sent.map_err(object_store::Error::from).flatten();
        let failed = |e| self.shared.storage.failed_at("write", self.key.as_ref(), e);
        self.done.push(sent.map_err(failed)?);
        Ok(true)
    }

    async fn send(&mut self) -> Result<()> {
        let permit = self.turn().await?;
        let failed = |e| self.shared.storage.failed_at("write", self.key.as_ref(), e);
        let id = match &self.begun {
            Some((id, _)) => id.clone(),
            None => {
                let id = self.shared.parts.create_multipart(&self.key).await.map_err(failed)?;
                let remembered = self.shared.storage.remember_parts(&self.key, &id).await?;
                self.begun = Some((id.clone(), remembered));
                id
            }
        };
        let payload: PutPayload = std::mem::take(&mut self.buffer).into_iter().collect();
        let (parts, key, number) = (self.shared.parts.clone(), self.key.clone(), self.count);
        self.count += 1;
        self.len += self.buffered as u64;
        self.buffered = 0;
        self.sending.spawn(async move {
            let part = parts.put_part(&key, &id, number, payload).await;
            drop(permit);
            Ok((number, part?))
        });
        Ok(())
    }

    /// Makes the object. With `keep_short`, bytes that are no part's worth are given back instead.
    async fn finish(mut self, keep_short: bool) -> Result<Sent> {
        if self.begun.is_none() {
            if self.buffered == 0 {
                return Ok(Sent::Nothing);
            }
            if keep_short {
                return Ok(Sent::Short(std::mem::take(&mut self.buffer)));
            }
            let (key, len) = (self.key.to_string(), self.buffered as u64);
            let payload: PutPayload = std::mem::take(&mut self.buffer).into_iter().collect();
            self.shared.storage.put_payload(&self.key, payload).await?;
            return Ok(Sent::Object(Segment { key, len }));
        }
        if self.buffered > 0 {
            self.send().await?;
        }
        while self.wait_for_one().await? {}
        let mut done = std::mem::take(&mut self.done);
        done.sort_unstable_by_key(|(number, _)| *number);
        let done = done.into_iter().map(|(_, part)| part).collect();
        let Some((id, remembered)) = self.begun.take() else { return Ok(Sent::Nothing) };
        let segment = Segment { key: self.key.to_string(), len: self.len };
        if let Err(error) = self.shared.parts.complete_multipart(&self.key, &id, done).await {
            // It may be done all the same, and only the answer lost.
            let there = self.shared.storage.head(&self.key).await;
            if !matches!(there, Ok(Some(meta)) if meta.size == segment.len) {
                self.begun = Some((id, remembered));
                return Err(self.shared.storage.failed_at("write", self.key.as_ref(), error));
            }
        }
        self.shared.storage.drop_object(&remembered).await;
        Ok(Sent::Object(segment))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        let Some((id, remembered)) = self.begun.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        // What fails here is left to a sweep, which finds it remembered.
        let (parts, storage, key) =
            (self.shared.parts.clone(), self.shared.storage.clone(), self.key.clone());
        runtime.spawn(async move {
            match parts.abort_multipart(&key, &id).await {
                Ok(()) => storage.drop_object(&remembered).await,
                Err(error) => tracing::debug!(%error, %key, "parts can't be dropped"),
            }
        });
    }
}

#[cfg(test)]
mod tests;
