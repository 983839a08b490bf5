//! Deleting tags and manifests so that it can be undone, and undoing it.
//!
//! A deletion is put into the trash before anything is removed, and taken out after all is back, so at any moment the
//! manifest is in one of the two, or both. Undoing is a push of what is there still: it renews the links to the blobs
//! and then puts the manifest as any push does, so a collector that is about to take them is waited for or beaten.

use std::collections::BTreeSet;
use std::time::Duration;

use anyplace_images::Digest;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use crate::references;
use crate::storage::{Error, Linked, NewManifest, Result, Storage, Trashed, TrashedItem};

/// Tags that are read, and deleted, at once: in a bucket each read is a round trip, and repositories have thousands.
const TAGS_AT_ONCE: usize = 16;
/// Deepest nesting of indexes that comes back whole.
const DEPTH_MAX: usize = 8;

/// What is to be brought back.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Named<'a> {
    /// A tag, and its manifest.
    Tag(&'a str),
    /// A manifest.
    Manifest(&'a Digest),
}

/// Why something can't be brought back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Missing {
    #[error(
        "the trash of `{repository}` has no {what}; `anyplace registry trash {repository}` lists what it has"
    )]
    NotInTrash { repository: String, what: String },
    #[error(
        "the tag {tag} of `{repository}` has been pushed again, and leads to {digest}; delete that first"
    )]
    TagTaken { repository: String, tag: String, digest: Digest },
    #[error("{digest} can't come back: what it needs is gone ({what}); push it again")]
    Gone { digest: Digest, what: String },
    #[error(transparent)]
    Storage(#[from] crate::storage::Error),
}

/// Deletes a tag, and says whether there was one.
pub(crate) async fn delete_tag(
    storage: &Storage,
    repository: &str,
    tag: &str,
    window: Duration,
) -> Result<bool> {
    if !window.is_zero()
        && let Some(digest) = storage.whole_tag(repository, tag).await?
    {
        storage.put_trash(repository, &Trashed::Tag { tag: tag.to_owned(), digest }).await?;
    }
    storage.delete_tag(repository, tag).await
}

/// Deletes a manifest and the tags that lead to it, which are given back; none if there was no such manifest.
///
/// A push beside this puts its manifest, then its tags, then looks for the manifest again; this looks for tags, takes the
/// manifest away, then looks for tags again. Whoever comes second sees the other, so no tag is left that leads nowhere. If it
/// ends before the second look, the next collection takes such a tag away.
pub(crate) async fn delete_manifest(
    storage: &Storage,
    repository: &str,
    digest: &Digest,
    window: Duration,
) -> Result<Option<Vec<String>>> {
    let entry = match storage.manifest_entry(repository, digest).await {
        // It can't be brought back, and is no reason to keep it.
        Err(error @ Error::Damaged { .. }) => {
            tracing::error!(%error, "it is deleted, and can't be brought back");
            None
        }
        Ok(None) => return Ok(None),
        entry => entry?,
    };
    if let Some(entry) = entry.filter(|_| !window.is_zero()) {
        let what = Trashed::Manifest { digest: digest.clone(), entry };
        storage.put_trash(repository, &what).await?;
    }
    // Tags first: a tag must not lead nowhere.
    let mut removed = delete_tags_of(storage, repository, digest, window).await?;
    let deleted = storage.delete_manifest(repository, digest).await?;
    #[cfg(test)]
    if crate::storage::mutant::is(crate::storage::mutant::Mutant::NoSecondTags) {
        return Ok(deleted.then_some(removed));
    }
    if !storage.has_manifest(repository, digest).await? {
        removed.extend(delete_tags_of(storage, repository, digest, window).await?);
    }
    Ok(deleted.then_some(removed))
}

/// Deletes the tags that lead to a manifest, and gives them back.
async fn delete_tags_of(
    storage: &Storage,
    repository: &str,
    digest: &Digest,
    window: Duration,
) -> Result<Vec<String>> {
    let delete = async |tag: String| -> Result<Option<String>> {
        if storage.whole_tag(repository, &tag).await?.as_ref() != Some(digest) {
            return Ok(None);
        }
        if !window.is_zero() {
            let what = Trashed::Tag { tag: tag.clone(), digest: digest.clone() };
            storage.put_trash(repository, &what).await?;
        }
        storage.delete_tag(repository, &tag).await?;
        Ok(Some(tag))
    };
    let tags = storage.tags(repository).await?;
    let deleted = stream::iter(tags).map(delete).buffer_unordered(TAGS_AT_ONCE);
    deleted.try_filter_map(|tag| std::future::ready(Ok(tag))).try_collect().await
}

/// Forgets all deletions of a repository, those that are damaged too, and says how many there were: none of them can be
/// undone any more.
pub(crate) async fn empty(storage: &Storage, repository: &str) -> Result<u64> {
    let (items, damaged) = storage.trash_and_damaged(repository).await?;
    let ids = items.into_iter().map(|item| item.id).chain(damaged.into_iter().map(|item| item.id));
    let remove = async |id: String| storage.remove_trash(repository, &id).await;
    let removed: Vec<bool> =
        stream::iter(ids).map(remove).buffer_unordered(TAGS_AT_ONCE).try_collect().await?;
    Ok(removed.into_iter().filter(|removed| *removed).count() as u64)
}

/// Brings back a tag and its manifest, or a manifest, with the manifests that it names; gives the digest.
pub(crate) async fn undelete(
    storage: &Storage,
    repository: &str,
    what: Named<'_>,
) -> std::result::Result<Digest, Missing> {
    let mut trash = storage.trash(repository).await?;
    // The newest first.
    trash.sort_by(|a, b| (b.deleted, &b.id).cmp(&(a.deleted, &a.id)));
    let not_in_trash = |what: String| Missing::NotInTrash { repository: repository.to_owned(), what };
    let tag = match what {
        Named::Manifest(digest) => {
            if !restore(storage, repository, digest, &trash, DEPTH_MAX).await? {
                return Err(not_in_trash(format!("manifest {digest}")));
            }
            return Ok(digest.clone());
        }
        Named::Tag(tag) => tag,
    };
    let found = trash.iter().find_map(|item| match &item.what {
        Trashed::Tag { tag: trashed, digest } if trashed == tag => Some((item, digest)),
        _ => None,
    });
    let (item, digest) = found.ok_or_else(|| not_in_trash(format!("tag {tag}")))?;
    if let Some(taken) = storage.tag(repository, tag).await?
        && taken != *digest
    {
        let (repository, tag) = (repository.to_owned(), tag.to_owned());
        return Err(Missing::TagTaken { repository, tag, digest: taken });
    }
    if !restore(storage, repository, digest, &trash, DEPTH_MAX).await?
        && storage.manifest_entry(repository, digest).await?.is_none()
    {
        return Err(not_in_trash(format!("manifest {digest}, which the tag {tag} had")));
    }
    storage.put_tag(repository, tag, digest).await?;
    if !storage.has_manifest(repository, digest).await? {
        // It was deleted beside this; a tag must not lead nowhere.
        storage.delete_tag(repository, tag).await?;
        return Err(not_in_trash(format!("manifest {digest}, which the tag {tag} had")));
    }
    storage.remove_trash(repository, &item.id).await?;
    Ok(digest.clone())
}

/// Brings a manifest back, after those that it names; says whether the trash had it.
async fn restore(
    storage: &Storage,
    repository: &str,
    digest: &Digest,
    trash: &[TrashedItem],
    depth: usize,
) -> std::result::Result<bool, Missing> {
    let items: Vec<_> = trash.iter().filter(|item| manifest_of(item) == Some(digest)).collect();
    let entry = items.iter().find_map(|item| match &item.what {
        Trashed::Manifest { entry, .. } => Some(entry),
        Trashed::Tag { .. } => None,
    });
    let Some(entry) = entry else { return Ok(false) };
    let gone = |what: String| Missing::Gone { digest: digest.clone(), what };
    let bytes = storage.read_content(digest).await?.ok_or_else(|| gone("its own content".to_owned()))?;
    let names = references::names(&bytes).map_err(gone)?;
    for child in names.manifests.iter().filter(|_| depth > 0) {
        match Box::pin(restore(storage, repository, child, trash, depth - 1)).await {
            // An index may be sparse; what was deleted before it doesn't keep it away.
            Ok(_) | Err(Missing::Gone { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let needed: BTreeSet<&Digest> = names.blobs.iter().collect();
    for blob in needed {
        // What lies elsewhere has no link, and needs none.
        if storage.link(repository, blob).await?.is_some()
            && storage.put_link(repository, blob).await? == Linked::Gone
        {
            return Err(gone(format!("the blob {blob}")));
        }
    }
    let manifest = references::read(Some(&entry.media_type), &bytes).map_err(gone)?;
    let missing = storage.put_manifest(repository, digest, NewManifest::of(manifest, bytes)).await?;
    if let Some(blob) = missing.first() {
        return Err(gone(format!("the blob {blob}")));
    }
    for item in items {
        storage.remove_trash(repository, &item.id).await?;
    }
    Ok(true)
}

fn manifest_of(item: &TrashedItem) -> Option<&Digest> {
    match &item.what {
        Trashed::Manifest { digest, .. } => Some(digest),
        Trashed::Tag { .. } => None,
    }
}
