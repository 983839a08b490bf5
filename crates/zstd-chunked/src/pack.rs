//! The writer: a tar archive in, a zstd:chunked blob out.
//!
//! One pass. The calling thread reads the archive, cuts it into frames and writes the finished frames in order; worker
//! threads compress and hash; one more hashes the archive. How many workers there are changes the time, not the bytes.
//! Memory is bounded whatever the archive's size: with two threads about 60 MB, of which most are frames in flight and
//! zstd's contexts. The tables are compressed as they grow.
//!
//! Some archives can't be described by a table so that all readers agree: names that aren't UTF-8, paths that are there
//! twice, global PAX headers, and the like. Other tools fail on such a table, or refuse to make one. Those layers become
//! ordinary zstd layers: the same frames, without table, and [`Packed::plain`] says why.

mod cut;
mod sink;
mod work;

use std::{
    collections::VecDeque,
    io::{Read, Write},
    sync::Arc,
};

use crate::{
    Annotations, Digest, Entry, Error, Limits, Result,
    names::Names,
    tar::{BLOCK, Member, next_member, read_full},
};
use cut::Cutter;
use sink::{Event, Sink};
use work::{Job, Workers};

/// Largest file that is one chunk, in bytes. Below it, what a changed file costs is small, and cutting would cost size.
const WHOLE_MAX: u64 = 2 << 20;
/// Uncompressed bytes for each thread that wait for a worker or for their turn to be written, at most.
const IN_FLIGHT_MAX: usize = 4 << 20;
/// Frames that wait, at most: small ones cost more than their bytes.
const FRAMES_MAX: usize = 4096;
/// Bytes of the archive's end (zeros after the last member) in one segment.
const TAIL_SEGMENT: usize = 1 << 20;

/// How to pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// zstd's level.
    pub level: i32,
    /// Threads that compress; 0 is one for each core.
    pub threads: usize,
}

impl Options {
    /// Frames of single files compress worse than one stream. With this level a layer of many small files is less than
    /// 1.15 times as large as one stream of zstd -3; level 3 takes half the time, and 3 % more bytes.
    pub const LEVEL: i32 = 4;
}

impl Default for Options {
    fn default() -> Self {
        Self { level: Self::LEVEL, threads: 0 }
    }
}

/// A blob that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Digest of the blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Digest of the archive: the layer's diff id.
    pub diff_id: Digest,
    /// Bytes of the archive.
    pub tar_size: u64,
    /// The annotations for the layer's descriptor; none if it became an ordinary zstd layer.
    pub annotations: Option<Annotations>,
    /// Why it became an ordinary zstd layer.
    pub plain: Option<String>,
    /// What was in it.
    pub stats: Stats,
}

/// Counts of a packed archive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Members, of all kinds.
    pub members: u64,
    /// Regular files with content.
    pub files: u64,
    /// Their chunks.
    pub chunks: u64,
    /// Bytes of their content.
    pub content: u64,
    /// Bytes of content in chunks of zeros.
    pub zeros: u64,
}

/// Packs an uncompressed archive into a blob.
///
/// # Errors
///
/// Reading, writing, an archive that is broken or has sparse members. What was written to `blob` must be thrown away then.
pub fn pack(tar: impl Read, blob: impl Write, options: &Options) -> Result<Packed> {
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, |cores| cores.get()),
        threads => threads,
    };
    std::thread::scope(|scope| {
        let workers = Workers::start(scope, threads, options.level)?;
        let packer = Packer {
            tar,
            sink: Sink::new(blob, options.level)?,
            workers,
            waiting: VecDeque::new(),
            in_flight: 0,
            in_flight_max: IN_FLIGHT_MAX * threads.max(2),
            names: Names::default(),
            stats: Stats::default(),
        };
        packer.run()
    })
}

struct Packer<R, W: Write> {
    tar: R,
    sink: Sink<W>,
    workers: Workers,
    /// Frames in the blob's order that were not written yet, with their uncompressed bytes.
    waiting: VecDeque<(Event, usize)>,
    in_flight: usize,
    in_flight_max: usize,
    names: Names,
    stats: Stats,
}

impl<R: Read, W: Write> Packer<R, W> {
    fn run(mut self) -> Result<Packed> {
        let mut raw = Vec::new();
        while let Some(member) = next_member(&mut self.tar, &mut raw)? {
            self.segment(std::mem::take(&mut raw))?;
            self.stats.members += 1;
            self.judge(&member)?;
            let padding = member.padding();
            self.content(member)?;
            raw.resize(padding, 0);
            if read_full(&mut self.tar, &mut raw)? != padding {
                return Err(Error::invalid("tar archive", "it ends within the padding of a member"));
            }
        }
        if !raw.is_empty() {
            self.segment(raw)?;
        }
        self.tail()?;
        while !self.waiting.is_empty() {
            self.write_next()?;
        }
        let (diff_id, tar_size) = self.workers.finish()?;
        self.sink.finish(diff_id, tar_size, self.stats)
    }

    /// Decides whether the table can hold the member.
    fn judge(&mut self, member: &Member) -> Result<()> {
        if self.sink.is_plain() {
            return Ok(());
        }
        let entry = &member.entry;
        let name = &entry.name;
        if let Some(odd) = member.odd {
            self.sink.make_plain(format!("{name:?}: {odd}"));
        } else if name.len().max(entry.link_name.len()) > Limits::NAME_BYTES {
            self.sink.make_plain(format!("{name:?} has a name longer than {} bytes", Limits::NAME_BYTES));
        } else if self.stats.content.saturating_add(member.payload) > Limits::CONTENT_BYTES {
            self.sink.make_plain(format!("more than {} bytes of content", Limits::CONTENT_BYTES));
        } else {
            let added = entry.path().and_then(|path| {
                let target = entry.hardlink_path()?;
                self.names.add(&path, entry.kind, target.as_deref())
            });
            if let Err(error) = added.and_then(|()| entry.check()) {
                self.sink.make_plain(error.to_string());
            }
        }
        if self.sink.is_plain() {
            self.names = Names::default();
        }
        Ok(())
    }

    /// Raw bytes of the archive: a frame of their own.
    fn segment(&mut self, bytes: Vec<u8>) -> Result<()> {
        let bytes = Arc::new(bytes);
        let frame = self.workers.compress(Job::raw(bytes.clone()))?;
        let size = bytes.len();
        self.push(Event::Segment { bytes, frame }, size)
    }

    fn content(&mut self, member: Member) -> Result<()> {
        let Member { entry, payload, .. } = member;
        if payload == 0 {
            return self.push(Event::Empty { entry }, 0);
        }
        self.stats.files += 1;
        self.stats.content += payload;
        if payload > WHOLE_MAX {
            return self.large(entry, payload);
        }
        let mut content = vec![0; payload as usize];
        let read = read_full(&mut self.tar, &mut content)?;
        if read as u64 != payload {
            return Err(ends_within(&entry, read as u64));
        }
        self.stats.chunks += 1;
        let frame = self.workers.compress(Job::file(Arc::new(content)))?;
        self.push(Event::Whole { entry, frame }, payload as usize)
    }

    /// A file of many chunks, read piece by piece.
    fn large(&mut self, entry: Entry, payload: u64) -> Result<()> {
        let mut cutter = Cutter::new(payload);
        let mut crc = crc_fast::Digest::new(work::CRC);
        self.push(Event::Begin, 0)?;
        while let Some(piece) = cutter.next(&mut self.tar).map_err(|error| match error {
            cut::CutError::Short(read) => ends_within(&entry, read),
            cut::CutError::Other(error) => error,
        })? {
            self.stats.chunks += 1;
            let size = piece.len();
            let job = match piece {
                cut::Piece::Data(bytes) => {
                    crc.update(&bytes);
                    Job::chunk(Arc::new(bytes))
                }
                cut::Piece::Zeros(count) => {
                    work::each_zeros(count, |zeros| crc.update(zeros));
                    self.stats.zeros += count;
                    Job::zeros(count)
                }
            };
            let in_memory = job.in_memory();
            let zeros = job.is_zeros();
            let frame = self.workers.compress(job)?;
            self.push(Event::Chunk { size, zeros, frame }, in_memory)?;
        }
        let digest = self.workers.end_file()?;
        self.push(Event::End { entry, crc: crc.finalize(), digest }, 0)
    }

    /// What follows the end of the archive: zeros to fill a tape's record.
    fn tail(&mut self) -> Result<()> {
        loop {
            let mut bytes = vec![0; TAIL_SEGMENT];
            let read = read_full(&mut self.tar, &mut bytes)?;
            if read == 0 {
                return Ok(());
            }
            bytes.truncate(read);
            if bytes.iter().any(|&byte| byte != 0) || read % BLOCK != 0 {
                self.sink.make_plain(
                    "the archive's end is followed by something else than blocks of zeros".into(),
                );
            }
            self.segment(bytes)?;
        }
    }

    /// Puts a frame in line, and waits for the first ones while too much is in flight.
    fn push(&mut self, event: Event, size: usize) -> Result<()> {
        self.waiting.push_back((event, size));
        self.in_flight += size;
        while self.in_flight > self.in_flight_max || self.waiting.len() > FRAMES_MAX {
            self.write_next()?;
        }
        Ok(())
    }

    fn write_next(&mut self) -> Result<()> {
        if let Some((event, size)) = self.waiting.pop_front() {
            self.in_flight -= size;
            self.sink.write(event)?;
        }
        Ok(())
    }
}

fn ends_within(entry: &Entry, read: u64) -> Error {
    let why = format!("it ends within {:?}, after {read} of {} bytes", entry.name, entry.size);
    Error::invalid("tar archive", why)
}
