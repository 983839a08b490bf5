//! From the tables of an image's layers to what is mounted.

use std::io::BufWriter;
use std::sync::Arc;

use super::Inner;
use super::table::{Content, Entry, Kind, Table};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::mount::Mounter;
use crate::tree::{self, Builder, Meta, Node, Tree};

/// The tree that layers add up to, lowest first.
pub(super) fn tree<'a>(tables: impl IntoIterator<Item = &'a Arc<Table>>) -> Result<Tree> {
    let mut builder = Builder::new();
    for table in tables {
        builder.begin_layer();
        for entry in &table.entries {
            match &entry.kind {
                Kind::HardLink(target) => builder.link(&entry.path, target)?,
                _ => builder.add(&entry.path, node(entry))?,
            }
        }
    }
    Ok(builder.finish())
}

fn node(entry: &Entry) -> Node {
    let kind = match &entry.kind {
        Kind::Directory | Kind::HardLink(_) => tree::Kind::Directory(Default::default()),
        Kind::Symlink(target) => tree::Kind::Symlink(target.clone()),
        Kind::CharDevice(major, minor) => tree::Kind::CharDevice { major: *major, minor: *minor },
        Kind::BlockDevice(major, minor) => tree::Kind::BlockDevice { major: *major, minor: *minor },
        Kind::Fifo => tree::Kind::Fifo,
        Kind::File(file) => tree::Kind::File(match &file.content {
            Content::Inline(bytes) => tree::Content::Inline(bytes.clone()),
            Content::Object(_) => tree::Content::Object { digest: file.id.digest(), size: file.size },
        }),
    };
    let meta = Meta {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime_s: entry.mtime_s,
        mtime_ns: entry.mtime_ns,
        xattrs: entry.xattrs.iter().cloned().collect(),
    };
    Node { meta, kind }
}

impl Inner {
    /// Makes what is mounted, from the tables; false where a table is missing.
    pub(super) fn build(&self, manifest: &Digest, diff_ids: &[Digest]) -> Result<bool> {
        let mut tables = Vec::with_capacity(diff_ids.len());
        for diff_id in diff_ids {
            let Some(table) = self.table(diff_id)? else { return Ok(false) };
            tables.push(table);
        }
        self.build_from(manifest, &tables)?;
        Ok(true)
    }

    pub(super) fn build_from(&self, manifest: &Digest, tables: &[Arc<Table>]) -> Result<()> {
        let tree = tree(tables)?;
        let mounter = self.mounter()?;
        let path = self.mount_path(manifest, mounter);
        let tmp = self.dir.join("tmp");
        match mounter {
            Mounter::Erofs => {
                let mut file =
                    tempfile::NamedTempFile::new_in(&tmp).map_err(Error::io("creating a file in", &tmp))?;
                let mut out = BufWriter::with_capacity(1 << 20, file.as_file_mut());
                crate::erofs::write(&tree, &mut out)?;
                out.into_inner().map_err(|e| Error::io("writing", &path)(e.into_error()))?;
                file.persist(&path).map(drop).map_err(|e| Error::io("writing", &path)(e.error))
            }
            Mounter::Folders { .. } => {
                let dir = tempfile::tempdir_in(&tmp).map_err(Error::io("creating a folder in", &tmp))?;
                tree::write_folders(&tree, self.objects.dir(), dir.path())?;
                match std::fs::rename(dir.path(), &path) {
                    Ok(()) => {
                        // The folder has another name now: nothing is left to remove.
                        let _ = dir.keep();
                        Ok(())
                    }
                    // Another pull of the same image was first.
                    Err(_) if path.is_dir() => Ok(()),
                    Err(e) => Err(Error::io("moving an image to", &path)(e)),
                }
            }
        }
    }
}
