//! The annotation [`PIECES_ANNOTATION`] of a layer's descriptor: the sha256 of each piece of the blob.
//!
//! A blob's digest covers the whole, so a cache that fetched a part can't tell whether it is right. These hashes are
//! covered by the manifest's digest instead, and make each piece verifiable alone. The value is
//! `<bytes of a piece>:<base64 of the concatenated hashes>`; the last piece is the rest.

use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::str::FromStr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// Name of the annotation.
pub const PIECES_ANNOTATION: &str = "io.anyplace.pieces";
/// Bytes of a piece: enough that a request for one costs little beside its bytes.
const PIECE_BYTES: u64 = 4 << 20;
/// Bytes of a piece of a blob over [`LARGE_BYTES`], which would fill a manifest otherwise.
const PIECE_BYTES_LARGE: u64 = 8 << 20;
/// From here on pieces are larger.
const LARGE_BYTES: u64 = 8 << 30;
const HASH_BYTES: usize = 32;

/// The hashes of a blob's pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pieces {
    piece_bytes: u64,
    hashes: Vec<[u8; HASH_BYTES]>,
}

impl Pieces {
    /// The size of the pieces of a blob of `blob_size` bytes.
    pub fn piece_bytes_for(blob_size: u64) -> u64 {
        if blob_size > LARGE_BYTES { PIECE_BYTES_LARGE } else { PIECE_BYTES }
    }

    /// Hashes all of `blob`, which has `blob_size` bytes.
    pub fn read(blob: &mut impl Read, blob_size: u64) -> std::io::Result<Pieces> {
        let mut hasher = PieceHasher::new(Pieces::piece_bytes_for(blob_size));
        let mut buffer = vec![0; 256 << 10];
        loop {
            match blob.read(&mut buffer)? {
                0 => return Ok(hasher.finish()),
                read => hasher.update(&buffer[..read]),
            }
        }
    }

    /// Bytes of each piece but the last.
    pub fn piece_bytes(&self) -> u64 {
        self.piece_bytes
    }

    /// How many pieces there are.
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether the blob is empty.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Whether these can be the pieces of a blob of this size.
    pub fn fits(&self, blob_size: u64) -> bool {
        self.hashes.len() as u64 == blob_size.div_ceil(self.piece_bytes)
    }

    /// Where piece `index` of a blob of `blob_size` bytes lies.
    pub fn range(&self, index: usize, blob_size: u64) -> Range<u64> {
        let start = (index as u64).saturating_mul(self.piece_bytes).min(blob_size);
        start..start.saturating_add(self.piece_bytes).min(blob_size)
    }

    /// Whether these bytes are all of piece `index`.
    pub fn verify(&self, index: usize, bytes: &[u8]) -> bool {
        self.hashes.get(index).is_some_and(|hash| Sha256::digest(bytes).as_slice() == hash)
    }
}

impl fmt::Display for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.piece_bytes, BASE64_STANDARD.encode(self.hashes.concat()))
    }
}

impl FromStr for Pieces {
    type Err = Error;

    fn from_str(text: &str) -> Result<Pieces, Error> {
        let invalid = |reason: &str| Error::InvalidManifest {
            what: format!("the annotation {PIECES_ANNOTATION}"),
            reason: reason.to_owned(),
        };
        let (bytes, hashes) = text.split_once(':').ok_or_else(|| invalid("expected BYTES:BASE64"))?;
        let piece_bytes = bytes.parse().map_err(|_| invalid("the size of a piece is no number"))?;
        if piece_bytes == 0 {
            return Err(invalid("a piece has 0 bytes"));
        }
        let hashes = BASE64_STANDARD.decode(hashes).map_err(|_| invalid("the hashes are no base64"))?;
        let (hashes, rest) = hashes.as_chunks::<HASH_BYTES>();
        if !rest.is_empty() {
            return Err(invalid("the last hash is shorter than 32 bytes"));
        }
        Ok(Pieces { piece_bytes, hashes: hashes.to_vec() })
    }
}

/// Hashes pieces while a blob is written.
#[derive(Debug)]
pub(crate) struct PieceHasher {
    piece_bytes: u64,
    filled: u64,
    hasher: Sha256,
    hashes: Vec<[u8; HASH_BYTES]>,
}

impl PieceHasher {
    pub(crate) fn new(piece_bytes: u64) -> PieceHasher {
        PieceHasher { piece_bytes, filled: 0, hasher: Sha256::new(), hashes: Vec::new() }
    }

    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = usize::try_from(self.piece_bytes - self.filled).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            self.hasher.update(now);
            self.filled += now.len() as u64;
            if self.filled == self.piece_bytes {
                self.hashes.push(self.hasher.finalize_reset().into());
                self.filled = 0;
            }
            bytes = rest;
        }
    }

    pub(crate) fn finish(mut self) -> Pieces {
        if self.filled > 0 {
            self.hashes.push(self.hasher.finalize().into());
        }
        Pieces { piece_bytes: self.piece_bytes, hashes: self.hashes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_round_trip_and_verify() {
        let blob: Vec<u8> =
            (0..u32::try_from(PIECE_BYTES / 4).unwrap() * 2 + 5).flat_map(u32::to_le_bytes).collect();
        let size = blob.len() as u64;
        let pieces = Pieces::read(&mut blob.as_slice(), size).unwrap();
        assert_eq!((pieces.len(), pieces.fits(size), pieces.fits(size + PIECE_BYTES)), (3, true, false));
        assert_eq!(pieces.to_string().parse::<Pieces>().unwrap(), pieces);
        assert_eq!(pieces.range(2, size), 2 * PIECE_BYTES..size);
        for index in 0..3 {
            let range = pieces.range(index, size);
            let mut piece =
                blob[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].to_vec();
            assert!(pieces.verify(index, &piece));
            piece[7] ^= 1;
            assert!(!pieces.verify(index, &piece));
        }
        assert!(Pieces::read(&mut &b""[..], 0).unwrap().is_empty());
        assert_eq!(Pieces::piece_bytes_for(LARGE_BYTES + 1), 8 << 20);
        for bad in ["", "4", "0:", "x:", "4194304:AAAA", "4194304:*"] {
            assert!(bad.parse::<Pieces>().is_err(), "{bad}");
        }
    }
}
