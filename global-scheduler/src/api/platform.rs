//! Instances, events, tokens, and the watches of users.

use std::sync::Arc;

use anyplace_api::{ErrorCode, Event, EventSeverity, NewToken, Problem, Role, TokenRequest, WatchQuery};
use anyplace_service::{Failure, Json, Query, TokenHash, generate_token};
use axum::{
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse as _, Response},
};
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;

use crate::{
    app::App,
    batch::Batch,
    records::TokenRecord,
    views::{self, LocatedInstance},
};

/// Tokens that are kept; each is read at the start.
const MAX_TOKENS: usize = 10_000;

/// Every instance that locations report.
#[utoipa::path(get, path = "/v1/instances", tag = "platform",
    responses((status = 200, body = Vec<LocatedInstance>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn instances(State(app): State<Arc<App>>) -> Json<Vec<LocatedInstance>> {
    Json(views::instances(&app.world()))
}

/// Query of the events.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct EventQuery {
    subject: Option<String>,
}

/// What happened, oldest first; the last thousand events are kept.
#[utoipa::path(get, path = "/v1/events", tag = "platform",
    params(("subject" = Option<String>, Query, description = "Only what happened to this, such as `deployment/hello`")),
    responses((status = 200, body = Vec<Event>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn events(State(app): State<Arc<App>>, Query(query): Query<EventQuery>) -> Json<Vec<Event>> {
    let wanted = |event: &&Event| query.subject.as_ref().is_none_or(|subject| event.subject == *subject);
    Json(app.world().events.iter().map(|(_, event)| event).filter(wanted).cloned().collect())
}

/// Everything stored, as lines of JSON, at one moment; for `anyplace admin import`. It has tokens only as hashes.
#[utoipa::path(get, path = "/v1/export", tag = "platform",
    responses((status = 200, body = String, content_type = "application/x-ndjson"), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn export(State(app): State<Arc<App>>) -> Result<Response, Failure> {
    let file = app.export().await?;
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], file).into_response())
}

/// Make a token. It is shown only here.
#[utoipa::path(post, path = "/v1/tokens", tag = "platform", request_body = TokenRequest,
    responses((status = 200, body = NewToken), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn create_token(
    State(app): State<Arc<App>>,
    Json(request): Json<TokenRequest>,
) -> Result<Json<NewToken>, Failure> {
    let invalid = |field: &str, text: &str, fix: &str| {
        Problem::new(ErrorCode::InvalidRequest, text).field(field).fix(fix)
    };
    let location = request.scope.location.as_ref();
    match (request.role, location) {
        (Role::Location, None) => {
            return Err(invalid(
                "scope.location",
                "a token of the role location is for one location",
                "name it: `anyplace token create --role location --location NAME`",
            )
            .into());
        }
        (Role::Viewer | Role::Deployer | Role::Admin, Some(_)) => {
            return Err(invalid(
                "scope.location",
                "only tokens of the role location are limited to one",
                "leave it out, or ask for the role location",
            )
            .into());
        }
        _ => {}
    }
    let expires_at = request
        .ttl
        .map(|ttl| {
            let ttl = i64::try_from(ttl.0).ok().map(SignedDuration::from_millis);
            ttl.and_then(|ttl| Timestamp::now().checked_add(ttl).ok()).ok_or_else(|| {
                invalid("ttl", "it ends after the end of time", "write a duration such as `720h`")
            })
        })
        .transpose()?;
    let token = generate_token();
    let writer = app.writer().await;
    if app.world().tokens.len() >= MAX_TOKENS {
        let text = format!("{MAX_TOKENS} tokens are kept at most");
        return Err(Problem::new(ErrorCode::LimitExceeded, text)
            .fix("give tokens a --ttl; expired ones are forgotten 30 days later, at the next start")
            .into());
    }
    let mut batch = Batch::default();
    let scope = location.map_or(String::new(), |location| format!(" for location {location}"));
    let role = format!("{:?}", request.role).to_lowercase();
    batch.event(
        EventSeverity::Normal,
        "platform/tokens".into(),
        format!("a token of the role {role}{scope} was made"),
    );
    let record = TokenRecord { role: request.role, scope: request.scope, expires_at };
    batch.put_token(TokenHash::of(&token).as_str().into(), record)?;
    writer.commit(batch).await?;
    Ok(Json(NewToken { token, expires_at }))
}

/// Watch deployments, as NDJSON of `DeploymentView`s by name.
#[utoipa::path(get, path = "/v1/watch/deployments", tag = "deployments",
    params(
        ("epoch" = Option<u64>, Query, description = "Epoch of `from_revision`"),
        ("from_revision" = Option<u64>, Query, description = "Send what is newer than this")
    ),
    responses((status = 200, body = String, content_type = "application/x-ndjson"), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn watch_deployments(
    State(app): State<Arc<App>>,
    Query(query): Query<WatchQuery>,
) -> Response {
    app.deployments.response(query, app.shutdown.clone())
}

/// Watch jobs, as NDJSON of `JobView`s by name.
#[utoipa::path(get, path = "/v1/watch/jobs", tag = "jobs",
    params(
        ("epoch" = Option<u64>, Query, description = "Epoch of `from_revision`"),
        ("from_revision" = Option<u64>, Query, description = "Send what is newer than this")
    ),
    responses((status = 200, body = String, content_type = "application/x-ndjson"), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn watch_jobs(State(app): State<Arc<App>>, Query(query): Query<WatchQuery>) -> Response {
    app.jobs.response(query, app.shutdown.clone())
}
