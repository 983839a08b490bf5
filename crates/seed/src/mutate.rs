//! Kept inputs of parsers, and random changes of them.
//!
//! An input that once broke a parser is kept in its crate's `tests/corpus`, so it's tried for ever.

use std::path::Path;

use super::Seed;

/// The files of a folder: name and content each, by name.
///
/// # Panics
/// The folder can't be read, or is empty.
pub fn corpus(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let read = || -> std::io::Result<Vec<(String, Vec<u8>)>> {
        let entries = std::fs::read_dir(folder)?.map(|entry| {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Ok((name, std::fs::read(&path)?))
        });
        entries.collect()
    };
    let mut files = read().unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files
}

/// The lines of a file, for inputs as short as a header.
///
/// # Panics
/// The file can't be read, or is empty.
pub fn corpus_lines(file: &Path) -> Vec<Vec<u8>> {
    let text = std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let lines: Vec<Vec<u8>> = text.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    assert!(lines.len() > 1, "{} is empty", file.display());
    lines
}

/// One to four changes: a bit, a byte, a number, a piece that is removed, doubled or moved.
pub fn mutate(bytes: &[u8], random: &mut Seed) -> Vec<u8> {
    const BYTES: [u8; 14] =
        [0, b'0', b'9', b'"', b'/', b'.', b'-', b'+', b' ', b':', b',', b'@', b'\\', 0xff];
    const NUMBERS: [&str; 9] =
        ["0", "1", "-1", "+1", "4294967296", "18446744073709551615", "18446744073709551616", "1e9", ""];
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.index(4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.index(bytes.len());
        let piece = at..(at + 1 + random.index(64)).min(bytes.len());
        match random.index(7) {
            0 => bytes[at] ^= 1 << random.index(8),
            1 => bytes[at] = random.pick(&BYTES),
            2 => {
                // The next number becomes an extreme one.
                if let Some(digit) = bytes[at..].iter().position(u8::is_ascii_digit) {
                    let from = at + digit;
                    let length = bytes[from..].iter().position(|byte| !byte.is_ascii_digit());
                    let to = length.map_or(bytes.len(), |length| from + length);
                    bytes.splice(from..to, random.pick(&NUMBERS).bytes());
                }
            }
            3 => drop(bytes.drain(piece)),
            4 => {
                let copy = bytes[piece].to_vec();
                bytes.splice(at..at, copy);
            }
            5 => bytes.truncate(at),
            _ => {
                let copy = bytes[piece.clone()].to_vec();
                let to = random.index(bytes.len() - copy.len() + 1);
                bytes[to..to + copy.len()].copy_from_slice(&copy);
            }
        }
    }
    bytes
}

/// Makes the checksums of an archive's headers right, where a change made them wrong.
pub fn correct_checksums(tar: &mut [u8]) {
    for block in tar.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}
