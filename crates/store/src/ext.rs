//! Shorthands on top of every store: JSON values and unconditional writes.

use std::future::Future;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::txn::to_json;
use crate::{Result, Revision, Store, Txn};

/// Key, value, and revision of the last change.
pub type JsonEntry<T> = (String, T, Revision);

/// Shorthands for every [`Store`], `dyn Store` included.
pub trait StoreExt: Store {
    /// Reads a JSON value, with the revision of its last change (for [`Txn::when_revision`]).
    fn get_json<T: DeserializeOwned>(
        &self,
        key: &str,
    ) -> impl Future<Output = Result<Option<(T, Revision)>>> + Send {
        async move {
            let found = self.get(key).await?;
            found.map(|kv| Ok((kv.json()?, kv.mod_revision))).transpose()
        }
    }

    /// Reads all JSON values under a prefix, and the revision of the list (for [`Store::watch`]).
    fn list_json<T: DeserializeOwned>(
        &self,
        prefix: &str,
    ) -> impl Future<Output = Result<(Vec<JsonEntry<T>>, Revision)>> + Send {
        async move {
            let (kvs, revision) = self.list(prefix).await?;
            let values = kvs.into_iter().map(|kv| {
                let value = kv.json()?;
                Ok((kv.key, value, kv.mod_revision))
            });
            Ok((values.collect::<Result<_>>()?, revision))
        }
    }

    /// Writes a JSON value, whatever was there.
    fn put_json<T: Serialize + Sync + ?Sized>(
        &self,
        key: &str,
        value: &T,
    ) -> impl Future<Output = Result<Revision>> + Send {
        async move { self.put(key, to_json(key, value)?).await }
    }

    /// Writes a value, whatever was there.
    fn put(
        &self,
        key: &str,
        value: impl Into<Bytes> + Send,
    ) -> impl Future<Output = Result<Revision>> + Send {
        async move { Ok(self.txn(Txn::new().put(key, value)).await?.revision()) }
    }

    /// Deletes a key, whether it is there or not.
    fn delete(&self, key: &str) -> impl Future<Output = Result<Revision>> + Send {
        async move { Ok(self.txn(Txn::new().delete(key)).await?.revision()) }
    }
}

impl<S: Store + ?Sized> StoreExt for S {}
