//! From an archive's entry to a table's: what is refused of a stranger's archive is refused here.
//!
//! Nothing is unpacked: names become keys of a tree in memory, so no name or link can lead anywhere else. Names with
//! `..` are refused all the same, since no honest tool writes them and other tools would follow them.

use tar::EntryType;

use super::archive;
use super::table::{ENTRIES_MAX, Entry, Kind, TABLE_MAX_BYTES};
use crate::error::{Error, Result};

/// PATH_MAX and NAME_MAX of Linux.
const PATH_MAX_BYTES: usize = 4096;
const NAME_MAX_BYTES: usize = 255;
/// What an entry takes in memory beside its name and attributes, roughly.
const ENTRY_BYTES: u64 = 160;

/// What an entry is, its contents left out.
pub(super) enum Shape {
    /// A whole entry.
    Entry(Entry),
    /// A regular file, whose `kind` is still to be set, with this many bytes of contents.
    File(Entry, u64),
}

/// How much of a layer's bounds is used up.
#[derive(Default)]
pub(super) struct Usage {
    entries: usize,
    memory: u64,
    contents: u64,
}

/// What a layer may hold at most, in bytes of contents.
///
/// A bomb is small and unpacks to more than any disk: 4 GiB are free for layers of zeros, and 300 bytes for each byte
/// sent are more than code, text and models compress to.
pub(super) fn contents_max(layer_bytes: u64) -> u64 {
    (4_u64 << 30).saturating_add(layer_bytes.saturating_mul(300))
}

impl Usage {
    /// Counts an entry with `contents` bytes, `inline` of which are kept in memory.
    pub(super) fn add(&mut self, entry: &Entry, contents: u64, contents_max: u64) -> Result<()> {
        self.entries += 1;
        let xattrs: usize = entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.memory += ENTRY_BYTES + (entry.path.len() + xattrs) as u64;
        self.contents = self.contents.saturating_add(contents);
        self.check("entries", self.entries as u64, ENTRIES_MAX as u64)?;
        self.check("bytes of contents", self.contents, contents_max)?;
        self.memory(0)
    }

    /// Counts more bytes that are kept in memory.
    pub(super) fn memory(&mut self, bytes: u64) -> Result<()> {
        self.memory += bytes;
        self.check("bytes of names, attributes and small files", self.memory, TABLE_MAX_BYTES)
    }

    fn check(&self, what: &'static str, found: u64, limit: u64) -> Result<()> {
        if found > limit { Err(Error::LayerLimit { what, found, limit }) } else { Ok(()) }
    }
}

/// Judges an entry of an archive.
pub(super) fn read(entry: archive::Entry) -> Result<Shape> {
    use EntryType::{Block, Char, Continuous, Directory, Fifo, Link, Regular, Symlink};
    let kind = entry.header.entry_type();
    let path = clean(&entry.path)?;
    let refused = |reason: &str| unsafe_entry(&entry.path, reason);
    if entry.sparse {
        return Err(Error::Unsupported {
            what: format!("a layer with the sparse file `{}`", String::from_utf8_lossy(&path)),
            help: "build the image without sparse files (`tar` without `--sparse`)".to_owned(),
        });
    }
    let number = |n: std::io::Result<Option<u32>>| {
        n.ok().flatten().ok_or_else(|| refused("a device without its numbers"))
    };
    let kind = match kind {
        Directory => Some(Kind::Directory),
        Regular | Continuous => None,
        Symlink if entry.link.is_empty() || entry.link.len() >= PATH_MAX_BYTES || entry.link.contains(&0) => {
            return Err(refused("a symbolic link to an empty or overlong path, or one with a zero byte"));
        }
        Symlink => Some(Kind::Symlink(entry.link.clone())),
        Link => {
            let target = clean(&entry.link)?;
            if target.is_empty() {
                return Err(refused("a hard link to the layer's root"));
            }
            Some(Kind::HardLink(target))
        }
        Char => {
            Some(Kind::CharDevice(number(entry.header.device_major())?, number(entry.header.device_minor())?))
        }
        Block => Some(Kind::BlockDevice(
            number(entry.header.device_major())?,
            number(entry.header.device_minor())?,
        )),
        Fifo => Some(Kind::Fifo),
        other => {
            return Err(Error::Unsupported {
                what: format!(
                    "a layer with the entry `{}` of type {other:?}",
                    String::from_utf8_lossy(&path)
                ),
                help: "rebuild the image with a current tool".to_owned(),
            });
        }
    };
    if path.is_empty() && kind != Some(Kind::Directory) {
        return Err(refused("the layer's root can only be a folder"));
    }
    let id = |what: &str, number: u64| {
        u32::try_from(number).map_err(|_| refused(&format!("its {what} is no number in range")))
    };
    let mode = entry.header.mode().map_err(|_| refused("its mode is no number in range"))?;
    // Overlayfs' own attributes would change what other layers show.
    let is_overlay =
        |name: &[u8]| name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
    let found = Entry {
        mode: mode & 0o7777,
        uid: id("owner", entry.uid)?,
        gid: id("group", entry.gid)?,
        mtime_s: entry.mtime.0,
        mtime_ns: u32::try_from(entry.mtime.1).unwrap_or(0),
        xattrs: entry.xattrs.into_iter().filter(|(name, _)| !is_overlay(name)).collect(),
        kind: Kind::Directory,
        path,
    };
    Ok(match kind {
        Some(kind) => Shape::Entry(Entry { kind, ..found }),
        None => Shape::File(found, entry.size),
    })
}

/// A name of the archive as a path below the root, without `.` and slashes at its ends.
fn clean(name: &[u8]) -> Result<Vec<u8>> {
    if name.len() >= PATH_MAX_BYTES {
        return Err(unsafe_entry(&name[..64], "its path has more than 4,095 bytes"));
    }
    if name.contains(&0) {
        return Err(unsafe_entry(name, "its name has a zero byte"));
    }
    let mut path = Vec::with_capacity(name.len());
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => continue,
            b".." => return Err(unsafe_entry(name, "its path has `..`, which could lead out of the layer")),
            part if part.len() > NAME_MAX_BYTES => {
                return Err(unsafe_entry(name, "a name in its path has more than 255 bytes"));
            }
            _ => {}
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(part);
    }
    Ok(path)
}

pub(super) fn unsafe_entry(path: &[u8], reason: &str) -> Error {
    Error::UnsafeEntry { entry: String::from_utf8_lossy(path).into_owned(), reason: reason.to_owned() }
}
