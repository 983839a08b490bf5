//! Manifests: byte-exact, by tag or digest.
//!
//! An image's manifest is taken only when the repository has every blob that it names (in a cache, the missing ones
//! are fetched). The manifests that an index names, and the one that a manifest is about, may be missing: the
//! specification allows sparse indexes, and signatures that arrive first.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyplace_images::manifest::MANIFEST_MAX_BYTES;
use anyplace_images::{Algorithm, Digest, check_tag};
use axum::body::Body;
use axum::extract::{Query, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, LOCATION, WARNING};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{AppendHeaders, IntoResponse as _, Response};
use serde_json::json;

use crate::access::limits::Taken;
use crate::blobs::{CONTENT_DIGEST, not_modified};
use crate::conditions::is_known;
use crate::errors::{Answer, Refusal, internal};
use crate::gc;
use crate::references::{self, Manifest};
use crate::remembered::Described;
use crate::server::App;
use crate::storage::{Error, NewManifest};
use crate::upstream::{Cache, Failure, Resolved};

/// Names the subject that the registry understood, so that the client needn't keep a list of referrers itself.
const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
/// Names each tag that a push by digest gave, besides the one in the path.
pub(crate) const TAG: HeaderName = HeaderName::from_static("oci-tag");
/// What a client should know whose tag may have changed.
const OUT_OF_REACH: &str =
    "the upstream registry can't be asked; this is what the tag meant when it last answered";
/// Most tags that one push may give. The specification asks for 10 at least.
const TAGS_MAX: usize = 100;

pub(crate) async fn get(app: &App, name: &str, key: &str, asked: &HeaderMap) -> Answer {
    let (manifest, warning) = find(app, name, key).await?;
    let mut response = if is_known(asked, &manifest.digest) {
        not_modified(&manifest.digest)
    } else {
        // For HEAD, the server leaves the body out.
        let mut response = Response::new(Body::from(manifest.bytes.clone()));
        let headers = response.headers_mut();
        headers.reserve(8);
        headers.insert(CONTENT_TYPE, manifest.media_type.clone());
        headers.insert(CONTENT_LENGTH, manifest.length.clone());
        headers.insert(ETAG, manifest.entity_tag.clone());
        headers.insert(CONTENT_DIGEST, manifest.content_digest.clone());
        response
    };
    if let Some(text) = warning {
        let value = HeaderValue::try_from(format!("299 - \"{text}\""));
        response.headers_mut().insert(WARNING, value.map_err(|e| internal("warning a client", e))?);
    }
    Ok(response)
}

/// As for GET, for a client that may rely on the manifest and not push it again: as with blobs, what gets old is young
/// again.
pub(crate) async fn head(app: &App, name: &str, key: &str, asked: &HeaderMap) -> Answer {
    if key.contains(':') {
        app.storage.blob_size_renewed(name, &crate::routes::parse_digest(key)?).await?;
    }
    get(app, name, key, asked).await
}

pub(crate) async fn put(app: &App, name: &str, key: &str, request: Request) -> Answer {
    let tags = tags_of(request.uri())?;
    let expected = match key.contains(':') {
        true => Some(crate::routes::parse_digest(key)?),
        false => None,
    };
    let in_path = expected.is_none().then_some(key);
    for tag in in_path.into_iter().chain(tags.iter().map(String::as_str)) {
        check_tag(tag).map_err(Refusal::manifest_invalid)?;
    }
    let sent_type = request.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let bytes = axum::body::to_bytes(request.into_body(), MANIFEST_MAX_BYTES).await.map_err(|_| {
        let message = format!("the manifest is incomplete or larger than {MANIFEST_MAX_BYTES} bytes");
        app.counters.manifests_refused.fetch_add(1, Ordering::Relaxed);
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "MANIFEST_INVALID", message)
    })?;
    let manifest = references::read(sent_type.as_deref(), &bytes).map_err(Refusal::manifest_invalid)?;
    let digest = expected.as_ref().map_or(Algorithm::default(), Digest::kind).digest(&bytes);
    if let Some(expected) = expected.filter(|expected| *expected != digest) {
        let message = format!("the manifest has the digest {digest}, not {expected}");
        return Err(Refusal::digest_invalid(message));
    }
    let mut taken = app.access.quota(name);
    if taken.counts() && app.storage.link(name, &digest).await?.is_none() {
        taken.take(bytes.len() as u64)?;
    }
    if let Some(cache) = &app.cache {
        fetch_blobs(app, cache, name, &manifest, &mut taken).await?;
    }
    let subject = manifest.subject.clone();
    let new = NewManifest::of(manifest, bytes);
    let all_tags: Vec<&str> = in_path.into_iter().chain(tags.iter().map(String::as_str)).collect();
    let missing = app.storage.put_tagged_manifest(name, &digest, new, &all_tags).await?;
    if !missing.is_empty() {
        return Err(blobs_missing(name, &missing));
    }
    taken.keep();
    for tag in all_tags {
        app.remembered.forget(name, tag);
    }
    app.remembered.forget(name, digest.as_str());
    let location = format!("/v2/{name}/manifests/{digest}");
    let mut headers = vec![(LOCATION, location), (CONTENT_DIGEST, digest.to_string())];
    headers.extend(subject.map(|subject| (SUBJECT, subject.to_string())));
    headers.extend(tags.into_iter().map(|tag| (TAG, tag)));
    Ok((StatusCode::CREATED, AppendHeaders(headers)).into_response())
}

pub(crate) async fn delete(app: &App, name: &str, key: &str) -> Answer {
    let unknown = || Refusal::manifest_unknown(name, key);
    if !key.contains(':') {
        check_tag(key).map_err(|_| unknown())?;
        let removed = gc::delete_tag(&app.storage, name, key, app.collector.window()).await?;
        app.remembered.forget(name, key);
        return if removed { Ok(StatusCode::ACCEPTED.into_response()) } else { Err(unknown()) };
    }
    let digest = crate::routes::parse_digest(key)?;
    let removed = gc::delete_manifest(&app.storage, name, &digest, app.collector.window()).await?;
    let removed = removed.ok_or_else(unknown)?;
    for key in removed.iter().map(String::as_str).chain([key]) {
        app.remembered.forget(name, key);
    }
    Ok(StatusCode::ACCEPTED.into_response())
}

/// The tags that a push asks for in its query, each once.
fn tags_of(uri: &axum::http::Uri) -> Answer<Vec<String>> {
    let query = Query::<Vec<(String, String)>>::try_from_uri(uri);
    let Query(pairs) = query.map_err(|e| Refusal::manifest_invalid(e.to_string()))?;
    let mut tags: Vec<String> = Vec::new();
    for (_, tag) in pairs.into_iter().filter(|(key, _)| key == "tag") {
        if !tags.contains(&tag) {
            tags.push(tag);
        }
        if tags.len() > TAGS_MAX {
            let message = format!("more than {TAGS_MAX} tags in one push; push the others after it");
            return Err(Refusal::new(StatusCode::URI_TOO_LONG, "UNSUPPORTED", message));
        }
    }
    Ok(tags)
}

/// What a tag or digest names, and what the client should know besides.
async fn find(app: &App, name: &str, key: &str) -> Answer<(Arc<Described>, Option<&'static str>)> {
    let digest = match key.contains(':') {
        true => Some(crate::routes::parse_digest(key)?),
        false => {
            check_tag(key).map_err(|_| Refusal::manifest_unknown(name, key))?;
            None
        }
    };
    // Taken before anything is read: what is read may be newer than the stamp, and never older.
    let stamp = match &digest {
        Some(digest) => app.storage.manifest_stamp(name, digest),
        None => app.storage.tag_stamp(name, key),
    };
    if let Some(manifest) = app.remembered.get(name, key, stamp) {
        app.counters.manifests_remembered.fetch_add(1, Ordering::Relaxed);
        return Ok((manifest, None));
    }
    app.counters.manifests_read.fetch_add(1, Ordering::Relaxed);
    let Meant { digest, by_upstream, warning } = match digest {
        Some(digest) => Meant { digest, by_upstream: false, warning: None },
        None => resolve(app, name, key).await?,
    };
    let stored = match app.storage.manifest(name, &digest).await {
        // An upstream may have it whole.
        Err(error @ Error::Damaged { .. }) if app.cache.is_some() => {
            tracing::error!(%error, "a manifest is damaged; the upstream is asked");
            None
        }
        stored => stored?,
    };
    let mut manifest = stored.map(|(entry, bytes)| (entry.media_type, bytes));
    if let (None, Some(cache)) = (&manifest, &app.cache) {
        manifest = match cache.manifest(name, &digest).await {
            Ok(found) => Some((found.media_type, found.bytes)),
            Err(Failure::Absent) => None,
            Err(failure) => return Err(failure.into()),
        };
    }
    let (media_type, bytes) = manifest.ok_or_else(|| Refusal::manifest_unknown(name, key))?;
    let described = Described::new(digest, &media_type, bytes);
    let described = Arc::new(described.map_err(|e| internal("reading a manifest", e))?);
    if !by_upstream {
        app.remembered.put(name, key, stamp, described.clone());
    }
    Ok((described, warning))
}

/// What a tag means.
struct Meant {
    digest: Digest,
    by_upstream: bool,
    warning: Option<&'static str>,
}

/// The digest that a tag means: what was pushed here, and else the upstream's answer.
///
/// While the upstream is out of reach, its last answer stands in for it, with a warning.
async fn resolve(app: &App, name: &str, tag: &str) -> Answer<Meant> {
    if let Some(digest) = app.storage.tag(name, tag).await? {
        return Ok(Meant { digest, by_upstream: false, warning: None });
    }
    let Some(cache) = &app.cache else { return Err(Refusal::manifest_unknown(name, tag)) };
    match cache.resolve_tag(name, tag).await {
        Resolved::Found(digest) => Ok(Meant { digest, by_upstream: true, warning: None }),
        Resolved::Stale(digest) => Ok(Meant { digest, by_upstream: true, warning: Some(OUT_OF_REACH) }),
        Resolved::Absent => Err(Refusal::manifest_unknown(name, tag)),
        Resolved::Unreachable(failure) => Err(failure.into()),
    }
}

/// Makes sure of the blobs that only the upstream has; what it doesn't have either shows when the manifest is put.
async fn fetch_blobs(
    app: &App,
    cache: &Cache,
    name: &str,
    manifest: &Manifest,
    taken: &mut Taken<'_>,
) -> Answer<()> {
    for digest in &manifest.blobs {
        if app.storage.blob_size(name, digest).await?.is_some() {
            continue;
        }
        match cache.adopt(app, name, digest).await {
            Ok(_) => taken.take(app.storage.content_size(digest).await?.unwrap_or(0))?,
            Err(refusal) => {
                tracing::debug!(?refusal, %digest, "a blob of a manifest isn't upstream either")
            }
        }
    }
    Ok(())
}

fn blobs_missing(name: &str, missing: &[Digest]) -> Refusal {
    let message = format!("`{name}` has {} of the manifest's blobs not yet; push them first", missing.len());
    let detail = missing.iter().map(|digest| json!({ "digest": digest })).collect();
    Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN", message).detail(detail)
}
