//! What each range of the blob before its tables decodes to, so that two blobs can be compared without reading them.
//!
//! Chunks are in the table of contents; what lies between them are the frames of the tar-split's segments. [`pack`](crate::pack)
//! makes equal bytes of equal content, so a range of one blob can stand for the same range of another. That is a guess
//! about who packed them: verify the whole blob.

use std::ops::Range;

use sha2::{Digest as _, Sha256};

use super::{TarSplit, WHAT, line::LineKind, wrong};
use crate::{Digest, Error, Result, Toc};

/// A range of the blob, and what it decodes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where it lies in the blob.
    pub range: Range<u64>,
    /// What kind of frames it has.
    pub kind: SpanKind,
    /// Digest of what it decodes to; between chunks, of the segments with their lengths.
    pub digest: Digest,
}

/// What a span's frames are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SpanKind {
    /// One chunk of a file.
    Chunk,
    /// A chunk of zeros, which is compressed otherwise.
    Zeros,
    /// Headers and padding between chunks, or the archive's end.
    Between,
}

impl TarSplit {
    /// Calls `each` with the spans, in order; together they are all before `data_end`, where the tables begin. The table of
    /// contents is that of the same layer.
    ///
    /// # Errors
    ///
    /// The two don't agree about the files, as far as that is looked at: [`TarSplit::check`] looks at all.
    pub fn spans(&self, toc: &Toc, data_end: u64, mut each: impl FnMut(Span)) -> Result<()> {
        let mut files = toc.files().filter(|file| file.entry.size > 0);
        let (mut at, mut between) = (0, Sha256::new());
        self.each(|line| {
            if line.kind == LineKind::Segment {
                between.update((line.payload.len() as u64).to_le_bytes());
                between.update(&line.payload);
                return Ok(());
            }
            if line.size == 0 {
                return Ok(());
            }
            let file = files.next().filter(|file| file.entry.size == line.size);
            let file = file.ok_or_else(|| {
                Error::invalid(WHAT, format!("{:?} is no such file of the table", line.name_lossy()))
            })?;
            for chunk in file.chunks() {
                if chunk.range.start > at {
                    each(end(&mut between, at..chunk.range.start));
                }
                at = chunk.range.end;
                let kind = if chunk.zeros { SpanKind::Zeros } else { SpanKind::Chunk };
                each(Span { range: chunk.range, kind, digest: chunk.digest });
            }
            Ok(())
        })?;
        if let Some(file) = files.next() {
            return wrong(format!("{:?} of the table is missing", file.entry.name));
        }
        if data_end > at {
            each(end(&mut between, at..data_end));
        }
        Ok(())
    }
}

/// The span of the segments that were hashed.
fn end(between: &mut Sha256, range: Range<u64>) -> Span {
    Span { range, kind: SpanKind::Between, digest: std::mem::take(between).into() }
}
