//! The HTTP API: routes, and the OpenAPI document made from them.

mod auth;
mod deployments;
mod extract;
mod images;
mod jobs;
mod locations;
mod logs;
mod platform;
mod prewarm;
mod routes;
mod teams;

use std::sync::Arc;

use anyhow::Context as _;
use anyplace_service::{Failure, healthz, not_found};
use axum::{
    Router,
    extract::Request,
    http::Method,
    middleware::{self, Next},
    response::Response,
};
use utoipa::OpenApi;
use utoipa_axum::{router::OpenApiRouter, routes};

use self::auth::Bearer;
use crate::app::App;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "anyplace",
        description = "Runs containers in many locations and gives each app one address. \
            Errors are problem+json with a stable `code`, the `field`, and the `fix`."
    ),
    modifiers(&Bearer),
    security(("token" = []))
)]
struct Document;

/// All routes under `/v1`, and their description.
pub(crate) fn router() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(deployments::apply, deployments::get, deployments::delete))
        .routes(routes!(deployments::list))
        .routes(routes!(deployments::why))
        .routes(routes!(deployments::logs))
        .routes(routes!(routes::of_deployment))
        .routes(routes!(jobs::submit, jobs::list))
        .routes(routes!(jobs::get, jobs::delete))
        .routes(routes!(jobs::cancel))
        .routes(routes!(jobs::why))
        .routes(routes!(jobs::logs))
        .routes(routes!(teams::list))
        .routes(routes!(teams::get, teams::set))
        .routes(routes!(locations::list))
        .routes(routes!(locations::get, locations::set))
        .routes(routes!(locations::report))
        .routes(routes!(locations::desired))
        .routes(routes!(locations::capacity))
        .routes(routes!(locations::latency))
        .routes(routes!(images::in_use))
        .routes(routes!(prewarm::set, prewarm::list, prewarm::delete))
        .routes(routes!(platform::instances))
        .routes(routes!(platform::events))
        .routes(routes!(platform::export))
        .routes(routes!(platform::create_token))
        .routes(routes!(platform::watch_deployments))
        .routes(routes!(platform::watch_jobs))
}

/// The service: everything under `/v1` needs a token, the rest doesn't.
pub(crate) fn service(app: Arc<App>) -> Router {
    let (v1, document) = router().split_for_parts();
    // The last layer is the outermost: who may not do it, starts nothing.
    let v1 = v1
        .route_layer(middleware::from_fn(to_the_end))
        .route_layer(middleware::from_fn_with_state(app.clone(), auth::authorize));
    let document = axum::Json(document);
    v1.route("/healthz", axum::routing::get(healthz))
        .route("/openapi.json", axum::routing::get(move || async move { document }))
        .fallback(not_found)
        .with_state(app)
}

/// Runs what changes something in a task of its own. A handler ends where it waits when its client goes away; between
/// the store's commit and the change in memory, that would leave the two apart until the next start.
async fn to_the_end(request: Request, next: Next) -> Result<Response, Failure> {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return Ok(next.run(request).await);
    }
    Ok(tokio::spawn(next.run(request)).await.context("a request's handler failed")?)
}
