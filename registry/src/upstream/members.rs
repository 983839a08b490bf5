//! Which blobs a repository has upstream, and how large they are.
//!
//! Whether it has a blob, the upstream is asked, once for each: a manifest may name what its repository doesn't have,
//! and the cache may have it from another repository. The questions go out when a manifest comes through, so that the
//! blobs can be had when the upstream is gone. Sizes and lists of pieces are those of the manifest, where one names
//! the blob. Both are remembered on disk, and in memory up to a bound, after which it is read from disk again.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use anyplace_images::Digest;
use futures_util::{StreamExt as _, stream};
use serde::Deserialize;

use super::manifests::decode;
use super::remote::Kind;
use super::{Failure, Inner, ONLY_ANSWER_TIMEOUT};
use crate::cache::layout::{ANNOTATION, Hash, Layout};
use crate::references::is_here;

/// Most blobs that are remembered in memory, some 200 bytes each; all are dropped when there are more.
const REMEMBERED_MAX: usize = 200_000;
/// Most blobs of a manifest that the upstream is asked about ahead. Docker's own limit on layers is 127.
const AHEAD_MAX: usize = 128;
/// Of them at once.
const AHEAD_AT_ONCE: usize = 8;

/// What is known of a repository's blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) size: u64,
    /// The manifest that names it.
    manifest: Option<Digest>,
    /// Fingerprint of the list of its pieces that the manifest has.
    pub(super) list: Option<Hash>,
    /// An upstream said that the repository has it.
    proven: bool,
}

impl Known {
    /// What an upstream says.
    fn proven(size: u64) -> Known {
        Known { size, manifest: None, list: None, proven: true }
    }
}

#[derive(Default)]
struct Table {
    repositories: HashMap<String, HashMap<Digest, Known>>,
    count: usize,
}

impl Table {
    fn add(&mut self, repository: &str, blobs: impl IntoIterator<Item = (Digest, Known)>) {
        let Some(known) = self.repositories.get_mut(repository) else { return };
        let before = known.len();
        for (digest, new) in blobs {
            match known.entry(digest) {
                Entry::Vacant(entry) => {
                    entry.insert(new);
                }
                Entry::Occupied(entry) => {
                    let old = entry.into_mut();
                    let proven = old.proven || new.proven;
                    if new.manifest.is_some() || old.manifest.is_none() {
                        *old = new;
                    }
                    old.proven = proven;
                }
            }
        }
        self.count += known.len() - before;
    }
}

/// The blobs of repositories; of one that is in here, all that are known on disk.
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
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    size: u64,
    urls: Option<Vec<String>>,
    annotations: Option<HashMap<String, serde_json::Value>>,
}

impl Descriptor {
    /// The list of the blob's pieces, if there is one.
    fn list(&self) -> Option<Result<Layout, String>> {
        let text = self.annotations.as_ref()?.get(ANNOTATION)?;
        let text = text.as_str().ok_or("it is no text".to_owned());
        Some(text.and_then(|text| Layout::from_annotation(self.size, text)))
    }
}

/// The blobs that have to be in the manifest's repository, not those that lie elsewhere.
fn descriptors(manifest: &[u8]) -> Vec<Descriptor> {
    let Ok(document) = serde_json::from_slice::<Document>(manifest) else { return Vec::new() };
    let lists = document.layers.into_iter().chain(document.blobs).flatten();
    let all = document.config.into_iter().chain(lists);
    all.filter(|named| is_here(&named.media_type, named.urls.as_deref())).collect()
}

/// The list of a blob's pieces, where this manifest has one; an error says why it isn't taken.
pub(super) fn list_in(manifest: &[u8], digest: &Digest) -> Option<Result<Layout, String>> {
    descriptors(manifest).into_iter().find(|descriptor| descriptor.digest == *digest)?.list()
}

impl Members {
    fn get(&self, repository: &str, digest: &Digest) -> Option<Option<Known>> {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.repositories.get(repository).map(|blobs| blobs.get(digest).cloned())
    }

    /// Remembers a repository, with all of its blobs that are known on disk.
    fn load(&self, repository: &str, blobs: HashMap<Digest, Known>) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.count > REMEMBERED_MAX {
            *table = Table::default();
        }
        table.repositories.entry(repository.to_owned()).or_default();
        table.add(repository, blobs);
    }

    /// Remembers more blobs of a repository that is remembered; of another, they are read from disk with the others.
    fn insert(&self, repository: &str, blobs: impl IntoIterator<Item = (Digest, Known)>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).add(repository, blobs);
    }
}

fn named_in(digest: &Digest, manifest: &[u8]) -> Vec<(Digest, Known)> {
    let known = |named: &Descriptor| Known {
        size: named.size,
        manifest: Some(digest.clone()),
        list: named.list().and_then(Result::ok).map(|list| list.fingerprint()),
        proven: false,
    };
    descriptors(manifest).into_iter().map(|named| (named.digest.clone(), known(&named))).collect()
}

impl Inner {
    /// Remembers the blobs that a manifest names, and asks about them before anybody wants them.
    pub(super) fn learn_members(self: &Arc<Inner>, repository: &str, digest: &Digest, manifest: &[u8]) {
        let blobs = named_in(digest, manifest);
        let named: Vec<_> = blobs.iter().map(|(digest, _)| digest.clone()).take(AHEAD_MAX).collect();
        self.members.insert(repository, blobs);
        let (inner, name) = (Arc::downgrade(self), repository.to_owned());
        tokio::spawn(stream::iter(named).for_each_concurrent(AHEAD_AT_ONCE, move |digest| {
            let (inner, name) = (inner.upgrade(), name.clone());
            async move {
                if let Some(inner) = inner {
                    // Whoever wants it asks again.
                    let _ = inner.find(&name, &digest).await;
                }
            }
        }));
    }

    /// What is known here of a repository's blob.
    async fn known(self: &Arc<Inner>, repository: &str, digest: &Digest) -> Option<Known> {
        if let Some(Some(known)) = self.members.get(repository, digest)
            && known.proven
        {
            return Some(known);
        }
        let (inner, name, digest) = (self.clone(), repository.to_owned(), digest.clone());
        let reading = tokio::task::spawn_blocking(move || {
            let remembered = inner.members.get(&name, &digest);
            let named = remembered.unwrap_or_else(|| inner.load_members(&name, &digest));
            let said = inner.pieces.records.get(&blob_key(&name, &digest));
            let size = said.and_then(|content| Some(u64::from_le_bytes(content.try_into().ok()?)));
            let known = match (named, size) {
                (Some(known), size) => Known { proven: known.proven || size.is_some(), ..known },
                (None, size) => Known::proven(size?),
            };
            inner.members.insert(&name, [(digest, known.clone())]);
            Some(known)
        });
        reading.await.ok().flatten()
    }

    /// What is known of a repository's blob here or upstream.
    pub(super) async fn find(self: &Arc<Inner>, repository: &str, digest: &Digest) -> Result<Known, Failure> {
        let named = self.known(repository, digest).await;
        if let Some(known) = named.as_ref().filter(|known| known.proven) {
            return Ok(known.clone());
        }
        let (inner, name, wanted) = (self.clone(), repository.to_owned(), digest.clone());
        let asking = async move {
            let found = inner.ask_any(Kind::Blob, &inner.remotes, &name, |remote, reference| {
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
                    let size = remote.ask(Kind::Blob, ONLY_ANSWER_TIMEOUT, question).await?;
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
            inner.members.insert(&name, [(wanted, Known::proven(size))]);
            Ok(size)
        };
        let size = self.size_flights.join(format!("{repository} {digest}"), asking).await?;
        Ok(named.map_or(Known::proven(size), |named| Known { proven: true, ..named }))
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

    /// Blocking: reads the manifests of a repository that are here; what they say of one blob.
    fn load_members(&self, repository: &str, wanted: &Digest) -> Option<Known> {
        let mut blobs = HashMap::new();
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
        let known = blobs.get(wanted).cloned();
        self.members.load(repository, blobs);
        known
    }
}

fn blob_key(repository: &str, digest: &Digest) -> String {
    format!("repositories/{repository}/_blobs/{}/{}", digest.algorithm(), digest.hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_that_lie_elsewhere_make_nobody_a_member() {
        let (own, foreign, typed) = (Digest::of(b"own"), Digest::of(b"foreign"), Digest::of(b"typed"));
        let manifest = serde_json::json!({"layers": [
            {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": own, "size": 1},
            {"mediaType": "a/b", "digest": foreign, "size": 1, "urls": ["https://example.com/layer"]},
            {"mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar", "digest": typed, "size": 1},
        ]});
        let named = named_in(&Digest::of(b"manifest"), manifest.to_string().as_bytes());
        assert_eq!(named.into_iter().map(|(digest, _)| digest).collect::<Vec<_>>(), [own]);
    }

    #[test]
    fn a_repository_is_remembered_whole_or_not_at_all() {
        let (members, known) = (Members::default(), Known::proven(1));
        let blobs = |range: std::ops::Range<usize>| {
            range.map(|number| (Digest::of(&number.to_le_bytes()), known.clone())).collect::<HashMap<_, _>>()
        };
        let first = Digest::of(&0_usize.to_le_bytes());
        // What is learnt of a repository that isn't remembered hides nothing of what is on disk.
        members.insert("app", blobs(7..8));
        assert_eq!(members.get("app", &first), None);
        members.load("app", blobs(0..2));
        members.insert("app", blobs(2..3));
        assert_eq!(members.get("app", &first), Some(Some(known.clone())));
        members.load("large", blobs(0..REMEMBERED_MAX));
        members.load("another", blobs(0..1));
        members.insert("app", blobs(3..4));
        assert_eq!(members.get("app", &first), None, "it is read from disk again");
        assert_eq!(members.get("another", &first), Some(Some(known)));
    }
}
