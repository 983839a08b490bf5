//! When a small object last changed, cheap enough to ask on every request.
//!
//! In a folder, a put is a rename of a new file, so its number and time of change tell one put from another, whoever
//! made it. Elsewhere there is nothing cheap to ask.

use std::os::unix::fs::MetadataExt as _;

use anyplace_images::Digest;
use object_store::path::Path;

use super::{Place, Storage, keys};

/// What is known of an object without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stamp {
    /// It isn't there, or can't be seen.
    Absent,
    /// It is there; another stamp means another put.
    File { number: u64, changed_s: i64, changed_ns: i64 },
    /// The store can't tell cheaply.
    Unknown,
}

impl Storage {
    /// The stamp of a tag that a push gave.
    pub(crate) fn tag_stamp(&self, repository: &str, tag: &str) -> Stamp {
        self.stamp(&keys::tag(repository, tag))
    }

    /// The stamp of a manifest's entry.
    pub(crate) fn manifest_stamp(&self, repository: &str, digest: &Digest) -> Stamp {
        self.stamp(&keys::manifest(repository, digest))
    }

    fn stamp(&self, key: &Path) -> Stamp {
        let Place::Folder(folder) = self.place() else { return Stamp::Unknown };
        // Two microseconds, where a hop to a blocking thread takes ten.
        match std::fs::metadata(folder.join(key.as_ref())) {
            Ok(file) => {
                Stamp::File { number: file.ino(), changed_s: file.ctime(), changed_ns: file.ctime_nsec() }
            }
            Err(_) => Stamp::Absent,
        }
    }
}
