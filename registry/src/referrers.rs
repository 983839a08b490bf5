//! `GET /v2/<name>/referrers/<digest>`: the manifests that are about another one, such as signatures and SBOMs.
//!
//! The answer is an index, never 404. It ends where it reaches a bound, with a `Link` to the rest: `last` is the
//! digest that the next page goes on after, in the order of digests.
//!
//! A cache adds those that its upstreams list. While one can't be asked, the answer says so in a warning; an empty one
//! would look like an image without signatures, and is a 503 then.

use std::collections::BTreeMap;

use anyplace_images::Digest;
use anyplace_images::manifest::OCI_INDEX;
use axum::extract::Query;
use axum::http::header::{CONTENT_TYPE, LINK, WARNING};
use axum::http::{HeaderName, StatusCode, Uri};
use axum::response::IntoResponse as _;
use futures_util::future::join_all;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::errors::{Answer, Refusal, internal};
use crate::server::App;

const FILTERS: HeaderName = HeaderName::from_static("oci-filters-applied");
/// What a client should know where the list may lack something.
const OUT_OF_REACH: &str = "an upstream registry can't be asked; there may be more referrers than these";
/// Most referrers in one answer.
const PAGE_MAX: usize = 1_000;
/// Clients take indexes of up to 4 MiB; an answer ends when it has so much.
const PAGE_MAX_BYTES: usize = 2 << 20;
/// Manifests that are read at once.
const READS_MAX: usize = 8;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    artifact_type: Option<String>,
    n: Option<usize>,
    last: Option<Digest>,
}

pub(crate) async fn list(app: &App, name: &str, subject: &Digest, uri: &Uri) -> Answer {
    let Query(page) = Query::<Page>::try_from_uri(uri).map_err(|e| {
        let message = format!("{e}; expected ?artifactType=TYPE&n=NUMBER&last=DIGEST");
        Refusal::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", message)
    })?;
    let digests = app.storage.referrers(name, subject).await?;
    let mut found: BTreeMap<Digest, Option<Value>> =
        digests.into_iter().map(|digest| (digest, None)).collect();
    let mut warning = None;
    if let Some(cache) = &app.cache {
        let asked = cache.referrers(name, subject).await?;
        for (digest, descriptor) in &*asked.referrers {
            found.entry(digest.clone()).or_insert_with(|| Some(descriptor.clone()));
        }
        match asked.failure {
            Some(failure) if found.is_empty() => return Err(failure.into()),
            failure => warning = failure.map(|_| OUT_OF_REACH),
        }
    }
    found.retain(|digest, _| page.last.as_ref().is_none_or(|last| digest > last));
    let found: Vec<_> = found.into_iter().collect();
    let limit = page.n.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
    let (mut manifests, mut bytes, mut next) = (Vec::new(), 0, None);
    let mut last = None;
    'pages: for some in found.chunks(READS_MAX) {
        let described = some.iter().map(async |(digest, descriptor)| match descriptor {
            Some(descriptor) => Ok(Some(descriptor.clone())),
            None => describe(app, name, digest).await,
        });
        for (descriptor, (digest, _)) in join_all(described).await.into_iter().zip(some) {
            let Some(descriptor) = descriptor? else { continue };
            let artifact_type = descriptor["artifactType"].as_str();
            if page.artifact_type.is_some() && artifact_type != page.artifact_type.as_deref() {
                continue;
            }
            let size = descriptor.to_string().len();
            if manifests.len() == limit || (bytes + size > PAGE_MAX_BYTES && !manifests.is_empty()) {
                next = last;
                break 'pages;
            }
            bytes += size;
            manifests.push(descriptor);
            last = Some(digest);
        }
    }
    let mut headers = vec![(CONTENT_TYPE, OCI_INDEX.to_owned())];
    headers.extend(warning.map(|text| (WARNING, format!("299 - \"{text}\""))));
    if page.artifact_type.is_some() {
        headers.push((FILTERS, "artifactType".to_owned()));
    }
    if let Some(last) = next {
        let filter = page.artifact_type.map(|text| format!("artifactType={}&", encode(&text)));
        let filter = filter.unwrap_or_default();
        let link = format!("</v2/{name}/referrers/{subject}?{filter}n={limit}&last={last}>; rel=\"next\"");
        headers.push((LINK, link));
    }
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests });
    let mut response = index.to_string().into_response();
    for (name, value) in headers {
        let value = value.parse().map_err(|e| internal("listing referrers", e))?;
        response.headers_mut().insert(name, value);
    }
    Ok(response)
}

/// The descriptor of a referrer; none if it was deleted a moment ago.
async fn describe(app: &App, name: &str, digest: &Digest) -> Answer<Option<Value>> {
    let Some(entry) = app.storage.manifest_entry(name, digest).await? else { return Ok(None) };
    let mut descriptor = json!({ "mediaType": entry.media_type, "digest": digest, "size": entry.size });
    if let Some(artifact_type) = entry.artifact_type {
        descriptor["artifactType"] = artifact_type.into();
    }
    if !entry.annotations.is_empty() {
        descriptor["annotations"] = json!(entry.annotations);
    }
    Ok(Some(descriptor))
}

/// Percent-encodes what has a meaning in a query.
fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                encoded.push(byte.into())
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_encoded_for_a_query() {
        assert_eq!(encode("application/vnd.a+json; b=\"c\""), "application/vnd.a%2Bjson%3B%20b%3D%22c%22");
    }
}
