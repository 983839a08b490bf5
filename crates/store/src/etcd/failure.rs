//! What etcd's answers mean for who asked.

use std::sync::Arc;

use crate::{Error, LeaseId, MAX_TXN_BYTES, MAX_TXN_OPS};

/// gRPC's status codes that are looked at.
const DEADLINE_EXCEEDED: i32 = 4;
const CANCELLED: i32 = 1;
const UNKNOWN: i32 = 2;
const UNAVAILABLE: i32 = 14;

/// Why a request failed.
pub(super) enum Failure {
    /// It may work at another member, or later. A write may have happened.
    Passes(String),
    /// The same, and surely nothing happened.
    Undone(String),
    /// It would fail again.
    Final(Error),
}

impl Failure {
    pub(super) fn of(error: etcd_client::Error) -> Failure {
        use etcd_client::Error as E;
        match error {
            E::GRpcStatus(status) => Self::of_status(i32::from(status.code()), status.message()),
            E::TransportError(error) => Failure::Passes(chain(&error)),
            E::LeaseKeepAliveError(_) => Failure::Final(Error::LeaseNotFound(LeaseId(0))),
            // A stream that ended before its first answer.
            E::WatchError(reason) => Failure::Passes(reason),
            error => Failure::Final(Error::Engine(Arc::new(error))),
        }
    }

    /// etcd's own messages are stable: its clients tell errors by them.
    fn of_status(code: i32, message: &str) -> Failure {
        let said = |words: &str| message.contains(words);
        if said("no leader") || said("too many requests") {
            return Failure::Undone(message.to_owned());
        }
        if said("requested lease not found") {
            return Failure::Final(Error::LeaseNotFound(LeaseId(0)));
        }
        if said("required revision has been compacted") {
            return Failure::Final(Error::Compacted { oldest: 0 });
        }
        if said("required revision is a future revision") {
            return Failure::Final(Error::FutureRevision { asked: 0, current: 0 });
        }
        if said("too many operations in txn request") {
            return Failure::Final(Error::TooManyOps { len: MAX_TXN_OPS, max: 0 });
        }
        if said("request is too large") {
            return Failure::Final(Error::TxnTooLarge { len: MAX_TXN_BYTES, max: 0 });
        }
        if said("database space exceeded") {
            return Failure::Final(Error::Full);
        }
        match code {
            CANCELLED | UNKNOWN | DEADLINE_EXCEEDED | UNAVAILABLE => Failure::Passes(message.to_owned()),
            _ => Failure::Final(Error::Engine(Arc::from(Box::<dyn std::error::Error + Send + Sync>::from(
                message,
            )))),
        }
    }
}

/// Names the lease that an error is about.
pub(super) fn of_lease(error: Error, lease: LeaseId) -> Error {
    match error {
        Error::LeaseNotFound(_) => Error::LeaseNotFound(lease),
        error => error,
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let (mut text, mut source) = (error.to_string(), error.source());
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
