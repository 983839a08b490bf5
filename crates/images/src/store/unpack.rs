//! Unpacks one layer's archive into a folder, in overlayfs' form.
//!
//! Archives come from strangers. Each path is resolved by the kernel with `openat2` and `RESOLVE_IN_ROOT` (Linux
//! 5.6), below the folder's own descriptor, so that neither `..`, nor absolute names, nor links that the archive
//! made before can lead outside; names with `..` are refused outright, since no honest tool writes them.
//!
//! `.wh.` files become what overlayfs wants: a character device 0:0 for a deleted name, and the attribute
//! `trusted.overlay.opaque` on a folder that hides what lies below it.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmod, fchmodat, fstatat, futimens, makedev, mkdirat,
    mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat};
use tar::EntryType;
use xattr::FileExt as _;

use super::archive::{Archive, Entry};
use super::{OPAQUE_MARKER, OPAQUE_XATTR, WHITEOUT_PREFIX};
use crate::error::{Error, Result};

const COPY_BYTES: usize = 256 << 10;

/// Owner, mode, time and attributes of an entry.
struct Attributes {
    uid: Uid,
    gid: Gid,
    mode: Mode,
    mtime: TimeSpec,
    xattrs: Vec<(OsString, Vec<u8>)>,
}

struct Unpacker<'a> {
    dest: &'a Path,
    root: OwnedFd,
    /// The parent that was used last: archives list a folder's files together.
    parent: Option<(PathBuf, std::rc::Rc<OwnedFd>)>,
    /// Folder times, set at the end because unpacking into a folder changes them.
    dir_times: Vec<(PathBuf, TimeSpec)>,
    buffer: Vec<u8>,
}

/// Unpacks `archive` into the empty folder `dest`.
pub(super) fn unpack(archive: &mut dyn Read, dest: &Path) -> Result<()> {
    let failed = |e| Error::io("unpacking a layer into", dest)(e);
    let root = File::open(dest).map_err(failed)?.into();
    let mut unpacker =
        Unpacker { dest, root, parent: None, dir_times: Vec::new(), buffer: vec![0; COPY_BYTES] };
    let mut archive = Archive::new(archive);
    while let Some(entry) = archive.next_entry().map_err(failed)? {
        unpacker.entry(entry, &mut archive)?;
    }
    for (path, mtime) in std::mem::take(&mut unpacker.dir_times).into_iter().rev() {
        // A folder that a later entry replaced has no time to set any more.
        if let Ok(dir) = unpacker.open_dir(&path) {
            futimens(&dir, &mtime, &mtime).map_err(|e| unpacker.io(&path, e))?;
        }
    }
    Ok(())
}

impl Unpacker<'_> {
    /// Unpacks one entry; `contents` gives its contents.
    fn entry(&mut self, entry: Entry, contents: &mut dyn Read) -> Result<()> {
        let kind = entry.header.entry_type();
        let path = inside(&entry.path)?;
        if entry.sparse {
            return Err(Error::Unsupported {
                what: format!("a layer with the sparse file `{}`", path.display()),
                help: "build the image without sparse files (`tar` without `--sparse`)".to_owned(),
            });
        }
        let attributes = read_attributes(&entry, &path)?;
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            if kind == EntryType::Directory {
                let root = self.open_dir(Path::new(""))?;
                return self.finish_dir(&path, &root, attributes);
            }
            return Err(unsafe_entry(&path, "the layer's root can only be a folder"));
        };
        let parent_path = path.parent().unwrap_or(Path::new("")).to_owned();
        let parent = self.parent_of(&parent_path)?;
        let parent = parent.as_ref();
        if name == OPAQUE_MARKER {
            return parent_dir(parent).and_then(|dir| set_opaque(&dir)).map_err(|e| self.io(&path, e));
        }
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT_PREFIX.as_bytes()) {
            return self.whiteout(&path, parent, OsStr::from_bytes(hidden));
        }
        let was_hidden = self.make_way(&path, parent, &name, kind == EntryType::Directory)?;
        let io = |e: Errno| Error::io("unpacking", self.dest.join(&path))(e.into());
        match kind {
            EntryType::Directory => {
                match mkdirat(parent, name.as_os_str(), Mode::S_IRWXU) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(e) => return Err(io(e)),
                }
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let dir = openat(parent, name.as_os_str(), flags, Mode::empty()).map_err(io)?;
                if was_hidden {
                    set_opaque(&dir).map_err(io)?;
                }
                self.finish_dir(&path, &dir, attributes)
            }
            EntryType::Regular | EntryType::Continuous => {
                let flags =
                    OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let file =
                    openat(parent, name.as_os_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR).map_err(io)?;
                let mut file = File::from(file);
                loop {
                    match contents.read(&mut self.buffer).map_err(|e| self.io_std(&path, e))? {
                        0 => break,
                        read => file.write_all(&self.buffer[..read]).map_err(|e| self.io_std(&path, e))?,
                    }
                }
                self.finish_open(&path, &file, &attributes)
            }
            EntryType::Symlink => {
                symlinkat(OsStr::from_bytes(&entry.link), parent, name.as_os_str()).map_err(io)?;
                self.finish_named(&path, parent, &name, &attributes, true)
            }
            EntryType::Link => self.hard_link(&path, &entry.link, parent, &name),
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                let number = |n: std::io::Result<Option<u32>>| match n {
                    Ok(Some(n)) => Ok(u64::from(n)),
                    _ if kind == EntryType::Fifo => Ok(0),
                    _ => Err(unsafe_entry(&path, "a device without its numbers")),
                };
                let major = number(entry.header.device_major())?;
                let minor = number(entry.header.device_minor())?;
                let sflag = match kind {
                    EntryType::Char => SFlag::S_IFCHR,
                    EntryType::Block => SFlag::S_IFBLK,
                    _ => SFlag::S_IFIFO,
                };
                mknodat(parent, name.as_os_str(), sflag, attributes.mode, makedev(major, minor))
                    .map_err(io)?;
                self.finish_named(&path, parent, &name, &attributes, false)
            }
            other => Err(Error::Unsupported {
                what: format!("a layer with the entry `{}` of type {other:?}", path.display()),
                help: "rebuild the image with a current tool".to_owned(),
            }),
        }
    }

    /// Opens a folder inside the root; links on the way are resolved as if the root were `/`.
    fn open_dir(&self, path: &Path) -> Result<OwnedFd> {
        self.try_open_dir(path).map_err(|e| self.io(path, e))
    }

    fn try_open_dir(&self, path: &Path) -> nix::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.root, path, how)
    }

    /// The folder that an entry goes into, made if the archive left it out.
    fn parent_of(&mut self, path: &Path) -> Result<std::rc::Rc<OwnedFd>> {
        if let Some((cached, dir)) = &self.parent
            && cached == path
        {
            return Ok(dir.clone());
        }
        let dir = match self.try_open_dir(path) {
            Ok(dir) => dir,
            Err(Errno::ENOENT) => self.make_dirs(path)?,
            Err(Errno::ENOTDIR) => return Err(unsafe_entry(path, "it is a file, and used as a folder")),
            Err(e) => return Err(self.io(path, e)),
        };
        let dir = std::rc::Rc::new(dir);
        self.parent = Some((path.to_owned(), dir.clone()));
        Ok(dir)
    }

    fn make_dirs(&self, path: &Path) -> Result<OwnedFd> {
        let mut reached = PathBuf::new();
        let mut dir = self.open_dir(&reached)?;
        for component in path.components() {
            reached.push(component);
            dir = match self.try_open_dir(&reached) {
                Ok(next) => next,
                Err(Errno::ENOENT) => {
                    match mkdirat(&dir, component.as_os_str(), Mode::S_IRWXU) {
                        Ok(()) => {}
                        Err(Errno::EEXIST) => {
                            return Err(unsafe_entry(&reached, "a link to nowhere, used as a folder"));
                        }
                        Err(e) => return Err(self.io(&reached, e)),
                    }
                    let made = self.open_dir(&reached)?;
                    fchmod(&made, Mode::from_bits_truncate(0o755)).map_err(|e| self.io(&reached, e))?;
                    made
                }
                Err(Errno::ENOTDIR) => {
                    return Err(unsafe_entry(&reached, "it is a file, and used as a folder"));
                }
                Err(e) => return Err(self.io(&reached, e)),
            };
        }
        Ok(dir)
    }

    /// Removes what an earlier entry left at this name; says whether that was a whiteout.
    fn make_way(&mut self, path: &Path, parent: &OwnedFd, name: &OsStr, keep_dir: bool) -> Result<bool> {
        let stat = match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) => return Ok(false),
            Err(e) => return Err(self.io(path, e)),
        };
        let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        if kind == SFlag::S_IFDIR {
            if keep_dir {
                return Ok(false);
            }
            self.parent = None;
            // remove_dir_all doesn't follow links; the descriptor keeps the start inside the root.
            let through = PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd())).join(name);
            std::fs::remove_dir_all(through).map_err(|e| self.io_std(path, e))?;
            return Ok(false);
        }
        // A link that goes may have led to the parent that is remembered.
        self.parent = None;
        unlinkat(parent, name, UnlinkatFlags::NoRemoveDir).map_err(|e| self.io(path, e))?;
        Ok(kind == SFlag::S_IFCHR && stat.st_rdev == 0)
    }

    fn whiteout(&self, path: &Path, parent: &OwnedFd, hidden: &OsStr) -> Result<()> {
        if hidden.as_bytes().starts_with(WHITEOUT_PREFIX.as_bytes()) {
            // Bookkeeping of aufs (`.wh..wh.plnk` and the like), of no meaning to anyone else.
            return Ok(());
        }
        if matches!(hidden.as_bytes(), b"" | b"." | b"..") {
            return Err(unsafe_entry(path, "it deletes no name that a file can have"));
        }
        match fstatat(parent, hidden, AtFlags::AT_SYMLINK_NOFOLLOW) {
            // This layer has the name itself: only what lies below is deleted.
            Ok(stat) if stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits() => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let dir = openat(parent, hidden, flags, Mode::empty()).map_err(|e| self.io(path, e))?;
                set_opaque(&dir).map_err(|e| self.io(path, e))
            }
            Ok(_) => Ok(()),
            Err(Errno::ENOENT) => {
                mknodat(parent, hidden, SFlag::S_IFCHR, Mode::empty(), 0).map_err(|e| self.io(path, e))
            }
            Err(e) => Err(self.io(path, e)),
        }
    }

    fn hard_link(&self, path: &Path, target: &[u8], parent: &OwnedFd, name: &OsStr) -> Result<()> {
        let target = inside(target)?;
        let Some(target_name) = target.file_name() else {
            return Err(unsafe_entry(path, "a hard link to the layer's root"));
        };
        let missing = || {
            unsafe_entry(path, &format!("a hard link to `{}`, which isn't in the layer", target.display()))
        };
        let target_dir =
            self.try_open_dir(target.parent().unwrap_or(Path::new(""))).map_err(|_| missing())?;
        match linkat(&target_dir, target_name, parent, name, AtFlags::empty()) {
            Ok(()) => Ok(()),
            Err(Errno::ENOENT) => Err(missing()),
            Err(Errno::EPERM) => Err(unsafe_entry(path, "a hard link to a folder")),
            Err(e) => Err(self.io(path, e)),
        }
    }

    fn finish_dir(&mut self, path: &Path, dir: &OwnedFd, attributes: Attributes) -> Result<()> {
        let opened = dir.try_clone().map(File::from).map_err(|e| self.io_std(path, e))?;
        self.finish_open(path, &opened, &attributes)?;
        self.dir_times.push((path.to_owned(), attributes.mtime));
        Ok(())
    }

    /// Owner before mode and attributes: a change of owner drops setuid bits and capabilities.
    fn finish_open(&self, path: &Path, file: &File, attributes: &Attributes) -> Result<()> {
        let fd = file.as_fd();
        fchown(fd, Some(attributes.uid), Some(attributes.gid)).map_err(|e| self.io(path, e))?;
        fchmod(fd, attributes.mode).map_err(|e| self.io(path, e))?;
        for (name, value) in &attributes.xattrs {
            file.set_xattr(name, value).map_err(|e| self.io_std(path, e))?;
        }
        futimens(fd, &attributes.mtime, &attributes.mtime).map_err(|e| self.io(path, e))
    }

    fn finish_named(
        &self,
        path: &Path,
        parent: &OwnedFd,
        name: &OsStr,
        attributes: &Attributes,
        is_link: bool,
    ) -> Result<()> {
        let io = |e: Errno| self.io(path, e);
        fchownat(parent, name, Some(attributes.uid), Some(attributes.gid), AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(io)?;
        if !is_link {
            // What was just made is no link, so nothing is followed; a mode that minds no umask needs this call.
            fchmodat(parent, name, attributes.mode, FchmodatFlags::FollowSymlink).map_err(io)?;
        }
        let through = PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd())).join(name);
        for (key, value) in &attributes.xattrs {
            xattr::set(&through, key, value).map_err(|e| self.io_std(path, e))?;
        }
        let mtime = &attributes.mtime;
        utimensat(parent, name, mtime, mtime, UtimensatFlags::NoFollowSymlink).map_err(io)
    }

    fn io(&self, path: &Path, e: Errno) -> Error {
        self.io_std(path, e.into())
    }

    fn io_std(&self, path: &Path, e: std::io::Error) -> Error {
        Error::io("unpacking", self.dest.join(path))(e)
    }
}

/// A name of the archive as a path below the root, without `.` and leading slashes.
fn inside(name: &[u8]) -> Result<PathBuf> {
    let raw = Path::new(OsStr::from_bytes(name));
    if CString::new(name).is_err() {
        return Err(unsafe_entry(raw, "its name has a zero byte"));
    }
    let mut path = PathBuf::new();
    for component in raw.components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(unsafe_entry(raw, "its path has `..`, which could lead out of the layer"));
            }
        }
    }
    Ok(path)
}

fn read_attributes(entry: &Entry, path: &Path) -> Result<Attributes> {
    let bad = |what: &str| unsafe_entry(path, &format!("its {what} is no number in range"));
    let mode = entry.header.mode().map_err(|_| bad("mode"))?;
    // Overlayfs' own attributes would change what other layers show.
    let is_overlay =
        |name: &[u8]| name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
    let kept = entry.xattrs.iter().filter(|(name, _)| !is_overlay(name));
    Ok(Attributes {
        uid: Uid::from_raw(u32::try_from(entry.uid).map_err(|_| bad("owner"))?),
        gid: Gid::from_raw(u32::try_from(entry.gid).map_err(|_| bad("group"))?),
        mode: Mode::from_bits_truncate(mode & 0o7777),
        mtime: TimeSpec::new(entry.mtime.0, entry.mtime.1),
        xattrs: kept.map(|(name, value)| (OsStr::from_bytes(name).to_owned(), value.clone())).collect(),
    })
}

/// The same folder, opened for reading, which attributes need.
fn parent_dir(parent: &OwnedFd) -> nix::Result<OwnedFd> {
    openat(parent, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

fn set_opaque(dir: &OwnedFd) -> nix::Result<()> {
    let failed = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(Errno::EIO as i32));
    let file = File::from(dir.try_clone().map_err(failed)?);
    file.set_xattr(OPAQUE_XATTR, b"y").map_err(failed)
}

fn unsafe_entry(path: &Path, reason: &str) -> Error {
    Error::UnsafeEntry { entry: path.display().to_string(), reason: reason.to_owned() }
}
