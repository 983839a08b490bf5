//! A store's contents as a file: to back it up, and to move it to another engine.
//!
//! Lines of JSON:
//!
//! ```text
//! {"anyplace_store":1,"of":"global-scheduler","revision":17}
//! {"key":"deployments/hello","json":{...}}
//! {"key":"other","base64":"AAEC"}
//! {"entries":2,"sha256":"..."}
//! ```
//!
//! Values that are JSON are written as they are, byte for byte. The last line has the digest of all lines before, so that
//! half a file isn't taken for a whole one. Keys with a lease are left out: they say who is alive.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use crate::{Error, Result, Revision, Store, Txn, TxnOutcome};

const FORMAT: u32 = 1;
/// There while an import has begun and not ended. Nobody else may use the store.
const IMPORTING: &str = "importing";
/// Well below the limits of a transaction, whatever the last entry adds.
const BATCH_OPS: usize = 500;
const BATCH_BYTES: usize = 64 << 10;

#[derive(Serialize, Deserialize)]
struct Header {
    anyplace_store: u32,
    of: String,
    revision: Revision,
}

#[derive(Serialize, Deserialize)]
struct Entry<'a> {
    key: String,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    json: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct End {
    entries: usize,
    sha256: String,
}

/// Everything in the store at one revision. `of` names whose store it is.
///
/// # Errors
/// The store can't be read.
pub async fn export(store: &dyn Store, of: &str) -> Result<Vec<u8>> {
    let (kvs, revision) = store.list("").await?;
    let json = |source| Error::Json { key: "an export".to_owned(), source };
    let mut file = Vec::new();
    let mut line = |value: Vec<u8>| {
        file.extend_from_slice(&value);
        file.push(b'\n');
    };
    let header = Header { anyplace_store: FORMAT, of: of.to_owned(), revision };
    line(serde_json::to_vec(&header).map_err(json)?);
    let mut entries = 0;
    for kv in kvs.iter().filter(|kv| kv.lease.is_none()) {
        // A line end inside would be two lines of the file.
        let raw = serde_json::from_slice::<&RawValue>(&kv.value).ok();
        let raw = raw.filter(|raw| raw.get().len() == kv.value.len() && !kv.value.contains(&b'\n'));
        let base64 = raw.is_none().then(|| STANDARD.encode(&kv.value));
        line(serde_json::to_vec(&Entry { key: kv.key.clone(), json: raw, base64 }).map_err(json)?);
        entries += 1;
    }
    let end = End { entries, sha256: hex::encode(Sha256::digest(&file)) };
    serde_json::to_writer(&mut file, &end).map_err(json)?;
    file.push(b'\n');
    Ok(file)
}

/// Fills an empty store with what was exported; returns how many entries. Repeated after a failure, it begins anew.
///
/// # Errors
/// The file isn't a whole export of `of` ([`Error::Import`]), or the store has something else in it
/// ([`Error::NotEmpty`]): then nothing was written. Or the store fails: then nobody can open it until an import is done.
pub async fn import(store: &dyn Store, of: &str, file: &[u8]) -> Result<usize> {
    let entries = parse(file, of)?;
    let (there, _) = store.list("").await?;
    let begun = there.iter().find(|kv| kv.key == IMPORTING);
    if begun.is_none()
        && let Some(kv) = there.first()
    {
        return Err(Error::NotEmpty { key: kv.key.clone(), entries: there.len() });
    }
    let mark = Txn::new()
        .when_revision(IMPORTING, begun.map_or(0, |kv| kv.mod_revision))
        .put(IMPORTING, of.to_owned());
    let revision = committed(store.txn(mark).await?)?;
    let mut batch = Txn::new();
    for kv in there.iter().filter(|kv| kv.key != IMPORTING) {
        batch = flushed(store, batch.delete(&kv.key), revision, false).await?;
    }
    // Before the first of them is written again.
    batch = flushed(store, batch, revision, true).await?;
    for (key, value) in &entries {
        batch = flushed(store, batch.put(key, value.clone()), revision, false).await?;
    }
    flushed(store, batch, revision, true).await?;
    let (there, _) = store.list("").await?;
    let mut found = there.iter().filter(|kv| kv.key != IMPORTING).map(|kv| (&kv.key, &kv.value));
    if !found.by_ref().eq(&entries) {
        return Err(Error::ImportDisturbed);
    }
    committed(store.txn(Txn::new().when_revision(IMPORTING, revision).delete(IMPORTING)).await?)?;
    Ok(entries.len())
}

/// Refuses a store whose import hasn't ended.
pub(crate) async fn check_whole(store: &dyn Store) -> Result<()> {
    match store.get(IMPORTING).await? {
        Some(_) => Err(Error::Unfinished),
        None => Ok(()),
    }
}

/// Writes a batch that is full, or the last one.
async fn flushed(store: &dyn Store, batch: Txn, mark: Revision, last: bool) -> Result<Txn> {
    let full = batch.ops.len() >= BATCH_OPS || batch.size_bytes() >= BATCH_BYTES;
    if batch.ops.is_empty() || !(full || last) {
        return Ok(batch);
    }
    committed(store.txn(batch.when_revision(IMPORTING, mark)).await?)?;
    Ok(Txn::new())
}

fn committed(outcome: TxnOutcome) -> Result<Revision> {
    match outcome {
        TxnOutcome::Committed { revision } => Ok(revision),
        TxnOutcome::Conflict { .. } => Err(Error::ImportDisturbed),
    }
}

fn parse(file: &[u8], of: &str) -> Result<BTreeMap<String, Bytes>> {
    let wrong = |line: usize, reason: String| Error::Import { line, reason };
    let lines: Vec<&[u8]> = file.split_inclusive(|byte| *byte == b'\n').collect();
    let (Some((first, rest)), Some(last)) = (lines.split_first(), lines.last()) else {
        return Err(wrong(1, "the file is empty".to_owned()));
    };
    let header: Header = serde_json::from_slice(first)
        .map_err(|error| wrong(1, format!("this is no export of a store ({error})")))?;
    if header.anyplace_store != FORMAT {
        let reason = format!("the export has format {}, this program reads {FORMAT}", header.anyplace_store);
        return Err(wrong(1, format!("{reason}; use the version that wrote it")));
    }
    if header.of != of {
        return Err(wrong(1, format!("this is the store of a {}, not of a {of}", header.of)));
    }
    let end: End = serde_json::from_slice(last)
        .map_err(|_| wrong(lines.len(), "the file ends before its last line; export again".to_owned()))?;
    if hex::encode(Sha256::digest(&file[..file.len() - last.len()])) != end.sha256 {
        return Err(wrong(
            lines.len(),
            "the file was changed since it was exported; export again".to_owned(),
        ));
    }
    let mut entries = BTreeMap::new();
    for (index, line) in rest.iter().take(rest.len().saturating_sub(1)).enumerate() {
        let at = index + 2;
        let entry: Entry<'_> = serde_json::from_slice(line).map_err(|error| wrong(at, error.to_string()))?;
        let value = match (entry.json, entry.base64) {
            (Some(json), None) => Bytes::copy_from_slice(json.get().as_bytes()),
            (None, Some(text)) => {
                STANDARD.decode(text).map_err(|error| wrong(at, format!("base64: {error}")))?.into()
            }
            _ => return Err(wrong(at, "an entry has either json or base64".to_owned())),
        };
        if entries.insert(entry.key.clone(), value).is_some() {
            return Err(wrong(at, format!("the key {} is there twice", entry.key)));
        }
    }
    if entries.len() != end.entries {
        return Err(wrong(
            lines.len(),
            format!("{} entries were exported, {} are here", end.entries, entries.len()),
        ));
    }
    Ok(entries)
}
