//! Manifests of a repository, and which of them refer to a subject.

use std::collections::BTreeMap;
use std::time::SystemTime;

use anyplace_images::Digest;
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use super::links::LINK_TRIES;
use super::{Error, Linked, Marked, Result, Storage, keys};
use crate::references::Manifest;

/// Blobs that are looked for at once.
const LOOK_UPS_MAX: usize = 16;

/// What is kept of a manifest beside its bytes: enough for a list of referrers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ManifestEntry {
    pub(crate) media_type: String,
    /// Bytes.
    pub(crate) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) subject: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
}

/// A manifest to put.
#[derive(Clone, Debug)]
pub(crate) struct NewManifest {
    pub(crate) entry: ManifestEntry,
    pub(crate) bytes: Bytes,
    /// The content that the repository must have: config and layers. What an index names may be missing.
    pub(crate) blobs: Vec<Digest>,
    /// The manifests that it names.
    pub(crate) manifests: Vec<Digest>,
}

/// A manifest and its age.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ManifestInfo {
    pub(crate) digest: Digest,
    /// When it was last put, by the store's clock; [`Storage::ages`] tells how old that is.
    pub(crate) put: SystemTime,
    /// Its put isn't over: it can't be read yet, but what it names is in use. One that is older than a request can
    /// take is left over from a crash.
    pub(crate) pending: Option<String>,
}

impl NewManifest {
    /// A manifest as it was read, and its bytes.
    pub(crate) fn of(manifest: Manifest, bytes: Bytes) -> NewManifest {
        let entry = ManifestEntry {
            media_type: manifest.media_type,
            size: bytes.len() as u64,
            subject: manifest.subject,
            artifact_type: manifest.artifact_type,
            annotations: manifest.annotations,
        };
        NewManifest { entry, bytes, blobs: manifest.blobs, manifests: manifest.manifests }
    }
}

impl Storage {
    /// Puts a manifest, unless the repository lacks blobs that it needs, which are given back.
    ///
    /// In this order: link, content, pending entry, check of the blobs, referrers, entry. So what can be
    /// read by digest is complete, and a crash anywhere leaves nothing that leads nowhere.
    pub(crate) async fn put_manifest(
        &self,
        repository: &str,
        digest: &Digest,
        manifest: NewManifest,
    ) -> Result<Vec<Digest>> {
        let NewManifest { entry, bytes, blobs, manifests } = manifest;
        let linked = self.put_link(repository, digest).await?;
        // What is there may be damaged, and this is right.
        let is_right = linked != Linked::Gone && matches!(self.read_content(digest).await, Ok(Some(_)));
        if !is_right {
            self.put_content(digest, bytes).await?;
        }
        let key = keys::manifest(repository, digest);
        let json = Bytes::from(serde_json::to_vec(&entry).map_err(|e| Error::damaged(&key, e))?);
        let pending = keys::pending_put(repository, digest, &hex::encode(rand::random::<[u8; 8]>()));
        self.put(&pending, json).await?;
        let outcome = async {
            let missing = self.missing_blobs(repository, blobs).await?;
            // They may be missing, but none shall go just now.
            let wait = async |digest| self.wait_until_uncollected(&Marked::Digest(digest)).await;
            stream::iter(manifests).map(wait).buffered(LOOK_UPS_MAX).try_collect::<()>().await?;
            if missing.is_empty() {
                self.put_entry(repository, digest, &entry).await?;
            }
            Ok(missing)
        };
        let outcome = outcome.await;
        // A store that failed may not answer this either, and a client waits; what is left is the collector's.
        if !matches!(outcome, Err(Error::Store { .. })) {
            self.remove(&pending).await?;
        }
        outcome
    }

    /// Puts a manifest and then its tags, unless blobs are missing, which are given back. A delete of the manifest that
    /// runs beside this may take it away between the two, so it is looked for again.
    pub(crate) async fn put_tagged_manifest(
        &self,
        repository: &str,
        digest: &Digest,
        manifest: NewManifest,
        tags: &[&str],
    ) -> Result<Vec<Digest>> {
        for _ in 0..LINK_TRIES {
            let missing = self.put_manifest(repository, digest, manifest.clone()).await?;
            if !missing.is_empty() {
                return Ok(missing);
            }
            for tag in tags {
                self.put_tag(repository, tag, digest).await?;
            }
            #[cfg(test)]
            if super::mutant::is(super::mutant::Mutant::NoLookAfterTags) {
                return Ok(Vec::new());
            }
            if tags.is_empty() || self.has_manifest(repository, digest).await? {
                return Ok(Vec::new());
            }
        }
        Err(Error::Collecting { what: digest.to_string() })
    }

    /// Whether the repository has this manifest.
    pub(crate) async fn has_manifest(&self, repository: &str, digest: &Digest) -> Result<bool> {
        Ok(self.head(&keys::manifest(repository, digest)).await?.is_some())
    }

    async fn put_entry(&self, repository: &str, digest: &Digest, entry: &ManifestEntry) -> Result<()> {
        let key = keys::manifest(repository, digest);
        let json = Bytes::from(serde_json::to_vec(entry).map_err(|e| Error::damaged(&key, e))?);
        if let Some(subject) = &entry.subject {
            self.put(&keys::referrer(repository, subject, digest), Bytes::new()).await?;
        }
        self.put(&key, json).await
    }

    /// The blobs that the repository lacks, after no collector is at any of them.
    async fn missing_blobs(&self, repository: &str, blobs: Vec<Digest>) -> Result<Vec<Digest>> {
        let look = async |digest: Digest| {
            self.wait_until_uncollected(&Marked::Digest(digest.clone())).await?;
            let there = self.blob_size(repository, &digest).await?.is_some();
            Ok((!there).then_some(digest))
        };
        let looked = stream::iter(blobs).map(look).buffered(LOOK_UPS_MAX);
        looked.try_filter_map(async |missing| Ok(missing)).try_collect().await
    }

    /// What is kept of a manifest, if the repository has it.
    pub(crate) async fn manifest_entry(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<Option<ManifestEntry>> {
        let key = keys::manifest(repository, digest);
        let Some(bytes) = self.read(&key).await? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::damaged(&key, e))
    }

    /// A manifest, if the repository has it.
    pub(crate) async fn manifest(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<Option<(ManifestEntry, Bytes)>> {
        let Some(entry) = self.manifest_entry(repository, digest).await? else { return Ok(None) };
        Ok(self.read_content(digest).await?.map(|bytes| (entry, bytes)))
    }

    /// Takes a manifest from a repository, and says whether it had it. Tags that lead to it are the caller's to delete,
    /// before. Its link and content stay until they are collected.
    pub(crate) async fn delete_manifest(&self, repository: &str, digest: &Digest) -> Result<bool> {
        let subject = match self.manifest_entry(repository, digest).await {
            // Its subject isn't known; lists of referrers leave out what isn't there.
            Err(Error::Damaged { .. }) => None,
            Ok(None) => return Ok(false),
            entry => entry?.and_then(|entry| entry.subject),
        };
        let removed = self.remove(&keys::manifest(repository, digest)).await?;
        if let Some(subject) = &subject {
            self.remove(&keys::referrer(repository, subject, digest)).await?;
        }
        Ok(removed)
    }

    /// The manifests of the repository, pending ones too, in no order.
    pub(crate) async fn manifests(&self, repository: &str) -> Result<Vec<ManifestInfo>> {
        // Pending ones first: one that stops being pending between the two listings is in the second.
        let mut infos = self.manifests_below(keys::pending(repository)).await?;
        infos.extend(self.manifests_below(keys::manifests(repository)).await?);
        Ok(infos)
    }

    /// Removes what a put left over that a crash ended.
    pub(crate) async fn remove_pending(&self, repository: &str, digest: &Digest, id: &str) -> Result<bool> {
        self.remove(&keys::pending_put(repository, digest, id)).await
    }

    /// The manifests whose subject this is, sorted; the subject need not be there. One that is being put may be named
    /// before its entry is there.
    pub(crate) async fn referrers(&self, repository: &str, subject: &Digest) -> Result<Vec<Digest>> {
        let found = self.manifests_below(keys::referrers(repository, subject)).await?;
        let mut digests: Vec<Digest> = found.into_iter().map(|info| info.digest).collect();
        digests.sort_unstable();
        Ok(digests)
    }

    async fn manifests_below(&self, prefix: Path) -> Result<Vec<ManifestInfo>> {
        let listed = self.inner.objects.list(Some(&prefix)).map_err(|e| self.failed("list", &prefix, e));
        listed
            .try_filter_map(async |meta| {
                Ok(keys::digest_in(&meta.location, &prefix).map(|(digest, id)| ManifestInfo {
                    digest,
                    put: meta.last_modified.into(),
                    pending: (!id.is_empty()).then(|| id.to_owned()),
                }))
            })
            .try_collect()
            .await
    }
}
