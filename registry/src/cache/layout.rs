//! How a blob is cut into pieces, and the sha256 of each.
//!
//! Where the list of a blob's pieces comes from:
//! - the annotation `io.anyplace.pieces` of the blob's descriptor, `<bytes of a piece>:<base64 of the digests>`, which
//!   the manifest's digest covers;
//! - the blob's own digest, if it is a sha256 and the blob is so small that it is one piece;
//! - a fetch of the whole blob, which was verified against the blob's digest.

use std::ops::Range;
use std::sync::Arc;

use anyplace_images::{Algorithm, Digest};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest as _, Sha256};

/// The descriptor's annotation.
pub(crate) const ANNOTATION: &str = "io.anyplace.pieces";
/// Smallest and largest piece: below, requests cost more than bytes; above, a range costs too much that nobody asked
/// for.
pub(crate) const PIECE_BYTES: Range<u64> = (1 << 20)..(8 << 20) + 1;
/// Most pieces of a blob: 1 TiB in pieces of 4 MiB. The list takes 8 MiB then.
const PIECES_MAX: u64 = 1 << 18;
const HASH_BYTES: usize = 32;
const MAGIC: &[u8; 4] = b"apl1";

/// The sha256 of a piece.
pub(crate) type Hash = [u8; HASH_BYTES];

pub(crate) fn hash(bytes: &[u8]) -> Hash {
    Sha256::digest(bytes).into()
}

/// A blob's pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Size of the blob.
    pub(crate) size: u64,
    /// Size of a piece; the last may be smaller.
    pub(crate) piece_bytes: u64,
    /// One for each piece.
    pub(crate) hashes: Arc<[Hash]>,
    /// Whether the whole blob was seen, so that its own digest covers the list; else a manifest says so.
    pub(crate) proven: bool,
}

/// Number of pieces of a blob, if it may be cut like that.
pub(crate) fn count(size: u64, piece_bytes: u64) -> Result<u32, String> {
    if !PIECE_BYTES.contains(&piece_bytes) {
        return Err(format!("pieces of {piece_bytes} bytes; expected 1 to 8 MiB"));
    }
    let count = size.div_ceil(piece_bytes);
    if count > PIECES_MAX {
        return Err(format!("{count} pieces; expected {PIECES_MAX} at most"));
    }
    u32::try_from(count).map_err(|e| e.to_string())
}

impl Layout {
    /// What a descriptor's annotation says of a blob of `size` bytes.
    pub(crate) fn from_annotation(size: u64, text: &str) -> Result<Layout, String> {
        let (piece_bytes, list) = text.split_once(':').ok_or("no `:` after the size of a piece")?;
        let piece_bytes = piece_bytes.parse().map_err(|e| format!("size of a piece `{piece_bytes}`: {e}"))?;
        let list = BASE64_STANDARD.decode(list).map_err(|e| format!("the digests are no base64: {e}"))?;
        Layout::new(size, piece_bytes, &list, false)
    }

    /// The layout of a blob that is one piece, whose digest is therefore that of the blob. The size is yet a claim.
    pub(crate) fn single(size: u64, digest: &Digest) -> Option<Layout> {
        if digest.kind() != Algorithm::Sha256
            || !PIECE_BYTES.contains(&size.max(PIECE_BYTES.start))
            || size == 0
        {
            return None;
        }
        let hash = hex::decode(digest.hex()).ok()?;
        Layout::new(size, size.max(PIECE_BYTES.start), &hash, false).ok()
    }

    fn new(size: u64, piece_bytes: u64, list: &[u8], proven: bool) -> Result<Layout, String> {
        let count = count(size, piece_bytes)? as usize;
        let (hashes, rest) = list.as_chunks::<HASH_BYTES>();
        if hashes.len() != count || !rest.is_empty() || count == 0 {
            return Err(format!("{} bytes of digests for {count} pieces", list.len()));
        }
        Ok(Layout { size, piece_bytes, hashes: hashes.into(), proven })
    }

    pub(crate) fn proven(size: u64, piece_bytes: u64, hashes: Vec<Hash>) -> Result<Layout, String> {
        Layout::new(size, piece_bytes, hashes.as_flattened(), true)
    }

    pub(crate) fn count(&self) -> u32 {
        // No more than PIECES_MAX.
        u32::try_from(self.hashes.len()).unwrap_or(u32::MAX)
    }

    /// Where a piece lies in the blob.
    pub(crate) fn range(&self, index: u32) -> Range<u64> {
        let start = (u64::from(index) * self.piece_bytes).min(self.size);
        start..(start + self.piece_bytes).min(self.size)
    }

    /// Bytes of a piece.
    pub(crate) fn len(&self, index: u32) -> usize {
        let range = self.range(index);
        // At most 8 MiB.
        usize::try_from(range.end - range.start).unwrap_or(usize::MAX)
    }

    /// The piece with this byte of the blob.
    pub(crate) fn index_of(&self, position: u64) -> u32 {
        u32::try_from(position / self.piece_bytes).unwrap_or(u32::MAX)
    }

    /// Whether these are the bytes of the piece.
    pub(crate) fn is_right(&self, index: u32, bytes: &[u8]) -> bool {
        bytes.len() == self.len(index) && self.hashes.get(index as usize).is_some_and(|h| *h == hash(bytes))
    }

    /// Names the sizes and the list: equal for equal ones only.
    pub(crate) fn fingerprint(&self) -> Hash {
        let mut hasher = Sha256::new();
        hasher.update(self.size.to_le_bytes());
        hasher.update(self.piece_bytes.to_le_bytes());
        hasher.update(self.hashes.as_flattened());
        hasher.finalize().into()
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(MAGIC.len() + 17 + self.hashes.len() * HASH_BYTES);
        out.extend_from_slice(MAGIC);
        out.push(u8::from(self.proven));
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(&self.piece_bytes.to_le_bytes());
        out.extend_from_slice(self.hashes.as_flattened());
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Layout> {
        let rest = bytes.strip_prefix(MAGIC)?;
        let (proven, rest) = rest.split_first()?;
        let (size, rest) = rest.split_first_chunk()?;
        let (piece_bytes, list) = rest.split_first_chunk()?;
        Layout::new(u64::from_le_bytes(*size), u64::from_le_bytes(*piece_bytes), list, *proven == 1).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_are_taken_only_where_they_fit() {
        let list = |count: usize| BASE64_STANDARD.encode(vec![7; count * HASH_BYTES]);
        let mib = 1 << 20;
        let layout = Layout::from_annotation(9 * mib, &format!("4194304:{}", list(3))).unwrap();
        assert_eq!((layout.count(), layout.len(0), layout.len(2)), (3, 4 << 20, 1 << 20));
        assert_eq!((layout.range(1), layout.index_of(9 * mib - 1)), (4 * mib..8 * mib, 2));
        assert_eq!(Layout::decode(&layout.encode()), Some(layout));
        for (size, text) in [
            (9 * mib, format!("4194304:{}", list(2))),
            (9 * mib, format!("4194304:{}", list(4))),
            (0, "4194304:".to_owned()),
            (9 * mib, format!("0:{}", list(3))),
            (9 * mib, format!("1:{}", list(3))),
            (9 * mib, format!("9000000:{}", list(2))),
            (u64::MAX, format!("4194304:{}", list(3))),
            (9 * mib, "4194304:*".to_owned()),
            (9 * mib, list(3)),
            (9 * mib, format!("4194304:{}", &list(3)[1..])),
        ] {
            assert!(Layout::from_annotation(size, &text).is_err(), "{size} {text}");
        }
    }

    #[test]
    fn a_small_blob_is_its_only_piece() {
        let layout = Layout::single(3, &Digest::of(b"abc")).unwrap();
        assert!(layout.is_right(0, b"abc") && !layout.is_right(0, b"abd") && !layout.is_right(1, b"abc"));
        assert_eq!(layout.range(0), 0..3);
        assert!(Layout::single(9 << 20, &Digest::of(b"abc")).is_none());
        assert!(Layout::single(0, &Digest::of(b"")).is_none());
        assert!(Layout::single(3, &Algorithm::Sha512.digest(b"abc")).is_none());
        for cut in 0..layout.encode().len() {
            assert_eq!(Layout::decode(&layout.encode()[..cut]), None);
        }
    }
}
