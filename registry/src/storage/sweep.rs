//! Removes from a bucket what unfinished uploads left, and what content that was deleted pointed to.
//!
//! An object below `data/` is deleted when it is old, no upload in progress has it, and no content points to it. The
//! order matters: an upload's state goes only after the content that points to its objects is there, so
//! states are looked at first, and content last.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures_util::TryStreamExt as _;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStoreExt as _};
use serde::{Deserialize, Serialize};

use super::bucket::HeadBody;
use super::{Error, Place, Result, Storage, keys};
use crate::uploads::sweep_folder;

/// What a sweep removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Swept {
    /// Uploads that nobody went on with.
    pub(crate) uploads: u64,
    /// Objects that were no content.
    pub(crate) objects: u64,
    /// Their size together.
    pub(crate) bytes: u64,
}

/// Parts that are being sent; kept in `parts/<random>` until they are an object, so that they can be dropped.
#[derive(Debug, Serialize, Deserialize)]
struct Begun {
    key: String,
    id: String,
}

impl Storage {
    /// Removes uploads that nobody went on with for `abandoned_after`, and data that has been nobody's for
    /// `unused_after`, which must be longer than any one request takes.
    pub(crate) async fn sweep(&self, abandoned_after: Duration, unused_after: Duration) -> Result<Swept> {
        let (mut swept, ages) = (Swept::default(), self.ages().await?);
        let parts = match &self.inner.place {
            Place::Bucket(parts) => parts,
            Place::Folder(folder) => {
                let dir = folder.join("uploads");
                let sweeping =
                    tokio::task::spawn_blocking(move || sweep_folder(&dir, abandoned_after, &ages)).await;
                let swept = sweeping.unwrap_or_else(|e| Err(std::io::Error::other(e)));
                let uploads = swept.map_err(|e| self.failed_io("sweep", "uploads", e))?;
                return Ok(Swept { uploads, ..Swept::default() });
            }
        };
        let is_older = |meta: &ObjectMeta, limit| ages.of(meta.last_modified.into()) > Some(limit);
        let mut in_progress = HashSet::new();
        for (id, keys) in self.by_upload("uploads").await? {
            if keys.iter().all(|meta| is_older(meta, abandoned_after)) {
                for meta in &keys {
                    self.remove(&meta.location).await?;
                }
                swept.uploads += 1;
            } else {
                in_progress.insert(id);
            }
        }
        for begun in self.listed("parts").await? {
            if is_older(&begun, unused_after) {
                if let Some(bytes) = self.read(&begun.location).await?
                    && let Ok(Begun { key, id }) = serde_json::from_slice(&bytes)
                    && let Err(error) = parts.abort_multipart(&Path::from(key), &id).await
                {
                    // It may be an object by now, or the store has forgotten it.
                    tracing::debug!(%error, id, "parts can't be dropped");
                }
                self.remove(&begun.location).await?;
            }
        }
        let mut unused: HashMap<String, u64> = HashMap::new();
        for (id, keys) in self.by_upload("data").await? {
            if !in_progress.contains(&id) {
                let old = keys.into_iter().filter(|meta| is_older(meta, unused_after));
                unused.extend(old.map(|meta| (meta.location.to_string(), meta.size)));
            }
        }
        if unused.is_empty() {
            return Ok(swept);
        }
        let mut contents = self.pointers();
        while let Some(segments) = contents.try_next().await? {
            for segment in segments {
                unused.remove(&segment.key);
            }
        }
        for (key, bytes) in unused {
            self.remove(&Path::from(key)).await?;
            swept.objects += 1;
            swept.bytes += bytes;
        }
        Ok(swept)
    }

    /// Remembers parts that are about to be sent, and gives the key to forget them by.
    pub(crate) async fn remember_parts(&self, key: &Path, id: &str) -> Result<Path> {
        let at = Path::from("parts").join(hex::encode(rand::random::<[u8; 16]>()));
        let begun = Begun { key: key.to_string(), id: id.to_owned() };
        let json = serde_json::to_vec(&begun).map_err(|e| Error::damaged(&at, e))?;
        self.put(&at, json.into()).await?;
        Ok(at)
    }

    /// Deletes an object of an upload, if it is there; what fails is left to the next sweep.
    pub(crate) async fn drop_object(&self, key: &Path) {
        match self.inner.objects.delete(key).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => tracing::warn!(%error, %key, "left to the next sweep"),
        }
    }

    /// The segments of all content that has any.
    fn pointers(&self) -> futures_util::stream::BoxStream<'static, Result<Vec<super::Segment>>> {
        use futures_util::StreamExt as _;
        let (this, failed) = (self.clone(), self.clone());
        let listed = self.inner.objects.list(Some(&Path::from("blobs")));
        let listed = listed.map_err(move |e| failed.failed("list", &Path::from("blobs"), e));
        let heads = listed.map_ok(move |meta| {
            let this = this.clone();
            async move {
                let Some(digest) = keys::parse_content(&meta.location) else { return Ok(None) };
                Ok(match this.head_content(&digest).await?.map(|head| head.body) {
                    Some(HeadBody::Segments(segments)) => Some(segments),
                    _ => None,
                })
            }
        });
        heads.try_buffer_unordered(super::content::READS_MAX).try_filter_map(async |found| Ok(found)).boxed()
    }

    /// The objects below a prefix, by the part of the key after it.
    async fn by_upload(&self, prefix: &'static str) -> Result<HashMap<String, Vec<ObjectMeta>>> {
        let mut uploads: HashMap<String, Vec<ObjectMeta>> = HashMap::new();
        for meta in self.listed(prefix).await? {
            let id = meta.location.as_ref().split('/').nth(1).map(str::to_owned);
            uploads.entry(id.unwrap_or_default()).or_default().push(meta);
        }
        Ok(uploads)
    }

    pub(crate) async fn listed(&self, prefix: &str) -> Result<Vec<ObjectMeta>> {
        let prefix = Path::from(prefix);
        let listed = self.inner.objects.list(Some(&prefix));
        listed.map_err(|e| self.failed("list", &prefix, e)).try_collect().await
    }
}
