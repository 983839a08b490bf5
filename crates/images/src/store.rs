//! The machine's image store: unpacked layers, ready for an overlay mount.
//!
//! Layout below the store's folder (mode 0700, since layers hold other people's setuid files):
//! - `layers/sha256/<diff id>/`: one unpacked layer, named by the digest of its uncompressed archive
//! - `blobs/sha256/<digest>`: manifests and configurations
//! - `images/<digest of the reference>.json`: which manifest a reference means here
//! - `tmp/`: work in progress; emptied when the store is opened
//! - `lock`: held by the process that has the store open
//!
//! Everything is made in `tmp`, synced, and renamed into place once it is complete and verified, so whatever has a
//! name is whole. The order is layers, blobs, image: an image that is listed can be mounted.

mod archive;
mod pull;
mod stream;
mod unpack;

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{self, ImageConfig, Manifest};
use crate::reference::Reference;

/// A name that starts with this deletes the rest of the name from the layers below.
pub(crate) const WHITEOUT_PREFIX: &str = ".wh.";
/// A file of this name hides all that the layers below have in its folder.
pub(crate) const OPAQUE_MARKER: &str = ".wh..wh..opq";
/// Overlayfs' own way to say the same.
pub(crate) const OPAQUE_XATTR: &str = "trusted.overlay.opaque";
/// mount(2) passes options in one page, with a closing zero byte.
const MOUNT_OPTIONS_MAX: usize = 4_095;

/// A machine's images on disk. Clones are the same store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    /// One lock for each layer that is being fetched, so that concurrent pulls join.
    fetching: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    _lock: Flock<File>,
}

/// An image in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulledImage {
    /// Digest that the reference meant: of a manifest, or of an index.
    pub digest: Digest,
    /// How to run it.
    pub config: ImageConfig,
    /// Unpacked layers, lowest first.
    pub layers: Vec<PathBuf>,
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

impl PulledImage {
    /// Options for mounting the image with overlayfs, below `upper` and with the work folder `work`.
    ///
    /// A layer that appears twice is given once (the upper one hides the lower one entirely), since the kernel
    /// refuses the same folder twice.
    pub fn overlay_options(&self, upper: &Path, work: &Path) -> Result<String> {
        let mut lower: Vec<String> = Vec::new();
        for layer in self.layers.iter().rev() {
            let layer = escape(layer)?;
            if !lower.contains(&layer) {
                lower.push(layer);
            }
        }
        let options =
            format!("lowerdir={},upperdir={},workdir={}", lower.join(":"), escape(upper)?, escape(work)?);
        if lower.is_empty() || options.len() > MOUNT_OPTIONS_MAX {
            return Err(Error::Unsupported {
                what: format!("an image with {} layers at this length of path", lower.len()),
                help: "build it with one layer to about 35 (`--squash`), or use a store with a shorter path"
                    .to_owned(),
            });
        }
        Ok(options)
    }
}

impl Store {
    /// Opens the store in `dir`, making it if it isn't there, and cleans what a crash left.
    pub fn open(dir: &Path) -> Result<Store> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(dir).map_err(Error::io("creating", dir))?;
        let private = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(dir, private).map_err(Error::io("protecting", dir))?;
        let lock_path = dir.join("lock");
        let file = File::create(&lock_path).map_err(Error::io("creating", &lock_path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| Error::StoreInUse { path: dir.to_owned() })?;
        for sub in ["layers/sha256", "blobs/sha256", "images", "tmp"] {
            let sub = dir.join(sub);
            builder.create(&sub).map_err(Error::io("creating", &sub))?;
        }
        let tmp = dir.join("tmp");
        for entry in std::fs::read_dir(&tmp).map_err(Error::io("reading", &tmp))? {
            let path = entry.map_err(Error::io("reading", &tmp))?.path();
            let removed = if path.is_dir() && !path.is_symlink() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            removed.map_err(Error::io("removing", &path))?;
        }
        let inner = Inner { dir: dir.to_owned(), fetching: Mutex::new(HashMap::new()), _lock: lock };
        Ok(Store { inner: Arc::new(inner) })
    }

    /// Whether the image is here, complete, under this name.
    pub fn has(&self, reference: &Reference) -> bool {
        matches!(self.find(reference), Ok(Some(_)))
    }

    /// The image of this name, if it is here and complete. Asks no registry.
    pub fn find(&self, reference: &Reference) -> Result<Option<PulledImage>> {
        let path = self.image_path(reference);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("reading", &path)(e)),
        };
        let image: StoredImage = manifest::parse("the store's record of an image", &bytes)?;
        let Some(manifest) = self.read_blob(&image.manifest)? else { return Ok(None) };
        let manifest: Manifest = manifest::parse("the manifest", &manifest)?;
        let Some(config) = self.read_blob(&manifest.config.digest)? else { return Ok(None) };
        let config: ImageConfig = manifest::parse("the image's configuration", &config)?;
        let layers: Vec<PathBuf> = config.rootfs.diff_ids.iter().map(|id| self.layer_path(id)).collect();
        if layers.iter().all(|layer| layer.is_dir()) {
            return Ok(Some(PulledImage { digest: image.digest, config, layers }));
        }
        Ok(None)
    }

    /// All images, by name.
    pub fn list(&self) -> Result<Vec<StoredImage>> {
        let dir = self.inner.dir.join("images");
        let mut images = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(Error::io("reading", &dir))? {
            let path = entry.map_err(Error::io("reading", &dir))?.path();
            let bytes = std::fs::read(&path).map_err(Error::io("reading", &path))?;
            images.push(manifest::parse("the store's record of an image", &bytes)?);
        }
        images.sort();
        Ok(images)
    }

    fn image_path(&self, reference: &Reference) -> PathBuf {
        let name = Digest::of(reference.canonical().to_string().as_bytes());
        self.inner.dir.join("images").join(format!("{}.json", name.hex()))
    }

    fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.inner.dir.join("layers").join(diff_id.algorithm()).join(diff_id.hex())
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.inner.dir.join("blobs").join(digest.algorithm()).join(digest.hex())
    }

    /// A blob of the store; none if it is missing or damaged, so that it is fetched again.
    fn read_blob(&self, digest: &Digest) -> Result<Option<Vec<u8>>> {
        let path = self.blob_path(digest);
        match std::fs::read(&path) {
            Ok(bytes) => Ok((Digest::of(&bytes) == *digest).then_some(bytes)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("reading", &path)(e)),
        }
    }

    /// Writes a whole file so that it is either there, synced and complete, or not at all.
    fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let tmp = self.inner.dir.join("tmp");
        let mut file =
            tempfile::NamedTempFile::new_in(&tmp).map_err(Error::io("creating a file in", &tmp))?;
        file.write_all(bytes).map_err(Error::io("writing", path))?;
        file.as_file().sync_all().map_err(Error::io("syncing", path))?;
        file.persist(path).map_err(|e| Error::io("writing", path)(e.error))?;
        sync_parent(path)
    }

    /// The lock of one layer: whoever holds it may fetch that layer.
    fn layer_lock(&self, diff_id: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut fetching = match self.inner.fetching.lock() {
            Ok(fetching) => fetching,
            // The map holds no invariant that a panic could break.
            Err(poisoned) => poisoned.into_inner(),
        };
        if let Some(lock) = fetching.get(diff_id).and_then(Weak::upgrade) {
            return lock;
        }
        fetching.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        fetching.insert(diff_id.clone(), Arc::downgrade(&lock));
        lock
    }
}

/// Makes a rename durable.
fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(Error::io("syncing", parent))
}

/// Overlayfs splits its options at commas and lower folders at colons, except after a backslash.
fn escape(path: &Path) -> Result<String> {
    let Ok(text) = std::str::from_utf8(path.as_os_str().as_bytes()) else {
        return Err(Error::Unsupported {
            what: format!("the path {}", path.display()),
            help: "use a path in UTF-8".to_owned(),
        });
    };
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '\\' | ':' | ',') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    Ok(escaped)
}

#[cfg(test)]
mod tests;
