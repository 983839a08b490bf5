//! An image in another registry. Only its manifests are fetched here; blobs go through when they are packed or sent.

use crate::client::{Client, RawManifest, RemoteBlob};
use crate::error::{Error, Result};
use crate::manifest::{self, Index, Manifest, Platform};
use crate::pack::found::{Blob, Found};
use crate::pack::layout::DEPTH_MAX;
use crate::reference::Reference;

/// The image for this machine's platform, or with `all_platforms` all that the registry has of it.
pub(super) async fn find(client: &Client, reference: &Reference, all_platforms: bool) -> Result<Found> {
    let mut top = client.get_manifest(reference).await?;
    let mut found = Found::default();
    if !all_platforms {
        let mut depth = 0;
        while manifest::is_index(&top.media_type) && depth <= DEPTH_MAX {
            let index: Index = manifest::parse("the index", &top.bytes)?;
            let wanted = Platform::host();
            let Some(child) = index.manifests.iter().find(|child| child.platform.as_ref() == Some(&wanted))
            else {
                let has = index.manifests.iter().filter_map(|child| child.platform.as_ref());
                return Err(Error::NoPlatform {
                    reference: reference.to_string(),
                    wanted: format!("{wanted} (--all-platforms takes all)"),
                    found: has.map(Platform::to_string).collect::<Vec<_>>().join(", "),
                });
            };
            top = client.get_manifest(&reference.at(&child.digest)).await?;
            depth += 1;
        }
        found.add(client, reference, top)?;
        return Ok(found);
    }
    // Indexes that still have children to fetch, outermost first; a manifest goes before what lists it.
    let mut indexes = Vec::new();
    let mut next = vec![(top, 0)];
    while let Some((manifest, depth)) = next.pop() {
        if !manifest::is_index(&manifest.media_type) {
            found.add(client, reference, manifest)?;
            continue;
        }
        if depth > DEPTH_MAX {
            return Err(Error::Unsupported {
                what: format!("an index {depth} deep in `{reference}`"),
                help: format!("at most {DEPTH_MAX} are followed"),
            });
        }
        let index: Index = manifest::parse("the index", &manifest.bytes)?;
        for child in &index.manifests {
            match client.get_manifest(&reference.at(&child.digest)).await {
                Ok(child) => next.push((child, depth + 1)),
                // An index may be sparse: list platforms that its registry doesn't have.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        indexes.push(manifest);
    }
    if found.manifests.is_empty() {
        let reference = reference.to_string();
        return Err(Error::NoPlatform { reference, wanted: "any platform".into(), found: "none".into() });
    }
    found.manifests.extend(indexes.into_iter().rev());
    Ok(found)
}

impl Found {
    fn add(&mut self, client: &Client, reference: &Reference, raw: RawManifest) -> Result<()> {
        if self.manifests.iter().any(|known| known.digest == raw.digest) {
            return Ok(());
        }
        let parsed: Manifest = manifest::parse("the manifest", &raw.bytes)?;
        for descriptor in parsed.layers.iter().chain([&parsed.config]) {
            if self.blob(&descriptor.digest).is_none() {
                self.blobs.push(Blob::Remote(RemoteBlob {
                    digest: descriptor.digest.clone(),
                    size: descriptor.size,
                    client: client.clone(),
                    reference: reference.clone(),
                }));
            }
        }
        self.manifests.push(raw);
        Ok(())
    }
}
