//! `/v1/jobs`.

use std::sync::Arc;

use anyplace_api::{ErrorCode, IDEMPOTENCY_KEY, JobQuery, JobView, LogQuery, Problem};
use anyplace_model::{Explanation, JobName, JobSpec};
use anyplace_service::{Failure, Json, Query};
use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use jiff::Timestamp;

use super::extract::Name;
use crate::{app::App, jobs::unknown_job, views};

/// The longest key that is kept with a job, in bytes: room for a UUID or a hash with a prefix.
const MAX_KEY_BYTES: usize = 128;

/// Submit a job. A name that is taken is refused with `already_exists`.
///
/// A key says that a request is the same as an earlier one: while the job of that key is kept, the same spec is answered
/// with that job, and another spec is refused with `conflict`.
#[utoipa::path(post, path = "/v1/jobs", tag = "jobs", request_body = JobSpec,
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 128 visible ASCII characters, chosen by the client")),
    responses((status = 200, body = JobView), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn submit(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Json(spec): Json<JobSpec>,
) -> Result<Json<JobView>, Failure> {
    Ok(Json(app.submit(spec, idempotency_key(&headers)?).await?))
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let is_key = |key: &&str| {
        (1..=MAX_KEY_BYTES).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic())
    };
    match (value.to_str().ok().filter(is_key), values.next()) {
        (Some(key), None) => Ok(Some(key.into())),
        (_, more) => {
            let found = if more.is_some() { "there is more than one key" } else { "this is no key" };
            Err(Problem::new(ErrorCode::InvalidRequest, found)
                .field("Idempotency-Key")
                .fix(format!("send one of 1 to {MAX_KEY_BYTES} visible ASCII characters"))
                .into())
        }
    }
}

/// All jobs and arrays, oldest first; or the indexes of an array, in their order.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs",
    params(("array" = Option<String>, Query, description = "Its indexes only")),
    responses((status = 200, body = Vec<JobView>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    Query(query): Query<JobQuery>,
) -> Result<Json<Vec<JobView>>, Failure> {
    let Some(array) = query.array else { return Ok(Json(views::jobs(&app.world()))) };
    views::job_indexes(&app.world(), &array).map(Json).ok_or_else(|| {
        Problem::new(ErrorCode::NotFound, format!("there is no array {array}"))
            .field("array")
            .fix("see `anyplace jobs ls`")
            .into()
    })
}

/// One job.
#[utoipa::path(get, path = "/v1/jobs/{name}", tag = "jobs",
    params(("name" = String, Path, description = "The job")),
    responses((status = 200, body = JobView), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn get(
    State(app): State<Arc<App>>,
    Name(name): Name<JobName>,
) -> Result<Json<JobView>, Failure> {
    views::job(&app.world(), &name).map(Json).ok_or_else(|| unknown_job(&name))
}

/// End a job.
#[utoipa::path(post, path = "/v1/jobs/{name}/cancel", tag = "jobs",
    params(("name" = String, Path, description = "The job")),
    responses((status = 200, body = JobView), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn cancel(
    State(app): State<Arc<App>>,
    Name(name): Name<JobName>,
) -> Result<Json<JobView>, Failure> {
    Ok(Json(app.cancel(&name).await?))
}

/// Forget a job that has ended.
#[utoipa::path(delete, path = "/v1/jobs/{name}", tag = "jobs",
    params(("name" = String, Path, description = "The job")),
    responses((status = 204), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    Name(name): Name<JobName>,
) -> Result<StatusCode, Failure> {
    app.delete_job(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Why a job waits, or what became of it.
#[utoipa::path(get, path = "/v1/jobs/{name}/why", tag = "jobs",
    params(("name" = String, Path, description = "The job")),
    responses((status = 200, body = Explanation), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn why(
    State(app): State<Arc<App>>,
    Name(name): Name<JobName>,
) -> Result<Json<Explanation>, Failure> {
    let explanation = views::why_job(&app.world(), &name, Timestamp::now());
    explanation.map(Json).ok_or_else(|| unknown_job(&name))
}

/// Log of a job's last attempt, also after its end.
#[utoipa::path(get, path = "/v1/jobs/{name}/logs", tag = "jobs",
    params(
        ("name" = String, Path, description = "The job"),
        ("instance" = Option<String>, Query, description = "Only this instance"),
        ("follow" = Option<bool>, Query, description = "Keep the stream open and send what comes"),
        ("tail" = Option<u32>, Query, description = "Only the last lines; all that is kept without")
    ),
    responses((status = 200, body = String, content_type = "text/plain"), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn logs(
    State(app): State<Arc<App>>,
    Name(name): Name<JobName>,
    Query(query): Query<LogQuery>,
) -> Result<Response, Failure> {
    super::logs::of_job(&app, &name, &query).await
}
