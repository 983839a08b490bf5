//! Extension headers: PAX records and GNU's long names, which apply to the member that follows.

use std::collections::BTreeMap;

use super::{
    WHAT,
    fields::{Header, text},
    sparse,
};
use crate::{Error, Result, Time};

/// What the extension headers before a member say.
#[derive(Default)]
pub(super) struct Extensions {
    /// Whether there was one.
    pub(super) any: bool,
    /// Extended attributes.
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
    odd: Option<&'static str>,
}

impl Extensions {
    pub(super) fn take(&mut self, kind: u8, body: &[u8]) -> Result<()> {
        self.any = true;
        match kind {
            b'L' => self.long_name = text(body),
            b'K' => self.long_link = text(body),
            b'g' => {
                // Readers differ in how far its records apply, and the table has no place for it.
                records(body)?;
                self.odd = Some("a global header");
            }
            _ => {
                if !self.records.is_empty() {
                    self.odd = Some("two PAX headers of one member");
                }
                self.records = records(body)?;
            }
        }
        Ok(())
    }

    /// Changes the header; answers what the table can't express.
    pub(super) fn apply(&mut self, header: &mut Header) -> Result<Option<&'static str>> {
        for (key, value) in std::mem::take(&mut self.records) {
            let wrong = || {
                let (key, value) = (String::from_utf8_lossy(&key), String::from_utf8_lossy(&value));
                Error::invalid(WHAT, format!("PAX record {key:?} is {value:?}"))
            };
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                self.xattrs.insert(name.to_vec(), value);
                continue;
            }
            if key.starts_with(b"GNU.sparse.") {
                return Err(sparse());
            }
            if value.is_empty() {
                continue;
            }
            match &key[..] {
                b"path" | b"linkpath" if value.contains(&0) => return Err(wrong()),
                b"path" => header.name = value,
                b"linkpath" => header.link_name = value,
                b"uid" => header.uid = decimal(&value).ok_or_else(wrong)?,
                b"gid" => header.gid = decimal(&value).ok_or_else(wrong)?,
                b"size" => {
                    header.size = decimal(&value).and_then(|size| size.try_into().ok()).ok_or_else(wrong)?
                }
                b"mtime" => header.mod_time = time(&value).ok_or_else(wrong)?,
                b"atime" => header.access_time = Some(time(&value).ok_or_else(wrong)?),
                b"ctime" => header.change_time = Some(time(&value).ok_or_else(wrong)?),
                _ => {}
            }
        }
        if !self.long_name.is_empty() {
            header.name = std::mem::take(&mut self.long_name);
        }
        if !self.long_link.is_empty() {
            header.link_name = std::mem::take(&mut self.long_link);
        }
        Ok(self.odd)
    }
}

/// Records of the form `<length of all> <key>=<value>\n`.
fn records(mut body: &[u8]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut records = BTreeMap::new();
    while !body.is_empty() {
        let (key, value, rest) = record(body).ok_or_else(|| {
            let start = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
            Error::invalid(WHAT, format!("a broken PAX record: {start:?}"))
        })?;
        records.insert(key.to_vec(), value.to_vec());
        body = rest;
    }
    Ok(records)
}

fn record(body: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = body.iter().take(20).position(|&byte| byte == b' ')?;
    let length = usize::try_from(decimal(&body[..space])?).ok()?;
    let record = body.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    (!key.is_empty() && !key.contains(&0)).then_some((key, value, &body[length..]))
}

fn decimal(text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    // Other readers take no plus sign.
    if text.starts_with('+') { None } else { text.parse().ok() }
}

/// `<seconds>[.<fraction>]`; both parts of a negative time count down.
fn time(text: &[u8]) -> Option<Time> {
    let dot = text.iter().position(|&byte| byte == b'.');
    let secs = decimal(&text[..dot.unwrap_or(text.len())])?;
    let fraction = dot.map_or(&[][..], |dot| &text[dot + 1..]);
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanos =
        (0..9).fold(0, |nanos, at| nanos * 10 + u32::from(fraction.get(at).map_or(0, |digit| digit - b'0')));
    if text[0] == b'-' && nanos > 0 {
        return Some(Time { secs: secs.checked_sub(1)?, nanos: 1_000_000_000 - nanos });
    }
    Some(Time { secs, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_and_times() {
        let body = b"12 path=a/b\n21 SCHILY.xattr.u=\0\n\n";
        let found = records(body).unwrap();
        assert_eq!(found[&b"path"[..]], b"a/b");
        assert_eq!(found[&b"SCHILY.xattr.u"[..]], b"\0\n");
        for wrong in [
            &b"12 path=a/b"[..],
            b"11 path=a/b\n",
            b"x",
            b"5 a=\n5",
            b"99999999999999999999999 a=b\n",
            b"4 =\n",
        ] {
            assert!(records(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(time(b"1.5"), Some(Time { secs: 1, nanos: 500_000_000 }));
        assert_eq!(time(b"-1.25"), Some(Time { secs: -2, nanos: 750_000_000 }));
        assert_eq!(time(b"7.1234567899"), Some(Time { secs: 7, nanos: 123_456_789 }));
        assert_eq!(time(b"1.x"), None);
        assert_eq!(time(b""), None);
    }
}
