//! The folder for a push's temporary files: `anyplace-push-*` in the temporary folder, gone when the push ends.
//!
//! Where a push is killed its folder stays. Each holds a file `lock`, locked as long as its process lives, so that the
//! next push can tell, and removes what nobody holds.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use tempfile::TempDir;

const PREFIX: &str = "anyplace-push-";
const LOCK: &str = "lock";
/// A younger folder may belong to a push that didn't lock it yet.
const LEFT_AFTER: Duration = Duration::from_secs(60);

/// A push's folder.
pub(super) struct Work {
    dir: TempDir,
    _lock: File,
}

impl Work {
    /// A new folder; those of killed pushes are removed.
    pub(super) fn new() -> anyhow::Result<Work> {
        clean(&std::env::temp_dir());
        let help = "no folder for temporary files; set TMPDIR to a place with room";
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir().context(help)?;
        let lock = File::create(dir.path().join(LOCK)).context(help)?;
        lock.lock().context(help)?;
        Ok(Work { dir, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes what killed pushes of this user left. What can't be removed doesn't hinder this push.
fn clean(temporary: &Path) {
    let Ok(entries) = std::fs::read_dir(temporary) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) && is_left(&entry.path()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn is_left(dir: &Path) -> bool {
    let Ok(metadata) = std::fs::symlink_metadata(dir) else { return false };
    let age = metadata.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
    if !metadata.is_dir()
        || metadata.uid() != nix::unistd::geteuid().as_raw()
        || age.is_none_or(|age| age < LEFT_AFTER)
    {
        return false;
    }
    match File::open(dir.join(LOCK)) {
        Ok(lock) => lock.try_lock().is_ok(),
        // Killed before it could lock.
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}
