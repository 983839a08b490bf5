//! Changes of a value as what differs in its JSON text, and the stream that carries them.
//!
//! A watch that asks for it (`patches=true`) gets frames instead of lines:
//!
//! ```text
//! frame:   length (varint)   kind (1 byte)   body
//!          0  an event, as its line of JSON
//!          1  a patch                        revision (varint)  digest (4 bytes)
//!          2  a patch, and all is sent       key length (varint)  key  splices
//! splice:  kept (varint)  dropped (varint)  added (varint)  bytes to add
//! ```
//!
//! Splices walk over the text that the reader has; what is behind the last is kept. The digest is the CRC-32C of the text
//! that comes of it, so a reader whose text differs (it has another version, or forgot) notices, and asks for values
//! as a whole.

use crc_fast::{CrcAlgorithm::Crc32Iscsi, checksum};

/// The content type of such a stream.
pub const PATCHES: &str = "application/vnd.anyplace.patches";

/// Where texts differ, they are taken for equal again from so many equal bytes on.
const ALIKE: usize = 8;
/// How far that is searched for, in both texts together.
const SEARCH: usize = 128;
/// A longer patch isn't made: servers keep thousands.
const MAX_BYTES: usize = 1_024;
/// A varint of a `u64` has at most so many bytes.
const MAX_VARINT: usize = 10;

const EVENT: u8 = 0;
const PATCH: u8 = 1;
const LAST_PATCH: u8 = 2;

/// How one value's text becomes the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    /// Revision of the change.
    pub revision: u64,
    /// The value's key.
    pub key: String,
    digest: u32,
    splices: Vec<u8>,
}

/// What a frame carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// An event as JSON.
    Event(Vec<u8>),
    /// A change of a value, and whether everything up to its revision has been sent.
    Patch(Patch, bool),
}

impl Patch {
    /// From one text to the next; none where that would save little.
    pub fn between(revision: u64, key: &str, before: &[u8], after: &[u8]) -> Option<Self> {
        let splices = splices(before, after);
        let saves = splices.len() + key.len() < MAX_BYTES.min(after.len() / 2);
        saves.then(|| Self { revision, key: key.into(), digest: digest(after), splices })
    }

    /// How much memory it takes beside its own fields.
    pub const fn bytes(&self) -> usize {
        self.key.len() + self.splices.len()
    }

    /// The next text; none where `before` isn't the one that this was made for, nor the one that it makes.
    pub fn apply(&self, before: &[u8]) -> Option<Vec<u8>> {
        if digest(before) == self.digest {
            return Some(before.to_vec());
        }
        let (mut rest, mut splices) = (before, self.splices.as_slice());
        let mut after = Vec::with_capacity(before.len() + splices.len());
        while !splices.is_empty() {
            after.extend_from_slice(take(&mut rest, varint(&mut splices)?)?);
            take(&mut rest, varint(&mut splices)?)?;
            let added = varint(&mut splices)?;
            after.extend_from_slice(take(&mut splices, added)?);
        }
        after.extend_from_slice(rest);
        (digest(&after) == self.digest).then_some(after)
    }
}

impl Frame {
    /// Appends the frame's bytes.
    pub fn write(&self, to: &mut Vec<u8>) {
        let mut body = Vec::new();
        match self {
            Self::Event(json) => {
                body.push(EVENT);
                body.extend_from_slice(json);
            }
            Self::Patch(patch, last) => {
                body.push(if *last { LAST_PATCH } else { PATCH });
                push_varint(&mut body, patch.revision);
                body.extend_from_slice(&patch.digest.to_le_bytes());
                push_varint(&mut body, patch.key.len() as u64);
                body.extend_from_slice(patch.key.as_bytes());
                body.extend_from_slice(&patch.splices);
            }
        }
        push_varint(to, body.len() as u64);
        to.extend_from_slice(&body);
    }

    /// The first frame of some bytes, and its length; none while it isn't complete.
    ///
    /// # Errors
    /// The bytes begin with no frame, or with one of more than `max` bytes.
    pub fn read(bytes: &[u8], max: usize) -> Result<Option<(Self, usize)>, String> {
        let mut rest = bytes;
        let Some(length) = varint(&mut rest) else {
            let whole = bytes.len() >= MAX_VARINT;
            return if whole { Err("a frame has no length".into()) } else { Ok(None) };
        };
        if length > max as u64 {
            return Err(format!("a frame has {length} bytes, more than {max}"));
        }
        let Some(body) = take(&mut rest, length) else { return Ok(None) };
        let frame = Self::of(body).ok_or("a frame of an unknown form")?;
        Ok(Some((frame, bytes.len() - rest.len())))
    }

    fn of(body: &[u8]) -> Option<Self> {
        let (kind, mut rest) = body.split_first()?;
        if *kind == EVENT {
            return Some(Self::Event(rest.to_vec()));
        }
        let last = match *kind {
            PATCH => false,
            LAST_PATCH => true,
            _ => return None,
        };
        let revision = varint(&mut rest)?;
        let digest = u32::from_le_bytes(take(&mut rest, 4)?.try_into().ok()?);
        let length = varint(&mut rest)?;
        let key = String::from_utf8(take(&mut rest, length)?.to_vec()).ok()?;
        Some(Self::Patch(Patch { revision, key, digest, splices: rest.to_vec() }, last))
    }
}

fn digest(text: &[u8]) -> u32 {
    // A 32-bit algorithm.
    checksum(Crc32Iscsi, text) as u32
}

/// How to get from one text to the other. Near each difference the nearest place is searched for where both are alike
/// again; where there is none, all of the middle is replaced.
fn splices(before: &[u8], after: &[u8]) -> Vec<u8> {
    let alike_at_end = before.iter().rev().zip(after.iter().rev()).take_while(|(a, b)| a == b).count();
    let (mut old, mut new, mut splices) = (before, after, Vec::new());
    loop {
        let kept = old.iter().zip(new).take_while(|(a, b)| a == b).count();
        (old, new) = (&old[kept..], &new[kept..]);
        if old.is_empty() && new.is_empty() {
            return splices;
        }
        let (dropped, added) = resume(old, new).unwrap_or_else(|| {
            let end = alike_at_end.min(old.len()).min(new.len());
            (old.len() - end, new.len() - end)
        });
        push_varint(&mut splices, kept as u64);
        push_varint(&mut splices, dropped as u64);
        push_varint(&mut splices, added as u64);
        splices.extend_from_slice(&new[..added]);
        (old, new) = (&old[dropped..], &new[added..]);
    }
}

/// What to drop and to add until both are alike again.
fn resume(old: &[u8], new: &[u8]) -> Option<(usize, usize)> {
    let alike = |dropped: usize, added: usize| {
        let (old, new) = (old.get(dropped..dropped + ALIKE), new.get(added..added + ALIKE));
        old.is_some() && old == new
    };
    (1..=SEARCH).find_map(|both| {
        (0..=both).map(|dropped| (dropped, both - dropped)).find(|(dropped, added)| alike(*dropped, *added))
    })
}

fn take<'a>(from: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
    let (taken, rest) = from.split_at_checked(usize::try_from(length).ok()?)?;
    *from = rest;
    Some(taken)
}

/// Seven bits a byte, the lowest first; the highest bit says that more follow.
fn push_varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

fn varint(from: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for (index, byte) in from.iter().take(MAX_VARINT).enumerate() {
        value |= u64::from(byte & 0x7f).checked_shl(7 * index as u32)?;
        if byte & 0x80 == 0 {
            *from = &from[index + 1..];
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests;
