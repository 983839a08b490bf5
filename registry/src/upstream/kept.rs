//! What the cache keeps, for operators: looking at it is no use of it, so it changes nothing of what goes next.
//!
//! A blob counts for each repository of which an upstream said that it has it, so repositories may add up to more than
//! there is. All that is listed is in memory already; only manifests and tags are read.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyplace_images::Digest;
use serde::{Deserialize, Serialize};

use super::manifests::{decode, manifest_key};
use super::tags::{Kept, tag_key};
use super::{Cache, CachedManifest, Failure, Inner};

/// What a cache keeps of its upstreams' content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheUsage {
    /// Bytes of blobs on disk, each counted once, and of those that are being fetched.
    pub disk_bytes: u64,
    /// Most of those.
    pub disk_budget_bytes: u64,
    /// Bytes of manifests, tags and lists of pieces on disk.
    pub record_bytes: u64,
    /// Blobs that are here, all or parts of them.
    pub blobs: u64,
    /// Bytes of those blobs, whether here or not.
    pub blob_bytes: u64,
    /// By repository, the one with most bytes on disk first.
    pub repositories: Vec<CachedRepository>,
}

/// What a cache keeps of a repository.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachedRepository {
    /// Its name.
    pub repository: String,
    /// What is kept.
    #[serde(flatten)]
    pub cached: Cached,
}

/// How much is kept of a repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cached {
    /// Tags that were pulled.
    pub tags: u64,
    /// Manifests.
    pub manifests: u64,
    /// Blobs that are here, all or parts of them.
    pub blobs: u64,
    /// Bytes of those on disk.
    pub disk_bytes: u64,
    /// Bytes of those, whether here or not.
    pub blob_bytes: u64,
}

/// A tag as an upstream gave it last.
pub(crate) struct KeptTag {
    pub(crate) tag: String,
    pub(crate) digest: Digest,
    /// The upstream's address.
    pub(crate) from: String,
}

impl Cache {
    /// What is here of one repository, or of all.
    pub(crate) async fn usage(&self, repository: Option<String>) -> Result<CacheUsage, Failure> {
        self.look(move |inner| inner.usage(repository.as_deref())).await
    }

    /// What is here, by repository.
    pub(crate) async fn by_repository(&self) -> Result<BTreeMap<String, Cached>, Failure> {
        self.look(Inner::by_repository).await
    }

    /// The tags of a repository that are here.
    pub(crate) async fn kept_tags(&self, repository: &str) -> Result<Vec<KeptTag>, Failure> {
        let prefix = tag_key(repository, "");
        self.look(move |inner| {
            let records = &inner.pieces.records;
            let tag = |key: Arc<str>| {
                let Kept { digest, from } = Kept::from_record(&records.look(&key)?)?;
                let (tag, from) = (key.strip_prefix(&prefix)?, from.trim_end_matches('/'));
                Some(KeptTag { tag: tag.to_owned(), digest, from: from.to_owned() })
            };
            records.keys(&prefix).into_iter().filter_map(tag).collect()
        })
        .await
    }

    /// A manifest that is here.
    pub(crate) async fn kept_manifest(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<Option<CachedManifest>, Failure> {
        let (key, digest) = (manifest_key(repository, digest), digest.clone());
        self.look(move |inner| decode(&digest, inner.pieces.records.look(&key)?)).await
    }

    /// Bytes of a blob that are here.
    pub(crate) fn bytes_here(&self, digest: &Digest) -> u64 {
        self.inner.pieces.blob(digest).map_or(0, |blob| blob.bytes_here())
    }

    async fn look<T: Send + 'static>(
        &self,
        looking: impl FnOnce(&Inner) -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let inner = self.inner.clone();
        let looked = tokio::task::spawn_blocking(move || looking(&inner)).await;
        looked.map_err(|error| Failure::here("looking what is here", error))
    }
}

impl Inner {
    fn usage(&self, repository: Option<&str>) -> CacheUsage {
        let pieces = &self.pieces;
        let mut usage = CacheUsage {
            disk_bytes: pieces.used(),
            disk_budget_bytes: pieces.budget(),
            record_bytes: pieces.records.used(),
            ..CacheUsage::default()
        };
        for blob in pieces.all().iter().filter(|blob| blob.bytes_here() > 0) {
            usage.blobs += 1;
            usage.blob_bytes += blob.layout.size;
        }
        let named = self.by_repository().into_iter();
        let wanted = named.filter(|(name, _)| repository.is_none_or(|wanted| wanted == name));
        usage.repositories =
            wanted.map(|(repository, cached)| CachedRepository { repository, cached }).collect();
        usage.repositories.sort_by_key(|one| std::cmp::Reverse(one.cached.disk_bytes));
        usage
    }

    fn by_repository(&self) -> BTreeMap<String, Cached> {
        let mut by_name: BTreeMap<String, Cached> = BTreeMap::new();
        for key in self.pieces.records.keys("repositories/") {
            let Some((repository, kind, rest)) = parts(&key) else { continue };
            let cached = match by_name.get_mut(repository) {
                Some(cached) => cached,
                None => by_name.entry(repository.to_owned()).or_default(),
            };
            match kind {
                "tags" => cached.tags += 1,
                "manifests" => cached.manifests += 1,
                "blobs" => {
                    let digest = rest.replacen('/', ":", 1).parse().ok();
                    let blob = digest.and_then(|digest| self.pieces.blob(&digest));
                    let here = blob.as_ref().map_or(0, |blob| blob.bytes_here());
                    if let Some(blob) = blob.filter(|_| here > 0) {
                        cached.blobs += 1;
                        cached.disk_bytes += here;
                        cached.blob_bytes += blob.layout.size;
                    }
                }
                _ => {}
            }
        }
        // Of some only is known which blobs they have.
        by_name.retain(|_, cached| *cached != Cached::default());
        by_name
    }
}

/// A key's repository, kind, and what of that kind.
fn parts(key: &str) -> Option<(&str, &str, &str)> {
    // No part of a repository's name begins with an underscore.
    let (repository, rest) = key.strip_prefix("repositories/")?.split_once("/_")?;
    let (kind, rest) = rest.split_once('/')?;
    Some((repository, kind, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_their_parts_whatever_names_and_tags_are_like() {
        let digest = Digest::of(b"x");
        let hex = digest.hex();
        for name in ["app", "docker.io/library/a_b", "a/tags/b__c"] {
            let key = manifest_key(name, &digest);
            assert_eq!(parts(&key).unwrap(), (name, "manifests", &*format!("sha256/{hex}")));
            assert_eq!(parts(&tag_key(name, "_tags")).unwrap(), (name, "tags", "_tags"));
        }
        assert_eq!(parts(&format!("pieces/sha256/{}/{hex}", &hex[..2])), None);
    }
}
