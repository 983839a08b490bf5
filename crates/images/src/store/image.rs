//! An image that is here: how to run it, how to mount it, and that it stays while it is used.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::objects::lock;
use super::pull::PullStats;
use super::{Documents, Inner};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::ImageConfig;
use crate::mount::{self, Mounter};

/// Images in use, by manifest, and how often.
#[derive(Debug, Default)]
pub(super) struct Uses(Mutex<HashMap<Digest, u32>>);

impl Uses {
    fn hold(self: &Arc<Self>, manifest: &Digest) -> Arc<Hold> {
        *lock(&self.0).entry(manifest.clone()).or_insert(0) += 1;
        Arc::new(Hold { uses: self.clone(), manifest: manifest.clone() })
    }

    pub(super) fn holds(&self, manifest: &Digest) -> bool {
        lock(&self.0).contains_key(manifest)
    }

    pub(super) fn all(&self) -> Vec<Digest> {
        lock(&self.0).keys().cloned().collect()
    }
}

#[derive(Debug)]
struct Hold {
    uses: Arc<Uses>,
    manifest: Digest,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut uses = lock(&self.uses.0);
        if let Some(count) = uses.get_mut(&self.manifest) {
            *count -= 1;
            if *count == 0 {
                uses.remove(&self.manifest);
            }
        }
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
        let hold = self.uses.hold(manifest);
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
