//! Archives and tables from strangers, as ordinary layers and as zstd:chunked ones.

use tar::EntryType;
use zstd_chunked::{Annotations, Toc};

use super::super::testing::{Bed, Format, Member, Seed, archive};
use super::*;

const LINK: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;
/// Damaged archives that are tried.
const DAMAGED: usize = 400;

/// Pulls one layer and requires that it is refused, with nothing listed and nothing left.
fn refused(bed: &Bed, store: &Store, tar: &[u8], format: Format) -> Error {
    bed.server.put_image("bad", &[(tar.to_vec(), format)]);
    let error = bed.pull(store, "bad").unwrap_err();
    assert!(!store.has(&"app:bad".parse().unwrap()));
    store.collect().unwrap();
    bed.assert_tidy(store);
    assert_eq!(std::fs::read_dir(bed.dir.path()).unwrap().count(), 1, "nothing beside the store");
    error
}

#[test]
fn names_that_lead_outside_are_refused() {
    let bed = Bed::new();
    let store = bed.open();
    for name in ["../canary", "x/../../canary", "..", "a/.."] {
        for format in [Format::Plain, Format::Gzip] {
            let error = refused(&bed, &store, &archive(&[Member::file(name, b"dead")]), format);
            assert!(matches!(error, Error::UnsafeEntry { .. }), "{name}: {error}");
        }
    }
    for target in ["../canary", "../../../canary", "canary", "/canary", "up/canary", ""] {
        let members = [Member::new(LINK, "up", "../..", b""), Member::new(HARD, "x", target, b"")];
        let error = refused(&bed, &store, &archive(&members), Format::Zstd);
        assert!(matches!(error, Error::UnsafeEntry { .. }), "{target}: {error}");
    }
    for name in [".wh...", ".wh..", ".wh."] {
        refused(&bed, &store, &archive(&[Member::file(name, b"")]), Format::Plain);
    }
    let root_file = refused(&bed, &store, &archive(&[Member::file("./", b"x")]), Format::Plain);
    assert!(matches!(root_file, Error::UnsafeEntry { .. }), "{root_file}");
}

#[test]
fn links_and_devices_of_an_image_lead_nowhere_else() {
    let bed = Bed::new();
    let store = bed.open();
    let members = [
        Member::new(LINK, "root", "/", b""),
        Member::file("root/one", b"1"),
        Member::new(LINK, "up", "../../..", b""),
        Member::file("up/two", b"2"),
        Member::new(LINK, "out", "/tmp", b""),
        Member::dir("tmp"),
        Member::file("out/three", b"3"),
        Member::file("/four", b"4"),
        Member::new(LINK, "file", "../../canary", b""),
        Member::file("file", b"5"),
        Member::new(EntryType::Char, "null", "", b""),
    ];
    bed.server.put_image("odd", &[(archive(&members), Format::Gzip)]);
    let image = bed.pull(&store, "odd").unwrap();
    bed.mounted(&image, |root| {
        for (path, contents) in [("one", "1"), ("two", "2"), ("tmp/three", "3"), ("four", "4"), ("file", "5")]
        {
            assert_eq!(std::fs::read_to_string(root.join(path)).unwrap(), contents);
        }
        let null = std::fs::metadata(root.join("null")).unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::rdev(&null), nix::sys::stat::makedev(1, 3));
    });
    assert_eq!(std::fs::read_dir(bed.dir.path()).unwrap().count(), 1);
}

#[test]
fn bombs_are_refused_before_they_fill_anything() {
    let bed = Bed::new();
    let store = bed.open();
    // A header that says 8 EiB, and one that says more than is accepted of a layer of its size.
    for size in [0x7fff_ffff_ffff_fe00_u64, 100 << 30] {
        let mut tar = archive(&[Member::file("huge", b"")]);
        let mut header = tar::Header::new_gnu();
        header.set_path("huge").unwrap();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_cksum();
        tar[..512].copy_from_slice(header.as_bytes());
        let error = refused(&bed, &store, &tar, Format::Plain);
        assert!(matches!(error, Error::LayerLimit { .. }), "{error}");
    }
    // 1,000,001 entries.
    let mut tar = Vec::new();
    let one = archive(&[Member::dir("d")]);
    for _ in 0..=1_000_000 {
        tar.extend_from_slice(&one[..512]);
    }
    let error = refused(&bed, &store, &tar, Format::Zstd);
    assert!(matches!(error, Error::LayerLimit { what: "entries", .. }), "{error}");
    // A gzip stream that never ends well, and one that is cut off.
    let good = archive(&[Member::file("f", &[7; 5_000])]);
    for len in [600, 3_000, 5_000] {
        let error = refused(&bed, &store, &good[..len], Format::Plain);
        assert!(matches!(error, Error::InvalidLayer { .. }), "{error}");
    }
}

/// Makes a table lie; the digest is of something else.
type Change = fn(&mut Toc, zstd_chunked::Digest);

/// Puts a chunked layer whose table was changed by `change`, with annotations that fit it.
fn put_changed(bed: &Bed, tar: &[u8], change: impl FnOnce(&mut Toc)) {
    let layer = bed.server.put_layer(tar, Format::Chunked);
    let annotations = Annotations::from_map(layer.annotations.as_ref().unwrap()).unwrap().unwrap();
    let path = format!("/v2/app/blobs/{}", layer.digest);
    let mut blob = bed.server.get(&path);
    let toc = annotations.positions.toc;
    let raw =
        zstd::bulk::decompress(&blob[toc.offset as usize..][..toc.length as usize], toc.raw_length as usize);
    let mut table: Toc = Toc::from_json(&raw.unwrap(), &zstd_chunked::Limits::default()).unwrap();
    change(&mut table);
    let raw = serde_json::to_vec(&table).unwrap();
    let packed = zstd::bulk::compress(&raw, 1).unwrap();
    let split = annotations.positions.tar_split;
    let tar_split = blob[split.offset as usize..][..split.length as usize].to_vec();
    blob.truncate(toc.offset as usize - 8);
    let mut section = |bytes: &[u8]| {
        blob.extend_from_slice(&[0x50, 0x2a, 0x4d, 0x18]);
        blob.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        blob.extend_from_slice(bytes);
    };
    section(&packed);
    section(&tar_split);
    let mut changed = annotations;
    changed.checksum = zstd_chunked::Digest::of(&packed);
    changed.positions.toc.length = packed.len() as u64;
    changed.positions.toc.raw_length = raw.len() as u64;
    changed.positions.tar_split.offset = toc.offset + packed.len() as u64 + 8;
    let mut described = bed.server.put_blob(&layer.media_type, blob);
    described.annotations = Some(changed.to_map());
    bed.server.put_manifest("bad", vec![described], vec![Digest::of(tar)]);
}

#[test]
fn tables_that_lie_are_refused() {
    let (bed, mut seed) = (Bed::new(), Seed::new());
    let store = bed.open();
    let tar = archive(&[
        Member::dir("d"),
        Member::file("d/a", &seed.bytes(20_000)),
        Member::file("d/b", &seed.bytes(30_000)),
        Member::file("large", &seed.bytes(3 << 20)),
        Member::new(LINK, "l", "d/a", b""),
    ]);
    put_changed(&bed, &tar, |_| {});
    bed.pull(&store, "bad").unwrap();
    store.remove(&"app:bad".parse().unwrap()).unwrap();
    // More than is accepted of a table: the archive itself is asked, and it is fine.
    put_changed(&bed, &tar, |toc| toc.entries[1].size = u64::MAX);
    let image = bed.pull(&store, "bad").unwrap();
    assert!(image.stats.bytes_fetched > image.stats.layer_bytes);
    drop(image);
    store.remove(&"app:bad".parse().unwrap()).unwrap();
    let other = zstd_chunked::Digest::of(b"other");
    let changes: [(&str, Change); 13] = [
        ("a file's size", |toc, _| toc.entries[1].size += 1),
        ("a file's digest", |toc, other| toc.entries[1].digest = Some(other)),
        ("digests exchanged", |toc, _| {
            let (a, b) = (toc.entries[1].digest, toc.entries[2].digest);
            (toc.entries[1].digest, toc.entries[2].digest) = (b, a);
        }),
        ("a large file's digest", |toc, other| toc.entries[3].digest = Some(other)),
        ("a chunk's size", |toc, _| toc.entries[4].chunk_size -= 1),
        ("an offset", |toc, _| toc.entries[2].offset += 3),
        ("an end", |toc, _| toc.entries[2].end_offset += 1 << 40),
        ("an overlap", |toc, _| toc.entries[2].offset = toc.entries[1].offset),
        ("a name outside", |toc, _| toc.entries[1].name = "../../canary".into()),
        ("another name", |toc, _| toc.entries[1].name = "d/c".into()),
        ("a mode", |toc, _| toc.entries[1].mode = 0o4755),
        ("a link", |toc, _| toc.entries.last_mut().unwrap().link_name = "/etc/shadow".into()),
        ("a missing entry", |toc, _| drop(toc.entries.pop())),
    ];
    for (what, change) in changes {
        put_changed(&bed, &tar, |toc| change(toc, other));
        let error = bed.pull(&store, "bad").expect_err(what);
        let named = matches!(
            error,
            Error::Table(_)
                | Error::DigestMismatch { .. }
                | Error::SizeMismatch { .. }
                | Error::InvalidLayer { .. }
                | Error::LayerLimit { .. }
                | Error::UnsafeEntry { .. }
        );
        assert!(named, "{what}: {error:?}");
        store.collect().unwrap();
        bed.assert_tidy(&store);
        assert_eq!(std::fs::read_dir(bed.dir.path()).unwrap().count(), 1, "{what}");
    }
}

#[test]
fn damaged_archives_neither_panic_nor_lead_outside() {
    let (bed, mut seed) = (Bed::in_memory(), Seed::new());
    let store = bed.open();
    let pax = Member::new(EntryType::XHeader, "pax", "", b"13 path=l/up\n12 size=400\n");
    let whole = archive(&[
        Member::dir("d"),
        Member::file("d/f", &[1; 700]),
        Member::new(LINK, "l", "../../..", b""),
        pax,
        Member::file("x", &[2; 400]),
        Member::new(HARD, "h", "d/f", b""),
        Member::file("d/.wh.gone", b""),
    ]);
    for round in 0..DAMAGED {
        let mut damaged = whole.clone();
        for _ in 0..1 + seed.below(4) {
            let at = seed.below(damaged.len());
            damaged[at] = [b'.', b'/', 0, 0xff, b'7', seed.next() as u8][seed.below(6)];
        }
        // The checksum is put right, so that the damage gets past it.
        for block in damaged.chunks_mut(512).filter(|block| &block[257..262] == b"ustar") {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        bed.server.put_image("bad", &[(damaged, Format::Plain)]);
        let _ = bed.pull(&store, "bad");
        assert_eq!(std::fs::read_dir(bed.dir.path()).unwrap().count(), 1, "round {round}");
    }
    if store.has(&"app:bad".parse().unwrap()) {
        store.remove(&"app:bad".parse().unwrap()).unwrap();
    }
    store.collect().unwrap();
    bed.assert_tidy(&store);
}
