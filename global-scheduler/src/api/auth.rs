//! Who may do what: one table, from method and path to what a token must allow.

use std::sync::Arc;

use anyplace_api::{ErrorCode, Problem, Role, TokenScope};
use anyplace_model::LocationId;
use anyplace_service::{Failure, TokenHash, bearer};
use axum::{
    extract::{FromRequestParts as _, MatchedPath, RawPathParams, Request, State},
    http::{HeaderMap, Method},
    middleware::Next,
    response::Response,
};
use jiff::Timestamp;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};

use crate::app::App;

const CREATE_TOKEN: &str = "ask for a new one: `anyplace token create`";

/// What a request needs.
#[derive(Debug, PartialEq, Eq)]
enum Need {
    /// At least this role.
    Role(Role),
    /// The token of this very location.
    Location,
}

/// What a method on a path needs. Whatever isn't named needs the role that its method implies.
fn need(method: &Method, path: &str) -> Need {
    match (method.as_str(), path) {
        ("PUT", "/v1/locations/{name}/report") | (_, "/v1/watch/locations/{name}/desired") => Need::Location,
        // Specs have secrets in their environment.
        (_, "/v1/export") => Need::Role(Role::Admin),
        ("GET" | "HEAD", _) => Need::Role(Role::Viewer),
        (_, path)
            if ["/v1/deployments", "/v1/jobs", "/v1/prewarm"].iter().any(|own| path.starts_with(own)) =>
        {
            Need::Role(Role::Deployer)
        }
        _ => Need::Role(Role::Admin),
    }
}

/// Lets a request through whose token allows it.
pub(crate) async fn authorize(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    let (mut parts, body) = request.into_parts();
    let (role, scope) = identify(&app, &parts.headers)?;
    let path = parts.extensions.get::<MatchedPath>().map_or("", |path| path.as_str()).to_string();
    match need(&parts.method, &path) {
        Need::Role(needed) if rank(role) >= rank(needed) => {}
        Need::Role(needed) => {
            return Err(forbidden(format!(
                "this needs the role {}, the token has {}",
                word(needed),
                word(role)
            )));
        }
        Need::Location => {
            let params = RawPathParams::from_request_parts(&mut parts, &app).await;
            let name =
                params.iter().flat_map(|it| it.iter()).find(|it| it.0 == "name").map(|it| it.1.to_string());
            let own = scope.location.as_ref().map(LocationId::as_str);
            if role != Role::Admin && (role != Role::Location || own != name.as_deref()) {
                let found = own.map_or("none".into(), |own| format!("location {own}"));
                return Err(forbidden(format!(
                    "this needs a token of location {}, the token is of {found}",
                    name.unwrap_or_default()
                )));
            }
        }
    }
    Ok(next.run(Request::from_parts(parts, body)).await)
}

fn identify(app: &App, headers: &HeaderMap) -> Result<(Role, TokenScope), Failure> {
    let unauthenticated = |text: &str| {
        Problem::new(ErrorCode::Unauthenticated, text)
            .fix("give it with --token-file or the context; the first one is in admin.token of the server's data_dir")
    };
    let token = bearer(headers).ok_or_else(|| unauthenticated("no bearer token was sent"))?;
    let hash = TokenHash::of(token);
    if hash == app.admin {
        return Ok((Role::Admin, TokenScope::default()));
    }
    let world = app.world();
    let record = world
        .tokens
        .get(hash.as_str())
        .ok_or_else(|| unauthenticated("the token is not known to this server"))?;
    if let Some(at) = record.expires_at.filter(|at| *at <= Timestamp::now()) {
        return Err(Problem::new(ErrorCode::TokenExpired, format!("the token expired at {at:.0}"))
            .fix(CREATE_TOKEN)
            .into());
    }
    Ok((record.role, record.scope.clone()))
}

/// Roles that users have, each including those below; a location's token is for its own endpoints only.
const fn rank(role: Role) -> u8 {
    match role {
        Role::Location => 0,
        Role::Viewer => 1,
        Role::Deployer => 2,
        Role::Admin => 3,
    }
}

const fn word(role: Role) -> &'static str {
    match role {
        Role::Location => "location",
        Role::Viewer => "viewer",
        Role::Deployer => "deployer",
        Role::Admin => "admin",
    }
}

fn forbidden(text: String) -> Failure {
    Problem::new(ErrorCode::Forbidden, text)
        .fix("ask an admin for one: `anyplace token create --role ROLE`")
        .into()
}

/// Says in the OpenAPI document how to authenticate.
pub(crate) struct Bearer;

impl utoipa::Modify for Bearer {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        document
            .components
            .get_or_insert_default()
            .add_security_scheme("token", SecurityScheme::Http(scheme));
    }
}
