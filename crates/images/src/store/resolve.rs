//! From what a name means to the manifest for this machine, and whom to ask.

use std::sync::Arc;

use super::objects::lock;
use super::{Inner, PullOptions, PulledImage};
use crate::client::{Client, Patience, RawManifest};
use crate::error::{Error, Result};
use crate::manifest::{self, Descriptor, Index, Platform};
use crate::reference::Reference;

/// Deepest nesting of indexes that is followed.
const INDEX_DEPTH_MAX: usize = 3;

impl Inner {
    /// Fetches an image from the first of the client's registries that isn't away, and lists it under a name, usually the
    /// same. What one has sent stays.
    pub(super) async fn fetch_from_any(
        self: &Arc<Self>,
        reference: &Reference,
        name: &Reference,
        client: &Client,
        options: &PullOptions,
    ) -> Result<PulledImage> {
        let (clients, mut error) = (client.in_order(reference), Error::Cancelled);
        for client in &clients {
            match self.fetch_as(reference, name, client, options).await {
                Err(away) if away.is_passing() => error = away,
                other => return other,
            }
            if clients.len() > 1 {
                tracing::warn!(%reference, %error, "a registry is away, or can't answer");
            }
        }
        Err(error)
    }

    /// The client that asks what a name means: what it meant last stands in for a registry that is away, so that there is
    /// no reason to wait long.
    pub(super) fn asking(&self, reference: &Reference, client: &Client) -> Client {
        let patience = client.patience();
        client.with_patience(if self.is_named(reference) { patience.min(Patience::SHORT) } else { patience })
    }

    pub(super) fn is_named(&self, reference: &Reference) -> bool {
        lock(&self.images).contains_key(&reference.canonical().to_string())
    }
}

/// Follows indexes to the image for this machine's platform.
pub(super) async fn choose_platform(
    reference: &Reference,
    top: RawManifest,
    client: &Client,
) -> Result<RawManifest> {
    let mut current = top;
    for _ in 0..INDEX_DEPTH_MAX {
        if !manifest::is_index(&current.media_type) {
            return Ok(current);
        }
        let index: Index = manifest::parse(&format!("the index of `{reference}`"), &current.bytes)?;
        let wanted = Platform::host();
        let fits = |d: &&Descriptor| match &d.platform {
            Some(platform) => *platform == wanted,
            // An index with one image often leaves its platform out.
            None => index.manifests.len() == 1,
        };
        let Some(chosen) = index.manifests.iter().find(fits) else {
            let found: Vec<String> =
                index.manifests.iter().filter_map(|d| d.platform.as_ref()).map(Platform::to_string).collect();
            return Err(Error::NoPlatform {
                reference: reference.to_string(),
                wanted: wanted.to_string(),
                found: found.join(", "),
            });
        };
        current = client.get_manifest(&reference.at(&chosen.digest)).await?;
    }
    Err(Error::Unsupported {
        what: format!("`{reference}`, indexes inside indexes,"),
        help: "push it with one index".to_owned(),
    })
}

/// Refuses what is no archive.
pub(super) fn check_layer_type(media_type: &str) -> Result<()> {
    if [".tar", ".tar.gzip", ".tar+gzip", ".tar.zstd", ".tar+zstd"]
        .iter()
        .any(|end| media_type.ends_with(end))
    {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("a layer of type `{media_type}`"),
        help: "expected a tar archive: plain, gzip or zstd".to_owned(),
    })
}
