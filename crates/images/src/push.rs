//! Sends a packed image to a registry: all blobs, a few at once, and then the manifests.

pub(crate) mod journal;
pub(crate) mod recipe;
pub(crate) mod reuse;

use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use serde::Serialize;

use crate::client::{Client, Content, PutOutcome, UploadOptions};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::pack::PackedImage;
use crate::progress::{Item, SharedProgress, Stage};
use crate::reference::Reference;
pub use journal::Journal;
use reuse::Reuse;

/// Blobs that are sent at once: enough to keep a link busy while one waits for its commit. Each is read in pieces of
/// 256 KiB, of which the HTTP connection holds a few, so that memory stays at some MiB whatever the blobs' sizes.
const PARALLEL: usize = 4;

/// What a push did. All sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PushSummary {
    /// Digest of the image.
    pub digest: Digest,
    /// What was read to pack it.
    pub bytes_read: u64,
    /// All its blobs.
    pub bytes_packed: u64,
    /// What went to the registry; more than the blobs have where breaks made parts go twice.
    pub bytes_sent: u64,
    /// What needn't be sent: blobs that the registry had or mounted from another repository, and parts of blobs that it
    /// copied from others.
    pub bytes_deduplicated: u64,
    /// Blobs that the registry had already.
    pub skipped: usize,
    /// Requests that were repeated because the network or the registry failed for a moment.
    pub retries: u64,
    /// Packing and sending together.
    #[serde(rename = "elapsed_ms", serialize_with = "as_ms")]
    pub elapsed: Duration,
}

/// How to push, beyond the image and its name.
#[derive(Clone, Debug, Default)]
pub struct PushOptions {
    /// Repositories of the same registry that may have some of the blobs.
    pub mount_from: Vec<String>,
    /// Where uploads are remembered, so that a push after a kill goes on.
    pub journal: Option<Journal>,
}

/// Sends `image` to the registry that `reference` names, under its tag (or `latest`).
pub async fn push(
    image: &PackedImage,
    reference: &Reference,
    client: &Client,
    progress: &SharedProgress,
) -> Result<PushSummary> {
    push_with(image, reference, client, progress, &PushOptions::default()).await
}

/// The same as [`push`], with options.
pub async fn push_with(
    image: &PackedImage,
    reference: &Reference,
    client: &Client,
    progress: &SharedProgress,
    options: &PushOptions,
) -> Result<PushSummary> {
    let begun = Instant::now();
    let retries_before = client.stats().retries;
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
    let reuse = Reuse::new(image, reference, client);
    let options = UploadOptions {
        mount_from: &options.mount_from,
        journal: options.journal.as_ref(),
        reuse: Some(&reuse),
    };
    // A list, because the compiler can't see that a future made inside a stream's closure may change threads.
    let mut sends = Vec::with_capacity(image.blobs.len() + image.remote.len());
    let files = image.blobs.iter().map(Content::File);
    for content in files.chain(image.remote.iter().map(Content::Remote)) {
        sends.push(async move {
            let item = Item { stage: Stage::Send, name: content.digest().short().to_owned() };
            let outcome = client.upload(reference, content, options, &item, progress).await?;
            Ok((outcome, content.size()))
        });
    }
    let outcomes: Vec<(PutOutcome, u64)> =
        stream::iter(sends).buffer_unordered(PARALLEL).try_collect().await?;
    for child in children {
        client.put_manifest(&reference.at(&child.digest), child).await?;
    }
    // With a tag and a digest, the tag is what is to be set; the digest was compared above.
    let mut name = reference.clone();
    if name.tag.is_some() {
        name.digest = None;
    }
    client.put_manifest(&name, top).await?;
    let (mut bytes_sent, mut bytes_deduplicated, mut skipped) = (0, 0, 0);
    for (outcome, size) in outcomes {
        match outcome {
            PutOutcome::Sent { sent, copied } => {
                bytes_sent += sent;
                bytes_deduplicated += copied;
            }
            PutOutcome::Skipped => {
                bytes_deduplicated += size;
                skipped += 1;
            }
        }
    }
    Ok(PushSummary {
        digest: top.digest.clone(),
        bytes_read: image.bytes_read,
        bytes_packed: image.bytes_packed,
        bytes_sent,
        bytes_deduplicated,
        skipped,
        retries: client.stats().retries - retries_before,
        elapsed: image.elapsed + begun.elapsed(),
    })
}

fn as_ms<S: serde::Serializer>(elapsed: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}
