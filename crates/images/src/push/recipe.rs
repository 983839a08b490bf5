//! Which ranges of a new layer lie in blobs that a repository has, and the parts that an upload is cut into by that.

use std::collections::HashMap;
use std::ops::Range;

use zstd_chunked::{Span, SpanKind};

use crate::digest::Digest;

/// Shorter ranges are sent: a step costs some 30 bytes of the request, and the registry a read.
const COPY_MIN_BYTES: u64 = 4 << 10;
/// Most bytes that one part copies: seconds of work on a slow store, so that no proxy in between gives the registry up.
const COPY_MAX_BYTES: u64 = 128 << 20;

/// A step of a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// So many bytes of the new blob are sent.
    Send(u64),
    /// So many are copied, from an offset of a blob, by its place in [`Recipe::blobs`].
    Copy {
        /// Which blob.
        blob: usize,
        /// Where in it.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// What spans decode to: digest, kind.
type Content = (zstd_chunked::Digest, SpanKind);

/// What is looked for, and where it was found.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// What new layers are made of, with its compressed size.
    wanted: HashMap<Content, u64>,
    /// Blobs that have some of it.
    blobs: Vec<Digest>,
    /// Where each content was found first.
    first: HashMap<Content, (usize, u64)>,
    /// What was found at a place, so that a copy can go on there.
    at: HashMap<(usize, u64), Content>,
    /// Compressed bytes of what is wanted, and of that what was found.
    bytes: (u64, u64),
}

impl Known {
    /// Looks for what a new layer is made of.
    pub(crate) fn want(&mut self, span: &Span) {
        let len = span.range.end - span.range.start;
        if self.wanted.insert((span.digest, span.kind), len).is_none() {
            self.bytes.0 += len;
        }
    }

    /// Whether nearly all that is wanted was found.
    pub(crate) fn is_enough(&self) -> bool {
        self.bytes.1 >= self.bytes.0 - self.bytes.0 / 50
    }

    /// Takes up what a blob has that the repository has. One in which some content has another size than in the new layers
    /// was packed otherwise, so that equal sizes would be chance: nothing of it is used.
    pub(crate) fn add(&mut self, blob: &Digest, found: Found) {
        if found.foreign || found.spans.is_empty() {
            return;
        }
        let number = self.blobs.len();
        self.blobs.push(blob.clone());
        for (content, range) in found.spans {
            self.at.insert((number, range.start), content);
            self.first.entry(content).or_insert_with(|| {
                self.bytes.1 += range.end - range.start;
                (number, range.start)
            });
        }
    }

    /// What of a new layer can be copied.
    pub(crate) fn recipe(&self) -> RecipeBuilder<'_> {
        RecipeBuilder { known: self, copies: Vec::new() }
    }
}

/// What one blob has of what is wanted.
#[derive(Debug, Default)]
pub(crate) struct Found {
    spans: Vec<(Content, Range<u64>)>,
    foreign: bool,
}

impl Found {
    /// Looks at one of the blob's spans.
    pub(crate) fn look(&mut self, known: &Known, span: Span) {
        let content = (span.digest, span.kind);
        match known.wanted.get(&content) {
            None => {}
            Some(len) if *len == span.range.end - span.range.start => self.spans.push((content, span.range)),
            Some(_) => self.foreign = true,
        }
    }
}

/// Makes a recipe of a new layer's spans.
pub(crate) struct RecipeBuilder<'a> {
    known: &'a Known,
    copies: Vec<Copied>,
}

impl RecipeBuilder<'_> {
    /// The next span.
    pub(crate) fn add(&mut self, span: &Span) {
        let content = (span.digest, span.kind);
        let len = span.range.end - span.range.start;
        // Where the last copy can go on it does: files that are there many times would tear it apart.
        if let Some(last) = self.copies.last_mut().filter(|last| last.end() == span.range.start)
            && self.known.at.get(&(last.blob, last.offset + last.len)) == Some(&content)
        {
            last.len += len;
        } else if let Some((blob, offset)) = self.known.first.get(&content) {
            self.copies.push(Copied { at: span.range.start, len, blob: *blob, offset: *offset });
        }
    }

    /// None where it isn't worth a request.
    pub(crate) fn finish(mut self) -> Option<Recipe> {
        self.copies.retain(|copy| copy.len >= COPY_MIN_BYTES);
        let blobs = self.known.blobs.clone();
        (!self.copies.is_empty()).then_some(Recipe { blobs, copies: self.copies })
    }
}

/// What of a new layer is copied from where; the rest is sent.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    blobs: Vec<Digest>,
    /// By their place in the new blob.
    copies: Vec<Copied>,
}

#[derive(Clone, Copy, Debug)]
struct Copied {
    /// Where in the new blob.
    at: u64,
    len: u64,
    blob: usize,
    offset: u64,
}

impl Copied {
    fn end(&self) -> u64 {
        self.at + self.len
    }

    /// What of it lies in a range of the new blob.
    fn within(&self, range: &Range<u64>) -> Option<Copied> {
        let (at, end) = (self.at.max(range.start), self.end().min(range.end));
        (at < end).then(|| Copied {
            at,
            len: end - at,
            blob: self.blob,
            offset: self.offset + (at - self.at),
        })
    }
}

impl Recipe {
    /// The blobs that are copied from.
    pub(crate) fn blobs(&self) -> &[Digest] {
        &self.blobs
    }

    /// The copies that lie in a range of the new blob, cut to it.
    fn within(&self, range: Range<u64>) -> impl Iterator<Item = Copied> {
        let first = self.copies.partition_point(|copy| copy.end() <= range.start);
        self.copies[first..].iter().map_while(move |copy| copy.within(&range))
    }

    /// Bytes of a range of the new blob that are copied.
    pub(crate) fn copied_bytes(&self, range: Range<u64>) -> u64 {
        self.within(range).map(|copy| copy.len).sum()
    }

    /// The next part, from an offset of the new blob: at most so many bytes and steps. Where it copies nothing, it is one
    /// step that sends.
    pub(crate) fn part(&self, range: Range<u64>, steps_max: usize) -> Vec<Step> {
        let (mut steps, mut at, mut copied) = (Vec::new(), range.start, 0);
        for Copied { at: start, len, blob, offset } in self.within(range.clone()) {
            if steps.len() + 2 > steps_max || copied >= COPY_MAX_BYTES {
                return steps;
            }
            if start > at {
                steps.push(Step::Send(start - at));
            }
            let len = len.min(COPY_MAX_BYTES - copied);
            steps.push(Step::Copy { blob, offset, len });
            (at, copied) = (start + len, copied + len);
        }
        if copied < COPY_MAX_BYTES && steps.len() < steps_max && at < range.end {
            steps.push(Step::Send(range.end - at));
        }
        steps
    }
}

impl Step {
    /// Bytes that it adds.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Step::Send(len) | Step::Copy { len, .. } => *len,
        }
    }
}

#[cfg(test)]
mod tests;
