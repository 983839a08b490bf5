//! What operators ask a registry, under `/v1/`: JSON in, JSON out, errors as everywhere else.
//!
//! | Request | Answer |
//! |---|---|
//! | `POST /v1/gc` `{"dry_run": bool}` | 202, the collection that began ([`GcReport`]); 409 if one runs |
//! | `GET /v1/gc` | [`GcStatus`] |
//! | `POST /v1/scrub` | 202, the scrub that began or goes on ([`ScrubReport`]); 409 if one runs |
//! | `GET /v1/scrub` | [`ScrubStatus`] |
//! | `GET /v1/repositories?n=&last=` | [`RepositoryPage`] |
//! | `GET /v1/tags?repository=` | [`TagView`]s; who may pull from it may ask |
//! | `GET /v1/du?repository=` | [`UsageView`] |
//! | `GET /v1/trash?repository=` | [`TrashView`]s |
//! | `DELETE /v1/trash?repository=` | [`Emptied`]: none of these deletions can be undone any more |
//! | `GET /v1/uploads?repository=` | [`UploadView`]s |
//! | `DELETE /v1/uploads?repository=&idle_s=` | the [`UploadView`]s of those that were dropped |
//! | `POST /v1/undelete` [`Undelete`] | [`Undeleted`] |
//!
//! [`GcReport`]: crate::GcReport
//! [`GcStatus`]: crate::GcStatus
//! [`ScrubReport`]: crate::ScrubReport
//! [`ScrubStatus`]: crate::ScrubStatus

mod repositories;
mod uploads;
mod usage;
mod views;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyplace_images::{check_repository, check_tag};
use anyplace_registry_core::access::Action;
use axum::extract::{Query, Request, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::access::{Need, Who};
use crate::errors::{Answer, Refusal, internal};
use crate::gc::{self, Missing, Named, NotBegun};
use crate::server::App;
pub use views::{
    CachedTag, Emptied, GcRequest, RepositoryPage, RepositoryUsage, RepositoryView, TagView, TrashView,
    Undelete, Undeleted, UploadView, UsageView,
};

/// Longest request.
const BODY_MAX_BYTES: usize = 64 << 10;

/// Which repository a question is about.
#[derive(Deserialize)]
struct About {
    repository: Option<String>,
}

/// Which uploads are to be dropped.
#[derive(Deserialize)]
struct Idle {
    repository: Option<String>,
    idle_s: u64,
}

/// A part of a list.
#[derive(Deserialize)]
struct Page {
    n: Option<usize>,
    last: Option<String>,
}

/// The routes of this module.
pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/gc", get(gc_status).post(gc_start))
        .route("/v1/scrub", get(scrub_status).post(scrub_start))
        .route("/v1/repositories", get(repositories))
        .route("/v1/tags", get(tags))
        .route("/v1/du", get(du))
        .route("/v1/trash", get(trash).delete(empty_trash))
        .route("/v1/uploads", get(uploads).delete(drop_uploads))
        .route("/v1/undelete", post(undelete))
}

async fn gc_start(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        operator(&app, &request)?;
        let GcRequest { dry_run } = body(request).await?;
        let report = app.collector.start(dry_run).await.map_err(|error| match error {
            NotBegun::Busy(_) => Refusal::new(StatusCode::CONFLICT, "DENIED", error.to_string()),
            NotBegun::Storage(error) => error.into(),
            NotBegun::Other(error) => internal("starting a collection", error),
        })?;
        Ok((StatusCode::ACCEPTED, Json(report)).into_response())
    };
    give(answer.await)
}

async fn gc_status(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        operator(&app, &request)?;
        drop(request);
        Ok(Json(app.collector.status().await?).into_response())
    };
    give(answer.await)
}

async fn scrub_start(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        operator(&app, &request)?;
        drop(request);
        let report = app.scrubber.start().await?.ok_or_else(|| {
            let message = "a scrub runs already; see `anyplace registry scrub --status`";
            Refusal::new(StatusCode::CONFLICT, "DENIED", message)
        })?;
        Ok((StatusCode::ACCEPTED, Json(report)).into_response())
    };
    give(answer.await)
}

async fn scrub_status(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        operator(&app, &request)?;
        drop(request);
        Ok(Json(app.scrubber.status().await?).into_response())
    };
    give(answer.await)
}

async fn repositories(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        operator(&app, &request)?;
        let Page { n, last } = query(request.uri())?;
        drop(request);
        let cached = match &app.cache {
            Some(cache) => cache.by_repository().await?,
            None => BTreeMap::new(),
        };
        let page = repositories::page(&app.storage, cached, n, last.as_deref()).await?;
        Ok(Json(page).into_response())
    };
    give(answer.await)
}

async fn tags(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        let repository = required(request.uri())?;
        app.access.authorize(&request, &Need::Repository(repository.clone(), Action::Pull))?;
        drop(request);
        let tags = repositories::tags(&app, &repository).await?;
        if tags.is_empty() && !app.storage.has_repository(&repository).await? {
            return Err(Refusal::name_unknown(&repository));
        }
        Ok(Json(tags).into_response())
    };
    give(answer.await)
}

async fn du(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        operator(&app, &request)?;
        let About { repository } = query(request.uri())?;
        drop(request);
        let mut usage = usage::usage(&app.storage, repository.as_deref()).await?;
        if let Some(cache) = &app.cache {
            usage.cache = Some(cache.usage(repository).await?);
        }
        Ok(Json(usage).into_response())
    };
    give(answer.await)
}

async fn trash(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        operator(&app, &request)?;
        let About { repository } = query(request.uri())?;
        drop(request);
        let trash = repositories::trash(&app.storage, repository.as_deref(), app.collector.window()).await?;
        Ok(Json(trash).into_response())
    };
    give(answer.await)
}

async fn empty_trash(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        let who = operator(&app, &request)?;
        let About { repository } = query(request.uri())?;
        drop(request);
        let names = match repository {
            Some(name) => vec![name],
            None => app.storage.repositories().await?,
        };
        let mut deletions = 0;
        for name in names {
            check(&name)?;
            let emptied = gc::empty(&app.storage, &name).await?;
            if emptied > 0 {
                app.access.record(&who, "empty-trash", &name, None, None);
            }
            deletions += emptied;
        }
        Ok(Json(Emptied { deletions }).into_response())
    };
    give(answer.await)
}

async fn uploads(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        operator(&app, &request)?;
        let About { repository } = query(request.uri())?;
        drop(request);
        let mut found = app.uploads.unfinished().await?;
        found.retain(|upload| repository.as_ref().is_none_or(|wanted| *wanted == upload.repository));
        Ok(Json(uploads::views(found)).into_response())
    };
    give(answer.await)
}

async fn drop_uploads(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        let who = operator(&app, &request)?;
        let Idle { repository, idle_s } = query(request.uri())?;
        drop(request);
        let dropped = app.uploads.drop_idle(repository.as_deref(), Duration::from_secs(idle_s)).await?;
        for upload in &dropped {
            app.access.record(&who, "drop-upload", &upload.repository, Some(&upload.id), None);
            app.access.quota(&upload.repository).give_back(upload.bytes);
        }
        Ok(Json(uploads::views(dropped)).into_response())
    };
    give(answer.await)
}

async fn undelete(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async move {
        let who = operator(&app, &request)?;
        let Undelete { repository, tag, digest } = body(request).await?;
        check(&repository)?;
        let invalid = |message: String| Refusal::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", message);
        let named = match (&tag, &digest) {
            (Some(tag), None) => {
                check_tag(tag).map_err(invalid)?;
                Named::Tag(tag)
            }
            (None, Some(digest)) => Named::Manifest(digest),
            _ => return Err(invalid("expected either `tag` or `digest`".to_owned())),
        };
        let digest = gc::undelete(&app.storage, &repository, named).await.map_err(|error| match error {
            Missing::Storage(error) => error.into(),
            Missing::TagTaken { .. } => Refusal::new(StatusCode::CONFLICT, "DENIED", error.to_string()),
            Missing::NotInTrash { .. } | Missing::Gone { .. } => {
                Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", error.to_string())
            }
        })?;
        let reference = tag.as_deref().unwrap_or(digest.as_str());
        app.access.record(&who, "undelete", &repository, Some(reference), Some(digest.as_str()));
        Ok(Json(Undeleted { repository, tag, digest }).into_response())
    };
    give(answer.await)
}

fn give(answer: Answer) -> Response {
    answer.unwrap_or_else(|refusal| refusal.into_response())
}

fn operator(app: &App, request: &Request) -> Answer<Who> {
    app.access.authorize(request, &Need::Operator)
}

fn required(uri: &Uri) -> Answer<String> {
    let About { repository } = query(uri)?;
    let repository = repository
        .ok_or_else(|| Refusal::new(StatusCode::BAD_REQUEST, "NAME_INVALID", "expected ?repository=NAME"))?;
    check(&repository)?;
    Ok(repository)
}

fn check(repository: &str) -> Answer<()> {
    let invalid = |reason| Refusal::new(StatusCode::BAD_REQUEST, "NAME_INVALID", reason);
    check_repository(repository).map_err(invalid)
}

fn query<T: DeserializeOwned>(uri: &Uri) -> Answer<T> {
    let invalid = |e: axum::extract::rejection::QueryRejection| {
        Refusal::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", e.to_string())
    };
    Query::<T>::try_from_uri(uri).map(|Query(query)| query).map_err(invalid)
}

async fn body<T: DeserializeOwned>(request: Request) -> Answer<T> {
    let invalid = |message: String| Refusal::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", message);
    let bytes = axum::body::to_bytes(request.into_body(), BODY_MAX_BYTES).await;
    let bytes =
        bytes.map_err(|_| invalid(format!("the request is incomplete or over {BODY_MAX_BYTES} bytes")))?;
    serde_json::from_slice(&bytes).map_err(|e| invalid(format!("the request can't be understood: {e}")))
}
