//! What makes the store safe against crashes without an fsync for each of many thousand files.
//!
//! `dirty` is there, synced, before anything is written, and goes after a sync of the whole file system. An image's
//! record is written after such a sync. So when a store is opened and `dirty` is there, what records refer to is whole
//! all the same; everything else may be half written, and is hashed again ([`super::Store::open`]).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::objects::lock;
use crate::error::{Error, Result};

/// How often it is looked whether the last thread of a pull has ended: they have nothing left to do but that.
const HELD_POLL: Duration = Duration::from_millis(1);

/// Knows who writes.
pub(super) struct Writers {
    dir: PathBuf,
    count: Mutex<u32>,
}

/// Held while a pull writes, also by each of its threads and jobs.
pub(super) struct Writing {
    writers: Arc<Writers>,
    done: bool,
}

impl Writers {
    pub(super) fn new(dir: &Path) -> Arc<Writers> {
        Arc::new(Writers { dir: dir.to_owned(), count: Mutex::new(0) })
    }

    fn marker(&self) -> PathBuf {
        self.dir.join("dirty")
    }

    /// Whether the last process that wrote did not come to its end.
    pub(super) fn is_dirty(&self) -> bool {
        self.marker().exists()
    }

    /// To be called before anything is written. Blocks for a sync of one small file.
    pub(super) fn begin(self: &Arc<Self>) -> Result<Arc<Writing>> {
        let mut count = lock(&self.count);
        if *count == 0 && !self.is_dirty() {
            let marker = self.marker();
            let text = format!("process {} writes here\n", std::process::id());
            std::fs::write(&marker, text).map_err(Error::io("writing", &marker))?;
            File::open(&marker).and_then(|file| file.sync_all()).map_err(Error::io("syncing", &marker))?;
            sync_dir(&self.dir)?;
        }
        *count += 1;
        Ok(Arc::new(Writing { writers: self.clone(), done: false }))
    }

    /// Whether nobody writes.
    pub(super) fn are_idle(&self) -> bool {
        *lock(&self.count) == 0
    }

    /// Brings everything that was written so far to the disk.
    pub(super) fn sync(&self) -> Result<()> {
        let opened = File::open(&self.dir).map_err(Error::io("syncing", &self.dir))?;
        nix::unistd::syncfs(&opened).map_err(|e| Error::io("syncing", &self.dir)(e.into()))
    }

    /// After a check of everything that may be half written.
    pub(super) fn clean(&self) -> Result<()> {
        self.sync()?;
        let marker = self.marker();
        match std::fs::remove_file(&marker) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("removing", &marker)(e)),
            _ => Ok(()),
        }
    }
}

impl Writing {
    /// Ends the writing, after a sync; the last one takes the marker away. Blocks until every thread of the pull has
    /// let go of it: one that still writes may be killed in the middle of that.
    pub(super) fn finish(mut writing: Arc<Writing>) -> Result<()> {
        let mut writing = loop {
            match Arc::try_unwrap(writing) {
                Ok(writing) => break writing,
                Err(shared) => writing = shared,
            }
            std::thread::sleep(HELD_POLL);
        };
        writing.done = true;
        let writers = writing.writers.clone();
        drop(writing);
        let mut count = lock(&writers.count);
        *count -= 1;
        // Under the lock: nobody begins between the sync and the removal.
        if *count == 0 { writers.clean() } else { Ok(()) }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if !self.done {
            // The marker stays until the next one that finishes, or the next opening.
            *lock(&self.writers.count) -= 1;
        }
    }
}

pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io("syncing", dir))
}
