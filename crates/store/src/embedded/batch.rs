//! Applies commands one after the other in one redb transaction.

use std::time::Duration;

use redb::{ReadableTable, Table, WriteTransaction};

use super::layout::{
    Counters, HISTORY, KEYS, LEASE_KEYS, LEASES, META, META_COMPACTED, META_NEXT_LEASE, META_REVISION,
    decode_record, deleted, encode_event, encode_record,
};
use crate::{Error, EventKind, KeyValue, LeaseId, Op, Result, Revision, Txn, TxnOutcome, WatchEvent};

/// `Err`: redb failed and the whole batch with it. `Ok(Err)`: only this command is refused, and changed nothing.
pub(super) type Applied<T> = Result<Result<T>, redb::Error>;

/// What one revision changed.
pub(super) struct Change {
    pub(super) revision: Revision,
    pub(super) events: Vec<WatchEvent>,
    /// Size in the history.
    pub(super) bytes: usize,
}

/// Open tables of the transaction, and what the commands did so far.
pub(super) struct Batch<'txn> {
    meta: Table<'txn, &'static str, u64>,
    keys: Table<'txn, &'static str, &'static [u8]>,
    history: Table<'txn, (u64, u32), &'static [u8]>,
    leases: Table<'txn, u64, u64>,
    lease_keys: Table<'txn, (u64, &'static str), ()>,
    before: Counters,
    counters: Counters,
    leases_changed: bool,
    changes: Vec<Change>,
}

impl<'txn> Batch<'txn> {
    pub(super) fn new(txn: &'txn WriteTransaction, counters: Counters) -> Result<Self, redb::Error> {
        Ok(Self {
            meta: txn.open_table(META)?,
            keys: txn.open_table(KEYS)?,
            history: txn.open_table(HISTORY)?,
            leases: txn.open_table(LEASES)?,
            lease_keys: txn.open_table(LEASE_KEYS)?,
            before: counters,
            counters,
            leases_changed: false,
            changes: Vec::new(),
        })
    }

    /// Writes the counters. `None`: nothing changed and there is nothing to commit.
    pub(super) fn finish(mut self) -> Result<Option<(Counters, Vec<Change>)>, redb::Error> {
        if self.counters == self.before && !self.leases_changed {
            return Ok(None);
        }
        self.meta.insert(META_REVISION, self.counters.revision)?;
        self.meta.insert(META_COMPACTED, self.counters.compacted)?;
        self.meta.insert(META_NEXT_LEASE, self.counters.next_lease)?;
        Ok(Some((self.counters, self.changes)))
    }

    pub(super) fn changes(&self) -> &[Change] {
        &self.changes
    }

    pub(super) fn txn(&mut self, txn: Txn) -> Applied<TxnOutcome> {
        for compare in &txn.compares {
            let mod_revision = match self.read(compare.key())? {
                Ok(kv) => kv.map_or(0, |kv| kv.mod_revision),
                Err(error) => return Ok(Err(error)),
            };
            if !compare.holds(mod_revision) {
                let key = compare.key().to_owned();
                return Ok(Ok(TxnOutcome::Conflict { revision: self.counters.revision, key }));
            }
        }
        // Everything that can refuse the transaction comes before its first change.
        for op in &txn.ops {
            if let Op::Put { lease: Some(lease), .. } = op
                && self.leases.get(lease.0)?.is_none()
            {
                return Ok(Err(Error::LeaseNotFound(*lease)));
            }
        }
        let mut events = Vec::with_capacity(txn.ops.len());
        for op in txn.ops {
            match op {
                Op::Put { key, value, lease } => {
                    let (create_revision, version) = match self.remove(&key)? {
                        Some(old) => (old.create_revision, old.version + 1),
                        None => (self.counters.revision + 1, 1),
                    };
                    let mod_revision = self.counters.revision + 1;
                    let kv = KeyValue { key, value, create_revision, mod_revision, version, lease };
                    self.keys.insert(kv.key.as_str(), encode_record(&kv).as_slice())?;
                    if let Some(lease) = lease {
                        self.lease_keys.insert((lease.0, kv.key.as_str()), ())?;
                    }
                    events.push(WatchEvent { revision: mod_revision, kind: EventKind::Put, kv, more: false });
                }
                Op::Delete { key } => self.delete(key, &mut events)?,
                Op::DeletePrefix { prefix } => {
                    let mut keys = Vec::new();
                    for entry in self.keys.range(prefix.as_str()..)? {
                        let (key, _) = entry?;
                        if !key.value().starts_with(&prefix) {
                            break;
                        }
                        keys.push(key.value().to_owned());
                    }
                    for key in keys {
                        self.delete(key, &mut events)?;
                    }
                }
            }
        }
        let revision = self.record(events)?;
        Ok(Ok(TxnOutcome::Committed { revision }))
    }

    pub(super) fn compacted(&self) -> Revision {
        self.counters.compacted
    }

    pub(super) fn grant(&mut self, ttl: Duration) -> Applied<LeaseId> {
        let id = LeaseId(self.counters.next_lease);
        // At most MAX_LEASE_TTL; a shorter one than a millisecond would come back from the file as nothing.
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1);
        self.counters.next_lease += 1;
        self.leases.insert(id.0, ttl_ms)?;
        self.leases_changed = true;
        Ok(Ok(id))
    }

    pub(super) fn revoke(&mut self, lease: LeaseId) -> Applied<()> {
        if self.leases.remove(lease.0)?.is_none() {
            return Ok(Err(Error::LeaseNotFound(lease)));
        }
        self.leases_changed = true;
        let mut keys = Vec::new();
        for entry in self.lease_keys.range((lease.0, "")..)? {
            let (key, _) = entry?;
            let (owner, key) = key.value();
            if owner != lease.0 {
                break;
            }
            keys.push(key.to_owned());
        }
        let mut events = Vec::with_capacity(keys.len());
        for key in keys {
            self.delete(key, &mut events)?;
        }
        self.record(events)?;
        Ok(Ok(()))
    }

    /// Drops the history up to and including `up_to`.
    pub(super) fn compact(&mut self, up_to: Revision) -> Applied<()> {
        let current = self.counters.revision;
        if up_to > current {
            return Ok(Err(Error::FutureRevision { asked: up_to, current }));
        }
        if up_to > self.counters.compacted {
            self.history.retain_in((0, 0)..=(up_to, u32::MAX), |_, _| false)?;
            self.counters.compacted = up_to;
        }
        Ok(Ok(()))
    }

    fn read(&self, key: &str) -> Applied<Option<KeyValue>> {
        let Some(record) = self.keys.get(key)? else { return Ok(Ok(None)) };
        match decode_record(key, record.value(), false) {
            Some(kv) => Ok(Ok(Some(kv))),
            None => Ok(Err(Error::Corrupt { table: "keys", key: key.to_owned() })),
        }
    }

    fn delete(&mut self, key: String, events: &mut Vec<WatchEvent>) -> Result<(), redb::Error> {
        if self.remove(&key)?.is_some() {
            events.push(deleted(key, self.counters.revision + 1));
        }
        Ok(())
    }

    /// Removes a key's record, and the key from its lease. Returns the record without its value.
    fn remove(&mut self, key: &str) -> Result<Option<KeyValue>, redb::Error> {
        let removed = match self.keys.remove(key)? {
            None => return Ok(None),
            Some(record) => decode_record(key, record.value(), false),
        };
        let kv = removed.ok_or_else(|| redb::Error::Corrupted(format!("record {key:?} in table keys")))?;
        if let Some(lease) = kv.lease {
            self.lease_keys.remove((lease.0, key))?;
        }
        Ok(Some(kv))
    }

    /// Takes the next revision for the events, if there are any, and returns the current one.
    fn record(&mut self, events: Vec<WatchEvent>) -> Result<Revision, redb::Error> {
        if events.is_empty() {
            return Ok(self.counters.revision);
        }
        let revision = self.counters.revision + 1;
        let mut bytes = 0;
        for (index, event) in (0_u32..).zip(&events) {
            let record = encode_event(event);
            bytes += record.len();
            self.history.insert((revision, index), record.as_slice())?;
        }
        self.counters.revision = revision;
        self.changes.push(Change { revision, events, bytes });
        Ok(revision)
    }
}
