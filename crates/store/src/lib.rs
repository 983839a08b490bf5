//! Keys, revisions, transactions, watches and leases over two engines.
//!
//! The one durable thing in the control plane. [`Store`] has etcd's semantics: ordered keys, a revision for each
//! change, conditional transactions, watches that resume from a revision, leases. [`EmbeddedStore`] keeps it all in
//! one local file and is the default; [`EtcdStore`] keeps it in etcd, for those who outgrow one machine. Both pass the
//! same contract tests (`tests/contract`).
//!
//! The usual way to follow a prefix without missing anything:
//!
//! 1. `list(prefix)` gives the state at revision `r`;
//! 2. `watch(prefix, r)` gives every later change, in order;
//! 3. when the stream ends with [`Error::Lagged`], watch again from its `resume_from`; when a watch answers
//!    [`Error::Compacted`], start again at 1.
//!
//! This crate must not know what is stored in it.

mod embedded;
mod error;
mod etcd;
mod ext;
mod kv;
mod store;
mod transfer;
mod txn;

use std::path::PathBuf;
use std::sync::Arc;

pub use embedded::{EmbeddedStore, Limits};
pub use error::{Error, Result};
pub use etcd::{EtcdConfig, EtcdStore};
pub use ext::{JsonEntry, StoreExt};
pub use kv::{EventKind, KeyValue, LeaseId, Revision, WatchEvent};
pub use store::{BoxFuture, Store, WatchStream};
pub use transfer::{export, import};
pub use txn::{Compare, MAX_KEY_BYTES, MAX_TXN_BYTES, MAX_TXN_OPS, MAX_VALUE_BYTES, Op, Txn, TxnOutcome};

/// Opens the store that a configuration names: etcd's where it has one, else the file.
///
/// # Errors
/// What the engine can't open, and a store whose import hasn't ended.
pub async fn open(path: PathBuf, etcd: Option<&EtcdConfig>) -> Result<Arc<dyn Store>> {
    let store = open_any(path, etcd).await?;
    transfer::check_whole(store.as_ref()).await?;
    Ok(store)
}

/// [`open`], also where an import hasn't ended: to repeat it.
///
/// # Errors
/// What the engine can't open.
pub async fn open_any(path: PathBuf, etcd: Option<&EtcdConfig>) -> Result<Arc<dyn Store>> {
    match etcd {
        Some(etcd) => Ok(EtcdStore::open(etcd).await?),
        None => {
            let opened = tokio::task::spawn_blocking(move || EmbeddedStore::open(path)).await;
            Ok(opened.map_err(|error| Error::Engine(Arc::new(error)))??)
        }
    }
}
