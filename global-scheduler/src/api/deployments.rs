//! `/v1/deployments`.

use std::sync::Arc;

use anyplace_api::{ApplyOutcome, DeploymentView, ErrorCode, LogQuery, Problem};
use anyplace_model::{DeploymentName, DeploymentSpec, Explanation};
use anyplace_service::{Failure, Json, Query};
use axum::{extract::State, http::StatusCode, response::Response};
use jiff::Timestamp;

use super::extract::Name;
use crate::{app::App, deployments::unknown_deployment, views};

/// Create or change a deployment. An unchanged spec changes nothing.
#[utoipa::path(put, path = "/v1/deployments/{name}", tag = "deployments",
    params(("name" = String, Path, description = "The deployment; the same as in the spec")),
    request_body = DeploymentSpec,
    responses((status = 200, body = ApplyOutcome), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn apply(
    State(app): State<Arc<App>>,
    Name(name): Name<DeploymentName>,
    Json(spec): Json<DeploymentSpec>,
) -> Result<Json<ApplyOutcome>, Failure> {
    if spec.name != name {
        let text = format!("the path says {name}, the spec says {}", spec.name);
        return Err(Problem::new(ErrorCode::InvalidRequest, text)
            .field("name")
            .fix("write the same name in both")
            .into());
    }
    Ok(Json(app.apply(spec).await?))
}

/// All deployments, by name.
#[utoipa::path(get, path = "/v1/deployments", tag = "deployments",
    responses((status = 200, body = Vec<DeploymentView>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Vec<DeploymentView>> {
    Json(views::deployments(&app.world()).collect())
}

/// One deployment.
#[utoipa::path(get, path = "/v1/deployments/{name}", tag = "deployments",
    params(("name" = String, Path, description = "The deployment")),
    responses((status = 200, body = DeploymentView), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn get(
    State(app): State<Arc<App>>,
    Name(name): Name<DeploymentName>,
) -> Result<Json<DeploymentView>, Failure> {
    views::deployment(&app.world(), &name).map(Json).ok_or_else(|| unknown_deployment(&name))
}

/// End a deployment and free its virtual IP.
#[utoipa::path(delete, path = "/v1/deployments/{name}", tag = "deployments",
    params(("name" = String, Path, description = "The deployment")),
    responses((status = 204), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    Name(name): Name<DeploymentName>,
) -> Result<StatusCode, Failure> {
    app.delete_deployment(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Why a deployment is where it is, or isn't.
#[utoipa::path(get, path = "/v1/deployments/{name}/why", tag = "deployments",
    params(("name" = String, Path, description = "The deployment")),
    responses((status = 200, body = Explanation), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn why(
    State(app): State<Arc<App>>,
    Name(name): Name<DeploymentName>,
) -> Result<Json<Explanation>, Failure> {
    let explanation = views::why_deployment(&app.world(), &name, Timestamp::now());
    explanation.map(Json).ok_or_else(|| unknown_deployment(&name))
}

/// Log of a deployment's instances: lines of several begin with the instance's name.
#[utoipa::path(get, path = "/v1/deployments/{name}/logs", tag = "deployments",
    params(
        ("name" = String, Path, description = "The deployment"),
        ("instance" = Option<String>, Query, description = "Only this instance"),
        ("follow" = Option<bool>, Query, description = "Keep the stream open and send what comes"),
        ("tail" = Option<u32>, Query, description = "Only the last lines; all that is kept without")
    ),
    responses((status = 200, body = String, content_type = "text/plain"), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn logs(
    State(app): State<Arc<App>>,
    Name(name): Name<DeploymentName>,
    Query(query): Query<LogQuery>,
) -> Result<Response, Failure> {
    super::logs::of_deployment(&app, &name, &query).await
}
