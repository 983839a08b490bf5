//! Flips bits anywhere in a layer: each is caught, or changes nothing that was asked for.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy only exempts functions marked as tests")]

#[path = "support/archive.rs"]
mod archive;
#[path = "support/layer.rs"]
mod layer;

use std::{collections::BTreeMap, io::Read};

use anyplace_seed::{Seed, rounds};
use archive::Archive;
use layer::{Layer, packed, read_layer};
use zstd_chunked::{Annotations, Digest, Footer, Packed, read_plain};

/// How many bits are flipped, one at a time, usually and in a whole campaign: a third of them anywhere in the tables.
const FLIPS: (usize, usize) = (10_000, 30_000);

fn small_layer() -> (Vec<u8>, Packed, Layer) {
    let mut content = Vec::new();
    for index in 0..2_000u32 {
        content.extend_from_slice(&index.wrapping_mul(2_654_435_761).to_le_bytes());
    }
    let mut archive = Archive::default();
    archive.dir("d/").file("d/text", b"some text, some text, some more text").file("d/noise", &content);
    archive.pax(b'x', &[("SCHILY.xattr.user.a", b"v")]).file("d/attributes", b"x").link(b'2', "l", "d/text");
    archive.file("repeated", &[b'r'; 3_000]);
    let (blob, packed) = packed(&archive.end());
    let layer = read_layer(&blob, &packed.annotations.unwrap()).unwrap();
    (blob, packed, layer)
}

#[test]
fn every_flipped_bit_of_the_blob_is_caught() {
    let (blob, packed, layer) = small_layer();
    let annotations = packed.annotations.unwrap();
    let positions = annotations.positions;
    let mut random = Seed::from_env();
    let (mut caught, flips) = (0, rounds(FLIPS.0, FLIPS.1));
    for flip in 0..flips {
        // A third anywhere, the others in the tables and the footer, which are smaller.
        let at = match flip % 3 {
            0 => random.index(blob.len()),
            1 => positions.toc.offset as usize + random.index(blob.len() - positions.toc.offset as usize),
            _ => blob.len() - Footer::SIZE + random.index(Footer::SIZE),
        };
        let mut damaged = blob.clone();
        damaged[at] ^= 1 << random.index(8);
        // A puller that has the annotations.
        match read_layer(&damaged, &annotations) {
            Err(_) => caught += 1,
            Ok(read) => assert!(read == layer, "byte {at} changes the layer"),
        }
        // One that takes the positions from the footer; the table's digest it always knows.
        match Footer::parse(damaged.last_chunk().unwrap()) {
            Err(_) => caught += 1,
            Ok(footer) => {
                match read_layer(&damaged, &Annotations { positions: footer.positions, ..annotations }) {
                    Err(_) => caught += 1,
                    Ok(read) => assert!(read == layer, "byte {at} changes the layer"),
                }
            }
        }
        // One that takes all of it as plain zstd, and compares with the diff id.
        let mut tar = Vec::new();
        let limit = 4 * packed.tar_size;
        match read_plain(&damaged[..]).unwrap().take(limit).read_to_end(&mut tar) {
            Ok(_) if Digest::of(&tar) == packed.diff_id => assert!(tar == layer.tar),
            _ => caught += 1,
        }
    }
    eprintln!("{flips} flips, each read in three ways: {caught} errors");
    assert!(caught > flips / 2);
}

#[test]
fn every_changed_character_of_the_annotations_is_caught() {
    let (blob, packed, layer) = small_layer();
    let mut random = Seed::from_env();
    let map = packed.annotations.unwrap().to_map();
    for _ in 0..rounds(FLIPS.0, FLIPS.1) / 10 {
        let mut changed: BTreeMap<String, String> = map.clone();
        let value = changed.values_mut().nth(random.index(3)).unwrap();
        let at = random.index(value.len());
        let new = char::from(b' ' + random.index(95) as u8);
        value.replace_range(at..at + 1, new.encode_utf8(&mut [0; 4]));
        if let Ok(Some(annotations)) = Annotations::from_map(&changed)
            && let Ok(read) = read_layer(&blob, &annotations)
        {
            assert!(read == layer && changed == map, "{changed:?}");
        }
    }
}
