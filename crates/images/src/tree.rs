//! An image's file tree in memory: what all its layers add up to, ready to be written as EROFS or as folders.

use std::collections::BTreeMap;

use crate::digest::Digest;

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
