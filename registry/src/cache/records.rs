//! Small files of the cache, each sealed by a sha256 over its content: manifests, tags, lists of pieces.
//!
//! Keys are paths below `records/`:
//! - `pieces/<algorithm>/<2 digits>/<digest>`: how a blob is cut into pieces
//! - `repositories/<name>/_manifests/<algorithm>/<digest>`: a manifest with its media type
//! - `repositories/<name>/_tags/<tag>`: the digest that the upstream gave the tag
//! - `repositories/<name>/_blobs/<algorithm>/<digest>`: size of a blob of which an upstream said that the repository
//!   has it
//! - `repositories/<name>/_referrers/<algorithm>/<digest>`: the manifests that are about this one, as last seen
//!
//! A file is the seal, 32 bytes, and then the content. It is written under another name and renamed. Damaged ones
//! are removed and count as absent. Number and size are bounded; those that weren't used for longest go first
//! (second chance: one that was used since it came to the head of the queue goes to its end).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::counters::CacheCounters;
use super::layout::{Hash, hash};

/// Most files. Each takes about 250 bytes of memory.
const RECORDS_MAX: usize = 200_000;
/// What a file takes on disk at least.
const BLOCK_BYTES: u64 = 4_096;

#[derive(Default)]
struct Queue {
    /// Bytes on disk, and whether it was used.
    files: HashMap<Arc<str>, (u64, bool)>,
    order: VecDeque<Arc<str>>,
    bytes: u64,
}

/// The small files of a cache.
pub(crate) struct Records {
    root: PathBuf,
    incoming: PathBuf,
    bytes_max: u64,
    queue: Mutex<Queue>,
    counters: Arc<CacheCounters>,
    next: AtomicU64,
}

impl Records {
    /// Opens the folder; new files are first written in `incoming`.
    pub(crate) fn open(
        root: PathBuf,
        incoming: PathBuf,
        bytes_max: u64,
        counters: Arc<CacheCounters>,
    ) -> io::Result<Records> {
        std::fs::create_dir_all(&root)?;
        let mut queue = Queue::default();
        walk(&root, &mut |path, len| {
            if let Ok(key) = path.strip_prefix(&root)
                && let Some(key) = key.to_str()
            {
                queue.insert(key.into(), len);
            }
        })?;
        Ok(Records {
            root,
            incoming,
            bytes_max,
            queue: Mutex::new(queue),
            counters,
            next: AtomicU64::default(),
        })
    }

    /// Bytes on disk.
    pub(crate) fn used(&self) -> u64 {
        self.queue().bytes
    }

    /// All keys that begin so.
    pub(crate) fn keys(&self, prefix: &str) -> Vec<Arc<str>> {
        self.queue().files.keys().filter(|key| key.starts_with(prefix)).cloned().collect()
    }

    /// Blocking: the content, if it is there and undamaged.
    pub(crate) fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.queue().files.get_mut(key)?.1 = true;
        self.read(key)
    }

    /// Blocking: the same, but no use.
    pub(crate) fn look(&self, key: &str) -> Option<Vec<u8>> {
        let is_here = self.queue().files.contains_key(key);
        if is_here { self.read(key) } else { None }
    }

    fn read(&self, key: &str) -> Option<Vec<u8>> {
        let path = self.root.join(key);
        let damage = match std::fs::read(&path) {
            Ok(bytes) => match bytes.split_first_chunk::<{ size_of::<Hash>() }>() {
                Some((seal, content)) if *seal == hash(content) => return Some(content.to_vec()),
                _ => "its seal is wrong".to_owned(),
            },
            Err(error) => error.to_string(),
        };
        CacheCounters::one(&self.counters.disk_corrupt);
        tracing::warn!(path = %path.display(), damage, "removed a damaged file of the cache");
        self.remove(key);
        None
    }

    /// Blocking: stores a file, and gives the keys of those that had to go for it.
    pub(crate) fn put(&self, key: &str, content: &[u8]) -> io::Result<Vec<Arc<str>>> {
        let path = self.root.join(key);
        let new = self.incoming.join(format!("record-{}", self.next.fetch_add(1, Ordering::Relaxed)));
        let mut bytes = Vec::with_capacity(content.len() + size_of::<Hash>());
        bytes.extend_from_slice(&hash(content));
        bytes.extend_from_slice(content);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        if let Err(error) = std::fs::write(&new, &bytes).and_then(|()| std::fs::rename(&new, &path)) {
            let _ = std::fs::remove_file(&new);
            return Err(error);
        }
        let mut gone = Vec::new();
        {
            let mut queue = self.queue();
            queue.insert(key.into(), bytes.len() as u64);
            while (queue.bytes > self.bytes_max || queue.files.len() > RECORDS_MAX) && queue.files.len() > 1 {
                let Some(key) = queue.pop_unused() else { break };
                gone.push(key);
            }
        }
        for key in &gone {
            CacheCounters::one(&self.counters.evicted_records);
            let _ = std::fs::remove_file(self.root.join(&**key));
        }
        Ok(gone)
    }

    /// Blocking: removes a file, if it is there.
    pub(crate) fn remove(&self, key: &str) {
        self.queue().remove(key);
        let path = self.root.join(key);
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "a file of the cache can't be removed");
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn insert(&mut self, key: Arc<str>, len: u64) {
        let len = len.next_multiple_of(BLOCK_BYTES);
        self.bytes += len;
        match self.files.insert(key.clone(), (len, false)) {
            Some((before, _)) => self.bytes -= before,
            None => self.order.push_back(key),
        }
    }

    fn remove(&mut self, key: &str) {
        if let Some((len, _)) = self.files.remove(key) {
            self.bytes -= len;
            self.order.retain(|other| **other != *key);
        }
    }

    fn pop_unused(&mut self) -> Option<Arc<str>> {
        // Each is passed over once at most.
        for _ in 0..=2 * self.order.len() {
            let key = self.order.pop_front()?;
            match self.files.get_mut(&key) {
                Some((_, used)) if *used => {
                    *used = false;
                    self.order.push_back(key);
                }
                Some((len, _)) => {
                    self.bytes -= *len;
                    self.files.remove(&key);
                    return Some(key);
                }
                None => {}
            }
        }
        None
    }
}

/// Calls `found` with each file below `folder`, and its size.
pub(crate) fn walk(folder: &Path, found: &mut impl FnMut(&Path, u64)) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_dir() {
            walk(&entry.path(), found)?;
        } else {
            found(&entry.path(), meta.len());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(dir: &Path, bytes_max: u64) -> Records {
        std::fs::create_dir_all(dir.join("incoming")).unwrap();
        Records::open(dir.join("records"), dir.join("incoming"), bytes_max, Arc::default()).unwrap()
    }

    #[test]
    fn damaged_files_are_absent_and_unused_ones_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let four = records(dir.path(), 4 * BLOCK_BYTES);
        for key in ["a/1", "a/2", "b/3", "b/4"] {
            assert!(four.put(key, key.as_bytes()).unwrap().is_empty());
        }
        assert_eq!(four.get("a/1").unwrap(), b"a/1");
        let gone = four.put("c/5", b"x").unwrap();
        assert_eq!(gone, ["a/2".into()]);
        assert!(four.get("a/2").is_none() && !dir.path().join("records/a/2").exists());
        for position in 0..35 {
            four.put("b/3", b"b/3").unwrap();
            let path = dir.path().join("records/b/3");
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[position] ^= 0x10;
            std::fs::write(&path, bytes).unwrap();
            assert!(four.get("b/3").is_none() && !path.exists(), "{position}");
        }
        assert_eq!(four.counters.disk_corrupt.load(Ordering::Relaxed), 35);
        drop(four);
        let again = records(dir.path(), 4 * BLOCK_BYTES);
        let mut keys = again.keys("");
        keys.sort();
        assert_eq!(keys, ["a/1", "b/4", "c/5"].map(Arc::from));
        assert_eq!(again.queue().bytes, 3 * BLOCK_BYTES);
        assert_eq!(again.keys("b/"), [Arc::from("b/4")]);
        // Who only looks keeps nothing here.
        let before = again.queue().order.clone();
        assert_eq!(again.look(&before[0]).unwrap(), before[0].as_bytes());
        again.put("d/6", b"x").unwrap();
        assert_eq!(again.put("d/7", b"x").unwrap(), [before[0].clone()]);
    }
}
