//! Reads what is kept beside content, and says what of it can't be understood: accounts and teams, and each repository's
//! manifests, tags and trash.

use anyplace_images::Digest;
use futures_util::{StreamExt as _, stream};
use tokio_util::sync::CancellationToken;

use crate::access::accounts;
use crate::storage::{Result, Storage};

/// Questions to the store at once.
const AT_ONCE: usize = 16;

/// Tells what is damaged, or can't be read.
pub(super) async fn check(
    storage: &Storage,
    stop: &CancellationToken,
    mut tell: impl FnMut(String),
) -> Result<()> {
    accounts::damaged(storage).await?.into_iter().for_each(&mut tell);
    for repository in storage.repositories().await? {
        if stop.is_cancelled() {
            return Ok(());
        }
        let manifests = storage.manifests(&repository).await?;
        let manifests = manifests.into_iter().filter(|info| info.pending.is_none());
        let read = async |digest: Digest| storage.manifest_entry(&repository, &digest).await.err();
        let mut read = stream::iter(manifests.map(|info| info.digest)).map(read).buffer_unordered(AT_ONCE);
        while let Some(problem) = read.next().await {
            problem.map(|error| error.to_string()).into_iter().for_each(&mut tell);
        }
        let tags = storage.tags(&repository).await?;
        let read = async |tag: String| storage.tag(&repository, &tag).await.err();
        let mut read = stream::iter(tags).map(read).buffer_unordered(AT_ONCE);
        while let Some(problem) = read.next().await {
            problem.map(|error| error.to_string()).into_iter().for_each(&mut tell);
        }
        for item in storage.trash_and_damaged(&repository).await?.1 {
            tell(format!("`repositories/{repository}/_trash/{}` is damaged: {}", item.id, item.reason));
        }
    }
    Ok(())
}
