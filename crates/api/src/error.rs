//! The body of every error response: problem details (RFC 9457, `application/problem+json`) with a stable code,
//! the field it is about, and what to do next.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Stable error codes; clients match on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is malformed, or a value in it is impossible.
    InvalidRequest,
    /// No token, or one that isn't known.
    Unauthenticated,
    /// The token was good until it expired.
    TokenExpired,
    /// The token's role or scope doesn't allow it.
    Forbidden,
    /// There is nothing of that name.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// It was changed by someone else in the meantime.
    Conflict,
    /// History before the revision asked for is gone: list again.
    Compacted,
    /// A bound would be passed.
    LimitExceeded,
    /// What is needed for the answer can't be reached.
    Unavailable,
    /// Another global scheduler leads, or will in a moment.
    NotLeading,
    /// A fault of the server.
    Internal,
}

impl ErrorCode {
    /// The HTTP status that goes with it.
    pub const fn status(self) -> u16 {
        match self {
            Self::InvalidRequest => 400,
            Self::Unauthenticated | Self::TokenExpired => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::AlreadyExists | Self::Conflict => 409,
            Self::Compacted => 410,
            Self::LimitExceeded => 429,
            Self::Unavailable | Self::NotLeading => 503,
            Self::Internal => 500,
        }
    }
}

/// A problem: the error type of every server, and the body of its response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
pub struct Problem {
    /// Stable code.
    pub code: ErrorCode,
    /// HTTP status.
    pub status: u16,
    /// What is wrong, as a sentence.
    pub detail: String,
    /// The field that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What to do: often the next command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Problem {
    /// A problem with its code's status.
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { code, status: code.status(), detail: detail.into(), field: None, fix: None }
    }

    /// Names the field.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// Names what to do next.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(field) = &self.field {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.detail)?;
        if let Some(fix) = &self.fix {
            write!(f, "; {fix}")?;
        }
        Ok(())
    }
}
