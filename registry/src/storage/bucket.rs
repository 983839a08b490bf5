//! Content in a bucket, where an upload can't be renamed to its digest without a copy of all its bytes.
//!
//! So `blobs/<algorithm>/<2 digits>/<digest>` begins with 17 bytes: `anyblob1`, a kind, and the content's size (u64 LE).
//! Kind 0: the content follows. Kind 1: JSON follows, a list of [`Segment`]s, the objects below `data/` that are the
//! content one after the other. They are never changed, and deleted only by a sweep that has seen that no content
//! has them.

use std::ops::Range;

use anyplace_images::Digest;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use object_store::path::Path;
use object_store::{
    Attributes, Error as StoreError, GetOptions, GetRange, GetResult, GetResultPayload, ObjectMeta,
    ObjectStoreExt as _,
};
use serde::{Deserialize, Serialize};

use super::{Error, Result, Storage, keys};

const MAGIC: &[u8; 8] = b"anyblob1";
const HEADER_BYTES: u64 = 17;
const INLINE: u8 = 0;
const SEGMENTS: u8 = 1;
/// Read at once, in the hope that it is all: manifests and most lists of segments are shorter.
const FIRST_READ_BYTES: u64 = 64 << 10;
/// A list of segments is never longer: uploads keep to it (`objects_max` in `uploads/remote.rs`).
pub(crate) const LIST_MAX_BYTES: u64 = 8 << 20;

/// A piece of content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Segment {
    /// Its key.
    pub(crate) key: String,
    /// Bytes.
    pub(crate) len: u64,
}

/// What `blobs/...` says of content.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) size: u64,
    pub(super) body: HeadBody,
    meta: ObjectMeta,
}

#[derive(Clone, Debug)]
pub(super) enum HeadBody {
    /// The content's first bytes; the rest is in the same object.
    Inline(Bytes),
    Segments(Vec<Segment>),
}

/// The object of content that is in it.
pub(super) fn inline(content: &[u8]) -> Bytes {
    object(INLINE, content.len() as u64, content)
}

/// The object of content that is elsewhere.
pub(super) fn pointer(segments: &[Segment]) -> std::result::Result<Bytes, serde_json::Error> {
    let size = segments.iter().map(|segment| segment.len).sum();
    Ok(object(SEGMENTS, size, &serde_json::to_vec(segments)?))
}

fn object(kind: u8, size: u64, rest: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(HEADER_BYTES as usize + rest.len());
    bytes.put_slice(MAGIC);
    bytes.put_u8(kind);
    bytes.put_u64_le(size);
    bytes.put_slice(rest);
    bytes.freeze()
}

impl Storage {
    pub(super) async fn head_content(&self, digest: &Digest) -> Result<Option<Head>> {
        let key = keys::content(digest);
        let options =
            GetOptions { range: Some(GetRange::Bounded(0..FIRST_READ_BYTES)), ..GetOptions::default() };
        let failed = |e| self.failed("read", &key, e);
        let object = match self.inner.objects.get_opts(&key, options).await {
            Ok(object) => object,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        let meta = object.meta.clone();
        let mut bytes = object.bytes().await.map_err(failed)?;
        let header = || {
            let (magic, kind) = (bytes.get(..8)?, *bytes.get(8)?);
            let size = u64::from_le_bytes(bytes.get(9..17)?.try_into().ok()?);
            (magic == MAGIC).then_some((kind, size))
        };
        let (kind, size) = header().ok_or_else(|| Error::damaged(&key, "it has no header"))?;
        let mut rest = bytes.split_off(HEADER_BYTES as usize);
        let body = match kind {
            INLINE if meta.size == HEADER_BYTES + size => HeadBody::Inline(rest),
            SEGMENTS => {
                if meta.size > FIRST_READ_BYTES {
                    if meta.size > LIST_MAX_BYTES {
                        return Err(Error::damaged(
                            &key,
                            format!("its list of segments has {} bytes", meta.size),
                        ));
                    }
                    let list = self.inner.objects.get_range(&key, HEADER_BYTES..meta.size).await;
                    rest = list.map_err(failed)?;
                }
                let segments: Vec<Segment> =
                    serde_json::from_slice(&rest).map_err(|e| Error::damaged(&key, e))?;
                if segments.iter().map(|segment| segment.len).sum::<u64>() != size {
                    return Err(Error::damaged(&key, "its segments don't add up to its size"));
                }
                HeadBody::Segments(segments)
            }
            _ => {
                let found = format!("kind {kind}, {size} bytes of content in {} of object", meta.size);
                return Err(Error::damaged(&key, found));
            }
        };
        Ok(Some(Head { size, body, meta }))
    }

    /// Opens content as one object, whatever it is made of.
    pub(super) fn open_head(&self, digest: &Digest, head: Head, range: Option<Range<u64>>) -> GetResult {
        let range = range.map_or(0..head.size, |range| range.start.min(head.size)..range.end.min(head.size));
        let pieces = match head.body {
            HeadBody::Inline(first) if range.end <= first.len() as u64 => {
                let part = first.slice(range.start as usize..range.end as usize);
                let stream = stream::iter([Ok(part)]).boxed();
                return result(head.meta, head.size, range, stream);
            }
            HeadBody::Inline(_) => {
                vec![(keys::content(digest), range.start + HEADER_BYTES..range.end + HEADER_BYTES)]
            }
            HeadBody::Segments(segments) => pieces(segments, range.clone()),
        };
        let objects = self.inner.objects.clone();
        let stream = stream::iter(pieces).then(move |(key, range)| {
            let objects = objects.clone();
            async move {
                let options = GetOptions { range: Some(range.into()), ..GetOptions::default() };
                Ok::<_, StoreError>(objects.get_opts(&key, options).await?.into_stream())
            }
        });
        result(head.meta, head.size, range, stream.try_flatten().boxed())
    }

    /// Makes stored segments the content of `digest`.
    pub(crate) async fn put_segments(&self, digest: &Digest, segments: &[Segment]) -> Result<()> {
        let key = keys::content(digest);
        let pointer = pointer(segments).map_err(|e| Error::damaged(&key, e))?;
        self.put(&key, pointer).await
    }
}

/// The parts of the segments that are in the range.
fn pieces(segments: Vec<Segment>, range: Range<u64>) -> Vec<(Path, Range<u64>)> {
    let mut at = 0;
    let mut pieces = Vec::new();
    for segment in segments {
        let (start, end) = (range.start.max(at), range.end.min(at + segment.len));
        if start < end {
            pieces.push((Path::from(segment.key), start - at..end - at));
        }
        at += segment.len;
    }
    pieces
}

fn result(
    meta: ObjectMeta,
    size: u64,
    range: Range<u64>,
    stream: stream::BoxStream<'static, object_store::Result<Bytes>>,
) -> GetResult {
    GetResult {
        payload: GetResultPayload::Stream(stream),
        meta: ObjectMeta { size, ..meta },
        range,
        attributes: Attributes::default(),
        extensions: Default::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_out_of_segments() {
        let segment = |key: &str, len| Segment { key: key.to_owned(), len };
        let segments = vec![segment("a", 10), segment("b", 0), segment("c", 5)];
        let cut = |range: Range<u64>| {
            pieces(segments.clone(), range)
                .into_iter()
                .map(|(key, range)| (key.to_string(), range))
                .collect::<Vec<_>>()
        };
        assert_eq!(cut(0..15), [("a".into(), 0..10), ("c".into(), 0..5)]);
        assert_eq!(cut(9..11), [("a".into(), 9..10), ("c".into(), 0..1)]);
        assert_eq!(cut(10..12), [("c".into(), 0..2)]);
        assert_eq!(cut(3..4), [("a".into(), 3..4)]);
    }
}
