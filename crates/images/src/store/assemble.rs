//! The last thread of a partial pull: puts the archive together, hashes it, and makes the layer's table.
//!
//! Large files pass through here in the order of their bytes, so here is where they are hashed and get their names.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use sha2::{Digest as _, Sha256};
use zstd_chunked::TarSplit;

use super::import::Written;
use super::objects::{ObjectId, Objects};
use super::plan::{Planned, Source};
use super::pool::{Priority, spawn};
use super::table::{self, Content, Entry, Kind, Table};
use super::work::{Done, Run, mismatch};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};

/// Buffers that wait for the hash of a large file.
const WAITING: usize = 2;
/// Zeros that are hashed at a time.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Where the next piece of work's result comes from.
pub(super) struct Step {
    pub(super) result: Receiver<Result<Done>>,
    /// The file that a large file's segments go to, with the first of them.
    pub(super) large: Option<tempfile::NamedTempFile>,
}

/// Takes all results in order. Blocks.
pub(super) fn assemble(
    objects: &Arc<Objects>,
    priority: Priority,
    tar_split: &TarSplit,
    entries: Vec<Entry>,
    files: Vec<Planned>,
    steps: Receiver<Step>,
    diff_id: &Digest,
) -> Result<(Table, Written)> {
    let state = Rc::new(RefCell::new(State {
        objects: objects.clone(),
        priority,
        steps,
        runs: VecDeque::new(),
        large: None,
        table: Table { entries },
        written: Written::default(),
        error: None,
    }));
    let mut files = files.into_iter();
    let mut archive = Archive(diff_id.hasher());
    let assembled = tar_split.write_tar(|name| open(&state, &mut files, name), &mut archive);
    let error = state.borrow_mut().error.take();
    if let Some(error) = error {
        return Err(error);
    }
    assembled.map_err(Error::Table)?;
    let mut state = state.borrow_mut();
    state.end_large()?;
    if let Some(left) = files.next() {
        let reason = format!("its tar-split has no contents of `{}`", left.name);
        return Err(Error::InvalidLayer { reason });
    }
    let found = archive.0.finish();
    if found != *diff_id {
        let what = "the archive inside a layer".to_owned();
        return Err(Error::DigestMismatch { what, expected: diff_id.clone(), found });
    }
    Ok((std::mem::take(&mut state.table), state.written))
}

struct Archive(Hasher);

impl io::Write for Archive {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct State {
    objects: Arc<Objects>,
    priority: Priority,
    steps: Receiver<Step>,
    /// Contents that came and are still to be read.
    runs: VecDeque<(Run, usize)>,
    large: Option<Large>,
    table: Table,
    written: Written,
    /// Why reading failed, since readers can only give I/O errors.
    error: Option<Error>,
}

/// A large file that is under way.
struct Large {
    file: Option<tempfile::NamedTempFile>,
    entry: usize,
    id: ObjectId,
    size: u64,
    chunks: Vec<table::Chunk>,
    runs: SyncSender<Run>,
    hash: Receiver<ObjectId>,
}

/// One file's contents.
enum Contents {
    File(File),
    Inline(io::Cursor<Arc<[u8]>>),
    Work { state: Rc<RefCell<State>>, left: u64 },
}

fn open(
    state: &Rc<RefCell<State>>,
    files: &mut impl Iterator<Item = Planned>,
    name: &str,
) -> io::Result<Contents> {
    let found = files.next().filter(|file| file.name == name);
    let mut of = state.borrow_mut();
    let opened = found
        .ok_or_else(|| Error::InvalidLayer {
            reason: format!("its table and its tar-split have `{name}` in another order"),
        })
        .and_then(|file| {
            of.end_large()?;
            Ok(match file.source {
                Source::Object(id) => Contents::File(of.objects.open_object(&id)?),
                Source::Inline(bytes) => Contents::Inline(io::Cursor::new(bytes)),
                Source::Work => Contents::Work { state: state.clone(), left: file.size },
                Source::Large(entry, chunks) => {
                    of.begin_large(entry, file.id, file.size, chunks)?;
                    Contents::Work { state: state.clone(), left: file.size }
                }
            })
        });
    opened.map_err(|error| {
        of.error = Some(error);
        io::ErrorKind::Other.into()
    })
}

impl Read for Contents {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Contents::File(file) => file.read(buf),
            Contents::Inline(bytes) => bytes.read(buf),
            Contents::Work { left: 0, .. } => Ok(0),
            Contents::Work { state, left } => {
                let len = buf.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                let mut state = state.borrow_mut();
                let read = state.read(&mut buf[..len]).map_err(|error| {
                    state.error = Some(error);
                    io::Error::from(io::ErrorKind::Other)
                })?;
                *left -= read as u64;
                Ok(read)
            }
        }
    }
}

impl State {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        loop {
            let Some((run, at)) = self.runs.front_mut() else {
                self.next()?;
                continue;
            };
            let len = match run {
                Run::Bytes(bytes) => {
                    let rest = &bytes[*at..];
                    let len = rest.len().min(buf.len());
                    buf[..len].copy_from_slice(&rest[..len]);
                    *at += len;
                    if *at == bytes.len() {
                        self.runs.pop_front();
                    }
                    len
                }
                Run::Zeros(left) => {
                    let len = buf.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    buf[..len].fill(0);
                    *left -= len as u64;
                    if *left == 0 {
                        self.runs.pop_front();
                    }
                    len
                }
            };
            if len > 0 {
                return Ok(len);
            }
        }
    }

    /// Waits for the next piece of work.
    fn next(&mut self) -> Result<()> {
        self.priority.keep_up();
        let step = self.steps.recv().map_err(|_| Error::Cancelled)?;
        if let (Some(file), Some(large)) = (step.large, &mut self.large) {
            large.file = Some(file);
        }
        let done = step.result.recv().map_err(|_| Error::Cancelled)??;
        for (entry, file, written) in done.files {
            self.finish(entry, file, written);
        }
        for run in done.contents {
            if let Some(large) = &self.large {
                let copy = match &run {
                    Run::Bytes(bytes) => Run::Bytes(bytes.clone()),
                    Run::Zeros(length) => Run::Zeros(*length),
                };
                large.runs.send(copy).map_err(|_| Error::Cancelled)?;
            }
            self.runs.push_back((run, 0));
        }
        Ok(())
    }

    fn finish(&mut self, entry: usize, file: table::File, written: u64) {
        self.written.files += 1;
        self.written.bytes += written;
        if let Some(entry) = self.table.entries.get_mut(entry) {
            entry.kind = Kind::File(file);
        }
    }

    fn begin_large(
        &mut self,
        entry: usize,
        id: ObjectId,
        size: u64,
        chunks: Vec<table::Chunk>,
    ) -> Result<()> {
        let (runs, waiting) = sync_channel(WAITING);
        let (sender, hash) = sync_channel(1);
        spawn(self.priority.now(), "images-hash", move || {
            let _ = sender.send(hash_runs(&waiting));
        })?;
        self.large = Some(Large { file: None, entry, id, size, chunks, runs, hash });
        Ok(())
    }

    /// Verifies and names the large file that came last, if there is one.
    fn end_large(&mut self) -> Result<()> {
        let Some(Large { file, entry, id, size, chunks, runs, hash }) = self.large.take() else {
            return Ok(());
        };
        drop(runs);
        let found = hash.recv().map_err(|_| Error::Cancelled)?;
        if found != id {
            return Err(mismatch("a file of a layer", id, found));
        }
        let file = file.ok_or(Error::Cancelled)?;
        let written = if self.objects.keep(&id, size, file)? { size } else { 0 };
        let content = Content::Object(chunks);
        self.finish(entry, table::File { id, size, content }, written);
        Ok(())
    }
}

fn hash_runs(runs: &Receiver<Run>) -> ObjectId {
    let mut hasher = Sha256::new();
    for run in runs {
        match run {
            Run::Bytes(bytes) => hasher.update(bytes.as_slice()),
            Run::Zeros(mut left) => {
                while left > 0 {
                    let len = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
                    hasher.update(&ZEROS[..len]);
                    left -= len as u64;
                }
            }
        }
    }
    ObjectId(hasher.finalize().into())
}
