//! Reads the headers of a tar archive: one member with all its extension headers at a time.
//!
//! Understands v7, ustar, star, GNU (long names, base-256 numbers) and PAX. Other tools compare what they read from a
//! header with the table of contents, so every field is read as Go's archive/tar does. What the table can't express is
//! named in [`Member::odd`], so that the packer can do without a table; sparse members are refused.

mod fields;
mod pax;

use std::io::Read;

use crate::{Entry, EntryType, Error, Result, Time, limits::at_most};

pub(crate) const BLOCK: usize = 512;
/// Largest extension header, in bytes: a path of PATH_MAX and attributes of 64 KiB fit many times.
const EXTENSION_MAX: u64 = 1 << 20;
/// All headers of one member, in bytes.
const HEADERS_MAX: u64 = 4 << 20;
const WHAT: &str = "tar archive";

/// A member of an archive.
pub(crate) struct Member {
    /// Its metadata; size as the header has it.
    pub(crate) entry: Entry,
    /// Bytes of content that follow the header.
    pub(crate) payload: u64,
    /// Why a table of contents can't hold it so that all readers agree.
    pub(crate) odd: Option<&'static str>,
}

impl Member {
    /// Bytes between the end of its content and the next header.
    pub(crate) fn padding(&self) -> usize {
        padding(self.payload)
    }
}

fn padding(size: u64) -> usize {
    (BLOCK - (size % BLOCK as u64) as usize) % BLOCK
}

/// Reads the next member's headers and appends every byte that was read to `raw`. `None` at the end: two blocks of zeros,
/// or the end of input at a block's start (or after one block of zeros).
pub(crate) fn next_member(input: &mut impl Read, raw: &mut Vec<u8>) -> Result<Option<Member>> {
    let mut extensions = pax::Extensions::default();
    loop {
        at_most("the headers of a member of the archive in bytes", raw.len() as u64, HEADERS_MAX)?;
        let Some(block) = read_block(input, raw)? else {
            return match extensions.any {
                true => Err(Error::invalid(WHAT, "it ends after an extension header, expected a member")),
                false => Ok(None),
            };
        };
        if block == [0; BLOCK] {
            return match read_block(input, raw)? {
                Some(second) if second != [0; BLOCK] => {
                    Err(Error::invalid(WHAT, "a block of zeros is followed by something else than the end"))
                }
                _ if extensions.any => {
                    Err(Error::invalid(WHAT, "it ends after an extension header, expected a member"))
                }
                _ => Ok(None),
            };
        }
        let header = fields::Header::parse(&block)?;
        match header.kind {
            kind @ (b'x' | b'g' | b'L' | b'K') => {
                at_most("an extension header of the archive in bytes", header.size, EXTENSION_MAX)?;
                let body = read_extension(input, raw, header.size as usize)?;
                extensions.take(kind, &body)?;
            }
            b'S' => return Err(sparse()),
            _ => return member(header, extensions).map(Some),
        }
    }
}

fn sparse() -> Error {
    Error::invalid(
        WHAT,
        "it has a sparse file, which images must not have: make the archive without --sparse",
    )
}

fn member(mut header: fields::Header, mut extensions: pax::Extensions) -> Result<Member> {
    let mut odd = extensions.apply(&mut header)?;
    let mut set_odd = |why| odd = odd.or(Some(why));
    let kind = match header.kind {
        0 if header.name.ends_with(b"/") => EntryType::Dir,
        b'0' if header.name.ends_with(b"/") => {
            set_odd("a regular file whose name ends in a slash");
            EntryType::Reg
        }
        0 | b'0' => EntryType::Reg,
        b'1' => EntryType::Hardlink,
        b'2' => EntryType::Symlink,
        b'3' => EntryType::Char,
        b'4' => EntryType::Block,
        b'5' => EntryType::Dir,
        b'6' => EntryType::Fifo,
        _ => {
            set_odd("a member of an unusual type");
            EntryType::Reg
        }
    };
    let payload = match kind {
        EntryType::Reg => header.size,
        _ => {
            if header.size != 0 {
                set_odd("a member that has a size and no content");
            }
            0
        }
    };
    let mut text = |bytes: Vec<u8>| {
        String::from_utf8(bytes).unwrap_or_else(|error| {
            set_odd("a name that is not UTF-8");
            String::from_utf8_lossy(error.as_bytes()).into_owned()
        })
    };
    let mut entry = Entry::new(kind, text(header.name));
    entry.link_name = text(header.link_name);
    for (key, value) in extensions.xattrs {
        entry.xattrs.insert(text(key), value);
    }
    let mut number = |value: i64| {
        u32::try_from(value).unwrap_or_else(|_| {
            set_odd("a number out of range");
            0
        })
    };
    entry.size = header.size;
    entry.mode = number(header.mode);
    entry.uid = number(header.uid);
    entry.gid = number(header.gid);
    entry.dev_major = number(header.dev_major);
    entry.dev_minor = number(header.dev_minor);
    let times = [Some(header.mod_time), header.access_time, header.change_time].map(|time: Option<Time>| {
        if time.is_some_and(|time| !time.is_writable()) {
            set_odd("a time out of range");
            return None;
        }
        time
    });
    [entry.mod_time, entry.access_time, entry.change_time] = times;
    Ok(Member { entry, payload, odd })
}

/// One block; `None` at the end of input.
fn read_block(input: &mut impl Read, raw: &mut Vec<u8>) -> Result<Option<[u8; BLOCK]>> {
    let mut block = [0; BLOCK];
    let read = read_full(input, &mut block)?;
    raw.extend_from_slice(&block[..read]);
    match read {
        0 => Ok(None),
        BLOCK => Ok(Some(block)),
        _ => Err(Error::invalid(WHAT, format!("it ends within a header, after {read} of {BLOCK} bytes"))),
    }
}

/// The body of an extension header; its padding is read too.
fn read_extension(input: &mut impl Read, raw: &mut Vec<u8>, size: usize) -> Result<Vec<u8>> {
    let start = raw.len();
    let padded = size + padding(size as u64);
    raw.resize(start + padded, 0);
    let read = read_full(input, &mut raw[start..])?;
    if read != padded {
        return Err(Error::invalid(
            WHAT,
            format!("it ends within an extension header, after {read} of {padded} bytes"),
        ));
    }
    Ok(raw[start..start + size].to_vec())
}

/// Fills the buffer, or less at the end of input.
pub(crate) fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Io { what: "reading the archive", source: error }),
        }
    }
    Ok(filled)
}
