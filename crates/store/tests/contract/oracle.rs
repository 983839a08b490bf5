//! What a store should do, in the simplest form: maps and a log, no engine, no concurrency.

use std::collections::BTreeMap;

use anyplace_store::{Compare, EventKind, KeyValue, LeaseId, Op, Revision, Txn, TxnOutcome, WatchEvent};
use bytes::Bytes;

#[derive(Clone)]
pub(crate) struct Oracle {
    pub(crate) revision: Revision,
    pub(crate) compacted: Revision,
    pub(crate) keys: BTreeMap<String, KeyValue>,
    pub(crate) log: Vec<WatchEvent>,
}

impl Oracle {
    pub(crate) fn new(revision: Revision) -> Self {
        Self { revision, compacted: 0, keys: BTreeMap::new(), log: Vec::new() }
    }

    pub(crate) fn list(&self, prefix: &str) -> Vec<KeyValue> {
        self.keys.values().filter(|kv| kv.key.starts_with(prefix)).cloned().collect()
    }

    /// First key whose condition does not hold.
    pub(crate) fn conflict(&self, txn: &Txn) -> Option<String> {
        let failed = txn.compares.iter().find(|compare| match compare {
            Compare::ModRevision(key, 0) => self.keys.contains_key(key),
            Compare::ModRevision(key, wanted) => {
                self.keys.get(key).is_none_or(|kv| kv.mod_revision != *wanted)
            }
            Compare::Exists(key) => !self.keys.contains_key(key),
        });
        failed.map(|compare| compare.key().to_owned())
    }

    pub(crate) fn txn(&mut self, txn: &Txn) -> TxnOutcome {
        if let Some(key) = self.conflict(txn) {
            return TxnOutcome::Conflict { revision: self.revision, key };
        }
        let revision = self.revision + 1;
        let mut events = Vec::new();
        for op in &txn.ops {
            match op {
                Op::Put { key, value, lease } => {
                    let old = self.keys.get(key);
                    let kv = KeyValue {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision: old.map_or(revision, |kv| kv.create_revision),
                        mod_revision: revision,
                        version: old.map_or(0, |kv| kv.version) + 1,
                        lease: *lease,
                    };
                    self.keys.insert(key.clone(), kv.clone());
                    events.push(WatchEvent { revision, kind: EventKind::Put, kv, more: false });
                }
                Op::Delete { key } => events.extend(self.remove(|kv| kv.key == *key)),
                Op::DeletePrefix { prefix } => events.extend(self.remove(|kv| kv.key.starts_with(prefix))),
            }
        }
        self.commit(events);
        TxnOutcome::Committed { revision: self.revision }
    }

    pub(crate) fn revoke(&mut self, lease: LeaseId) {
        let events = self.remove(|kv| kv.lease == Some(lease));
        self.commit(events);
    }

    /// Events that a watch of `prefix` delivers after `from`.
    pub(crate) fn events(&self, prefix: &str, from: Revision) -> Vec<WatchEvent> {
        let wanted = |event: &&WatchEvent| event.revision > from && event.kv.key.starts_with(prefix);
        let mut events: Vec<_> = self.log.iter().filter(wanted).cloned().collect();
        for n in 1..events.len() {
            events[n - 1].more = events[n - 1].revision == events[n].revision;
        }
        events
    }

    fn remove(&mut self, which: impl Fn(&KeyValue) -> bool) -> Vec<WatchEvent> {
        let revision = self.revision + 1;
        let doomed: Vec<String> =
            self.keys.values().filter(|kv| which(kv)).map(|kv| kv.key.clone()).collect();
        let event = |key: String| {
            self.keys.remove(&key);
            let kv = KeyValue {
                key,
                value: Bytes::new(),
                create_revision: 0,
                mod_revision: revision,
                version: 0,
                lease: None,
            };
            WatchEvent { revision, kind: EventKind::Delete, kv, more: false }
        };
        doomed.into_iter().map(event).collect()
    }

    fn commit(&mut self, events: Vec<WatchEvent>) {
        if !events.is_empty() {
            self.revision += 1;
            self.log.extend(events);
        }
    }
}
