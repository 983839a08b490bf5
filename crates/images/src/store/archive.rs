//! Reads tar archives: ustar headers, GNU long names, pax records.
//!
//! The tar crate splits pax records at line ends, so a name or an attribute with that byte in it (capabilities are
//! binary) comes out wrong. Records carry their length, and are read by it here.
//! Formats: POSIX.1-2017 `pax`, "ustar Interchange Format" and "pax Extended Header".

use std::io::{self, Error, ErrorKind, Read};

use tar::{EntryType, Header};

const BLOCK: usize = 512;
/// Largest pax record or long name: attributes have at most 64 KiB, paths 4 KiB.
const EXTENSION_MAX_BYTES: u64 = 1 << 20;

/// An archive; reading from it gives the contents of the entry that came last.
pub(super) struct Archive<R> {
    reader: R,
    /// Bytes of the entry's contents that are still to come.
    left: u64,
    /// Bytes of padding after them.
    padding: u64,
}

/// What an archive says about one entry.
pub(super) struct Entry {
    pub(super) header: Header,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    /// Length of the contents.
    pub(super) size: u64,
    pub(super) uid: u64,
    pub(super) gid: u64,
    /// Seconds and nanoseconds since 1970.
    pub(super) mtime: (i64, i64),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Its contents are only the parts of it that are not zero.
    pub(super) sparse: bool,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(reader: R) -> Self {
        Archive { reader, left: 0, padding: 0 }
    }

    /// The next entry, whatever was left of the last one; none at the archive's end.
    pub(super) fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let (mut long_path, mut long_link, mut records) = (None, None, Vec::new());
        loop {
            self.skip(self.left.saturating_add(self.padding))?;
            (self.left, self.padding) = (0, 0);
            let Some(header) = self.header()? else { return Ok(None) };
            let kind = header.entry_type();
            let size = header.entry_size().map_err(|_| invalid("an entry's size is no number"))?;
            match kind {
                EntryType::GNULongName => long_path = Some(until_zero(self.extension(size)?)),
                EntryType::GNULongLink => long_link = Some(until_zero(self.extension(size)?)),
                EntryType::XHeader => records = pax_records(&self.extension(size)?)?,
                EntryType::XGlobalHeader => drop(self.extension(size)?),
                _ => {
                    let mut entry = Entry {
                        path: long_path.unwrap_or_else(|| header.path_bytes().into_owned()),
                        link: long_link
                            .or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
                            .unwrap_or_default(),
                        size,
                        uid: header.uid().map_err(|_| invalid("an owner is no number"))?,
                        gid: header.gid().map_err(|_| invalid("a group is no number"))?,
                        // A time out of range is no reason to refuse an image.
                        mtime: (header.mtime().ok().and_then(|t| i64::try_from(t).ok()).unwrap_or(0), 0),
                        xattrs: Vec::new(),
                        sparse: kind == EntryType::GNUSparse,
                        header,
                    };
                    entry.apply(records)?;
                    if has_no_contents(kind) {
                        entry.size = 0;
                    }
                    self.left = entry.size;
                    self.padding = padding(entry.size);
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// What follows the archive's end.
    pub(super) fn into_reader(self) -> R {
        self.reader
    }

    fn header(&mut self) -> io::Result<Option<Header>> {
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while filled < BLOCK {
            match self.reader.read(&mut block[filled..])? {
                // Some tools leave the closing zeros out.
                0 if filled == 0 => return Ok(None),
                0 => return Err(invalid("the archive ends in the middle of a header")),
                read => filled += read,
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        // The checksum counts its own field as spaces.
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        let expected = sum(&block[..148]) + 8 * u32::from(b' ') + sum(&block[156..]);
        if header.cksum().ok() != Some(expected) {
            return Err(invalid("a header's checksum is wrong"));
        }
        Ok(Some(header))
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > EXTENSION_MAX_BYTES {
            return Err(invalid("a name or pax record has more than 1 MiB"));
        }
        let mut bytes = Vec::new();
        (&mut self.reader).take(size).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != size {
            return Err(invalid("the archive ends in the middle of a pax record"));
        }
        self.padding = padding(size);
        Ok(bytes)
    }

    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let skipped = io::copy(&mut (&mut self.reader).take(bytes), &mut io::sink())?;
        if skipped == bytes { Ok(()) } else { Err(invalid("the archive ends in the middle of an entry")) }
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        if len == 0 {
            return Ok(0);
        }
        let read = self.reader.read(&mut buf[..len])?;
        if read == 0 {
            return Err(invalid("the archive ends in the middle of an entry"));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

impl Entry {
    fn apply(&mut self, records: Vec<(Vec<u8>, Vec<u8>)>) -> io::Result<()> {
        for (key, value) in records {
            let number = || {
                let text = std::str::from_utf8(&value).ok();
                text.and_then(|text| text.parse().ok()).ok_or_else(|| invalid("a pax record is no number"))
            };
            match key.as_slice() {
                b"path" => self.path = value,
                b"linkpath" => self.link = value,
                b"size" => self.size = number()?,
                b"uid" => self.uid = number()?,
                b"gid" => self.gid = number()?,
                b"mtime" => {
                    self.mtime = std::str::from_utf8(&value).ok().and_then(time).unwrap_or(self.mtime);
                }
                key if key.starts_with(b"GNU.sparse.") => self.sparse = true,
                key => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        self.xattrs.push((name.to_vec(), value));
                    }
                }
            }
        }
        Ok(())
    }
}

/// `LENGTH KEY=VALUE` and a line end each; the length counts itself and the line end.
fn pax_records(mut bytes: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let bad = || invalid("a pax record is malformed");
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let space = bytes.iter().position(|byte| *byte == b' ').ok_or_else(bad)?;
        let length = std::str::from_utf8(&bytes[..space]).ok().and_then(|text| text.parse::<usize>().ok());
        let length = length.filter(|length| *length > space + 1 && *length <= bytes.len()).ok_or_else(bad)?;
        let (record, rest) = bytes.split_at(length);
        let record = record[space + 1..].strip_suffix(b"\n").ok_or_else(bad)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        bytes = rest;
    }
    Ok(records)
}

/// `seconds[.fraction]`
fn time(text: &str) -> Option<(i64, i64)> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    Some((seconds.parse().ok()?, digits.parse().ok()?))
}

/// Some old tools give the size of a link's target here, though nothing follows.
fn has_no_contents(kind: EntryType) -> bool {
    use EntryType::{Block, Char, Directory, Fifo, Link, Symlink};
    matches!(kind, Link | Symlink | Char | Block | Directory | Fifo)
}

fn padding(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

fn invalid(reason: &'static str) -> Error {
    Error::new(ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::super::entry::Shape;
    use super::*;

    #[test]
    fn pax_records_are_read_by_their_length() {
        let records = pax_records(b"11 a=1\n2=3\n\n7 b=\n=\n");
        assert!(records.is_err(), "a length that ends in the middle");
        let records = pax_records(b"11 path=a\n\n7 b=\n=\n").unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let found: Vec<_> = records.iter().map(|(key, value)| (text(key), text(value))).collect();
        assert_eq!(found, [("path".into(), "a\n".into()), ("b".into(), "\n=".into())]);
        for bad in
            ["x", "9 a=1\n", "99999999999999999999 a=1\n", "0 a=1\n", "2 ", "5 ab\n", "6 a=1x", "-1 a=\n"]
        {
            assert!(pax_records(bad.as_bytes()).is_err(), "{bad}");
        }
        assert_eq!(time("12.5"), Some((12, 500_000_000)));
        assert_eq!(time("12"), Some((12, 0)));
        assert_eq!(time("x"), None);
    }

    #[test]
    fn changed_archives() {
        crate::mutations::files("tar", |kept, bytes| {
            let mut archive = Archive::new(bytes);
            let (mut entries, mut contents) = (0, 0);
            let ended = loop {
                let entry = match archive.next_entry() {
                    Ok(Some(entry)) => entry,
                    Ok(None) => break true,
                    Err(_) => break false,
                };
                entries += 1;
                // All that an entry says it has is there.
                let Ok(read) = io::copy(&mut archive, &mut io::sink()) else { break false };
                assert_eq!(read, entry.size);
                contents += read;
                match super::super::entry::read(entry) {
                    Ok(Shape::Entry(entry) | Shape::File(entry, _)) => {
                        let parts: Vec<&[u8]> = entry.path.split(|byte| *byte == b'/').collect();
                        let is_root = entry.path.is_empty();
                        let leads_away =
                            |part: &&[u8]| part.is_empty() || **part == b"."[..] || **part == b".."[..];
                        assert!(is_root || !parts.iter().any(leads_away), "{:?}", entry.path);
                        assert!(entry.mode <= 0o7777 && entry.mtime_ns < 1_000_000_000);
                        assert!(!entry.path.contains(&0) && entry.path.len() < 4_096);
                    }
                    Err(error) => assert!(!kept, "{error}"),
                }
            };
            assert!(contents <= bytes.len() as u64 && entries <= bytes.len() / BLOCK);
            ended
        });
    }
}
