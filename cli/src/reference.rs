//! From the image in a spec to the exact image: tags are resolved once, when the spec is applied, so that every
//! location runs the same bytes.

use anyhow::Context as _;
use anyplace_images::{Client, Digest, Error, Reference};

use crate::{context::Session, output};

/// The image with its digest. Where nobody said which registry to ask, and none is on loopback, the image stays
/// as it is: machines resolve the tag then.
pub(crate) async fn pin(image: &str, session: &Session) -> anyhow::Result<String> {
    let reference: Reference = image.parse().map_err(|error: Error| anyhow::anyhow!("image: {error}"))?;
    let client = session.registry()?;
    match digest(&reference, &client).await {
        Ok(digest) => {
            let pinned = Reference { digest: Some(digest), ..reference.canonical() };
            Ok(pinned.to_string())
        }
        Err(error) if error.is_unreachable() && !session.registry_is_configured => {
            output::note(format_args!(
                "warning: image `{image}` is not checked: no registry is configured, and none answers at {}; set \
                 --registry, ANYPLACE_REGISTRY or a context",
                client.registry()
            ));
            Ok(image.to_owned())
        }
        Err(error) if error.is_unreachable() => Err(error).with_context(|| {
            format!(
                "image: `{image}` can't be checked, because its registry is down; start it, or check --registry or the \
                 context"
            )
        }),
        Err(error) => Err(error).context("image"),
    }
}

async fn digest(reference: &Reference, client: &Client) -> Result<Digest, Error> {
    match client.head_manifest(reference).await?.digest {
        Some(digest) => Ok(digest),
        // Allowed by the specification, and then the bytes tell.
        None => Ok(client.get_manifest(reference).await?.digest),
    }
}
