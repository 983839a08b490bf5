//! From an asynchronous download to a blocking reader, with a bound on what waits between them.
//!
//! The end of the download is a message of its own: a channel that closes without it means that the download failed
//! or was given up, and must never look like the end of the content.

use std::io::{self, Read};

use bytes::{Buf as _, Bytes};
use tokio::sync::mpsc;

/// Chunks that may wait: with the 16 to 64 KiB that arrive at a time, 1 to 4 MiB.
const WAITING_MAX: usize = 64;

pub(super) enum Message {
    Data(Bytes),
    /// All arrived, and its digest is right.
    Complete,
}

/// Reads what arrives in the channel.
pub(super) struct ChannelReader {
    receiver: mpsc::Receiver<Message>,
    current: Bytes,
    complete: bool,
}

pub(super) fn channel() -> (mpsc::Sender<Message>, ChannelReader) {
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    (sender, ChannelReader { receiver, current: Bytes::new(), complete: false })
}

impl Read for ChannelReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.complete {
            match self.receiver.blocking_recv() {
                Some(Message::Data(bytes)) => self.current = bytes,
                Some(Message::Complete) => self.complete = true,
                None => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the download was given up"));
                }
            }
        }
        let len = buf.len().min(self.current.len());
        self.current.copy_to_slice(&mut buf[..len]);
        Ok(len)
    }
}
