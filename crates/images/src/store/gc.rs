//! What goes: what no image refers to, and images that are removed. Which images go for others says [`super::room`].
//!
//! Records go before what they refer to. What a pull in progress counts on is pinned; what an instance uses is held.

use std::collections::HashSet;
use std::fs::FileTimes;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use super::dirty::sync_dir;
use super::image::Need;
use super::objects::lock;
use super::recover::remove;
use super::room::disk_bytes_below;
use super::{Inner, PulledImage, Store, StoredImage};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::Reference;

/// A use is written down at most this often: the order of eviction needs no more.
const TOUCH_EVERY: Duration = Duration::from_secs(60);

/// What an image takes on disk.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    /// Which image.
    pub image: StoredImage,
    /// Bytes that its files, tables and metadata take there: holes take none.
    pub bytes: u64,
    /// Of these, bytes that go when it is removed.
    pub unique_bytes: u64,
    /// Of these, bytes that other images share.
    pub shared_bytes: u64,
    /// Whether something uses it, or wants it warm.
    pub in_use: bool,
    /// Seconds since 1970 of its last use.
    pub used_s: u64,
}

impl Store {
    /// Removes an image's name, and what no other image needs. An image in use is refused.
    ///
    /// Returns how many bytes that freed. Blocks.
    pub fn remove(&self, reference: &Reference) -> Result<u64> {
        let inner = &self.inner;
        let key = reference.canonical().to_string();
        let found = lock(&inner.images).get(&key).map(|listed| listed.image.manifest.clone());
        let Some(manifest) = found else {
            return Err(Error::NotInStore { reference: reference.to_string() });
        };
        let names = lock(&inner.images).values().filter(|l| l.image.manifest == manifest).count();
        if names == 1 && inner.uses.need(&manifest) != Need::Idle {
            return Err(Error::ImageInUse { reference: reference.to_string() });
        }
        inner.forget(&key)?;
        inner.collect()
    }

    /// Removes what belongs to no image, such as what pulls left that failed. Returns how many bytes that freed.
    /// Blocks.
    pub fn collect(&self) -> Result<u64> {
        self.inner.collect()
    }

    /// What each image takes. Blocks.
    pub fn du(&self) -> Result<Vec<Usage>> {
        self.inner.usage()
    }
}

impl Inner {
    /// Notes that an image was used now.
    pub(super) fn touch(&self, reference: &Reference, image: &PulledImage) -> Result<()> {
        let (now, key) = (SystemTime::now(), reference.canonical().to_string());
        let mut images = lock(&self.images);
        let Some(listed) = images.get_mut(&key).filter(|l| l.image.manifest == image.manifest) else {
            return Ok(());
        };
        let age = now.duration_since(listed.used).unwrap_or(TOUCH_EVERY);
        listed.used = now;
        drop(images);
        if age >= TOUCH_EVERY {
            let path = self.record_path(&key);
            // A record that isn't written yet gets its time when it is.
            if let Ok(file) = std::fs::File::options().write(true).open(&path) {
                file.set_times(FileTimes::new().set_modified(now)).map_err(Error::io("changing", &path))?;
            }
        }
        Ok(())
    }

    /// Removes a record, first on the disk.
    pub(super) fn forget(&self, key: &str) -> Result<()> {
        remove(&self.record_path(key))?;
        sync_dir(&self.dir.join("images"))?;
        lock(&self.images).remove(key);
        self.removals.send_replace(());
        Ok(())
    }

    pub(super) fn roots(&self) -> HashSet<Digest> {
        let mut roots: HashSet<Digest> = self.uses.used().into_iter().collect();
        roots.extend(lock(&self.images).values().map(|listed| listed.image.manifest.clone()));
        roots
    }

    pub(super) fn collect(&self) -> Result<u64> {
        // No pull lists its image while this looks at what is listed and removes the rest.
        let _gc = self.gc.write().unwrap_or_else(PoisonError::into_inner);
        let referred = self.referred(&self.roots())?;
        if !referred.incomplete.is_empty() {
            // Without its table nobody knows which objects an image has.
            let listed: Vec<String> = lock(&self.images)
                .iter()
                .filter(|(_, listed)| referred.incomplete.contains(&listed.image.manifest))
                .map(|(key, _)| key.clone())
                .collect();
            for key in &listed {
                tracing::warn!(image = key, "an image of the store is damaged; it is fetched again");
                self.forget(key)?;
            }
            if referred.incomplete.iter().any(|manifest| self.uses.need(manifest) == Need::Used) {
                tracing::warn!("nothing is removed from the image store while a damaged image is in use");
                return Ok(0);
            }
        }
        let mut loose = Vec::new();
        self.objects.each(
            |id, _| {
                if !referred.objects.contains(&id) {
                    loose.push(id);
                }
                Ok(())
            },
            remove,
        )?;
        let mut freed = 0;
        for id in loose {
            freed += self.objects.remove(&id)?.unwrap_or(0);
        }
        // Tables and mounts have no pins: a pull in progress may have just written one.
        if self.writers.are_idle() {
            freed += self.remove_unreferred(&referred)?;
        }
        Ok(freed)
    }

    /// Each part of the store that these images need, once: its bytes on the disk, and which of them need it, by their
    /// places in the list.
    pub(super) fn parts(&self, manifests: &[Digest]) -> Result<Parts> {
        let mut parts = Parts::new();
        for (at, manifest) in manifests.iter().enumerate() {
            let Some(documents) = self.documents(manifest)? else { continue };
            let mut add = |part: Part| {
                let bytes = |part: &Part| match part {
                    Part::Object(id) => self.objects.disk_bytes_of(id),
                    Part::File(path) => disk_bytes_below(path),
                };
                let (_, of) = parts.entry(part).or_insert_with_key(|part| (bytes(part), Vec::new()));
                if of.last() != Some(&at) {
                    of.push(at);
                }
            };
            add(Part::File(self.mount_path(manifest, self.mounter()?)));
            for blob in [manifest, &documents.manifest.config.digest] {
                add(Part::File(self.blob_path(blob)));
            }
            for diff_id in &documents.config.rootfs.diff_ids {
                add(Part::File(self.table_path(diff_id)));
                for file in self.table(diff_id)?.iter().flat_map(|table| table.objects()) {
                    add(Part::Object(file.id));
                }
            }
        }
        Ok(parts)
    }

    fn usage(&self) -> Result<Vec<Usage>> {
        let images: Vec<_> = lock(&self.images).values().cloned().collect();
        let manifests: HashSet<Digest> = images.iter().map(|listed| listed.image.manifest.clone()).collect();
        let manifests: Vec<Digest> = manifests.into_iter().collect();
        let parts = self.parts(&manifests)?;
        let seconds =
            |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut usage: Vec<Usage> = images
            .into_iter()
            .map(|listed| {
                let at = manifests.iter().position(|manifest| *manifest == listed.image.manifest);
                let mine = parts.values().filter(|(_, of)| at.is_some_and(|at| of.contains(&at)));
                let (mut bytes, mut unique_bytes) = (0, 0);
                for (size, of) in mine {
                    bytes += size;
                    unique_bytes += if of.len() == 1 { *size } else { 0 };
                }
                Usage {
                    bytes,
                    unique_bytes,
                    shared_bytes: bytes - unique_bytes,
                    in_use: self.uses.need(&listed.image.manifest) != Need::Idle,
                    used_s: seconds(listed.used),
                    image: listed.image,
                }
            })
            .collect();
        usage.sort_by(|a, b| a.image.cmp(&b.image));
        Ok(usage)
    }
}

pub(super) type Parts = std::collections::HashMap<Part, (u64, Vec<usize>)>;

#[derive(PartialEq, Eq, Hash)]
pub(super) enum Part {
    Object(super::objects::ObjectId),
    File(std::path::PathBuf),
}
