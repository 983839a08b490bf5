//! Small JSON documents beside the content: accounts, teams, keys. Key: `access/<name>`.

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::path::Path;
use object_store::{PutMode, PutOptions};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Error, Result, Storage};

fn key(name: &str) -> Path {
    Path::from(format!("access/{name}"))
}

impl Storage {
    /// A document, if it is there.
    pub(crate) async fn document<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let key = key(name);
        let Some(bytes) = self.read(&key).await? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::damaged(&key, e))
    }

    /// Writes a document.
    pub(crate) async fn put_document<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        let key = key(name);
        let bytes = serde_json::to_vec(value).map_err(|e| Error::damaged(&key, e))?;
        self.put(&key, Bytes::from(bytes)).await
    }

    /// Writes a document unless it is there, where the store can tell; then reads back what is there.
    pub(crate) async fn document_or_create<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        value: T,
    ) -> Result<T> {
        if let Some(found) = self.document(name).await? {
            return Ok(found);
        }
        let key = key(name);
        let bytes = Bytes::from(serde_json::to_vec(&value).map_err(|e| Error::damaged(&key, e))?);
        let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.inner.objects.put_opts(&key, bytes.clone().into(), create).await {
            Ok(_) => {}
            Err(object_store::Error::AlreadyExists { .. }) => {}
            // Of two that start at once, the last one's is read back by both soon enough: see the caller.
            Err(_) => self.put(&key, bytes).await?,
        }
        Ok(self.document(name).await?.unwrap_or(value))
    }

    /// Says whether there was such a document.
    pub(crate) async fn delete_document(&self, name: &str) -> Result<bool> {
        self.remove(&key(name)).await
    }

    /// Names of the documents below a name, without it, in no order.
    pub(crate) async fn documents(&self, below: &str) -> Result<Vec<String>> {
        let prefix = key(below);
        let listed = self.inner.objects.list(Some(&prefix)).map_err(|e| self.failed("list", &prefix, e));
        listed
            .try_filter_map(async |meta| Ok(meta.location.filename().map(str::to_owned)))
            .try_collect()
            .await
    }
}
