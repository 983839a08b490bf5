//! Room on a disk that is full; only where content is files.
//!
//! What the cache keeps may go at any time. So where a write finds the disk full, the cache gives some of it up, and the
//! write is tried once more.
//!
//! What frees room needs some itself: a collection's lease and markers, a deletion on its way to the trash. For that, the
//! file `reserve` has blocks that are nobody's, and gives them up bit by bit. While it lacks any, pushes are refused, so
//! that they don't take what is meant for deletions; they are taken back as soon as the disk has room.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::error::is_full;

/// What deletions have on a full disk: 128 markers, each in a folder of its own, take half a MiB, and the entry of a large
/// manifest in the trash may take more.
const RESERVE_BYTES: u64 = 4 << 20;
/// What is given up at once: room for dozens of small files.
const STEP_BYTES: u64 = 256 << 10;
/// What the cache is asked for at once, so that a large push doesn't ask for each of its chunks.
const ASKED_BYTES: u64 = 64 << 20;

/// Evicts so many bytes if it can, and says how many it did.
pub(crate) type Evict = Box<dyn Fn(u64) -> u64 + Send + Sync>;

/// Where room comes from.
pub(crate) struct Room {
    /// None: content is in a bucket.
    reserve: Option<PathBuf>,
    /// Whether nothing of the reserve is given up.
    whole: AtomicBool,
    changing: Mutex<()>,
    cache: OnceLock<Evict>,
}

impl Room {
    /// Blocking: room in a data folder.
    pub(super) fn in_folder(folder: &Path) -> Room {
        let (reserve, whole) = (Some(folder.join("reserve")), AtomicBool::new(false));
        let room = Room { reserve, whole, ..Room::elsewhere() };
        if let Err(error) = room.refill() {
            tracing::warn!(
                %error,
                folder = %folder.display(),
                "no room can be kept for deletions on a full disk; pushes wait: make the disk larger, or free some by \
                 `anyplace registry gc`"
            );
        }
        room
    }

    /// Where a bucket is never full.
    pub(crate) fn elsewhere() -> Room {
        let (whole, changing, cache) = (AtomicBool::new(true), Mutex::default(), OnceLock::new());
        Room { reserve: None, whole, changing, cache }
    }

    /// From now on, a cache on the same disk gives room.
    pub(super) fn ask(&self, cache: Evict) {
        let _ = self.cache.set(cache);
    }

    /// Blocking: does `work`; if the disk is full, once more after the cache gave some of it up.
    pub(crate) fn have<T>(&self, mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        match work() {
            Err(error) if is_full(&error) && self.evict() => work(),
            done => done,
        }
    }

    /// Blocking: says whether the cache gave up anything.
    pub(super) fn evict(&self) -> bool {
        self.cache.get().is_some_and(|evict| evict(ASKED_BYTES) > 0)
    }

    /// Blocking: gives up a part of the reserve; false if there is none left.
    pub(crate) fn give(&self) -> bool {
        let Some(path) = &self.reserve else { return false };
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let shrink = || -> io::Result<bool> {
            let file = OpenOptions::new().write(true).open(path)?;
            let len = file.metadata()?.len();
            if len == 0 {
                return Ok(false);
            }
            self.whole.store(false, Ordering::Release);
            file.set_len(len.saturating_sub(STEP_BYTES))?;
            // Some file systems have the blocks for others only then.
            file.sync_all()?;
            Ok(true)
        };
        shrink().unwrap_or_else(|error| {
            tracing::warn!(%error, path = %path.display(), "what is reserved for deletions can't be given up");
            false
        })
    }

    pub(super) fn is_whole(&self) -> bool {
        self.whole.load(Ordering::Acquire)
    }

    /// Blocking: takes back what was given up.
    pub(super) fn refill(&self) -> io::Result<()> {
        let Some(path) = &self.reserve else { return Ok(()) };
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else took it back meanwhile.
        if self.is_whole() {
            return Ok(());
        }
        let file = self.have(|| OpenOptions::new().write(true).create(true).truncate(false).open(path))?;
        let before = file.metadata()?.len();
        let taken = self.have(|| allocate(&file)).and_then(|()| file.sync_all());
        if taken.is_err() {
            // Blocks that it got before there were no more.
            file.set_len(before)?;
        }
        self.whole.store(taken.is_ok(), Ordering::Release);
        taken
    }
}

/// Gives the file its blocks.
fn allocate(file: &File) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, RESERVE_BYTES as i64) {
        // By bytes that no file system packs.
        Err(Errno::EOPNOTSUPP) => {
            let mut noise = vec![0; RESERVE_BYTES as usize];
            rand::fill(&mut noise[..]);
            file.write_all_at(&noise, 0)
        }
        done => done.map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_given_up_in_steps_and_taken_back() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let blocks = || std::fs::metadata(dir.path().join("reserve")).unwrap().blocks() * 512;
        let room = Room::in_folder(dir.path());
        assert!(room.is_whole() && blocks() >= RESERVE_BYTES, "{}", blocks());
        assert!(room.give() && !room.is_whole());
        assert!(blocks() <= RESERVE_BYTES - STEP_BYTES + 4_096, "{}", blocks());
        assert_eq!(std::iter::repeat_with(|| room.give()).take_while(|given| *given).count(), 15);
        room.refill().unwrap();
        assert!(room.is_whole() && blocks() >= RESERVE_BYTES, "{}", blocks());
        assert!(!Room::elsewhere().give());
    }

    #[test]
    fn what_finds_the_disk_full_is_tried_once_more_if_the_cache_gave_something() {
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        for (evicted, tries) in [(0, 1), (1, 2)] {
            let room = Room::elsewhere();
            room.ask(Box::new(move |_| evicted));
            let mut tried = 0;
            let outcome: io::Result<()> = room.have(|| {
                tried += 1;
                Err(full())
            });
            assert!(is_full(&outcome.unwrap_err()));
            assert_eq!(tried, tries);
        }
    }
}
