//! The records that say how far an upload is: of the two that a state file has, the newer one that is whole counts.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use anyplace_images::{Algorithm, Hasher};
use sha2::{Digest as _, Sha256};

pub(super) const RECORD_BYTES: usize = 512;
const RECORD_MAGIC: &[u8; 8] = b"anyupl01";
const CHECKSUM_BYTES: usize = 16;

/// What a record says.
pub(super) struct Record {
    pub(super) revision: u64,
    pub(super) offset: u64,
    pub(super) hasher: Hasher,
    /// Empty in records of earlier versions.
    pub(super) repository: String,
}

pub(super) fn encode(record: &Record) -> io::Result<Vec<u8>> {
    let saved = record.hasher.save();
    let mut bytes = Vec::with_capacity(RECORD_BYTES);
    bytes.extend_from_slice(RECORD_MAGIC);
    bytes.extend_from_slice(&record.revision.to_le_bytes());
    bytes.extend_from_slice(&record.offset.to_le_bytes());
    bytes.push(match record.hasher.algorithm() {
        Algorithm::Sha256 => 0,
        Algorithm::Sha512 => 1,
    });
    bytes.extend_from_slice(&(saved.len() as u16).to_le_bytes());
    bytes.extend_from_slice(&saved);
    // At most 255 bytes, for which there is room after each of the algorithms.
    bytes.push(record.repository.len() as u8);
    bytes.extend_from_slice(record.repository.as_bytes());
    if bytes.len() > RECORD_BYTES - CHECKSUM_BYTES {
        return Err(io::Error::other("the hash's state and the repository don't fit a record"));
    }
    bytes.resize(RECORD_BYTES - CHECKSUM_BYTES, 0);
    let checksum = Sha256::digest(&bytes);
    bytes.extend_from_slice(&checksum[..CHECKSUM_BYTES]);
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Option<Record> {
    let (body, checksum) = bytes.split_at_checked(RECORD_BYTES - CHECKSUM_BYTES)?;
    if Sha256::digest(body)[..CHECKSUM_BYTES] != *checksum || !body.starts_with(RECORD_MAGIC) {
        return None;
    }
    let number = |at: usize| Some(u64::from_le_bytes(body.get(at..at + 8)?.try_into().ok()?));
    let algorithm = *Algorithm::ALL.get(usize::from(*body.get(24)?))?;
    let saved = usize::from(u16::from_le_bytes(body.get(25..27)?.try_into().ok()?));
    let hasher = Hasher::restore(algorithm, body.get(27..27 + saved)?)?;
    let named = usize::from(*body.get(27 + saved)?);
    let repository = std::str::from_utf8(body.get(28 + saved..28 + saved + named)?).ok()?.to_owned();
    Some(Record { revision: number(8)?, offset: number(16)?, hasher, repository })
}

/// The newer of the records that are whole.
pub(super) fn newest(state: &File) -> io::Result<Option<Record>> {
    let read = |slot: u64| {
        let mut bytes = vec![0; RECORD_BYTES];
        match state.read_exact_at(&mut bytes, slot * RECORD_BYTES as u64) {
            Ok(()) => Ok(decode(&bytes)),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => Err(e),
        }
    };
    let records = [read(0)?, read(1)?];
    Ok(records.into_iter().flatten().max_by_key(|record| record.revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_read_back_and_broken_ones_are_refused() {
        let mut hasher = Algorithm::Sha512.hasher();
        hasher.update(b"content");
        let longest = "r".repeat(255);
        let bytes = encode(&Record { revision: 7, offset: 99, hasher, repository: longest.clone() }).unwrap();
        let record = decode(&bytes).unwrap();
        assert_eq!((record.revision, record.offset, record.repository), (7, 99, longest));
        assert_eq!(record.hasher.finish(), Algorithm::Sha512.digest(b"content"));
        for at in [0, 8, 30, RECORD_BYTES - 1] {
            let mut broken = bytes.clone();
            broken[at] ^= 1;
            assert!(decode(&broken).is_none(), "{at}");
        }
        assert!(decode(&bytes[..100]).is_none());
    }
}
