//! What happens when a store is opened: reading the records, and repairing what a crash left.

use std::collections::{BTreeMap, HashSet};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Mutex;
use std::time::SystemTime;

use super::objects::{ObjectId, lock};
use super::room::disk_bytes_below;
use super::{Inner, Listed, StoredImage};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest;

impl Inner {
    /// Reads the records. One that is damaged, or lacks a part, is removed: its image is fetched again.
    pub(super) fn load(&self) -> Result<()> {
        let dir = self.dir.join("images");
        let mut images = BTreeMap::new();
        for entry in std::fs::read_dir(&dir).map_err(Error::io("reading", &dir))? {
            let entry = entry.map_err(Error::io("reading", &dir))?;
            let path = entry.path();
            let bytes = std::fs::read(&path).map_err(Error::io("reading", &path))?;
            let image = manifest::parse::<StoredImage>("the store's record of an image", &bytes);
            let image = image.ok().filter(|image| {
                let key = image.reference.canonical().to_string();
                path == self.record_path(&key) && self.is_listed_whole(image)
            });
            let Some(image) = image else {
                tracing::warn!(record = %path.display(), "removing the record of an image that is not whole");
                std::fs::remove_file(&path).map_err(Error::io("removing", &path))?;
                continue;
            };
            let used = entry.metadata().and_then(|file| file.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            images.insert(image.reference.canonical().to_string(), Listed { image, used });
        }
        *lock(&self.images) = images;
        Ok(())
    }

    /// Whether all parts of an image are here; their contents are what [`super::Store::verify`] is for.
    fn is_listed_whole(&self, image: &StoredImage) -> bool {
        match self.documents(&image.manifest) {
            Ok(Some(documents)) => {
                documents.config.rootfs.diff_ids.iter().all(|id| self.table_path(id).is_file())
            }
            _ => false,
        }
    }

    /// After a crash: what no record refers to may be half written. Objects are hashed again, and kept where they are
    /// right, so that a pull that was cut off goes on where it was; the rest is small and goes.
    pub(super) fn recover(&self) -> Result<()> {
        let whole =
            self.referred(&lock(&self.images).values().map(|l| l.image.manifest.clone()).collect())?;
        let mut suspects = Vec::new();
        self.objects.each(
            |id, _| {
                if !whole.objects.contains(&id) {
                    suspects.push(id);
                }
                Ok(())
            },
            remove,
        )?;
        let wrong = self.check(&suspects)?;
        for id in &wrong {
            self.objects.discard(id)?;
        }
        self.remove_unreferred(&whole)?;
        tracing::info!(
            checked = suspects.len(),
            removed = wrong.len(),
            "repaired the image store after a crash"
        );
        self.writers.clean()
    }

    /// Hashes objects on all cores; returns those that are not what their name says.
    pub(super) fn check(&self, ids: &[ObjectId]) -> Result<Vec<ObjectId>> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let next = Mutex::new(ids.iter());
        let wrong = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let work = || -> Result<()> {
                loop {
                    let Some(id) = lock(&next).next() else { return Ok(()) };
                    match self.objects.is_right(id) {
                        Ok(true) => {}
                        // A disk that can't read it is as bad as wrong bytes.
                        Ok(false) => lock(&wrong).push(*id),
                        Err(error) => {
                            tracing::warn!(object = ?id, %error, "can't read an object");
                            lock(&wrong).push(*id);
                        }
                    }
                }
            };
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            running.into_iter().try_for_each(|thread| thread.join().map_err(|_| Error::Cancelled)?)
        })?;
        Ok(wrong.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Removes tables, mounts and documents that nothing refers to.
    pub(super) fn remove_unreferred(&self, referred: &Referred) -> Result<u64> {
        let mut freed = 0;
        let mut sweep = |sub: &str, keep: &dyn Fn(&str) -> bool| -> Result<()> {
            let dir = self.dir.join(sub);
            for entry in std::fs::read_dir(&dir).map_err(Error::io("reading", &dir))? {
                let entry = entry.map_err(Error::io("reading", &dir))?;
                if !entry.file_name().to_str().is_some_and(keep) {
                    freed += disk_bytes_below(&entry.path());
                    remove(&entry.path())?;
                }
            }
            Ok(())
        };
        let hexes = |set: &HashSet<Digest>| -> HashSet<String> {
            set.iter().map(|digest| digest.hex().to_owned()).collect()
        };
        let (layers, manifests) = (hexes(&referred.layers), hexes(&referred.manifests));
        let configs = hexes(&referred.configs);
        sweep("layers", &|name| name.strip_suffix(".toc").is_some_and(|hex| layers.contains(hex)))?;
        sweep("mounts", &|name| {
            let stem = name.strip_suffix(".erofs").or_else(|| name.strip_suffix(".tree"));
            stem.is_some_and(|hex| manifests.contains(hex))
        })?;
        for algorithm in ["sha256", "sha512"] {
            sweep(&format!("blobs/{algorithm}"), &|hex| manifests.contains(hex) || configs.contains(hex))?;
        }
        Ok(freed)
    }
}

/// What images refer to.
#[derive(Debug, Default)]
pub(super) struct Referred {
    pub(super) manifests: HashSet<Digest>,
    pub(super) configs: HashSet<Digest>,
    pub(super) layers: HashSet<Digest>,
    pub(super) objects: HashSet<ObjectId>,
    /// Images that lack a document or a table.
    pub(super) incomplete: HashSet<Digest>,
}

impl Inner {
    /// What the images of these manifests refer to. What is missing is left out.
    pub(super) fn referred(&self, manifests: &HashSet<Digest>) -> Result<Referred> {
        let mut referred = Referred::default();
        for digest in manifests {
            let Ok(Some(documents)) = self.documents(digest) else {
                referred.incomplete.insert(digest.clone());
                continue;
            };
            referred.manifests.insert(digest.clone());
            referred.configs.insert(documents.manifest.config.digest.clone());
            for diff_id in documents.config.rootfs.diff_ids {
                if referred.layers.contains(&diff_id) {
                    continue;
                }
                match self.table(&diff_id)? {
                    Some(table) => {
                        referred.objects.extend(table.objects().map(|file| file.id));
                        referred.layers.insert(diff_id);
                    }
                    None => drop(referred.incomplete.insert(digest.clone())),
                }
            }
        }
        Ok(referred)
    }
}

/// Removes all that is in a folder.
pub(super) fn empty(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(Error::io("reading", dir))? {
        remove(&entry.map_err(Error::io("reading", dir))?.path())?;
    }
    Ok(())
}

/// Removes a file or a whole folder, without following links.
pub(super) fn remove(path: &Path) -> Result<()> {
    let is_dir = std::fs::symlink_metadata(path).is_ok_and(|file| file.is_dir());
    let removed = if is_dir { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("removing", path)(e)),
        _ => Ok(()),
    }
}
