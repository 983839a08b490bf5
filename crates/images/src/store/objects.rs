//! The store's objects: regular files' bytes, each once, in `objects/<2 hex>/<62 hex>` by their sha256.
//!
//! A small object is written straight to its final name, after its bytes were hashed in memory: creating a file and
//! renaming it costs three times as much, and images have ten thousands of small files. Until it is complete its name
//! is pending in this process, and who wants the same object waits. A large one is written to a file in `tmp` and
//! renamed. What a crash leaves half written is found by [`super::dirty`].
//!
//! Whoever counts on an object that no image refers to yet pins it before looking whether it is there; removal skips
//! what is pinned, under the same lock.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::error::{Error, Result};

/// Folders below `objects`: one for each first byte.
const FOLDERS: usize = 256;
/// Locks: enough that threads seldom meet.
const SHARDS: usize = 64;
/// Runs of zero bytes of this length become holes: the page size of file systems.
const HOLE_BYTES: usize = 4096;
/// What is read and hashed at a time.
const READ_BYTES: usize = 256 << 10;
/// The unit of `st_blocks`, whatever the file system's own is.
const BLOCK_BYTES: u64 = 512;

/// An object's name: the sha256 of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ObjectId(pub(crate) [u8; 32]);

impl ObjectId {
    pub(crate) fn of(bytes: &[u8]) -> ObjectId {
        ObjectId(Sha256::digest(bytes).into())
    }

    /// From `<2 hex>` and `<62 hex>`.
    fn from_names(folder: &str, name: &str) -> Option<ObjectId> {
        let mut id = [0; 32];
        let lower = |text: &str| text.bytes().all(|b| !b.is_ascii_uppercase());
        (folder.len() == 2 && name.len() == 62 && lower(folder) && lower(name)).then_some(())?;
        hex::decode_to_slice(folder, &mut id[..1]).ok()?;
        hex::decode_to_slice(name, &mut id[1..]).ok()?;
        Some(ObjectId(id))
    }

    /// `<2 hex>/<62 hex>`, with a closing zero byte left to the callee.
    pub(super) fn path(&self) -> String {
        let mut path = hex::encode(self.0);
        path.insert(2, '/');
        path
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::from_sha256(self.0)
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", hex::encode(self.0))
    }
}

impl From<zstd_chunked::Digest> for ObjectId {
    fn from(digest: zstd_chunked::Digest) -> ObjectId {
        ObjectId(digest.0)
    }
}

/// All objects of a store.
pub(super) struct Objects {
    dir: PathBuf,
    tmp: PathBuf,
    root: OwnedFd,
    shards: Vec<Shard>,
    /// Bytes on the disk of the objects in the folders that are counted.
    bytes: AtomicI64,
    counted: [AtomicBool; FOLDERS],
}

#[derive(Default)]
struct Shard {
    state: Mutex<State>,
    written: Condvar,
}

#[derive(Default)]
struct State {
    /// Being written in this process.
    pending: HashSet<ObjectId>,
    /// How many count on it.
    pins: HashMap<ObjectId, u32>,
}

impl Objects {
    /// Opens `dir`, making it and its folders where they aren't there.
    pub(super) fn open(dir: &Path, tmp: &Path) -> Result<Objects> {
        for byte in 0..FOLDERS {
            let folder = dir.join(format!("{byte:02x}"));
            match std::fs::create_dir(&folder) {
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    std::fs::create_dir_all(&folder).map_err(Error::io("creating", &folder))?;
                }
                Err(e) if e.kind() != ErrorKind::AlreadyExists => {
                    return Err(Error::io("creating", &folder)(e));
                }
                _ => {}
            }
        }
        let root = File::open(dir).map_err(Error::io("opening", dir))?.into();
        let shards = std::iter::repeat_with(Shard::default).take(SHARDS).collect();
        let (bytes, counted) = (AtomicI64::new(0), [const { AtomicBool::new(false) }; FOLDERS]);
        Ok(Objects { dir: dir.to_owned(), tmp: tmp.to_owned(), root, shards, bytes, counted })
    }

    /// The folder, for mounting.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn shard(&self, id: &ObjectId) -> &Shard {
        self.shard_of(id.0[0])
    }

    /// That of a folder, by the first byte of its objects' names.
    fn shard_of(&self, byte: u8) -> &Shard {
        &self.shards[usize::from(byte) % SHARDS]
    }

    /// Whether the object is there, complete, with this size.
    pub(super) fn has(&self, id: &ObjectId, size: u64) -> bool {
        if lock(&self.shard(id).state).pending.contains(id) {
            return false;
        }
        self.stat(id).is_ok_and(|found| found == size)
    }

    /// Size of what lies at the object's name.
    fn stat(&self, id: &ObjectId) -> nix::Result<u64> {
        size(&self.look(id)?)
    }

    fn look(&self, id: &ObjectId) -> nix::Result<FileStat> {
        fstatat(&self.root, id.path().as_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// Bytes that all objects take on the disk. Looks at each of them the first time only: a folder at a time, while none
    /// of it is written or removed.
    pub(super) fn disk_bytes(&self) -> Result<u64> {
        (0..=u8::MAX).try_for_each(|byte| self.count_folder(byte))?;
        Ok(self.bytes.load(Ordering::SeqCst).max(0).cast_unsigned())
    }

    fn count_folder(&self, byte: u8) -> Result<()> {
        let counted = &self.counted[usize::from(byte)];
        if counted.load(Ordering::SeqCst) {
            return Ok(());
        }
        let shard = self.shard_of(byte);
        let mut state = lock(&shard.state);
        while state.pending.iter().any(|id| id.0[0] == byte) {
            state = shard.written.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if !counted.load(Ordering::SeqCst) {
            let bytes: u64 = self.in_folder(byte)?.iter().map(|id| self.disk_bytes_of(id)).sum();
            self.bytes.fetch_add(bytes.cast_signed(), Ordering::SeqCst);
            counted.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Bytes that an object takes on the disk; 0 where it isn't there.
    pub(super) fn disk_bytes_of(&self, id: &ObjectId) -> u64 {
        self.look(id).map_or(0, |stat| bytes_of(&stat))
    }

    /// Counts what whoever has the name pending, or its shard locked, changed.
    fn count(&self, id: &ObjectId, change: i64) {
        if self.counted[usize::from(id.0[0])].load(Ordering::SeqCst) {
            self.bytes.fetch_add(change, Ordering::SeqCst);
        }
    }

    pub(super) fn open_object(&self, id: &ObjectId) -> Result<File> {
        let path = id.path();
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(&self.root, path.as_str(), flags, Mode::empty())
            .map(File::from)
            .map_err(|e| Error::io("reading", self.dir.join(path))(e.into()))
    }

    /// Makes sure that the object is there, whose bytes the caller has hashed; says whether it was written.
    pub(super) fn put(&self, id: &ObjectId, bytes: &[u8]) -> Result<bool> {
        self.while_pending(id, || self.write(id, bytes))
    }

    /// Does something while others that want the same object wait.
    fn while_pending<T>(&self, id: &ObjectId, doing: impl FnOnce() -> Result<T>) -> Result<T> {
        let shard = self.shard(id);
        let mut state = lock(&shard.state);
        while state.pending.contains(id) {
            state = shard.written.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.pending.insert(*id);
        drop(state);
        let done = doing();
        lock(&shard.state).pending.remove(id);
        shard.written.notify_all();
        done
    }

    fn write(&self, id: &ObjectId, bytes: &[u8]) -> Result<bool> {
        let path = id.path();
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let create = || openat(&self.root, path.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let failed = |e: std::io::Error| Error::io("writing", self.dir.join(&path))(e);
        let file = match create() {
            Ok(file) => File::from(file),
            Err(Errno::EEXIST) => {
                if self.stat(id) == Ok(bytes.len() as u64) {
                    return Ok(false);
                }
                // Cut off by something outside: nothing that this process wrote has a wrong size.
                self.unlink(id)?;
                File::from(create().map_err(|e| failed(e.into()))?)
            }
            Err(e) => return Err(failed(e.into())),
        };
        write_with_holes(&file, 0, bytes)
            .and_then(|()| match bytes.last() {
                // A hole at the end needs the length set.
                Some(0) => file.set_len(bytes.len() as u64),
                _ => Ok(()),
            })
            .map_err(|e| {
                // What is half written must not keep the name; nor was it counted.
                self.count(id, self.disk_bytes_of(id).cast_signed());
                let _ = self.unlink(id);
                failed(e)
            })?;
        self.count(id, file.metadata().map_or(0, |file| disk_bytes(&file)).cast_signed());
        Ok(true)
    }

    /// Says how many bytes that freed.
    fn unlink(&self, id: &ObjectId) -> Result<u64> {
        let path = id.path();
        let bytes = self.disk_bytes_of(id);
        match unlinkat(&self.root, path.as_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) => {
                self.count(id, -bytes.cast_signed());
                Ok(bytes)
            }
            Err(Errno::ENOENT) => Ok(0),
            Err(e) => Err(Error::io("removing", self.dir.join(path))(e.into())),
        }
    }

    /// A file for a large object, which gets its name by [`Objects::keep`].
    pub(super) fn temporary(&self) -> Result<tempfile::NamedTempFile> {
        tempfile::NamedTempFile::new_in(&self.tmp).map_err(Error::io("creating a file in", &self.tmp))
    }

    /// Gives a complete file, whose bytes the caller has hashed, its name; says whether it is new.
    pub(super) fn keep(&self, id: &ObjectId, size: u64, file: tempfile::NamedTempFile) -> Result<bool> {
        self.while_pending(id, || {
            let old = self.look(id);
            if old.is_ok_and(|old| self::size(&old) == Ok(size)) {
                return Ok(false);
            }
            let bytes = file.as_file().metadata().map_or(0, |file| disk_bytes(&file));
            let path = self.dir.join(id.path());
            // It replaces what has a wrong size.
            file.persist(&path).map_err(|e| Error::io("moving an object to", &path)(e.error))?;
            self.count(id, bytes.cast_signed() - old.map_or(0, |old| bytes_of(&old)).cast_signed());
            Ok(true)
        })
    }

    /// Removes an object unless it is pinned; says how many bytes that freed.
    pub(super) fn remove(&self, id: &ObjectId) -> Result<Option<u64>> {
        let state = lock(&self.shard(id).state);
        if state.pins.contains_key(id) || state.pending.contains(id) {
            return Ok(None);
        }
        let freed = self.unlink(id)?;
        drop(state);
        Ok(Some(freed))
    }

    /// Removes an object that is damaged, pinned or not, so that it is fetched again.
    pub(super) fn discard(&self, id: &ObjectId) -> Result<()> {
        let _state = lock(&self.shard(id).state);
        self.unlink(id).map(drop)
    }

    /// Removes an object unless its bytes are what its name says; says whether it did. Who writes it is waited for.
    pub(super) fn discard_if_wrong(&self, id: &ObjectId) -> Result<bool> {
        self.while_pending(id, || {
            if self.stat(id).is_err() || self.is_right(id).unwrap_or(false) {
                return Ok(false);
            }
            self.unlink(id)?;
            Ok(true)
        })
    }

    /// Every object's name and file, in no order. A name that is no object's is given to `stray`.
    pub(super) fn each(
        &self,
        mut object: impl FnMut(ObjectId, &Metadata) -> Result<()>,
        mut stray: impl FnMut(&Path) -> Result<()>,
    ) -> Result<()> {
        let list = |dir: &Path| -> Result<Vec<std::fs::DirEntry>> {
            let entries = std::fs::read_dir(dir).map_err(Error::io("reading", dir))?;
            entries.collect::<std::io::Result<_>>().map_err(Error::io("reading", dir))
        };
        for folder in list(&self.dir)? {
            let name = folder.file_name().into_string().unwrap_or_default();
            let is_dir = folder.file_type().is_ok_and(|kind| kind.is_dir());
            if !is_dir || name.len() != 2 || u8::from_str_radix(&name, 16).is_err() {
                stray(&folder.path())?;
                continue;
            }
            for file in list(&folder.path())? {
                let id = file.file_name().to_str().and_then(|file| ObjectId::from_names(&name, file));
                match (id, file.metadata()) {
                    (Some(id), Ok(metadata)) if metadata.is_file() => object(id, &metadata)?,
                    (_, Err(e)) if e.kind() == ErrorKind::NotFound => {}
                    _ => stray(&file.path())?,
                }
            }
        }
        Ok(())
    }

    /// The objects whose names begin with a byte, in the order of their names.
    pub(super) fn in_folder(&self, byte: u8) -> Result<Vec<ObjectId>> {
        let name = format!("{byte:02x}");
        let dir = self.dir.join(&name);
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(Error::io("reading", &dir))? {
            let file = entry.map_err(Error::io("reading", &dir))?.file_name();
            ids.extend(file.to_str().and_then(|file| ObjectId::from_names(&name, file)));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    pub(super) fn exists(&self, id: &ObjectId) -> bool {
        self.look(id).is_ok()
    }

    /// Whether the bytes of an object are what its name says.
    pub(super) fn is_right(&self, id: &ObjectId) -> Result<bool> {
        self.is_right_paced(id, &mut |_| Ok(()))
    }

    /// The same; `read` is told how much was read, and may wait, or end it.
    pub(super) fn is_right_paced(&self, id: &ObjectId, read: Pacer<'_>) -> Result<bool> {
        let file = self.open_object(id)?;
        Ok(hash(file, &self.dir.join(id.path()), read)? == *id)
    }

    /// Pins for what one pull counts on.
    pub(super) fn pins(self: &Arc<Self>) -> Pins {
        Pins { objects: self.clone(), ids: Mutex::new(Vec::new()) }
    }
}

/// Keeps objects from being removed until it is dropped.
pub(super) struct Pins {
    objects: Arc<Objects>,
    ids: Mutex<Vec<ObjectId>>,
}

impl Pins {
    pub(super) fn add(&self, id: &ObjectId) {
        *lock(&self.objects.shard(id).state).pins.entry(*id).or_insert(0) += 1;
        lock(&self.ids).push(*id);
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        for id in lock(&self.ids).drain(..) {
            let mut state = lock(&self.objects.shard(&id).state);
            if let Some(count) = state.pins.get_mut(&id) {
                *count -= 1;
                if *count == 0 {
                    state.pins.remove(&id);
                }
            }
        }
    }
}

/// Writes `bytes` at `offset` of an empty part of a file, leaving out long runs of zeros.
pub(super) fn write_with_holes(mut file: &File, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    if offset == 0 && bytes.len() < 2 * HOLE_BYTES {
        return file.write_all(bytes);
    }
    let mut at = 0;
    while at < bytes.len() {
        let zeros =
            bytes[at..].chunks(HOLE_BYTES).take_while(|page| is_zero(page)).map(<[u8]>::len).sum::<usize>();
        at += zeros;
        let data =
            bytes[at..].chunks(HOLE_BYTES).take_while(|page| !is_zero(page)).map(<[u8]>::len).sum::<usize>();
        file.write_all_at(&bytes[at..at + data], offset + at as u64)?;
        at += data;
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().all(|word| u64::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Is told how many bytes were read.
pub(super) type Pacer<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

/// The hash of a whole file.
pub(super) fn hash(mut file: File, path: &Path, read: Pacer<'_>) -> Result<ObjectId> {
    let (mut hasher, mut block) = (Sha256::new(), vec![0; READ_BYTES]);
    loop {
        match file.read(&mut block) {
            Ok(0) => return Ok(ObjectId(hasher.finalize().into())),
            Ok(len) => {
                hasher.update(&block[..len]);
                read(len as u64)?;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("reading", path)(e)),
        }
    }
}

pub(super) struct HashWriter<'a>(pub(super) &'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Bytes that a file takes on the disk: less than its length where it has holes, more by what its last block has left.
pub(super) fn disk_bytes(file: &Metadata) -> u64 {
    file.blocks() * BLOCK_BYTES
}

/// Length of a regular file.
fn size(file: &FileStat) -> nix::Result<u64> {
    if file.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
        return Err(Errno::EINVAL);
    }
    u64::try_from(file.st_size).map_err(|_| Errno::EINVAL)
}

/// Bytes that a file takes on the disk.
fn bytes_of(file: &FileStat) -> u64 {
    file.st_blocks.max(0).cast_unsigned() * BLOCK_BYTES
}

/// Nothing here has an invariant that a panic elsewhere could break.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
