//! Lists of repositories, tags and deletions.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use anyplace_images::Digest;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use serde::Deserialize;

use super::views::{CachedTag, RepositoryPage, RepositoryView, TagView, TrashView};
use crate::errors::Answer;
use crate::server::App;
use crate::storage::{Error, Result, Storage, TagInfo, Trashed, TrashedItem};
use crate::upstream::{Cache, Cached, KeptTag};

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
    digest: Option<Digest>,
    #[serde(default)]
    size: u64,
}

#[derive(Deserialize)]
struct Child {
    digest: Digest,
}

/// `cached`: what a cache keeps, by repository.
pub(super) async fn page(
    storage: &Storage,
    cached: BTreeMap<String, Cached>,
    n: Option<usize>,
    last: Option<&str>,
) -> Result<RepositoryPage> {
    let mut names = storage.repositories().await?;
    names.extend(cached.keys().cloned());
    names.sort_unstable();
    names.dedup();
    names.retain(|name| last.is_none_or(|last| name.as_str() > last));
    let limit = n.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
    let more = names.len() > limit;
    names.truncate(limit);
    let next = names.last().filter(|_| more).cloned();
    let views =
        stream::iter(names).map(|name| view(storage, cached.get(&name).copied(), name)).buffered(AT_ONCE);
    Ok(RepositoryPage { repositories: views.try_collect().await?, next })
}

async fn view(storage: &Storage, cached: Option<Cached>, name: String) -> Result<RepositoryView> {
    let tags = storage.tag_infos(&name).await?;
    let manifests = storage.manifests(&name).await?;
    let times = tags.iter().map(|tag| tag.put).chain(manifests.iter().map(|manifest| manifest.put));
    Ok(RepositoryView {
        pushed_at: times.max().map(moment),
        tags: tags.len() as u64,
        manifests: manifests.iter().filter(|manifest| manifest.pending.is_none()).count() as u64,
        name,
        cached,
    })
}

/// The tags that were pushed, and those that are cached.
pub(super) async fn tags(app: &App, repository: &str) -> Answer<Vec<TagView>> {
    let looks = Looks { storage: &app.storage, cache: app.cache.as_ref(), repository };
    let pushed = stream::iter(app.storage.tag_infos(repository).await?).map(|info| looks.pushed(info));
    let pushed: Vec<_> = pushed.buffered(AT_ONCE).try_collect().await?;
    let mut views: Vec<TagView> = pushed.into_iter().flatten().collect();
    if let Some(cache) = looks.cache {
        let is_pushed: BTreeSet<String> = views.iter().map(|view| view.tag.clone()).collect();
        let mut kept = cache.kept_tags(repository).await?;
        // What was pushed is what is served.
        kept.retain(|kept| !is_pushed.contains(&kept.tag));
        let cached = stream::iter(kept).map(|kept| looks.cached(kept)).buffered(AT_ONCE);
        views.extend(cached.try_collect::<Vec<_>>().await?);
    }
    views.sort_by(|a, b| a.tag.cmp(&b.tag));
    Ok(views)
}

/// What a manifest leads to.
#[derive(Default)]
struct Tree {
    media_type: String,
    /// Bytes of all that it names, and of itself.
    bytes: u64,
    /// Of them, those that a cache has on disk.
    cached_bytes: u64,
}

/// Looks at the tags of a repository.
struct Looks<'a> {
    storage: &'a Storage,
    cache: Option<&'a Cache>,
    repository: &'a str,
}

impl Looks<'_> {
    /// None if it was deleted a moment ago.
    async fn pushed(&self, info: TagInfo) -> Answer<Option<TagView>> {
        let Some(digest) = self.storage.whole_tag(self.repository, &info.tag).await? else { return Ok(None) };
        let Tree { media_type, bytes, .. } = self.tree(&digest).await?;
        let pushed_at = Some(moment(info.put));
        let (tag, cached) = (info.tag, None);
        Ok(Some(TagView { tag, digest, media_type, size_bytes: bytes, pushed_at, cached }))
    }

    async fn cached(&self, kept: KeptTag) -> Answer<TagView> {
        let KeptTag { tag, digest, from } = kept;
        let Tree { media_type, bytes, cached_bytes } = self.tree(&digest).await?;
        let cached = Some(CachedTag { from, disk_bytes: cached_bytes });
        Ok(TagView { tag, digest, media_type, size_bytes: bytes, pushed_at: None, cached })
    }

    /// All that a manifest names, and those that it names.
    async fn tree(&self, digest: &Digest) -> Answer<Tree> {
        let found = match self.storage.manifest(self.repository, digest).await {
            // The others are listed all the same; a pull and a scrub say what is wrong with this one.
            Err(Error::Damaged { .. }) => None,
            found => found?,
        };
        let mut tree = Tree::default();
        let bytes = match (found, self.cache) {
            (Some((entry, bytes)), _) => {
                tree.media_type = entry.media_type;
                bytes
            }
            (None, Some(cache)) => match cache.kept_manifest(self.repository, digest).await? {
                Some(manifest) => {
                    tree.media_type = manifest.media_type;
                    tree.cached_bytes = manifest.bytes.len() as u64;
                    manifest.bytes
                }
                None => return Ok(tree),
            },
            (None, None) => return Ok(tree),
        };
        // What can't be read was refused when it was pushed; its own size is what is known.
        let sizes: Sizes = serde_json::from_slice(&bytes).unwrap_or_default();
        tree.bytes = bytes.len() as u64;
        for blob in sizes.config.iter().chain(&sizes.layers).chain(&sizes.blobs) {
            tree.bytes += blob.size;
            let here = blob.digest.as_ref().zip(self.cache).map_or(0, |(blob, cache)| cache.bytes_here(blob));
            tree.cached_bytes += here;
        }
        for child in sizes.manifests.iter().take(CHILDREN_MAX) {
            let child = Box::pin(self.tree(&child.digest)).await?;
            tree.bytes += child.bytes;
            tree.cached_bytes += child.cached_bytes;
        }
        Ok(tree)
    }
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
