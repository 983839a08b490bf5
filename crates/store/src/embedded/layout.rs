//! Tables and records; see the table in [`super`].

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use redb::{Database, ReadableTable, TableDefinition};

use crate::{Error, EventKind, KeyValue, LeaseId, Result, Revision, WatchEvent};

pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
pub(super) const KEYS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("keys");
pub(super) const HISTORY: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("history");
pub(super) const LEASES: TableDefinition<'_, u64, u64> = TableDefinition::new("leases");
pub(super) const LEASE_KEYS: TableDefinition<'_, (u64, &str), ()> = TableDefinition::new("lease_keys");

pub(super) const META_REVISION: &str = "revision";
pub(super) const META_COMPACTED: &str = "compacted";
pub(super) const META_NEXT_LEASE: &str = "next_lease";
const META_LAYOUT: &str = "layout";

/// Number of this layout. A change that an older program would misread takes the next one.
const LAYOUT: u64 = 1;

const RECORD_HEADER_BYTES: usize = 32;
const PUT: u8 = 1;
const DELETE: u8 = 2;

/// The counters in `meta`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) revision: Revision,
    pub(super) compacted: Revision,
    pub(super) next_lease: u64,
}

/// What opening reads.
pub(super) struct Start {
    pub(super) revision: Revision,
    pub(super) counters: Counters,
    /// Bytes of history by revision, oldest first.
    pub(super) history: VecDeque<(Revision, usize)>,
    pub(super) leases: Vec<(LeaseId, Duration)>,
}

/// Checks the layout of an open file, or lays out a new one, and reads what the engine keeps in memory.
pub(super) fn prepare(db: &Database, path: &Path) -> Result<Start> {
    let failed = |source: redb::Error| Error::Open { path: path.to_owned(), source: Arc::new(source) };
    let found = check(db).map_err(failed)?;
    if let Some(found) = found.filter(|found| *found != LAYOUT) {
        return Err(Error::Layout { path: path.to_owned(), found, expected: LAYOUT });
    }
    create(db, found.is_none()).map_err(failed)
}

fn check(db: &Database) -> Result<Option<u64>, redb::Error> {
    let txn = db.begin_write()?;
    let found = txn.open_table(META)?.get(META_LAYOUT)?.map(|v| v.value());
    txn.abort()?;
    Ok(found)
}

fn create(db: &Database, new: bool) -> Result<Start, redb::Error> {
    let txn = db.begin_write()?;
    let start = {
        let mut meta = txn.open_table(META)?;
        if new {
            meta.insert(META_LAYOUT, LAYOUT)?;
            meta.insert(META_NEXT_LEASE, 1)?;
        }
        let number = |name| Ok::<_, redb::Error>(meta.get(name)?.map_or(0, |v| v.value()));
        let counters = Counters {
            revision: number(META_REVISION)?,
            compacted: number(META_COMPACTED)?,
            next_lease: number(META_NEXT_LEASE)?,
        };
        txn.open_table(KEYS)?;
        txn.open_table(LEASE_KEYS)?;
        let mut history: VecDeque<(Revision, usize)> = VecDeque::new();
        for entry in txn.open_table(HISTORY)?.iter()? {
            let (key, value) = entry?;
            let (revision, len) = (key.value().0, value.value().len());
            match history.back_mut() {
                Some((last, bytes)) if *last == revision => *bytes += len,
                _ => history.push_back((revision, len)),
            }
        }
        let mut leases = Vec::new();
        for entry in txn.open_table(LEASES)?.iter()? {
            let (id, ttl_ms) = entry?;
            leases.push((LeaseId(id.value()), Duration::from_millis(ttl_ms.value())));
        }
        Start { revision: counters.revision, counters, history, leases }
    };
    if new {
        txn.commit()?;
    } else {
        txn.abort()?;
    }
    Ok(start)
}

/// Writes the record of a key.
pub(super) fn encode_record(kv: &KeyValue) -> Vec<u8> {
    let mut record = Vec::with_capacity(RECORD_HEADER_BYTES + kv.value.len());
    put_record(kv, &mut record);
    record
}

fn put_record(kv: &KeyValue, out: &mut Vec<u8>) {
    let lease = kv.lease.map_or(0, |lease| lease.0);
    for number in [kv.create_revision, kv.mod_revision, kv.version, lease] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&kv.value);
}

/// Reads the record of a key; its value only where `with_value`.
pub(super) fn decode_record(key: &str, record: &[u8], with_value: bool) -> Option<KeyValue> {
    let (header, value) = record.split_at_checked(RECORD_HEADER_BYTES)?;
    let mut numbers = header.chunks_exact(8).map(|n| n.try_into().map(u64::from_le_bytes));
    let mut number = || numbers.next()?.ok();
    Some(KeyValue {
        key: key.to_owned(),
        create_revision: number()?,
        mod_revision: number()?,
        version: number()?,
        lease: number().map(|lease| (lease != 0).then_some(LeaseId(lease)))?,
        value: if with_value { Bytes::copy_from_slice(value) } else { Bytes::new() },
    })
}

/// Writes an event for the history.
pub(super) fn encode_event(event: &WatchEvent) -> Vec<u8> {
    let key = event.kv.key.as_bytes();
    let mut out = Vec::with_capacity(3 + key.len() + RECORD_HEADER_BYTES + event.kv.value.len());
    out.push(match event.kind {
        EventKind::Put => PUT,
        EventKind::Delete => DELETE,
    });
    // Keys are at most MAX_KEY_BYTES.
    out.extend_from_slice(&(key.len() as u16).to_le_bytes());
    out.extend_from_slice(key);
    if event.kind == EventKind::Put {
        put_record(&event.kv, &mut out);
    }
    out
}

/// Reads an event of the history, or nothing if its key is outside `prefix`. `Err` where it is damaged.
pub(super) fn decode_event(revision: Revision, bytes: &[u8], prefix: &str) -> Result<Option<WatchEvent>> {
    let damaged = || Error::Corrupt { table: "history", key: revision.to_string() };
    let parse = || {
        let (kind, rest) = bytes.split_first()?;
        let (len, rest) = rest.split_first_chunk::<2>()?;
        let (key, record) = rest.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
        Some((*kind, std::str::from_utf8(key).ok()?, record))
    };
    let (kind, key, record) = parse().ok_or_else(damaged)?;
    if !key.starts_with(prefix) {
        return Ok(None);
    }
    match kind {
        PUT => {
            let kv = decode_record(key, record, true).ok_or_else(damaged)?;
            Ok(Some(WatchEvent { revision, kind: EventKind::Put, kv, more: false }))
        }
        DELETE => Ok(Some(deleted(key.to_owned(), revision))),
        _ => Err(damaged()),
    }
}

/// The event of a key's deletion.
pub(super) fn deleted(key: String, revision: Revision) -> WatchEvent {
    let value = Bytes::new();
    let kv = KeyValue { key, value, create_revision: 0, mod_revision: revision, version: 0, lease: None };
    WatchEvent { revision, kind: EventKind::Delete, kv, more: false }
}
