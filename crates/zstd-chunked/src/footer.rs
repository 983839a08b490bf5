//! The footer: the last 64 bytes of a blob, for those who have the blob but not its annotations.
//!
//! Seven numbers (u64, little-endian) and a magic: the table's offset, length, raw length and kind, then the tar-split's
//! offset, length and raw length. Nothing authenticates it: a puller uses the annotations.

use crate::{Error, Positions, Result, Section, annotations::TOC_KIND};

const MAGIC: &[u8; 8] = b"GNUlInUx";

/// What the footer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Where table of contents and tar-split lie.
    pub positions: Positions,
}

impl Footer {
    /// Bytes of the footer, without its skippable frame's header.
    pub const SIZE: usize = 64;

    /// Reads the blob's last 64 bytes.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Result<Self> {
        if &bytes[56..] != MAGIC {
            return Err(Error::invalid(
                "footer",
                "no zstd:chunked magic in the last 8 bytes: not such a blob",
            ));
        }
        let mut numbers = [0; 7];
        for (number, bytes) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
            *number = bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        }
        let [toc_offset, toc_length, toc_raw, kind, split_offset, split_length, split_raw] = numbers;
        if kind != TOC_KIND {
            return Err(Error::invalid("footer", format!("kind {kind} of table, expected {TOC_KIND}")));
        }
        Ok(Self {
            positions: Positions {
                toc: Section { offset: toc_offset, length: toc_length, raw_length: toc_raw },
                tar_split: Section { offset: split_offset, length: split_length, raw_length: split_raw },
            },
        })
    }

    /// The 64 bytes.
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let Positions { toc, tar_split } = self.positions;
        let numbers = [
            toc.offset,
            toc.length,
            toc.raw_length,
            TOC_KIND,
            tar_split.offset,
            tar_split.length,
            tar_split.raw_length,
        ];
        let mut bytes = [0; Self::SIZE];
        for (place, number) in bytes.chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes[56..].copy_from_slice(MAGIC);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_it_writes() {
        let footer = Footer {
            positions: Positions {
                toc: Section { offset: 1, length: 2, raw_length: 3 },
                tar_split: Section { offset: 4, length: 5, raw_length: u64::MAX },
            },
        };
        let mut bytes = footer.to_bytes();
        assert_eq!(Footer::parse(&bytes).unwrap(), footer);
        bytes[24] = 2;
        assert!(Footer::parse(&bytes).is_err());
        bytes[24] = 1;
        bytes[63] ^= 1;
        assert!(Footer::parse(&bytes).is_err());
    }
}
