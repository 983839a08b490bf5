//! Decodes one chunk: from its frame's bytes to exactly its size, verified by its digest.

use std::io::{BufRead, Read, Write};

use sha2::{Digest as _, Sha256};

use crate::{Chunk, Digest, Error, Result};

/// Bytes that pass at once when a chunk is streamed.
const STREAM_BUFFER: usize = 128 << 10;
/// Largest window that is decoded, as a power of two: what the zstd tool accepts by default.
const WINDOW_LOG_MAX: u32 = 27;

/// Decodes chunks one after the other, with one zstd context. Keep one in each thread.
pub struct ChunkDecoder {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl ChunkDecoder {
    /// A new decoder.
    pub fn new() -> Result<Self> {
        let zstd = zstd::bulk::Decompressor::new().map_err(Error::io("creating a zstd context"))?;
        Ok(Self { zstd })
    }

    /// Decodes the bytes of the blob at `chunk.range` into `out` (replacing what is there). For chunks that fit in memory:
    /// it takes `chunk.size` bytes, which the caller bounds.
    pub fn decode(&mut self, frame: &[u8], chunk: &Chunk, out: &mut Vec<u8>) -> Result<()> {
        let size = usize::try_from(chunk.size).map_err(|_| wrong_size(chunk, "does not fit in memory"))?;
        out.clear();
        out.reserve_exact(size);
        // The buffer's capacity can be more than asked for, and zstd would fill it.
        let written = {
            out.resize(size, 0);
            self.zstd.decompress_to_buffer(frame, &mut out[..])
        };
        match written {
            Ok(written) if written == size => {}
            Ok(written) => return Err(wrong_size(chunk, &format!("decodes to {written} bytes"))),
            Err(source) => {
                return Err(Error::Io { what: "decoding a chunk (damaged, or more than its size)", source });
            }
        }
        verify(chunk, Digest::of(out))
    }

    /// Decodes a chunk of any size as a stream. What was written before an error must be thrown away.
    pub fn stream(&mut self, frame: impl BufRead, chunk: &Chunk, mut out: impl Write) -> Result<()> {
        let mut decoder =
            zstd::stream::read::Decoder::with_buffer(frame).map_err(Error::io("creating a zstd context"))?;
        decoder.window_log_max(WINDOW_LOG_MAX).map_err(Error::io("limiting zstd's memory"))?;
        let mut buffer = vec![0; STREAM_BUFFER];
        let (mut hasher, mut written) = (Sha256::new(), 0);
        loop {
            let read = decoder.read(&mut buffer).map_err(Error::io("decoding a chunk"))?;
            if read == 0 {
                break;
            }
            written += read as u64;
            if written > chunk.size {
                return Err(wrong_size(chunk, "decodes to more"));
            }
            hasher.update(&buffer[..read]);
            out.write_all(&buffer[..read]).map_err(Error::io("writing a chunk"))?;
        }
        if written != chunk.size {
            return Err(wrong_size(chunk, &format!("decodes to {written} bytes")));
        }
        verify(chunk, hasher.into())
    }
}

fn wrong_size(chunk: &Chunk, why: &str) -> Error {
    Error::invalid("chunk", format!("at {:?} of the blob, of {} bytes, {why}", chunk.range, chunk.size))
}

fn verify(chunk: &Chunk, found: Digest) -> Result<()> {
    if found == chunk.digest {
        return Ok(());
    }
    Err(Error::Digest {
        what: format!("the chunk at {:?} of the blob", chunk.range),
        found,
        expected: chunk.digest,
    })
}

/// The whole archive of a blob, as any zstd decoder sees it: of a zstd:chunked layer or of an ordinary one. Nothing is
/// verified: compare the digest of the output with the layer's diff id.
pub fn read_plain(blob: impl BufRead) -> Result<impl Read> {
    let mut decoder =
        zstd::stream::read::Decoder::with_buffer(blob).map_err(Error::io("creating a zstd context"))?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(Error::io("limiting zstd's memory"))?;
    Ok(decoder)
}
