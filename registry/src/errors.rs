//! Errors as the distribution specification writes them: a status and `{"errors":[{code,message,detail}]}`.

use anyplace_images::Digest;
use axum::Json;
use axum::http::header::{ALLOW, RETRY_AFTER};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::response::{AppendHeaders, IntoResponse, Response};
use serde_json::{Value, json};

/// An answer that refuses.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
    detail: Value,
    /// Few, so a list will do, and keeps results small.
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// Result of an endpoint.
pub(crate) type Answer<T = Response> = Result<T, Refusal>;

impl Refusal {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { status, code, message: message.into(), detail: Value::Null, headers: Vec::new() }
    }

    pub(crate) fn detail(mut self, detail: Value) -> Refusal {
        self.detail = detail;
        self
    }

    pub(crate) fn header(mut self, name: HeaderName, value: impl AsRef<str>) -> Refusal {
        if let Ok(value) = HeaderValue::from_str(value.as_ref()) {
            self.headers.push((name, value));
        }
        self
    }

    pub(crate) fn blob_unknown(repository: &str, digest: &Digest) -> Refusal {
        Refusal::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", format!("no blob {digest} in `{repository}`"))
            .detail(json!({ "digest": digest }))
    }

    pub(crate) fn manifest_unknown(repository: &str, key: &str) -> Refusal {
        let message = format!("no manifest `{key}` in `{repository}`; push it first, or list the tags");
        Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", message).detail(json!({ "reference": key }))
    }

    pub(crate) fn manifest_invalid(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message)
    }

    pub(crate) fn digest_invalid(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", message)
    }

    pub(crate) fn upload_invalid(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", message)
    }

    pub(crate) fn name_unknown(repository: &str) -> Refusal {
        let message = format!("no repository `{repository}`; push to it first");
        Refusal::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", message).detail(json!({ "name": repository }))
    }

    /// A method that isn't there; `allowed` is what is.
    pub(crate) fn unsupported(method: &Method, path: &str, allowed: &'static str) -> Refusal {
        let message = format!("{method} on `{path}` is not supported; expected {allowed}");
        Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message).header(ALLOW, allowed)
    }

    /// What the registry stands on doesn't answer; the same request may succeed in a moment. Clients that give up on
    /// `TOOMANYREQUESTS`, as docker does, try this one again.
    pub(crate) fn unavailable(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", message).header(RETRY_AFTER, "1")
    }

    /// Too much work for now.
    pub(crate) fn busy(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "TOOMANYREQUESTS", message).header(RETRY_AFTER, "1")
    }
}

/// A failure of the disk or of a part: the log gets the details, the client a code to look for.
pub(crate) fn internal(doing: &'static str, error: impl std::fmt::Display) -> Refusal {
    tracing::error!(doing, %error, "a request failed");
    let message = format!("{doing} failed; the registry's log says why");
    Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", message)
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let error = json!({ "code": self.code, "message": self.message, "detail": self.detail });
        (self.status, AppendHeaders(self.headers), Json(json!({ "errors": [error] }))).into_response()
    }
}
