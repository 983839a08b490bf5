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
//! - `repositories/<name>/_upstream/<tag>`: the digest that the upstream gave the tag, as last seen
//! - `trash/<when>-<random>`: deleted, and can be brought back
//! - `gc/deleting/<algorithm>/<digest>/<run>`: a collector is about to delete this content, or links to it
//! - `gc/clock`: written to read the store's own time
//! - `uploads/<id>/...`: uploads in progress
//!
//! No part of a repository's name starts with `_`, so the keys of `a` and `a/_tags` can't meet.
//!
//! **Writers against the collector.** There is no lock, and no store has to have conditional writes. A collector puts
//! its marker, *then* looks for links once more, then deletes, then removes the marker. A writer puts its link, *then*
//! waits until there is no marker, then looks whether the content is still there. Whoever comes second sees the
//! other: either the collector finds the link and stops, or the writer finds the marker and waits, and then finds
//! the content gone and stores it again. A manifest and the blobs that it names are the same: the pending
//! entry is put first, then the blobs' markers are waited for, then their links looked for.

mod collect;
mod content;
mod error;
mod folder;
mod keys;
mod links;
mod manifests;
mod tags;

use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime};

use anyhow::Context as _;
use bytes::Bytes;
use object_store::path::Path;
use object_store::{GetResultPayload, ObjectStore, ObjectStoreExt as _};

use crate::config::Config;
#[expect(unused_imports, reason = "for collectors")]
pub(crate) use collect::{Marker, Trashed, TrashedItem};
#[expect(unused_imports, reason = "for collectors")]
pub(crate) use content::Content;
pub(crate) use error::{Error, Result};
use folder::Folder;
#[expect(unused_imports, reason = "for collectors")]
pub(crate) use links::Link;
pub(crate) use links::Linked;
#[expect(unused_imports, reason = "for collectors")]
pub(crate) use manifests::ManifestInfo;
pub(crate) use manifests::{ManifestEntry, NewManifest};
#[expect(unused_imports, reason = "for collectors")]
pub(crate) use tags::TagInfo;
pub(crate) use tags::TagOf;

/// The layout that this version reads and writes. Layout 1 had no `format` object.
const FORMAT: u32 = 2;
/// Largest object that is read into memory whole: manifests are at most 4 MiB.
const READ_MAX_BYTES: u64 = 16 << 20;
/// Up to this size, a file is read without a hop to another thread, which would cost more than the read.
const READ_INLINE_BYTES: u64 = 128 << 10;

/// The registry's content. Clones are the same storage.
#[derive(Clone)]
pub(crate) struct Storage {
    inner: Arc<Inner>,
}

struct Inner {
    objects: Arc<dyn ObjectStore>,
    /// How the store is called in messages.
    name: String,
    /// The data folder, where content is files.
    folder: PathBuf,
    /// The store's time, and when it was read.
    clock: OnceLock<(SystemTime, Instant)>,
}

impl Storage {
    /// Opens the store that the settings name, and checks its layout.
    ///
    /// # Errors
    /// The store can't be used, or has a layout of another version.
    pub(crate) async fn open(config: &Config) -> anyhow::Result<Storage> {
        let folder = config.data_dir.clone();
        let objects = Folder::open(&folder)
            .with_context(|| format!("can't open {}; check data_dir", folder.display()))?;
        let name = format!("the folder {}", folder.display());
        let clock = OnceLock::new();
        let storage = Storage { inner: Arc::new(Inner { objects: Arc::new(objects), name, folder, clock }) };
        std::fs::create_dir_all(storage.uploads())
            .with_context(|| format!("can't make {}; check data_dir", storage.uploads().display()))?;
        storage.check_format().await?;
        storage.now().await?;
        Ok(storage)
    }

    /// The folder of the uploads in progress.
    pub(crate) fn uploads(&self) -> PathBuf {
        self.inner.folder.join("uploads")
    }

    /// The data folder.
    pub(crate) fn folder(&self) -> &FilePath {
        &self.inner.folder
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

    async fn put(&self, key: &Path, value: Bytes) -> Result<()> {
        let put = self.inner.objects.put(key, value.into()).await;
        put.map(drop).map_err(|e| self.failed("write", key, e))
    }

    /// A small object, if it is there.
    async fn read(&self, key: &Path) -> Result<Option<Bytes>> {
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
    async fn head(&self, key: &Path) -> Result<Option<object_store::ObjectMeta>> {
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

    fn failed(&self, operation: &'static str, key: &Path, source: object_store::Error) -> Error {
        Error::of(operation, key.as_ref(), &self.inner.name, source)
    }
}
