//! Keys with their revisions, and the events that watches deliver.

use std::fmt;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Number of a change to the store. Every transaction that changes something takes the next one; 0 is before
/// everything, and also stands for "absent" in conditions.
pub type Revision = u64;

/// Names a lease within one store. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A key with its value and its history in numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// The value; empty in a delete event.
    pub value: Bytes,
    /// Revision that created this incarnation of the key; 0 in a delete event.
    pub create_revision: Revision,
    /// Revision of the last change (in a delete event, of the deletion).
    pub mod_revision: Revision,
    /// How often this incarnation was written, from 1; 0 in a delete event.
    pub version: u64,
    /// Lease that deletes this key when it expires.
    pub lease: Option<LeaseId>,
}

impl KeyValue {
    /// Reads the value as JSON.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.value).map_err(|source| Error::Json { key: self.key.clone(), source })
    }
}

/// What happened to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// The key was created or overwritten.
    Put,
    /// The key was deleted, by a transaction, or by its lease.
    Delete,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// Revision of the change.
    pub revision: Revision,
    /// Put or delete.
    pub kind: EventKind,
    /// The key as it is since the change.
    pub kv: KeyValue,
    /// More events of the same revision follow on this watch.
    pub more: bool,
}

impl WatchEvent {
    /// Revision to resume from once this event is handled, without missing the rest of its transaction.
    pub fn resume_revision(&self) -> Revision {
        if self.more { self.revision - 1 } else { self.revision }
    }
}
