//! Remembers where uploads go on, so that a push after kill -9 sends only what the registry doesn't have.
//!
//! Layout: one file for each upload in progress, `<32 hex digits>.json`, named by the sha256 of registry,
//! repository and digest:
//! `{"registry", "repository", "digest", "location", "part_max"}`. While a process uploads it holds the file's lock; another
//! that pushes the same blob at the same time does so without a journal. Nothing here needs to be right: a location
//! that the registry doesn't know costs one request, and what was uploaded is verified by its digest.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// Registries forget uploads that nobody went on with; seven days is the common age.
const STALE_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);
/// Most uploads that are remembered; further ones start from the beginning after a kill.
const ENTRIES_MAX: usize = 1_000;
/// A record is a few hundred bytes; anything larger is none.
const RECORD_MAX_BYTES: u64 = 64 << 10;

/// The folder of remembered uploads.
#[derive(Clone, Debug)]
pub struct Journal {
    dir: PathBuf,
}

/// One upload, held by this process.
#[derive(Debug)]
pub(crate) struct Entry {
    path: PathBuf,
    file: Flock<File>,
    record: Record,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    registry: String,
    repository: String,
    digest: Digest,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    location: Option<String>,
    /// Largest part that the registry takes, in bytes; it says so only where an upload starts.
    #[serde(default)]
    part_max: u64,
}

impl Journal {
    /// Opens the folder, made if it isn't there, and forgets what is stale.
    ///
    /// # Errors
    /// Where the folder can't be made or read; a push works without a journal too.
    pub fn open(dir: &Path) -> std::io::Result<Journal> {
        std::fs::create_dir_all(dir)?;
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let age = SystemTime::now().duration_since(entry.metadata()?.modified()?).unwrap_or_default();
            if age > STALE_AFTER && entry.path().extension().is_some_and(|extension| extension == "json") {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(Journal { dir: dir.to_owned() })
    }

    /// The place of one upload; none where another process holds it, or where it can't be kept.
    pub(crate) fn entry(&self, registry: &str, repository: &str, digest: &Digest) -> Option<Entry> {
        let name = Digest::of(format!("{registry}\n{repository}\n{digest}").as_bytes());
        let path = self.dir.join(format!("{}.json", &name.hex()[..32]));
        if !path.exists() && std::fs::read_dir(&self.dir).ok()?.count() >= ENTRIES_MAX {
            tracing::warn!(dir = %self.dir.display(), max = ENTRIES_MAX, "too many uploads to remember another");
            return None;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).ok()?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()?;
        let mut text = Vec::new();
        (&mut *file).take(RECORD_MAX_BYTES).read_to_end(&mut text).ok()?;
        let fresh = Record {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            digest: digest.clone(),
            location: None,
            part_max: 0,
        };
        // What was torn by the kill, or isn't this upload's, counts as nothing.
        let known = serde_json::from_slice::<Record>(&text).ok();
        let record = known
            .filter(|known| Record { location: None, part_max: 0, ..known.clone() } == fresh)
            .unwrap_or(fresh);
        Some(Entry { path, file, record })
    }
}

impl Entry {
    /// Where the upload goes on.
    pub(crate) fn location(&self) -> Option<String> {
        self.record.location.clone()
    }

    /// Largest part that the registry takes, in bytes.
    pub(crate) fn part_max(&self) -> u64 {
        self.record.part_max.max(1)
    }

    /// Notes where the upload goes on. A failure costs only what a later kill would repeat.
    pub(crate) fn remember(&mut self, location: &str, part_max: u64) {
        if self.record.location.as_deref() == Some(location) && self.record.part_max == part_max {
            return;
        }
        self.record.location = Some(location.to_owned());
        self.record.part_max = part_max;
        if let Err(error) = self.write() {
            tracing::debug!(path = %self.path.display(), %error, "can't note where an upload goes on");
        }
    }

    fn write(&mut self) -> std::io::Result<()> {
        let text = serde_json::to_vec(&self.record)?;
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(&text)
    }

    /// The upload is done.
    pub(crate) fn forget(self) {
        // Under the lock, so that what goes is this process's own record.
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "can't remove the note of an upload");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_are_remembered_until_they_are_done() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("a/b")).unwrap();
        let digest = Digest::of(b"x");
        let mut entry = journal.entry("http://r", "app", &digest).unwrap();
        assert_eq!(entry.location(), None);
        entry.remember("http://r/v2/app/blobs/uploads/1?state=a-long-one", 5);
        entry.remember("http://r/v2/app/blobs/uploads/1", 7);
        assert!(journal.entry("http://r", "app", &digest).is_none(), "held twice");
        assert!(journal.entry("http://r", "other", &digest).unwrap().location().is_none());
        drop(entry);
        let entry = journal.entry("http://r", "app", &digest).unwrap();
        assert_eq!(entry.location().as_deref(), Some("http://r/v2/app/blobs/uploads/1"));
        assert_eq!(entry.part_max(), 7);
        let path = entry.path.clone();
        entry.forget();
        assert!(!path.exists());
        std::fs::write(&path, b"{\"registry\":").unwrap();
        assert_eq!(journal.entry("http://r", "app", &digest).unwrap().location(), None);

        let old = SystemTime::now() - STALE_AFTER - Duration::from_secs(60);
        File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
        Journal::open(&dir.path().join("a/b")).unwrap();
        assert!(!path.exists(), "a stale upload is remembered");
    }
}
