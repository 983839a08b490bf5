//! Why something couldn't be had from upstream.

use std::fmt;

use anyplace_images::Error;
use axum::http::StatusCode;

use crate::errors::Refusal;

/// Why a fetch brought nothing. Each names the upstream.
///
/// In the order of how much it says about why nobody had it: of several upstreams' failures, the largest counts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Failure {
    /// The upstream says that it isn't there.
    Absent,
    /// It doesn't give it to this cache.
    Refused(String),
    /// It wasn't asked, because it didn't answer a moment ago.
    LeftAlone(String),
    /// What it stands on doesn't answer. It was asked again as it wished; more of that would take too long in a chain
    /// of caches.
    Unavailable(String),
    /// It didn't answer, or not what was asked for.
    Unreachable(String),
    /// It sends whole blobs only.
    NoRanges(String),
    /// It sent something else than the digest says.
    Corrupt(String),
    /// It couldn't be kept here, or too many wait for it.
    Here(String),
}

impl Failure {
    /// What an upstream's error comes to.
    pub(super) fn of(upstream: &str, error: Error) -> Failure {
        let mut text = error.to_string();
        if !text.contains(upstream) {
            text = format!("{upstream}: {text}");
        }
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        match error {
            error if error.is_not_found() => Failure::Absent,
            Error::DigestMismatch { .. } | Error::SizeMismatch { .. } => Failure::Corrupt(text),
            Error::Unauthorized { .. } => Failure::Refused(text),
            Error::Registry { code, .. } if code == "UNAVAILABLE" => Failure::Unavailable(text),
            _ => Failure::Unreachable(text),
        }
    }

    /// Whether another try may bring it.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, Failure::Unreachable(_) | Failure::NoRanges(_) | Failure::Corrupt(_))
    }

    pub(super) fn here(doing: &'static str, error: impl fmt::Display) -> Failure {
        tracing::error!(doing, %error, "the cache failed");
        Failure::Here(format!("{doing}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Absent => f.write_str("it is not there"),
            Failure::Refused(reason)
            | Failure::LeftAlone(reason)
            | Failure::Unavailable(reason)
            | Failure::Unreachable(reason)
            | Failure::NoRanges(reason)
            | Failure::Corrupt(reason)
            | Failure::Here(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        match failure {
            Failure::Absent => {
                Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "neither here nor upstream")
            }
            Failure::Refused(reason)
            | Failure::LeftAlone(reason)
            | Failure::Unavailable(reason)
            | Failure::Unreachable(reason)
            | Failure::NoRanges(reason) => {
                let message = format!("it is not here, and the upstream can't be asked: {reason}");
                Refusal::unavailable(message)
            }
            Failure::Corrupt(reason) => {
                let message = format!("what the upstream sent was refused: {reason}");
                Refusal::new(StatusCode::BAD_GATEWAY, "DIGEST_INVALID", message)
            }
            Failure::Here(reason) => {
                let message = format!("it is not here, and the cache can't take it now: {reason}");
                Refusal::unavailable(message)
            }
        }
    }
}
