//! Flipped bits, on the wire and on the disk: never believed, always found.

use std::path::PathBuf;

use anyplace_seed::rounds;

use super::super::table::Table;
use super::super::testing::{Bed, Format, Member, Seed, archive};
use super::*;

/// Flips of what the registry sends, for each format, usually and in a whole campaign.
const WIRE: (usize, usize) = (350, 2_500);
/// Flips of the store's files.
const DISK: (usize, usize) = (1_100, 10_000);

fn layer(seed: &mut Seed) -> Vec<u8> {
    archive(&[
        Member::dir("d"),
        Member::file("d/small", &seed.bytes(300)),
        Member::file("d/a", &seed.bytes(9_000)),
        Member::file("d/b", &seed.bytes(30_000)),
        Member::file("large", &seed.bytes((1 << 20) + 50_000)),
        Member::new(tar::EntryType::Symlink, "l", "d/a", b""),
    ])
}

/// Entries with their contents, without how files are chunked.
fn shown(store: &Store, diff_id: &Digest) -> Option<Table> {
    let mut table = Table::read(&store.inner.table_path(diff_id)).unwrap()?;
    for entry in &mut table.entries {
        entry.xattrs.sort();
        if let super::super::table::Kind::File(file) = &mut entry.kind
            && let super::super::table::Content::Object(chunks) = &mut file.content
        {
            chunks.clear();
        }
    }
    Some(table)
}

#[test]
fn flips_on_the_wire_are_never_believed() {
    let (bed, mut seed) = (Bed::in_memory(), Seed::new());
    let store = bed.open();
    let (mut caught, flips) = (0, rounds(WIRE.0, WIRE.1));
    for format in [Format::Plain, Format::Gzip, Format::Zstd, Format::Chunked] {
        let tar = layer(&mut seed);
        let diff_id = Digest::of(&tar);
        bed.server.put_image("v", &[(tar, format)]);
        bed.pull(&store, "v").unwrap();
        let expected = shown(&store, &diff_id).unwrap();
        store.remove(&"app:v".parse().unwrap()).unwrap();
        for round in 0..flips {
            let (at, bit) = (seed.next(), seed.below(8));
            bed.server.set_mangle(move |_, body| {
                let at = (at % body.len() as u64) as usize;
                body[at] ^= 1 << bit;
            });
            match bed.pull(&store, "v") {
                Err(_) => caught += 1,
                // A bit that means nothing, such as one of a frame that is not asked for.
                Ok(_) => assert_eq!(shown(&store, &diff_id).unwrap(), expected, "{format:?} {round}"),
            }
            // The registry is well again: the next pull completes, whatever the last one left.
            bed.server.stop_mangling();
            if round % 50 == 0 {
                bed.pull(&store, "v").unwrap();
                assert_eq!(shown(&store, &diff_id).unwrap(), expected);
                assert_eq!(store.verify().unwrap().damaged, Vec::<String>::new());
            }
            if store.has(&"app:v".parse().unwrap()) {
                store.remove(&"app:v".parse().unwrap()).unwrap();
            }
            store.collect().unwrap();
        }
    }
    bed.assert_tidy(&store);
    eprintln!("{caught} of {} flips were errors", 4 * flips);
    assert!(caught > flips);
}

fn files(dir: &std::path::Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push(path);
        }
    }
}

#[test]
fn flips_on_the_disk_are_found_and_what_is_lost_is_fetched_again() {
    let (bed, mut seed) = (Bed::in_memory(), Seed::new());
    let store = bed.open();
    let tar = layer(&mut seed);
    let diff_id = Digest::of(&tar);
    bed.server.put_image("v", &[(tar, Format::Chunked)]);
    bed.pull(&store, "v").unwrap();
    let expected = shown(&store, &diff_id).unwrap();
    let parts = ["objects", "layers", "mounts", "blobs"];
    let flips = rounds(DISK.0, DISK.1);
    for round in 0..flips {
        let mut all = Vec::new();
        files(&bed.store_dir().join(parts[seed.below(parts.len())]), &mut all);
        all.sort();
        let path = &all[seed.below(all.len())];
        let mut bytes = std::fs::read(path).unwrap();
        let at = seed.below(bytes.len());
        bytes[at] ^= 1 << seed.below(8);
        std::fs::write(path, bytes).unwrap();
        let report = store.verify().unwrap();
        let name = path.strip_prefix(bed.store_dir()).unwrap().display().to_string();
        let told = report.damaged.iter().chain(&report.repaired).any(|told| name.starts_with(told.as_str()));
        assert!(told || !report.dropped.is_empty(), "round {round}: {name} byte {at}: {report:?}");
        assert_eq!(
            report.dropped.is_empty(),
            report.damaged.is_empty() && store.has(&"app:v".parse().unwrap())
        );
        bed.pull(&store, "v").unwrap();
        assert_eq!(shown(&store, &diff_id).unwrap(), expected, "round {round}: {name}");
        if round % 100 == 0 {
            let clean = store.verify().unwrap();
            assert!(clean.damaged.is_empty() && clean.repaired.is_empty() && clean.dropped.is_empty());
            bed.assert_tidy(&store);
        }
    }
    eprintln!("{flips} flips were found");
}

#[test]
fn damaged_records_are_not_listed() {
    let (bed, mut seed) = (Bed::in_memory(), Seed::new());
    let store = bed.open();
    bed.server.put_image("v", &[(layer(&mut seed), Format::Chunked)]);
    bed.pull(&store, "v").unwrap();
    let record = store.inner.record_path(&"app:v".parse::<Reference>().unwrap().canonical().to_string());
    drop(store);
    let good = std::fs::read(&record).unwrap();
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << seed.below(8);
        std::fs::write(&record, &bytes).unwrap();
        let store = bed.open();
        // Another name that means an image that is here is as good a record as any.
        for image in store.list().unwrap() {
            assert!(store.find(&image.reference).unwrap().is_some(), "byte {at}");
        }
        drop(store);
        std::fs::write(&record, &good).unwrap();
    }
    assert_eq!(bed.open().list().unwrap().len(), 1);
}
