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

use anyplace_seed::{Seed, correct_checksums, mutate};
use layer::{packed_with, read_layer, round_trip};
use zstd_chunked::{Digest, Limits, Options, Positions, Section, Toc, pack, read_tar_split};

/// Changed inputs for each file of the corpus.
const MUTATIONS: usize = 3_000;

fn corpus(kind: &str) -> Vec<(String, Vec<u8>)> {
    anyplace_seed::corpus(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind))
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
