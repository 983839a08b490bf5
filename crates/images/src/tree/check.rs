//! What a tree may hold: the limits of Linux and of the image format, checked before anything is kept or written.

use std::borrow::Cow;

use super::{Content, Kind, Node, NodeId, ROOT, Tree, refused, too_many};
use crate::error::Result;

/// Most files, folders and links in one image: about ten times what the largest images in use hold.
pub const NODES_MAX: usize = 1_000_000;
/// Longest contents that a tree holds itself: one block of EROFS.
pub const INLINE_MAX_BYTES: usize = 4096;

/// Linux' longest name in a folder.
const NAME_MAX_BYTES: usize = 255;
/// Linux' PATH_MAX, without the zero byte.
const PATH_MAX_BYTES: usize = 4095;
/// Linux' longest name of an attribute.
const XATTR_NAME_MAX_BYTES: usize = 255;
/// EROFS keeps a value's length in 16 bits. Linux' own limit is one byte more.
const XATTR_VALUE_MAX_BYTES: usize = 65_535;
/// All attributes of one file; the list of their names alone may have 64 KiB on Linux.
const XATTRS_MAX_BYTES: usize = 128 << 10;
/// Device numbers have 12 and 20 bits on Linux.
const MAJOR_MAX: u32 = (1 << 12) - 1;
const MINOR_MAX: u32 = (1 << 20) - 1;
/// What overlayfs takes for its own bookkeeping in a lower layer.
const OVERLAY_XATTR_PREFIX: &[u8] = b"trusted.overlay.";

/// The names along a path, without empty ones and `.`; refused are `..`, zero bytes and what Linux finds too long.
pub(super) fn names(path: &[u8]) -> Result<Vec<&[u8]>> {
    if path.len() > PATH_MAX_BYTES {
        let start = &path[..NAME_MAX_BYTES];
        return Err(refused(start, &format!("its path is longer than {PATH_MAX_BYTES} bytes")));
    }
    let mut names = Vec::new();
    for part in path.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".") {
        if part == b".." {
            return Err(refused(path, "its path has `..`, which could lead out of the layer"));
        }
        name(path, part)?;
        names.push(part);
    }
    Ok(names)
}

fn name(path: &[u8], name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX_BYTES {
        return Err(refused(path, &format!("a name in its path is longer than {NAME_MAX_BYTES} bytes")));
    }
    if name.contains(&0) {
        return Err(refused(path, "its path has a zero byte"));
    }
    Ok(())
}

/// Whether a node can exist on Linux and in an image; `path` is for the message.
pub(super) fn node(path: &[u8], node: &Node) -> Result<()> {
    let meta = &node.meta;
    if meta.mode > 0o7777 {
        return Err(refused(path, &format!("its mode is {:o}, more than 7777", meta.mode)));
    }
    // Linux means "no owner" by this number.
    if meta.uid == u32::MAX || meta.gid == u32::MAX {
        return Err(refused(
            path,
            &format!("it has the owner {}:{}, which nobody can be", meta.uid, meta.gid),
        ));
    }
    if meta.mtime_ns >= 1_000_000_000 {
        return Err(refused(path, "its time has a second or more of nanoseconds"));
    }
    let mut xattrs_bytes = 0;
    for (name, value) in &meta.xattrs {
        if escape_xattr(name).len() > XATTR_NAME_MAX_BYTES || name.contains(&0) {
            return Err(refused(path, &format!("`{}` is no name of an attribute", lossy(name))));
        }
        if !linux_keeps(name) {
            return Err(refused(path, &format!("no file system keeps its attribute `{}`", lossy(name))));
        }
        xattrs_bytes += name.len() + value.len();
        if value.len() > XATTR_VALUE_MAX_BYTES || xattrs_bytes > XATTRS_MAX_BYTES {
            return Err(refused(path, &format!("its attribute `{}` is too long", lossy(name))));
        }
    }
    match &node.kind {
        Kind::File(Content::Inline(bytes)) if bytes.len() > INLINE_MAX_BYTES => {
            Err(refused(path, &format!("more than {INLINE_MAX_BYTES} bytes are kept in the tree itself")))
        }
        Kind::File(Content::Object { size, .. }) if i64::try_from(*size).is_err() => {
            Err(refused(path, &format!("its size is {size} bytes, more than Linux allows")))
        }
        Kind::Symlink(target)
            if target.is_empty() || target.len() > PATH_MAX_BYTES || target.contains(&0) =>
        {
            Err(refused(path, "its target is no path"))
        }
        Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor }
            if *major > MAJOR_MAX || *minor > MINOR_MAX =>
        {
            Err(refused(path, &format!("{major}:{minor} is no device number")))
        }
        _ => Ok(()),
    }
}

/// Whether overlayfs takes this node in a lower layer for a deleted name.
pub(crate) fn is_whiteout(node: &Node) -> bool {
    matches!(node.kind, Kind::CharDevice { major: 0, minor: 0 })
}

/// The name of an attribute below overlayfs, which takes one `overlay.` off and keeps the shorter ones to itself
/// ("Nesting overlayfs mounts" in the kernel's documentation, Linux 6.7): an image's own attributes of that kind show
/// in the mount as they are in the image, and tell overlayfs nothing.
pub(crate) fn escape_xattr(name: &[u8]) -> Cow<'_, [u8]> {
    match name.strip_prefix(OVERLAY_XATTR_PREFIX) {
        Some(rest) => Cow::Owned([OVERLAY_XATTR_PREFIX, b"overlay.", rest].concat()),
        None => Cow::Borrowed(name),
    }
}

/// Whether any file system of Linux keeps an attribute of this name. Archives made elsewhere have others.
pub(super) fn linux_keeps(name: &[u8]) -> bool {
    let spaces: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    spaces.iter().any(|space| name.starts_with(space) && name.len() > space.len())
        || matches!(name, b"system.posix_acl_access" | b"system.posix_acl_default")
}

/// For messages.
pub(crate) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Tree {
    /// Whether the tree is one: the root is a folder, all ids exist, no folder has two names, and nothing breaks the
    /// limits. [`super::Builder`] makes only such trees; other makers may err.
    pub(crate) fn check(&self) -> Result<()> {
        if self.nodes.first().is_none_or(|root| root.names().is_none()) {
            return Err(refused(b"", "the tree has no root"));
        }
        let mut seen = vec![false; self.nodes.len()];
        seen[ROOT.0] = true;
        let mut stack: Vec<(Vec<u8>, NodeId)> = vec![(Vec::new(), ROOT)];
        let mut named = 0usize;
        while let Some((path, id)) = stack.pop() {
            named += 1;
            if named > NODES_MAX {
                return Err(too_many(&path));
            }
            let at = &self.nodes[id.0];
            node(&path, at)?;
            if is_whiteout(at) {
                return Err(refused(&path, "a character device 0:0 means a deleted file to overlayfs"));
            }
            for (child_name, child) in at.names().into_iter().flatten() {
                let child_path = [&path[..], b"/", child_name].concat();
                if child_path.len() > PATH_MAX_BYTES {
                    return Err(refused(
                        child_name,
                        &format!("its path is longer than {PATH_MAX_BYTES} bytes"),
                    ));
                }
                if matches!(&child_name[..], b"" | b"." | b"..") || child_name.contains(&b'/') {
                    return Err(refused(&child_path, "this is no name for a file"));
                }
                name(&child_path, child_name)?;
                let Some(child_node) = self.nodes.get(child.0) else {
                    return Err(refused(&child_path, "it names a node that isn't in the tree"));
                };
                if child_node.names().is_some() && std::mem::replace(&mut seen[child.0], true) {
                    return Err(refused(&child_path, "a folder with two names"));
                }
                stack.push((child_path, *child));
            }
        }
        Ok(())
    }
}
