//! `GET /v2/<name>/tags/list`: sorted, in pages of `n` after `last`.
//!
//! A cache adds those of its upstreams. While one can't be asked, the answer says so in a warning; an empty one would
//! look like a repository without tags, and is a 503 then.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::Query;
use axum::http::header::{LINK, WARNING};
use axum::http::{StatusCode, Uri};
use axum::response::{AppendHeaders, IntoResponse as _};
use serde::Deserialize;
use serde_json::json;

use crate::errors::{Answer, Refusal};
use crate::server::App;

/// What a client should know where the list may lack something.
const OUT_OF_REACH: &str = "an upstream registry can't be asked; there may be more tags than these";
/// Most tags in one answer: at most 128 bytes each, so the answer stays around 1 MiB.
const TAGS_MAX: usize = 10_000;

#[derive(Deserialize)]
struct Page {
    n: Option<usize>,
    last: Option<String>,
}

pub(crate) async fn list(app: &App, name: &str, uri: &Uri) -> Answer {
    let Query(page) = Query::<Page>::try_from_uri(uri).map_err(|e| {
        Refusal::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", format!("{e}; expected ?n=NUMBER&last=TAG"))
    })?;
    let mut tags: BTreeSet<String> = app.storage.tags(name).await?.into_iter().collect();
    let (mut is_known, mut warning) = (!tags.is_empty(), None);
    if let Some(cache) = &app.cache {
        let listed = cache.tags(name).await?;
        tags.extend(listed.tags.iter().cloned());
        is_known |= listed.is_known;
        match listed.failure {
            Some(failure) if tags.is_empty() => return Err(failure.into()),
            failure => warning = failure.map(|_| (WARNING, format!("299 - \"{OUT_OF_REACH}\""))),
        }
    }
    if !is_known && !app.storage.has_repository(name).await? {
        return Err(Refusal::name_unknown(name));
    }
    let after = page.last.unwrap_or_default();
    let mut rest = tags.into_iter().skip_while(|tag| *tag <= after);
    let limit = page.n.unwrap_or(TAGS_MAX).min(TAGS_MAX);
    let listed: Vec<String> = rest.by_ref().take(limit).collect();
    let next = match (listed.last(), rest.next()) {
        (Some(last), Some(_)) => {
            Some((LINK, format!("</v2/{name}/tags/list?n={limit}&last={last}>; rel=\"next\"")))
        }
        _ => None,
    };
    Ok((AppendHeaders(next), AppendHeaders(warning), Json(json!({ "name": name, "tags": listed })))
        .into_response())
}
