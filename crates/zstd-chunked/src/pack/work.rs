//! Threads that compress frames and hash.

use std::{
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread::Scope,
};

use sha2::{Digest as _, Sha256};

use crate::{Digest, Error, Result};

/// The CRC of tar-split: ECMA's algorithm with ISO 3309's polynomial, as Go's hash/crc64 computes it.
pub(super) const CRC: crc_fast::CrcAlgorithm = crc_fast::CrcAlgorithm::Crc64GoIso;
/// Frames that wait for the archive's hasher, at most; each is up to 2 MiB.
const HASHING_MAX: usize = 8;
/// Zero bytes at hand.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Calls `each` with pieces of so many zeros.
pub(super) fn each_zeros(mut count: u64, mut each: impl FnMut(&[u8])) {
    while count > 0 {
        let piece = count.min(ZEROS.len() as u64);
        each(&ZEROS[..piece as usize]);
        count -= piece;
    }
}

#[derive(Clone)]
enum Data {
    Bytes(Arc<Vec<u8>>),
    Zeros(u64),
}

impl Data {
    fn each(&self, mut each: impl FnMut(&[u8])) {
        match self {
            Self::Bytes(bytes) => each(bytes),
            Self::Zeros(count) => each_zeros(*count, each),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Headers and padding.
    Raw,
    /// A whole file.
    File,
    /// A piece of a large file.
    Chunk,
}

/// Something that becomes a frame.
pub(super) struct Job {
    data: Data,
    role: Role,
}

impl Job {
    pub(super) fn raw(bytes: Arc<Vec<u8>>) -> Self {
        Self { data: Data::Bytes(bytes), role: Role::Raw }
    }

    pub(super) fn file(bytes: Arc<Vec<u8>>) -> Self {
        Self { data: Data::Bytes(bytes), role: Role::File }
    }

    pub(super) fn chunk(bytes: Arc<Vec<u8>>) -> Self {
        Self { data: Data::Bytes(bytes), role: Role::Chunk }
    }

    pub(super) fn zeros(count: u64) -> Self {
        Self { data: Data::Zeros(count), role: Role::Chunk }
    }

    pub(super) fn is_zeros(&self) -> bool {
        matches!(self.data, Data::Zeros(_))
    }

    /// Bytes of memory that it holds.
    pub(super) fn in_memory(&self) -> usize {
        match &self.data {
            Data::Bytes(bytes) => bytes.len(),
            Data::Zeros(_) => 0,
        }
    }
}

/// A compressed frame.
pub(super) struct Frame {
    pub(super) bytes: Vec<u8>,
    /// Digest of the content; not for headers.
    pub(super) digest: Option<Digest>,
    /// CRC of the content; only for whole files.
    pub(super) crc: u64,
}

/// A result that a thread will send.
pub(super) struct Later<T>(Receiver<T>);

impl<T> Later<T> {
    pub(super) fn wait(self) -> Result<T> {
        self.0.recv().map_err(|_| stopped())
    }
}

fn stopped() -> Error {
    Error::invalid("packing", "a worker thread stopped")
}

enum Hashing {
    Archive(Data),
    /// Also part of a large file.
    Chunk(Data),
    EndOfFile(SyncSender<Digest>),
}

/// The running threads; they end when this is dropped.
pub(super) struct Workers {
    jobs: Sender<(Job, SyncSender<Result<Frame>>)>,
    hashing: SyncSender<Hashing>,
    archive: Later<(Digest, u64)>,
}

impl Workers {
    /// Starts `threads` compressors and the archive's hasher. The compressors' queue needs no bound of its own: the packer
    /// bounds what is in flight.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        threads: usize,
        level: i32,
    ) -> Result<Self> {
        let (jobs, queue) = channel();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..threads {
            let compressor = Compressor::new(level)?;
            let queue = queue.clone();
            scope.spawn(move || compress_all(compressor, &queue));
        }
        let (hashing, to_hash) = sync_channel(HASHING_MAX);
        let (done, archive) = sync_channel(1);
        // Nobody may wait any more, after an error.
        scope.spawn(move || done.send(hash_all(&to_hash)).ok());
        Ok(Self { jobs, hashing, archive: Later(archive) })
    }

    /// Hands the bytes, which are the archive's next, to a worker and to the hasher.
    pub(super) fn compress(&self, job: Job) -> Result<Later<Result<Frame>>> {
        let hashing = match job.role {
            Role::Chunk => Hashing::Chunk(job.data.clone()),
            Role::Raw | Role::File => Hashing::Archive(job.data.clone()),
        };
        self.hashing.send(hashing).map_err(|_| stopped())?;
        let (reply, later) = sync_channel(1);
        self.jobs.send((job, reply)).map_err(|_| stopped())?;
        Ok(Later(later))
    }

    /// The digest of the chunks since the last large file.
    pub(super) fn end_file(&self) -> Result<Later<Digest>> {
        let (reply, later) = sync_channel(1);
        self.hashing.send(Hashing::EndOfFile(reply)).map_err(|_| stopped())?;
        Ok(Later(later))
    }

    /// Digest and bytes of the whole archive.
    pub(super) fn finish(self) -> Result<(Digest, u64)> {
        let Self { jobs, hashing, archive } = self;
        drop((jobs, hashing));
        archive.wait()
    }
}

fn hash_all(queue: &Receiver<Hashing>) -> (Digest, u64) {
    let (mut archive, mut size, mut file) = (Sha256::new(), 0, Sha256::new());
    for hashing in queue {
        match hashing {
            Hashing::Archive(data) => data.each(|bytes| {
                size += bytes.len() as u64;
                archive.update(bytes);
            }),
            Hashing::Chunk(data) => data.each(|bytes| {
                size += bytes.len() as u64;
                archive.update(bytes);
                file.update(bytes);
            }),
            // Nobody may wait any more, after an error.
            Hashing::EndOfFile(reply) => {
                reply.send(std::mem::take(&mut file).into()).ok();
            }
        }
    }
    (archive.into(), size)
}

type Queue = Mutex<Receiver<(Job, SyncSender<Result<Frame>>)>>;

fn compress_all(mut compressor: Compressor, queue: &Queue) {
    loop {
        let next = match queue.lock() {
            Ok(queue) => queue.recv(),
            Err(_) => return,
        };
        let Ok((job, reply)) = next else { return };
        let frame = compressor.frame(&job);
        // Nobody may wait any more, after an error.
        let _ = reply.send(frame);
    }
}

/// A zstd context, used for one frame after the other: making one costs more than compressing a small file.
struct Compressor {
    bulk: zstd::bulk::Compressor<'static>,
    level: i32,
}

impl Compressor {
    fn new(level: i32) -> Result<Self> {
        let bulk = zstd::bulk::Compressor::new(level).map_err(Error::io("creating a zstd context"))?;
        Ok(Self { bulk, level })
    }

    fn frame(&mut self, job: &Job) -> Result<Frame> {
        let bytes = match &job.data {
            Data::Bytes(bytes) => self.bulk.compress(bytes),
            Data::Zeros(count) => self.zeros(*count),
        }
        .map_err(Error::io("compressing"))?;
        let digest = (job.role != Role::Raw).then(|| {
            let mut hasher = Sha256::new();
            job.data.each(|bytes| hasher.update(bytes));
            hasher.into()
        });
        let mut crc = 0;
        if job.role == Role::File {
            job.data.each(|bytes| crc = crc_fast::checksum(CRC, bytes));
        }
        Ok(Frame { bytes, digest, crc })
    }

    fn zeros(&self, count: u64) -> std::io::Result<Vec<u8>> {
        use std::io::Write as _;
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), self.level)?;
        encoder.set_pledged_src_size(Some(count))?;
        encoder.include_contentsize(true)?;
        let mut failed = Ok(());
        each_zeros(count, |zeros| {
            if failed.is_ok() {
                failed = encoder.write_all(zeros);
            }
        });
        failed?;
        encoder.finish()
    }
}
