//! What collectors need: markers, the list of repositories, the trash, and the store's own time.

use std::time::{Instant, SystemTime};

use anyplace_images::Digest;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use super::{Error, ManifestEntry, Result, Storage, TagOf, keys};

/// A collector's sign at a digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Marker {
    pub(crate) digest: Digest,
    /// The collector's run.
    pub(crate) run: String,
    /// When it was put, by the store's clock; compare with [`Storage::now`].
    pub(crate) put: SystemTime,
}

/// What was deleted and can be brought back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Trashed {
    /// A tag, and the digest that it had.
    Tag { repository: String, tag: String, digest: Digest },
    /// A manifest.
    Manifest { repository: String, digest: Digest, entry: ManifestEntry },
}

/// One deletion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TrashedItem {
    pub(crate) id: String,
    /// When it was deleted, by the store's clock; compare with [`Storage::now`].
    pub(crate) deleted: SystemTime,
    pub(crate) what: Trashed,
}

impl Storage {
    /// The store's own time: what it says is the time of an object that is written now. Ages are differences of its
    /// times, so this machine's clock doesn't matter.
    pub(crate) async fn now(&self) -> Result<SystemTime> {
        let key = Path::from("gc/clock");
        self.put(&key, Bytes::new()).await?;
        let meta =
            self.head(&key).await?.ok_or_else(|| Error::damaged(&key, "gone right after it was written"))?;
        let now = meta.last_modified.into();
        let _ = self.inner.clock.set((now, Instant::now()));
        Ok(now)
    }

    /// About the store's own time, without asking: what it was at the start, and what passed here since.
    pub(super) fn about_now(&self) -> SystemTime {
        self.inner.clock.get().map_or_else(SystemTime::now, |(then, read)| *then + read.elapsed())
    }

    /// Puts a marker; writers of this digest wait until it is removed.
    pub(crate) async fn put_marker(&self, digest: &Digest, run: &str) -> Result<()> {
        self.put(&keys::marker(digest, run), Bytes::new()).await
    }

    /// Removes a marker, if it is there.
    pub(crate) async fn remove_marker(&self, digest: &Digest, run: &str) -> Result<bool> {
        self.remove(&keys::marker(digest, run)).await
    }

    /// The markers of all runs.
    pub(crate) async fn markers(&self) -> Result<Vec<Marker>> {
        let prefix = Path::from("gc/deleting");
        let listed = self.inner.objects.list(Some(&prefix)).map_err(|e| self.failed("list", &prefix, e));
        listed
            .try_filter_map(async |meta| {
                let put = meta.last_modified.into();
                let parsed = keys::digest_in(&meta.location, &prefix);
                Ok(parsed.map(|(digest, run)| Marker { digest, run: run.to_owned(), put }))
            })
            .try_collect()
            .await
    }

    pub(super) async fn is_marked(&self, digest: &Digest) -> Result<bool> {
        let prefix = keys::markers_of(digest);
        let mut listed = self.inner.objects.list(Some(&prefix));
        let first = listed.try_next().await.map_err(|e| self.failed("list", &prefix, e))?;
        Ok(first.is_some())
    }

    /// Whether anything but blobs was ever pushed to, or cached in, this repository.
    pub(crate) async fn has_repository(&self, repository: &str) -> Result<bool> {
        let prefix = Path::from(format!("repositories/{repository}"));
        Ok(self.folders(&prefix).await?.iter().any(|folder| is_inner(folder)))
    }

    /// The names of all repositories that have, or had, manifests or tags, in no order.
    pub(crate) async fn repositories(&self) -> Result<Vec<String>> {
        let (mut found, mut to_visit) = (Vec::new(), vec![Path::from("repositories")]);
        while let Some(at) = to_visit.pop() {
            let (inner, deeper): (Vec<_>, Vec<_>) = self.folders(&at).await?.into_iter().partition(is_inner);
            if !inner.is_empty()
                && let Some(name) = at.as_ref().strip_prefix("repositories/")
            {
                found.push(name.to_owned());
            }
            to_visit.extend(deeper);
        }
        Ok(found)
    }

    /// Keeps a deletion, and gives its id.
    pub(crate) async fn put_trash(&self, what: &Trashed) -> Result<String> {
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        // The time is for people and the order; the age is the object's.
        let id = format!("{seconds:012}-{}", hex::encode(rand::random::<[u8; 8]>()));
        let key = Path::from("trash").join(id.as_str());
        let json = serde_json::to_vec(what).map_err(|e| Error::damaged(&key, e))?;
        self.put(&key, json.into()).await?;
        Ok(id)
    }

    /// All deletions that are kept, in no order.
    pub(crate) async fn trash(&self) -> Result<Vec<TrashedItem>> {
        let prefix = Path::from("trash");
        let listed = self.inner.objects.list(Some(&prefix)).map_err(|e| self.failed("list", &prefix, e));
        let read = async |meta: object_store::ObjectMeta| {
            let Some(bytes) = self.read(&meta.location).await? else { return Ok(None) };
            let what = serde_json::from_slice(&bytes).map_err(|e| Error::damaged(&meta.location, e))?;
            let id = meta.location.filename().unwrap_or_default().to_owned();
            Ok(Some(TrashedItem { id, deleted: meta.last_modified.into(), what }))
        };
        listed.map_ok(read).try_buffered(16).try_filter_map(async |item| Ok(item)).try_collect().await
    }

    /// Forgets a deletion, if it is there.
    pub(crate) async fn remove_trash(&self, id: &str) -> Result<bool> {
        self.remove(&Path::from("trash").join(id)).await
    }

    /// Brings a deletion back, unless there is a newer tag or what it leads to is gone; says whether it did.
    pub(crate) async fn restore(&self, item: &TrashedItem) -> Result<bool> {
        match &item.what {
            Trashed::Tag { repository, tag, digest } => {
                if self.tag(TagOf::Push, repository, tag).await?.is_some()
                    || self.manifest_entry(repository, digest).await?.is_none()
                {
                    return Ok(false);
                }
                self.put_tag(TagOf::Push, repository, tag, digest).await?;
            }
            Trashed::Manifest { repository, digest, entry } => {
                if self.put_link(repository, digest).await? == super::Linked::Gone {
                    self.remove_link(repository, digest).await?;
                    return Ok(false);
                }
                self.restore_entry(repository, digest, entry).await?;
            }
        }
        self.remove_trash(&item.id).await?;
        Ok(true)
    }

    async fn folders(&self, prefix: &Path) -> Result<Vec<Path>> {
        let listed = self.inner.objects.list_with_delimiter(Some(prefix)).await;
        Ok(listed.map_err(|e| self.failed("list", prefix, e))?.common_prefixes)
    }
}

/// Whether it is a folder inside a repository, not one of a repository's name.
fn is_inner(folder: &Path) -> bool {
    folder.filename().is_some_and(|name| name.starts_with('_'))
}
