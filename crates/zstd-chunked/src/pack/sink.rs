//! The output: frames in order, and the tables that grow beside them.

use std::{io::Write, sync::Arc};

use sha2::{Digest as _, Sha256};

use super::{
    Packed, Stats,
    work::{Frame, Later},
};
use crate::{
    Annotations, ChunkType, Digest, Entry, EntryType, Error, Limits, Positions, Result, SKIPPABLE_MAGIC,
    Section, tar_split,
};

/// Something whose turn comes.
pub(super) enum Event {
    /// Raw bytes of the archive.
    Segment { bytes: Arc<Vec<u8>>, frame: Later<Result<Frame>> },
    /// A member without content.
    Empty { entry: Entry },
    /// A file of one chunk.
    Whole { entry: Entry, frame: Later<Result<Frame>> },
    /// A large file's chunks follow, then its end.
    Begin,
    /// A chunk of a large file.
    Chunk { size: u64, zeros: bool, frame: Later<Result<Frame>> },
    /// The large file is complete.
    End { entry: Entry, crc: u64, digest: Later<Digest> },
}

/// A chunk of the large file that is being written. The table lists them after the file's digest and end, so they wait.
struct Written {
    offset: u64,
    size: u64,
    digest: Option<Digest>,
    zeros: bool,
}

/// Writes the blob.
pub(super) struct Sink<W> {
    blob: Counted<W>,
    /// None if the layer became an ordinary one.
    tables: Option<Tables>,
    plain: Option<String>,
    chunks: Vec<Written>,
}

impl<W: Write> Sink<W> {
    pub(super) fn new(blob: W, level: i32) -> Result<Self> {
        let blob = Counted { out: blob, hasher: Sha256::new(), size: 0 };
        Ok(Self { blob, tables: Some(Tables::new(level)?), plain: None, chunks: Vec::new() })
    }

    pub(super) fn is_plain(&self) -> bool {
        self.plain.is_some()
    }

    /// Gives up the tables.
    pub(super) fn make_plain(&mut self, why: String) {
        self.plain.get_or_insert(why);
        self.tables = None;
        self.chunks = Vec::new();
    }

    pub(super) fn write(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Segment { bytes, frame } => {
                self.frame(frame)?;
                self.tables(|tables| tables.segment(&bytes))
            }
            Event::Empty { entry } => self.tables(|tables| {
                tables.file(&entry.name, 0, 0)?;
                tables.entry(&entry)
            }),
            Event::Whole { mut entry, frame } => {
                let (offset, frame) = self.frame(frame)?;
                entry.digest = frame.digest;
                entry.offset = offset;
                entry.end_offset = self.blob.size;
                self.tables(|tables| {
                    tables.file(&entry.name, entry.size, frame.crc)?;
                    tables.entry(&entry)
                })
            }
            Event::Begin => {
                self.chunks.clear();
                Ok(())
            }
            Event::Chunk { size, zeros, frame } => {
                let (offset, frame) = self.frame(frame)?;
                if self.tables.is_some() {
                    self.chunks.push(Written { offset, size, digest: frame.digest, zeros });
                    if self.chunks.len() > Limits::ENTRIES {
                        self.make_plain(format!("more than {} entries", Limits::ENTRIES));
                    }
                }
                Ok(())
            }
            Event::End { mut entry, crc, digest } => {
                entry.digest = Some(digest.wait()?);
                entry.end_offset = self.blob.size;
                let chunks = std::mem::take(&mut self.chunks);
                self.tables(|tables| {
                    tables.file(&entry.name, entry.size, crc)?;
                    tables.chunks(entry, &chunks)
                })
            }
        }
    }

    /// Writes a frame; answers where it begins.
    fn frame(&mut self, frame: Later<Result<Frame>>) -> Result<(u64, Frame)> {
        let frame = frame.wait()??;
        let offset = self.blob.size;
        self.blob.write(&frame.bytes)?;
        Ok((offset, frame))
    }

    /// Changes the tables if there are any, and gives them up when they become too large.
    fn tables(&mut self, change: impl FnOnce(&mut Tables) -> std::io::Result<()>) -> Result<()> {
        if let Some(tables) = &mut self.tables {
            change(tables).map_err(Error::io("compressing the tables"))?;
            if let Some(why) = tables.too_large() {
                self.make_plain(why);
            }
        }
        Ok(())
    }

    pub(super) fn finish(mut self, diff_id: Digest, tar_size: u64, stats: Stats) -> Result<Packed> {
        let tables = self.tables.take().map(Tables::finish).transpose();
        let annotations = match tables.map_err(Error::io("compressing the tables"))? {
            Some((toc, tar_split)) => {
                let checksum = Digest::of(&toc.bytes);
                let positions =
                    Positions { toc: self.skippable(&toc)?, tar_split: self.skippable(&tar_split)? };
                let annotations = Annotations { checksum, positions };
                let bytes = annotations.footer().to_bytes().to_vec();
                self.skippable(&Compressed { raw_length: bytes.len() as u64, bytes })?;
                Some(annotations)
            }
            None => None,
        };
        self.blob.out.flush().map_err(Error::io("writing the blob"))?;
        Ok(Packed {
            digest: self.blob.hasher.into(),
            size: self.blob.size,
            diff_id,
            tar_size,
            annotations,
            plain: self.plain,
            stats,
        })
    }

    fn skippable(&mut self, content: &Compressed) -> Result<Section> {
        // The tables' limits keep them far below 4 GiB.
        let length = u32::try_from(content.bytes.len())
            .map_err(|_| Error::invalid("packing", "a table of 4 GiB, more than a frame can hold"))?;
        self.blob.write(&SKIPPABLE_MAGIC)?;
        self.blob.write(&length.to_le_bytes())?;
        let offset = self.blob.size;
        self.blob.write(&content.bytes)?;
        Ok(Section { offset, length: u64::from(length), raw_length: content.raw_length })
    }
}

struct Counted<W> {
    out: W,
    hasher: Sha256,
    size: u64,
}

impl<W: Write> Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(Error::io("writing the blob"))?;
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }
}

struct Compressed {
    bytes: Vec<u8>,
    raw_length: u64,
}

/// A stream that is compressed as it grows.
struct Growing {
    encoder: zstd::stream::write::Encoder<'static, Vec<u8>>,
    raw_length: u64,
}

impl Growing {
    fn new(level: i32) -> Result<Self> {
        let encoder = zstd::stream::write::Encoder::new(Vec::new(), level);
        Ok(Self { encoder: encoder.map_err(Error::io("creating a zstd context"))?, raw_length: 0 })
    }

    fn finish(self) -> std::io::Result<Compressed> {
        Ok(Compressed { bytes: self.encoder.finish()?, raw_length: self.raw_length })
    }
}

impl Write for Growing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.encoder.write(bytes)?;
        self.raw_length += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Table of contents and tar-split.
struct Tables {
    toc: Growing,
    entries: usize,
    tar_split: Growing,
    lines: u64,
    /// One line or entry at a time: zstd takes it in one piece.
    text: Vec<u8>,
}

impl Tables {
    fn new(level: i32) -> Result<Self> {
        let mut toc = Growing::new(level)?;
        toc.write_all(br#"{"version":1,"entries":["#).map_err(Error::io("compressing the tables"))?;
        Ok(Self { toc, entries: 0, tar_split: Growing::new(level)?, lines: 0, text: Vec::new() })
    }

    fn segment(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.text.clear();
        tar_split::write_segment(&mut self.text, self.lines, bytes)?;
        self.lines += 1;
        self.tar_split.write_all(&self.text)
    }

    fn file(&mut self, name: &str, size: u64, crc: u64) -> std::io::Result<()> {
        self.text.clear();
        tar_split::write_file(&mut self.text, self.lines, name, size, crc)?;
        self.lines += 1;
        self.tar_split.write_all(&self.text)
    }

    fn entry(&mut self, entry: &Entry) -> std::io::Result<()> {
        self.text.clear();
        if self.entries > 0 {
            self.text.push(b',');
        }
        serde_json::to_writer(&mut self.text, entry)?;
        self.entries += 1;
        self.toc.write_all(&self.text)
    }

    fn chunks(&mut self, mut first: Entry, chunks: &[Written]) -> std::io::Result<()> {
        let name = first.name.clone();
        if let [only] = chunks {
            first.offset = only.offset;
            return self.entry(&first);
        }
        let mut file_offset = 0;
        for (index, chunk) in chunks.iter().enumerate() {
            let mut entry = match index {
                0 => first.clone(),
                _ => Entry::new(EntryType::Chunk, &*name),
            };
            entry.offset = chunk.offset;
            entry.chunk_size = chunk.size;
            entry.chunk_offset = file_offset;
            entry.chunk_digest = chunk.digest;
            entry.chunk_type = if chunk.zeros { ChunkType::Zeros } else { ChunkType::Data };
            file_offset += chunk.size;
            self.entry(&entry)?;
        }
        Ok(())
    }

    fn too_large(&self) -> Option<String> {
        if self.entries > Limits::ENTRIES {
            Some(format!("more than {} entries", Limits::ENTRIES))
        } else if self.toc.raw_length + 200 > Limits::TOC_BYTES {
            Some(format!("a table of contents of more than {} bytes", Limits::TOC_BYTES))
        } else if self.tar_split.raw_length > Limits::TAR_SPLIT_BYTES {
            Some(format!("a tar-split of more than {} bytes", Limits::TAR_SPLIT_BYTES))
        } else {
            None
        }
    }

    fn finish(mut self) -> std::io::Result<(Compressed, Compressed)> {
        let tar_split = self.tar_split.finish()?;
        write!(self.toc, r#"],"tarSplitDigest":"{}"}}"#, Digest::of(&tar_split.bytes))?;
        Ok((self.toc.finish()?, tar_split))
    }
}
