//! Content and links, kept in an object store.
//!
//! Keys:
//! - `blobs/<algorithm>/<2 digits>/<digest>`: content, shared by all repositories; manifests are content too
//! - `repositories/<name>/_blobs/<algorithm>/<digest>`: the repository has this blob
//! - `repositories/<name>/_manifests/<algorithm>/<digest>`: the repository has this manifest; holds its media type
//! - `repositories/<name>/_tags/<tag>`: the digest that a push gave the tag
//! - `repositories/<name>/_upstream/<tag>`: the digest that the upstream gave the tag, as last seen
//! - `uploads/<id>`: an upload in progress; not an object but a file, since objects can't grow
//!
//! No part of a repository's name starts with `_`, so the keys of `a` and `a/_tags` can't meet. Content is written
//! before the link to it, each durably, so a link never leads nowhere. A tag is one put: the last writer wins.

use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use anyplace_images::Digest;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{Error, GetOptions, GetResult, ObjectStore, ObjectStoreExt as _};
use serde::{Deserialize, Serialize};

/// What a repository can have by digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    Blob,
    Manifest,
}

/// Who gave a tag its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TagOf {
    Push,
    Upstream,
}

/// What a manifest's link holds.
#[derive(Debug, Serialize, Deserialize)]
struct ManifestLink {
    media_type: String,
}

/// The registry's content. Clones are the same storage.
#[derive(Clone)]
pub(crate) struct Storage {
    objects: Arc<dyn ObjectStore>,
    uploads: PathBuf,
}

/// Result of storage operations.
pub(crate) type Result<T> = object_store::Result<T>;

impl Storage {
    /// Storage in a local folder, every write synced before it is acknowledged.
    pub(crate) fn open(data_dir: &FilePath) -> anyhow::Result<Storage> {
        let uploads = data_dir.join("uploads");
        std::fs::create_dir_all(&uploads)
            .with_context(|| format!("can't make {}; check data_dir", uploads.display()))?;
        let objects = LocalFileSystem::new_with_prefix(data_dir)
            .with_context(|| format!("can't open {}; check data_dir", data_dir.display()))?
            .with_fsync(true);
        Ok(Storage { objects: Arc::new(objects), uploads })
    }

    /// The folder of the uploads in progress.
    pub(crate) fn uploads(&self) -> &FilePath {
        &self.uploads
    }

    pub(crate) async fn has_content(&self, digest: &Digest) -> Result<bool> {
        exists(self.objects.head(&content_key(digest)).await.map(drop))
    }

    /// The size of a blob, if the repository has it.
    pub(crate) async fn blob_size(&self, repository: &str, digest: &Digest) -> Result<Option<u64>> {
        if !self.is_linked(Link::Blob, repository, digest).await? {
            return Ok(None);
        }
        found(self.objects.head(&content_key(digest)).await.map(|meta| meta.size))
    }

    /// Opens content, all of it or a range.
    pub(crate) async fn open_content(&self, digest: &Digest, range: Option<Range<u64>>) -> Result<GetResult> {
        let options = GetOptions { range: range.map(Into::into), ..GetOptions::default() };
        self.objects.get_opts(&content_key(digest), options).await
    }

    /// Makes the verified file of an upload, `uploads/<id>`, the content of `digest`. The file must be synced.
    pub(crate) async fn adopt(&self, id: &str, digest: &Digest) -> Result<()> {
        let from = Path::from(format!("uploads/{id}"));
        if self.has_content(digest).await? {
            return self.objects.delete(&from).await;
        }
        self.objects.rename(&from, &content_key(digest)).await
    }

    pub(crate) async fn is_linked(&self, link: Link, repository: &str, digest: &Digest) -> Result<bool> {
        exists(self.objects.head(&link_key(link, repository, digest)).await.map(drop))
    }

    pub(crate) async fn link_blob(&self, repository: &str, digest: &Digest) -> Result<()> {
        let key = link_key(Link::Blob, repository, digest);
        self.objects.put(&key, Bytes::new().into()).await.map(drop)
    }

    /// Says whether there was a link to remove. The content stays: other repositories may have it.
    pub(crate) async fn unlink(&self, link: Link, repository: &str, digest: &Digest) -> Result<bool> {
        self.remove(&link_key(link, repository, digest)).await
    }

    pub(crate) async fn put_manifest(
        &self,
        repository: &str,
        digest: &Digest,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<()> {
        self.objects.put(&content_key(digest), bytes.into()).await?;
        let link = ManifestLink { media_type: media_type.to_owned() };
        let link = serde_json::to_vec(&link).map_err(|e| broken("a manifest's link", e))?;
        self.objects.put(&link_key(Link::Manifest, repository, digest), link.into()).await.map(drop)
    }

    /// A manifest's media type and bytes, if the repository has it.
    pub(crate) async fn manifest(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<Option<(String, Bytes)>> {
        let key = link_key(Link::Manifest, repository, digest);
        let Some(link) = self.read(&key).await? else { return Ok(None) };
        let link: ManifestLink = serde_json::from_slice(&link).map_err(|e| broken("a manifest's link", e))?;
        Ok(self.read(&content_key(digest)).await?.map(|bytes| (link.media_type, bytes)))
    }

    pub(crate) async fn tag(&self, of: TagOf, repository: &str, tag: &str) -> Result<Option<Digest>> {
        let Some(bytes) = self.read(&tag_key(of, repository, tag)).await? else { return Ok(None) };
        let text = std::str::from_utf8(&bytes).map_err(|e| broken("a tag", e))?;
        text.trim().parse().map(Some).map_err(|e| broken("a tag", e))
    }

    pub(crate) async fn put_tag(
        &self,
        of: TagOf,
        repository: &str,
        tag: &str,
        digest: &Digest,
    ) -> Result<()> {
        let value = Bytes::from(digest.to_string());
        self.objects.put(&tag_key(of, repository, tag), value.into()).await.map(drop)
    }

    /// Says whether there was such a tag.
    pub(crate) async fn delete_tag(&self, of: TagOf, repository: &str, tag: &str) -> Result<bool> {
        self.remove(&tag_key(of, repository, tag)).await
    }

    /// All tags that `of` gave, in no order.
    pub(crate) async fn tags(&self, of: TagOf, repository: &str) -> Result<Vec<String>> {
        let prefix = Path::from(format!("repositories/{repository}/{}", tag_folder(of)));
        let names =
            self.objects.list(Some(&prefix)).map_ok(|meta| meta.location.filename().map(str::to_owned));
        names.try_filter_map(|name| async { Ok(name) }).try_collect().await
    }

    /// Whether anything was ever pushed to, or cached in, this repository.
    pub(crate) async fn has_repository(&self, repository: &str) -> Result<bool> {
        let prefix = Path::from(format!("repositories/{repository}"));
        let inside = self.objects.list_with_delimiter(Some(&prefix)).await?;
        Ok(inside.common_prefixes.iter().any(|p| p.filename().is_some_and(|name| name.starts_with('_'))))
    }

    /// Remembers that one manifest is about another.
    pub(crate) async fn put_referrer(
        &self,
        repository: &str,
        subject: &Digest,
        digest: &Digest,
    ) -> Result<()> {
        let key = referrer_key(repository, subject, digest);
        self.objects.put(&key, Bytes::new().into()).await.map(drop)
    }

    pub(crate) async fn delete_referrer(
        &self,
        repository: &str,
        subject: &Digest,
        digest: &Digest,
    ) -> Result<bool> {
        self.remove(&referrer_key(repository, subject, digest)).await
    }

    /// The manifests that are about this one, in no order.
    pub(crate) async fn referrers(&self, repository: &str, subject: &Digest) -> Result<Vec<Digest>> {
        let folder =
            format!("repositories/{repository}/_referrers/{}/{}", subject.algorithm(), subject.hex());
        let keys = self.objects.list(Some(&Path::from(folder))).map_ok(|meta| meta.location);
        let digests = keys.try_filter_map(|key| async move {
            let mut parts = key.as_ref().rsplit('/');
            let (hex, algorithm) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            Ok(format!("{algorithm}:{hex}").parse().ok())
        });
        digests.try_collect().await
    }

    async fn read(&self, key: &Path) -> Result<Option<Bytes>> {
        match found(self.objects.get(key).await)? {
            Some(object) => object.bytes().await.map(Some),
            None => Ok(None),
        }
    }

    async fn remove(&self, key: &Path) -> Result<bool> {
        if !exists(self.objects.head(key).await.map(drop))? {
            return Ok(false);
        }
        exists(self.objects.delete(key).await)
    }
}

fn content_key(digest: &Digest) -> Path {
    let hex = digest.hex();
    Path::from(format!("blobs/{}/{}/{hex}", digest.algorithm(), &hex[..2]))
}

fn link_key(link: Link, repository: &str, digest: &Digest) -> Path {
    let folder = match link {
        Link::Blob => "_blobs",
        Link::Manifest => "_manifests",
    };
    Path::from(format!("repositories/{repository}/{folder}/{}/{}", digest.algorithm(), digest.hex()))
}

fn referrer_key(repository: &str, subject: &Digest, digest: &Digest) -> Path {
    let (subject, algorithm) = (format!("{}/{}", subject.algorithm(), subject.hex()), digest.algorithm());
    Path::from(format!("repositories/{repository}/_referrers/{subject}/{algorithm}/{}", digest.hex()))
}

fn tag_folder(of: TagOf) -> &'static str {
    match of {
        TagOf::Push => "_tags",
        TagOf::Upstream => "_upstream",
    }
}

fn tag_key(of: TagOf, repository: &str, tag: &str) -> Path {
    Path::from(format!("repositories/{repository}/{}/{tag}", tag_folder(of)))
}

fn found<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

fn exists(result: Result<()>) -> Result<bool> {
    found(result).map(|found| found.is_some())
}

fn broken(what: &'static str, e: impl std::error::Error + Send + Sync + 'static) -> Error {
    tracing::error!(what, error = %e, "damaged in storage");
    Error::Generic { store: "registry", source: Box::new(e) }
}
