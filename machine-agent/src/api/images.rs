//! The machine's images, for `anyplace image`.
//!
//! | Method and path | Answer |
//! |---|---|
//! | `GET /v1/images` | array of `StoredImage` |
//! | `GET /v1/images/du` | array of `Usage` |
//! | `GET /v1/images/inspect?image=` | `Inspected` |
//! | `GET /v1/images/diff?first=&second=` | `Diff` |
//! | `DELETE /v1/images?image=` | bytes that it freed |
//! | `GET /v1/images/scrub` | `Scrub`: how far everything was read again in the background, and what was damaged |
//! | `POST /v1/images/verify` | `Verified`; takes as long as reading everything does |

use std::sync::Arc;

use anyplace_api::{ErrorCode, Problem};
use anyplace_images::{Diff, Error, Inspected, Reference, Scrub, Store, StoredImage, Usage, Verified};
use anyplace_service::{Failure, Json, Query};
use axum::{Router, extract::State, http::HeaderMap, routing::get, routing::post};
use serde::Deserialize;

use super::Api;

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/images", get(list).delete(remove))
        .route("/v1/images/du", get(du))
        .route("/v1/images/inspect", get(inspect))
        .route("/v1/images/diff", get(diff))
        .route("/v1/images/scrub", get(scrub))
        .route("/v1/images/verify", post(verify))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct One {
    image: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Two {
    first: String,
    second: String,
}

/// Asks the store, which blocks, in a thread of its own.
async fn ask<T: Send + 'static>(
    api: &Api,
    headers: &HeaderMap,
    question: impl FnOnce(&Store) -> anyplace_images::Result<T> + Send + 'static,
) -> Result<Json<T>, Failure> {
    api.authenticate(headers)?;
    let store = api.store.clone();
    let answer = tokio::task::spawn_blocking(move || question(&store)).await;
    match answer.map_err(|error| anyhow::anyhow!("asking the image store panicked: {error}"))? {
        Ok(answer) => Ok(Json(answer)),
        Err(error) => {
            let code = match error {
                Error::NotInStore { .. } => ErrorCode::NotFound,
                Error::ImageInUse { .. } => ErrorCode::Conflict,
                Error::InvalidReference { .. } | Error::InvalidDigest { .. } => ErrorCode::InvalidRequest,
                _ => ErrorCode::Internal,
            };
            Err(Problem::new(code, error.to_string()).into())
        }
    }
}

async fn list(State(api): State<Arc<Api>>, headers: HeaderMap) -> Result<Json<Vec<StoredImage>>, Failure> {
    ask(&api, &headers, Store::list).await
}

async fn du(State(api): State<Arc<Api>>, headers: HeaderMap) -> Result<Json<Vec<Usage>>, Failure> {
    ask(&api, &headers, Store::du).await
}

async fn inspect(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Query(One { image }): Query<One>,
) -> Result<Json<Inspected>, Failure> {
    ask(&api, &headers, move |store| store.inspect(&image.parse::<Reference>()?)).await
}

async fn diff(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Query(Two { first, second }): Query<Two>,
) -> Result<Json<Diff>, Failure> {
    ask(&api, &headers, move |store| store.diff(&first.parse()?, &second.parse()?)).await
}

async fn remove(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Query(One { image }): Query<One>,
) -> Result<Json<u64>, Failure> {
    ask(&api, &headers, move |store| store.remove(&image.parse()?)).await
}

async fn scrub(State(api): State<Arc<Api>>, headers: HeaderMap) -> Result<Json<Scrub>, Failure> {
    ask(&api, &headers, |store| Ok(store.scrub_state())).await
}

async fn verify(State(api): State<Arc<Api>>, headers: HeaderMap) -> Result<Json<Verified>, Failure> {
    ask(&api, &headers, Store::verify).await
}
