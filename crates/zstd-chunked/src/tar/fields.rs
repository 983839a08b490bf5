//! The 512 bytes of a header.

use super::{BLOCK, WHAT};
use crate::{Error, Result, Time};

/// A header's fields. Numbers may be negative in base-256.
pub(super) struct Header {
    pub(super) kind: u8,
    pub(super) name: Vec<u8>,
    pub(super) link_name: Vec<u8>,
    pub(super) size: u64,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) dev_major: i64,
    pub(super) dev_minor: i64,
    pub(super) mod_time: Time,
    pub(super) access_time: Option<Time>,
    pub(super) change_time: Option<Time>,
}

impl Header {
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Self> {
        check_sum(block)?;
        let field = |name: &str, from: usize, to: usize| {
            number(&block[from..to]).ok_or_else(|| {
                Error::invalid(
                    WHAT,
                    format!("a header's {name} is {:?}, expected a number", &block[from..to]),
                )
            })
        };
        let time = |name, from, to| field(name, from, to).map(|secs| Time { secs, nanos: 0 });
        let size = field("size", 124, 136)?;
        let mut header = Self {
            kind: block[156],
            name: text(&block[..100]),
            link_name: text(&block[157..257]),
            size: size.try_into().map_err(|_| Error::invalid(WHAT, format!("a member of size {size}")))?,
            mode: field("mode", 100, 108)?,
            uid: field("uid", 108, 116)?,
            gid: field("gid", 116, 124)?,
            dev_major: 0,
            dev_minor: 0,
            mod_time: time("time", 136, 148)?,
            access_time: None,
            change_time: None,
        };
        let ustar = &block[257..263] == b"ustar\0";
        let gnu = &block[257..265] == b"ustar  \0";
        if !ustar && !gnu {
            return Ok(header);
        }
        header.dev_major = field("device number", 329, 337)?;
        header.dev_minor = field("device number", 337, 345)?;
        let prefix = if gnu {
            // Some old writers put ustar's prefix where GNU has two times.
            let optional = |from: usize| match block[from] {
                0 => Some(None),
                _ => number(&block[from..from + 12]).map(|secs| Some(Time { secs, nanos: 0 })),
            };
            match (optional(345), optional(357)) {
                (Some(access), Some(change)) => {
                    (header.access_time, header.change_time) = (access, change);
                    Vec::new()
                }
                _ => Some(text(&block[345..500])).filter(|prefix| prefix.is_ascii()).unwrap_or_default(),
            }
        } else if &block[508..512] == b"tar\0" {
            header.access_time = Some(time("time", 476, 488)?);
            header.change_time = Some(time("time", 488, 500)?);
            text(&block[345..476])
        } else {
            text(&block[345..500])
        };
        if !prefix.is_empty() {
            header.name = [&prefix, &b"/"[..], &header.name].concat();
        }
        Ok(header)
    }
}

/// The sum of all bytes, with its own field as spaces. Some old writers added signed bytes.
fn check_sum(block: &[u8; BLOCK]) -> Result<()> {
    let (mut unsigned, mut signed) = (0i64, 0i64);
    for (at, &byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { byte };
        unsigned += i64::from(byte);
        signed += i64::from(byte as i8);
    }
    let expected = number(&block[148..156]);
    if expected == Some(unsigned) || expected == Some(signed) {
        return Ok(());
    }
    Err(Error::invalid(
        WHAT,
        format!("a header with checksum {expected:?}, expected {unsigned}: damaged, or no tar archive"),
    ))
}

/// Up to the first zero byte.
pub(super) fn text(field: &[u8]) -> Vec<u8> {
    field.split(|&byte| byte == 0).next().unwrap_or_default().to_vec()
}

/// Octal digits among spaces and zero bytes, or base-256 (big-endian two's complement) if the first bit is set.
fn number(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let start = i64::from(field[0] & 0x3f) - if negative { 0x40 } else { 0 };
        return field[1..]
            .iter()
            .try_fold(start, |value, &byte| value.checked_mul(256)?.checked_add(i64::from(byte)));
    }
    let padding = |byte: &u8| *byte == b' ' || *byte == 0;
    let from = field.iter().position(|byte| !padding(byte)).unwrap_or(field.len());
    let to = field.iter().rposition(|byte| !padding(byte)).map_or(from, |last| last + 1);
    let digits = field[from..to].split(|&byte| byte == 0).next().unwrap_or_default();
    digits.iter().try_fold(0i64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers_in_octal_and_base_256() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0"), Some(0));
        assert_eq!(number(b"77777777777\0"), Some(0o77777777777));
        assert_eq!(number(b"8\0"), None);
        assert_eq!(number(b"-1\0\0"), None);
        assert_eq!(number(&[0x80, 0, 0, 1, 0]), Some(256));
        assert_eq!(number(&[0xff, 0xff, 0xff, 0xfe]), Some(-2));
        assert_eq!(number(&[0x80, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), Some(i64::MAX));
        assert_eq!(number(&[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), None);
    }
}
