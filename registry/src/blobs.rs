//! Blobs: HEAD, GET with ranges and conditions, DELETE.

mod mapped;

use anyplace_images::Digest;
use axum::body::Body;
use axum::http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{AppendHeaders, IntoResponse as _};
use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::{GetResult, GetResultPayload};

use crate::conditions::{Asked, asked_range, entity_tag, is_known};
use crate::errors::{Answer, Refusal};
use crate::server::App;
use crate::storage::folder_error;
use crate::upstream::Failure;

pub(crate) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

pub(crate) async fn head(app: &App, name: &str, digest: &Digest, asked: &HeaderMap) -> Answer {
    let size = app.storage.blob_size_renewed(name, digest).await?;
    let size = match (size, &app.cache) {
        (Some(size), _) => size,
        (None, Some(cache)) => {
            // Unreachable counts as absent: a push to this registry asks for its own blobs this way, and must go on.
            let found = cache.blob_size(name, digest).await;
            found.map_err(|_| Refusal::blob_unknown(name, digest))?
        }
        (None, None) => return Err(Refusal::blob_unknown(name, digest)),
    };
    if is_known(asked, digest) {
        return Ok(not_modified(digest));
    }
    Ok((headers(digest, size), ()).into_response())
}

pub(crate) async fn get(app: &App, name: &str, digest: &Digest, asked: &HeaderMap) -> Answer {
    let stored = app.storage.blob_size(name, digest).await?;
    let (size, cache) = match (stored, &app.cache) {
        (Some(size), _) => (size, None),
        (None, Some(cache)) => {
            let found = cache.blob_size(name, digest).await;
            (found.map_err(|failure| refused(name, digest, failure))?, Some(cache))
        }
        (None, None) => return Err(Refusal::blob_unknown(name, digest)),
    };
    if is_known(asked, digest) {
        return Ok(not_modified(digest));
    }
    let (status, range) = match asked_range(asked, digest, size) {
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
    } else if let Some(cache) = cache {
        let opened = cache.read(name, digest, range.unwrap_or(0..size)).await;
        Body::from_stream(opened.map_err(|failure| refused(name, digest, failure))?)
    } else {
        body_of(app.storage.open_content(digest, range).await?)
    };
    Ok((status, headers(digest, length), AppendHeaders(content_range), body).into_response())
}

pub(crate) async fn delete(app: &App, name: &str, digest: &Digest) -> Answer {
    // A manifest's content goes with the manifest.
    let manifest = app.storage.manifest_entry(name, digest).await?;
    let removed = manifest.is_none() && app.storage.remove_link(name, digest).await?;
    if removed { Ok(StatusCode::ACCEPTED.into_response()) } else { Err(Refusal::blob_unknown(name, digest)) }
}

fn refused(name: &str, digest: &Digest, failure: Failure) -> Refusal {
    match failure {
        Failure::Absent => Refusal::blob_unknown(name, digest),
        other => other.into(),
    }
}

fn headers(digest: &Digest, length: u64) -> [(HeaderName, String); 5] {
    [
        (CONTENT_TYPE, "application/octet-stream".to_owned()),
        (CONTENT_LENGTH, length.to_string()),
        (ACCEPT_RANGES, "bytes".to_owned()),
        (ETAG, entity_tag(digest)),
        (CONTENT_DIGEST, digest.to_string()),
    ]
}

/// The answer to one who has the content already.
pub(crate) fn not_modified(digest: &Digest) -> axum::response::Response {
    let headers = [(ETAG, entity_tag(digest)), (CONTENT_DIGEST, digest.to_string())];
    (StatusCode::NOT_MODIFIED, headers).into_response()
}

/// Streams an object.
fn body_of(object: GetResult) -> Body {
    let range = object.range.clone();
    match object.payload {
        GetResultPayload::File(file, _) => Body::from_stream(mapped::stream(file, range)),
        GetResultPayload::Stream(stream) => Body::from_stream(stream),
    }
}

/// The bytes of an object, for who looks at them.
pub(crate) fn bytes_of(object: GetResult) -> BoxStream<'static, object_store::Result<Bytes>> {
    let range = object.range.clone();
    match object.payload {
        GetResultPayload::File(file, _) => mapped::read(file, range).map_err(folder_error).boxed(),
        GetResultPayload::Stream(stream) => stream,
    }
}
