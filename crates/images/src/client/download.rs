//! Blob downloads: whole and verified, or one range.
//!
//! A download that breaks goes on where it was, by a range request; a registry that knows no ranges (RFC 9110 lets
//! it answer 200 with everything) is read again from the start and what is known already is dropped. What arrives
//! after a break runs through the same hasher, so that pieces of two different contents can't pass for one blob.

use std::ops::Range;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Response, StatusCode};

use super::auth::Grant;
use super::retry::Backoff;
use super::{Client, Target, check, header};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::reference::{Reference, digits};

/// A blob, or a range of one, that arrives.
///
/// Of a whole blob, size and digest are verified before the end is reported. Of a range only the length is: who
/// asked for it must verify its content.
pub struct BlobStream {
    client: Client,
    target: Target,
    digest: Digest,
    /// None once the end was reported, and of a range.
    hasher: Option<Hasher>,
    /// Where in the blob the next byte that is passed on lies.
    position: u64,
    /// Where in the blob to stop: of a range its end, of a whole blob the size of its descriptor, where known.
    end: Option<u64>,
    /// Set for a range, whose end is where to stop although the blob goes on.
    is_range: bool,
    /// Size of the whole blob as the registry tells it.
    blob_size: Option<u64>,
    /// Where in the blob the next byte of `response` lies: before `position` where a registry ignored the range.
    at: u64,
    response: Response,
    backoff: Backoff,
    done: bool,
}

impl Client {
    /// Gets a blob; `expected_size` is its descriptor's, where known.
    pub async fn get_blob(
        &self,
        reference: &Reference,
        digest: &Digest,
        expected_size: Option<u64>,
    ) -> Result<BlobStream> {
        let target = self.target(reference)?;
        let (response, at, blob_size) = self.open(&target, digest, 0, None).await?;
        Ok(BlobStream {
            client: self.clone(),
            target,
            hasher: Some(digest.hasher()),
            digest: digest.clone(),
            position: 0,
            end: expected_size,
            is_range: false,
            blob_size,
            at,
            response,
            backoff: self.patience.backoff(),
            done: false,
        })
    }

    /// Gets the bytes `range` of a blob. They are not verified, since a digest covers the whole.
    pub async fn get_blob_range(
        &self,
        reference: &Reference,
        digest: &Digest,
        range: Range<u64>,
    ) -> Result<BlobStream> {
        let target = self.target(reference)?;
        if range.is_empty() {
            return Err(Error::InvalidManifest {
                what: format!("the range {}..{} of blob {digest}", range.start, range.end),
                reason: "it is empty".to_owned(),
            });
        }
        let (response, at, blob_size) = self.open(&target, digest, range.start, Some(range.end)).await?;
        Ok(BlobStream {
            client: self.clone(),
            target,
            hasher: None,
            digest: digest.clone(),
            position: range.start,
            end: Some(range.end),
            is_range: true,
            blob_size,
            at,
            response,
            backoff: self.patience.backoff(),
            done: false,
        })
    }

    /// Asks for a blob from `start` to `end`, or to its own end: the answer, where in the blob its body begins, and
    /// the size of the whole.
    async fn open(
        &self,
        target: &Target,
        digest: &Digest,
        start: u64,
        end: Option<u64>,
    ) -> Result<(Response, u64, Option<u64>)> {
        let url = target.url(&format!("blobs/{digest}"))?;
        let request = || {
            let request = self.inner.http.get(url.clone());
            Ok(match end {
                None if start == 0 => request,
                None => request.header(RANGE, format!("bytes={start}-")),
                Some(end) => request.header(RANGE, format!("bytes={start}-{}", end - 1)),
            })
        };
        let response = self.send(target, Grant::Pull, request).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Err(Error::BlobNotFound {
                repository: target.repository.clone(),
                digest: digest.clone(),
                url: target.name(),
            });
        }
        let response = check(target, response).await?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            let size = response.content_length();
            return Ok((response, 0, size));
        }
        let sent = header(response.headers(), CONTENT_RANGE.as_str()).unwrap_or_default();
        match parse_content_range(&sent) {
            Some((first, last, size))
                if first == start
                    && end.map_or(size.is_none_or(|size| last + 1 == size), |end| last + 1 == end) =>
            {
                Ok((response, start, size))
            }
            _ => {
                let asked = end.map_or(format!("{start}-"), |end| format!("{start}-{}", end - 1));
                Err(Error::InvalidRegistry {
                    what: format!("registry {}", target.name()),
                    reason: format!("asked for bytes {asked} of blob {digest}, it answered `{sent}`"),
                })
            }
        }
    }
}

impl BlobStream {
    /// Size of the whole blob, where the registry told it.
    pub fn blob_size(&self) -> Option<u64> {
        self.blob_size
    }

    /// Whether the registry sends the whole blob although a range was asked for, so that what lies before it is only
    /// dropped on arrival.
    pub fn ignores_range(&self) -> bool {
        self.is_range && self.at < self.position
    }

    /// The next bytes; none once all arrived (and, of a whole blob, the digest is right).
    pub async fn chunk(&mut self) -> Result<Option<Bytes>> {
        loop {
            if self.done || (self.is_range && Some(self.position) == self.end) {
                return Ok(None);
            }
            match self.response.chunk().await {
                Ok(Some(chunk)) => {
                    let Some(chunk) = self.fresh(chunk) else { continue };
                    self.backoff.reset();
                    self.position += chunk.len() as u64;
                    if let Some(expected) = self.end.filter(|end| self.position > *end) {
                        return Err(self.wrong_size(expected));
                    }
                    if let Some(hasher) = &mut self.hasher {
                        hasher.update(&chunk);
                    }
                    return Ok(Some(chunk));
                }
                Ok(None) => return self.finish().map(|()| None),
                Err(source) => {
                    let error = self.target.unreachable(source);
                    self.resume(error).await?;
                }
            }
        }
    }

    /// All of a small blob, verified; an error if it is larger than `max_bytes`.
    pub async fn read(mut self, max_bytes: usize) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            if all.len() + chunk.len() > max_bytes {
                let what = format!("blob {}", self.digest);
                let found = (all.len() + chunk.len()) as u64;
                return Err(Error::SizeMismatch { what, expected: max_bytes as u64, found });
            }
            all.extend_from_slice(&chunk);
        }
        Ok(all)
    }

    /// What of `chunk` lies between the position and the end of the range.
    fn fresh(&mut self, mut chunk: Bytes) -> Option<Bytes> {
        let begin = self.at;
        self.at += chunk.len() as u64;
        let known = usize::try_from(self.position.saturating_sub(begin)).unwrap_or(usize::MAX);
        if known >= chunk.len() {
            return None;
        }
        chunk = chunk.slice(known..);
        if let Some(end) = self.end.filter(|_| self.is_range) {
            chunk.truncate(usize::try_from(end - self.position).unwrap_or(usize::MAX));
        }
        Some(chunk)
    }

    fn finish(&mut self) -> Result<()> {
        if let Some(expected) = self.end.filter(|end| self.position != *end) {
            return Err(self.wrong_size(expected));
        }
        self.done = true;
        if let Some(found) = self.hasher.take().map(Hasher::finish).filter(|found| *found != self.digest) {
            let what = format!("blob {}", self.digest);
            return Err(Error::DigestMismatch { what, expected: self.digest.clone(), found });
        }
        Ok(())
    }

    fn wrong_size(&self, expected: u64) -> Error {
        Error::SizeMismatch { what: format!("blob {}", self.digest), expected, found: self.position }
    }

    /// Opens the rest after a break; `error`, or the next one, where there were enough breaks without progress.
    async fn resume(&mut self, error: Error) -> Result<()> {
        if !self.client.pause(&mut self.backoff, None).await {
            return Err(error);
        }
        let client = self.client.clone();
        // A whole blob of which all arrived has no range to ask for: it is read again, for its end alone.
        let start = if self.end.or(self.blob_size) == Some(self.position) { 0 } else { self.position };
        let end = self.end.filter(|_| self.is_range);
        let (response, at, _) = client.open(&self.target, &self.digest, start, end).await?;
        client.inner.counters.resumed.fetch_add(1, Ordering::Relaxed);
        (self.response, self.at) = (response, at);
        Ok(())
    }
}

/// First and last byte, and the size of the whole where it is told, of `bytes 0-9/100`.
fn parse_content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (digits(first.trim())?, digits(last.trim())?);
    let size = match size.trim() {
        "*" => None,
        size => Some(digits(size)?),
    };
    (first <= last && last < size.unwrap_or(u64::MAX)).then_some((first, last, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_parsed() {
        assert_eq!(parse_content_range("bytes 0-9/100"), Some((0, 9, Some(100))));
        assert_eq!(parse_content_range("bytes 5-5/*"), Some((5, 5, None)));
        for bad in ["", "bytes", "0-9/100", "bytes 9-0/100", "bytes 0-100/100", "bytes */100", "bytes a-b/c"]
        {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn changed_content_ranges() {
        crate::mutations::lines("content-ranges.txt", |text| {
            let Some((first, last, size)) = parse_content_range(text) else { return };
            assert!(first <= last && last < size.unwrap_or(u64::MAX), "{text}");
            // Whoever wrote it meant these numbers.
            let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
            let numbers: Vec<u64> = numbers.map(|part| part.parse().unwrap()).collect();
            let read: Vec<u64> = [first, last].into_iter().chain(size).collect();
            assert_eq!((numbers, text.contains('+')), (read, false), "{text}");
        });
    }
}
