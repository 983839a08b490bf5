//! Manifests: byte-exact, by tag or digest.
//!
//! A manifest is taken only when the repository has every blob that it names (in a cache, the missing ones are
//! fetched). The manifests that an index names may be missing: sparse indexes are allowed by the specification.

use anyplace_images::manifest::{
    DOCKER_LIST, DOCKER_MANIFEST, MANIFEST_MAX_BYTES, MANIFEST_TYPES, OCI_INDEX, OCI_MANIFEST,
};
use anyplace_images::{Digest, check_tag};
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, LOCATION};
use axum::http::{HeaderName, StatusCode};
use axum::response::IntoResponse as _;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;

use crate::blobs::CONTENT_DIGEST;
use crate::errors::{Answer, Refusal, internal};
use crate::server::App;
use crate::storage::{Link, TagOf};
use crate::upstream::Resolved;

/// Most blobs that one manifest may name: docker's own limit on layers is 127.
const BLOBS_MAX: usize = 1_024;

/// What a manifest names, as far as it has to be here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    schema_version: u32,
    media_type: Option<String>,
    config: Option<Pointer>,
    layers: Option<Vec<Pointer>>,
    manifests: Option<Vec<Pointer>>,
}

#[derive(Deserialize)]
struct Pointer {
    digest: Digest,
    /// Foreign layers lie elsewhere.
    #[serde(default)]
    urls: Vec<String>,
}

pub(crate) async fn get(app: &App, name: &str, key: &str) -> Answer {
    let (digest, media_type, bytes) = find(app, name, key).await?;
    let headers: [(HeaderName, String); 4] = [
        (CONTENT_TYPE, media_type),
        (CONTENT_LENGTH, bytes.len().to_string()),
        (ETAG, format!("\"{digest}\"")),
        (CONTENT_DIGEST, digest.to_string()),
    ];
    // For HEAD, the server leaves the body out.
    Ok((headers, bytes).into_response())
}

pub(crate) async fn put(app: &App, name: &str, key: &str, request: Request) -> Answer {
    let sent_type = request.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let bytes = axum::body::to_bytes(request.into_body(), MANIFEST_MAX_BYTES).await.map_err(|_| {
        let message = format!("the manifest is incomplete or larger than {MANIFEST_MAX_BYTES} bytes");
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "MANIFEST_INVALID", message)
    })?;
    let named: Named = serde_json::from_slice(&bytes)
        .map_err(|e| Refusal::manifest_invalid(format!("the manifest can't be understood: {e}")))?;
    let media_type = check_type(sent_type.as_deref(), &named)?;
    let digest = Digest::of(&bytes);
    let tag = match key.contains(':') {
        true => {
            let expected: Digest = crate::routes::parse_digest(key)?;
            if expected != digest {
                let message = format!("the manifest has the digest {digest}, not {expected}");
                return Err(Refusal::digest_invalid(message));
            }
            None
        }
        false => {
            check_tag(key).map_err(Refusal::manifest_invalid)?;
            Some(key)
        }
    };
    require_blobs(app, name, &named).await?;
    let failed = |e| internal("storing a manifest", e);
    app.storage.put_manifest(name, &digest, &media_type, bytes).await.map_err(failed)?;
    if let Some(tag) = tag {
        app.storage.put_tag(TagOf::Push, name, tag, &digest).await.map_err(failed)?;
    }
    let location = format!("/v2/{name}/manifests/{digest}");
    let headers = [(LOCATION, location), (CONTENT_DIGEST, digest.to_string())];
    Ok((StatusCode::CREATED, headers).into_response())
}

pub(crate) async fn delete(app: &App, name: &str, key: &str) -> Answer {
    let failed = |e| internal("deleting a manifest", e);
    let unknown = || Refusal::manifest_unknown(name, key);
    if !key.contains(':') {
        check_tag(key).map_err(|_| unknown())?;
        let mut removed = false;
        for of in [TagOf::Push, TagOf::Upstream] {
            removed |= app.storage.delete_tag(of, name, key).await.map_err(failed)?;
        }
        return if removed { Ok(StatusCode::ACCEPTED.into_response()) } else { Err(unknown()) };
    }
    let digest = crate::routes::parse_digest(key)?;
    if !app.storage.is_linked(Link::Manifest, name, &digest).await.map_err(failed)? {
        return Err(unknown());
    }
    // Tags first: a tag must not lead nowhere.
    for of in [TagOf::Push, TagOf::Upstream] {
        for tag in app.storage.tags(of, name).await.map_err(failed)? {
            if app.storage.tag(of, name, &tag).await.map_err(failed)?.as_ref() == Some(&digest) {
                app.storage.delete_tag(of, name, &tag).await.map_err(failed)?;
            }
        }
    }
    app.storage.unlink(Link::Manifest, name, &digest).await.map_err(failed)?;
    Ok(StatusCode::ACCEPTED.into_response())
}

/// Digest, media type and bytes of what a tag or digest names.
async fn find(app: &App, name: &str, key: &str) -> Answer<(Digest, String, Bytes)> {
    let digest = match key.contains(':') {
        true => crate::routes::parse_digest(key)?,
        false => resolve(app, name, key).await?,
    };
    let failed = |e| internal("reading a manifest", e);
    let mut manifest = app.storage.manifest(name, &digest).await.map_err(failed)?;
    if let (None, Some(cache)) = (&manifest, &app.cache) {
        cache.ensure_manifest(name, &digest).await?;
        manifest = app.storage.manifest(name, &digest).await.map_err(failed)?;
    }
    let (media_type, bytes) = manifest.ok_or_else(|| Refusal::manifest_unknown(name, key))?;
    Ok((digest, media_type, bytes))
}

/// The digest that a tag means: the upstream's answer first, then what was pushed here.
///
/// While the upstream is out of reach, its last answer stands in for it.
async fn resolve(app: &App, name: &str, tag: &str) -> Answer<Digest> {
    let unknown = || Refusal::manifest_unknown(name, tag);
    check_tag(tag).map_err(|_| unknown())?;
    let failed = |e| internal("reading a tag", e);
    let seen = async |of| app.storage.tag(of, name, tag).await.map_err(failed);
    let Some(cache) = &app.cache else { return seen(TagOf::Push).await?.ok_or_else(unknown) };
    match cache.resolve_tag(name, tag).await {
        Resolved::Found(digest) => {
            // The manifest comes before the tag that leads to it.
            if cache.ensure_manifest(name, &digest).await.is_ok() {
                if seen(TagOf::Upstream).await?.as_ref() != Some(&digest) {
                    app.storage.put_tag(TagOf::Upstream, name, tag, &digest).await.map_err(failed)?;
                }
                return Ok(digest);
            }
            seen(TagOf::Upstream).await?.ok_or_else(unknown)
        }
        Resolved::Absent => {
            app.storage.delete_tag(TagOf::Upstream, name, tag).await.map_err(failed)?;
            seen(TagOf::Push).await?.ok_or_else(unknown)
        }
        Resolved::Unreachable(refusal) => match seen(TagOf::Upstream).await? {
            Some(digest) => Ok(digest),
            None => seen(TagOf::Push).await?.ok_or(refusal),
        },
    }
}

/// The media type to store: the sent one, which must be known and agree with the manifest's own.
fn check_type(sent: Option<&str>, named: &Named) -> Answer<String> {
    let sent = sent.and_then(|t| t.split(';').next()).map(str::trim);
    let own = named.media_type.as_deref();
    if let (Some(sent), Some(own)) = (sent, own)
        && sent != own
    {
        let message = format!("Content-Type is `{sent}`, but the manifest's mediaType is `{own}`");
        return Err(Refusal::manifest_invalid(message));
    }
    let media_type = own.or(sent).unwrap_or(OCI_MANIFEST);
    let complete = match media_type {
        OCI_MANIFEST | DOCKER_MANIFEST => named.config.is_some() && named.layers.is_some(),
        OCI_INDEX | DOCKER_LIST => named.manifests.is_some(),
        other => {
            let message = format!(
                "manifests of type `{other}` are not supported; expected {}",
                MANIFEST_TYPES.join(", ")
            );
            return Err(Refusal::manifest_invalid(message));
        }
    };
    if named.schema_version != 2 || !complete {
        let message = format!(
            "a `{media_type}` needs schemaVersion 2 and {}",
            if named.manifests.is_some() { "manifests" } else { "config and layers" }
        );
        return Err(Refusal::manifest_invalid(message));
    }
    Ok(media_type.to_owned())
}

async fn require_blobs(app: &App, name: &str, named: &Named) -> Answer<()> {
    let layers = named.layers.as_deref().unwrap_or_default();
    if layers.len() > BLOBS_MAX {
        return Err(Refusal::manifest_invalid(format!("more than {BLOBS_MAX} layers")));
    }
    let mut missing = Vec::new();
    for blob in layers.iter().chain(&named.config).filter(|blob| blob.urls.is_empty()) {
        let here =
            app.storage.blob_size(name, &blob.digest).await.map_err(|e| internal("looking for a blob", e))?;
        let here = match (here, &app.cache) {
            (Some(_), _) => true,
            (None, Some(cache)) => cache.ensure_blob(name, &blob.digest).await.is_ok(),
            (None, None) => false,
        };
        if !here {
            missing.push(&blob.digest);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let message = format!("`{name}` has {} of the manifest's blobs not yet; push them first", missing.len());
    let detail = missing.iter().map(|digest| json!({ "digest": digest })).collect();
    Err(Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN", message).detail(detail))
}
