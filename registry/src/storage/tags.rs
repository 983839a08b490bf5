//! Tags: one object each, that holds a digest. The last writer wins.

use std::time::SystemTime;

use anyplace_images::Digest;
use bytes::Bytes;
use futures_util::TryStreamExt as _;

use super::links::LINK_TRIES;
use super::{Error, Marked, Result, Storage, keys};

/// A tag and its age.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TagInfo {
    pub(crate) tag: String,
    /// When it was last put, by the store's clock; [`Storage::ages`] tells how old that is.
    pub(crate) put: SystemTime,
}

impl Storage {
    /// The digest that a tag leads to.
    pub(crate) async fn tag(&self, repository: &str, tag: &str) -> Result<Option<Digest>> {
        let key = keys::tag(repository, tag);
        let Some(bytes) = self.read(&key).await? else { return Ok(None) };
        let text = std::str::from_utf8(&bytes).map_err(|e| Error::damaged(&key, e))?;
        text.trim().parse().map(Some).map_err(|e| Error::damaged(&key, e))
    }

    /// The digest that a tag leads to; none also where the tag is damaged, which the log says.
    pub(crate) async fn whole_tag(&self, repository: &str, tag: &str) -> Result<Option<Digest>> {
        match self.tag(repository, tag).await {
            Err(error) if error.is_damage() => {
                tracing::error!(%error, "push the tag again, or delete it");
                Ok(None)
            }
            read => read,
        }
    }

    /// Gives the tag this digest; the manifest must be there already. A collector that is about to delete the tag is
    /// waited for, as with links.
    pub(crate) async fn put_tag(&self, repository: &str, tag: &str, digest: &Digest) -> Result<()> {
        let key = keys::tag(repository, tag);
        let marked = Marked::Tag { repository: repository.to_owned(), tag: tag.to_owned() };
        for _ in 0..LINK_TRIES {
            self.put(&key, Bytes::from(digest.to_string())).await?;
            self.wait_until_uncollected(&marked).await?;
            if self.head(&key).await?.is_some() {
                return Ok(());
            }
        }
        Err(Error::Collecting { what: format!("{repository}:{tag}") })
    }

    /// When the tag was last put, if it is there.
    pub(crate) async fn tag_put(&self, repository: &str, tag: &str) -> Result<Option<SystemTime>> {
        Ok(self.head(&keys::tag(repository, tag)).await?.map(|meta| meta.last_modified.into()))
    }

    /// Says whether there was such a tag.
    pub(crate) async fn delete_tag(&self, repository: &str, tag: &str) -> Result<bool> {
        self.remove(&keys::tag(repository, tag)).await
    }

    /// The names of all tags, in no order.
    pub(crate) async fn tags(&self, repository: &str) -> Result<Vec<String>> {
        Ok(self.tag_infos(repository).await?.into_iter().map(|info| info.tag).collect())
    }

    /// All tags, in no order.
    pub(crate) async fn tag_infos(&self, repository: &str) -> Result<Vec<TagInfo>> {
        let prefix = keys::tags(repository);
        let listed = self.inner.objects.list(Some(&prefix)).map_err(|e| self.failed("list", &prefix, e));
        listed
            .try_filter_map(async |meta| {
                let tag = meta.location.filename().map(str::to_owned);
                Ok(tag.map(|tag| TagInfo { tag, put: meta.last_modified.into() }))
            })
            .try_collect()
            .await
    }
}
