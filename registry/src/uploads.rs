//! Uploads: in one request, in parts, or by a mount of what is there already.
//!
//! An upload has an offset, up to which all is stored, synced and hashed: from there it goes on, also after a restart. Its
//! id ends in a hash of the repository, so an upload can't be finished in another one. `local` keeps uploads in
//! a folder, `remote` in a bucket, and `session` hides the difference. `steps` copies what the repository has already.

mod local;
mod remote;
mod session;
mod steps;
mod turns;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyplace_images::{Algorithm, Digest, check_repository};
use anyplace_registry_core::access::Action;
use axum::body::Body;
use axum::extract::{Query, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_RANGE, LOCATION, RANGE};
use axum::http::{HeaderMap, HeaderName, StatusCode, Uri};
use axum::response::{AppendHeaders, IntoResponse as _};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use serde::Deserialize;

use crate::access::Who;
use crate::access::limits::Taken;
use crate::blobs::CONTENT_DIGEST;
use crate::conditions::number;
use crate::errors::{Answer, Refusal};
use crate::routes::parse_digest;
use crate::server::App;
use crate::storage::Linked;
pub(crate) use local::sweep as sweep_folder;
#[cfg(test)]
pub(crate) use remote::Sizes;
pub(crate) use session::{Session, Unfinished, Uploads};
#[cfg(test)]
pub(crate) use steps::{Plan, Step};

const UPLOAD_ID: HeaderName = HeaderName::from_static("docker-upload-uuid");
const CHUNK_MAX: HeaderName = HeaderName::from_static("oci-chunk-max-length");
const CHUNK_MIN: HeaderName = HeaderName::from_static("oci-chunk-min-length");
/// The longest that a part of a chunked upload may ever be, as proxies commonly stop there. A request without
/// `Content-Range` is not a part: docker and podman stream whole layers that way, of any length.
pub(crate) const CHUNK_MAX_BYTES: u64 = 500_000_000;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Start {
    digest: Option<String>,
    mount: Option<String>,
    from: Option<String>,
    digest_algorithm: Option<String>,
}

#[derive(Deserialize)]
struct Finish {
    digest: Option<String>,
}

pub(crate) async fn post(app: &Arc<App>, name: &str, request: Request) -> Answer {
    let query = Query::<Start>::try_from_uri(request.uri());
    let Query(start) = query.map_err(|e| Refusal::upload_invalid(e.to_string()))?;
    let digest = start.digest.as_deref().map(parse_digest).transpose()?;
    let algorithm = match (&start.digest_algorithm, &digest) {
        (Some(text), _) => text.parse().map_err(|_| {
            let message = format!("digest-algorithm `{text}`: expected sha256 or sha512");
            Refusal::digest_invalid(message)
        })?,
        (None, Some(digest)) => digest.kind(),
        (None, None) => Algorithm::default(),
    };
    if let Some(mount) = &start.mount {
        let mount = parse_digest(mount)?;
        if may_mount(&request, start.from.as_deref())
            && try_mount(app, name, &mount, start.from.as_deref()).await?
        {
            return Ok(created(name, &mount));
        }
    }
    let Some(digest) = digest else {
        let takes_steps = steps::announced(&request, name);
        let id = app.uploads.start(name, algorithm).await?;
        let headers = [
            (LOCATION, location(name, &id)),
            (RANGE, "0-0".to_owned()),
            (UPLOAD_ID, id.clone()),
            (CHUNK_MIN, app.uploads.part_min_bytes().to_string()),
            (CHUNK_MAX, app.chunk_max_bytes.to_string()),
        ];
        return Ok((StatusCode::ACCEPTED, headers, AppendHeaders(takes_steps)).into_response());
    };
    // Nobody knows an id to go on with, so nothing is kept of it if it breaks off.
    let session = app.uploads.start_whole(digest.kind()).await?;
    let declared = length(request.headers())?;
    let mut taken = app.access.quota(name);
    let had = taken.counts() && app.storage.link(name, &digest).await?.is_some();
    let session = append(app, &mut taken, session, plain(request.into_body()), declared).await?;
    app.uploads.finish(session, name, &digest).await?;
    if !had {
        taken.keep();
    }
    Ok(created(name, &digest))
}

pub(crate) async fn status(app: &Arc<App>, name: &str, id: &str, request: Request) -> Answer {
    let takes_steps = steps::announced(&request, name);
    let session = app.uploads.resume(name, id).await?;
    let at = progress(name, id, session.size());
    Ok((StatusCode::NO_CONTENT, at, AppendHeaders(takes_steps)).into_response())
}

pub(crate) async fn patch(app: &Arc<App>, name: &str, id: &str, request: Request) -> Answer {
    let session = if steps::are_in(&request) {
        steps::take(app, name, id, request).await?
    } else {
        take_part(app, name, id, request).await?
    };
    Ok((StatusCode::ACCEPTED, progress(name, id, session.size())).into_response())
}

pub(crate) async fn put(app: &Arc<App>, name: &str, id: &str, request: Request) -> Answer {
    let query = Query::<Finish>::try_from_uri(request.uri());
    let Query(Finish { digest }) = query.map_err(|e| Refusal::upload_invalid(e.to_string()))?;
    let digest = digest.ok_or_else(|| Refusal::digest_invalid("expected ?digest=sha256:..."))?;
    let digest = parse_digest(&digest)?;
    let session = take_part(app, name, id, request).await?;
    finish(app, name, session, &digest).await?;
    Ok(created(name, &digest))
}

pub(crate) async fn cancel(app: &Arc<App>, name: &str, id: &str) -> Answer {
    let session = app.uploads.resume(name, id).await?;
    let size = session.size();
    app.uploads.discard(session).await;
    app.access.quota(name).give_back(size);
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Appends a request's body to an upload, if its range says that it belongs there.
async fn take_part(app: &Arc<App>, name: &str, id: &str, request: Request) -> Answer<Session> {
    let (head, body) = request.into_parts();
    let session = app.uploads.resume(name, id).await?;
    let declared = check_range(app, name, id, &session, &head.headers, length(&head.headers)?)?;
    // Also what comes before the body breaks off.
    let mut taken = app.access.quota(name);
    taken.keep();
    append(app, &mut taken, session, plain(body), declared).await
}

/// A body that is the content itself.
fn plain(body: Body) -> impl Stream<Item = Answer<Bytes>> {
    body.into_data_stream().map(|chunk| chunk.map_err(broken_off))
}

fn broken_off(error: axum::Error) -> Refusal {
    Refusal::upload_invalid(format!("the content broke off: {error}"))
}

/// The repository that a request to begin an upload would rather mount a blob from.
pub(crate) fn mount_source(uri: &Uri) -> Option<String> {
    let Query(start) = Query::<Start>::try_from_uri(uri).ok()?;
    start.mount.and(start.from).filter(|from| check_repository(from).is_ok())
}

/// Whether the sender may read where the blob is; otherwise they upload it, as if it weren't there.
fn may_mount(request: &Request, from: Option<&str>) -> bool {
    let who = request.extensions().get::<Who>();
    who.is_some_and(|who| match from {
        Some(from) => who.may(from, Action::Pull),
        None => who.may_pull_all(),
    })
}

async fn try_mount(app: &App, name: &str, digest: &Digest, from: Option<&str>) -> Answer<bool> {
    let there = match from {
        Some(from) => app.storage.link(from, digest).await?.is_some(),
        None => app.storage.has_content(digest).await?,
    };
    if !there {
        return Ok(false);
    }
    let mut taken = app.access.quota(name);
    let shared = from.is_some_and(|from| app.access.have_one_owner(from, name));
    if taken.counts() && !shared && app.storage.link(name, digest).await?.is_none() {
        taken.take(app.storage.content_size(digest).await?.unwrap_or(0))?;
    }
    // If it was collected a moment ago, the client uploads it, and the link is there for that.
    let mounted = app.storage.put_link(name, digest).await? != Linked::Gone;
    if mounted {
        taken.keep();
    }
    Ok(mounted)
}

/// Appends content, as far as the quota of the repository's team goes: not every client says beforehand how much it is.
async fn append(
    app: &App,
    taken: &mut Taken<'_>,
    session: Session,
    content: impl Stream<Item = Answer<Bytes>>,
    declared: Option<u64>,
) -> Answer<Session> {
    taken.fits(declared.unwrap_or(0))?;
    let mut refused = None;
    let bounded = content.map(|chunk| {
        let within = chunk.and_then(|chunk| taken.take(chunk.len() as u64).map(|()| chunk));
        within.map_err(|refusal| {
            refused = Some(refusal);
            "the request is refused"
        })
    });
    let appended = app.uploads.append(session, bounded, declared).await;
    match refused {
        Some(refusal) => Err(refusal),
        None => appended,
    }
}

/// Verifies an upload, makes it content, and links it into the repository. Its bytes were taken from the quota as they
/// came, and are given back where they add nothing.
async fn finish(app: &App, name: &str, session: Session, digest: &Digest) -> Answer<()> {
    let (size, taken) = (session.size(), app.access.quota(name));
    let had = taken.counts() && app.storage.link(name, digest).await?.is_some();
    let finished = app.uploads.finish(session, name, digest).await;
    if had || finished.is_err() {
        taken.give_back(size);
    }
    finished
}

/// The length that the request declares, by its range or otherwise; a range has to start at the upload's offset.
fn check_range(
    app: &App,
    name: &str,
    id: &str,
    session: &Session,
    headers: &HeaderMap,
    declared: Option<u64>,
) -> Answer<Option<u64>> {
    let Some(range) = headers.get(CONTENT_RANGE) else { return Ok(declared) };
    let parsed = range.to_str().ok().and_then(parse_range);
    let (first, len) = parsed.ok_or_else(|| Refusal::upload_invalid("Content-Range: expected START-END"))?;
    if first != session.size() {
        let message = format!("the upload is at {}, the part starts at {first}", session.size());
        let mut refusal = Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID", message);
        for (header, value) in progress(name, id, session.size()) {
            refusal = refusal.header(header, value);
        }
        return Err(refusal);
    }
    let most = app.chunk_max_bytes;
    if len > most {
        app.counters.parts_refused.fetch_add(1, Ordering::Relaxed);
        let message = format!("the part has {len} bytes; send parts of at most {most}");
        return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message)
            .header(CHUNK_MAX, most.to_string()));
    }
    if declared.is_some_and(|declared| declared != len) {
        let message = format!("Content-Range has {len} bytes, the content {}", declared.unwrap_or(0));
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "SIZE_INVALID", message));
    }
    Ok(Some(len))
}

/// First byte and length of a `Content-Range`. `bytes=` and a total are no part of the specification's form, but some
/// clients write them.
pub(crate) fn parse_range(text: &str) -> Option<(u64, u64)> {
    let text = text.strip_prefix("bytes=").or(text.strip_prefix("bytes ")).unwrap_or(text);
    let (first, last) = text.split_once('/').map_or(text, |(range, _)| range).split_once('-')?;
    let (first, last) = (number(first.trim())?, number(last.trim())?);
    Some((first, last.checked_sub(first)?.checked_add(1)?))
}

fn length(headers: &HeaderMap) -> Answer<Option<u64>> {
    let Some(value) = headers.get(CONTENT_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    length.map(Some).ok_or_else(|| Refusal::new(StatusCode::BAD_REQUEST, "SIZE_INVALID", "Content-Length"))
}

fn location(name: &str, id: &str) -> String {
    format!("/v2/{name}/blobs/uploads/{id}")
}

/// Where an upload is; the last byte's number, which for an empty upload can only be written as 0.
fn progress(name: &str, id: &str, size: u64) -> [(HeaderName, String); 3] {
    [
        (LOCATION, location(name, id)),
        (RANGE, format!("0-{}", size.saturating_sub(1))),
        (UPLOAD_ID, id.to_owned()),
    ]
}

fn created(name: &str, digest: &Digest) -> axum::response::Response {
    let headers = [(LOCATION, format!("/v2/{name}/blobs/{digest}")), (CONTENT_DIGEST, digest.to_string())];
    (StatusCode::CREATED, headers).into_response()
}
