//! What collectors need: markers, the list of repositories, and the trash.
//!
//! Keys, besides those that `storage` lists:
//! - `gc/deleting/tags/<repository>/_tag/<tag>/<run>`: a marker at a tag
//! - `repositories/<name>/_trash/<when>-<random>`: a deletion that can be undone
//! - `gc/lease`: the collection that runs; `gc/last`: the last one's report; `scrub/...`: how far a scrub is;
//!   `stored/last`: what was counted last, in a bucket

use std::time::SystemTime;

use anyplace_images::Digest;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use super::{Error, ManifestEntry, Result, Storage, keys};

/// What a collector is about to delete, or to take links from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Marked {
    Digest(Digest),
    Tag { repository: String, tag: String },
}

/// A collector's sign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Marker {
    key: Path,
    /// When it was put, by the store's clock; [`Storage::ages`] tells how old that is.
    pub(crate) put: SystemTime,
}

/// What was deleted and can be brought back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Trashed {
    /// A tag, and the digest that it had.
    Tag { tag: String, digest: Digest },
    /// A manifest.
    Manifest { digest: Digest, entry: ManifestEntry },
}

/// One deletion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TrashedItem {
    pub(crate) id: String,
    /// When it was deleted, by the store's clock; [`Storage::ages`] tells how old that is.
    pub(crate) deleted: SystemTime,
    pub(crate) what: Trashed,
}

/// A deletion that can't be understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DamagedItem {
    pub(crate) id: String,
    /// As with [`TrashedItem`].
    pub(crate) deleted: SystemTime,
    pub(crate) reason: String,
}

/// What a collector keeps for the next one, and for other processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Note {
    /// The collection that runs.
    Lease,
    /// The last collection's report.
    LastCollection,
    /// What was counted last, where it is kept.
    LastCount,
    /// How far a scrub is.
    Scrub,
    /// The last scrub's report.
    LastScrub,
    /// What ages leave out of the store's time.
    Skipped,
}

impl Note {
    pub(super) fn key(self) -> Path {
        Path::from(match self {
            Note::Lease => "gc/lease",
            Note::LastCollection => "gc/last",
            Note::LastCount => "stored/last",
            Note::Scrub => "scrub/position",
            Note::LastScrub => "scrub/last",
            Note::Skipped => "gc/skipped",
        })
    }
}

impl Storage {
    /// Puts a marker; writers wait until it is removed.
    pub(crate) async fn put_marker(&self, marked: &Marked, run: &str) -> Result<()> {
        self.put_reserved(&marker_key(marked, run), Bytes::new()).await
    }

    /// Removes a marker, if it is there.
    pub(crate) async fn remove_marker(&self, marked: &Marked, run: &str) -> Result<bool> {
        self.remove(&marker_key(marked, run)).await
    }

    /// The markers of all runs.
    pub(crate) async fn markers(&self) -> Result<Vec<Marker>> {
        let prefix = Path::from("gc/deleting");
        let listed = self.inner.objects.list(Some(&prefix)).map_err(|e| self.failed("list", &prefix, e));
        listed
            .map_ok(|meta| Marker { key: meta.location, put: meta.last_modified.into() })
            .try_collect()
            .await
    }

    /// Removes what a collector left over that didn't come to its end.
    pub(crate) async fn remove_stale_marker(&self, marker: &Marker) -> Result<bool> {
        self.remove(&marker.key).await
    }

    pub(super) async fn is_marked(&self, marked: &Marked) -> Result<bool> {
        let prefix = markers_at(marked);
        let mut listed = self.inner.objects.list(Some(&prefix));
        let first = listed.try_next().await.map_err(|e| self.failed("list", &prefix, e))?;
        Ok(first.is_some())
    }

    /// What a collector noted, and when. One that can't be understood is as good as none, which a later one replaces.
    pub(crate) async fn note<T: serde::de::DeserializeOwned>(
        &self,
        note: Note,
    ) -> Result<Option<(T, SystemTime)>> {
        let key = note.key();
        let Some(meta) = self.head(&key).await? else { return Ok(None) };
        let bytes = match self.read(&key).await {
            Ok(None) => return Ok(None),
            Ok(Some(bytes)) => bytes,
            Err(error) if error.is_damage() => {
                tracing::error!(%key, %error, "a note is damaged, and forgotten");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some((value, meta.last_modified.into()))),
            Err(error) => {
                tracing::error!(%key, %error, "a note is damaged, and forgotten");
                Ok(None)
            }
        }
    }

    /// Notes something.
    pub(crate) async fn put_note(&self, note: Note, value: &impl Serialize) -> Result<()> {
        let key = note.key();
        let json = serde_json::to_vec(value).map_err(|e| Error::damaged(&key, e))?;
        self.put_reserved(&key, json.into()).await
    }

    /// Forgets a note, if it is there.
    pub(crate) async fn remove_note(&self, note: Note) -> Result<bool> {
        self.remove(&note.key()).await
    }

    /// Whether anything but blobs was ever pushed to, or cached in, this repository.
    pub(crate) async fn has_repository(&self, repository: &str) -> Result<bool> {
        let prefix = Path::from(format!("repositories/{repository}"));
        Ok(self.folders(&prefix).await?.iter().any(is_inner))
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
    pub(crate) async fn put_trash(&self, repository: &str, what: &Trashed) -> Result<String> {
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        // The time is for people and the order; the age is the object's.
        let id = format!("{seconds:012}-{}", hex::encode(rand::random::<[u8; 8]>()));
        let key = trash_key(repository).join(id.as_str());
        let json = serde_json::to_vec(what).map_err(|e| Error::damaged(&key, e))?;
        self.put_reserved(&key, json.into()).await?;
        Ok(id)
    }

    /// A repository's deletions that are kept and can be understood, in no order.
    pub(crate) async fn trash(&self, repository: &str) -> Result<Vec<TrashedItem>> {
        Ok(self.trash_and_damaged(repository).await?.0)
    }

    /// A repository's deletions that are kept, and those of them that can't be understood, in no order.
    pub(crate) async fn trash_and_damaged(
        &self,
        repository: &str,
    ) -> Result<(Vec<TrashedItem>, Vec<DamagedItem>)> {
        let prefix = trash_key(repository);
        let listed = self.inner.objects.list(Some(&prefix)).map_err(|e| self.failed("list", &prefix, e));
        let mut read = std::pin::pin!(listed.map_ok(|meta| self.read_trash(meta)).try_buffered(16));
        let (mut items, mut damaged) = (Vec::new(), Vec::new());
        while let Some(item) = read.try_next().await? {
            match item {
                Some(Ok(item)) => items.push(item),
                Some(Err(item)) => damaged.push(item),
                None => {}
            }
        }
        Ok((items, damaged))
    }

    async fn read_trash(
        &self,
        meta: object_store::ObjectMeta,
    ) -> Result<Option<std::result::Result<TrashedItem, DamagedItem>>> {
        let (id, deleted) =
            (meta.location.filename().unwrap_or_default().to_owned(), meta.last_modified.into());
        let bytes = match self.read(&meta.location).await {
            Ok(None) => return Ok(None),
            Ok(Some(bytes)) => bytes,
            Err(error) if error.is_damage() => {
                return Ok(Some(Err(DamagedItem { id, deleted, reason: error.to_string() })));
            }
            Err(error) => return Err(error),
        };
        Ok(Some(match serde_json::from_slice(&bytes) {
            Ok(what) => Ok(TrashedItem { id, deleted, what }),
            Err(error) => Err(DamagedItem { id, deleted, reason: error.to_string() }),
        }))
    }

    /// Forgets a deletion, if it is there.
    pub(crate) async fn remove_trash(&self, repository: &str, id: &str) -> Result<bool> {
        self.remove(&trash_key(repository).join(id)).await
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

fn trash_key(repository: &str) -> Path {
    Path::from(format!("repositories/{repository}/_trash"))
}

fn markers_at(marked: &Marked) -> Path {
    match marked {
        Marked::Digest(digest) => keys::markers_of(digest),
        Marked::Tag { repository, tag } => {
            Path::from(format!("gc/deleting/tags/{repository}/_tag")).join(tag.as_str())
        }
    }
}

fn marker_key(marked: &Marked, run: &str) -> Path {
    markers_at(marked).join(run)
}
