//! Carries a stream from one thread, or a download, to a reader in another, with a bound on what waits in between.

use std::io::{self, Read, Write};

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

/// Bytes of a chunk: so large that handing it over doesn't show.
const CHUNK_BYTES: usize = 256 << 10;
/// Chunks that wait: with what both ends hold, about 1 MiB.
const WAITING_MAX: usize = 4;

/// The writing end. Its end must be told by [`PipeWriter::finish`]; the reader takes anything else for a break.
pub(super) struct PipeWriter {
    to: mpsc::Sender<Bytes>,
    buffer: BytesMut,
}

/// The reading end; it blocks, so it belongs on a thread where that is allowed.
pub(super) struct PipeReader {
    from: mpsc::Receiver<Bytes>,
    current: Bytes,
    ended: bool,
}

pub(super) fn pipe() -> (PipeWriter, PipeReader) {
    let (to, from) = mpsc::channel(WAITING_MAX);
    let writer = PipeWriter { to, buffer: BytesMut::with_capacity(CHUNK_BYTES) };
    (writer, PipeReader { from, current: Bytes::new(), ended: false })
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the reader has gone")
}

impl PipeWriter {
    fn hand_over(&mut self) -> io::Result<()> {
        let chunk = std::mem::replace(&mut self.buffer, BytesMut::with_capacity(CHUNK_BYTES));
        self.to.blocking_send(chunk.freeze()).map_err(|_| gone())
    }

    /// Tells the reader that this was all.
    pub(super) fn finish(mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.hand_over()?;
        }
        self.to.blocking_send(Bytes::new()).map_err(|_| gone())
    }

    /// A chunk of a download.
    pub(super) async fn send(&self, chunk: Bytes) -> io::Result<()> {
        if chunk.is_empty() {
            return Ok(());
        }
        self.to.send(chunk).await.map_err(|_| gone())
    }

    /// The same as [`PipeWriter::finish`], for a download.
    pub(super) async fn end(self) -> io::Result<()> {
        self.to.send(Bytes::new()).await.map_err(|_| gone())
    }
}

impl Write for PipeWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == CHUNK_BYTES {
            self.hand_over()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for PipeReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            if self.ended {
                return Ok(0);
            }
            match self.from.blocking_recv() {
                Some(chunk) => {
                    self.ended = chunk.is_empty();
                    self.current = chunk;
                }
                None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the source broke off")),
            }
        }
        let taken = self.current.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&self.current.split_to(taken));
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_and_a_break_shows() {
        let sent: Vec<u8> = (0..3_000_017_u32).map(|n| (n % 251) as u8).collect();
        let (mut writer, mut reader) = pipe();
        let expected = sent.clone();
        let thread = std::thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.finish().unwrap();
        });
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        thread.join().unwrap();
        assert!(read == expected);

        let (mut writer, mut reader) = pipe();
        writer.write_all(b"begun").unwrap();
        drop(writer);
        assert_eq!(reader.read_to_end(&mut read).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
