//! A directory as one layer with reproducible bytes.
//!
//! The bytes depend only on names, kinds, modes, contents, links and extended attributes: entries are sorted by
//! name, all belong to root, and all times are 0. Overlayfs' whiteouts (character device 0:0, opaque folders) become
//! the layer format's (`.wh.` files), so that an overlay's upper folder packs as the change that it is.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

use super::layer::{PackedLayer, Watch, pack_tar};
use super::pipe::{PipeWriter, pipe};
use crate::error::{Error, Result};
use crate::progress::{Item, SharedProgress, Stage};
use crate::store::{OPAQUE_MARKER, OPAQUE_XATTR, WHITEOUT_PREFIX};

/// Deepest folder that is packed: a bound on recursion, well above what PATH_MAX allows in practice.
const DEPTH_MAX: usize = 1_024;

/// Most entries that are not in the image as they are in the folder, and are told.
const TOLD_MAX: usize = 10;

/// Keys and values that go before an entry.
type PaxRecords = Vec<(String, Vec<u8>)>;

struct Entry {
    /// Path below the root; empty for the root itself.
    relative: PathBuf,
    metadata: Metadata,
}

/// Packs `root` into the file `to`; also gives the bytes of file contents that were read.
///
/// One thread reads the tree and writes its archive, this one packs what arrives.
pub(super) fn write_layer(
    root: &Path,
    to: &Path,
    progress: &SharedProgress,
    watch: &Watch,
) -> Result<(PackedLayer, u64)> {
    let metadata = std::fs::metadata(root).map_err(Error::io("reading", root))?;
    if !metadata.is_dir() {
        return Err(Error::InvalidSource { path: root.to_owned(), reason: "it is no folder".to_owned() });
    }
    let mut entries = vec![Entry { relative: PathBuf::new(), metadata }];
    walk(root, Path::new(""), 0, &mut entries)?;
    let mut counted = HashSet::new();
    let total_bytes = entries
        .iter()
        .map(|entry| &entry.metadata)
        .filter(|m| m.is_file() && (m.nlink() == 1 || counted.insert((m.dev(), m.ino()))))
        .map(Metadata::len)
        .sum();
    let item = Item { stage: Stage::Pack, name: "layer".to_owned() };
    progress.started(&item, total_bytes);

    let (writer, mut reader) = pipe();
    let (packed, archived) = std::thread::scope(|threads| {
        let archiving = threads.spawn(|| archive(root, &entries, writer, &item, progress, watch));
        let packed = pack_tar(&mut reader, to);
        // The other thread mustn't wait for a reader that gave up.
        drop(reader);
        (packed, archiving.join())
    });
    let archived = archived.map_err(|_| Error::Cancelled)?;
    let packed = match (packed, archived) {
        (Ok(packed), Ok(bytes_read)) => (packed, bytes_read),
        // Where reading failed, the packer only knows that its source broke off, and the other way round.
        (Err(error), Ok(_)) => return Err(error),
        (Ok(_), Err(error)) => return Err(error),
        (Err(packing), Err(reading)) => return Err(if is_broken_pipe(&reading) { packing } else { reading }),
    };
    progress.finished(&item);
    Ok(packed)
}

fn is_broken_pipe(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
}

/// Writes the tree's archive, and gives the bytes of file contents that were read.
fn archive(
    root: &Path,
    entries: &[Entry],
    to: PipeWriter,
    item: &Item,
    progress: &SharedProgress,
    watch: &Watch,
) -> Result<u64> {
    let (tar, links) = (Builder::new(to), HashMap::new());
    let mut writer = Writer { root, tar, links, item, progress, watch, bytes_read: 0, odd: 0 };
    for entry in entries {
        writer.append(entry)?;
    }
    if writer.odd > TOLD_MAX {
        progress.said(item, &format!("... and {} more such entries", writer.odd - TOLD_MAX));
    }
    let bytes_read = writer.bytes_read;
    let pipe = writer.tar.into_inner().map_err(Error::io("packing", root))?;
    pipe.finish().map_err(Error::io("packing", root))?;
    Ok(bytes_read)
}

fn walk(root: &Path, relative: &Path, depth: usize, entries: &mut Vec<Entry>) -> Result<()> {
    let dir = root.join(relative);
    if depth > DEPTH_MAX {
        return Err(Error::InvalidSource {
            path: dir,
            reason: format!("more than {DEPTH_MAX} folders deep"),
        });
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&dir).map_err(Error::io("reading", &dir))? {
        names.push(entry.map_err(Error::io("reading", &dir))?.file_name());
    }
    names.sort();
    for name in names {
        if name.as_bytes().starts_with(WHITEOUT_PREFIX.as_bytes()) {
            let reason = "names that start with `.wh.` mean deletions in a layer; rename it".to_owned();
            return Err(Error::InvalidSource { path: dir.join(name), reason });
        }
        let relative = relative.join(&name);
        let path = root.join(&relative);
        let metadata = std::fs::symlink_metadata(&path).map_err(Error::io("reading", &path))?;
        let is_dir = metadata.is_dir();
        entries.push(Entry { relative: relative.clone(), metadata });
        if is_dir {
            walk(root, &relative, depth + 1, entries)?;
        }
    }
    Ok(())
}

struct Writer<'a, W: Write> {
    root: &'a Path,
    tar: Builder<W>,
    /// First path of each file with several names, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
    item: &'a Item,
    progress: &'a SharedProgress,
    watch: &'a Watch,
    bytes_read: u64,
    /// Entries that are not in the image as they are in the folder.
    odd: usize,
}

impl<W: Write> Writer<'_, W> {
    fn append(&mut self, entry: &Entry) -> Result<()> {
        let path = self.root.join(&entry.relative);
        let metadata = &entry.metadata;
        let kind = metadata.file_type();
        if kind.is_char_device() && metadata.rdev() == 0 {
            self.tell(
                entry,
                "a device 0:0 marks a deletion, as in an overlay's upper folder: the image lacks it",
            );
            let mut name = WHITEOUT_PREFIX.to_owned().into_bytes();
            name.extend_from_slice(entry.relative.file_name().unwrap_or_default().as_bytes());
            let marker = entry.relative.with_file_name(OsStr::from_bytes(&name));
            return self.record(
                &marker,
                new_header(EntryType::Regular, 0o644),
                None,
                Vec::new(),
                io::empty(),
            );
        }
        if kind.is_socket() {
            self.tell(entry, "left out: a socket can't be part of an image");
            return Ok(());
        }
        let mode = metadata.mode() & 0o7777;
        if metadata.nlink() > 1 && !kind.is_dir() {
            let inode = (metadata.dev(), metadata.ino());
            if let Some(first) = self.links.get(&inode).cloned() {
                let header = new_header(EntryType::Link, mode);
                return self.record(&entry.relative, header, Some(&first), Vec::new(), io::empty());
            }
            self.links.insert(inode, entry.relative.clone());
        }
        if kind.is_symlink() {
            let target = std::fs::read_link(&path).map_err(Error::io("reading", &path))?;
            let header = new_header(EntryType::Symlink, 0o777);
            return self.record(&entry.relative, header, Some(&target), Vec::new(), io::empty());
        }
        let (attributes, opaque) = attributes(&path)?;
        if kind.is_dir() {
            let mut name = entry.relative.as_os_str().as_bytes().to_vec();
            name.extend_from_slice(if name.is_empty() { b"./" } else { b"/" });
            let header = new_header(EntryType::Directory, mode);
            self.record(Path::new(OsStr::from_bytes(&name)), header, None, attributes, io::empty())?;
            if opaque {
                let marker = entry.relative.join(OPAQUE_MARKER);
                let header = new_header(EntryType::Regular, 0o644);
                self.record(&marker, header, None, Vec::new(), io::empty())?;
            }
            return Ok(());
        }
        if kind.is_file() {
            let file = std::fs::OpenOptions::new()
                .read(true)
                .custom_flags(nix::libc::O_NOFOLLOW)
                .open(&path)
                .map_err(Error::io("reading", &path))?;
            let mut header = new_header(EntryType::Regular, mode);
            header.set_size(metadata.len());
            let (item, progress, watch) = (self.item, self.progress, self.watch);
            let mut reader = Counting { file: file.take(metadata.len()), read: 0, item, progress, watch };
            self.record(&entry.relative, header, None, attributes, &mut reader)?;
            if reader.read != metadata.len() {
                let reason = "it shrank while it was read; try again when nothing writes to it".to_owned();
                return Err(Error::InvalidSource { path, reason });
            }
            self.bytes_read += reader.read;
            return Ok(());
        }
        let kind = if kind.is_char_device() {
            EntryType::Char
        } else if kind.is_block_device() {
            EntryType::Block
        } else {
            EntryType::Fifo
        };
        let mut header = new_header(kind, mode);
        let numbers = (nix::sys::stat::major(metadata.rdev()), nix::sys::stat::minor(metadata.rdev()));
        header
            .set_device_major(numbers.0 as u32)
            .and_then(|()| header.set_device_minor(numbers.1 as u32))
            .map_err(Error::io("packing", &path))?;
        self.record(&entry.relative, header, None, attributes, io::empty())
    }

    /// Says that an entry is not in the image as it is in the folder.
    fn tell(&mut self, entry: &Entry, why: &str) {
        self.odd += 1;
        if self.odd <= TOLD_MAX {
            self.progress.said(self.item, &format!("{}: {why}", entry.relative.display()));
        }
    }

    /// Writes one entry; what doesn't fit the fixed header goes into a pax record before it.
    fn record(
        &mut self,
        name: &Path,
        mut header: Header,
        link: Option<&Path>,
        mut pax: PaxRecords,
        contents: impl Read,
    ) -> Result<()> {
        let name = name.as_os_str().as_bytes();
        let link = link.map_or(&b""[..], |link| link.as_os_str().as_bytes());
        let ustar = header.as_ustar_mut();
        if let Some(ustar) = ustar {
            for (key, value, field) in
                [("path", name, &mut ustar.name), ("linkpath", link, &mut ustar.linkname)]
            {
                let fits = value.len().min(field.len());
                field[..fits].copy_from_slice(&value[..fits]);
                if value.len() > field.len() {
                    pax.push((key.to_owned(), value.to_vec()));
                }
            }
        }
        header.set_cksum();
        let path = self.root.join(OsStr::from_bytes(name));
        pax.sort();
        if !pax.is_empty() {
            let records = pax.iter().map(|(key, value)| (key.as_str(), value.as_slice()));
            self.tar.append_pax_extensions(records).map_err(Error::io("packing", &path))?;
        }
        self.tar.append(&header, contents).map_err(Error::io("packing", &path))
    }
}

fn new_header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header
}

/// The extended attributes that belong to the image, and whether the folder is opaque.
fn attributes(path: &Path) -> Result<(PaxRecords, bool)> {
    let (mut kept, mut opaque) = (Vec::new(), false);
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(e) if e.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => return Ok((kept, opaque)),
        Err(e) => return Err(Error::io("reading attributes of", path)(e)),
    };
    for name in names {
        let Some(name) = name.to_str() else { continue };
        let value = || xattr::get(path, name).map_err(Error::io("reading attributes of", path));
        if name == OPAQUE_XATTR {
            opaque = value()?.as_deref() == Some(b"y");
        } else if name == "security.capability"
            || (name.starts_with("user.") && !name.starts_with("user.overlay."))
        {
            kept.push((format!("SCHILY.xattr.{name}"), value()?.unwrap_or_default()));
        }
    }
    Ok((kept, opaque))
}

struct Counting<'a> {
    file: io::Take<File>,
    read: u64,
    item: &'a Item,
    progress: &'a SharedProgress,
    watch: &'a Watch,
}

impl Read for Counting<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.watch.check()?;
        let read = self.file.read(buf)?;
        self.read += read as u64;
        self.progress.advanced(self.item, read as u64);
        Ok(read)
    }
}
