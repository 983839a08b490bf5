//! The way without EROFS: a plain folder from a tree and the store's objects, as overlayfs' lower layer.
//!
//! Takes as much disk as the image has bytes, unless the file system can share them (btrfs, xfs: reflinks).

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};

use super::{Content, Kind, Meta, Node, NodeId, Tree, escape_xattr};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Makes the tree's files in `dest`, an empty folder, from `objects/<2 hex>/<62 hex>`. Needs root, and a folder that
/// nobody else writes in.
///
/// Attributes named `trusted.overlay.*` are escaped: the folder is to be mounted, not used as it is.
pub fn write_folders(tree: &Tree, objects: &Path, dest: &Path) -> Result<()> {
    tree.check()?;
    let mut first_names: HashMap<NodeId, PathBuf> = HashMap::new();
    let mut dirs = Vec::new();
    for (path, id) in tree.walk() {
        let at = dest.join(std::ffi::OsStr::from_bytes(&path));
        let node = tree.node(id);
        if let Some(first) = first_names.get(&id) {
            std::fs::hard_link(first, &at).map_err(Error::io("linking", &at))?;
            continue;
        }
        make(node, objects, &at, path.is_empty())?;
        // Folders' last: making what is in them changes their times, and would inherit their default ACLs.
        if node.names().is_some() {
            dirs.push((at, node));
        } else {
            set_xattrs_and_time(&at, &node.meta)?;
            first_names.insert(id, at);
        }
    }
    for (at, node) in dirs.into_iter().rev() {
        set_xattrs_and_time(&at, &node.meta)?;
    }
    Ok(())
}

fn make(node: &Node, objects: &Path, at: &Path, is_root: bool) -> Result<()> {
    let failed = |e: rustix::io::Errno| Error::io("making", at)(e.into());
    let device = |kind, major, minor| {
        rustix::fs::mknodat(CWD, at, kind, Mode::RUSR, rustix::fs::makedev(major, minor)).map_err(failed)
    };
    match &node.kind {
        Kind::Directory(_) if is_root => {}
        Kind::Directory(_) => rustix::fs::mkdir(at, Mode::RWXU).map_err(failed)?,
        Kind::File(Content::Inline(bytes)) => std::fs::write(at, bytes).map_err(Error::io("writing", at))?,
        Kind::File(Content::Object { size: 0, .. }) => {
            std::fs::write(at, b"").map_err(Error::io("writing", at))?
        }
        Kind::File(Content::Object { digest, size }) => copy(digest, *size, objects, at)?,
        Kind::Symlink(target) => rustix::fs::symlink(&target[..], at).map_err(failed)?,
        Kind::CharDevice { major, minor } => device(FileType::CharacterDevice, *major, *minor)?,
        Kind::BlockDevice { major, minor } => device(FileType::BlockDevice, *major, *minor)?,
        Kind::Fifo => device(FileType::Fifo, 0, 0)?,
    }
    let meta = &node.meta;
    // The owner before the mode, and attributes after both: a change of owner drops setuid bits and capabilities.
    let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
    rustix::fs::chownat(CWD, at, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    if !matches!(node.kind, Kind::Symlink(_)) {
        rustix::fs::chmod(at, Mode::from_raw_mode(meta.mode)).map_err(failed)?;
    }
    Ok(())
}

fn copy(digest: &Digest, size: u64, objects: &Path, at: &Path) -> Result<()> {
    let (dir, file) = digest.hex().split_at(2);
    let object = objects.join(dir).join(file);
    let mut from = File::open(&object).map_err(Error::io("opening", &object))?;
    let mut to = File::create_new(at).map_err(Error::io("making", at))?;
    let found = from.metadata().map_err(Error::io("opening", &object))?.len();
    if found != size {
        return Err(Error::SizeMismatch { what: format!("the object {digest}"), expected: size, found });
    }
    if rustix::fs::ioctl_ficlone(&to, &from).is_err() {
        std::io::copy(&mut from, &mut to).map_err(Error::io("copying to", at))?;
    }
    Ok(())
}

fn set_xattrs_and_time(at: &Path, meta: &Meta) -> Result<()> {
    for (name, value) in &meta.xattrs {
        rustix::fs::lsetxattr(at, &*escape_xattr(name), value, XattrFlags::empty())
            .map_err(|e| Error::io("setting attributes of", at)(e.into()))?;
    }
    let time = Timespec { tv_sec: meta.mtime_s, tv_nsec: meta.mtime_ns.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    let set = rustix::fs::utimensat(CWD, at, &times, AtFlags::SYMLINK_NOFOLLOW);
    set.map_err(|e| Error::io("setting the time of", at)(e.into()))
}
