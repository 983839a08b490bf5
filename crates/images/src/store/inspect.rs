//! What is in an image, and what differs between two.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::objects::lock;
use super::table::Table;
use super::{Documents, Inner, Store, StoredImage, build};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::ImageConfig;
use crate::reference::Reference;
use crate::tree::{Content, Kind, Node, NodeId, Tree};

/// What is known of an image in the store.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Inspected {
    /// Its name and digests.
    pub image: StoredImage,
    /// How to run it.
    pub config: ImageConfig,
    /// Its layers, lowest first.
    pub layers: Vec<InspectedLayer>,
    /// Regular files that it shows, all layers together.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// A layer of an image.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct InspectedLayer {
    /// Digest of the blob.
    pub digest: Digest,
    /// Digest of its archive.
    pub diff_id: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Entries of the archive.
    pub entries: u64,
    /// Bytes of its regular files.
    pub bytes: u64,
}

/// What differs between two images.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Diff {
    /// Paths that only the second has.
    pub added: Vec<String>,
    /// Paths that both have, with another kind, content, owner, mode or attributes.
    pub changed: Vec<String>,
    /// Paths that only the first has.
    pub removed: Vec<String>,
    /// Bytes of contents that both have, each once.
    pub shared_bytes: u64,
    /// Bytes of contents that only the first has.
    pub first_bytes: u64,
    /// Bytes of contents that only the second has.
    pub second_bytes: u64,
}

/// An image's documents and tables.
struct Opened {
    image: StoredImage,
    documents: Documents,
    tables: Vec<Arc<Table>>,
}

impl Store {
    /// What is in an image. Blocks.
    pub fn inspect(&self, reference: &Reference) -> Result<Inspected> {
        let Opened { image, documents, tables } = self.inner.opened(reference)?;
        let layers = documents.manifest.layers.iter().zip(&documents.config.rootfs.diff_ids).zip(&tables);
        let layers = layers.map(|((layer, diff_id), table)| InspectedLayer {
            digest: layer.digest.clone(),
            diff_id: diff_id.clone(),
            size: layer.size,
            entries: table.entries.len() as u64,
            bytes: table.files().map(|file| file.size).sum(),
        });
        let layers = layers.collect();
        let tree = build::tree(&tables)?;
        let sizes = tree.nodes.iter().filter_map(|node| match &node.kind {
            Kind::File(content) => Some(size(content)),
            _ => None,
        });
        let (mut files, mut bytes) = (0, 0);
        for size in sizes {
            files += 1;
            bytes += size;
        }
        Ok(Inspected { image, config: documents.config, layers, files, bytes })
    }

    /// What differs between two images. Blocks.
    pub fn diff(&self, first: &Reference, second: &Reference) -> Result<Diff> {
        let (first, second) = (self.inner.opened(first)?, self.inner.opened(second)?);
        let (first, second) = (build::tree(&first.tables)?, build::tree(&second.tables)?);
        let names = |tree: &Tree| -> BTreeMap<Vec<u8>, NodeId> { tree.walk().collect() };
        let (of_first, of_second) = (names(&first), names(&second));
        let show = |path: &[u8]| format!("/{}", String::from_utf8_lossy(path));
        let mut diff = Diff::default();
        for (path, id) in &of_second {
            match of_first.get(path) {
                None => diff.added.push(show(path)),
                Some(old) if !is_same(first.node(*old), second.node(*id)) => diff.changed.push(show(path)),
                Some(_) => {}
            }
        }
        diff.removed =
            of_first.keys().filter(|path| !of_second.contains_key(*path)).map(|path| show(path)).collect();
        let contents = |tree: &Tree| -> HashMap<Digest, u64> {
            let files = tree.nodes.iter().filter_map(|node| match &node.kind {
                Kind::File(Content::Inline(bytes)) => Some((Digest::of(bytes), bytes.len() as u64)),
                Kind::File(Content::Object { digest, size }) => Some((digest.clone(), *size)),
                _ => None,
            });
            files.collect()
        };
        let (of_first, of_second) = (contents(&first), contents(&second));
        let shared: HashSet<&Digest> =
            of_first.keys().filter(|digest| of_second.contains_key(*digest)).collect();
        let sum = |of: &HashMap<Digest, u64>, both: bool| -> u64 {
            of.iter().filter(|(digest, _)| shared.contains(digest) == both).map(|(_, size)| size).sum()
        };
        diff.shared_bytes = sum(&of_first, true);
        diff.first_bytes = sum(&of_first, false);
        diff.second_bytes = sum(&of_second, false);
        Ok(diff)
    }
}

fn size(content: &Content) -> u64 {
    match content {
        Content::Inline(bytes) => bytes.len() as u64,
        Content::Object { size, .. } => *size,
    }
}

/// Times are left out: rebuilds change them all.
fn is_same(a: &Node, b: &Node) -> bool {
    let meta = |node: &Node| {
        let meta = &node.meta;
        (meta.mode, meta.uid, meta.gid, meta.xattrs.clone())
    };
    let kind = match (&a.kind, &b.kind) {
        (Kind::Directory(_), Kind::Directory(_)) => true,
        (a, b) => a == b,
    };
    kind && meta(a) == meta(b)
}

impl Inner {
    fn opened(&self, reference: &Reference) -> Result<Opened> {
        let key = reference.canonical().to_string();
        let missing = || Error::NotInStore { reference: reference.to_string() };
        let image = lock(&self.images).get(&key).map(|l| l.image.clone()).ok_or_else(missing)?;
        let damaged = || Error::Damaged { what: format!("the image `{reference}` in the store") };
        let documents = self.documents(&image.manifest)?.ok_or_else(damaged)?;
        let mut tables = Vec::new();
        for diff_id in &documents.config.rootfs.diff_ids {
            tables.push(self.table(diff_id)?.ok_or_else(damaged)?);
        }
        Ok(Opened { image, documents, tables })
    }
}
