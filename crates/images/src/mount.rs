//! Mounts an image: its metadata (see [`crate::erofs`]) below overlayfs, with the store's objects as the contents.
//!
//! The kernel's newer mount calls make both mounts without a place in any namespace, and only overlayfs' is then put
//! at the target: the EROFS mount lives inside it and ends with it, so there is nothing else to clean up, also after
//! a crash. Files are read straight from the objects, so that all images that have a file share one page cache.
//!
//! What it takes: EROFS mounts of plain files (Linux 6.12), overlayfs' data-only layers by descriptor (6.13), and
//! layers that are mounted nowhere (6.15). Elsewhere an image is a folder (see [`crate::tree::write_folders`]), and
//! [`mount_tree`] is for that. [`Mounter::probe`] finds out by trying.

mod context;

use std::fs::{File, Permissions};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use nix::mount::MsFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountAttrFlags, MoveMountFlags};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::tree::{Content, Kind, Meta, Node, Tree};
use context::{Context, failed};

/// A change of owner or mode copies no contents up; renaming an image's folder works.
const OPTIONS: [(&str, &str); 2] = [("metacopy", "on"), ("redirect_dir", "on")];
/// mount(2) passes options in one page, with a closing zero byte.
const OPTIONS_MAX_BYTES: usize = 4095;

/// How this machine mounts images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mounter {
    /// By [`mount_image`].
    Erofs,
    /// By [`mount_tree`].
    Folders {
        /// What the other way failed of.
        reason: String,
    },
}

impl Mounter {
    /// Tries with a small image in `dir`, which must be on the store's file system. Leaves nothing behind.
    pub fn probe(dir: &Path) -> Result<Mounter> {
        const CONTENTS: &[u8] = b"contents of an object";
        let dir = tempfile::tempdir_in(dir).map_err(Error::io("making a folder in", dir))?;
        let at = |name: &str| dir.path().join(name);
        let digest = Digest::of(CONTENTS);
        let object = at("objects").join(&digest.hex()[..2]);
        for folder in [&object, &at("upper"), &at("work")] {
            std::fs::create_dir_all(folder).map_err(Error::io("making", folder))?;
        }
        let object = object.join(&digest.hex()[2..]);
        std::fs::write(&object, CONTENTS).map_err(Error::io("writing", &object))?;
        let mut tree = Tree::default();
        let kind = Kind::File(Content::Object { digest, size: CONTENTS.len() as u64 });
        tree.insert(b"file", Node { meta: Meta { mode: 0o600, ..Meta::default() }, kind })?;
        let image = at("image");
        let mut file = File::create(&image).map_err(Error::io("making", &image))?;
        crate::erofs::write(&tree, &mut file)?;
        let tried = (|| {
            let mount = overlay(&image, &at("objects"), Some((&at("upper"), &at("work"))))?;
            let open = |flags| rustix::fs::openat(&mount, "file", flags | OFlags::CLOEXEC, Mode::empty());
            let broken = |e: std::io::Error| failed("a test image", String::new(), e);
            let mut file = File::from(open(OFlags::RDWR).map_err(|e| broken(e.into()))?);
            let mut found = Vec::new();
            file.read_to_end(&mut found).map_err(broken)?;
            file.write_all(b"more").map_err(broken)?;
            if found == CONTENTS { Ok(()) } else { Err(broken(std::io::ErrorKind::InvalidData.into())) }
        })();
        Ok(match tried {
            Ok(()) => Mounter::Erofs,
            Err(error) => Mounter::Folders { reason: with_causes(&error) },
        })
    }
}

/// Mounts an image at `target`, an existing folder, to be written to in `upper`; `work` is overlayfs' own folder, on
/// the same file system. One umount of `target` ends it.
///
/// `metadata` is a file that [`crate::erofs::write`] made, `objects` has the contents as `<2 hex>/<62 hex>`. An empty
/// `upper` gets owner and mode of the image's root, which overlayfs would hide.
pub fn mount_image(metadata: &Path, objects: &Path, upper: &Path, work: &Path, target: &Path) -> Result<()> {
    attach(&overlay(metadata, objects, Some((upper, work)))?, target)
}

/// Mounts an image at `target` for reading only.
pub fn mount_read_only(metadata: &Path, objects: &Path, target: &Path) -> Result<()> {
    attach(&overlay(metadata, objects, None)?, target)
}

/// Mounts a folder that [`crate::tree::write_folders`] made at `target`, as [`mount_image`] does an image.
pub fn mount_tree(lower: &Path, upper: &Path, work: &Path, target: &Path) -> Result<()> {
    let root = File::open(lower).map_err(Error::io("opening", lower))?;
    copy_root(&root, upper)?;
    let folders = [("lowerdir", lower), ("upperdir", upper), ("workdir", work)];
    let mut options = OPTIONS.map(|(key, value)| format!("{key}={value}")).join(",");
    for (key, folder) in folders {
        options.push_str(&format!(",{key}={}", escape(folder)?));
    }
    if options.len() > OPTIONS_MAX_BYTES {
        return Err(Error::Unsupported {
            what: format!("overlayfs with the path {}", lower.display()),
            help: "use a store with a shorter path".to_owned(),
        });
    }
    nix::mount::mount(Some("overlay"), target, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .map_err(|e| failed(&lower.display().to_string(), String::new(), e.into()))
}

/// Mounts the metadata alone, as overlayfs sees it.
#[cfg(test)]
pub(crate) fn mount_metadata(metadata: &Path, target: &Path) -> Result<()> {
    attach(&erofs(metadata)?, target)
}

/// Overlayfs over an image, mounted nowhere yet.
fn overlay(metadata: &Path, objects: &Path, upper_and_work: Option<(&Path, &Path)>) -> Result<OwnedFd> {
    let lower = erofs(metadata)?;
    let what = metadata.display().to_string();
    let context = Context::new("overlay", &what)?;
    context.set("source", "overlay")?;
    for (key, value) in OPTIONS {
        context.set(key, value)?;
    }
    context.set_fd("lowerdir+", &lower)?;
    context.set_fd("datadir+", &open_dir(objects)?)?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    if let Some((upper, work)) = upper_and_work {
        copy_root(&open_at(&lower)?, upper)?;
        context.set_fd("upperdir", &open_dir(upper)?)?;
        context.set_fd("workdir", &open_dir(work)?)?;
        attributes = MountAttrFlags::empty();
    }
    context.mount(attributes)
}

/// The metadata alone, mounted nowhere.
fn erofs(metadata: &Path) -> Result<OwnedFd> {
    let what = metadata.display().to_string();
    let image = File::open(metadata).map_err(Error::io("opening", metadata))?;
    let context = Context::new("erofs", &what)?;
    // By descriptor, since the kernel takes no more than 255 bytes here.
    context.set("source", &context::path_of(&image))?;
    context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY)
}

fn attach(mount: &OwnedFd, target: &Path) -> Result<()> {
    rustix::mount::move_mount(mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|e| Error::io("mounting at", target)(e.into()))
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::io("opening", path)(e.into()))
}

/// The root of a mount.
fn open_at(mount: &OwnedFd) -> Result<File> {
    rustix::fs::openat(mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map(File::from)
        .map_err(|e| Error::io("opening", "the image's root")(e.into()))
}

/// Overlayfs shows the upper folder's own owner and mode as the root's.
fn copy_root(root: &File, upper: &Path) -> Result<()> {
    let is_empty = std::fs::read_dir(upper).map(|mut names| names.next().is_none());
    if !is_empty.map_err(Error::io("reading", upper))? {
        return Ok(());
    }
    let meta = root.metadata().map_err(Error::io("reading", "the image's root"))?;
    std::os::unix::fs::chown(upper, Some(meta.uid()), Some(meta.gid()))
        .map_err(Error::io("changing", upper))?;
    let mode = Permissions::from_mode(meta.mode() & 0o7777);
    std::fs::set_permissions(upper, mode).map_err(Error::io("changing", upper))
}

/// mount(2) splits overlayfs' options at commas and lower folders at colons, except after a backslash.
fn escape(path: &Path) -> Result<String> {
    let text = path.to_str().ok_or_else(|| Error::Unsupported {
        what: format!("the path {}", path.display()),
        help: "use a path in UTF-8".to_owned(),
    })?;
    Ok(text.replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,"))
}

fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text.push_str(&format!(": {next}"));
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests;
