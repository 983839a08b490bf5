//! From what a name means to the manifest for this machine.

use crate::client::{Client, RawManifest};
use crate::error::{Error, Result};
use crate::manifest::{self, Descriptor, Index, Platform};
use crate::reference::Reference;

/// Deepest nesting of indexes that is followed.
const INDEX_DEPTH_MAX: usize = 3;

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
