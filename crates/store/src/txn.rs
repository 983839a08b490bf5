//! Conditional transactions and the limits on them.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::Serialize;

use crate::{Error, LeaseId, Result, Revision};

/// Longest key. Ours are paths of a few identifiers of at most 63 bytes; redb and etcd both keep keys in their inner
/// nodes, where long ones cost everybody.
pub const MAX_KEY_BYTES: usize = 1024;

/// Largest transaction: etcd's default request limit (`--max-request-bytes`). Raising it means raising it there too.
pub const MAX_TXN_BYTES: usize = 1536 * 1024;

/// Largest value: what fits into one transaction beside its key and framing.
pub const MAX_VALUE_BYTES: usize = MAX_TXN_BYTES - 4096;

/// Most operations, and most conditions, in one transaction. etcd's default is 128 (`--max-txn-ops`), too few to
/// place a deployment of a few hundred instances at once: an etcd under this crate runs with this number.
pub const MAX_TXN_OPS: usize = 1024;

/// Allowance for the framing of one operation or condition in a request to etcd.
const FRAMING_BYTES: usize = 64;

/// A condition of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key was last changed at this revision; 0: the key is absent.
    ModRevision(String, Revision),
    /// The key exists, whatever its revision.
    Exists(String),
}

impl Compare {
    /// The key that the condition is about.
    pub fn key(&self) -> &str {
        match self {
            Self::ModRevision(key, _) | Self::Exists(key) => key,
        }
    }

    /// Whether the condition holds for a key last changed at `mod_revision` (0: absent).
    pub fn holds(&self, mod_revision: Revision) -> bool {
        match self {
            Self::ModRevision(_, wanted) => *wanted == mod_revision,
            Self::Exists(_) => mod_revision != 0,
        }
    }
}

/// A change in a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Creates or overwrites a key. Without a lease it also leaves the lease that it had.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Bytes,
        /// The lease that is to delete it.
        lease: Option<LeaseId>,
    },
    /// Deletes a key; nothing where it is absent.
    Delete {
        /// The key.
        key: String,
    },
    /// Deletes all keys that start with the prefix; the empty one means all keys.
    DeletePrefix {
        /// The prefix.
        prefix: String,
    },
}

/// Changes that happen together at one revision, if all conditions hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// Conditions; all must hold.
    pub compares: Vec<Compare>,
    /// Changes, made in this order.
    pub ops: Vec<Op>,
}

/// How a transaction ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a conflict means that nothing was written"]
pub enum TxnOutcome {
    /// All changes are made, and durable.
    Committed {
        /// Revision of the changes, or the current one if nothing changed (only absent keys were deleted).
        revision: Revision,
    },
    /// A condition did not hold and nothing is changed.
    Conflict {
        /// The store's current revision.
        revision: Revision,
        /// Key of the first condition that did not hold.
        key: String,
    },
}

impl TxnOutcome {
    /// Whether the changes are made.
    pub fn is_committed(&self) -> bool {
        matches!(self, Self::Committed { .. })
    }

    /// Revision of the changes; of the store, after a conflict.
    pub fn revision(&self) -> Revision {
        match self {
            Self::Committed { revision } | Self::Conflict { revision, .. } => *revision,
        }
    }
}

impl Txn {
    /// An empty transaction.
    pub fn new() -> Self {
        Self::default()
    }

    /// On condition that the key is absent.
    pub fn when_absent(self, key: impl Into<String>) -> Self {
        self.when_revision(key, 0)
    }

    /// On condition that the key was last changed at `revision` (0: is absent).
    pub fn when_revision(mut self, key: impl Into<String>, revision: Revision) -> Self {
        self.compares.push(Compare::ModRevision(key.into(), revision));
        self
    }

    /// On condition that the key exists.
    pub fn when_exists(mut self, key: impl Into<String>) -> Self {
        self.compares.push(Compare::Exists(key.into()));
        self
    }

    /// Writes a key.
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: None });
        self
    }

    /// Writes a key that the lease deletes when it expires.
    pub fn put_leased(mut self, key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: Some(lease) });
        self
    }

    /// Writes a key with a value as JSON.
    pub fn put_json<T: Serialize + ?Sized>(self, key: impl Into<String>, value: &T) -> Result<Self> {
        let key = key.into();
        let json = to_json(&key, value)?;
        Ok(self.put(key, json))
    }

    /// Writes a key with a value as JSON that the lease deletes when it expires.
    pub fn put_json_leased<T: Serialize + ?Sized>(
        self,
        key: impl Into<String>,
        value: &T,
        lease: LeaseId,
    ) -> Result<Self> {
        let key = key.into();
        let json = to_json(&key, value)?;
        Ok(self.put_leased(key, json, lease))
    }

    /// Deletes a key.
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.ops.push(Op::Delete { key: key.into() });
        self
    }

    /// Deletes all keys that start with the prefix.
    pub fn delete_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.ops.push(Op::DeletePrefix { prefix: prefix.into() });
        self
    }

    /// Size that counts against [`MAX_TXN_BYTES`].
    pub fn size_bytes(&self) -> usize {
        let compares = self.compares.iter().map(|c| c.key().len() + FRAMING_BYTES);
        let ops = self.ops.iter().map(|op| {
            FRAMING_BYTES
                + match op {
                    Op::Put { key, value, .. } => key.len() + value.len(),
                    Op::Delete { key } => key.len(),
                    Op::DeletePrefix { prefix } => prefix.len(),
                }
        });
        compares.chain(ops).sum()
    }

    /// Refuses what no engine takes: sizes over the limits, and keys changed twice.
    pub fn validate(&self) -> Result<()> {
        let longest = self.compares.len().max(self.ops.len());
        if longest > MAX_TXN_OPS {
            return Err(Error::TooManyOps { len: longest, max: MAX_TXN_OPS });
        }
        for compare in &self.compares {
            check_key(compare.key())?;
        }
        let mut puts = BTreeSet::new();
        for op in &self.ops {
            match op {
                Op::Put { key, value, .. } => {
                    check_key(key)?;
                    if value.len() > MAX_VALUE_BYTES {
                        return Err(Error::ValueTooLarge {
                            key: key.clone(),
                            len: value.len(),
                            max: MAX_VALUE_BYTES,
                        });
                    }
                    if !puts.insert(key.as_str()) {
                        return Err(Error::DuplicateKey { key: key.clone() });
                    }
                }
                Op::Delete { key } => check_key(key)?,
                Op::DeletePrefix { prefix } => check_len(prefix)?,
            }
        }
        // etcd refuses a put and a delete that overlap, in whatever order: so must every engine.
        for op in &self.ops {
            let overlap = match op {
                Op::Put { .. } => None,
                Op::Delete { key } => puts.get(key.as_str()),
                Op::DeletePrefix { prefix } => {
                    puts.range(prefix.as_str()..).next().filter(|k| k.starts_with(prefix.as_str()))
                }
            };
            if let Some(key) = overlap {
                return Err(Error::DuplicateKey { key: (*key).to_owned() });
            }
        }
        let len = self.size_bytes();
        if len > MAX_TXN_BYTES {
            return Err(Error::TxnTooLarge { len, max: MAX_TXN_BYTES });
        }
        Ok(())
    }
}

pub(crate) fn to_json<T: Serialize + ?Sized>(key: &str, value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|source| Error::Json { key: key.to_owned(), source })
}

fn check_key(key: &str) -> Result<()> {
    if key.is_empty() { Err(Error::KeyEmpty) } else { check_len(key) }
}

fn check_len(key: &str) -> Result<()> {
    if key.len() > MAX_KEY_BYTES {
        return Err(Error::KeyTooLong {
            start: key.chars().take(64).collect(),
            len: key.len(),
            max: MAX_KEY_BYTES,
        });
    }
    Ok(())
}
