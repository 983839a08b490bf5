//! Tells the endpoints of the distribution specification apart.
//!
//! Repository names have slashes, so a path is read from its end: the last parts say what is asked for, and all
//! before them is the repository.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyplace_images::{Digest, check_repository};
use anyplace_registry_core::access::Action;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};

use crate::access::Need;
use crate::counters::Kind;
use crate::errors::{Answer, Refusal};
use crate::server::App;
use crate::{blobs, manifests, referrers, tags, unread, uploads};

const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const NAMESPACE: HeaderName = HeaderName::from_static("oci-namespace");

/// What a path asks for.
#[derive(Debug, PartialEq, Eq)]
enum Endpoint<'a> {
    Base,
    Tags { name: String },
    Manifest { name: String, key: &'a str },
    Referrers { name: String, digest: &'a str },
    Blob { name: String, digest: &'a str },
    Uploads { name: String },
    Upload { name: String, id: &'a str },
}

/// Answers every request.
pub(crate) async fn dispatch(State(app): State<Arc<App>>, request: Request) -> Response {
    let (method, uri, begun) = (request.method().clone(), request.uri().clone(), Instant::now());
    let meant = understood_namespace(&app, &request);
    let (request, unread) = unread::watch(request);
    let mut response = match allowed(&app, request).await {
        Ok(response) => response,
        Err(refusal) => {
            if let Some(unread) = unread {
                unread.discard().await;
            }
            refusal.into_response()
        }
    };
    // Old docker clients take nothing else for a registry.
    response.headers_mut().insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    if let Some(namespace) = meant {
        response.headers_mut().insert(NAMESPACE, namespace);
    }
    app.counters.requests.count(kind(uri.path()), &method, response.status(), begun.elapsed());
    tracing::debug!(%method, path = uri.path(), status = response.status().as_u16(), "answered");
    response
}

/// Answers what its sender may ask, and writes down what it changed.
async fn allowed(app: &Arc<App>, mut request: Request) -> Answer {
    let path = decode(request.uri().path());
    let method = request.method().clone();
    let endpoint = endpoint(app, &request, &path);
    let who = app.access.authorize(&request, &need(endpoint.as_ref(), &method, request.uri()))?;
    let reads = method == Method::GET || method == Method::HEAD;
    if !reads || matches!(endpoint, Some(Endpoint::Upload { .. })) {
        request.extensions_mut().insert(who.clone());
    }
    if reads {
        return answer(app, request).await;
    }
    let response = answer(app, request).await?;
    if response.status().is_success() {
        let digest = response.headers().get(blobs::CONTENT_DIGEST).and_then(|value| value.to_str().ok());
        if let Some((action, name, reference)) = change(endpoint.as_ref(), &method, response.status()) {
            app.access.record(&who, action, name, reference, digest);
            // The tags in the query, which the answer names.
            for tag in response.headers().get_all(manifests::TAG) {
                app.access.record(&who, action, name, tag.to_str().ok(), digest);
            }
        }
    }
    Ok(response)
}

/// What a path asks for, as the metrics have it.
fn kind(path: &str) -> Kind {
    match parse(path) {
        Some(Endpoint::Base) => Kind::Base,
        Some(Endpoint::Manifest { .. }) => Kind::Manifest,
        Some(Endpoint::Blob { .. }) => Kind::Blob,
        Some(Endpoint::Uploads { .. } | Endpoint::Upload { .. }) => Kind::Upload,
        Some(Endpoint::Tags { .. }) => Kind::Tags,
        Some(Endpoint::Referrers { .. }) => Kind::Referrers,
        None => Kind::Other,
    }
}

/// What a request asks for, in the repository that it means.
fn endpoint<'a>(app: &App, request: &Request, path: &'a str) -> Option<Endpoint<'a>> {
    let mut endpoint = parse(path)?;
    if let Some(cache) = &app.cache
        && matches!(*request.method(), Method::GET | Method::HEAD)
        && let Some(namespace) = namespace(request)
        && let Some(name) = endpoint.name()
    {
        *name = cache.name_in(&namespace, name);
    }
    Some(endpoint)
}

/// What a request needs.
fn need(endpoint: Option<&Endpoint<'_>>, method: &Method, uri: &Uri) -> Need {
    let (name, action) = match endpoint {
        None | Some(Endpoint::Base) => return Need::Identity,
        Some(Endpoint::Uploads { name }) => {
            let into = name.clone();
            return match uploads::mount_source(uri) {
                Some(from) => Need::Mount { into, from },
                None => Need::Repository(into, Action::Push),
            };
        }
        Some(Endpoint::Upload { name, .. }) => (name, Action::Push),
        Some(
            Endpoint::Manifest { name, .. }
            | Endpoint::Blob { name, .. }
            | Endpoint::Tags { name }
            | Endpoint::Referrers { name, .. },
        ) => match *method {
            Method::PUT | Method::POST | Method::PATCH => (name, Action::Push),
            Method::DELETE => (name, Action::Delete),
            _ => (name, Action::Pull),
        },
    };
    Need::Repository(name.clone(), action)
}

/// The change that a request made, for the audit record: what, in which repository, of which tag or digest.
fn change<'a>(
    endpoint: Option<&'a Endpoint<'_>>,
    method: &Method,
    status: StatusCode,
) -> Option<(&'static str, &'a str, Option<&'a str>)> {
    match (endpoint?, method.as_str()) {
        (Endpoint::Manifest { name, key }, "PUT") => Some(("push-manifest", name, Some(key))),
        (Endpoint::Manifest { name, key }, "DELETE") => Some(("delete-manifest", name, Some(key))),
        (Endpoint::Blob { name, digest }, "DELETE") => Some(("delete-blob", name, Some(digest))),
        // An upload that is only begun, or goes on, has changed nothing yet.
        (Endpoint::Uploads { name } | Endpoint::Upload { name, .. }, "POST" | "PUT")
            if status == StatusCode::CREATED =>
        {
            Some(("push-blob", name, None))
        }
        _ => None,
    }
}

async fn answer(app: &Arc<App>, request: Request) -> Answer {
    let path = decode(request.uri().path());
    let endpoint = endpoint(app, &request, &path).ok_or_else(|| {
        Refusal::new(StatusCode::NOT_FOUND, "UNSUPPORTED", format!("no endpoint `{path}`; expected /v2/..."))
    })?;
    // An upload that runs may get its last parts; everything else begins something.
    if app.draining.is_cancelled() && !matches!(endpoint, Endpoint::Upload { .. }) {
        app.counters.draining_refused.fetch_add(1, Ordering::Relaxed);
        return Err(Refusal::busy("this registry is shutting down; ask another, or again soon"));
    }
    let method = request.method().clone();
    if matches!(method, Method::POST | Method::PUT | Method::PATCH) {
        app.storage.check_room().await?;
    }
    let unsupported = |allowed| Err(Refusal::unsupported(&method, &path, allowed));
    match endpoint {
        Endpoint::Base => match method {
            Method::GET | Method::HEAD => Ok(axum::Json(serde_json::json!({})).into_response()),
            _ => unsupported("GET, HEAD"),
        },
        Endpoint::Tags { name } => match method {
            Method::GET | Method::HEAD => tags::list(app, &checked(name)?, request.uri()).await,
            _ => unsupported("GET, HEAD"),
        },
        Endpoint::Manifest { name, key } => {
            let name = checked(name)?;
            match method {
                Method::GET => manifests::get(app, &name, key, request.headers()).await,
                Method::HEAD => manifests::head(app, &name, key, request.headers()).await,
                Method::PUT => manifests::put(app, &name, key, request).await,
                Method::DELETE => manifests::delete(app, &name, key).await,
                _ => unsupported("GET, HEAD, PUT, DELETE"),
            }
        }
        Endpoint::Referrers { name, digest } => {
            let (name, digest) = (checked(name)?, parse_digest(digest)?);
            match method {
                Method::GET | Method::HEAD => referrers::list(app, &name, &digest, request.uri()).await,
                _ => unsupported("GET, HEAD"),
            }
        }
        Endpoint::Blob { name, digest } => {
            let (name, digest) = (checked(name)?, parse_digest(digest)?);
            match method {
                Method::HEAD => blobs::head(app, &name, &digest, request.headers()).await,
                Method::GET => blobs::get(app, &name, &digest, request.headers()).await,
                Method::DELETE => blobs::delete(app, &name, &digest).await,
                _ => unsupported("GET, HEAD, DELETE"),
            }
        }
        Endpoint::Uploads { name } => match method {
            Method::POST => uploads::post(app, &checked(name)?, request).await,
            _ => unsupported("POST"),
        },
        Endpoint::Upload { name, id } => {
            let name = checked(name)?;
            match method {
                Method::GET => uploads::status(app, &name, id, request).await,
                Method::PATCH => uploads::patch(app, &name, id, request).await,
                Method::PUT => uploads::put(app, &name, id, request).await,
                Method::DELETE => uploads::cancel(app, &name, id).await,
                _ => unsupported("GET, PATCH, PUT, DELETE"),
            }
        }
    }
}

impl Endpoint<'_> {
    fn name(&mut self) -> Option<&mut String> {
        match self {
            Endpoint::Base => None,
            Endpoint::Tags { name }
            | Endpoint::Manifest { name, .. }
            | Endpoint::Referrers { name, .. }
            | Endpoint::Blob { name, .. }
            | Endpoint::Uploads { name }
            | Endpoint::Upload { name, .. } => Some(name),
        }
    }
}

/// The registry that a client means who asks this one in its place: containerd says it in `?ns=`, the
/// specification's development version in a header.
fn namespace(request: &Request) -> Option<String> {
    let header = request.headers().get(NAMESPACE).and_then(|value| value.to_str().ok());
    header.map(str::to_owned).or_else(|| {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(request.uri()).ok()?;
        pairs.into_iter().find_map(|(key, value)| (key == "ns").then_some(value))
    })
}

/// The same, if it made a difference: the answer says so.
fn understood_namespace(app: &App, request: &Request) -> Option<HeaderValue> {
    let cache = app.cache.as_ref()?;
    let namespace = namespace(request)?;
    let changed = cache.name_in(&namespace, "name") != "name";
    changed.then(|| HeaderValue::from_str(&namespace).ok()).flatten()
}

pub(crate) fn parse_digest(text: &str) -> Answer<Digest> {
    text.parse().map_err(|e: anyplace_images::Error| Refusal::digest_invalid(e.to_string()))
}

fn checked(name: String) -> Answer<String> {
    match check_repository(&name) {
        Ok(()) => Ok(name),
        Err(reason) => Err(Refusal::new(StatusCode::BAD_REQUEST, "NAME_INVALID", reason)),
    }
}

fn parse(path: &str) -> Option<Endpoint<'_>> {
    let rest = path.strip_prefix("/v2")?;
    if rest.is_empty() || rest == "/" {
        return Some(Endpoint::Base);
    }
    let parts: Vec<&str> = rest.strip_prefix('/')?.split('/').collect();
    let name = |parts: &[&str]| parts.join("/");
    match parts.as_slice() {
        [before @ .., "tags", "list"] => Some(Endpoint::Tags { name: name(before) }),
        [before @ .., "manifests", key] => Some(Endpoint::Manifest { name: name(before), key }),
        [before @ .., "referrers", digest] => Some(Endpoint::Referrers { name: name(before), digest }),
        [before @ .., "blobs", "uploads"] | [before @ .., "blobs", "uploads", ""] => {
            Some(Endpoint::Uploads { name: name(before) })
        }
        [before @ .., "blobs", "uploads", id] => Some(Endpoint::Upload { name: name(before), id }),
        [before @ .., "blobs", digest] => Some(Endpoint::Blob { name: name(before), digest }),
        _ => None,
    }
}

/// Undoes percent encoding; some clients send the colon of a digest that way.
fn decode(path: &str) -> String {
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let hex = path.get(at + 1..at + 3).filter(|_| byte == b'%');
        let value = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        decoded.push(value.unwrap_or(byte));
        at += if value.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_from_their_end() {
        let name = || "a/blobs/b".to_owned();
        for (path, expected) in [
            ("/v2", Endpoint::Base),
            ("/v2/", Endpoint::Base),
            ("/v2/a/blobs/b/tags/list", Endpoint::Tags { name: name() }),
            ("/v2/a/blobs/b/manifests/v1", Endpoint::Manifest { name: name(), key: "v1" }),
            ("/v2/a/blobs/b/referrers/sha256:0", Endpoint::Referrers { name: name(), digest: "sha256:0" }),
            ("/v2/a/blobs/b/blobs/uploads/", Endpoint::Uploads { name: name() }),
            ("/v2/a/blobs/b/blobs/uploads", Endpoint::Uploads { name: name() }),
            ("/v2/a/blobs/b/blobs/uploads/1f", Endpoint::Upload { name: name(), id: "1f" }),
            ("/v2/a/blobs/b/blobs/sha256:0", Endpoint::Blob { name: name(), digest: "sha256:0" }),
        ] {
            assert_eq!(parse(path), Some(expected), "{path}");
        }
        for path in ["/", "/v1/", "/v2/a", "/v2a/manifests/b", "/v2/a/b/c"] {
            assert_eq!(parse(path), None, "{path}");
        }
    }

    #[test]
    fn percent_encoding_is_undone() {
        assert_eq!(decode("/v2/a/blobs/sha256%3Aab"), "/v2/a/blobs/sha256:ab");
        assert_eq!(decode("/%zz%4"), "/%zz%4");
    }
}
