//! Content by digest.

use std::ops::Range;
use std::time::SystemTime;

use anyplace_images::{Algorithm, Digest};
use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{GetOptions, GetResult, ObjectStoreExt as _};

use super::{Error, Place, READ_MAX_BYTES, Result, Storage, bucket, folder, keys};

/// Objects that are read at once.
pub(super) const READS_MAX: usize = 32;

/// Content that is stored, linked or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) digest: Digest,
    /// Bytes.
    pub(crate) size: u64,
    /// When it was stored, by the store's clock; [`Storage::ages`] tells how old that is.
    pub(crate) stored: SystemTime,
}

impl Storage {
    /// Whether any repository's content has this digest.
    pub(crate) async fn has_content(&self, digest: &Digest) -> Result<bool> {
        Ok(self.content_size(digest).await?.is_some())
    }

    /// Bytes of the content, if it is stored.
    pub(crate) async fn content_size(&self, digest: &Digest) -> Result<Option<u64>> {
        match self.inner.place {
            Place::Folder(_) => Ok(self.head(&keys::content(digest)).await?.map(|meta| meta.size)),
            Place::Bucket(_) => Ok(self.head_content(digest).await?.map(|head| head.size)),
        }
    }

    /// Opens content, all of it or a range, which must not be empty.
    pub(crate) async fn open_content(&self, digest: &Digest, range: Option<Range<u64>>) -> Result<GetResult> {
        let key = keys::content(digest);
        if let Place::Bucket(_) = self.inner.place {
            let head = self.head_content(digest).await?.ok_or_else(|| self.gone("read", &key))?;
            return Ok(self.open_head(digest, head, range));
        }
        let options = GetOptions { range: range.map(Into::into), ..GetOptions::default() };
        self.inner.objects.get_opts(&key, options).await.map_err(|e| self.failed("read", &key, e))
    }

    /// Small content, such as a manifest, as a whole, and verified.
    ///
    /// # Errors
    /// Also [`Error::Damaged`]: it has another digest.
    pub(crate) async fn read_content(&self, digest: &Digest) -> Result<Option<Bytes>> {
        let Some(bytes) = self.read_unverified(digest).await? else { return Ok(None) };
        let found = digest.same_of(&bytes);
        if found == *digest {
            return Ok(Some(bytes));
        }
        Err(Error::damaged(
            keys::content(digest),
            format!("its {} bytes have the digest {found}", bytes.len()),
        ))
    }

    async fn read_unverified(&self, digest: &Digest) -> Result<Option<Bytes>> {
        let key = keys::content(digest);
        if let Place::Folder(_) = self.inner.place {
            return self.read(&key).await;
        }
        let Some(head) = self.head_content(digest).await? else { return Ok(None) };
        if head.size > READ_MAX_BYTES {
            return Err(Error::damaged(
                &key,
                format!("{} bytes, expected at most {READ_MAX_BYTES}", head.size),
            ));
        }
        self.open_head(digest, head, None).bytes().await.map(Some).map_err(|e| self.failed("read", &key, e))
    }

    /// Stores small content, which must have this digest. For larger content there are uploads.
    pub(crate) async fn put_content(&self, digest: &Digest, bytes: Bytes) -> Result<()> {
        let object = match self.inner.place {
            Place::Folder(_) => bytes,
            Place::Bucket(_) => bucket::inline(&bytes),
        };
        self.put_payload(&keys::content(digest), object.into()).await
    }

    /// Makes a synced file of the data folder the content of `digest`; only where content is files.
    pub(crate) async fn adopt(&self, file: std::path::PathBuf, digest: &Digest) -> Result<()> {
        let key = keys::content(digest);
        let Place::Folder(folder) = &self.inner.place else {
            return Err(Error::damaged(&key, "content is no file here"));
        };
        let (to, room) = (folder.join(key.as_ref()), self.inner.room.clone());
        let moving = move || room.have(|| folder::rename_durably(&file, &to));
        let moved = tokio::task::spawn_blocking(moving).await;
        moved
            .map_err(object_store::Error::from)
            .and_then(|moved| moved.map_err(folder::generic))
            .map_err(|e| self.failed("write", &key, e))
    }

    /// Deletes content, whether or not it has links: for collectors only, behind a marker. In a bucket, what it pointed
    /// to is deleted by the next [`Storage::sweep`].
    pub(crate) async fn delete_content(&self, digest: &Digest) -> Result<bool> {
        self.remove(&keys::content(digest)).await
    }

    /// Whether content is files, of which a listing has the sizes.
    pub(crate) fn is_in_folder(&self) -> bool {
        matches!(self.inner.place, Place::Folder(_))
    }

    /// The digests of the content whose digests begin with these two digits, sorted.
    pub(crate) async fn digests_in(&self, algorithm: Algorithm, digits: &str) -> Result<Vec<Digest>> {
        let prefix = Path::from(format!("blobs/{algorithm}/{digits}"));
        let listed = self.inner.objects.list(Some(&prefix)).map_err(|e| self.failed("list", &prefix, e));
        let parsed = listed.try_filter_map(|meta| async move { Ok(keys::parse_content(&meta.location)) });
        let mut digests: Vec<Digest> = parsed.try_collect().await?;
        digests.sort_unstable();
        Ok(digests)
    }

    /// When the content was stored, if it is.
    pub(crate) async fn content_stored(&self, digest: &Digest) -> Result<Option<SystemTime>> {
        Ok(self.head(&keys::content(digest)).await?.map(|meta| meta.last_modified.into()))
    }

    /// Moves content that is wrong aside, where nothing serves it, and gives the key. Behind a marker.
    pub(crate) async fn quarantine(&self, digest: &Digest) -> Result<String> {
        let (from, random) = (keys::content(digest), hex::encode(rand::random::<[u8; 4]>()));
        let to = Path::from(format!("quarantine/{}/{}-{random}", digest.algorithm(), digest.hex()));
        self.inner.objects.rename(&from, &to).await.map_err(|e| self.failed("move", &from, e))?;
        Ok(to.to_string())
    }

    /// All content, in no order.
    pub(crate) fn contents(&self) -> BoxStream<'static, Result<Content>> {
        let (this, prefix) = (self.clone(), Path::from("blobs"));
        let listed = self.inner.objects.list(Some(&prefix));
        let failed = this.clone();
        let contents = listed.map_err(move |e| failed.failed("list", &prefix, e));
        let described = contents.map_ok(move |meta| {
            let this = this.clone();
            async move {
                let Some(digest) = keys::parse_content(&meta.location) else { return Ok(None) };
                let size = match this.inner.place {
                    Place::Folder(_) => Some(meta.size),
                    Place::Bucket(_) => this.head_content(&digest).await?.map(|head| head.size),
                };
                Ok(size.map(|size| Content { digest, size, stored: meta.last_modified.into() }))
            }
        });
        described.try_buffer_unordered(READS_MAX).try_filter_map(async |content| Ok(content)).boxed()
    }
}
