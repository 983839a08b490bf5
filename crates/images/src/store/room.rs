//! Room for what pulls bring: the budget, what is free on the disk, and which images go for it.
//!
//! What pulls in progress have still to write counts as if it were there, so that pulls that run at once don't count on
//! the same room. A layer with a table of contents says before anything of it is fetched what it lacks here; of any other
//! only its compressed size is known, and the disk may get full in the middle: then images go and the pull goes on.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::image::Need;
use super::objects::{disk_bytes, lock};
use super::pull::{Pull, blocking};
use super::recover::remove;
use super::{Inner, Lane, PullClass, PulledImage};
use crate::client::RawManifest;
use crate::digest::Digest;
use crate::error::{Error, Result};

/// How long prewarming that had no room is refused by what it needed then: images that came meanwhile may share more.
const REMEMBER: Duration = Duration::from_secs(3_600);
/// More images than anybody wishes for.
const REMEMBERED_MAX: usize = 4_096;

/// What prewarming needed that had no room.
#[derive(Clone)]
pub(super) struct Refused {
    bytes: u64,
    at: Instant,
}

/// What one pull has still to write.
pub(super) struct Room {
    /// What all pulls have.
    all: Arc<AtomicU64>,
    mine: Mutex<Mine>,
}

#[derive(Default)]
struct Mine {
    left: u64,
    written: u64,
}

impl Room {
    pub(super) fn new(all: &Arc<AtomicU64>) -> Room {
        Room { all: all.clone(), mine: Mutex::default() }
    }

    /// Counts bytes that are about to be written.
    fn expect(&self, bytes: u64) {
        lock(&self.mine).left += bytes;
        self.all.fetch_add(bytes, Ordering::SeqCst);
    }

    /// Counts bytes that lie on the disk now, and expects so many fewer.
    fn settle(&self, written: u64, expected: u64) {
        let mut mine = lock(&self.mine);
        let expected = expected.min(mine.left);
        mine.left -= expected;
        mine.written += written;
        self.all.fetch_sub(expected, Ordering::SeqCst);
    }

    /// Expects nothing any more; returns how much is worth having free before another try: what was expected and didn't
    /// come, or as much as came, where nobody knew how much would.
    pub(super) fn end(&self) -> u64 {
        let mut mine = lock(&self.mine);
        let left = std::mem::take(&mut mine.left);
        self.all.fetch_sub(left, Ordering::SeqCst);
        left.max(mine.written)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.end();
    }
}

/// What one try of a layer has still to write, as a part of what its pull has.
pub(super) struct Expected {
    room: Arc<Room>,
    left: AtomicU64,
}

impl Expected {
    /// Counts bytes that lie on the disk now.
    pub(super) fn wrote(&self, bytes: u64) {
        self.room.settle(bytes, self.take(bytes));
    }

    /// Expects nothing any more: another try says itself what it has to write.
    pub(super) fn withdraw(&self) {
        self.room.settle(0, self.take(u64::MAX));
    }

    fn take(&self, bytes: u64) -> u64 {
        let taking = |left: u64| Some(left.saturating_sub(bytes));
        let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, taking);
        left.unwrap_or_else(|left| left).min(bytes)
    }
}

impl Pull {
    /// Pulls, and pulls again after images went where the disk was full in the middle.
    pub(super) async fn run_in_room(&self, digest: &Digest, raw: &RawManifest) -> Result<PulledImage> {
        let mut pulled = self.run(digest, raw).await;
        // Each time something went: what may go bounds how often.
        while matches!(pulled, Err(Error::DiskFull { .. })) && self.make_more_room().await? {
            pulled = self.run(digest, raw).await;
        }
        if pulled.is_ok() {
            // What it was to write is there now.
            self.room.end();
            if self.class == PullClass::Prewarm {
                // How much that is shows only now where layers have no table.
                pulled = self.make_room(0, &self.lane).await.and(pulled);
            }
        }
        if let Err(error @ (Error::NoRoom { .. } | Error::DiskFull { .. })) = &pulled {
            self.inner.refuse(&raw.digest, &self.room, matches!(error, Error::DiskFull { .. }));
        }
        pulled
    }

    /// Makes room for so many bytes of a layer, or of the image, with this lane.
    pub(super) async fn make_room(&self, bytes: u64, lane: &Arc<Lane>) -> Result<Arc<Expected>> {
        let (inner, room, class) = (self.inner.clone(), self.room.clone(), self.priority(lane).now());
        blocking(move || inner.make_room(&room, bytes, class)).await?;
        Ok(Arc::new(Expected { room: self.room.clone(), left: AtomicU64::new(bytes) }))
    }

    /// Makes room after the disk was full in the middle; false where nothing can go.
    async fn make_more_room(&self) -> Result<bool> {
        let (inner, room) = (self.inner.clone(), self.room.clone());
        let class = self.priority(&self.lane).now();
        blocking(move || inner.make_more_room(&room, class)).await
    }
}

impl Inner {
    /// Makes room for so many bytes more of a pull. Blocks.
    ///
    /// # Errors
    /// There is none, and nothing waits for the pull. Where something does it goes on: images in use may exceed the
    /// budget, and the disk itself says when it is full.
    pub(super) fn make_room(&self, room: &Room, bytes: u64, class: PullClass) -> Result<()> {
        room.expect(bytes);
        match self.evict(class)? {
            lacking_bytes if lacking_bytes > 0 && class == PullClass::Prewarm => {
                // The budget, or what is free on the disk: a larger budget mends only the one.
                let over = self.total()? + self.coming.load(Ordering::SeqCst);
                let budget_bytes = self.options.budget_bytes.filter(|budget| over > *budget);
                Err(Error::NoRoom { lacking_bytes, budget_bytes })
            }
            _ => Ok(()),
        }
    }

    /// Refuses prewarming at once that had no room a while ago, and has none still: else all that fits would be
    /// fetched each time. Blocks.
    pub(super) fn remembered(&self, manifest: &Digest) -> Result<()> {
        let known =
            lock(&self.refused).get(manifest).filter(|refused| refused.at.elapsed() < REMEMBER).cloned();
        match known {
            Some(refused) => self.make_room(&Room::new(&self.coming), refused.bytes, PullClass::Prewarm),
            None => Ok(()),
        }
    }

    /// Remembers what prewarming needed that had no room.
    pub(super) fn refuse(&self, manifest: &Digest, room: &Room, is_full: bool) {
        let mine = lock(&room.mine);
        let mut refused = lock(&self.refused);
        refused.retain(|_, refused| refused.at.elapsed() < REMEMBER);
        if refused.len() < REMEMBERED_MAX {
            // How much more than that the disk would have had to take nobody knows: each try asks for more than the last.
            let more = if is_full { mine.written / 4 + 1 } else { 0 };
            let bytes = mine.left + mine.written + more;
            refused.insert(manifest.clone(), Refused { bytes, at: Instant::now() });
        }
    }

    /// Makes room after the disk was full in the middle of a pull; false where nothing can go. Blocks.
    pub(super) fn make_more_room(&self, room: &Room, class: PullClass) -> Result<bool> {
        let wanted = room.end();
        if !self.evicting.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let _one = lock(&self.making_room);
        let mut freed = self.collect()? > 0;
        loop {
            let lacking = wanted.saturating_sub(self.free()?);
            if freed && lacking == 0 {
                return Ok(true);
            }
            if !self.let_go(self.leaving(class)?, lacking, class)? {
                return Ok(freed);
            }
            freed = true;
        }
    }

    /// Keeps the budget, and room on the disk for what is on its way, as far as images allow that nothing uses; says how
    /// many bytes it is over.
    pub(super) fn evict(&self, class: PullClass) -> Result<u64> {
        let _one = lock(&self.making_room);
        let mut lacking = self.lacking()?;
        if lacking == 0 || !self.evicting.load(Ordering::Relaxed) {
            return Ok(lacking);
        }
        // What no image needs goes first.
        self.collect()?;
        loop {
            lacking = self.lacking()?;
            if lacking == 0 {
                return Ok(0);
            }
            let leaving = self.leaving(class)?;
            if class == PullClass::Prewarm && lacking > leaving.iter().map(|(_, frees)| frees).sum() {
                // Else all would go, for nothing.
                return Ok(lacking);
            }
            if !self.let_go(leaving, lacking, class)? {
                tracing::warn!(
                    lacking,
                    ?class,
                    "the image store has no room for more: what is there is needed"
                );
                return Ok(lacking);
            }
        }
    }

    /// Takes images off the list, from the first on until so many bytes go, and then what nothing else has from the disk.
    /// Says whether any went. What is mounted of them goes here: while pulls write, `collect` leaves that.
    fn let_go(&self, leaving: Vec<(String, u64)>, lacking: u64, class: PullClass) -> Result<bool> {
        let (mut went, mut freed) = (false, 0);
        {
            let _gc = self.gc.write().unwrap_or_else(PoisonError::into_inner);
            for (key, frees) in leaving {
                if went && freed >= lacking {
                    break;
                }
                let manifest = lock(&self.images).get(&key).map(|listed| listed.image.manifest.clone());
                // Somebody may have begun to use it.
                let Some(manifest) = manifest.filter(|it| self.uses.need(it) <= may_go(class)) else {
                    continue;
                };
                tracing::info!(image = key, frees, lacking, "evicting the image that was used longest ago");
                self.forget(&key)?;
                if !self.is_listed(&manifest) {
                    remove(&self.mount_path(&manifest, self.mounter()?))?;
                }
                (went, freed) = (true, freed + frees);
            }
        }
        if went {
            self.collect()?;
        }
        Ok(went)
    }

    /// The images that may go for a pull of this class, those used longest ago first: idle ones, and then, where something
    /// waits for the pull, those that are kept warm. Each with the bytes that go when it and those before it are gone.
    fn leaving(&self, class: PullClass) -> Result<Vec<(String, u64)>> {
        let mut order: Vec<_> = {
            let images = lock(&self.images);
            let needs = images.iter().map(|(key, listed)| {
                let manifest = listed.image.manifest.clone();
                (self.uses.need(&manifest), listed.used, key.clone(), manifest)
            });
            needs.filter(|(need, ..)| *need <= may_go(class)).collect()
        };
        order.sort();
        // The last of its names counts.
        let last: HashMap<&Digest, usize> =
            order.iter().enumerate().map(|(at, (.., manifest))| (manifest, at)).collect();
        let roots: Vec<Digest> = self.roots().into_iter().collect();
        // Those that stay come after all others.
        let goes: Vec<usize> =
            roots.iter().map(|manifest| last.get(manifest).copied().unwrap_or(order.len())).collect();
        let mut frees = vec![0; order.len() + 1];
        for (bytes, of) in self.parts(&roots)?.values() {
            // A part goes with the last image that has it.
            frees[of.iter().map(|at| goes[*at]).max().unwrap_or(order.len())] += bytes;
        }
        Ok(order.into_iter().map(|(.., key, _)| key).zip(frees).collect())
    }

    /// Bytes that have to go before all that is on its way has room.
    fn lacking(&self) -> Result<u64> {
        let coming = self.coming.load(Ordering::SeqCst);
        let over = match self.options.budget_bytes {
            Some(budget) => (self.total()? + coming).saturating_sub(budget),
            None => 0,
        };
        Ok(over.max(coming.saturating_sub(self.free()?)))
    }

    /// Bytes that are free on the store's disk.
    fn free(&self) -> Result<u64> {
        let disk = nix::sys::statvfs::statvfs(&self.dir)
            .map_err(|e| Error::io("asking for the free space of", &self.dir)(e.into()))?;
        Ok(disk.blocks_available() * disk.fragment_size())
    }

    /// Bytes that everything in the store takes on the disk.
    pub(super) fn total(&self) -> Result<u64> {
        let mut total = self.objects.disk_bytes()?;
        let (mut trees, mut seen) = (lock(&self.trees), HashMap::new());
        for sub in ["layers", "mounts", "blobs/sha256", "blobs/sha512", "tmp"] {
            let dir = self.dir.join(sub);
            for entry in std::fs::read_dir(&dir).map_err(Error::io("reading", &dir))? {
                let path = entry.map_err(Error::io("reading", &dir))?.path();
                // An image's folder has as many files as the image, and never changes.
                if path.extension().is_some_and(|end| end == "tree") {
                    let bytes = trees.get(&path).copied().unwrap_or_else(|| disk_bytes_below(&path));
                    total += bytes;
                    seen.insert(path, bytes);
                } else {
                    total += disk_bytes_below(&path);
                }
            }
        }
        *trees = seen;
        Ok(total)
    }
}

/// What may be needed of an image that goes for a pull of this class.
fn may_go(class: PullClass) -> Need {
    if class == PullClass::Live { Need::Warm } else { Need::Idle }
}

/// Bytes that a file or a folder with all that is in it takes on the disk; 0 where it is gone.
pub(super) fn disk_bytes_below(path: &Path) -> u64 {
    let Ok(file) = std::fs::symlink_metadata(path) else { return 0 };
    let mut total = disk_bytes(&file);
    if file.is_dir() {
        // Each name of a file that has several counts its part.
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            total += match entry.metadata() {
                Ok(inner) if inner.is_dir() => disk_bytes_below(&entry.path()),
                Ok(inner) => disk_bytes(&inner) / inner.nlink().max(1),
                Err(_) => 0,
            };
        }
    }
    total
}
