//! An upload as a file that grows, and becomes content by a rename.
//!
//! `uploads/<id>` has the bytes, `uploads/<id>.state` two records of 512 bytes that are written in turn: revision,
//! acknowledged offset, the hash of all before it, the repository, and a checksum. A part is acknowledged after the bytes are synced,
//! and then the record. After a crash, the file is cut at the newest good record's offset: what is after it
//! was never acknowledged, and may be anything. So nothing is ever hashed twice.
//!
//! Whoever has an upload open holds a lock (`flock`) on its file. A rename doesn't change that, so who waited for it
//! checks that the file still is the upload. Waiting is the caller's, which needs no thread for it.

mod record;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc as threads};
use std::time::Duration;

use anyplace_images::{Algorithm, Digest, Hasher};
use bytes::Bytes;
use tokio::sync::mpsc;

use self::record::{RECORD_BYTES, Record, encode, newest};
use super::session::Unfinished;
use crate::storage::{Ages, Room};

/// After so many bytes, the kernel is told to begin writing them, so that little is left to do when they are synced.
const WRITE_BACK_BYTES: u64 = 2 << 20;
/// Up to this size, hashing beside writing costs more than it gains.
const HASH_INLINE_BYTES: u64 = 1 << 20;
/// Batches that wait for the hash.
const HASHING_MAX: usize = 8;
/// A file without a state, or a state without bytes, that is younger may be of an upload that is being made.
const HALF_AGE_MIN: Duration = Duration::from_secs(10);

/// An open upload.
pub(super) struct LocalUpload {
    file: File,
    /// None: nobody can resume it.
    state: Option<File>,
    path: PathBuf,
    repository: String,
    revision: u64,
    room: Arc<Room>,
}

/// What opening found.
pub(super) enum Opened {
    /// The upload, its acknowledged bytes, and their hash.
    Upload(LocalUpload, u64, Hasher),
    Absent,
    /// Another request holds it.
    Busy,
}

impl LocalUpload {
    /// Blocking: makes an upload's files. Without a repository, there is no state, and nobody can resume it.
    pub(super) fn create(
        path: PathBuf,
        algorithm: Algorithm,
        repository: Option<String>,
        room: Arc<Room>,
    ) -> io::Result<LocalUpload> {
        let file = make(&room, &path)?;
        if !try_lock(&file)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let resumable = repository.is_some();
        let repository = repository.unwrap_or_default();
        let mut upload = LocalUpload { file, state: None, path, repository, revision: 0, room };
        if resumable {
            upload.state = Some(make(&upload.room, &state_path(&upload.path))?);
            if let Err(error) = upload.write_record(0, &algorithm.hasher()) {
                // Nobody has its id. What can't be removed either is left to a sweep.
                let _ = upload.remove();
                return Err(error);
            }
        }
        Ok(upload)
    }

    /// Blocking: opens an upload of this repository, unless another request has it.
    pub(super) fn open(path: PathBuf, repository: String, room: Arc<Room>) -> io::Result<Opened> {
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Opened::Absent),
            other => other?,
        };
        if !try_lock(&file)? {
            return Ok(Opened::Busy);
        }
        // It may have become content meanwhile.
        if !is_at(&file, &path)? {
            return Ok(Opened::Absent);
        }
        let state = match OpenOptions::new().read(true).write(true).open(state_path(&path)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Opened::Absent),
            other => other?,
        };
        let Some(Record { revision, offset, hasher, .. }) = newest(&state)? else {
            return Ok(Opened::Absent);
        };
        let size = file.metadata()?.len();
        if size < offset {
            let text = format!("{} has {size} bytes, and {offset} were acknowledged", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        if size > offset {
            file.set_len(offset)?;
        }
        // Before anything of it is acknowledged: until now, the files' names need not have been on disk.
        if let Some(folder) = path.parent() {
            File::open(folder)?.sync_all()?;
        }
        let upload = LocalUpload { file, state: Some(state), path, repository, revision, room };
        Ok(Opened::Upload(upload, offset, hasher))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Blocking: writes, syncs and hashes all that comes, and acknowledges it. Gives the new offset and hash. After
    /// an error, the upload is as it was before, or has all of it.
    pub(super) fn append(
        &mut self,
        at: u64,
        hasher: Hasher,
        declared: Option<u64>,
        batches: &mut mpsc::Receiver<Vec<Bytes>>,
    ) -> io::Result<(u64, Hasher)> {
        let (offset, hasher) = self.write(at, hasher, declared, batches).inspect_err(|_| {
            // A full disk has room again; if this fails too, the next open does it.
            let _ = self.file.set_len(at);
        })?;
        // From here on the bytes are on disk and stay: whichever record survives a failure says how many count.
        self.write_record(offset, &hasher)?;
        if let Some(state) = &self.state {
            state.sync_data()?;
        }
        Ok((offset, hasher))
    }

    fn write(
        &mut self,
        at: u64,
        hasher: Hasher,
        declared: Option<u64>,
        batches: &mut mpsc::Receiver<Vec<Bytes>>,
    ) -> io::Result<(u64, Hasher)> {
        let mut hashing = Hashing::start(hasher, declared.is_none_or(|size| size > HASH_INLINE_BYTES));
        let (mut offset, mut written_back) = (at, at);
        while let Some(batch) = batches.blocking_recv() {
            for chunk in &batch {
                self.room.have(|| self.file.write_all_at(chunk, offset))?;
                offset += chunk.len() as u64;
            }
            hashing.update(batch);
            if offset - written_back >= WRITE_BACK_BYTES {
                write_back(&self.file, written_back, offset - written_back);
                written_back = offset;
            }
        }
        if self.state.is_some() {
            // While the last bytes are hashed.
            self.file.sync_data()?;
        }
        Ok((offset, hashing.finish()?))
    }

    /// Blocking: all bytes on disk, for an upload that has no state.
    pub(super) fn sync(&self) -> io::Result<()> {
        if self.is_whole() { self.file.sync_all() } else { Ok(()) }
    }

    /// Blocking: the digest by another algorithm than the one that was hashed by.
    pub(super) fn digest(&mut self, algorithm: Algorithm) -> io::Result<Digest> {
        let (mut hasher, mut buffer) = (algorithm.hasher(), vec![0; 1 << 20]);
        self.file.rewind()?;
        loop {
            match self.file.read(&mut buffer)? {
                0 => return Ok(hasher.finish()),
                read => hasher.update(&buffer[..read]),
            }
        }
    }

    /// Blocking: removes what is left after the bytes became content.
    pub(super) fn forget(&self) -> io::Result<()> {
        match &self.state {
            Some(_) => ignore_missing(fs::remove_file(state_path(&self.path))),
            None => Ok(()),
        }
    }

    /// Blocking: removes the upload.
    pub(super) fn remove(&self) -> io::Result<()> {
        // The state first: without it, the file is nothing that can be resumed.
        self.forget()?;
        if is_at(&self.file, &self.path)? {
            ignore_missing(fs::remove_file(&self.path))?;
        }
        Ok(())
    }

    fn is_whole(&self) -> bool {
        self.state.is_none()
    }

    fn write_record(&mut self, offset: u64, hasher: &Hasher) -> io::Result<()> {
        let Some(state) = &self.state else { return Ok(()) };
        let revision = self.revision + 1;
        let (hasher, repository) = (hasher.clone(), self.repository.clone());
        let record = encode(&Record { revision, offset, hasher, repository })?;
        self.room.have(|| state.write_all_at(&record, (revision % 2) * RECORD_BYTES as u64))?;
        self.revision = revision;
        Ok(())
    }
}

impl Drop for LocalUpload {
    fn drop(&mut self) {
        // Nobody can go on with it. Where it became content, there is no such file any more.
        if self.is_whole()
            && let Err(error) = self.remove()
        {
            tracing::warn!(%error, path = %self.path.display(), "an upload can't be removed");
        }
    }
}

/// Blocking: removes uploads that nobody went on with, and says how many.
pub(crate) fn sweep(folder: &Path, abandoned_after: Duration, ages: &Ages) -> io::Result<u64> {
    let mut swept = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let Ok(metadata) = entry.metadata() else { continue };
        let age = ages.of(metadata.modified()?).unwrap_or_default();
        if let Some(id) = name.strip_suffix(STATE_SUFFIX) {
            // Its upload became content, and the crash came before the state was removed.
            if !folder.join(id).exists() && age > HALF_AGE_MIN {
                ignore_missing(fs::remove_file(entry.path()))?;
            }
            continue;
        }
        let resumable = state_path(&entry.path()).exists();
        // Right after it is made, a file has no lock yet either.
        if age <= if resumable { abandoned_after } else { HALF_AGE_MIN } {
            continue;
        }
        let Ok(file) = File::open(entry.path()) else { continue };
        // One that is in use is locked, also by another process.
        if try_lock(&file)? && is_at(&file, &entry.path())? {
            ignore_missing(fs::remove_file(state_path(&entry.path())))?;
            ignore_missing(fs::remove_file(entry.path()))?;
            swept += 1;
        }
    }
    Ok(swept)
}

/// Blocking: the uploads that can be gone on with.
pub(super) fn unfinished(folder: &Path) -> io::Result<Vec<Unfinished>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let Some(id) = name.to_str().and_then(|name| name.strip_suffix(STATE_SUFFIX)) else { continue };
        let path = folder.join(id);
        let read = || -> io::Result<_> {
            let record = newest(&File::open(state_path(&path))?)?;
            // A part that is on its way is in the bytes only.
            Ok((record, fs::metadata(&path)?.modified()?))
        };
        match read() {
            Ok((Some(Record { repository, offset: bytes, .. }), touched)) => {
                found.push(Unfinished { repository, id: id.to_owned(), bytes, touched });
            }
            Ok((None, _)) => {}
            // It ended a moment ago.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

const STATE_SUFFIX: &str = ".state";

fn make(room: &Room, path: &Path) -> io::Result<File> {
    room.have(|| OpenOptions::new().read(true).write(true).create_new(true).open(path))
}

fn state_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(STATE_SUFFIX);
    name.into()
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (open.dev(), open.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

fn try_lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(fs::TryLockError::WouldBlock) => Ok(false),
        Err(fs::TryLockError::Error(e)) => Err(e),
    }
}

fn write_back(file: &File, from: u64, len: u64) {
    // SAFETY: the descriptor is open, and the call takes numbers only. It is advice: its failure changes nothing.
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), from as i64, len as i64, libc::SYNC_FILE_RANGE_WRITE);
    }
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A hash that is computed here, or beside, on a thread.
enum Hashing {
    Here(Hasher),
    Beside(threads::SyncSender<Vec<Bytes>>, std::thread::JoinHandle<Hasher>),
}

impl Hashing {
    fn start(mut hasher: Hasher, beside: bool) -> Hashing {
        if !beside {
            return Hashing::Here(hasher);
        }
        let (sender, receiver) = threads::sync_channel::<Vec<Bytes>>(HASHING_MAX);
        let thread = std::thread::spawn(move || {
            for batch in receiver {
                batch.iter().for_each(|chunk| hasher.update(chunk));
            }
            hasher
        });
        Hashing::Beside(sender, thread)
    }

    fn update(&mut self, batch: Vec<Bytes>) {
        match self {
            Hashing::Here(hasher) => batch.iter().for_each(|chunk| hasher.update(chunk)),
            // It fails only where the thread has panicked, which the end reports.
            Hashing::Beside(sender, _) => drop(sender.send(batch)),
        }
    }

    fn finish(self) -> io::Result<Hasher> {
        match self {
            Hashing::Here(hasher) => Ok(hasher),
            Hashing::Beside(sender, thread) => {
                drop(sender);
                thread.join().map_err(|_| io::Error::other("the hashing thread panicked"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_sweep_leaves_what_is_being_made() {
        let dir = tempfile::tempdir().unwrap();
        // As between the two calls that make a file and lock it.
        let file = make(&Room::elsewhere(), &dir.path().join("upload")).unwrap();
        let now = file.metadata().unwrap().modified().unwrap();
        let sweep = |at| sweep(dir.path(), Duration::from_secs(86_400), &Ages::at(at)).unwrap();
        assert_eq!(sweep(now), 0);
        assert!(is_at(&file, &dir.path().join("upload")).unwrap());
        assert_eq!(sweep(now + 2 * HALF_AGE_MIN), 1, "a crash left it");
    }

    #[test]
    fn a_crash_between_acknowledgements_goes_back_to_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("upload");
        let room = || Arc::new(Room::elsewhere());
        let append = |upload: &mut LocalUpload, at, hasher, bytes: &'static [u8]| {
            let (sender, mut receiver) = mpsc::channel(1);
            sender.blocking_send(vec![Bytes::from_static(bytes)]).unwrap();
            drop(sender);
            upload.append(at, hasher, None, &mut receiver).unwrap()
        };
        let mut upload =
            LocalUpload::create(path.clone(), Algorithm::Sha256, Some("a/b".into()), room()).unwrap();
        let ages = Ages::at(std::time::SystemTime::now());
        assert!(matches!(sweep(dir.path(), Duration::ZERO, &ages), Ok(0)), "it is in use");
        append(&mut upload, 0, Hasher::sha256(), b"first");
        drop(upload);
        // Bytes that were written and not acknowledged, and a record that was torn.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"torn").unwrap();
        OpenOptions::new().write(true).open(state_path(&path)).unwrap().write_all_at(&[1; 100], 512).unwrap();
        let found: Vec<_> =
            unfinished(dir.path()).unwrap().into_iter().map(|it| (it.repository, it.id, it.bytes)).collect();
        assert_eq!(found, [("a/b".to_owned(), "upload".to_owned(), 5)]);
        let open = || LocalUpload::open(path.clone(), "a/b".into(), room()).unwrap();
        let Opened::Upload(mut upload, offset, hasher) = open() else { panic!("the upload is gone") };
        assert_eq!(offset, 5);
        let (offset, hasher) = append(&mut upload, offset, hasher, b" second");
        assert_eq!((offset, hasher.finish()), (12, Digest::of(b"first second")));
        assert_eq!(upload.digest(Algorithm::Sha512).unwrap(), Algorithm::Sha512.digest(b"first second"));
        upload.remove().unwrap();
        assert!(matches!(open(), Opened::Absent));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
