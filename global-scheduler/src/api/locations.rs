//! `/v1/locations`, and what location schedulers report and watch.

use std::sync::Arc;

use anyplace_api::{CapacityView, ErrorCode, EventSeverity, LatencyQuery, LatencyView, Problem, WatchQuery};
use anyplace_model::{LocationId, LocationRecord, LocationReport, LocationSettings};
use anyplace_service::{Failure, Json, Query};
use axum::{
    extract::{DefaultBodyLimit, FromRequest as _, Request, State},
    http::StatusCode,
    response::Response,
};
use jiff::Timestamp;

use super::extract::Name;
use crate::{app::App, batch::Batch, latency, views};

/// A report of 1,000 machines with some ten thousand instances is about half of it.
const MAX_REPORT_BYTES: usize = 16 << 20;

/// Machines that an operator may close in a location: as many as it may have.
const MAX_MACHINES: usize = 4_096;

fn unknown_location(name: &LocationId) -> Failure {
    Problem::new(ErrorCode::NotFound, format!("no location {name} has joined"))
        .fix("see `anyplace capacity`")
        .into()
}

/// All locations that have joined.
#[utoipa::path(get, path = "/v1/locations", tag = "locations",
    responses((status = 200, body = Vec<LocationRecord>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Vec<LocationRecord>> {
    Json(views::locations(&app.world()))
}

/// One location.
#[utoipa::path(get, path = "/v1/locations/{name}", tag = "locations",
    params(("name" = String, Path, description = "The location")),
    responses((status = 200, body = LocationRecord), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn get(
    State(app): State<Arc<App>>,
    Name(name): Name<LocationId>,
) -> Result<Json<LocationRecord>, Failure> {
    views::location(&app.world(), &name).map(Json).ok_or_else(|| unknown_location(&name))
}

/// Replace an operator's settings of a location.
#[utoipa::path(patch, path = "/v1/locations/{name}", tag = "locations",
    params(("name" = String, Path, description = "The location")), request_body = LocationSettings,
    responses((status = 200, body = LocationRecord), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn set(
    State(app): State<Arc<App>>,
    Name(name): Name<LocationId>,
    Json(settings): Json<LocationSettings>,
) -> Result<Json<LocationRecord>, Failure> {
    if settings.machines.len() > MAX_MACHINES {
        let text = format!(
            "{} machines; at most {MAX_MACHINES} of a location can be closed",
            settings.machines.len()
        );
        return Err(Problem::new(ErrorCode::InvalidRequest, text)
            .field("machines")
            .fix("drain the location, or forget machines that are gone with `anyplace location undrain`")
            .into());
    }
    let writer = app.writer().await;
    let batch = {
        let world = app.world();
        let location = world.location(&name).ok_or_else(|| unknown_location(&name))?;
        let mut batch = Batch::default();
        if location.settings != settings {
            let off_peak = settings.off_peak.map_or("its own".into(), |window| window.to_string());
            let message = format!(
                "set: withdrawn {}, draining {}, off-peak window {off_peak}, {} machines closed",
                settings.withdrawn,
                settings.draining,
                settings.machines.len()
            );
            batch.event(EventSeverity::Normal, format!("location/{name}"), message);
            batch.put_settings(name.clone(), settings)?;
        }
        batch
    };
    writer.commit(batch).await?;
    app.publish();
    app.wake.notify_one();
    views::location(&app.world(), &name).map(Json).ok_or_else(|| unknown_location(&name))
}

/// Tell what a location has. For location schedulers.
#[utoipa::path(put, path = "/v1/locations/{name}/report", tag = "locations",
    params(("name" = String, Path, description = "The location")), request_body = LocationReport,
    responses((status = 204), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn report(
    State(app): State<Arc<App>>,
    Name(name): Name<LocationId>,
    mut request: Request,
) -> Result<StatusCode, Failure> {
    DefaultBodyLimit::max(MAX_REPORT_BYTES).apply(&mut request);
    let Json(report) = Json::<LocationReport>::from_request(request, &()).await?;
    if report.location != name {
        let text = format!("the path says {name}, the report says {}", report.location);
        return Err(Problem::new(ErrorCode::InvalidRequest, text).field("location").into());
    }
    app.observe(report);
    Ok(StatusCode::NO_CONTENT)
}

/// Watch what a location should have, as NDJSON. For location schedulers.
#[utoipa::path(get, path = "/v1/watch/locations/{name}/desired", tag = "locations",
    params(
        ("name" = String, Path, description = "The location"),
        ("epoch" = Option<u64>, Query, description = "Epoch of `from_revision`"),
        ("from_revision" = Option<u64>, Query, description = "Send what is newer than this"),
        ("patches" = Option<bool>, Query, description = "Send frames, with what differs where that is known")
    ),
    responses((status = 200, body = String, content_type = "application/x-ndjson"), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn desired(
    State(app): State<Arc<App>>,
    Name(name): Name<LocationId>,
    Query(query): Query<WatchQuery>,
) -> Result<Response, Failure> {
    app.wait_until_settled().await?;
    let feed = {
        let mut world = app.world();
        let new = !world.locations.contains_key(&name);
        let feed = world.locations.entry(name).or_default().feed.clone();
        if new {
            crate::publish::all(&app, &world);
        }
        feed
    };
    Ok(feed.response(query, app.shutdown.clone()))
}

/// Round trips between locations: measured by their routers, else estimated by distance.
#[utoipa::path(get, path = "/v1/latency", tag = "locations",
    params(("from" = Option<String>, Query, description = "Only those from this location")),
    responses((status = 200, body = Vec<LatencyView>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn latency(
    State(app): State<Arc<App>>,
    Query(query): Query<LatencyQuery>,
) -> Result<Json<Vec<LatencyView>>, Failure> {
    let world = app.world();
    if let Some(from) = query.from.as_ref().filter(|from| world.location(from).is_none()) {
        return Err(unknown_location(from));
    }
    Ok(Json(latency::views(&world, query.from.as_ref())))
}

/// Capacity by location.
#[utoipa::path(get, path = "/v1/capacity", tag = "locations",
    responses((status = 200, body = Vec<CapacityView>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn capacity(State(app): State<Arc<App>>) -> Json<Vec<CapacityView>> {
    Json(views::capacity(&app.world(), Timestamp::now()))
}
