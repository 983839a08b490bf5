//! An image's file tree in memory: what all its layers add up to, ready to be written as EROFS or as folders.
//!
//! Nodes are kept in one list and named by their index, so that hard links are two names of one index and nothing
//! is freed recursively. [`Builder`] makes a tree from layers, [`write_folders`] a plain folder from a tree, and
//! [`crate::erofs::write`] a mountable image of its metadata.

mod build;
mod check;
mod folders;

use std::collections::BTreeMap;

use crate::digest::Digest;
use crate::error::{Error, Result};
pub use build::Builder;
pub use check::{INLINE_MAX_BYTES, NODES_MAX};
pub(crate) use check::{escape_xattr, lossy};
pub use folders::write_folders;

/// Index of a node in [`Tree::nodes`]. Two names with the same id are hard links.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub usize);

/// A file tree. Node 0 is the root, a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// All nodes; some may no longer have a name.
    pub nodes: Vec<Node>,
}

/// One file, directory, link or device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Owner, permissions, time, attributes.
    pub meta: Meta,
    /// What it is.
    pub kind: Kind,
}

/// What every node has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits, with setuid, setgid and sticky (at most 0o7777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of change, seconds since 1970.
    pub mtime_s: i64,
    /// Nanoseconds of that.
    pub mtime_ns: u32,
    /// Extended attributes, full names such as `security.capability`.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Names in it, without `.` and `..`.
    Directory(BTreeMap<Vec<u8>, NodeId>),
    /// Regular file.
    File(Content),
    /// Symbolic link and its target.
    Symlink(Vec<u8>),
    /// Character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Named pipe.
    Fifo,
}

/// Where a file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// In the tree itself: small files only.
    Inline(Vec<u8>),
    /// In the store's object of this digest.
    Object {
        /// Digest of the file's bytes.
        digest: Digest,
        /// Their number.
        size: u64,
    },
}

/// The root's id.
pub const ROOT: NodeId = NodeId(0);

/// The folder's mode where a layer names a file in it, but not the folder itself.
const IMPLIED_MODE: u32 = 0o755;

impl Node {
    /// An empty folder of root's, mode 0755, as of 1970.
    pub fn implied_dir() -> Node {
        let meta = Meta { mode: IMPLIED_MODE, ..Meta::default() };
        Node { meta, kind: Kind::Directory(BTreeMap::new()) }
    }

    /// The names in it, if it is a folder.
    pub fn names(&self) -> Option<&BTreeMap<Vec<u8>, NodeId>> {
        match &self.kind {
            Kind::Directory(names) => Some(names),
            _ => None,
        }
    }

    fn names_mut(&mut self) -> Option<&mut BTreeMap<Vec<u8>, NodeId>> {
        match &mut self.kind {
            Kind::Directory(names) => Some(names),
            _ => None,
        }
    }
}

impl Default for Tree {
    fn default() -> Tree {
        Tree { nodes: vec![Node::implied_dir()] }
    }
}

impl Tree {
    /// The node of this id.
    ///
    /// # Panics
    /// If the id is of another tree.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// What is at `path`, relative to the root. Follows no links.
    pub fn lookup(&self, path: &[u8]) -> Option<NodeId> {
        let mut at = ROOT;
        for name in path.split(|b| *b == b'/').filter(|name| !name.is_empty() && *name != b".") {
            at = *self.nodes.get(at.0)?.names()?.get(name)?;
        }
        Some(at)
    }

    /// Puts a node at `path`, in place of what was there, and makes folders of root's that are missing on the way.
    pub fn insert(&mut self, path: &[u8], node: Node) -> Result<NodeId> {
        check::node(path, &node)?;
        let id = NodeId(self.nodes.len());
        if id.0 >= NODES_MAX {
            return Err(too_many(path));
        }
        let names = check::names(path)?;
        let Some((name, parents)) = names.split_last() else {
            return match node.kind {
                Kind::Directory(_) => {
                    self.nodes[ROOT.0].meta = node.meta;
                    Ok(ROOT)
                }
                _ => Err(refused(path, "the root can only be a folder")),
            };
        };
        self.nodes.push(node);
        self.put(path, parents, name, id)?;
        Ok(id)
    }

    /// Gives a node one more name.
    pub fn link(&mut self, path: &[u8], id: NodeId) -> Result<()> {
        match self.nodes.get(id.0) {
            None => return Err(refused(path, "a hard link to nothing")),
            Some(node) if node.names().is_some() => return Err(refused(path, "a hard link to a folder")),
            Some(_) => {}
        }
        let names = check::names(path)?;
        let Some((name, parents)) = names.split_last() else {
            return Err(refused(path, "the root can only be a folder"));
        };
        self.put(path, parents, name, id)
    }

    fn put(&mut self, path: &[u8], parents: &[&[u8]], name: &[u8], id: NodeId) -> Result<()> {
        let mut at = ROOT;
        for parent in parents {
            at = match self.nodes[at.0].names().and_then(|names| names.get(*parent)) {
                Some(next) => *next,
                None => {
                    let next = NodeId(self.nodes.len());
                    self.nodes.push(Node::implied_dir());
                    self.name(at, parent, next);
                    next
                }
            };
        }
        if self.nodes[at.0].names().is_none() {
            return Err(refused(path, "it is below something that is no folder"));
        }
        self.name(at, name, id);
        Ok(())
    }

    fn name(&mut self, dir: NodeId, name: &[u8], id: NodeId) {
        if let Some(names) = self.nodes[dir.0].names_mut() {
            names.insert(name.to_vec(), id);
        }
    }

    /// How many names each node has, by index; for folders, 2 and the number of folders in it.
    pub fn nlink(&self) -> Vec<u32> {
        let mut count = vec![0u32; self.nodes.len()];
        let mut stack = vec![ROOT];
        while let Some(id) = stack.pop() {
            let Some(names) = self.node(id).names() else {
                count[id.0] += 1;
                continue;
            };
            let dirs = names.values().filter(|child| self.node(**child).names().is_some()).count();
            count[id.0] = u32::try_from(dirs + 2).unwrap_or(u32::MAX);
            stack.extend(names.values());
        }
        count
    }

    /// Every name with its node, the root first with an empty path, folders before what they hold, by name.
    pub fn walk(&self) -> impl Iterator<Item = (Vec<u8>, NodeId)> {
        let mut stack = vec![(Vec::new(), ROOT)];
        std::iter::from_fn(move || {
            let (path, id) = stack.pop()?;
            for (name, child) in self.node(id).names().into_iter().flatten().rev() {
                let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                stack.push(([&path, slash, name].concat(), *child));
            }
            Some((path, id))
        })
    }
}

fn refused(path: &[u8], reason: &str) -> Error {
    Error::UnsafeEntry { entry: lossy(path), reason: reason.to_owned() }
}

fn too_many(path: &[u8]) -> Error {
    refused(
        path,
        &format!("the image has more than {NODES_MAX} files; split it, or leave out what it doesn't need"),
    )
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
