//! What can go wrong. A condition that does not hold is no error, but [`TxnOutcome::Conflict`](crate::TxnOutcome).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::{LeaseId, Revision};

/// Result with the store's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Failure of a store operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another process (or another handle in this one) has the file open.
    #[error(
        "store {} is in use by another process; stop it, or give this one a data_dir of its own \
         (`fuser {}` names the holder)",
        path.display(), path.display()
    )]
    Locked {
        /// The store's file.
        path: PathBuf,
    },
    /// The file was written by another version of the program.
    #[error(
        "store {} has layout {found}, this program reads layout {expected}; run the version that wrote it",
        path.display()
    )]
    Layout {
        /// The store's file.
        path: PathBuf,
        /// Layout number in the file.
        found: u64,
        /// Layout number this program reads and writes.
        expected: u64,
    },
    /// The file can't be created, read or repaired.
    #[error("store {} can't be opened; check that it is a store file, and its permissions", path.display())]
    Open {
        /// The store's file.
        path: PathBuf,
        /// Cause.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// Keys are at least one byte long.
    #[error("key is empty; a key needs at least one byte")]
    KeyEmpty,
    /// A key over the limit.
    #[error("key of {len} bytes, at most {max} are allowed: {start}...")]
    KeyTooLong {
        /// Start of the key.
        start: String,
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// A value over the limit.
    #[error("value of {len} bytes for key {key}, at most {max} are allowed; keep large data in the registry")]
    ValueTooLarge {
        /// Its key.
        key: String,
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// Keys and values of a transaction together are over the limit.
    #[error("transaction of {len} bytes, at most {max} are allowed; split it")]
    TxnTooLarge {
        /// Size of the transaction in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// Too many conditions, or too many operations.
    #[error("transaction of {len} operations or conditions, at most {max} are allowed; split it")]
    TooManyOps {
        /// Number of operations or of conditions.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// A key is written more than once, or both written and deleted.
    #[error("transaction changes key {key} more than once; a key may be written once, and not also deleted")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// The lease never existed, was revoked, or expired.
    #[error("lease {0} is unknown or expired; grant a new one and write its keys again")]
    LeaseNotFound(LeaseId),
    /// A lease's time to live is out of range.
    #[error("lease of {ttl:?}, expected more than nothing and at most {max:?}")]
    LeaseTtl {
        /// What was asked for.
        ttl: Duration,
        /// The limit.
        max: Duration,
    },
    /// The changes that were asked for are no longer kept.
    #[error("history up to revision {oldest} is compacted; list again, then watch from the list's revision")]
    Compacted {
        /// The lowest revision from which a watch can resume.
        oldest: Revision,
    },
    /// A revision that this store has not reached: it comes from another store, or from before a restored backup.
    #[error(
        "revision {asked} is ahead of the store's {current}; list again, then watch from the list's revision"
    )]
    FutureRevision {
        /// The revision that was asked for.
        asked: Revision,
        /// The store's current revision.
        current: Revision,
    },
    /// A watcher read too slowly, its buffer overflowed and its stream ended.
    #[error("watcher fell behind; watch again from revision {resume_from}, or list again")]
    Lagged {
        /// Everything up to this revision was delivered.
        resume_from: Revision,
    },
    /// A value is not the JSON that was expected, or can't be written as JSON.
    #[error("value of key {key} does not fit its type")]
    Json {
        /// The key.
        key: String,
        /// Cause.
        source: serde_json::Error,
    },
    /// A record in the file can't be read.
    #[error("record {key:?} in table {table} is damaged; restore the store from a backup")]
    Corrupt {
        /// Table of the record.
        table: &'static str,
        /// Its key.
        key: String,
    },
    /// What isn't an export can't be imported.
    #[error("line {line}: {reason}")]
    Import {
        /// Line of the file, from 1.
        line: usize,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The store changed while it was filled.
    #[error(
        "somebody else writes to the store; stop the scheduler or the other import, and repeat `anyplace admin import`"
    )]
    ImportDisturbed,
    /// An import needs an empty store.
    #[error(
        "the store isn't empty ({entries} keys, such as {key}); import into another one, or move this one away"
    )]
    NotEmpty {
        /// The first key.
        key: String,
        /// How many there are.
        entries: usize,
    },
    /// An import has begun and not ended.
    #[error("an import into this store has not ended; repeat `anyplace admin import`")]
    Unfinished,
    /// The configuration can't be.
    #[error("{field} {reason}")]
    Config {
        /// The field.
        field: &'static str,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// No member of etcd serves; nothing was written.
    #[error("etcd at {endpoints} doesn't serve ({reason}); look at its members, and try again")]
    Unavailable {
        /// Who was asked.
        endpoints: String,
        /// The last answer.
        reason: String,
    },
    /// A write may have happened, or may still happen.
    #[error("whether etcd made a change is unknown ({reason}); read the keys again before the next write")]
    OutcomeUnknown {
        /// How the request ended.
        reason: String,
    },
    /// etcd has reached its quota, and takes no writes.
    #[error(
        "etcd's space is used up; compact and defragment it (or raise --quota-backend-bytes), then `etcdctl alarm disarm`"
    )]
    Full,
    /// The store is shut down.
    #[error("store is closed")]
    Closed,
    /// The engine failed. After a failed write the outcome is unknown and the store refuses further work until it is
    /// opened again.
    #[error("store failed; check the disk's space and health, then restart")]
    Engine(#[source] Arc<dyn std::error::Error + Send + Sync>),
}

impl From<redb::Error> for Error {
    fn from(error: redb::Error) -> Self {
        Self::Engine(Arc::new(error))
    }
}
