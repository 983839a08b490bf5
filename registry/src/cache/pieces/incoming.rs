//! Blobs that are being fetched whole: in a file of their own, with room of the budget, until they are verified.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyplace_images::Digest;

use super::{Blob, FREED_WHEN_FULL_BYTES, Pieces, is_full};
use crate::cache::counters::CacheCounters;
use crate::cache::layout::{Hash, Layout};

/// A blob that is being fetched whole. Its file goes away unless it is committed.
pub(crate) struct Incoming {
    pieces: Arc<Pieces>,
    path: PathBuf,
    file: File,
    size: u64,
    committed: bool,
}

/// There is no room for the blob, whatever is evicted.
#[derive(Debug)]
pub(crate) struct TooLarge {
    pub(crate) size: u64,
    pub(crate) budget: u64,
}

impl Pieces {
    /// Begins a blob that can be verified only when all of it is here.
    pub(crate) fn begin(self: &Arc<Pieces>, size: u64) -> io::Result<Result<Incoming, TooLarge>> {
        let incoming = self.incoming.fetch_add(size, Ordering::SeqCst);
        if incoming.saturating_add(size) > self.budget {
            self.incoming.fetch_sub(size, Ordering::SeqCst);
            CacheCounters::one(&self.counters.refused_large);
            return Ok(Err(TooLarge { size, budget: self.budget - incoming.min(self.budget) }));
        }
        self.used.fetch_add(size, Ordering::SeqCst);
        self.make_room(0);
        let path =
            self.root.join("incoming").join(format!("blob-{}", self.next.fetch_add(1, Ordering::Relaxed)));
        match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
            Ok(file) => Ok(Ok(Incoming { pieces: self.clone(), path, file, size, committed: false })),
            Err(error) => {
                self.end(size);
                self.used.fetch_sub(size, Ordering::SeqCst);
                Err(error)
            }
        }
    }

    /// A blob is not being fetched whole any more.
    fn end(&self, size: u64) {
        self.incoming.fetch_sub(size, Ordering::SeqCst);
    }
}

impl Incoming {
    /// Writes at a position. A disk without room gets some from what is cached.
    pub(crate) fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        match self.file.write_all_at(bytes, position) {
            Err(error) if is_full(&error) => {
                CacheCounters::one(&self.pieces.counters.disk_full);
                self.pieces.make_room(FREED_WHEN_FULL_BYTES.max(bytes.len() as u64));
                self.file.write_all_at(bytes, position)
            }
            result => result,
        }
    }

    /// Makes it the blob that it was verified to be.
    pub(crate) fn commit(
        mut self,
        digest: &Digest,
        piece_bytes: u64,
        hashes: Vec<Hash>,
    ) -> io::Result<Arc<Blob>> {
        let layout = Layout::proven(self.size, piece_bytes, hashes).map_err(io::Error::other)?;
        let pieces = self.pieces.clone();
        pieces.forget(digest);
        let path = pieces.path(digest);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::rename(&self.path, &path)?;
        self.committed = true;
        pieces.record(digest, &layout);
        let blob = Arc::new(Blob::new(digest.clone(), layout));
        pieces.blobs().insert(digest.clone(), blob.clone());
        (0..blob.layout.count()).for_each(|index| pieces.mark(&blob, index));
        Ok(blob)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.pieces.end(self.size);
        if !self.committed {
            self.pieces.used.fetch_sub(self.size, Ordering::SeqCst);
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
