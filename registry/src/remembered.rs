//! Manifests that were asked for lately, with their headers, so that most questions need no storage.
//!
//! What is remembered is what a key (a tag or a digest) of a repository meant when its object had a certain stamp, and
//! it counts only while the object still has that stamp. So in a folder it is exact, also when another process writes.
//! Where the store gives no stamps, it counts for [`UNSTAMPED_MAX`]; this process's own writes count at once.
//!
//! There are two generations. Whatever is asked for moves to the young one; when that is full, it becomes the old one
//! and the old one is forgotten.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyplace_images::Digest;
use axum::http::HeaderValue;
use axum::http::header::InvalidHeaderValue;
use bytes::Bytes;

use crate::conditions::entity_tag;
use crate::storage::Stamp;

/// Manifests in one generation.
const GENERATION_MAX: usize = 2_048;
/// Their bytes in one generation.
const GENERATION_MAX_BYTES: usize = 8 << 20;
/// Larger ones are read each time.
const MANIFEST_MAX_BYTES: usize = 512 << 10;
/// How long what was read counts where the store has no stamps.
const UNSTAMPED_MAX: Duration = Duration::from_secs(2);

/// A manifest, and what is said about it.
#[derive(Debug)]
pub(crate) struct Described {
    pub(crate) digest: Digest,
    pub(crate) bytes: Bytes,
    pub(crate) media_type: HeaderValue,
    pub(crate) length: HeaderValue,
    pub(crate) entity_tag: HeaderValue,
    pub(crate) content_digest: HeaderValue,
}

impl Described {
    /// # Errors
    /// The media type can't be sent as a header.
    pub(crate) fn new(
        digest: Digest,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Described, InvalidHeaderValue> {
        Ok(Described {
            media_type: HeaderValue::from_str(media_type)?,
            length: HeaderValue::from(bytes.len()),
            entity_tag: HeaderValue::from_str(&entity_tag(&digest))?,
            content_digest: HeaderValue::from_str(digest.as_str())?,
            digest,
            bytes,
        })
    }
}

#[derive(Clone)]
struct Entry {
    manifest: Arc<Described>,
    stamp: Stamp,
    read: Instant,
}

/// The manifests that are remembered, by repository and key.
#[derive(Default)]
pub(crate) struct Remembered {
    generations: Mutex<Generations>,
}

#[derive(Default)]
struct Generations {
    young: HashMap<String, Entry>,
    old: HashMap<String, Entry>,
    young_bytes: usize,
}

impl Remembered {
    /// What the key means, if its object still has this stamp.
    pub(crate) fn get(&self, repository: &str, key: &str, stamp: Stamp) -> Option<Arc<Described>> {
        let name = name(repository, key);
        let mut generations = self.lock();
        let entry = match generations.young.get(&name) {
            Some(entry) => entry.clone(),
            None => {
                let entry = generations.old.remove(&name)?;
                generations.insert(name.clone(), entry.clone());
                entry
            }
        };
        let counts = match stamp {
            Stamp::Absent => false,
            Stamp::File { .. } => entry.stamp == stamp,
            Stamp::Unknown => entry.read.elapsed() < UNSTAMPED_MAX,
        };
        if !counts {
            generations.remove(&name);
            return None;
        }
        Some(entry.manifest)
    }

    /// Remembers what the key means; the stamp must have been taken before it was read.
    pub(crate) fn put(&self, repository: &str, key: &str, stamp: Stamp, manifest: Arc<Described>) {
        if stamp == Stamp::Absent || manifest.bytes.len() > MANIFEST_MAX_BYTES {
            return;
        }
        let entry = Entry { manifest, stamp, read: Instant::now() };
        self.lock().insert(name(repository, key), entry);
    }

    /// Forgets what the key meant.
    pub(crate) fn forget(&self, repository: &str, key: &str) {
        self.lock().remove(&name(repository, key));
    }

    fn lock(&self) -> MutexGuard<'_, Generations> {
        // What is there was whole when it was put, whatever panicked since.
        self.generations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Generations {
    fn insert(&mut self, name: String, entry: Entry) {
        let bytes = entry.manifest.bytes.len();
        if self.young.len() >= GENERATION_MAX || self.young_bytes + bytes > GENERATION_MAX_BYTES {
            self.old = std::mem::take(&mut self.young);
            self.young_bytes = 0;
        }
        self.young_bytes += bytes;
        if let Some(before) = self.young.insert(name, entry) {
            self.young_bytes -= before.manifest.bytes.len();
        }
    }

    fn remove(&mut self, name: &str) {
        if let Some(before) = self.young.remove(name) {
            self.young_bytes -= before.manifest.bytes.len();
        }
        self.old.remove(name);
    }
}

/// A repository's name has no colon, so no two pairs have one name.
fn name(repository: &str, key: &str) -> String {
    let mut name = String::with_capacity(repository.len() + 1 + key.len());
    name.push_str(repository);
    name.push(':');
    name.push_str(key);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(text: &str, padding: usize) -> Arc<Described> {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(text.len() + padding, b' ');
        Arc::new(Described::new(Digest::of(&bytes), "a/b", bytes.into()).unwrap())
    }

    fn stamp(number: u64) -> Stamp {
        Stamp::File { number, changed_s: 1, changed_ns: 1 }
    }

    #[test]
    fn only_what_has_the_same_stamp_counts() {
        let remembered = Remembered::default();
        remembered.put("a", "t", stamp(1), described("one", 0));
        assert!(remembered.get("a", "u", stamp(1)).is_none());
        assert_eq!(remembered.get("a", "t", stamp(1)).unwrap().bytes, "one");
        assert!(remembered.get("a", "t", stamp(2)).is_none());
        // It was put twice: what came before doesn't come back.
        assert!(remembered.get("a", "t", stamp(1)).is_none());
        remembered.put("a", "t", stamp(1), described("one", 0));
        remembered.forget("a", "t");
        assert!(remembered.get("a", "t", stamp(1)).is_none());
        remembered.put("a", "t", Stamp::Absent, described("one", 0));
        assert!(remembered.get("a", "t", Stamp::Absent).is_none());
        remembered.put("a", "t", Stamp::Unknown, described("one", 0));
        assert!(remembered.get("a", "t", Stamp::Unknown).is_some());
    }

    #[test]
    fn it_stays_within_its_bounds_and_keeps_what_is_asked_for() {
        let remembered = Remembered::default();
        for number in 0..100_000 {
            remembered.put("a", &number.to_string(), stamp(1), described("x", 1_000));
            assert!(remembered.get("a", "0", stamp(1)).is_some());
        }
        let generations = remembered.lock();
        let bytes: usize = generations.young.values().map(|entry| entry.manifest.bytes.len()).sum();
        assert_eq!(bytes, generations.young_bytes);
        assert!(bytes <= GENERATION_MAX_BYTES && generations.young.len() <= GENERATION_MAX);
        assert!(generations.old.len() <= GENERATION_MAX);
        drop(generations);
        remembered.put("a", "large", stamp(1), described("x", MANIFEST_MAX_BYTES));
        assert!(remembered.get("a", "large", stamp(1)).is_none());
    }
}
