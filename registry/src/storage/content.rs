//! Content by digest.

use std::ops::Range;
use std::time::SystemTime;

use anyplace_images::Digest;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{GetOptions, GetResult, ObjectStoreExt as _};

use super::{Result, Storage, folder, keys};

/// Content that is stored, linked or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) digest: Digest,
    /// Bytes.
    pub(crate) size: u64,
    /// When it was stored, by the store's clock; compare with [`Storage::now`].
    pub(crate) stored: SystemTime,
}

impl Storage {
    /// Whether any repository's content has this digest.
    pub(crate) async fn has_content(&self, digest: &Digest) -> Result<bool> {
        Ok(self.content_size(digest).await?.is_some())
    }

    /// Bytes of the content, if it is stored.
    pub(crate) async fn content_size(&self, digest: &Digest) -> Result<Option<u64>> {
        Ok(self.head(&keys::content(digest)).await?.map(|meta| meta.size))
    }

    /// Opens content, all of it or a range, which must not be empty.
    pub(crate) async fn open_content(&self, digest: &Digest, range: Option<Range<u64>>) -> Result<GetResult> {
        let key = keys::content(digest);
        let options = GetOptions { range: range.map(Into::into), ..GetOptions::default() };
        self.inner.objects.get_opts(&key, options).await.map_err(|e| self.failed("read", &key, e))
    }

    /// Small content, such as a manifest, as a whole.
    pub(crate) async fn read_content(&self, digest: &Digest) -> Result<Option<Bytes>> {
        self.read(&keys::content(digest)).await
    }

    /// Stores small content, which must have this digest. For larger content there are uploads.
    pub(crate) async fn put_content(&self, digest: &Digest, bytes: Bytes) -> Result<()> {
        self.put(&keys::content(digest), bytes).await
    }

    /// Makes a synced file of the data folder the content of `digest`.
    pub(crate) async fn adopt(&self, file: std::path::PathBuf, digest: &Digest) -> Result<()> {
        let key = keys::content(digest);
        let to = self.folder().join(key.as_ref());
        let moved = tokio::task::spawn_blocking(move || folder::rename_durably(&file, &to)).await;
        moved
            .map_err(object_store::Error::from)
            .and_then(|moved| moved.map_err(folder::generic))
            .map_err(|e| self.failed("write", &key, e))
    }

    /// Deletes content, whether or not it has links: for collectors only, behind a marker.
    pub(crate) async fn delete_content(&self, digest: &Digest) -> Result<bool> {
        self.remove(&keys::content(digest)).await
    }

    /// All content, in no order.
    pub(crate) fn contents(&self) -> BoxStream<'static, Result<Content>> {
        let (this, prefix) = (self.clone(), Path::from("blobs"));
        let listed = self.inner.objects.list(Some(&prefix));
        let contents = listed.map_err(move |e| this.failed("list", &Path::from("blobs"), e));
        contents
            .try_filter_map(|meta| async move {
                let name = meta.location.as_ref().strip_prefix("blobs/");
                let digest = name.and_then(|name| {
                    let mut parts = name.split('/');
                    format!("{}:{}", parts.next()?, parts.nth(1)?).parse().ok()
                });
                let stored = meta.last_modified.into();
                Ok(digest.map(|digest| Content { digest, size: meta.size, stored }))
            })
            .boxed()
    }
}
