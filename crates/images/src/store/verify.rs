//! Looks at every byte of the store again, and drops what is wrong, so that it is fetched again.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::image::Need;
use super::objects::{HashWriter, ObjectId, Pacer, hash, lock};
use super::recover::remove;
use super::table::Table;
use super::{Inner, Store, StoredImage, build};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::mount::Mounter;
use crate::tree::{Content, Kind, Tree};

/// What [`Store::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Verified {
    /// Images that were looked at.
    pub images: u64,
    /// Objects that were hashed.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Files of the store that were damaged or missing, and are gone now.
    pub damaged: Vec<String>,
    /// Files that were damaged or missing, and made anew from what is here.
    pub repaired: Vec<String>,
    /// Images that are no longer whole, and no longer listed: the next pull fetches what they lack.
    pub dropped: Vec<StoredImage>,
}

impl Store {
    /// Hashes everything again, and drops what is wrong. Pulls go on meanwhile. Blocks.
    pub fn verify(&self) -> Result<Verified> {
        self.inner.verify()
    }
}

impl Inner {
    fn verify(&self) -> Result<Verified> {
        let mut report = Verified::default();
        let mut ids = Vec::new();
        self.objects.each(
            |id, file| {
                ids.push(id);
                report.bytes += file.len();
                Ok(())
            },
            |_| Ok(()),
        )?;
        report.objects = ids.len() as u64;
        for id in self.check(&ids)? {
            // Not what a pull is just writing.
            if self.objects.discard_if_wrong(&id)? {
                report.damaged.push(format!("objects/{}", id.path()));
            }
        }
        let images: Vec<StoredImage> = lock(&self.images).values().map(|l| l.image.clone()).collect();
        report.images = images.len() as u64;
        let mut whole = HashSet::new();
        let mut broken = HashSet::new();
        for image in images {
            let manifest = &image.manifest;
            if !whole.contains(manifest) && !broken.contains(manifest) {
                let is_whole = self.verify_image(manifest, &mut report, &mut |_| Ok(()))?;
                if is_whole {
                    whole.insert(manifest.clone())
                } else {
                    broken.insert(manifest.clone())
                };
            }
            if broken.contains(manifest) {
                self.forget(&image.reference.canonical().to_string())?;
                report.dropped.push(image);
            }
        }
        Ok(report)
    }

    /// Whether an image is whole, once its mount was made anew where that was all that was wrong.
    pub(super) fn verify_image(
        &self,
        manifest: &Digest,
        report: &mut Verified,
        read: Pacer<'_>,
    ) -> Result<bool> {
        let mut drop_file = |path: &Path| -> Result<()> {
            if path.exists() {
                remove(path)?;
            }
            report.damaged.push(path.strip_prefix(&self.dir).unwrap_or(path).display().to_string());
            Ok(())
        };
        let Some(documents) = self.documents(manifest)? else {
            if self.read_blob(manifest)?.is_none() {
                drop_file(&self.blob_path(manifest))?;
            }
            return Ok(false);
        };
        let (mut tables, mut is_whole) = (Vec::new(), true);
        for diff_id in &documents.config.rootfs.diff_ids {
            let path = self.table_path(diff_id);
            match Table::read(&path)? {
                Some(table) => tables.push(std::sync::Arc::new(table)),
                None => {
                    lock(&self.tables).remove(diff_id);
                    drop_file(&path)?;
                    is_whole = false;
                }
            }
        }
        // Damaged objects are gone by now.
        let has_all = |table: &Table| table.objects().all(|file| self.objects.has(&file.id, file.size));
        if !is_whole || !tables.iter().all(|table| has_all(table)) {
            return Ok(false);
        }
        let mounter = self.mounter()?;
        let path = self.mount_path(manifest, mounter);
        let tree = build::tree(&tables)?;
        let is_right = match mounter {
            Mounter::Erofs => is_right_metadata(&tree, &path)?,
            Mounter::Folders { .. } => is_right_folder(&tree, &path, read)?,
        };
        if is_right {
            return Ok(true);
        }
        if *mounter != Mounter::Erofs && self.uses.need(manifest) == Need::Used {
            // Files of a mounted folder can't be exchanged.
            report.damaged.push(path.strip_prefix(&self.dir).unwrap_or(&path).display().to_string());
            return Ok(false);
        }
        remove(&path)?;
        self.build_from(manifest, &tables)?;
        self.writers.sync()?;
        report.repaired.push(path.strip_prefix(&self.dir).unwrap_or(&path).display().to_string());
        Ok(true)
    }
}

/// Whether the file is what is made of the tree.
fn is_right_metadata(tree: &Tree, path: &Path) -> Result<bool> {
    let mut hasher = Sha256::new();
    let mut out = BufWriter::with_capacity(1 << 20, HashWriter(&mut hasher));
    crate::erofs::write(tree, &mut out)?;
    out.flush().map_err(Error::io("hashing", path))?;
    drop(out);
    let expected = ObjectId(hasher.finalize().into());
    Ok(std::fs::read(path).is_ok_and(|bytes| ObjectId::of(&bytes) == expected))
}

/// Whether the folder has the tree's files with their contents.
fn is_right_folder(tree: &Tree, path: &Path, read: Pacer<'_>) -> Result<bool> {
    for (name, id) in tree.walk() {
        let at = path.join(OsStr::from_bytes(&name));
        let Ok(found) = std::fs::symlink_metadata(&at) else { return Ok(false) };
        let is_right = match &tree.node(id).kind {
            Kind::Directory(_) => found.is_dir(),
            Kind::Symlink(target) => {
                std::fs::read_link(&at).is_ok_and(|link| link.as_os_str().as_bytes() == target.as_slice())
            }
            Kind::File(content) if found.is_file() => {
                let hashed =
                    File::open(&at).map_err(Error::io("reading", &at)).and_then(|f| hash(f, &at, &mut *read));
                match (hashed, content) {
                    (Err(Error::Cancelled), _) => return Err(Error::Cancelled),
                    (Err(_), _) => false,
                    (Ok(found), Content::Inline(bytes)) => ObjectId::of(bytes) == found,
                    (Ok(found), Content::Object { digest, .. }) => *digest == found.digest(),
                }
            }
            Kind::File(_) => false,
            Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Fifo => {
                !found.is_file() && !found.is_dir()
            }
        };
        if !is_right {
            return Ok(false);
        }
    }
    Ok(true)
}
