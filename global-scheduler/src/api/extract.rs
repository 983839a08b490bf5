//! Names in paths, refused with a problem.

use std::{fmt::Display, str::FromStr};

use anyplace_api::{ErrorCode, Problem};
use anyplace_service::Failure;
use axum::{
    extract::{FromRequestParts, Path},
    http::request::Parts,
};

/// The path's `{name}`.
pub(crate) struct Name<T>(pub(crate) T);

impl<S: Send + Sync, T: FromStr<Err: Display>> FromRequestParts<S> for Name<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let invalid = |text: String| Problem::new(ErrorCode::InvalidRequest, text).field("name");
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| invalid(rejection.body_text()).fix("see /openapi.json for the paths"))?;
        let name = text.parse().map_err(|error: T::Err| invalid(error.to_string()))?;
        Ok(Self(name))
    }
}
