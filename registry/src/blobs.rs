//! Blobs: HEAD, GET with ranges, DELETE.

use std::io::{Seek as _, SeekFrom};
use std::ops::Range;

use anyplace_images::Digest;
use axum::body::Body;
use axum::http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, RANGE};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::IntoResponse as _;
use futures_util::StreamExt as _;
use object_store::{GetResult, GetResultPayload};
use tokio::io::AsyncReadExt as _;
use tokio_util::io::ReaderStream;

use crate::errors::{Answer, Refusal, internal};
use crate::server::App;
use crate::storage::Link;

pub(crate) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// Read size when serving: large enough that system calls don't show, small enough for many readers at once.
const READ_BYTES: usize = 256 << 10;

/// What a `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    All,
    Part(Range<u64>),
    Nothing,
}

pub(crate) async fn head(app: &App, name: &str, digest: &Digest) -> Answer {
    let size = app.storage.blob_size(name, digest).await.map_err(|e| internal("looking for a blob", e))?;
    let size = match (size, &app.cache) {
        (Some(size), _) => size,
        (None, Some(cache)) => {
            // Unreachable counts as absent: a push to this registry asks for its own blobs this way, and must go on.
            cache.blob_size(name, digest).await.ok_or_else(|| Refusal::blob_unknown(name, digest))?
        }
        (None, None) => return Err(Refusal::blob_unknown(name, digest)),
    };
    Ok((headers(digest, size), ()).into_response())
}

pub(crate) async fn get(app: &App, name: &str, digest: &Digest, asked: &HeaderMap) -> Answer {
    let failed = |e| internal("reading a blob", e);
    let size = match app.storage.blob_size(name, digest).await.map_err(failed)? {
        Some(size) => size,
        None => {
            let Some(cache) = &app.cache else { return Err(Refusal::blob_unknown(name, digest)) };
            cache.ensure_blob(name, digest).await?;
            app.storage
                .blob_size(name, digest)
                .await
                .map_err(failed)?
                .ok_or_else(|| Refusal::blob_unknown(name, digest))?
        }
    };
    let range = asked.get(RANGE).and_then(|value| value.to_str().ok());
    let (status, range) = match parse_range(range, size) {
        Asked::All => (StatusCode::OK, None),
        Asked::Part(range) => (StatusCode::PARTIAL_CONTENT, Some(range)),
        Asked::Nothing => {
            let message = format!("the blob has {size} bytes, none of them in the range");
            return Err(Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", message)
                .header(CONTENT_RANGE, format!("bytes */{size}")));
        }
    };
    let length = range.as_ref().map_or(size, |range| range.end - range.start);
    let content_range =
        range.as_ref().map(|r| (CONTENT_RANGE, format!("bytes {}-{}/{size}", r.start, r.end - 1)));
    // An empty range can't be asked for, and an empty blob has nothing to read.
    let body = if size == 0 {
        Body::empty()
    } else {
        body_of(app.storage.open_content(digest, range).await.map_err(failed)?)?
    };
    let content_range = axum::response::AppendHeaders(content_range);
    Ok((status, headers(digest, length), content_range, body).into_response())
}

pub(crate) async fn delete(app: &App, name: &str, digest: &Digest) -> Answer {
    let removed =
        app.storage.unlink(Link::Blob, name, digest).await.map_err(|e| internal("deleting a blob", e))?;
    if removed { Ok(StatusCode::ACCEPTED.into_response()) } else { Err(Refusal::blob_unknown(name, digest)) }
}

fn headers(digest: &Digest, length: u64) -> [(HeaderName, String); 5] {
    [
        (CONTENT_TYPE, "application/octet-stream".to_owned()),
        (CONTENT_LENGTH, length.to_string()),
        (ACCEPT_RANGES, "bytes".to_owned()),
        (ETAG, format!("\"{digest}\"")),
        (CONTENT_DIGEST, digest.to_string()),
    ]
}

/// Streams an object. A local file is read in larger pieces than the object store's own stream has.
fn body_of(object: GetResult) -> Answer<Body> {
    let range = object.range.clone();
    match object.payload {
        GetResultPayload::File(mut file, _) => {
            file.seek(SeekFrom::Start(range.start)).map_err(|e| internal("reading a blob", e))?;
            let mut file = tokio::fs::File::from_std(file);
            file.set_max_buf_size(READ_BYTES);
            let part = file.take(range.end - range.start);
            Ok(Body::from_stream(ReaderStream::with_capacity(part, READ_BYTES)))
        }
        GetResultPayload::Stream(stream) => Ok(Body::from_stream(stream.boxed())),
    }
}

/// One range of bytes; anything else that a client may send is answered in full, as HTTP allows.
fn parse_range(header: Option<&str>, size: u64) -> Asked {
    let Some(spec) = header.and_then(|header| header.strip_prefix("bytes=")) else { return Asked::All };
    let Some((first, last)) = spec.split_once('-') else { return Asked::All };
    let (first, last) = (first.trim(), last.trim());
    if first.is_empty() {
        return match last.parse::<u64>() {
            Ok(0) => Asked::Nothing,
            Ok(_) if size == 0 => Asked::Nothing,
            Ok(count) => Asked::Part(size.saturating_sub(count)..size),
            Err(_) => Asked::All,
        };
    }
    let Ok(first) = first.parse::<u64>() else { return Asked::All };
    let last = match last {
        "" => u64::MAX,
        text => match text.parse::<u64>() {
            Ok(last) if last >= first => last,
            _ => return Asked::All,
        },
    };
    if first >= size {
        return Asked::Nothing;
    }
    Asked::Part(first..last.saturating_add(1).min(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (header, size, expected) in [
            (None, 10, Asked::All),
            (Some("bytes=0-3"), 10, Asked::Part(0..4)),
            (Some("bytes=4-"), 10, Asked::Part(4..10)),
            (Some("bytes=4-100"), 10, Asked::Part(4..10)),
            (Some("bytes=-3"), 10, Asked::Part(7..10)),
            (Some("bytes=-30"), 10, Asked::Part(0..10)),
            (Some("bytes=9-9"), 10, Asked::Part(9..10)),
            (Some("bytes=0-18446744073709551615"), 10, Asked::Part(0..10)),
            (Some("bytes=10-"), 10, Asked::Nothing),
            (Some("bytes=-0"), 10, Asked::Nothing),
            (Some("bytes=0-"), 0, Asked::Nothing),
            (Some("bytes=5-4"), 10, Asked::All),
            (Some("bytes=0-1,3-4"), 10, Asked::All),
            (Some("bytes=x-"), 10, Asked::All),
            (Some("lines=0-1"), 10, Asked::All),
        ] {
            assert_eq!(parse_range(header, size), expected, "{header:?} of {size}");
        }
    }
}
