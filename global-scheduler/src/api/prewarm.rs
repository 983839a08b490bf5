//! `/v1/prewarm`: wishes that machines have an image before anything asks for it.

use std::sync::Arc;

use anyplace_api::{ErrorCode, EventSeverity, PrewarmQuery, PrewarmView, Problem};
use anyplace_model::Prewarm;
use anyplace_service::{Failure, Json, Query};
use axum::{extract::State, http::StatusCode};

use crate::{app::App, batch::Batch, views};

/// More wishes than this are a mistake: each is sent to every location.
const MAX_WISHES: usize = 1_000;

/// Wish for an image on machines, or change the wish.
#[utoipa::path(put, path = "/v1/prewarm", tag = "images", request_body = Prewarm,
    responses((status = 200, body = PrewarmView), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn set(
    State(app): State<Arc<App>>,
    Json(wish): Json<Prewarm>,
) -> Result<Json<PrewarmView>, Failure> {
    wish.validate().map_err(|wrong| {
        Problem::new(ErrorCode::InvalidRequest, wrong.message).field(wrong.field).fix(wrong.fix)
    })?;
    let writer = app.writer().await;
    let batch = {
        let world = app.world();
        if let Some(unknown) = wish.locations.iter().find(|name| world.location(name).is_none()) {
            return Err(Problem::new(ErrorCode::InvalidRequest, format!("no location {unknown} has joined"))
                .field("locations")
                .fix("see `anyplace capacity`")
                .into());
        }
        if world.prewarms.len() >= MAX_WISHES && !world.prewarms.contains_key(&wish.image) {
            let text = format!("there are {MAX_WISHES} wishes for warm images already");
            return Err(Problem::new(ErrorCode::LimitExceeded, text)
                .field("image")
                .fix("take one back with `anyplace prewarm rm`; `anyplace prewarm ls` lists them")
                .into());
        }
        let mut batch = Batch::default();
        if world.prewarms.get(&wish.image) != Some(&wish) {
            batch.event(EventSeverity::Normal, format!("image/{}", wish.image), "wished to be warm");
            batch.put_prewarm(wish.image.clone(), Some(wish.clone()))?;
        }
        batch
    };
    writer.commit(batch).await?;
    app.publish();
    Ok(Json(views::prewarm(&app.world(), &wish)))
}

/// All wishes, and how far each is on each machine.
#[utoipa::path(get, path = "/v1/prewarm", tag = "images",
    responses((status = 200, body = Vec<PrewarmView>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Vec<PrewarmView>> {
    Json(views::prewarms(&app.world()).collect())
}

/// Take a wish back. Machines keep the image until they need its room.
#[utoipa::path(delete, path = "/v1/prewarm", tag = "images",
    params(("image" = String, Query, description = "The image's reference")),
    responses((status = 204), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    Query(query): Query<PrewarmQuery>,
) -> Result<StatusCode, Failure> {
    let writer = app.writer().await;
    let batch = {
        let world = app.world();
        if !world.prewarms.contains_key(&query.image) {
            let text = format!("nobody wishes `{}` to be warm", query.image);
            return Err(Problem::new(ErrorCode::NotFound, text).fix("see `anyplace prewarm ls`").into());
        }
        let mut batch = Batch::default();
        batch.event(EventSeverity::Normal, format!("image/{}", query.image), "no longer wished to be warm");
        batch.put_prewarm(query.image, None)?;
        batch
    };
    writer.commit(batch).await?;
    app.publish();
    Ok(StatusCode::NO_CONTENT)
}
