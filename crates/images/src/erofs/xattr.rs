//! Attributes: those that several inodes have the same are kept once, in their own blocks.
//!
//! An inode's attributes are a header of 12 bytes (the number of shared ones is its byte 4), the places of the shared
//! ones, and the rest in full. In full is: length of the name, its kind, length of the value (2 bytes), name, value,
//! zeros up to a multiple of 4.

use std::collections::BTreeMap;

use crate::tree::{Content, Kind, Node, escape_xattr};

const HEADER_BYTES: usize = 12;
/// The number of shared ones has one byte.
const SHARED_MAX: usize = 255;

const USER: u8 = 1;
const ACL_ACCESS: u8 = 2;
const ACL_DEFAULT: u8 = 3;
const TRUSTED: u8 = 4;
const SECURITY: u8 = 6;

/// Says that overlayfs has to look for the contents below.
const METACOPY: &[u8] = b"overlay.metacopy";
/// Says where.
const REDIRECT: &[u8] = b"overlay.redirect";

/// The attributes that are kept once, in full, with their places in units of 4 bytes.
pub(super) struct Shared {
    places: BTreeMap<Vec<u8>, Option<u32>>,
    bytes: Vec<u8>,
}

impl Shared {
    /// Finds what several of the nodes have.
    pub(super) fn of<'a>(nodes: impl Iterator<Item = &'a Node>) -> Shared {
        let mut counts: BTreeMap<Vec<u8>, u32> = BTreeMap::new();
        for node in nodes {
            for entry in common(node) {
                *counts.entry(entry).or_default() += 1;
            }
        }
        let mut bytes = Vec::new();
        let mut places = BTreeMap::new();
        for (entry, count) in counts {
            // The bounds of a tree keep this below 32 bits by far.
            let place = u32::try_from(bytes.len() / 4).ok().filter(|_| count > 1);
            if place.is_some() {
                bytes.extend_from_slice(&entry);
            }
            places.insert(entry, place);
        }
        Shared { places, bytes }
    }

    /// What to write where the superblock says the shared attributes are.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What follows a node's inode; nothing if it has no attributes.
    pub(super) fn body(&self, node: &Node) -> Vec<u8> {
        let mut places = Vec::new();
        let mut full = redirect(node).unwrap_or_default();
        for entry in common(node) {
            match self.places.get(&entry) {
                Some(Some(place)) if places.len() < SHARED_MAX => places.push(*place),
                _ => full.extend_from_slice(&entry),
            }
        }
        if places.is_empty() && full.is_empty() {
            return Vec::new();
        }
        let mut body = vec![0; HEADER_BYTES];
        body[4] = places.len() as u8;
        body.extend(places.iter().flat_map(|place| place.to_le_bytes()));
        body.extend_from_slice(&full);
        body
    }
}

/// The inode's field that tells the size of its attributes, if they aren't too many for it.
pub(super) fn body_count(body: usize) -> Option<u16> {
    if body == 0 { Some(0) } else { u16::try_from((body - HEADER_BYTES) / 4 + 1).ok() }
}

/// All attributes in full that other nodes may have as well.
fn common(node: &Node) -> impl Iterator<Item = Vec<u8>> {
    let own = node.meta.xattrs.iter().map(|(name, value)| {
        let name = escape_xattr(name);
        let (kind, rest) = split(&name);
        in_full(kind, rest, value)
    });
    object(node).map(|_| in_full(TRUSTED, METACOPY, b"")).into_iter().chain(own)
}

fn redirect(node: &Node) -> Option<Vec<u8>> {
    let (dir, file) = object(node)?.split_at_checked(2)?;
    Some(in_full(TRUSTED, REDIRECT, format!("/{dir}/{file}").as_bytes()))
}

/// The object that has a file's contents.
fn object(node: &Node) -> Option<&str> {
    match &node.kind {
        Kind::File(Content::Object { digest, size }) if *size > 0 => Some(digest.hex()),
        _ => None,
    }
}

/// Names are checked with the tree, so one of these fits.
fn split(name: &[u8]) -> (u8, &[u8]) {
    match name {
        b"system.posix_acl_access" => (ACL_ACCESS, b""),
        b"system.posix_acl_default" => (ACL_DEFAULT, b""),
        _ => {
            let kinds: [(&[u8], u8); 3] =
                [(b"user.", USER), (b"trusted.", TRUSTED), (b"security.", SECURITY)];
            let fitting = kinds.iter().find_map(|(prefix, kind)| Some((*kind, name.strip_prefix(*prefix)?)));
            fitting.unwrap_or((USER, name))
        }
    }
}

fn in_full(kind: u8, name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut entry = vec![name.len() as u8, kind];
    entry.extend_from_slice(&(value.len() as u16).to_le_bytes());
    entry.extend_from_slice(name);
    entry.extend_from_slice(value);
    entry.resize(entry.len().next_multiple_of(4), 0);
    entry
}
