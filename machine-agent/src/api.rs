//! The agent's own API: instances and their logs, for its location scheduler; images, for `anyplace image`.

mod images;

use std::sync::Arc;

use anyplace_api::{ErrorCode, LogQuery, Problem};
use anyplace_images::Store;
use anyplace_model::{InstanceId, InstanceStatus};
use anyplace_service::{Failure, Json, Query, TokenHash, bearer, healthz, not_found, text_stream};
use axum::{
    Router,
    extract::{Path, State},
    http::HeaderMap,
    response::Response,
    routing::get,
};
use tokio_util::sync::CancellationToken;

use crate::{board::Board, logs, paths::Paths};

/// What the handlers need.
pub(crate) struct Api {
    pub(crate) board: Arc<Board>,
    pub(crate) paths: Paths,
    pub(crate) store: Store,
    pub(crate) token: TokenHash,
    pub(crate) shutdown: CancellationToken,
}

pub(crate) fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/instances", get(instances))
        .route("/v1/instances/{instance}/logs", get(instance_logs))
        .merge(images::routes())
        .route("/healthz", get(healthz))
        .fallback(not_found)
        .with_state(Arc::new(api))
}

impl Api {
    fn authenticate(&self, headers: &HeaderMap) -> Result<(), Failure> {
        match bearer(headers) {
            Some(token) if TokenHash::of(token) == self.token => Ok(()),
            _ => Err(Problem::new(ErrorCode::Unauthenticated, "the machine token is missing or wrong")
                .fix("send `Authorization: Bearer` with the content of the agent's token_file")
                .into()),
        }
    }
}

async fn instances(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
) -> Result<Json<Vec<InstanceStatus>>, Failure> {
    api.authenticate(&headers)?;
    Ok(Json(api.board.facts().instances.into_values().collect()))
}

async fn instance_logs(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Path(instance): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, Failure> {
    api.authenticate(&headers)?;
    // Being an instance's name, it can't lead out of the folder of logs.
    let instance: InstanceId =
        instance.parse().map_err(|error| Problem::new(ErrorCode::InvalidRequest, format!("{error}")))?;
    let path = api.paths.log(instance.as_str());
    if api.board.may_write(&instance).is_none() && !path.exists() {
        let problem =
            Problem::new(ErrorCode::NotFound, format!("there is no log of instance `{instance}` here"));
        return Err(problem.fix("`anyplace get` shows which machine has it").into());
    }
    let follow = {
        let api = api.clone();
        move || {
            query.follow && !api.shutdown.is_cancelled() && api.board.may_write(&instance).unwrap_or(false)
        }
    };
    Ok(text_stream(logs::stream(path, query.tail, follow)))
}
