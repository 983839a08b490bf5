//! Manifests from upstream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyplace_images::{Digest, RawManifest};
use bytes::Bytes;

use super::remote::Kind;
use super::{Cache, Failure, Inner, ONLY_ANSWER_TIMEOUT};
use crate::cache::counters::CacheCounters;

/// Bytes of manifests that are kept in memory; all are dropped when there are more.
const RECENT_MAX_BYTES: usize = 16 << 20;

/// A manifest that has the digest that it was asked for by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CachedManifest {
    pub(crate) media_type: String,
    pub(crate) bytes: Bytes,
}

/// Manifests by repository and digest.
type ByName = HashMap<(String, Digest), CachedManifest>;

/// Manifests in memory.
#[derive(Default)]
pub(super) struct Recent(Mutex<(ByName, usize)>);

impl Recent {
    fn get(&self, repository: &str, digest: &Digest) -> Option<CachedManifest> {
        let recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        recent.0.get(&(repository.to_owned(), digest.clone())).cloned()
    }

    fn insert(&self, repository: &str, digest: &Digest, manifest: &CachedManifest) {
        let mut recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.1 + manifest.bytes.len() > RECENT_MAX_BYTES {
            *recent = Default::default();
        }
        recent.1 += manifest.bytes.len();
        recent.0.insert((repository.to_owned(), digest.clone()), manifest.clone());
    }
}

impl Cache {
    /// A manifest that is here or upstream.
    pub(crate) async fn manifest(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<CachedManifest, Failure> {
        self.inner.manifest(repository, digest).await
    }
}

impl Inner {
    pub(super) async fn manifest_here(
        self: &Arc<Inner>,
        repository: &str,
        digest: &Digest,
    ) -> Option<CachedManifest> {
        let found = match self.recent.get(repository, digest) {
            Some(manifest) => manifest,
            None => {
                let (inner, key, wanted) = (self.clone(), manifest_key(repository, digest), digest.clone());
                let reading = tokio::task::spawn_blocking(move || {
                    inner.pieces.records.get(&key).and_then(|content| decode(&wanted, content))
                });
                let manifest = reading.await.ok().flatten()?;
                self.recent.insert(repository, digest, &manifest);
                manifest
            }
        };
        CacheCounters::one(&self.counters.manifest_hits);
        Some(found)
    }

    pub(super) async fn manifest(
        self: &Arc<Inner>,
        repository: &str,
        digest: &Digest,
    ) -> Result<CachedManifest, Failure> {
        if let Some(manifest) = self.manifest_here(repository, digest).await {
            return Ok(manifest);
        }
        let (inner, name, wanted) = (self.clone(), repository.to_owned(), digest.clone());
        let fetching = async move {
            let fetched = inner.ask_any(Kind::Manifest, &inner.remotes, &name, |remote, reference| {
                let reference = reference.at(&wanted);
                async move {
                    let question = remote.client.get_manifest(&reference);
                    remote.ask(Kind::Manifest, ONLY_ANSWER_TIMEOUT, question).await
                }
            });
            let manifest = fetched.await?;
            inner.keep_manifest(&name, &wanted, manifest).await
        };
        self.manifest_flights.join(format!("{repository} {digest}"), fetching).await
    }

    /// Keeps what an upstream sent for a digest, if it is that.
    pub(super) async fn keep_manifest(
        self: &Arc<Inner>,
        repository: &str,
        digest: &Digest,
        manifest: RawManifest,
    ) -> Result<CachedManifest, Failure> {
        CacheCounters::one(&self.counters.manifest_misses);
        CacheCounters::add(&self.counters.upstream_bytes, manifest.bytes.len() as u64);
        let found = digest.same_of(&manifest.bytes);
        if found != *digest {
            CacheCounters::one(&self.counters.upstream_corrupt);
            return Err(Failure::Corrupt(format!("manifest {digest} has the digest {found}")));
        }
        let kept = CachedManifest { media_type: manifest.media_type, bytes: manifest.bytes };
        let (inner, key, content) = (self.clone(), manifest_key(repository, digest), encode(&kept));
        let written = tokio::task::spawn_blocking(move || inner.pieces.put_record(&key, &content));
        written.await.map_err(|e| Failure::here("keeping a manifest", e))?;
        self.learn_members(repository, digest, &kept.bytes);
        self.recent.insert(repository, digest, &kept);
        Ok(kept)
    }
}

pub(super) fn manifest_key(repository: &str, digest: &Digest) -> String {
    format!("repositories/{repository}/_manifests/{}/{}", digest.algorithm(), digest.hex())
}

/// Length of the media type, 2 bytes; the media type; the manifest.
fn encode(manifest: &CachedManifest) -> Vec<u8> {
    let media_type = manifest.media_type.as_bytes();
    let len = u16::try_from(media_type.len()).unwrap_or(0);
    let mut content = Vec::with_capacity(2 + media_type.len() + manifest.bytes.len());
    content.extend_from_slice(&len.to_le_bytes());
    content.extend_from_slice(&media_type[..len.into()]);
    content.extend_from_slice(&manifest.bytes);
    content
}

/// The manifest in a file, if it has the digest.
pub(super) fn decode(digest: &Digest, content: Vec<u8>) -> Option<CachedManifest> {
    let (len, rest) = content.split_first_chunk()?;
    let (media_type, bytes) = rest.split_at_checked(u16::from_le_bytes(*len).into())?;
    let media_type = std::str::from_utf8(media_type).ok()?.to_owned();
    let bytes = Bytes::copy_from_slice(bytes);
    (digest.same_of(&bytes) == *digest).then_some(CachedManifest { media_type, bytes })
}
