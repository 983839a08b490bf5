//! A part of a blob as a request's body.

use std::io::{self, Seek as _, SeekFrom};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use reqwest::Body;
use tokio::io::AsyncReadExt as _;
use tokio_util::io::ReaderStream;

use super::Content;
use crate::client::BlobStream;
use crate::error::{Error, Result};
use crate::pack::BlobFile;
use crate::progress::{Item, SharedProgress};

/// Read size of uploads: large enough that system calls don't show.
const READ_BYTES: usize = 256 << 10;

/// Some bytes of a blob.
pub(super) struct Part<'a> {
    pub(super) content: Content<'a>,
    pub(super) skip: u64,
    pub(super) len: u64,
    pub(super) item: &'a Item,
    pub(super) progress: &'a SharedProgress,
    /// Counts what goes out.
    pub(super) sent: &'a Arc<AtomicU64>,
    /// Why the content couldn't be read: the HTTP client only knows that a body broke off.
    pub(super) failure: Arc<Mutex<Option<Error>>>,
}

impl Part<'_> {
    /// A new body, counted as it is read.
    pub(super) fn body(&self) -> Result<Body> {
        let (item, progress, sent) = (self.item.clone(), self.progress.clone(), self.sent.clone());
        let chunks = match self.content {
            Content::File(file) => file_part(file, self.skip, self.len, self.failure.clone())?.left_stream(),
            Content::Remote(remote) => {
                let failure = self.failure.clone();
                let (remote, range) = (remote.clone(), self.skip..self.skip + self.len);
                let open = async move {
                    remote.client.get_blob_range(&remote.reference, &remote.digest, range).await
                };
                stream::once(open)
                    .flat_map(relay)
                    .map(move |chunk| chunk.map_err(|e| keep(&failure, e)))
                    .right_stream()
            }
        };
        Ok(Body::wrap_stream(chunks.inspect(move |chunk| {
            if let Ok(chunk) = chunk {
                sent.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                progress.advanced(&item, chunk.len() as u64);
            }
        })))
    }

    /// A new body of a line and ranges of the content, which must be a file.
    pub(super) fn body_by(&self, line: Bytes, ranges: Vec<Range<u64>>) -> Body {
        let (item, progress, sent) = (self.item.clone(), self.progress.clone(), self.sent.clone());
        sent.fetch_add(line.len() as u64, Ordering::Relaxed);
        let (content, failure) = (self.content.file().cloned(), self.failure.clone());
        let sends = stream::iter(ranges).flat_map(move |range| {
            let file = content.as_ref().ok_or(Error::Cancelled);
            let opened =
                file.and_then(|file| file_part(file, range.start, range.end - range.start, failure.clone()));
            match opened {
                Ok(chunks) => chunks.left_stream(),
                Err(error) => stream::iter([Err(keep(&failure, error))]).right_stream(),
            }
        });
        let sends = sends.inspect(move |chunk| {
            if let Ok(chunk) = chunk {
                sent.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                progress.advanced(&item, chunk.len() as u64);
            }
        });
        Body::wrap_stream(stream::iter([Ok(line)]).chain(sends))
    }

    pub(super) fn take_failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn file_part(
    file: &BlobFile,
    skip: u64,
    len: u64,
    failure: Arc<Mutex<Option<Error>>>,
) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + use<>> {
    let path = file.path.clone();
    let mut file_at = std::fs::File::open(&path).map_err(Error::io("reading", &path))?;
    file_at.seek(SeekFrom::Start(file.offset + skip)).map_err(Error::io("reading", &path))?;
    let mut reader = tokio::fs::File::from_std(file_at);
    reader.set_max_buf_size(READ_BYTES);
    Ok(ReaderStream::with_capacity(reader.take(len), READ_BYTES)
        .map(move |chunk| chunk.map_err(|e| keep(&failure, Error::io("reading", &path)(e)))))
}

/// The chunks of a blob that another registry sends.
fn relay(opened: Result<BlobStream>) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
    let opened = match opened {
        Ok(blob) => Ok(Some(blob)),
        Err(error) => Err(error),
    };
    stream::unfold(opened, |state| async move {
        match state {
            Ok(Some(mut blob)) => match blob.chunk().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Ok(Some(blob)))),
                Ok(None) => None,
                Err(error) => Some((Err(error), Ok(None))),
            },
            Ok(None) => None,
            Err(error) => Some((Err(error), Ok(None))),
        }
    })
}

fn keep(failure: &Mutex<Option<Error>>, error: Error) -> io::Error {
    let text = error.to_string();
    *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    io::Error::other(text)
}
