//! Adds up layers: the rules of the OCI image specification ("Applying Changesets"), as overlayfs shows them.
//!
//! - A whiteout hides what lower layers have, wherever in its layer's archive it stands.
//! - A folder is merged with the lower layers' folder of that name, and takes the upper one's owner, mode and time;
//!   anything else replaces what was there.
//! - A path below a link: a link of the same layer is followed, never beyond the root, as every tool that unpacks one
//!   layer into one folder does. A link of a lower layer is replaced by a folder, since overlayfs shows the upper
//!   layer's folder in its place.
//!
//! Each node remembers which layer named it last, so "of this layer" is a comparison. Only a hard link to a lower
//! layer's file needs to be remembered by name.

use std::collections::{BTreeMap, HashSet};

use super::check::{is_whiteout, linux_keeps, names, node as check_node};
use super::{Kind, NODES_MAX, Node, NodeId, ROOT, Tree, lossy, refused, too_many};
use crate::error::Result;

/// A name that starts with this deletes the rest of the name from the layers below.
const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// A file of this name hides all that the layers below have in its folder.
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
/// Most links that one path may lead through, as on Linux.
const LINKS_MAX: usize = 40;
/// Deepest folder that links may lead to; without links the path's length is the bound, and is about this.
const DEPTH_MAX: usize = 2048;

/// Makes a [`Tree`] from layers, lowest first.
#[derive(Debug, Default)]
pub struct Builder {
    tree: Tree,
    /// By node; those after the end are as new.
    stamps: Vec<Stamp>,
    /// Number of the current layer, from 1.
    layer: u32,
    /// Names of the current layer for nodes of lower ones.
    linked: HashSet<(NodeId, Vec<u8>)>,
    /// Hard links so far, which count towards the bound.
    links: usize,
    ignored_xattrs: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Stamp {
    /// Layer that named it last, 0 for none.
    named: u32,
    /// Last layer that hid what lower ones have in it.
    hidden: u32,
    /// Last layer that has it only by saying that it is opaque.
    opaque: u32,
}

impl Builder {
    /// An empty root, of root's, mode 0755.
    pub fn new() -> Builder {
        Builder::default()
    }

    /// Starts the next layer, on top of what was added so far.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
        self.linked.clear();
    }

    /// Adds an entry of the current layer. A folder must come without names.
    ///
    /// Whiteouts are known by their names (`.wh.NAME`, `.wh..wh..opq`) and by overlayfs' own sign, a character device
    /// 0:0, which is one wherever layers are unpacked for overlayfs.
    pub fn add(&mut self, path: &[u8], mut node: Node) -> Result<()> {
        let xattrs = node.meta.xattrs.len();
        node.meta.xattrs.retain(|name, _| linux_keeps(name));
        self.ignored_xattrs += (xattrs - node.meta.xattrs.len()) as u64;
        let parts = names(path)?;
        let Some((&name, parents)) = parts.split_last() else {
            return self.set_root(path, node);
        };
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            return self.marker(path, parents, name, hidden);
        }
        check_node(path, &node)?;
        if is_whiteout(&node) {
            return self.whiteout_in(path, parents, name);
        }
        if node.names().is_some_and(|names| !names.is_empty()) {
            return Err(refused(path, "a folder that is added together with what it holds"));
        }
        let parent = self.folder(path, parents)?;
        if let Some(old) = self.child(parent, name)
            && node.names().is_some()
            && self.tree.node(old).names().is_some()
        {
            self.tree.nodes[old.0].meta = node.meta;
            self.stamp(old).named = self.layer;
            return Ok(());
        }
        let id = self.push(path, node)?;
        if !self.linked.is_empty() {
            self.linked.remove(&(parent, name.to_vec()));
        }
        self.tree.name(parent, name, id);
        Ok(())
    }

    /// Attributes that were left out because no file system of Linux keeps them, such as `com.apple.quarantine`.
    pub fn ignored_xattrs(&self) -> u64 {
        self.ignored_xattrs
    }

    /// Adds a hard link to what is at `target`, of this layer or a lower one.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let parts = names(path)?;
        let Some((&name, parents)) = parts.split_last() else {
            return Err(refused(path, "the layer's root can only be a folder"));
        };
        let missing =
            || refused(path, &format!("a hard link to `{}`, which isn't in the image", lossy(target)));
        let target_parts = names(target)?;
        let (&target_name, target_parents) = target_parts.split_last().ok_or_else(missing)?;
        let dir = self.existing(path, target_parents)?.ok_or_else(missing)?;
        let id = self.child(dir, target_name).ok_or_else(missing)?;
        if self.tree.node(id).names().is_some() {
            return Err(refused(path, "a hard link to a folder"));
        }
        let parent = self.folder(path, parents)?;
        self.links += 1;
        if self.tree.nodes.len() + self.links > NODES_MAX {
            return Err(too_many(path));
        }
        self.tree.name(parent, name, id);
        if self.stamp(id).named != self.layer {
            self.linked.insert((parent, name.to_vec()));
        }
        Ok(())
    }

    /// Hides what lower layers have at `path`.
    pub fn whiteout(&mut self, path: &[u8]) -> Result<()> {
        match names(path)?.split_last() {
            Some((name, parents)) => self.whiteout_in(path, parents, name),
            None => Err(refused(path, "it deletes the image's root")),
        }
    }

    /// Hides what lower layers have in the folder `path`.
    pub fn opaque(&mut self, path: &[u8]) -> Result<()> {
        let parts = names(path)?;
        self.opaque_in(path, &parts)
    }

    /// The tree that all layers add up to. Ids follow the order of [`Tree::walk`], whatever the layers' order was.
    pub fn finish(mut self) -> Tree {
        let mut new_ids: Vec<Option<NodeId>> = vec![None; self.tree.nodes.len()];
        let mut order = Vec::new();
        for (_, id) in self.tree.walk() {
            if new_ids[id.0].is_none() {
                new_ids[id.0] = Some(NodeId(order.len()));
                order.push(id);
            }
        }
        let mut nodes = Vec::with_capacity(order.len());
        for id in order {
            let mut node = std::mem::replace(&mut self.tree.nodes[id.0], Node::implied_dir());
            for child in node.names_mut().into_iter().flat_map(BTreeMap::values_mut) {
                // The walk went through this name, so its node has a new id.
                *child = new_ids[child.0].unwrap_or(ROOT);
            }
            nodes.push(node);
        }
        Tree { nodes }
    }

    fn set_root(&mut self, path: &[u8], node: Node) -> Result<()> {
        check_node(path, &node)?;
        match node.kind {
            Kind::Directory(names) if names.is_empty() => {
                self.tree.nodes[ROOT.0].meta = node.meta;
                Ok(())
            }
            Kind::Directory(_) => Err(refused(path, "a folder that is added together with what it holds")),
            _ => Err(refused(path, "the layer's root can only be a folder")),
        }
    }

    fn marker(&mut self, path: &[u8], parents: &[&[u8]], name: &[u8], hidden: &[u8]) -> Result<()> {
        if name == OPAQUE_MARKER {
            return self.opaque_in(path, parents);
        }
        if hidden.starts_with(WHITEOUT_PREFIX) {
            // Bookkeeping of aufs (`.wh..wh.plnk` and the like), of no meaning to anyone else.
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(refused(path, "it deletes no name that a file can have"));
        }
        self.whiteout_in(path, parents, hidden)
    }

    fn opaque_in(&mut self, path: &[u8], folder: &[&[u8]]) -> Result<()> {
        let dir = self.folder(path, folder)?;
        self.hide_below(dir);
        self.stamp(dir).opaque = self.layer;
        Ok(())
    }

    fn whiteout_in(&mut self, path: &[u8], parents: &[&[u8]], name: &[u8]) -> Result<()> {
        // Where the folder is missing, there is nothing to hide.
        let Some(parent) = self.existing(path, parents)? else { return Ok(()) };
        self.hide(parent, name);
        Ok(())
    }

    /// Takes what lower layers have at a name. A folder that the current layer has something in stays for that.
    fn hide(&mut self, parent: NodeId, name: &[u8]) {
        let Some(id) = self.child(parent, name) else { return };
        let of_this_layer = self.is_current(parent, name, id);
        let stays = match self.tree.node(id).names() {
            Some(_) => self.hide_below(id) || of_this_layer || self.stamp(id).opaque == self.layer,
            None => of_this_layer,
        };
        if !stays {
            if let Some(names) = self.tree.nodes[parent.0].names_mut() {
                names.remove(name);
            }
        } else if !of_this_layer {
            self.tree.nodes[id.0].meta = Node::implied_dir().meta;
        }
    }

    /// Takes all that lower layers have in a folder; whether anything stays. Paths have a bound, and so has the depth.
    fn hide_below(&mut self, dir: NodeId) -> bool {
        let layer = self.layer;
        // Once is enough: all that is added later is of this layer.
        if std::mem::replace(&mut self.stamp(dir).hidden, layer) != layer {
            let names = self.tree.node(dir).names().into_iter().flat_map(BTreeMap::keys);
            for name in names.cloned().collect::<Vec<_>>() {
                self.hide(dir, &name);
            }
        }
        self.tree.node(dir).names().is_some_and(|names| !names.is_empty())
    }

    fn is_current(&self, parent: NodeId, name: &[u8], id: NodeId) -> bool {
        self.stamps.get(id.0).is_some_and(|stamp| stamp.named == self.layer)
            || (!self.linked.is_empty() && self.linked.contains(&(parent, name.to_vec())))
    }

    fn child(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        self.tree.node(dir).names()?.get(name).copied()
    }

    fn push(&mut self, path: &[u8], node: Node) -> Result<NodeId> {
        let id = NodeId(self.tree.nodes.len());
        if id.0 >= NODES_MAX {
            return Err(too_many(path));
        }
        self.tree.nodes.push(node);
        self.stamp(id).named = self.layer;
        Ok(id)
    }

    fn stamp(&mut self, id: NodeId) -> &mut Stamp {
        if self.stamps.len() <= id.0 {
            self.stamps.resize(id.0 + 1, Stamp::default());
        }
        &mut self.stamps[id.0]
    }

    /// The folder at a path, made where the layer left it out.
    fn folder(&mut self, path: &[u8], parents: &[&[u8]]) -> Result<NodeId> {
        let found = self.resolve(path, parents, true)?;
        found.ok_or_else(|| refused(path, "its folder can't be made"))
    }

    /// The folder at a path if it is there.
    fn existing(&mut self, path: &[u8], parents: &[&[u8]]) -> Result<Option<NodeId>> {
        self.resolve(path, parents, false)
    }

    fn resolve(&mut self, path: &[u8], parents: &[&[u8]], make: bool) -> Result<Option<NodeId>> {
        // Most paths lead through folders only.
        let mut at = ROOT;
        let mut done = 0;
        while let Some(next) = parents.get(done).and_then(|name| self.child(at, name)) {
            if self.tree.node(next).names().is_none() {
                break;
            }
            at = next;
            done += 1;
        }
        if done == parents.len() { Ok(Some(at)) } else { self.resolve_links(path, parents, make) }
    }

    fn resolve_links(&mut self, path: &[u8], parents: &[&[u8]], make: bool) -> Result<Option<NodeId>> {
        let mut reached = vec![ROOT];
        // What is left to go, last first, and whether a link said so.
        let mut ahead: Vec<(Vec<u8>, bool)> =
            parents.iter().rev().map(|name| (name.to_vec(), false)).collect();
        let mut links = 0;
        while let Some((name, by_link)) = ahead.pop() {
            let at = reached.last().copied().unwrap_or(ROOT);
            if name == b".." {
                if reached.len() > 1 {
                    reached.pop();
                }
                continue;
            }
            let child = self.child(at, &name);
            let current = child.is_some_and(|id| self.is_current(at, &name, id));
            match child.map(|id| (id, &self.tree.node(id).kind)) {
                Some((id, Kind::Directory(_))) => reached.push(id),
                Some((_, Kind::Symlink(target))) if current => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(refused(
                            path,
                            &format!("its path leads through more than {LINKS_MAX} links"),
                        ));
                    }
                    if target.first() == Some(&b'/') {
                        reached.truncate(1);
                    }
                    let parts = target.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".");
                    ahead.extend(parts.rev().map(|part| (part.to_vec(), true)));
                }
                _ if !make => return Ok(None),
                Some(_) if current => {
                    let what = format!("`{}` in its path is a file, used as a folder", lossy(&name));
                    return Err(refused(path, &what));
                }
                _ if by_link => {
                    let what =
                        format!("`{}` in its path is a link to nowhere, used as a folder", lossy(&name));
                    return Err(refused(path, &what));
                }
                _ => {
                    let made = self.push(path, Node::implied_dir())?;
                    self.tree.name(at, &name, made);
                    reached.push(made);
                }
            }
            if reached.len() > DEPTH_MAX {
                return Err(refused(path, &format!("its folder is more than {DEPTH_MAX} folders deep")));
            }
        }
        Ok(reached.last().copied())
    }
}
