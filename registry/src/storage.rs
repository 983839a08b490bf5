//! Content, and who has it, kept in an object store: a local folder, or a bucket.
//!
//! Keys, by what they are for:
//! - `format`: the number of this layout; a newer one is refused
//! - `blobs/<algorithm>/<2 digits>/<digest>`: content, shared by all repositories; manifests are content too. In a
//!   folder it is the content itself, in a bucket it has a header and may point to `data/<upload>` (see `content`)
//! - `links/<algorithm>/<digest>/<repository>/_link`: the repository has this content. Content is alive as long as it
//!   has a link, whatever else refers to it
//! - `repositories/<name>/_manifests/<algorithm>/<digest>`: a manifest of the repository ([`ManifestEntry`])
//! - `repositories/<name>/_pending/<algorithm>/<digest>/<random>`: a manifest whose put is not over
//! - `repositories/<name>/_referrers/<algorithm>/<subject>/<algorithm>/<digest>`: a manifest that has this subject
//! - `repositories/<name>/_tags/<tag>`: the digest that a push gave the tag
//! - `repositories/<name>/_trash/<when>-<random>`: deleted, and can be brought back
//! - `gc/deleting/<algorithm>/<digest>/<run>`: a collector is about to delete this content, or links to it
//! - `quarantine/<algorithm>/<digest>-<random>`: content that turned out wrong
//! - `gc/clock`: written to read the store's own time; `gc/skipped`: what ages leave out of it (see `clock`)
//! - `reserve`: blocks that deletions get where a disk is full (see `room`); only in a folder
//! - `access/...`: accounts, teams, the key of tokens
//! - `uploads/<id>...`, `data/<upload>/...`: uploads in progress, and what became of them (see `uploads`)
//!
//! No part of a repository's name starts with `_`, so the keys of `a` and `a/_tags` can't meet.
//!
//! **Writers against the collector.** There is no lock, and no store has to have conditional writes. A collector puts
//! its marker, *then* looks for links once more, then deletes, then removes the marker. A writer puts its link, *then*
//! waits until there is no marker, then looks whether the content is still there. Whoever comes second sees the
//! other: either the collector finds the link and stops, or the writer finds the marker and waits, and then finds
//! the content gone and stores it again. A manifest and the blobs that it names are the same: the pending
//! entry is put first, then the blobs' markers are waited for, then their links looked for.

mod bucket;
mod clock;
mod collect;
mod content;
mod documents;
mod error;
mod folder;
mod keys;
mod links;
mod manifests;
#[cfg(test)]
pub(crate) mod mutant;
mod room;
mod settings;
mod stamps;
mod sweep;
mod tags;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests are tests too")]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use anyplace_images::Digest;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{GetResultPayload, ObjectStore, ObjectStoreExt as _, PutMode};

use crate::config::Config;
#[cfg(test)]
pub(crate) use bucket::LIST_MAX_BYTES;
pub(crate) use bucket::Segment;
pub(crate) use clock::Ages;
pub(crate) use collect::{Marked, Note, Trashed, TrashedItem};
pub(crate) use content::Content;
pub(crate) use error::{Error, Result, is_full};
use folder::Folder;
pub(crate) use folder::generic as folder_error;
pub(crate) use links::Link;
pub(crate) use links::Linked;
pub(crate) use manifests::{ManifestEntry, NewManifest};
pub(crate) use room::{Evict, Room};
use settings::Remote;
pub use settings::{Bucket, Container, StorageConfig};
pub(crate) use stamps::Stamp;
pub(crate) use tags::TagInfo;

/// The layout that this version reads and writes. Layout 1 had no `format` object.
const FORMAT: u32 = 2;
/// Largest object that is read into memory whole: manifests are at most 4 MiB.
const READ_MAX_BYTES: u64 = 16 << 20;
/// Up to this size, a file is read without a hop to another thread, which would cost more than the read.
const READ_INLINE_BYTES: u64 = 128 << 10;

/// Where content is, and so how it gets there.
#[derive(Clone)]
pub(crate) enum Place {
    /// Files in this folder: an upload is one that grows, and is renamed in the end.
    Folder(PathBuf),
    /// Objects in a store that takes them in parts.
    Bucket(Arc<dyn MultipartStore>),
}

/// The registry's content. Clones are the same storage.
#[derive(Clone)]
pub(crate) struct Storage {
    inner: Arc<Inner>,
}

struct Inner {
    objects: Arc<dyn ObjectStore>,
    /// The same objects, with more patience: for puts that may take long.
    bulk: Arc<dyn ObjectStore>,
    /// How the store is called in messages.
    name: String,
    place: Place,
    room: Arc<Room>,
    /// Whether the store can put an object only if there is none, so that one of several writers wins.
    conditional: bool,
    clock: clock::Clock,
    /// Age from which a link is renewed when a client asks for the blob: a quarter of the collectors' grace.
    renew_after: Duration,
}

impl Storage {
    /// Opens the store that the settings name, and checks its layout.
    ///
    /// # Errors
    /// The store can't be used, or has a layout of another version.
    pub(crate) async fn open(config: &Config) -> anyhow::Result<Storage> {
        let renew_after = config.gc.grace.to_std() / 4;
        if let Some(Remote { objects, bulk, parts, name }) = Remote::open(&config.storage)? {
            return Storage::assemble(objects, bulk, Place::Bucket(parts), name, renew_after).await;
        }
        let folder = &config.data_dir;
        let objects = Folder::open(folder)
            .with_context(|| format!("can't open {}; check data_dir", folder.display()))?;
        let (objects, name) = (Arc::new(objects), format!("the folder {}", folder.display()));
        Storage::assemble(objects.clone(), objects, Place::Folder(folder.clone()), name, renew_after).await
    }

    /// Storage over a store of a test.
    #[cfg(test)]
    pub(crate) async fn over(
        objects: Arc<dyn ObjectStore>,
        place: Place,
        renew_after: Duration,
    ) -> anyhow::Result<Storage> {
        let name = "a store of a test".to_owned();
        Storage::assemble(objects.clone(), objects, place, name, renew_after).await
    }

    async fn assemble(
        objects: Arc<dyn ObjectStore>,
        bulk: Arc<dyn ObjectStore>,
        place: Place,
        name: String,
        renew_after: Duration,
    ) -> anyhow::Result<Storage> {
        let clock = clock::Clock::default();
        let (room, conditional) = match &place {
            // A file can be made only where there is none. Nothing else is written, for the disk may be full.
            Place::Folder(folder) => (Room::in_folder(folder), true),
            Place::Bucket(_) => (Room::elsewhere(), probe(&*objects, &name).await?),
        };
        let room = Arc::new(room);
        let inner = Inner { objects, bulk, name, place, room, conditional, clock, renew_after };
        let storage = Storage { inner: Arc::new(inner) };
        storage.check_format().await?;
        storage.learn_clock().await?;
        Ok(storage)
    }

    /// Where content is.
    pub(crate) fn place(&self) -> &Place {
        &self.inner.place
    }

    /// What helps where the disk is full.
    pub(crate) fn room(&self) -> &Arc<Room> {
        &self.inner.room
    }

    /// From now on, a cache on the same disk gives room where it is full.
    pub(crate) fn ask_for_room(&self, cache: Evict) {
        self.inner.room.ask(cache);
    }

    /// Lets in what fills a disk, unless deletions need what is left of it.
    ///
    /// # Errors
    /// [`Error::Full`]: what is reserved for them was given up, and can't be taken back yet.
    pub(crate) async fn check_room(&self) -> Result<()> {
        if self.inner.room.is_whole() {
            return Ok(());
        }
        let room = self.inner.room.clone();
        let refilled = tokio::task::spawn_blocking(move || room.refill()).await;
        let refilled = refilled.unwrap_or_else(|e| Err(std::io::Error::other(e)));
        refilled.map_err(|e| self.failed_io("write", "reserve", e))
    }

    async fn check_format(&self) -> anyhow::Result<()> {
        let (key, name) = (Path::from("format"), &self.inner.name);
        let Some(bytes) = self.read(&key).await? else {
            let repositories =
                self.inner.objects.list_with_delimiter(Some(&Path::from("repositories"))).await;
            let inside = repositories.with_context(|| format!("can't list {name}"))?;
            anyhow::ensure!(
                inside.common_prefixes.is_empty(),
                "{name} has repositories in the layout of an earlier version, and this one reads layout {FORMAT}; \
                 move them away, start the registry on an empty folder or bucket, and push the images again"
            );
            return Ok(self.put(&key, Bytes::from(format!("{FORMAT}\n"))).await?);
        };
        let number: u32 = std::str::from_utf8(&bytes)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .with_context(|| {
                format!("`format` in {name} has no number; expected {FORMAT}: is it a registry's storage?")
            })?;
        anyhow::ensure!(
            number == FORMAT,
            "{name} has layout {number}, and this version reads layout {FORMAT}; run the version that wrote it"
        );
        Ok(())
    }

    /// Puts an object, if there is none with this key, and says whether it did. Where the store can't do that in one
    /// step, two that put at the same moment may both be told so: use it only where that is a waste and no loss.
    pub(crate) async fn create(&self, key: &Path, value: Bytes) -> Result<bool> {
        if !self.inner.conditional {
            if self.head(key).await?.is_some() {
                return Ok(false);
            }
            self.put(key, value.clone()).await?;
            return Ok(self.read(key).await?.as_ref() == Some(&value));
        }
        match self.inner.objects.put_opts(key, value.clone().into(), PutMode::Create.into()).await {
            Ok(_) => Ok(true),
            // Its own, if a first try was done and not answered. So values should differ.
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                Ok(self.read(key).await?.as_ref() == Some(&value))
            }
            Err(e) => Err(self.failed("create", key, e)),
        }
    }

    async fn put(&self, key: &Path, value: Bytes) -> Result<()> {
        self.put_in(&*self.inner.objects, key, value.into()).await
    }

    /// Puts an object that may be as large as a part.
    pub(crate) async fn put_payload(&self, key: &Path, payload: object_store::PutPayload) -> Result<()> {
        self.put_in(&*self.inner.bulk, key, payload).await
    }

    async fn put_in(
        &self,
        objects: &dyn ObjectStore,
        key: &Path,
        payload: object_store::PutPayload,
    ) -> Result<()> {
        let put = async || {
            let put = objects.put(key, payload.clone()).await;
            put.map(drop).map_err(|e| self.failed("write", key, e))
        };
        match put().await {
            Err(Error::Full { .. }) if self.with_room(|room| room.evict()).await => put().await,
            done => done,
        }
    }

    /// Puts what frees room, or is needed for that: where the disk is full, from the reserve.
    pub(super) async fn put_reserved(&self, key: &Path, value: Bytes) -> Result<()> {
        loop {
            match self.put(key, value.clone()).await {
                Err(Error::Full { .. }) if self.with_room(|room| room.give()).await => {}
                done => return done,
            }
        }
    }

    /// Asks for room; false if there is none.
    async fn with_room(&self, ask: impl FnOnce(&Room) -> bool + Send + 'static) -> bool {
        let room = self.inner.room.clone();
        tokio::task::spawn_blocking(move || ask(&room)).await.unwrap_or(false)
    }

    /// All of an object, as it comes.
    pub(crate) async fn open_key(
        &self,
        key: &str,
    ) -> Result<BoxStream<'static, object_store::Result<Bytes>>> {
        let object = self.inner.objects.get(&Path::from(key)).await;
        object.map(object_store::GetResult::into_stream).map_err(|e| self.failed_at("read", key, e))
    }

    /// A small object, if it is there.
    pub(crate) async fn read(&self, key: &Path) -> Result<Option<Bytes>> {
        let failed = |e| self.failed("read", key, e);
        let object = match self.inner.objects.get(key).await {
            Ok(object) => object,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        if object.meta.size > READ_MAX_BYTES {
            return Err(Error::damaged(
                key,
                format!("{} bytes, expected at most {READ_MAX_BYTES}", object.meta.size),
            ));
        }
        if let GetResultPayload::File(file, _) = &object.payload
            && object.meta.size <= READ_INLINE_BYTES
        {
            use std::os::unix::fs::FileExt as _;
            let mut bytes = vec![0; object.meta.size as usize];
            file.read_exact_at(&mut bytes, 0).map_err(|e| failed(folder::generic(e)))?;
            return Ok(Some(bytes.into()));
        }
        object.bytes().await.map(Some).map_err(failed)
    }

    /// Size and time of an object, if it is there.
    pub(crate) async fn head(&self, key: &Path) -> Result<Option<object_store::ObjectMeta>> {
        match self.inner.objects.head(key).await {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.failed("look for", key, e)),
        }
    }

    /// Says whether there was something to delete.
    async fn remove(&self, key: &Path) -> Result<bool> {
        // Buckets don't tell a delete of something from one of nothing.
        if self.head(key).await?.is_none() {
            return Ok(false);
        }
        match self.inner.objects.delete(key).await {
            Ok(()) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(self.failed("delete", key, e)),
        }
    }

    fn gone(&self, operation: &'static str, key: &Path) -> Error {
        let source = "it was there a moment ago".into();
        self.failed(operation, key, object_store::Error::NotFound { path: key.to_string(), source })
    }

    fn failed(&self, operation: &'static str, key: &Path, source: object_store::Error) -> Error {
        self.failed_at(operation, key.as_ref(), source)
    }

    pub(crate) fn failed_at(&self, operation: &'static str, key: &str, source: object_store::Error) -> Error {
        Error::of(operation, key, &self.inner.name, source)
    }

    /// An error while content is read.
    pub(crate) fn failed_content(
        &self,
        operation: &'static str,
        digest: &Digest,
        source: object_store::Error,
    ) -> Error {
        self.failed(operation, &keys::content(digest), source)
    }

    pub(crate) fn failed_io(&self, operation: &'static str, key: &str, source: std::io::Error) -> Error {
        self.failed_at(operation, key, folder::generic(source))
    }
}

/// Finds out whether the store puts only what isn't there, if it is asked to. Some take the condition and ignore it.
async fn probe(objects: &dyn ObjectStore, name: &str) -> anyhow::Result<bool> {
    let key = Path::from(format!("gc/probe-{}", hex::encode(rand::random::<[u8; 8]>())));
    let put =
        async || objects.put_opts(&key, Bytes::from_static(b"probe").into(), PutMode::Create.into()).await;
    let conditional = match put().await {
        Ok(_) => match put().await {
            Ok(_) => false,
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => true,
            Err(e) => return Err(unusable(name, e)),
        },
        Err(object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. }) => false,
        Err(e) => return Err(unusable(name, e)),
    };
    match objects.delete(&key).await {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
        Err(e) => return Err(unusable(name, e)),
    }
    if conditional {
        tracing::info!(
            store = name,
            "the store has conditional writes; one of several writers of an upload wins"
        );
    } else {
        tracing::warn!(
            store = name,
            "the store has no conditional writes: two registries that write one upload at the same moment may both \
             be told that they did, and the digest decides; nothing else depends on them"
        );
    }
    Ok(conditional)
}

fn unusable(name: &str, error: object_store::Error) -> anyhow::Error {
    Error::of("write a probe", "gc/probe", name, error).into()
}
