//! Which blobs a repository has upstream, and how large they are.
//!
//! The manifests that came through say it, and for other blobs the upstream is asked. Both are remembered on disk, and
//! in memory up to a bound, after which it is read from disk again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyplace_images::Digest;
use serde::Deserialize;

use super::manifests::decode;
use super::{Failure, Inner, ONLY_ANSWER_TIMEOUT};
use crate::cache::layout::{ANNOTATION, Layout};

/// Most blobs that are remembered in memory, some 200 bytes each; all are dropped when there are more.
const REMEMBERED_MAX: usize = 200_000;

/// What is known of a repository's blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) size: u64,
    /// The manifest that names it.
    manifest: Option<Digest>,
}

#[derive(Default)]
struct Table {
    repositories: HashMap<String, HashMap<Digest, Known>>,
    count: usize,
}

/// The blobs of all repositories.
#[derive(Default)]
pub(super) struct Members(Mutex<Table>);

/// A manifest, as far as it says what blobs there are.
#[derive(Deserialize)]
struct Document {
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    blobs: Option<Vec<Descriptor>>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: Digest,
    size: u64,
    annotations: Option<HashMap<String, serde_json::Value>>,
}

fn descriptors(manifest: &[u8]) -> Vec<Descriptor> {
    let Ok(document) = serde_json::from_slice::<Document>(manifest) else { return Vec::new() };
    let lists = document.layers.into_iter().chain(document.blobs).flatten();
    document.config.into_iter().chain(lists).collect()
}

/// The list of a blob's pieces, where this manifest has one; an error says why it isn't taken.
pub(super) fn list_in(manifest: &[u8], digest: &Digest) -> Option<Result<Layout, String>> {
    let descriptor = descriptors(manifest).into_iter().find(|descriptor| descriptor.digest == *digest)?;
    let text = descriptor.annotations?.remove(ANNOTATION)?;
    let text = text.as_str().ok_or("it is no text".to_owned());
    Some(text.and_then(|text| Layout::from_annotation(descriptor.size, text)))
}

impl Members {
    fn get(&self, repository: &str, digest: &Digest) -> Option<Option<Known>> {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.repositories.get(repository).map(|blobs| blobs.get(digest).cloned())
    }

    fn insert(&self, repository: &str, blobs: impl IntoIterator<Item = (Digest, Known)>) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.count > REMEMBERED_MAX {
            *table = Table::default();
        }
        let known = table.repositories.entry(repository.to_owned()).or_default();
        let before = known.len();
        known.extend(blobs);
        table.count += known.len() - before;
    }

    /// Remembers the blobs that a manifest names, in a repository whose others are remembered.
    pub(super) fn learn(&self, repository: &str, digest: &Digest, manifest: &[u8]) {
        if self.get(repository, digest).is_some() {
            self.insert(repository, named_in(digest, manifest));
        }
    }
}

fn named_in(digest: &Digest, manifest: &[u8]) -> Vec<(Digest, Known)> {
    let known = |size| Known { size, manifest: Some(digest.clone()) };
    descriptors(manifest).into_iter().map(|named| (named.digest, known(named.size))).collect()
}

impl Inner {
    /// What is known here of a repository's blob.
    pub(super) async fn known(self: &Arc<Inner>, repository: &str, digest: &Digest) -> Option<Known> {
        if let Some(Some(known)) = self.members.get(repository, digest) {
            return Some(known);
        }
        let (inner, name, digest) = (self.clone(), repository.to_owned(), digest.clone());
        let reading = tokio::task::spawn_blocking(move || {
            if inner.members.get(&name, &digest).is_none() {
                inner.load_members(&name);
            }
            let known = inner.members.get(&name, &digest).flatten().or_else(|| {
                let content = inner.pieces.records.get(&blob_key(&name, &digest))?;
                let size = u64::from_le_bytes(content.try_into().ok()?);
                Some(Known { size, manifest: None })
            })?;
            inner.members.insert(&name, [(digest, known.clone())]);
            Some(known)
        });
        reading.await.ok().flatten()
    }

    /// What is known of a repository's blob here or upstream.
    pub(super) async fn find(self: &Arc<Inner>, repository: &str, digest: &Digest) -> Result<Known, Failure> {
        if let Some(known) = self.known(repository, digest).await {
            return Ok(known);
        }
        let (inner, name, wanted) = (self.clone(), repository.to_owned(), digest.clone());
        let asking = async move {
            let found = inner.ask_any(&inner.remotes, &name, |remote, reference| {
                let digest = wanted.clone();
                async move {
                    let question = async {
                        let client = &remote.client;
                        match client.head_blob(&reference, &digest).await? {
                            // Some don't tell the size of what they don't send.
                            Some(0) => Ok(client.get_blob(&reference, &digest, None).await?.blob_size()),
                            size => Ok(size),
                        }
                    };
                    let size = remote.ask(ONLY_ANSWER_TIMEOUT, question).await?;
                    size.ok_or(Failure::Absent)
                }
            });
            let size = found.await?;
            let (inner, key) = (inner.clone(), blob_key(&name, &wanted));
            let written = tokio::task::spawn_blocking({
                let inner = inner.clone();
                move || inner.pieces.put_record(&key, &size.to_le_bytes())
            });
            written.await.map_err(|e| Failure::here("remembering a blob", e))?;
            inner.members.insert(&name, [(wanted, Known { size, manifest: None })]);
            Ok(size)
        };
        let size = self.size_flights.join(format!("{repository} {digest}"), asking).await?;
        Ok(Known { size, manifest: None })
    }

    /// The list of a blob's pieces, where the manifest that names the blob has one.
    pub(super) async fn list_of(
        self: &Arc<Inner>,
        repository: &str,
        digest: &Digest,
        known: &Known,
    ) -> Option<Layout> {
        let manifest = self.manifest_here(repository, known.manifest.as_ref()?).await?;
        match list_in(&manifest.bytes, digest)? {
            Ok(layout) => Some(layout),
            Err(reason) => {
                crate::CacheCounters::one(&self.counters.refused_lists);
                tracing::warn!(repository, %digest, reason, "a manifest's list of pieces is not taken");
                None
            }
        }
    }

    /// Blocking: reads the manifests of a repository that are here.
    fn load_members(&self, repository: &str) {
        let mut blobs = Vec::new();
        for key in self.pieces.records.keys(&format!("repositories/{repository}/_manifests/")) {
            let mut parts = key.rsplit('/');
            let (hex, algorithm) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            if let Ok(digest) = format!("{algorithm}:{hex}").parse()
                && let Some(manifest) =
                    self.pieces.records.get(&key).and_then(|content| decode(&digest, content))
            {
                blobs.extend(named_in(&digest, &manifest.bytes));
            }
        }
        self.members.insert(repository, blobs);
    }
}

fn blob_key(repository: &str, digest: &Digest) -> String {
    format!("repositories/{repository}/_blobs/{}/{}", digest.algorithm(), digest.hex())
}
