//! HTTP serving: one way from an error to a response, from a body to a value, and from a listener to its end.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context as _;
use anyplace_api::{ClientError, ErrorCode, Problem};
use axum::{
    Router,
    body::Body,
    extract::{FromRequest, FromRequestParts, Request},
    http::{HeaderValue, StatusCode, header::CONTENT_TYPE, request::Parts},
    response::{IntoResponse, Response},
    serve::ListenerExt as _,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Open requests get so long to end after the shutdown began; watches end at once.
const DRAIN: Duration = Duration::from_secs(2);

/// The error of every handler: a problem, sent as `application/problem+json`.
#[derive(Debug)]
pub struct Failure(pub Problem);

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl From<ClientError> for Failure {
    /// For a handler that asks another server: its refusal is passed on, its silence is `unavailable`.
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(problem) => Self(problem),
            error => Self(Problem::new(ErrorCode::Unavailable, error.to_string())),
        }
    }
}

impl From<anyhow::Error> for Failure {
    /// For faults that no client can mend: logged in full, told in short.
    fn from(error: anyhow::Error) -> Self {
        tracing::error!(error = format!("{error:#}"), "request failed");
        Self(Problem::new(ErrorCode::Internal, format!("{error:#}")).fix("see the server's log"))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self.0)).into_response();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        response
    }
}

/// A JSON body, refused with a problem that names the field.
#[derive(Debug)]
pub struct Json<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        match axum::Json::<T>::from_request(request, state).await {
            Ok(axum::Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(Problem::new(ErrorCode::InvalidRequest, rejection.body_text())
                .fix("see /openapi.json for the fields")
                .into()),
        }
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

/// Query parameters, refused with a problem.
#[derive(Debug)]
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        match axum::extract::Query::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(Problem::new(ErrorCode::InvalidRequest, rejection.body_text())
                .fix("see /openapi.json for the parameters")
                .into()),
        }
    }
}

/// Handler of `GET /healthz`.
pub async fn healthz() -> &'static str {
    "ok\n"
}

/// Handler of paths that don't exist.
pub async fn not_found(request: Request) -> Failure {
    Problem::new(ErrorCode::NotFound, format!("there is no {} {}", request.method(), request.uri().path()))
        .fix("see /openapi.json for the paths")
        .into()
}

/// Passes a stream of text (a log) from another server on.
pub fn text_stream<E: Into<axum::BoxError> + 'static>(
    stream: impl futures_util::Stream<Item = Result<bytes::Bytes, E>> + Send + 'static,
) -> Response {
    ([(CONTENT_TYPE, "text/plain; charset=utf-8")], Body::from_stream(stream)).into_response()
}

/// Serves until the shutdown, then gives open requests a moment to end.
///
/// # Errors
/// The address can't be listened on, or the server fails.
pub async fn serve(listen: SocketAddr, router: Router, shutdown: CancellationToken) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| {
        format!("can't listen on {listen}; check `listen` in the configuration, and that nothing else listens there")
    })?;
    tracing::info!(address = %listener.local_addr()?, "listening");
    // A watch's last small packet must not wait until the one before is acknowledged: that takes up to 40 ms.
    let listener = listener.tap_io(|stream| {
        // Refused only where the connection is gone already.
        let _ = stream.set_nodelay(true);
    });
    let server = axum::serve(listener, router).with_graceful_shutdown(shutdown.clone().cancelled_owned());
    let deadline = async {
        shutdown.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        result = server => result.context("the HTTP server failed"),
        () = deadline => Ok(()),
    }
}
