//! Which repository has which content.
//!
//! A link keeps content alive. Its time is that of the last push, mount or renewal, and a collector leaves young links
//! alone even where no manifest needs the content: an upload comes before the manifest that names it.

use std::time::{Duration, SystemTime};

use anyplace_images::Digest;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use tokio::time::Instant;

use super::{Error, Marked, Result, Storage, keys};

/// How long a writer waits for a collector to be done with one digest. It deletes one object meanwhile.
const COLLECTING_MAX: Duration = Duration::from_secs(10);
/// How often it looks.
const COLLECTING_PAUSE: Duration = Duration::from_millis(20);
/// Times that a link is put again after a collector took it away; each takes a whole round of a collector.
pub(super) const LINK_TRIES: usize = 5;

/// A repository's link to content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) repository: String,
    pub(crate) digest: Digest,
    /// When it was last put, by the store's clock; [`Storage::ages`] tells how old that is.
    pub(crate) put: SystemTime,
}

/// What came of linking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Linked {
    /// The content is there, has this many bytes, and stays as long as the link.
    Yes(u64),
    /// The link is there, but the content is not: store it (the link protects it from now on), or leave the link to the
    /// collector. Another writer may be storing the content behind the same link, so don't remove it.
    Gone,
}

impl Storage {
    /// When the link was last put, if there is one.
    pub(crate) async fn link(&self, repository: &str, digest: &Digest) -> Result<Option<SystemTime>> {
        Ok(self.head(&keys::link(repository, digest)).await?.map(|meta| meta.last_modified.into()))
    }

    /// Bytes of the content, if the repository has it; for a client that may rely on it and not upload it. So a link
    /// that gets old is renewed, or a collector could come between this answer and the manifest.
    pub(crate) async fn blob_size_renewed(&self, repository: &str, digest: &Digest) -> Result<Option<u64>> {
        let Some(put) = self.link(repository, digest).await? else { return Ok(None) };
        if self.inner.clock.about_now().duration_since(put).unwrap_or_default() < self.inner.renew_after {
            return self.content_size(digest).await;
        }
        match self.put_link(repository, digest).await {
            Ok(Linked::Yes(size)) => Ok(Some(size)),
            Ok(Linked::Gone) => Ok(None),
            // Whoever only reads needs no younger link; a manifest that comes too late is told that its blob is gone.
            Err(Error::Full { .. }) => self.content_size(digest).await,
            Err(error) => Err(error),
        }
    }

    /// Bytes of the content, if the repository has it.
    pub(crate) async fn blob_size(&self, repository: &str, digest: &Digest) -> Result<Option<u64>> {
        if self.link(repository, digest).await?.is_none() {
            return Ok(None);
        }
        self.content_size(digest).await
    }

    /// Links content into a repository, or renews its link: the writer's side of the protocol in `storage`.
    ///
    /// # Errors
    /// Also [`Error::Collecting`]: a collector was at it for too long; the client should ask again.
    pub(crate) async fn put_link(&self, repository: &str, digest: &Digest) -> Result<Linked> {
        let key = keys::link(repository, digest);
        for _ in 0..LINK_TRIES {
            self.put(&key, Bytes::new()).await?;
            self.wait_until_uncollected(&Marked::Digest(digest.clone())).await?;
            // A collector that saw the old link, just before it was renewed, may have removed the new one.
            if self.head(&key).await?.is_some() {
                return Ok(self.content_size(digest).await?.map_or(Linked::Gone, Linked::Yes));
            }
        }
        Err(Error::Collecting { what: digest.to_string() })
    }

    /// Takes content from a repository, and says whether it had it. The content stays until it is collected.
    pub(crate) async fn remove_link(&self, repository: &str, digest: &Digest) -> Result<bool> {
        self.remove(&keys::link(repository, digest)).await
    }

    /// All links of a digest.
    pub(crate) async fn links_of(&self, digest: &Digest) -> Result<Vec<Link>> {
        self.links_below(keys::links_of(digest)).try_collect().await
    }

    /// All links, in no order.
    pub(crate) fn links(&self) -> BoxStream<'static, Result<Link>> {
        self.links_below(Path::from("links"))
    }

    fn links_below(&self, prefix: Path) -> BoxStream<'static, Result<Link>> {
        let (this, listed) = (self.clone(), self.inner.objects.list(Some(&prefix)));
        listed
            .map_err(move |e| this.failed("list", &prefix, e))
            .try_filter_map(async |meta| {
                let put = meta.last_modified.into();
                Ok(keys::parse_link(&meta.location).map(|(digest, repository)| Link {
                    repository,
                    digest,
                    put,
                }))
            })
            .boxed()
    }

    /// Waits until no collector is there.
    pub(super) async fn wait_until_uncollected(&self, marked: &Marked) -> Result<()> {
        #[cfg(test)]
        if super::mutant::is(super::mutant::Mutant::NoWait) {
            return Ok(());
        }
        let begun = Instant::now();
        while self.is_marked(marked).await? {
            if begun.elapsed() > COLLECTING_MAX {
                let what = match marked {
                    Marked::Digest(digest) => digest.to_string(),
                    Marked::Tag { repository, tag } => format!("{repository}:{tag}"),
                };
                return Err(Error::Collecting { what });
            }
            tokio::time::sleep(COLLECTING_PAUSE).await;
        }
        Ok(())
    }
}
