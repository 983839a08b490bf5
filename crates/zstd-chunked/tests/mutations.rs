//! Feeds the parsers with the files in `corpus/` and with random changes of them.
//!
//! A file that once broke a parser is kept there, so it's tried for ever. What parsers accept is judged by rules of its
//! own here, simpler than the parsers'.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy only exempts functions marked as tests")]

#[path = "support/archive.rs"]
mod archive;
#[path = "support/layer.rs"]
mod layer;

use std::{collections::HashSet, path::Path};

use anyplace_seed::Seed;
use layer::{packed_with, read_layer, round_trip};
use zstd_chunked::{Digest, Limits, Options, Positions, Section, Toc, pack, read_tar_split};

/// Changed inputs for each file of the corpus.
const MUTATIONS: usize = 3_000;

fn corpus(kind: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind);
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap())
        })
        .collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

/// One to four changes: a bit, a byte, a number, a piece that is removed, doubled or moved.
fn mutate(bytes: &[u8], random: &mut Seed) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.index(4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.index(bytes.len());
        let piece = at..(at + 1 + random.index(64)).min(bytes.len());
        match random.index(7) {
            0 => bytes[at] ^= 1 << random.index(8),
            1 => bytes[at] = [0, b'0', b'9', b'"', b'/', b'.', b'-', 0xff][random.index(8)],
            2 => {
                // The next number becomes an extreme one.
                if let Some(digit) = bytes[at..].iter().position(u8::is_ascii_digit) {
                    let from = at + digit;
                    let to = bytes[from..]
                        .iter()
                        .position(|byte| !byte.is_ascii_digit())
                        .map_or(bytes.len(), |n| from + n);
                    let number =
                        ["0", "1", "-1", "4294967296", "18446744073709551615", "1e9"][random.index(6)];
                    bytes.splice(from..to, number.bytes());
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

/// What every reader of an accepted table relies on.
fn judge_toc(toc: &Toc, data_end: u64) {
    let (mut paths, mut end) = (HashSet::new(), 0);
    for file in toc.files() {
        let path = file.entry.path().unwrap();
        assert!(
            !path.starts_with('/') && !path.split('/').any(|part| matches!(part, "" | "." | "..")),
            "{path:?}"
        );
        assert!(paths.insert(path), "twice");
        let mut offset = 0;
        assert_eq!(file.chunks().count(), file.chunk_count());
        for chunk in file.chunks() {
            assert_eq!(chunk.file_offset, offset);
            assert!(chunk.range.start >= end && chunk.range.start < chunk.range.end);
            assert!(chunk.range.end <= data_end);
            (offset, end) = (offset + chunk.size, chunk.range.end);
        }
        assert_eq!(offset, file.entry.size);
    }
}

#[test]
fn tables_of_contents() {
    let (mut random, limits, data_end) = (Seed::from_env(), Limits::default(), 100_000);
    let mut accepted = 0;
    for (name, bytes) in corpus("toc") {
        Toc::from_json(&bytes, &limits).unwrap().check(&limits, data_end).expect(&name);
        for _ in 0..MUTATIONS {
            let changed = mutate(&bytes, &mut random);
            if let Ok(toc) = Toc::from_json(&changed, &limits)
                && toc.check(&limits, data_end).is_ok()
            {
                accepted += 1;
                judge_toc(&toc, data_end);
            }
        }
    }
    println!("{accepted} changed tables were accepted");
}

#[test]
fn tar_splits() {
    let (mut random, limits) = (Seed::from_env(), Limits::default());
    for (name, bytes) in corpus("tar-split") {
        let toc = name.replace("jsonl", "json");
        let (_, toc) = corpus("toc").into_iter().find(|(name, _)| *name == toc).unwrap();
        let mut toc = Toc::from_json(&toc, &limits).unwrap();
        let mut accepted = 0;
        for round in 0..MUTATIONS {
            let changed = if round == 0 { bytes.clone() } else { mutate(&bytes, &mut random) };
            let compressed = zstd::bulk::compress(&changed, 1).unwrap();
            toc.tar_split_digest = Some(Digest::of(&compressed));
            let section =
                Section { offset: 1_016, length: compressed.len() as u64, raw_length: changed.len() as u64 };
            let positions =
                Positions { toc: Section { offset: 1_000, length: 8, raw_length: 8 }, tar_split: section };
            let annotations = zstd_chunked::Annotations { checksum: Digest::of(b""), positions };
            let split = read_tar_split(compressed, &toc, &annotations, &limits).unwrap();
            let agrees = split.check(&toc);
            assert!(round > 0 || agrees.is_ok(), "{name}: {agrees:?}");
            accepted += usize::from(agrees.is_ok());
            // Whatever it says, it must end.
            let _ = split.write_tar(|_| Ok(&b"content"[..]), std::io::sink());
        }
        println!("{name}: {accepted} changed tar-splits were accepted");
    }
}

/// What the packer accepts, the reader accepts, and gives back as it was.
#[test]
fn archives() {
    let mut random = Seed::from_env();
    for (name, bytes) in corpus("tar") {
        assert!(round_trip(&bytes).1.is_some(), "{name}");
        let (mut tables, mut plain) = (0, 0);
        for _ in 0..MUTATIONS / 3 {
            // A flipped bit in a header is found by its checksum, so correct that most of the time.
            let mut changed = mutate(&bytes, &mut random);
            if random.index(4) > 0 {
                correct_checksums(&mut changed);
            }
            if pack(&changed[..], std::io::sink(), &Options { threads: 1, ..Options::default() }).is_err() {
                continue;
            }
            match packed_with(&changed, 1) {
                (blob, packed) if packed.plain.is_none() => {
                    let layer = read_layer(&blob, &packed.annotations.unwrap()).unwrap();
                    assert!(layer.tar == changed);
                    judge_toc(&layer.toc, packed.annotations.unwrap().positions.data_end());
                    tables += 1;
                }
                _ => plain += 1,
            }
        }
        println!("{name}: {tables} with table, {plain} plain");
        assert!(tables > 0);
    }
}

fn correct_checksums(tar: &mut [u8]) {
    for block in tar.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}
