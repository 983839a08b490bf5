//! The annotations of a layer's descriptor: where the table of contents and the tar-split lie, and the table's digest.
//!
//! They are covered by the manifest's digest, so a reader that starts from a verified manifest can trust them.

use std::{collections::BTreeMap, ops::Range};

use crate::{Digest, Error, Footer, Limits, Result, SKIPPABLE_HEADER, limits::at_most};

const CHECKSUM: &str = "io.github.containers.zstd-chunked.manifest-checksum";
const TOC_POSITION: &str = "io.github.containers.zstd-chunked.manifest-position";
const TAR_SPLIT_POSITION: &str = "io.github.containers.zstd-chunked.tarsplit-position";
/// The only kind of table there is.
pub(crate) const TOC_KIND: u64 = 1;

/// A compressed section of the blob, in bytes. The offset is that of its content, after the skippable frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Where it begins in the blob.
    pub offset: u64,
    /// Bytes in the blob.
    pub length: u64,
    /// Bytes uncompressed.
    pub raw_length: u64,
}

impl Section {
    /// The range in the blob.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.length
    }
}

/// Where table of contents and tar-split lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Positions {
    /// The table of contents.
    pub toc: Section,
    /// The tar-split.
    pub tar_split: Section,
}

impl Positions {
    /// Where the frames of the archive end: no chunk lies beyond.
    pub fn data_end(&self) -> u64 {
        self.toc.offset - SKIPPABLE_HEADER
    }

    /// One range that holds both sections: they are neighbours, so one request fetches both.
    pub fn range(&self) -> Range<u64> {
        self.toc.offset.min(self.tar_split.offset)..self.toc.range().end.max(self.tar_split.range().end)
    }

    /// Refuses sections that overlap, lie too early, or are larger than the limits.
    pub fn check(&self, limits: &Limits) -> Result<()> {
        at_most("the table of contents in bytes", self.toc.raw_length, limits.toc_bytes)?;
        at_most("the compressed table of contents in bytes", self.toc.length, limits.toc_bytes)?;
        at_most("the tar-split in bytes", self.tar_split.raw_length, limits.tar_split_bytes)?;
        at_most("the compressed tar-split in bytes", self.tar_split.length, limits.tar_split_bytes)?;
        let follows =
            self.toc.offset.checked_add(self.toc.length).and_then(|end| end.checked_add(SKIPPABLE_HEADER));
        let ends = self.tar_split.offset.checked_add(self.tar_split.length);
        if self.toc.offset < SKIPPABLE_HEADER || follows != Some(self.tar_split.offset) || ends.is_none() {
            return Err(Error::invalid(
                "positions of table of contents and tar-split",
                format!("{self:?}, expected the tar-split's frame right after the table's"),
            ));
        }
        Ok(())
    }
}

/// A layer's annotations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Annotations {
    /// Digest of the compressed table of contents.
    pub checksum: Digest,
    /// Where things lie.
    pub positions: Positions,
}

impl Annotations {
    /// From a descriptor's annotations; `None` if the layer isn't zstd:chunked (or of the dialect of before 2024, which
    /// has no tar-split and so can't be verified).
    pub fn from_map(map: &BTreeMap<String, String>) -> Result<Option<Self>> {
        let (Some(checksum), Some(toc), Some(tar_split)) =
            (map.get(CHECKSUM), map.get(TOC_POSITION), map.get(TAR_SPLIT_POSITION))
        else {
            return Ok(None);
        };
        let checksum = checksum.parse().map_err(|why: String| Error::invalid(CHECKSUM, why))?;
        let [offset, length, raw_length, kind] = numbers(TOC_POSITION, toc)?;
        if kind != TOC_KIND {
            return Err(Error::invalid(TOC_POSITION, format!("kind {kind} of table, expected {TOC_KIND}")));
        }
        let toc = Section { offset, length, raw_length };
        let [offset, length, raw_length] = numbers(TAR_SPLIT_POSITION, tar_split)?;
        let positions = Positions { toc, tar_split: Section { offset, length, raw_length } };
        Ok(Some(Self { checksum, positions }))
    }

    /// As a descriptor carries them.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        let Positions { toc, tar_split } = &self.positions;
        BTreeMap::from([
            (CHECKSUM.into(), self.checksum.to_string()),
            (TOC_POSITION.into(), format!("{}:{}:{}:{TOC_KIND}", toc.offset, toc.length, toc.raw_length)),
            (
                TAR_SPLIT_POSITION.into(),
                format!("{}:{}:{}", tar_split.offset, tar_split.length, tar_split.raw_length),
            ),
        ])
    }

    /// The footer that says the same.
    pub fn footer(&self) -> Footer {
        Footer { positions: self.positions }
    }
}

/// Exactly `N` decimal numbers between colons.
fn numbers<const N: usize>(what: &'static str, text: &str) -> Result<[u64; N]> {
    let wrong = || Error::invalid(what, format!("{text:?}, expected {N} numbers between colons"));
    let mut found = [0; N];
    let mut parts = text.split(':');
    for number in &mut found {
        let part = parts.next().ok_or_else(wrong)?;
        if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        *number = part.parse().map_err(|_| wrong())?;
    }
    if parts.next().is_some() { Err(wrong()) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_survive_and_hostile_ones_are_refused() {
        let positions = Positions {
            toc: Section { offset: 108, length: 50, raw_length: 500 },
            tar_split: Section { offset: 166, length: 60, raw_length: 600 },
        };
        let annotations = Annotations { checksum: Digest::of(b"x"), positions };
        let map = annotations.to_map();
        assert_eq!(Annotations::from_map(&map).unwrap(), Some(annotations));
        assert_eq!(map[TOC_POSITION], "108:50:500:1");
        positions.check(&Limits::default()).unwrap();
        assert_eq!(positions.data_end(), 100);
        assert_eq!(positions.range(), 108..226);
        assert_eq!(Annotations::from_map(&BTreeMap::new()).unwrap(), None);

        for (key, value) in [
            (CHECKSUM, "sha256:00"),
            (CHECKSUM, "sha512:0000"),
            (TOC_POSITION, "108:50:500:2"),
            (TOC_POSITION, "108:50:500"),
            (TOC_POSITION, "108:50:500:1:9"),
            (TOC_POSITION, "+108:50:500:1"),
            (TOC_POSITION, "108:50:99999999999999999999:1"),
            (TAR_SPLIT_POSITION, "166:60"),
            (TAR_SPLIT_POSITION, ""),
        ] {
            let mut map = map.clone();
            map.insert(key.into(), value.into());
            assert!(Annotations::from_map(&map).is_err(), "{key} {value}");
        }
        let limits = Limits::default();
        for (toc, tar_split) in [
            ((0, 50, 500), (166, 60, 600)),
            ((108, 50, 500), (150, 60, 600)),
            ((108, u64::MAX, 500), (166, 60, 600)),
            ((108, 50, limits.toc_bytes + 1), (166, 60, 600)),
            ((108, 50, 500), (166, 60, limits.tar_split_bytes + 1)),
            ((u64::MAX - 10, 50, 500), (166, 60, 600)),
        ] {
            let section = |(offset, length, raw_length)| Section { offset, length, raw_length };
            assert!(Positions { toc: section(toc), tar_split: section(tar_split) }.check(&limits).is_err());
        }
    }
}
