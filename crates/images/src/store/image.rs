//! An image that is here: how to run it, how to mount it, and that it stays while it is used.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::objects::lock;
use super::pull::PullStats;
use super::{Documents, Inner, Store};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::ImageConfig;
use crate::mount::{self, Mounter};

/// Who wants images to stay, by manifest.
#[derive(Debug, Default)]
pub(super) struct Uses(Mutex<HashMap<Digest, Count>>);

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    used: u32,
    warm: u32,
}

/// How much an image is wanted, least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Need {
    /// Nothing wants it.
    Idle,
    /// It is to be here in case that something uses it.
    Warm,
    /// Something uses it.
    Used,
}

impl Uses {
    fn hold(self: &Arc<Self>, manifest: &Digest, need: Need) -> Arc<Hold> {
        self.change(manifest, need, |count| *count += 1);
        Arc::new(Hold { uses: self.clone(), manifest: manifest.clone(), need })
    }

    fn change(&self, manifest: &Digest, need: Need, change: impl FnOnce(&mut u32)) {
        let mut counts = lock(&self.0);
        let count = counts.entry(manifest.clone()).or_default();
        change(if need == Need::Used { &mut count.used } else { &mut count.warm });
        if (count.used, count.warm) == (0, 0) {
            counts.remove(manifest);
        }
    }

    pub(super) fn need(&self, manifest: &Digest) -> Need {
        match lock(&self.0).get(manifest) {
            Some(count) if count.used > 0 => Need::Used,
            Some(_) => Need::Warm,
            None => Need::Idle,
        }
    }

    /// Images that something uses: they stay, listed or not.
    pub(super) fn used(&self) -> Vec<Digest> {
        let counts = lock(&self.0);
        counts.iter().filter(|(_, count)| count.used > 0).map(|(manifest, _)| manifest.clone()).collect()
    }
}

#[derive(Debug)]
struct Hold {
    uses: Arc<Uses>,
    manifest: Digest,
    need: Need,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.uses.change(&self.manifest, self.need, |count| *count -= 1);
    }
}

/// An image that is to be here in case that something uses it. It stays as long as this, unless an image that something
/// waits for needs its room and no other can go.
pub struct WarmImage {
    store: Store,
    manifest: Digest,
    _hold: Arc<Hold>,
}

impl WarmImage {
    /// Returns when the image is no longer here.
    pub async fn gone(&self) {
        let mut removals = self.store.inner.removals.subscribe();
        while self.store.inner.is_listed(&self.manifest) {
            // The sender lives as long as the store.
            let _ = removals.changed().await;
        }
    }
}

impl Store {
    /// Keeps an image that nothing uses any more in case that something does.
    pub fn keep_warm(&self, image: PulledImage) -> WarmImage {
        let hold = self.inner.uses.hold(&image.manifest, Need::Warm);
        WarmImage { store: self.clone(), manifest: image.manifest.clone(), _hold: hold }
    }
}

/// An image in the store. As long as one of these is there, the image is in use and stays.
#[derive(Clone, Debug)]
pub struct PulledImage {
    /// Digest that the reference meant: of a manifest, or of an index.
    pub digest: Digest,
    /// Digest of the manifest for this machine's platform, by which [`super::Store::hold`] finds it again.
    pub manifest: Digest,
    /// How to run it.
    pub config: ImageConfig,
    /// What the pull that returned this took; all zero where there was none.
    pub stats: PullStats,
    /// Why the registry couldn't be asked: the image is what the name meant when it last could.
    pub stale: Option<String>,
    mounter: Mounter,
    objects: PathBuf,
    mount: PathBuf,
    _hold: Arc<Hold>,
}

/// The same image, whoever pulled it and however.
impl PartialEq for PulledImage {
    fn eq(&self, other: &Self) -> bool {
        (&self.digest, &self.manifest, &self.config) == (&other.digest, &other.manifest, &other.config)
    }
}

impl PulledImage {
    /// Mounts the image at `target`, to be written to in `upper`; `work` is overlayfs' own folder, on the same file
    /// system. All three must be there. One umount of `target` ends it.
    pub fn mount(&self, upper: &Path, work: &Path, target: &Path) -> Result<()> {
        match &self.mounter {
            Mounter::Erofs => mount::mount_image(&self.mount, &self.objects, upper, work, target),
            Mounter::Folders { .. } => mount::mount_tree(&self.mount, upper, work, target),
        }
    }

    /// Mounts the image at `target` for reading only. One umount ends it.
    pub fn mount_read_only(&self, target: &Path) -> Result<()> {
        match &self.mounter {
            Mounter::Erofs => mount::mount_read_only(&self.mount, &self.objects, target),
            Mounter::Folders { reason } => Err(Error::Unsupported {
                what: format!("mounting an image for reading only on this kernel ({reason})"),
                help: "use a kernel from 6.15 on".to_owned(),
            }),
        }
    }
}

impl Inner {
    /// What is mounted for an image.
    pub(super) fn mount_path(&self, manifest: &Digest, mounter: &Mounter) -> PathBuf {
        let end = match mounter {
            Mounter::Erofs => "erofs",
            Mounter::Folders { .. } => "tree",
        };
        self.dir.join("mounts").join(format!("{}.{end}", manifest.hex()))
    }

    /// An image whose parts are all here; what is mounted is made anew where it is missing.
    pub(super) fn image(&self, digest: &Digest, manifest: &Digest) -> Result<Option<PulledImage>> {
        // Held before anything is looked at, so that nothing is removed in between.
        let hold = self.uses.hold(manifest, Need::Used);
        let Some(Documents { config, .. }) = self.documents(manifest)? else { return Ok(None) };
        let mounter = self.mounter()?.clone();
        let mount = self.mount_path(manifest, &mounter);
        if !mount.exists() {
            if !self.build(manifest, &config.rootfs.diff_ids)? {
                return Ok(None);
            }
            // Its record may be on the disk already.
            self.writers.sync()?;
        }
        Ok(Some(PulledImage {
            digest: digest.clone(),
            manifest: manifest.clone(),
            config,
            stats: PullStats::default(),
            stale: None,
            mounter,
            objects: self.objects.dir().to_owned(),
            mount,
            _hold: hold,
        }))
    }
}
