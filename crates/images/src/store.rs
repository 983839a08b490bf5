//! The machine's image store: files by their content, shared by all images, and for each image what to mount.
//!
//! Layout below the store's folder (mode 0700, since objects are other people's setuid files):
//! - `objects/<2 hex>/<62 hex>`: one regular file's bytes, by sha256
//! - `layers/<diff id>.toc`: what a layer holds ([`table`]); files up to 1 KiB are in there
//! - `mounts/<manifest>.erofs`: metadata of all layers together; mounted, with `objects` as its contents. On a kernel
//!   that can't do that, `mounts/<manifest>.tree/` is a plain folder in its place
//! - `blobs/<algorithm>/<digest>`: manifests and configurations
//! - `images/<digest of the reference>.json`: which manifest a reference means here; its time is the last use
//! - `scrub.json`: how far everything was read again ([`scrub`])
//! - `tmp/`: work in progress; emptied when the store is opened
//! - `dirty`: there while something is written ([`dirty`])
//! - `lock`: held by the process that has the store open
//!
//! What a record in `images` refers to is whole and on the disk: it is written last, after a sync of everything, and
//! removed first. A pull is done before that sync is; a crash in between loses the record only.

mod archive;
mod assemble;
mod build;
mod chunked;
mod dirty;
mod entry;
mod gc;
mod governor;
mod image;
mod import;
mod inspect;
mod known;
mod objects;
mod plan;
mod pool;
mod pull;
mod recover;
mod resolve;
mod room;
mod scrub;
mod stream;
mod table;
mod verify;
mod work;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{self, ImageConfig, Manifest};
use crate::mount::Mounter;
use crate::reference::Reference;
use dirty::Writers;
pub use gc::Usage;
use governor::Governor;
use image::Uses;
pub use image::{PulledImage, WarmImage};
pub use inspect::{Diff, Inspected, InspectedLayer};
use known::Known;
use objects::{Objects, lock};
use pool::Pools;
pub use pool::PullClass;
pub use pull::{PullOptions, PullStats};
pub use scrub::{Scrub, Scrubbed};
use table::Table;
pub use verify::Verified;

/// A name that starts with this deletes the rest of the name from the layers below.
pub(crate) const WHITEOUT_PREFIX: &str = ".wh.";
/// A file of this name hides all that the layers below have in its folder.
pub(crate) const OPAQUE_MARKER: &str = ".wh..wh..opq";
/// Overlayfs' own way to say the same.
pub(crate) const OPAQUE_XATTR: &str = "trusted.overlay.opaque";

/// How a store is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Bytes that images may take on disk; the images that were used longest ago go when there are more, those that
    /// are kept warm after all others. Images in use stay, so it can be exceeded. No bound where it is none.
    pub budget_bytes: Option<u64>,
    /// Bytes a second that all prewarming together may fetch; no bound where it is none.
    pub prewarm_bytes_per_s: Option<u64>,
}

/// A machine's images on disk. Clones are the same store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    options: Options,
    objects: Arc<Objects>,
    writers: Arc<Writers>,
    pools: Pools,
    governor: Governor,
    mounter: OnceLock<Mounter>,
    /// By reference in its canonical form.
    images: Mutex<BTreeMap<String, Listed>>,
    uses: Arc<Uses>,
    /// What is being fetched, by digest of a manifest or of a layer's archive, so that concurrent pulls join.
    lanes: Mutex<HashMap<Digest, Weak<Lane>>>,
    tables: Mutex<HashMap<Digest, Weak<Table>>>,
    known: Mutex<Known>,
    /// Read by pulls that end, written by removals: what a pull counts on is pinned until its image is listed.
    gc: RwLock<()>,
    /// Changes when an image is no longer listed.
    removals: tokio::sync::watch::Sender<()>,
    /// What prewarming needs that had no room, by manifest.
    refused: Mutex<HashMap<Digest, room::Refused>>,
    /// Images that are listed, but not on the disk yet.
    settling: Arc<tokio::sync::watch::Sender<usize>>,
    /// Why an image isn't, the last one since that was asked for.
    unsettled: Mutex<Option<Error>>,
    evicting: AtomicBool,
    scrub: Mutex<Scrub>,
    /// One at a time makes room.
    making_room: Mutex<()>,
    /// Bytes that pulls have still to write.
    coming: Arc<AtomicU64>,
    /// Bytes that images' folders take, where images are mounted as such.
    trees: Mutex<HashMap<PathBuf, u64>>,
    _lock: Flock<File>,
}

/// One at a time fetches; the others wait.
struct Lane {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Something live waits, so prewarming must not take its time.
    urgent: AtomicBool,
}

/// A line of [`Store::list`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StoredImage {
    /// Name that it was pulled by, with its tag.
    pub reference: Reference,
    /// Digest that the name meant.
    pub digest: Digest,
    /// Digest of the manifest for this machine's platform.
    pub manifest: Digest,
}

#[derive(Clone, Debug)]
struct Listed {
    image: StoredImage,
    used: SystemTime,
}

/// The documents of an image.
struct Documents {
    manifest: Manifest,
    config: ImageConfig,
}

impl Store {
    /// Opens the store in `dir`, making it if it isn't there, and repairs what a crash left.
    ///
    /// Nothing is evicted before [`Store::start_evicting`]: whoever has instances that run says so first
    /// ([`Store::hold`]).
    pub fn open(dir: &Path, options: Options) -> Result<Store> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(dir).map_err(Error::io("creating", dir))?;
        let private = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(dir, private).map_err(Error::io("protecting", dir))?;
        let lock_path = dir.join("lock");
        let file = File::create(&lock_path).map_err(Error::io("creating", &lock_path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| Error::StoreInUse { path: dir.to_owned() })?;
        for sub in ["layers", "blobs/sha256", "blobs/sha512", "images", "mounts", "objects", "tmp"] {
            let sub = dir.join(sub);
            builder.create(&sub).map_err(Error::io("creating", &sub))?;
        }
        let tmp = dir.join("tmp");
        recover::empty(&tmp)?;
        let inner = Inner {
            options,
            objects: Arc::new(Objects::open(&dir.join("objects"), &tmp)?),
            writers: Writers::new(dir),
            pools: Pools::default(),
            governor: Governor::new(options.prewarm_bytes_per_s),
            mounter: OnceLock::new(),
            images: Mutex::new(BTreeMap::new()),
            uses: Arc::default(),
            lanes: Mutex::new(HashMap::new()),
            tables: Mutex::new(HashMap::new()),
            known: Mutex::default(),
            gc: RwLock::new(()),
            removals: tokio::sync::watch::Sender::new(()),
            refused: Mutex::default(),
            settling: Arc::new(tokio::sync::watch::Sender::new(0)),
            unsettled: Mutex::default(),
            evicting: AtomicBool::new(false),
            scrub: Mutex::default(),
            making_room: Mutex::default(),
            coming: Arc::default(),
            trees: Mutex::default(),
            dir: dir.to_owned(),
            _lock: lock,
        };
        inner.load()?;
        inner.load_scrub();
        if inner.writers.is_dirty() {
            inner.recover()?;
        }
        Ok(Store { inner: Arc::new(inner) })
    }

    /// Whether the image is here, complete, under this name.
    pub fn has(&self, reference: &Reference) -> bool {
        matches!(self.find(reference), Ok(Some(_)))
    }

    /// The image of this name, if it is here and complete. Asks no registry.
    pub fn find(&self, reference: &Reference) -> Result<Option<PulledImage>> {
        let key = reference.canonical().to_string();
        // Nothing is removed between the look and the hold.
        let _gc = self.inner.gc.read().unwrap_or_else(PoisonError::into_inner);
        let Some(listed) = lock(&self.inner.images).get(&key).map(|listed| listed.image.clone()) else {
            return Ok(None);
        };
        self.inner.image(&listed.digest, &listed.manifest)
    }

    /// All images, by name.
    pub fn list(&self) -> Result<Vec<StoredImage>> {
        let mut images: Vec<_> =
            lock(&self.inner.images).values().map(|listed| listed.image.clone()).collect();
        images.sort();
        Ok(images)
    }

    /// The image of a manifest, listed or not, for an instance that has been running since before the store was
    /// opened: it stays as long as what is returned. None if it is gone.
    pub fn hold(&self, manifest: &Digest) -> Result<Option<PulledImage>> {
        self.inner.image(manifest, manifest)
    }

    /// From now on images may be evicted: every one in use is held.
    pub fn start_evicting(&self) {
        self.inner.evicting.store(true, Ordering::Relaxed);
    }

    /// Waits until all images that are listed are on the disk.
    ///
    /// # Errors
    /// One that was listed since the last call isn't, and no longer is listed.
    pub async fn settle(&self) -> Result<()> {
        // The sender lives as long as the store.
        let _ = self.inner.settling.subscribe().wait_for(|count| *count == 0).await;
        lock(&self.inner.unsettled).take().map_or(Ok(()), Err)
    }
}

impl Inner {
    fn record_path(&self, reference: &str) -> PathBuf {
        self.dir.join("images").join(format!("{}.json", Digest::of(reference.as_bytes()).hex()))
    }

    fn table_path(&self, diff_id: &Digest) -> PathBuf {
        self.dir.join("layers").join(format!("{}.toc", diff_id.hex()))
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs").join(digest.algorithm()).join(digest.hex())
    }

    /// A blob of the store; none if it is missing or damaged, so that it is fetched again.
    fn read_blob(&self, digest: &Digest) -> Result<Option<Vec<u8>>> {
        let path = self.blob_path(digest);
        match std::fs::read(&path) {
            Ok(bytes) => Ok((digest.same_of(&bytes) == *digest).then_some(bytes)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("reading", &path)(e)),
        }
    }

    /// Manifest and configuration of an image; none where either is missing or damaged.
    fn documents(&self, manifest: &Digest) -> Result<Option<Documents>> {
        let Some(manifest) = self.read_blob(manifest)? else { return Ok(None) };
        let manifest: Manifest = manifest::parse("the manifest", &manifest)?;
        let Some(config) = self.read_blob(&manifest.config.digest)? else { return Ok(None) };
        let config = manifest::parse("the image's configuration", &config)?;
        Ok(Some(Documents { manifest, config }))
    }

    /// A layer's table; none where it is missing or damaged.
    fn table(&self, diff_id: &Digest) -> Result<Option<Arc<Table>>> {
        if let Some(table) = lock(&self.tables).get(diff_id).and_then(Weak::upgrade) {
            return Ok(Some(table));
        }
        let Some(table) = Table::read(&self.table_path(diff_id))?.map(Arc::new) else { return Ok(None) };
        self.remember(diff_id, &table);
        Ok(Some(table))
    }

    fn remember(&self, diff_id: &Digest, table: &Arc<Table>) {
        let mut tables = lock(&self.tables);
        tables.retain(|_, table| table.strong_count() > 0);
        tables.insert(diff_id.clone(), Arc::downgrade(table));
    }

    /// Writes a whole file so that it is either there, synced and complete, or not at all.
    fn write_durably(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let tmp = self.dir.join("tmp");
        let mut file =
            tempfile::NamedTempFile::new_in(&tmp).map_err(Error::io("creating a file in", &tmp))?;
        file.write_all(bytes).map_err(Error::io("writing", path))?;
        file.as_file().sync_all().map_err(Error::io("syncing", path))?;
        file.persist(path).map_err(|e| Error::io("writing", path)(e.error))?;
        dirty::sync_dir(path.parent().unwrap_or(Path::new("/")))
    }

    /// Writes a whole file so that this process never sees a part of it; a sync of everything comes later.
    fn write_whole(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let tmp = self.dir.join("tmp");
        let mut file =
            tempfile::NamedTempFile::new_in(&tmp).map_err(Error::io("creating a file in", &tmp))?;
        file.write_all(bytes).map_err(Error::io("writing", path))?;
        file.persist(path).map(drop).map_err(|e| Error::io("writing", path)(e.error))
    }

    /// Where whoever wants to fetch this waits for its turn.
    fn lane(&self, digest: &Digest) -> Arc<Lane> {
        let mut lanes = lock(&self.lanes);
        if let Some(lane) = lanes.get(digest).and_then(Weak::upgrade) {
            return lane;
        }
        lanes.retain(|_, lane| lane.strong_count() > 0);
        let lane = Arc::new(Lane { turn: Arc::default(), urgent: AtomicBool::new(false) });
        lanes.insert(digest.clone(), Arc::downgrade(&lane));
        lane
    }

    /// How this machine mounts images.
    fn mounter(&self) -> Result<&Mounter> {
        if let Some(mounter) = self.mounter.get() {
            return Ok(mounter);
        }
        let found = Mounter::probe(&self.dir.join("tmp"))?;
        if let Mounter::Folders { reason } = &found {
            tracing::warn!(
                reason,
                "images become plain folders, which takes longer and shares no page cache"
            );
        }
        Ok(self.mounter.get_or_init(|| found))
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
