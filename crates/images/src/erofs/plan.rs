//! Decides where everything goes, then writes it in that order.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::inode::{
    COMPACT_BYTES, EXTENDED_BYTES, HOLE, Inode, Layout, contents, file_type, holes, is_compact,
};
use super::xattr::{Shared, body_count};
use super::{
    BLOCK, BLOCK_BITS, COMPAT_MTIME, IMAGE_MAX_BYTES, INCOMPAT_CHUNKED_FILE, MAGIC, Out, SLOT, SUPERBLOCK_AT,
    SUPERBLOCK_BYTES, dir,
};
use crate::error::{Error, Result};
use crate::tree::{Content, Kind, NodeId, ROOT, Tree};

/// Where one inode goes.
struct Place {
    id: NodeId,
    /// Byte of the image.
    at: u64,
    compact: bool,
    layout: Layout,
    size: u64,
    /// First whole block, counted from the first data block.
    block: u64,
}

/// Where everything goes.
pub(super) struct Plan<'a> {
    tree: &'a Tree,
    shared: Shared,
    nlink: Vec<u32>,
    /// By node: the folder that a folder is in.
    parents: Vec<NodeId>,
    /// By node: the number of its inode.
    nids: Vec<u64>,
    places: Vec<Place>,
    /// The time of most nodes, which their inodes leave out.
    time: (i64, u32),
    shared_block: u64,
    data_block: u64,
    end_block: u64,
}

impl<'a> Plan<'a> {
    /// Plans a tree that was checked.
    pub(super) fn new(tree: &'a Tree) -> Result<Plan<'a>> {
        let (order, parents) = order(tree);
        let shared = Shared::of(order.iter().map(|id| tree.node(*id)));
        let mut plan = Plan {
            time: most_common_time(tree, &order),
            nlink: tree.nlink(),
            nids: vec![0; tree.nodes.len()],
            places: Vec::with_capacity(order.len()),
            tree,
            shared,
            parents,
            shared_block: 0,
            data_block: 0,
            end_block: 0,
        };
        let mut at = SUPERBLOCK_AT + SUPERBLOCK_BYTES as u64;
        let mut blocks = 0;
        for id in order {
            let (place, end) = plan.place(id, at, blocks)?;
            at = end;
            blocks += whole_blocks(place.layout, place.size);
            plan.nids[id.0] = place.at / SLOT;
            plan.places.push(place);
            if at + blocks * BLOCK > IMAGE_MAX_BYTES {
                return Err(Error::Unsupported {
                    what: format!("an image whose metadata alone is more than {IMAGE_MAX_BYTES} bytes"),
                    help: "build it with fewer files or attributes".to_owned(),
                });
            }
        }
        plan.shared_block = at.div_ceil(BLOCK);
        plan.data_block = plan.shared_block + (plan.shared.bytes().len() as u64).div_ceil(BLOCK);
        plan.end_block = plan.data_block + blocks;
        Ok(plan)
    }

    /// Places one inode at or after `at`; with the end of it.
    fn place(&self, id: NodeId, at: u64, block: u64) -> Result<(Place, u64)> {
        let node = self.tree.node(id);
        let size = match &node.kind {
            Kind::Directory(names) => dir::size(with_dots(names.keys().map(Vec::as_slice))),
            Kind::File(Content::Object { size, .. }) => *size,
            _ => contents(node).len() as u64,
        };
        let compact = is_compact(node, size, self.nlink[id.0], self.time);
        let xattrs = self.shared.body(node).len();
        if body_count(xattrs).is_none() {
            return Err(Error::Unsupported {
                what: format!("a file with attributes of {xattrs} bytes in all"),
                help: "build the image with fewer attributes".to_owned(),
            });
        }
        let head = if compact { COMPACT_BYTES } else { EXTENDED_BYTES } + xattrs as u64;
        let mut at = at.next_multiple_of(SLOT);
        let (layout, follows) = match &node.kind {
            Kind::File(Content::Object { size, .. }) if *size > 0 => {
                let (bits, count) = holes(*size);
                (Layout::Holes { bits }, count.saturating_mul(HOLE.len() as u64))
            }
            _ => {
                let tail = size % BLOCK;
                if tail == 0 || head + tail > BLOCK {
                    (Layout::Blocks, 0)
                } else {
                    // The part that follows must not cross into another block.
                    if (at + head) / BLOCK != (at + head + tail - 1) / BLOCK {
                        at = at.next_multiple_of(BLOCK);
                    }
                    (Layout::Inline, tail)
                }
            }
        };
        Ok((Place { id, at, compact, layout, size, block }, at.saturating_add(head).saturating_add(follows)))
    }

    pub(super) fn write<W: Write>(&self, out: &mut Out<W>) -> io::Result<()> {
        out.pad_to(SUPERBLOCK_AT)?;
        out.put(&self.superblock())?;
        for (index, place) in self.places.iter().enumerate() {
            self.write_inode(out, place, index as u32 + 1)?;
        }
        out.pad_to(self.shared_block * BLOCK)?;
        out.put(self.shared.bytes())?;
        out.pad_to(self.data_block * BLOCK)?;
        for place in &self.places {
            let blocks = whole_blocks(place.layout, place.size);
            if blocks > 0 {
                let end = out.at + blocks * BLOCK;
                let contents = self.contents(place);
                out.put(&contents[..contents.len().min((blocks * BLOCK) as usize)])?;
                out.pad_to(end)?;
            }
        }
        Ok(())
    }

    fn write_inode<W: Write>(&self, out: &mut Out<W>, place: &Place, serial: u32) -> io::Result<()> {
        let node = self.tree.node(place.id);
        let xattrs = self.shared.body(node);
        let blocks = whole_blocks(place.layout, place.size);
        let inode = Inode {
            node,
            layout: place.layout,
            xattr_count: body_count(xattrs.len()).unwrap_or_default(),
            size: place.size,
            nlink: self.nlink[place.id.0],
            block: if blocks > 0 { (self.data_block + place.block) as u32 } else { 0 },
            serial,
        };
        out.pad_to(place.at)?;
        out.put(&inode.bytes(place.compact))?;
        out.put(&xattrs)?;
        match place.layout {
            Layout::Blocks => Ok(()),
            Layout::Inline => out.put(&self.contents(place)[(blocks * BLOCK) as usize..]),
            Layout::Holes { .. } => {
                let (_, count) = holes(place.size);
                (0..count).try_for_each(|_| out.put(&HOLE))
            }
        }
    }

    /// All contents of an inode that has any in the image.
    fn contents(&self, place: &Place) -> Vec<u8> {
        let node = self.tree.node(place.id);
        let Kind::Directory(names) = &node.kind else { return contents(node).to_vec() };
        let entry = |name, id: NodeId| dir::Entry {
            name,
            nid: self.nids[id.0],
            file_type: file_type(self.tree.node(id)).0,
        };
        let entries: Vec<_> = with_dots(names.keys().map(Vec::as_slice))
            .map(|name| match names.get(name) {
                Some(id) => entry(name, *id),
                None if name == b"." => entry(name, place.id),
                None => entry(name, self.parents[place.id.0]),
            })
            .collect();
        dir::bytes(&entries)
    }

    fn superblock(&self) -> [u8; SUPERBLOCK_BYTES] {
        let mut out = [0; SUPERBLOCK_BYTES];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &MAGIC.to_le_bytes());
        put(0x08, &COMPAT_MTIME.to_le_bytes());
        put(0x0c, &[BLOCK_BITS]);
        // The root is placed first, so its number is small.
        put(0x0e, &(self.nids[ROOT.0] as u16).to_le_bytes());
        put(0x10, &(self.places.len() as u64).to_le_bytes());
        put(0x18, &self.time.0.to_le_bytes());
        put(0x20, &self.time.1.to_le_bytes());
        put(0x24, &(self.end_block as u32).to_le_bytes());
        put(0x2c, &(self.shared_block as u32).to_le_bytes());
        put(0x50, &INCOMPAT_CHUNKED_FILE.to_le_bytes());
        out
    }
}

/// Every node that has a name, once, the root first; and by node, the folder that a folder is in.
fn order(tree: &Tree) -> (Vec<NodeId>, Vec<NodeId>) {
    let mut parents = vec![ROOT; tree.nodes.len()];
    let mut seen = vec![false; tree.nodes.len()];
    let mut order = Vec::new();
    let mut stack = vec![ROOT];
    while let Some(id) = stack.pop() {
        if std::mem::replace(&mut seen[id.0], true) {
            continue;
        }
        order.push(id);
        for child in tree.node(id).names().into_iter().flat_map(BTreeMap::values).rev() {
            if tree.node(*child).names().is_some() {
                parents[child.0] = id;
            }
            stack.push(*child);
        }
    }
    (order, parents)
}

fn most_common_time(tree: &Tree, order: &[NodeId]) -> (i64, u32) {
    let mut counts: BTreeMap<(i64, u32), usize> = BTreeMap::new();
    for id in order {
        let meta = &tree.node(*id).meta;
        *counts.entry((meta.mtime_s, meta.mtime_ns)).or_default() += 1;
    }
    counts.into_iter().max_by_key(|(_, count)| *count).map_or((0, 0), |(time, _)| time)
}

/// Blocks of an inode's contents outside of it.
fn whole_blocks(layout: Layout, size: u64) -> u64 {
    match layout {
        Layout::Blocks => size.div_ceil(BLOCK),
        Layout::Inline => size / BLOCK,
        Layout::Holes { .. } => 0,
    }
}

/// Puts `.` and `..` among names that are in order.
fn with_dots<'n>(names: impl Iterator<Item = &'n [u8]>) -> impl Iterator<Item = &'n [u8]> {
    let mut dots: std::iter::Peekable<std::array::IntoIter<&'static [u8], 2>> =
        [&b"."[..], &b".."[..]].into_iter().peekable();
    let mut names = names.peekable();
    std::iter::from_fn(move || match (dots.peek(), names.peek()) {
        (Some(dot), Some(name)) if name < dot => names.next(),
        (Some(_), _) => dots.next(),
        (None, _) => names.next(),
    })
}
