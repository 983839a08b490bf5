//! `GET /v2/<name>/tags/list`: sorted, in pages of `n` after `last`.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::Query;
use axum::http::header::LINK;
use axum::http::{StatusCode, Uri};
use axum::response::{AppendHeaders, IntoResponse as _};
use serde::Deserialize;
use serde_json::json;

use crate::errors::{Answer, Refusal};
use crate::server::App;
use crate::storage::TagOf;

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
    let mut tags = BTreeSet::new();
    for of in [TagOf::Push, TagOf::Upstream] {
        tags.extend(app.storage.tags(of, name).await?);
    }
    if let Some(cache) = &app.cache {
        tags.extend(cache.tags(name).await);
    }
    if tags.is_empty() && !app.storage.has_repository(name).await? {
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
    Ok((AppendHeaders(next), Json(json!({ "name": name, "tags": listed }))).into_response())
}
