//! `/auth/token`, and for operators `/v1/accounts`, `/v1/teams` and `/v1/audit`.

use std::sync::Arc;

use anyplace_registry_core::access::Scope;
use anyplace_registry_core::pattern::Pattern;
use axum::Json;
use axum::Router;
use axum::extract::{Path, Query, Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, put};
use serde::Deserialize;
use serde_json::json;

use super::accounts::{AccountSpec, Team, TeamView};
use super::audit::Wanted;
use super::{Access, Need, Peer, Who, now_s};
use crate::errors::{Answer, Refusal, internal};
use crate::server::App;

/// Scopes that one token may be asked for.
const SCOPES_MAX: usize = 64;
/// A form that asks for a token.
const FORM_MAX_BYTES: usize = 64 << 10;

/// The routes of this module.
pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/auth/token", get(token).post(token))
        .route("/v1/accounts", get(accounts))
        .route("/v1/accounts/{name}", put(set_account).delete(delete_account))
        .route("/v1/teams", get(teams))
        .route("/v1/teams/{name}", put(set_team).delete(delete_team))
        .route("/v1/audit", get(tail))
}

/// Refuses whoever may not operate the registry.
pub(crate) fn operator(app: &App, request: &Request) -> Answer<Who> {
    app.access.authorize(request, &Need::Operator)
}

fn answer(result: Answer) -> Response {
    result.unwrap_or_else(|refusal| refusal.into_response())
}

async fn token(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(give_token(&app.access, request).await)
}

async fn give_token(access: &Access, request: Request) -> Answer {
    let (who, scopes) = if request.method() == Method::POST {
        let from = Peer::of(request.extensions());
        let bytes = axum::body::to_bytes(request.into_body(), FORM_MAX_BYTES).await;
        let bytes =
            bytes.map_err(|_| bad_request("invalid_request", "the form is too large or broke off"))?;
        let form = pairs(&String::from_utf8_lossy(&bytes));
        let value = |name: &str| form.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        if value("grant_type") != Some("password") {
            return Err(bad_request("unsupported_grant_type", "expected grant_type=password"));
        }
        let (name, secret) = (value("username").unwrap_or_default(), value("password").unwrap_or_default());
        let who = access.login(from, name, secret)?.ok_or_else(|| {
            Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "no account has this name and password")
        })?;
        (who, scopes(&form)?)
    } else {
        let who = access.identify(&request)?;
        // Or who has one could go on for ever, whatever became of the account.
        if who.is_by_token() {
            let message = "a token gets no other token; send the name and password of an account";
            return Err(Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message));
        }
        (who, scopes(&pairs(request.uri().query().unwrap_or_default()))?)
    };
    access.count_request(&who)?;
    let token = access.token(&who, &scopes)?;
    let (ttl, now) = (access.token_ttl().as_secs(), super::moment());
    let body = json!({ "token": token, "access_token": token, "expires_in": ttl, "issued_at": now });
    Ok(Json(body).into_response())
}

fn bad_request(error: &str, message: &str) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", message).detail(json!({ "error": error }))
}

/// Scopes come one for each parameter, or several in one, with spaces between.
fn scopes(pairs: &[(String, String)]) -> Answer<Vec<Scope>> {
    let texts = pairs.iter().filter(|(key, _)| key == "scope").flat_map(|(_, value)| value.split(' '));
    let mut scopes = Vec::new();
    for text in texts.filter(|text| !text.is_empty()) {
        // Other kinds of things, such as `registry:catalog:*`, aren't here and so allow nothing.
        if let Ok(scope) = text.parse() {
            scopes.push(scope);
        }
        if scopes.len() > SCOPES_MAX {
            return Err(bad_request("invalid_scope", "too many scopes; expected at most 64"));
        }
    }
    Ok(scopes)
}

fn pairs(text: &str) -> Vec<(String, String)> {
    form_urlencoded::parse(text.as_bytes()).into_owned().collect()
}

async fn accounts(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(operator(&app, &request).map(|_| Json(app.access.accounts.list()).into_response()))
}

async fn set_account(State(app): State<Arc<App>>, Path(name): Path<String>, request: Request) -> Response {
    let result = async move {
        let who = operator(&app, &request)?;
        let spec: AccountSpec = body(request).await?;
        let view = app.access.accounts.set(&name, spec, now_s()).await?;
        app.access.record(&who, "set-account", &name, None, None);
        Ok(Json(view).into_response())
    };
    answer(result.await)
}

async fn delete_account(State(app): State<Arc<App>>, Path(name): Path<String>, request: Request) -> Response {
    let result = async move {
        let who = operator(&app, &request)?;
        app.access.accounts.delete(&name).await?;
        app.access.record(&who, "delete-account", &name, None, None);
        Ok(StatusCode::NO_CONTENT.into_response())
    };
    answer(result.await)
}

async fn teams(State(app): State<Arc<App>>, request: Request) -> Response {
    let list = |_| {
        let known = app.access.accounts.known();
        let view = |team: &Team| {
            let used = app.access.limits.used(&team.name);
            TeamView {
                name: team.name.clone(),
                repositories: team.repositories.clone(),
                quota_bytes: team.quota_bytes,
                requests_per_s: team.requests_per_s,
                used_bytes: team.quota_bytes.map(|_| used),
            }
        };
        Json(known.teams.values().map(view).collect::<Vec<_>>()).into_response()
    };
    answer(operator(&app, &request).map(list))
}

async fn set_team(State(app): State<Arc<App>>, Path(name): Path<String>, request: Request) -> Response {
    let result = async move {
        let who = operator(&app, &request)?;
        let team = app.access.accounts.set_team(&name, body(request).await?).await?;
        app.access.limits.count(&app.storage, &app.uploads, &app.access.accounts.known()).await?;
        app.access.record(&who, "set-team", &name, None, None);
        Ok(Json(team).into_response())
    };
    answer(result.await)
}

async fn delete_team(State(app): State<Arc<App>>, Path(name): Path<String>, request: Request) -> Response {
    let result = async move {
        let who = operator(&app, &request)?;
        app.access.accounts.delete_team(&name).await?;
        app.access.record(&who, "delete-team", &name, None, None);
        Ok(StatusCode::NO_CONTENT.into_response())
    };
    answer(result.await)
}

#[derive(Deserialize)]
struct Tail {
    #[serde(default = "tail_default")]
    tail: usize,
    since: Option<jiff::Timestamp>,
    repository: Option<Pattern>,
}

fn tail_default() -> usize {
    100
}

async fn tail(State(app): State<Arc<App>>, request: Request) -> Response {
    let result = async move {
        operator(&app, &request)?;
        let Query(Tail { tail, since, repository }) =
            Query::try_from_uri(request.uri()).map_err(|error| {
                let expected = "?tail=NUMBER, &since=TIME (RFC 3339) and &repository=PATTERN";
                Refusal::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", format!("{error}; expected {expected}"))
            })?;
        let wanted = Wanted { since: since.map(super::written), repositories: repository };
        let app = app.clone();
        let events = tokio::task::spawn_blocking(move || app.access.audit.tail(tail, &wanted)).await;
        let events = events.map_err(|error| internal("reading the audit record", error))?;
        let events = events.map_err(|error| internal("reading the audit record", error))?;
        Ok(Json(events).into_response())
    };
    answer(result.await)
}

async fn body<T: serde::de::DeserializeOwned>(request: Request) -> Answer<T> {
    let bytes = axum::body::to_bytes(request.into_body(), FORM_MAX_BYTES).await;
    let invalid = |message: String| Refusal::new(StatusCode::BAD_REQUEST, "INVALID", message);
    let bytes = bytes.map_err(|_| invalid("the body is too large or broke off".to_owned()))?;
    serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))
}
