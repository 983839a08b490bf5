//! Reading the mount table.

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Mount points of the given file-system types.
pub(crate) fn of_types(types: &[&str]) -> Vec<PathBuf> {
    table().into_iter().filter(|(_, kind)| types.contains(&kind.as_str())).map(|(point, _)| point).collect()
}

/// Mount points that `wanted` accepts, deepest and newest first: the order to unmount in.
pub(crate) fn matching(wanted: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut points: Vec<_> =
        table().into_iter().map(|(point, _)| point).filter(|point| wanted(point)).collect();
    points.reverse();
    points
}

/// Mount point and type of each mount, oldest first.
fn table() -> Vec<(PathBuf, String)> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines().filter_map(parse).collect()
}

/// `id parent major:minor root point options [tags...] - type source options` (proc(5)).
fn parse(line: &str) -> Option<(PathBuf, String)> {
    let point = line.split(' ').nth(4)?;
    let kind = line.split_once(" - ")?.1.split(' ').next()?;
    Some((unescape(point), kind.to_owned()))
}

/// Blanks and the like are written as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut path = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if bytes[at] == b'\\' => {
                path.push(byte);
                at += 4;
            }
            _ => {
                path.push(bytes[at]);
                at += 1;
            }
        }
    }
    std::ffi::OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_gives_point_and_type() {
        let line = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(parse(line), Some((PathBuf::from("/mnt 2"), "ext3".to_owned())));
    }
}
