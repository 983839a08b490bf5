//! Sends a packed image to a registry: all blobs, a few at once, and then the manifests.

use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use serde::Serialize;

use crate::client::{Client, PutOutcome};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::pack::PackedImage;
use crate::progress::{Item, SharedProgress, Stage};
use crate::reference::Reference;

/// Blobs that are sent at once: enough to keep a link busy while one waits for its commit.
const PARALLEL: usize = 3;

/// What a push did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PushSummary {
    /// Digest of the image.
    pub digest: Digest,
    /// Bytes of files that were read to pack it.
    pub bytes_read: u64,
    /// Bytes of all its blobs.
    pub bytes_packed: u64,
    /// Bytes that went to the registry.
    pub bytes_sent: u64,
    /// Blobs that the registry had already.
    pub skipped: usize,
    /// Packing and sending together.
    #[serde(rename = "elapsed_ms", serialize_with = "as_ms")]
    pub elapsed: Duration,
}

/// Sends `image` to the registry that `reference` names, under its tag (or `latest`).
pub async fn push(
    image: &PackedImage,
    reference: &Reference,
    client: &Client,
    progress: &SharedProgress,
) -> Result<PushSummary> {
    let begun = Instant::now();
    let Some((top, children)) = image.manifests.split_last() else {
        return Err(Error::InvalidManifest {
            what: "the image".to_owned(),
            reason: "no manifest".to_owned(),
        });
    };
    if let Some(expected) = reference.digest.as_ref().filter(|expected| **expected != top.digest) {
        let what = format!("the image for `{reference}`");
        return Err(Error::DigestMismatch { what, expected: expected.clone(), found: top.digest.clone() });
    }
    // A list, because the compiler can't see that a future made inside a stream's closure may change threads.
    let mut sends = Vec::with_capacity(image.blobs.len());
    for blob in &image.blobs {
        sends.push(async move {
            let item = Item { stage: Stage::Send, name: blob.digest.short().to_owned() };
            client.put_blob(reference, blob, &item, progress).await
        });
    }
    let outcomes: Vec<PutOutcome> = stream::iter(sends).buffer_unordered(PARALLEL).try_collect().await?;
    for child in children {
        client.put_manifest(&reference.at(&child.digest), child).await?;
    }
    // With a tag and a digest, the tag is what is to be set; the digest was compared above.
    let mut name = reference.clone();
    if name.tag.is_some() {
        name.digest = None;
    }
    client.put_manifest(&name, top).await?;
    let sent = |outcome: &PutOutcome| match outcome {
        PutOutcome::Sent(bytes) => *bytes,
        PutOutcome::Skipped => 0,
    };
    Ok(PushSummary {
        digest: top.digest.clone(),
        bytes_read: image.bytes_read,
        bytes_packed: image.bytes_packed,
        bytes_sent: outcomes.iter().map(sent).sum(),
        skipped: outcomes.iter().filter(|outcome| **outcome == PutOutcome::Skipped).count(),
        elapsed: image.elapsed + begun.elapsed(),
    })
}

fn as_ms<S: serde::Serializer>(elapsed: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}
