//! Pieces of blobs on disk, within a budget.
//!
//! A blob is a sparse file; a piece that is not here is a hole in it. Which pieces are here is known in memory, and
//! after a restart by asking the file system for the holes. Neither has to be right: a piece is verified whenever it
//! is read, and a wrong one becomes a hole again.
//!
//! Eviction takes pieces, not blobs, in the order of arrival, and passes once over those that were read since (second
//! chance). So what many machines start from stays, and what was read once goes.
//!
//! All functions block.

mod incoming;

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyplace_images::Digest;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use super::counters::CacheCounters;
use super::layout::{Hash, Layout};
use super::memory::PieceKey;
use super::records::{Records, walk};
pub(crate) use incoming::Incoming;

/// The piece is in the file.
const HERE: u8 = 1;
/// It was read since it arrived, or since eviction passed over it.
const USED: u8 = 2;
/// It is in the queue of eviction.
const QUEUED: u8 = 4;
/// Part of the disk budget that small files may take: one in so many.
const RECORDS_PART: u64 = 8;
/// Of a full disk, so much is freed before a write is tried again.
const FREED_WHEN_FULL_BYTES: u64 = 64 << 20;

/// A blob of which pieces may be here.
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) layout: Layout,
    pub(crate) fingerprint: Hash,
    flags: Box<[AtomicU8]>,
    /// Held while the file's content or holes change.
    changing: Mutex<()>,
    dropped: AtomicBool,
}

impl Blob {
    fn new(digest: Digest, layout: Layout) -> Blob {
        let flags = layout.hashes.iter().map(|_| AtomicU8::new(0)).collect();
        let fingerprint = layout.fingerprint();
        Blob {
            digest,
            layout,
            fingerprint,
            flags,
            changing: Mutex::default(),
            dropped: AtomicBool::new(false),
        }
    }

    /// What the piece is called in memory.
    pub(crate) fn key(&self, index: u32) -> PieceKey {
        // Nobody asks for a piece after the last.
        (self.digest.clone(), self.layout.hashes.get(index as usize).copied().unwrap_or_default())
    }

    pub(crate) fn has(&self, index: u32) -> bool {
        self.flags.get(index as usize).is_some_and(|flags| flags.load(Ordering::Acquire) & HERE != 0)
    }

    /// Bytes of the pieces that are here.
    pub(crate) fn bytes_here(&self) -> u64 {
        (0..self.layout.count()).filter(|at| self.has(*at)).map(|at| self.layout.len(at) as u64).sum()
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The blobs on disk.
pub(crate) struct Pieces {
    root: PathBuf,
    /// Held as long as the process uses the folder.
    _lock: File,
    budget: u64,
    used: AtomicU64,
    /// Part of what is used: blobs that are being fetched whole, which can't be evicted.
    incoming: AtomicU64,
    blobs: Mutex<HashMap<Digest, Arc<Blob>>>,
    queue: Mutex<VecDeque<(Arc<Blob>, u32)>>,
    pub(crate) records: Records,
    counters: Arc<CacheCounters>,
    next: AtomicU64,
}

impl Pieces {
    /// Opens the folder, and forgets what was being fetched when the process ended.
    pub(crate) fn open(root: &Path, budget: u64, counters: Arc<CacheCounters>) -> io::Result<Arc<Pieces>> {
        let lock = File::create(root.join("lock"))?;
        lock.try_lock().map_err(|error| match error {
            std::fs::TryLockError::Error(error) => error,
            std::fs::TryLockError::WouldBlock => {
                io::Error::new(ErrorKind::ResourceBusy, "another process uses it; stop that first")
            }
        })?;
        let incoming = root.join("incoming");
        match std::fs::remove_dir_all(&incoming) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::create_dir_all(&incoming)?;
        std::fs::create_dir_all(root.join("data"))?;
        let records = Records::open(root.join("records"), incoming, budget / RECORDS_PART, counters.clone())?;
        let pieces = Pieces {
            root: root.to_owned(),
            _lock: lock,
            budget: budget - budget / RECORDS_PART,
            used: AtomicU64::default(),
            incoming: AtomicU64::default(),
            blobs: Mutex::default(),
            queue: Mutex::default(),
            records,
            counters,
            next: AtomicU64::default(),
        };
        pieces.load()?;
        // The budget may have been made smaller.
        pieces.make_room(0);
        Ok(Arc::new(pieces))
    }

    fn load(&self) -> io::Result<()> {
        let mut known = HashSet::new();
        for key in self.records.keys("pieces/") {
            let digest = digest_of(&key);
            let layout = self.records.get(&key).as_deref().and_then(Layout::decode);
            let (Some(digest), Some(layout)) = (digest, layout) else {
                self.records.remove(&key);
                continue;
            };
            let blob = Arc::new(Blob::new(digest.clone(), layout));
            let path = self.path(&digest);
            match File::open(&path) {
                Ok(file) => {
                    self.find_pieces(&blob, &file)?;
                    known.insert(path);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            self.blobs().insert(digest, blob);
        }
        let mut unknown = Vec::new();
        walk(&self.root.join("data"), &mut |path, _| {
            if !known.contains(path) {
                unknown.push(path.to_owned());
            }
        })?;
        unknown.iter().try_for_each(std::fs::remove_file)
    }

    /// Takes a piece for present where its file has no hole.
    fn find_pieces(&self, blob: &Arc<Blob>, file: &File) -> io::Result<()> {
        let mut position = 0;
        // A file system that can't tell, or a file that ends early: its last pieces are wrong, and found out when read.
        while let Ok(start) = lseek(file, position, Whence::SeekData) {
            let end = lseek(file, start, Whence::SeekHole)?;
            position = end;
            let (start, end) = (start.unsigned_abs(), end.unsigned_abs());
            for index in blob.layout.index_of(start)..blob.layout.count() {
                let range = blob.layout.range(index);
                if range.start >= end {
                    break;
                }
                if range.start >= start && range.end <= end {
                    self.used.fetch_add(range.end - range.start, Ordering::SeqCst);
                    self.mark(blob, index);
                }
            }
        }
        Ok(())
    }

    /// All blobs of which pieces may be here.
    pub(crate) fn all(&self) -> Vec<Arc<Blob>> {
        self.blobs().values().cloned().collect()
    }

    pub(crate) fn blob(&self, digest: &Digest) -> Option<Arc<Blob>> {
        self.blobs().get(digest).cloned()
    }

    /// Remembers how a blob is cut into pieces, unless that is known already.
    pub(crate) fn learn(&self, digest: &Digest, layout: Layout) -> Arc<Blob> {
        if let Some(blob) = self.blob(digest) {
            return blob;
        }
        self.record(digest, &layout);
        let new = Arc::new(Blob::new(digest.clone(), layout));
        self.blobs().entry(digest.clone()).or_insert(new).clone()
    }

    /// A piece, if it is here and right; it is read into `buffer`.
    pub(crate) fn read(&self, blob: &Arc<Blob>, index: u32, mut buffer: Vec<u8>) -> Option<Vec<u8>> {
        let flags = &blob.flags[index as usize];
        if flags.fetch_or(USED, Ordering::AcqRel) & HERE == 0 {
            return None;
        }
        let len = blob.layout.len(index);
        buffer.resize(len, 0);
        let read = File::open(self.path(&blob.digest))
            .and_then(|file| file.read_exact_at(&mut buffer, blob.layout.range(index).start));
        if read.is_ok() && blob.layout.is_right(index, &buffer) {
            return Some(buffer);
        }
        // One that was evicted meanwhile is not damaged.
        if self.make_hole(blob, index) {
            CacheCounters::one(&self.counters.disk_corrupt);
            let error = read.err().map(|error| error.to_string());
            tracing::warn!(digest = %blob.digest, index, error, "a piece on disk was damaged; it is fetched again");
        }
        None
    }

    /// Writes a verified piece, if there is room.
    pub(crate) fn write(&self, blob: &Arc<Blob>, index: u32, bytes: &[u8]) {
        let len = bytes.len() as u64;
        self.used.fetch_add(len, Ordering::SeqCst);
        let mut written = Ok(false);
        for attempt in 0..2 {
            if !self.make_room(if attempt == 0 { 0 } else { FREED_WHEN_FULL_BYTES }) {
                break;
            }
            written = self.try_write(blob, index, bytes);
            if !matches!(&written, Err(error) if is_full(error)) {
                break;
            }
            CacheCounters::one(&self.counters.disk_full);
        }
        match written {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(digest = %blob.digest, index, %error, "a piece can't be kept on disk");
            }
        }
        self.used.fetch_sub(len, Ordering::SeqCst);
    }

    /// Says whether the piece is here now and wasn't before.
    fn try_write(&self, blob: &Arc<Blob>, index: u32, bytes: &[u8]) -> io::Result<bool> {
        let _changing = blob.changing();
        if blob.dropped.load(Ordering::Acquire) || blob.has(index) {
            return Ok(false);
        }
        let path = self.path(&blob.digest);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
        if file.metadata()?.len() != blob.layout.size {
            file.set_len(blob.layout.size)?;
        }
        let range = blob.layout.range(index);
        if let Err(error) = file.write_all_at(bytes, range.start) {
            let _ = punch(&file, &range);
            return Err(error);
        }
        self.mark(blob, index);
        Ok(true)
    }

    fn mark(&self, blob: &Arc<Blob>, index: u32) {
        let before = blob.flags[index as usize].fetch_or(HERE | QUEUED, Ordering::AcqRel);
        if before & QUEUED == 0 {
            self.queue().push_back((blob.clone(), index));
        }
    }

    /// Says whether the piece was here.
    fn make_hole(&self, blob: &Arc<Blob>, index: u32) -> bool {
        let changing = blob.changing();
        if blob.flags[index as usize].fetch_and(!HERE, Ordering::AcqRel) & HERE == 0 {
            return false;
        }
        let range = blob.layout.range(index);
        self.used.fetch_sub(range.end - range.start, Ordering::SeqCst);
        let path = self.path(&blob.digest);
        let punched = OpenOptions::new().write(true).open(&path).and_then(|file| punch(&file, &range));
        drop(changing);
        if let Err(error) = punched
            && error.kind() != ErrorKind::NotFound
        {
            // A file system without holes, or a broken one: the room comes back with all of the blob.
            tracing::warn!(path = %path.display(), %error, "a piece can't be removed; its blob goes");
            self.forget(&blob.digest);
        }
        true
    }

    /// Evicts until the budget holds and `more` bytes were freed; false if the budget can't hold.
    fn make_room(&self, more: u64) -> bool {
        self.evict(more);
        self.used.load(Ordering::SeqCst) <= self.budget
    }

    /// The same, and says how many bytes it evicted.
    pub(crate) fn evict(&self, more: u64) -> u64 {
        let mut freed = 0;
        while freed < more || self.used.load(Ordering::SeqCst) > self.budget {
            let Some((blob, index)) = self.queue().pop_front() else { break };
            let flags = &blob.flags[index as usize];
            if flags.load(Ordering::Acquire) & (HERE | USED) == HERE | USED {
                flags.fetch_and(!USED, Ordering::AcqRel);
                self.queue().push_back((blob, index));
                continue;
            }
            flags.fetch_and(!QUEUED, Ordering::AcqRel);
            if self.make_hole(&blob, index) {
                CacheCounters::one(&self.counters.evicted_pieces);
                freed += blob.layout.len(index) as u64;
            }
        }
        freed
    }

    /// Forgets a blob and its pieces.
    pub(crate) fn forget(&self, digest: &Digest) {
        let Some(blob) = self.blobs().remove(digest) else { return };
        {
            let _changing = blob.changing();
            blob.dropped.store(true, Ordering::Release);
            for (index, flags) in (0..).zip(&blob.flags) {
                if flags.swap(0, Ordering::AcqRel) & HERE != 0 {
                    self.used.fetch_sub(blob.layout.len(index) as u64, Ordering::SeqCst);
                }
            }
            let path = self.path(digest);
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "a blob can't be removed from the cache");
            }
        }
        self.records.remove(&record_key(digest));
        self.queue().retain(|(other, _)| !Arc::ptr_eq(other, &blob));
    }

    /// Stores a small file; what has to go for it goes with all that depends on it.
    pub(crate) fn put_record(&self, key: &str, content: &[u8]) {
        match self.records.put(key, content) {
            Ok(gone) => gone.iter().filter_map(|key| digest_of(key)).for_each(|digest| self.forget(&digest)),
            Err(error) => {
                if is_full(&error) {
                    CacheCounters::one(&self.counters.disk_full);
                    self.make_room(FREED_WHEN_FULL_BYTES);
                }
                tracing::warn!(key, %error, "the cache can't keep a file");
            }
        }
    }

    fn record(&self, digest: &Digest, layout: &Layout) {
        self.put_record(&record_key(digest), &layout.encode());
    }

    /// Most bytes of pieces on disk.
    pub(crate) fn budget(&self) -> u64 {
        self.budget
    }

    /// Bytes of pieces on disk.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::SeqCst)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.root.join("data").join(digest.algorithm()).join(&hex[..2]).join(hex)
    }

    fn blobs(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Blob>>> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<(Arc<Blob>, u32)>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn punch(file: &File, range: &std::ops::Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let offset = i64::try_from(range.start).map_err(io::Error::other)?;
    let len = i64::try_from(range.end - range.start).map_err(io::Error::other)?;
    fallocate(file, flags, offset, len).map_err(io::Error::from)
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

fn record_key(digest: &Digest) -> String {
    format!("pieces/{}/{}/{}", digest.algorithm(), &digest.hex()[..2], digest.hex())
}

/// The digest that a list of pieces belongs to, by its key.
fn digest_of(key: &str) -> Option<Digest> {
    let mut parts = key.strip_prefix("pieces/")?.split('/');
    let (algorithm, hex) = (parts.next()?, parts.nth(1)?);
    format!("{algorithm}:{hex}").parse().ok()
}

#[cfg(test)]
mod tests;
