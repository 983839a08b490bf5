//! Reads from redb's snapshots.
//!
//! What outlives the function that began the snapshot is read by redb's `..._owned` methods, which keep the snapshot:
//! the guards of its plain `get` and `range` don't, and their pages may be written to once the snapshot has ended.

use std::collections::VecDeque;

use redb::{Database, ReadableDatabase};

use super::layout::{HISTORY, KEYS, META, META_COMPACTED, META_REVISION, decode_event, decode_record};
use crate::{Error, KeyValue, Result, Revision, WatchEvent};

/// History entries looked at in one go, so that a watcher that resumes holds little in memory.
const PAGE_ENTRIES: usize = 512;

/// Runs a read that may take long beside the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    // Fails only if the read panicked or the runtime is shutting down.
    tokio::task::spawn_blocking(read).await.map_err(|_| Error::Closed)?
}

pub(super) fn get(db: &Database, key: &str) -> Result<Option<KeyValue>> {
    let record = || -> Result<_, redb::Error> { Ok(db.begin_read()?.open_table(KEYS)?.get_owned(key)?) };
    record()?.map(|record| record_of(key, record.value())).transpose()
}

pub(super) fn list(db: &Database, prefix: &str) -> Result<(Vec<KeyValue>, Revision)> {
    let snapshot = || -> Result<_, redb::Error> {
        let txn = db.begin_read()?;
        let revision = txn.open_table(META)?.get(META_REVISION)?.map_or(0, |v| v.value());
        Ok((txn.open_table(KEYS)?.range_owned(prefix..)?, revision))
    };
    let (range, revision) = snapshot()?;
    let mut found = Vec::new();
    for entry in range {
        let (key, record) = entry.map_err(redb::Error::from)?;
        if !key.value().starts_with(prefix) {
            break;
        }
        found.push(record_of(key.value(), record.value())?);
    }
    Ok((found, revision))
}

fn record_of(key: &str, record: &[u8]) -> Result<KeyValue> {
    decode_record(key, record, true).ok_or_else(|| Error::Corrupt { table: "keys", key: key.to_owned() })
}

/// A part of the history.
pub(super) struct Page {
    pub(super) events: VecDeque<WatchEvent>,
    /// Everything up to here was looked at.
    pub(super) seen: Revision,
}

/// Events under `prefix` of the revisions in (`from`, `up_to`], from the oldest; whole revisions, at least one where
/// there is one.
pub(super) fn history(db: &Database, prefix: &str, from: Revision, up_to: Revision) -> Result<Page> {
    let snapshot = || -> Result<_, redb::Error> {
        let txn = db.begin_read()?;
        let meta = txn.open_table(META)?;
        let number = |name| Ok::<_, redb::Error>(meta.get(name)?.map_or(0, |v| v.value()));
        let (current, compacted) = (number(META_REVISION)?, number(META_COMPACTED)?);
        let range = txn.open_table(HISTORY)?.range_owned((from.saturating_add(1), 0)..)?;
        Ok((current, compacted, range))
    };
    let (current, compacted, range) = snapshot()?;
    if from > current {
        return Err(Error::FutureRevision { asked: from, current });
    }
    if from < compacted {
        return Err(Error::Compacted { oldest: compacted });
    }
    let mut page = Page { events: VecDeque::new(), seen: from };
    for (count, entry) in range.enumerate() {
        let (key, value) = entry.map_err(redb::Error::from)?;
        let (revision, _) = key.value();
        if revision > up_to {
            break;
        }
        if revision != page.seen && count >= PAGE_ENTRIES {
            return Ok(page);
        }
        page.seen = revision;
        if let Some(event) = decode_event(revision, value.value(), prefix)? {
            if let Some(last) = page.events.back_mut() {
                last.more = last.revision == revision;
            }
            page.events.push_back(event);
        }
    }
    page.seen = page.seen.max(up_to);
    Ok(page)
}
