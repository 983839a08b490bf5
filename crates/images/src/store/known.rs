//! Where chunks and small files are that layers of the store have: by digest, from the layers' tables.
//!
//! The index holds eight bytes of each digest and the number of a table, so that it stays small; a hit loads the table
//! and looks for the whole digest. It is made when a partial pull first needs it, and grows with the tables.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::Inner;
use super::objects::{ObjectId, lock};
use super::table::{Content, Table};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Most digests that are kept: about 150 MB of memory. More chunks than that are fetched again.
const KNOWN_MAX: usize = 4_000_000;

/// The index of a store.
#[derive(Default)]
pub(super) struct Known {
    /// Names of the tables that were read.
    tables: Vec<String>,
    read: HashSet<String>,
    /// Number of a table by the digest's first bytes.
    digests: HashMap<u64, u32>,
}

/// Where something is.
#[derive(Clone, Debug)]
pub(super) enum Found {
    Object { object: ObjectId, object_size: u64, offset: u64 },
    Inline(Arc<[u8]>),
}

/// What is found, with the tables that were needed for it.
pub(super) struct Lookup<'a> {
    inner: &'a Inner,
    loaded: HashMap<u32, HashMap<ObjectId, (u64, Found)>>,
}

fn key(id: &ObjectId) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&id.0[..8]);
    u64::from_ne_bytes(bytes)
}

impl Inner {
    /// Brings the index up to date. Blocks.
    pub(super) fn known(&self) -> Result<Lookup<'_>> {
        let dir = self.dir.join("layers");
        let mut known = lock(&self.known);
        for entry in std::fs::read_dir(&dir).map_err(Error::io("reading", &dir))? {
            let name = entry.map_err(Error::io("reading", &dir))?.file_name();
            let Some(hex) = name.to_str().and_then(|name| name.strip_suffix(".toc")) else { continue };
            if known.read.contains(hex) {
                continue;
            }
            // A damaged table is as good as none.
            let Some(table) = diff_id(hex).map(|id| self.table(&id)).transpose()?.flatten() else { continue };
            let number = u32::try_from(known.tables.len()).unwrap_or(u32::MAX);
            known.tables.push(hex.to_owned());
            known.read.insert(hex.to_owned());
            each(&table, |id, _, _| {
                if known.digests.len() < KNOWN_MAX {
                    known.digests.entry(key(&id)).or_insert(number);
                }
            });
        }
        Ok(Lookup { inner: self, loaded: HashMap::new() })
    }
}

impl Lookup<'_> {
    /// Where the bytes with this digest are.
    pub(super) fn find(&mut self, id: &ObjectId, size: u64) -> Option<Found> {
        let number = *lock(&self.inner.known).digests.get(&key(id))?;
        let inner = self.inner;
        let of_table = self.loaded.entry(number).or_insert_with(|| {
            let hex = lock(&inner.known).tables.get(number as usize).cloned();
            let table = hex.and_then(|hex| diff_id(&hex)).and_then(|id| inner.table(&id).ok().flatten());
            let mut found = HashMap::new();
            if let Some(table) = table {
                each(&table, |id, size, make| {
                    found.entry(id).or_insert_with(|| (size, make()));
                });
            }
            found
        });
        of_table.get(id).filter(|(found, _)| *found == size).map(|(_, found)| found.clone())
    }
}

/// A layer's digest from the name of its table.
fn diff_id(hex: &str) -> Option<Digest> {
    let algorithm = if hex.len() == 128 { "sha512" } else { "sha256" };
    format!("{algorithm}:{hex}").parse().ok()
}

/// Every chunk and small file of a table: its digest, size, and where it is.
fn each(table: &Table, mut found: impl FnMut(ObjectId, u64, &dyn Fn() -> Found)) {
    for file in table.files() {
        match &file.content {
            Content::Inline(bytes) if !bytes.is_empty() => {
                found(file.id, file.size, &|| Found::Inline(bytes.as_slice().into()));
            }
            Content::Inline(_) => {}
            Content::Object(chunks) => {
                let mut offset = 0;
                for chunk in chunks {
                    let at = offset;
                    let (object, object_size) = (file.id, file.size);
                    found(chunk.id, chunk.size, &|| Found::Object { object, object_size, offset: at });
                    offset += chunk.size;
                }
            }
        }
    }
}
