//! What can go wrong with the store, and what a client is told about it.

use axum::http::StatusCode;

use crate::errors::Refusal;

/// What errors of a folder call their store: ours, and object_store's.
const FOLDERS: [&str; 2] = [super::folder::NAME, "LocalFileSystem"];

/// How Amazon S3, Azure and Google say that a request is of another time than theirs.
const REFUSED_FOR_CLOCK: [&str; 4] =
    ["RequestTimeTooSkewed", "RequestExpired", "Request date header too old", "in a reasonable timeframe"];

/// Result of storage operations.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Why the store didn't do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is no room; nothing was changed.
    #[error(
        "can't {operation} `{key}`: {store} is full; make it larger, or free room: `anyplace registry gc` takes what \
         nothing needs and is older than gc.grace; what was deleted it takes when gc.undelete_window is over, or after \
         `anyplace registry trash --empty`"
    )]
    Full {
        /// Such as "write".
        operation: &'static str,
        key: String,
        store: String,
    },
    /// The store refused, or can't be reached, also after retries.
    #[error("can't {operation} `{key}` in {store}: {}", describe(cause))]
    Store {
        /// Such as "write".
        operation: &'static str,
        key: String,
        store: String,
        /// Not `source`: the text has it already, and whoever prints the chain would say it twice.
        cause: object_store::Error,
    },
    /// A collector was at this content, or tag, for longer than a request should wait.
    #[error("{what} is being collected as garbage; ask again in a moment")]
    Collecting { what: String },
    /// An object isn't what this layout has there.
    #[error("`{key}` is damaged: {reason}; `anyplace registry scrub` tells what else is")]
    Damaged { key: String, reason: String },
}

impl Error {
    pub(super) fn of(operation: &'static str, key: &str, store: &str, cause: object_store::Error) -> Error {
        let (key, store) = (key.to_owned(), store.to_owned());
        if any_io(&cause, is_full) {
            return Error::Full { operation, key, store };
        }
        Error::Store { operation, key, store, cause }
    }

    pub(crate) fn damaged(key: impl std::fmt::Display, reason: impl std::fmt::Display) -> Error {
        Error::Damaged { key: key.to_string(), reason: reason.to_string() }
    }

    /// Whether what is there is damaged, by its bytes or by what the disk said; asking again is of no use.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, Error::Damaged { .. }) || self.is_lost()
    }

    /// Whether the disk said that it has lost what is there, not that it can't be asked.
    pub(crate) fn is_lost(&self) -> bool {
        let codes = [libc::EIO, libc::EBADMSG, libc::EUCLEAN].map(Some);
        matches!(self, Error::Store { cause, .. } if any_io(cause, |io| codes.contains(&io.raw_os_error())))
    }
}

/// The answer to a client: the log has the details.
impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        tracing::error!(%error, "the storage failed");
        match error {
            Error::Full { .. } => {
                let message = "the registry's storage is full; an operator makes it larger, or deletes images: \
                               `anyplace registry gc` takes them once gc.undelete_window (or `anyplace registry \
                               trash --empty`) and gc.grace are over";
                Refusal::new(StatusCode::INSUFFICIENT_STORAGE, "DENIED", message)
            }
            Error::Collecting { .. } => Refusal::unavailable(error.to_string()),
            Error::Store { ref cause, .. } if is_for_clock(&describe_chain(cause)) => Refusal::unavailable(
                "the registry's storage refuses its requests since its clock is off; its operator has to set it",
            ),
            Error::Store { operation, .. } => {
                let message = format!("the registry's storage can't {operation} just now; its log says why");
                Refusal::unavailable(message)
            }
            Error::Damaged { .. } => {
                let message = "the registry's storage is damaged; its log says where";
                Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", message)
            }
        }
    }
}

/// Whether the disk, or the user's share of it, is full.
pub(crate) fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

/// Whether the error, or one behind it, is such an error of the system.
fn any_io(error: &(dyn std::error::Error + 'static), is_such: impl Fn(&std::io::Error) -> bool) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<std::io::Error>().is_some_and(&is_such) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Whether a store refused a request since it is signed for another time, by what the error says.
fn is_for_clock(text: &str) -> bool {
    REFUSED_FOR_CLOCK.iter().any(|code| text.contains(code))
}

/// The error with its causes.
fn describe_chain(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        // Many of them repeat their source.
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// The error with its causes, and what to check.
fn describe(error: &object_store::Error) -> String {
    let text = describe_chain(error);
    match error {
        _ if is_for_clock(&text) => {
            format!(
                "{text}; this machine's clock is off by more than the store takes: set it, such as by NTP"
            )
        }
        object_store::Error::Unauthenticated { .. } | object_store::Error::PermissionDenied { .. } => {
            format!("{text}; check the credentials in [storage], and what they may do")
        }
        object_store::Error::Generic { store, .. } if !FOLDERS.contains(store) => {
            format!("{text}; check that the endpoint in [storage] is right and reachable from here")
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_no_endpoint_to_check() {
        let dir = tempfile::tempdir().unwrap();
        let text = |store, source: std::io::Error| {
            let cause = object_store::Error::Generic { store, source: source.into() };
            Error::of("read", "blobs/x", &dir.path().display().to_string(), cause)
        };
        let lost = || std::io::Error::from_raw_os_error(libc::EIO);
        for store in FOLDERS {
            let error = text(store, lost());
            assert!(error.is_lost() && !error.to_string().contains("endpoint"), "{error}");
        }
        let error = text("S3", std::io::ErrorKind::TimedOut.into());
        assert!(!error.is_lost() && error.to_string().contains("endpoint"), "{error}");
    }
}
