//! Lists of repositories, tags and deletions.

use std::time::{Duration, SystemTime};

use anyplace_images::Digest;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use serde::Deserialize;

use super::views::{RepositoryPage, RepositoryView, TagView, TrashView};
use crate::storage::{Error, Result, Storage, TagInfo, Trashed, TrashedItem};

/// Most repositories in one answer.
const PAGE_MAX: usize = 1_000;
/// Questions to the store at once.
const AT_ONCE: usize = 16;
/// Manifests of an index that are looked at for its size.
const CHILDREN_MAX: usize = 256;

/// Sizes in a manifest.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Sizes {
    config: Option<Sized>,
    layers: Vec<Sized>,
    blobs: Vec<Sized>,
    manifests: Vec<Child>,
}

#[derive(Deserialize)]
struct Sized {
    #[serde(default)]
    size: u64,
}

#[derive(Deserialize)]
struct Child {
    digest: Digest,
}

pub(super) async fn page(storage: &Storage, n: Option<usize>, last: Option<&str>) -> Result<RepositoryPage> {
    let mut names = storage.repositories().await?;
    names.sort_unstable();
    names.retain(|name| last.is_none_or(|last| name.as_str() > last));
    let limit = n.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
    let more = names.len() > limit;
    names.truncate(limit);
    let next = names.last().filter(|_| more).cloned();
    let views = stream::iter(names).map(|name| view(storage, name)).buffered(AT_ONCE);
    Ok(RepositoryPage { repositories: views.try_collect().await?, next })
}

async fn view(storage: &Storage, name: String) -> Result<RepositoryView> {
    let tags = storage.tag_infos(&name).await?;
    let manifests = storage.manifests(&name).await?;
    let times = tags.iter().map(|tag| tag.put).chain(manifests.iter().map(|manifest| manifest.put));
    Ok(RepositoryView {
        pushed_at: times.max().map(moment),
        tags: tags.len() as u64,
        manifests: manifests.iter().filter(|manifest| manifest.pending.is_none()).count() as u64,
        name,
    })
}

pub(super) async fn tags(storage: &Storage, repository: &str) -> Result<Vec<TagView>> {
    let infos = storage.tag_infos(repository).await?;
    let views = stream::iter(infos).map(|info| tag(storage, repository, info)).buffered(AT_ONCE);
    let mut views: Vec<TagView> = views.try_filter_map(|view| async move { Ok(view) }).try_collect().await?;
    views.sort_by(|a, b| a.tag.cmp(&b.tag));
    Ok(views)
}

/// None if it was deleted a moment ago.
async fn tag(storage: &Storage, repository: &str, info: TagInfo) -> Result<Option<TagView>> {
    let Some(digest) = storage.whole_tag(repository, &info.tag).await? else { return Ok(None) };
    let (media_type, size_bytes) = size(storage, repository, &digest).await?;
    let pushed_at = moment(info.put);
    Ok(Some(TagView { tag: info.tag, digest, media_type, size_bytes, pushed_at }))
}

/// Media type, and bytes of all that a manifest names.
async fn size(storage: &Storage, repository: &str, digest: &Digest) -> Result<(String, u64)> {
    let found = match storage.manifest(repository, digest).await {
        // The others are listed all the same; a pull and a scrub say what is wrong with this one.
        Err(Error::Damaged { .. }) => None,
        found => found?,
    };
    let Some((entry, bytes)) = found else { return Ok((String::new(), 0)) };
    // What can't be read was refused when it was pushed; its own size is what is known.
    let sizes: Sizes = serde_json::from_slice(&bytes).unwrap_or_default();
    let blobs = sizes.config.iter().chain(&sizes.layers).chain(&sizes.blobs).map(|blob| blob.size);
    let mut total = bytes.len() as u64 + blobs.sum::<u64>();
    for child in sizes.manifests.iter().take(CHILDREN_MAX) {
        total += Box::pin(size(storage, repository, &child.digest)).await?.1;
    }
    Ok((entry.media_type, total))
}

pub(super) async fn trash(
    storage: &Storage,
    repository: Option<&str>,
    window: Duration,
) -> Result<Vec<TrashView>> {
    let mut names = match repository {
        Some(name) => vec![name.to_owned()],
        None => storage.repositories().await?,
    };
    names.sort_unstable();
    let mut views = Vec::new();
    for name in names {
        let mut items = storage.trash(&name).await?;
        items.sort_by(|a, b| (b.deleted, &b.id).cmp(&(a.deleted, &a.id)));
        views.extend(items.into_iter().map(|item| trashed(&name, item, window)));
    }
    Ok(views)
}

fn trashed(repository: &str, item: TrashedItem, window: Duration) -> TrashView {
    let (tag, digest) = match item.what {
        Trashed::Tag { tag, digest } => (Some(tag), digest),
        Trashed::Manifest { digest, .. } => (None, digest),
    };
    let (deleted_at, until) = (moment(item.deleted), moment(item.deleted + window));
    TrashView { repository: repository.to_owned(), tag, digest, deleted_at, until }
}

fn moment(time: SystemTime) -> Timestamp {
    Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH)
}
