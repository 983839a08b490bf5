//! Which repository has how much: every content is looked at once, so memory is a line for each repository.

use std::collections::BTreeMap;

use futures_util::TryStreamExt as _;

use super::views::{RepositoryUsage, UsageView};
use crate::storage::{Content, Result, Storage};

/// Questions to the store at once.
const AT_ONCE: usize = 16;

/// The usage of one repository, or of all.
pub(super) async fn usage(storage: &Storage, repository: Option<&str>) -> Result<UsageView> {
    let mut view = UsageView::default();
    let mut by_name: BTreeMap<String, RepositoryUsage> = BTreeMap::new();
    let mut owned =
        storage.contents().map_ok(|content| owners(storage, content)).try_buffer_unordered(AT_ONCE);
    while let Some((content, owners)) = owned.try_next().await? {
        view.total_bytes += content.size;
        view.contents += 1;
        if owners.is_empty() {
            view.unneeded_bytes += content.size;
        }
        let own = owners.len() == 1;
        for name in owners.into_iter().filter(|name| repository.is_none_or(|wanted| wanted == name)) {
            let usage = by_name.entry(name).or_default();
            usage.contents += 1;
            usage.bytes += content.size;
            usage.own_bytes += if own { content.size } else { 0 };
        }
    }
    let named = by_name.into_iter().map(|(repository, usage)| RepositoryUsage { repository, ..usage });
    view.repositories = named.collect();
    view.repositories.sort_by_key(|usage| std::cmp::Reverse(usage.bytes));
    Ok(view)
}

async fn owners(storage: &Storage, content: Content) -> Result<(Content, Vec<String>)> {
    let links = storage.links_of(&content.digest).await?;
    Ok((content, links.into_iter().map(|link| link.repository).collect()))
}
