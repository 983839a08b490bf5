//! A layer's table: its archive's entries, with each file's digest and chunks; `layers/<diff id>.toc`.
//!
//! Format: magic `aptable1`, sha256 of all that follows it, bytes of the body uncompressed (u64 LE), then the body as
//! one zstd frame. The body is the number of entries and then each entry; numbers are LEB128, byte strings are their
//! length and bytes. The file is ours alone: when the format changes, so does the magic, and old ones are made anew.

use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::objects::ObjectId;
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"aptable1";
const HEADER: usize = 8 + 32 + 8;
/// Most entries of a layer: the largest public images have about 300,000.
pub(super) const ENTRIES_MAX: usize = 1_000_000;
/// Most bytes of names, attributes and small files of a layer together, which are held in memory.
pub(super) const TABLE_MAX_BYTES: u64 = 512 << 20;
/// Larger than any table within the bounds above.
const BODY_MAX_BYTES: u64 = 2 << 30;

/// What a layer holds, in its archive's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) entries: Vec<Entry>,
}

/// One entry of a layer, whiteouts included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Relative to the layer's root, without `.`, `..` and doubled slashes; empty for the root.
    pub(crate) path: Vec<u8>,
    /// At most 0o7777.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime_s: i64,
    pub(crate) mtime_ns: u32,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File(File),
    Symlink(Vec<u8>),
    /// Target's path, cleaned as [`Entry::path`].
    HardLink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) id: ObjectId,
    pub(crate) size: u64,
    pub(crate) content: Content,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// The bytes.
    Inline(Vec<u8>),
    /// In the objects; the chunks are empty where the file is one chunk.
    Object(Vec<Chunk>),
}

/// A piece of a file; they follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) size: u64,
    pub(crate) id: ObjectId,
}

impl Table {
    /// Files whose bytes lie in the objects.
    pub(crate) fn objects(&self) -> impl Iterator<Item = &File> {
        self.files().filter(|file| matches!(file.content, Content::Object(_)))
    }

    pub(crate) fn files(&self) -> impl Iterator<Item = &File> {
        self.entries.iter().filter_map(|entry| match &entry.kind {
            Kind::File(file) => Some(file),
            _ => None,
        })
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut body = Writer(Vec::with_capacity(self.entries.len() * 96));
        body.number(self.entries.len() as u64);
        self.entries.iter().for_each(|entry| body.entry(entry));
        let packed = zstd::bulk::compress(&body.0, 1).map_err(Error::io("compressing", "a layer's table"))?;
        let mut hashed = (body.0.len() as u64).to_le_bytes().to_vec();
        hashed.extend_from_slice(&packed);
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&Sha256::digest(&hashed));
        bytes.extend_from_slice(&hashed);
        Ok(bytes)
    }

    /// None where the bytes are not what was written.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Table> {
        let hashed = bytes.get(40..).filter(|_| bytes.len() >= HEADER && bytes.starts_with(MAGIC))?;
        if Sha256::digest(hashed).as_slice() != &bytes[8..40] {
            return None;
        }
        let length = u64::from_le_bytes(hashed[..8].try_into().ok()?);
        if length > BODY_MAX_BYTES {
            return None;
        }
        let body = zstd::bulk::decompress(&hashed[8..], usize::try_from(length).ok()?).ok()?;
        let mut reader = Reader(&body);
        let count = usize::try_from(reader.number()?).ok().filter(|count| *count <= ENTRIES_MAX)?;
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            entries.push(reader.entry()?);
        }
        reader.0.is_empty().then_some(Table { entries })
    }

    /// None where the file is missing or damaged, so that the layer is fetched again.
    pub(super) fn read(path: &Path) -> Result<Option<Table>> {
        match std::fs::read(path) {
            Ok(bytes) => Ok(Table::from_bytes(&bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("reading", path)(e)),
        }
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn entry(&mut self, entry: &Entry) {
        self.bytes(&entry.path);
        for number in [entry.mode, entry.uid, entry.gid, entry.mtime_ns] {
            self.number(u64::from(number));
        }
        // Two's complement as it is: times before 1970 are rare.
        self.number(entry.mtime_s as u64);
        self.number(entry.xattrs.len() as u64);
        for (name, value) in &entry.xattrs {
            self.bytes(name);
            self.bytes(value);
        }
        match &entry.kind {
            Kind::Directory => self.number(0),
            Kind::Symlink(target) => {
                self.number(2);
                self.bytes(target);
            }
            Kind::HardLink(target) => {
                self.number(3);
                self.bytes(target);
            }
            Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => {
                self.number(if matches!(entry.kind, Kind::CharDevice(..)) { 4 } else { 5 });
                self.number(u64::from(*major));
                self.number(u64::from(*minor));
            }
            Kind::Fifo => self.number(6),
            Kind::File(File { id, size, content: Content::Inline(bytes) }) => {
                self.number(7);
                debug_assert_eq!(*size, bytes.len() as u64);
                self.0.extend_from_slice(&id.0);
                self.bytes(bytes);
            }
            Kind::File(File { id, size, content: Content::Object(chunks) }) => {
                self.number(1);
                self.0.extend_from_slice(&id.0);
                self.number(*size);
                self.number(chunks.len() as u64);
                for chunk in chunks {
                    self.number(chunk.size);
                    self.0.extend_from_slice(&chunk.id.0);
                }
            }
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn short(&mut self) -> Option<u32> {
        self.number()?.try_into().ok()
    }

    fn slice(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.number()?).ok()?;
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    fn id(&mut self) -> Option<ObjectId> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(ObjectId(*bytes))
    }

    fn entry(&mut self) -> Option<Entry> {
        let path = self.slice()?.to_vec();
        let (mode, uid, gid, mtime_ns) = (self.short()?, self.short()?, self.short()?, self.short()?);
        let mtime_s = self.number()? as i64;
        let mut xattrs = Vec::new();
        for _ in 0..self.number()? {
            xattrs.push((self.slice()?.to_vec(), self.slice()?.to_vec()));
        }
        let kind = match self.number()? {
            0 => Kind::Directory,
            1 => {
                let (id, size) = (self.id()?, self.number()?);
                let mut chunks = Vec::new();
                for _ in 0..self.number()? {
                    chunks.push(Chunk { size: self.number()?, id: self.id()? });
                }
                Kind::File(File { id, size, content: Content::Object(chunks) })
            }
            2 => Kind::Symlink(self.slice()?.to_vec()),
            3 => Kind::HardLink(self.slice()?.to_vec()),
            4 => Kind::CharDevice(self.short()?, self.short()?),
            5 => Kind::BlockDevice(self.short()?, self.short()?),
            6 => Kind::Fifo,
            7 => {
                let (id, bytes) = (self.id()?, self.slice()?.to_vec());
                Kind::File(File { id, size: bytes.len() as u64, content: Content::Inline(bytes) })
            }
            _ => return None,
        };
        Some(Entry { path, mode, uid, gid, mtime_s, mtime_ns, xattrs, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let entry = |path: &[u8], kind| Entry {
            path: path.to_vec(),
            mode: 0o4755,
            uid: 1000,
            gid: u32::MAX,
            mtime_s: -5,
            mtime_ns: 999_999_999,
            xattrs: vec![(b"user.a".to_vec(), vec![0, 255])],
            kind,
        };
        let id = ObjectId::of(b"x");
        let chunks = vec![Chunk { size: 70_000, id }, Chunk { size: 1 << 40, id }];
        Table {
            entries: vec![
                entry(b"", Kind::Directory),
                entry(b"a/\xff", Kind::File(File { id, size: 1, content: Content::Inline(vec![b'x']) })),
                entry(b"b", Kind::File(File { id, size: u64::MAX, content: Content::Object(chunks) })),
                entry(b"c", Kind::Symlink(b"../..".to_vec())),
                entry(b"d", Kind::HardLink(b"b".to_vec())),
                entry(b"e", Kind::CharDevice(1, 3)),
                entry(b"f", Kind::BlockDevice(8, 0)),
                entry(b"g", Kind::Fifo),
            ],
        }
    }

    #[test]
    fn tables_survive_and_any_damage_is_seen() {
        let bytes = table().to_bytes().unwrap();
        assert_eq!(Table::from_bytes(&bytes), Some(table()));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                assert_eq!(Table::from_bytes(&damaged), None, "byte {at} bit {bit}");
            }
            assert_eq!(Table::from_bytes(&bytes[..at]), None, "cut at {at}");
        }
    }
}
