//! Blobs: uploads in parts.
//!
//! An upload asks first whether the blob is there (in the repository by HEAD, anywhere in the registry by a mount
//! without source), then sends parts of at most 500 MB with PATCH, and closes with PUT.

use std::io::{Seek as _, SeekFrom};

use futures_util::StreamExt as _;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION};
use reqwest::{Body, Response, StatusCode, Url};
use tokio::io::AsyncReadExt as _;
use tokio_util::io::ReaderStream;

use super::{Client, Target, check, header};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::pack::BlobFile;
use crate::progress::{Item, SharedProgress};
use crate::reference::Reference;

/// Largest part of an upload: proxies in front of registries commonly stop at 500 MB.
const PART_MAX_BYTES: u64 = 500_000_000;
/// Read size of uploads: large enough that system calls don't show.
const READ_BYTES: usize = 256 << 10;

/// What an upload did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// The blob was sent; this many bytes.
    Sent(u64),
    /// The registry had it already.
    Skipped,
}

impl Client {
    /// The size of a blob, or none if the repository doesn't have it.
    pub async fn head_blob(&self, reference: &Reference, digest: &Digest) -> Result<Option<u64>> {
        let target = self.target(reference)?;
        self.head_blob_at(&target, digest, "pull").await
    }

    /// Sends a blob unless the registry has it.
    pub async fn put_blob(
        &self,
        reference: &Reference,
        blob: &BlobFile,
        item: &Item,
        progress: &SharedProgress,
    ) -> Result<PutOutcome> {
        let target = self.target(reference)?;
        if self.head_blob_at(&target, &blob.digest, "pull,push").await?.is_some() {
            progress.skipped(item, blob.size);
            return Ok(PutOutcome::Skipped);
        }
        let mut start = target.url("blobs/uploads/")?;
        start.query_pairs_mut().append_pair("mount", blob.digest.as_str());
        let request = || Ok(self.inner.http.post(start.clone()).header(CONTENT_LENGTH, 0));
        let response = check(&target, self.send(&target, "pull,push", request).await?).await?;
        if response.status() == StatusCode::CREATED {
            progress.skipped(item, blob.size);
            return Ok(PutOutcome::Skipped);
        }
        progress.started(item, blob.size);
        let part_max = header(response.headers(), "oci-chunk-max-length")
            .and_then(|text| text.parse().ok())
            .map_or(PART_MAX_BYTES, |max: u64| max.clamp(1, PART_MAX_BYTES));
        let mut location = upload_location(&target, &start, &response)?;
        let mut sent = 0;
        while sent < blob.size {
            let len = part_max.min(blob.size - sent);
            let request = || {
                let body = part(blob, sent, len, item, progress)?;
                let request = self.inner.http.patch(location.clone());
                let range = format!("{sent}-{}", sent + len - 1);
                Ok(request
                    .header(CONTENT_TYPE, "application/octet-stream")
                    .header(CONTENT_LENGTH, len)
                    .header(CONTENT_RANGE, range)
                    .body(body))
            };
            let response = check(&target, self.send(&target, "pull,push", request).await?).await?;
            location = upload_location(&target, &location, &response)?;
            sent += len;
        }
        location.query_pairs_mut().append_pair("digest", blob.digest.as_str());
        let request = || Ok(self.inner.http.put(location.clone()).header(CONTENT_LENGTH, 0));
        check(&target, self.send(&target, "pull,push", request).await?).await?;
        progress.finished(item);
        Ok(PutOutcome::Sent(blob.size))
    }

    async fn head_blob_at(
        &self,
        target: &Target,
        digest: &Digest,
        actions: &'static str,
    ) -> Result<Option<u64>> {
        let url = target.url(&format!("blobs/{digest}"))?;
        let response = self.send(target, actions, || Ok(self.inner.http.head(url.clone()))).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let response = check(target, response).await?;
        let length = header(response.headers(), CONTENT_LENGTH.as_str());
        Ok(Some(length.and_then(|text| text.parse().ok()).unwrap_or(0)))
    }
}

/// A part of a file as a request body, counted as it is read.
fn part(blob: &BlobFile, skip: u64, len: u64, item: &Item, progress: &SharedProgress) -> Result<Body> {
    let mut file = std::fs::File::open(&blob.path).map_err(Error::io("reading", &blob.path))?;
    file.seek(SeekFrom::Start(blob.offset + skip)).map_err(Error::io("reading", &blob.path))?;
    let mut file = tokio::fs::File::from_std(file);
    file.set_max_buf_size(READ_BYTES);
    let (item, progress) = (item.clone(), progress.clone());
    let chunks = ReaderStream::with_capacity(file.take(len), READ_BYTES).inspect(move |chunk| {
        if let Ok(chunk) = chunk {
            progress.advanced(&item, chunk.len() as u64);
        }
    });
    Ok(Body::wrap_stream(chunks))
}

/// Where the upload goes on; never another host, since the authorization would go there.
fn upload_location(target: &Target, from: &Url, response: &Response) -> Result<Url> {
    let bad = |reason: String| Error::InvalidRegistry { what: format!("registry {}", target.name()), reason };
    let location = header(response.headers(), LOCATION.as_str())
        .ok_or_else(|| bad("its answer to an upload has no Location".to_owned()))?;
    let url =
        from.join(&location).map_err(|e| bad(format!("its upload Location `{location}` is no URL ({e})")))?;
    if url.host_str() != target.base.host_str() {
        return Err(bad(format!("its upload Location `{location}` is on another host")));
    }
    Ok(url)
}
