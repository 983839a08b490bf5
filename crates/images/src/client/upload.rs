//! Blob uploads: skipped or mounted where the registry has the content, else sent in parts that survive breaks.
//!
//! An upload is a session at the registry, known by its URL. A part that breaks off is no failure: the registry is
//! asked how much it has, and the next part starts there. A session that the registry forgot is begun again. With a
//! [`Journal`] the session's URL outlives this process too, so that a push after kill -9 goes on at the acknowledged
//! offset; the digest that closes the upload makes sure that both halves belong together.
//!
//! Our own registry takes parts that are put together from what its repository has and from what is sent (it says so where
//! an upload begins; `docs/registry-api.md` has the form): of a new layer that shares most with an earlier one, only the
//! rest is sent. Whatever goes wrong with that, the upload goes on, or begins again, with ordinary parts.

mod body;
mod copying;
mod session;

use std::sync::Arc;

use reqwest::StatusCode;
use reqwest::header::CONTENT_LENGTH;

use super::auth::Grant;
use super::{ANSWER_TIMEOUT, Client, Target, check, header};
use crate::digest::Digest;
use crate::error::Result;
use crate::pack::BlobFile;
use crate::progress::{Item, SharedProgress};
use crate::push::journal::Journal;
use crate::push::reuse::Reuse;
use crate::reference::Reference;
use copying::Copying;
use session::{SMALL_MAX_BYTES, Upload};

/// What an upload did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// The blob was sent, with what was there already of it.
    Sent {
        /// Bytes that went out: more than the blob has where parts had to be repeated, less where an earlier push had sent
        /// some.
        sent: u64,
        /// Bytes that the registry copied from blobs that it has.
        copied: u64,
    },
    /// The registry had it already.
    Skipped,
}

/// A blob of another registry, which goes on to this one without a copy on disk.
#[derive(Clone, Debug)]
pub struct RemoteBlob {
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Who reads it.
    pub client: Client,
    /// The repository that has it.
    pub reference: Reference,
}

/// Where an upload's bytes come from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content<'a> {
    File(&'a BlobFile),
    Remote(&'a RemoteBlob),
}

impl Content<'_> {
    pub(crate) fn digest(&self) -> &Digest {
        match self {
            Content::File(file) => &file.digest,
            Content::Remote(remote) => &remote.digest,
        }
    }

    /// The file, where it is one.
    fn file(&self) -> Option<&BlobFile> {
        match self {
            Content::File(file) => Some(file),
            Content::Remote(_) => None,
        }
    }

    pub(crate) fn size(&self) -> u64 {
        match self {
            Content::File(file) => file.size,
            Content::Remote(remote) => remote.size,
        }
    }
}

/// How to upload, beyond the content.
#[derive(Clone, Copy, Default)]
pub(crate) struct UploadOptions<'a> {
    /// Repositories of the same registry that may have the blob.
    pub(crate) mount_from: &'a [String],
    /// Where sessions are remembered.
    pub(crate) journal: Option<&'a Journal>,
    /// What the repository may have of the blob.
    pub(crate) reuse: Option<&'a Reuse<'a>>,
}

impl Client {
    /// The size of a blob, or none if the repository doesn't have it.
    pub async fn head_blob(&self, reference: &Reference, digest: &Digest) -> Result<Option<u64>> {
        let target = self.target(reference)?;
        self.head_blob_at(&target, digest, Grant::Pull).await
    }

    /// Whether the registry answers, and lets this client push to the reference's repository, as far as it tells
    /// without a push.
    pub async fn check_push(&self, reference: &Reference) -> Result<()> {
        let target = self.target(reference)?;
        self.head_blob_at(&target, &Digest::of(b""), Grant::Push).await.map(drop)
    }

    /// Sends a blob unless the registry has it.
    pub async fn put_blob(
        &self,
        reference: &Reference,
        blob: &BlobFile,
        item: &Item,
        progress: &SharedProgress,
    ) -> Result<PutOutcome> {
        self.upload(reference, Content::File(blob), UploadOptions::default(), item, progress).await
    }

    pub(crate) async fn upload(
        &self,
        reference: &Reference,
        content: Content<'_>,
        options: UploadOptions<'_>,
        item: &Item,
        progress: &SharedProgress,
    ) -> Result<PutOutcome> {
        let target = self.target(reference)?;
        if self.head_blob_at(&target, content.digest(), Grant::Push).await?.is_some() {
            progress.skipped(item, content.size());
            return Ok(PutOutcome::Skipped);
        }
        let journal = options.journal.filter(|_| content.size() > SMALL_MAX_BYTES);
        let entry = journal.and_then(|j| j.entry(&target.name(), &target.repository, content.digest()));
        let mut mount_from = Vec::new();
        if let Content::Remote(remote) = content {
            let from = remote.client.target(&remote.reference)?;
            mount_from.extend((from.base == target.base).then_some(from.repository));
        }
        mount_from.extend_from_slice(options.mount_from);
        let mut upload = Upload {
            client: self,
            target: &target,
            content,
            mount_from: &mount_from,
            item,
            progress,
            entry,
            copying: Copying::new(options.reuse),
            sent: Arc::default(),
            backoff: self.patience.backoff(),
        };
        let outcome = upload.run().await?;
        if let Some(entry) = upload.entry.take() {
            entry.forget();
        }
        Ok(outcome)
    }

    async fn head_blob_at(&self, target: &Target, digest: &Digest, grant: Grant<'_>) -> Result<Option<u64>> {
        let url = target.url(&format!("blobs/{digest}"))?;
        let request = || Ok(self.inner.http.head(url.clone()).timeout(ANSWER_TIMEOUT));
        let response = self.send(target, grant, request).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let response = check(target, response).await?;
        let length = header(response.headers(), CONTENT_LENGTH.as_str());
        Ok(Some(length.and_then(|text| text.parse().ok()).unwrap_or(0)))
    }
}
