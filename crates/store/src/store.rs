//! The contract of a store, with etcd's semantics.

use std::time::Duration;

use futures_util::stream::BoxStream;

use crate::{KeyValue, LeaseId, Result, Revision, Txn, TxnOutcome, WatchEvent};

/// A future that an object-safe async method returns.
pub type BoxFuture<'a, T> = futures_util::future::BoxFuture<'a, T>;

/// Changes in order. After an error the stream ends.
pub type WatchStream = BoxStream<'static, Result<WatchEvent>>;

/// Ordered keys with revisions, transactions, watches and leases. Used as `Arc<dyn Store>`.
///
/// All operations are linearizable. Dropping the future of a write gives up waiting, not the write: it may still
/// happen.
pub trait Store: Send + Sync + 'static {
    /// Reads one key.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>>>;

    /// Reads all keys that start with `prefix`, in ascending order, as they were together at the returned revision.
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Vec<KeyValue>, Revision)>>;

    /// Makes all changes at one revision if all conditions hold, else none. Durable when it returns.
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome>>;

    /// Delivers every change of a key under `prefix` with a revision above `from`, in order, none missing, for ever.
    ///
    /// Fails with [`Error::Compacted`](crate::Error::Compacted) when history after `from` is gone, and with
    /// [`Error::FutureRevision`](crate::Error::FutureRevision) when the store never reached `from`. The stream's
    /// buffer is bounded: a reader that is too slow gets [`Error::Lagged`](crate::Error::Lagged) and the end.
    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> BoxFuture<'a, Result<WatchStream>>;

    /// Grants a lease. Unless kept alive, it expires after `ttl` and then deletes its keys in one revision; never
    /// earlier, but possibly later (etcd rounds up to seconds; a restart of the store begins every `ttl` anew).
    fn grant_lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId>>;

    /// Begins the lease's `ttl` anew.
    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>>;

    /// Ends the lease and deletes its keys in one revision.
    fn revoke_lease(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>>;

    /// Gives up the history up to and including `up_to`; current keys stay. Watches can resume from `up_to` on.
    fn compact(&self, up_to: Revision) -> BoxFuture<'_, Result<()>>;
}
