//! Every kind of archive goes in and comes out, byte by byte, by way of the table, and as plain zstd.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy only exempts functions marked as tests")]

#[path = "support/archive.rs"]
mod archive;
#[path = "support/layer.rs"]
mod layer;

use archive::{Archive, Member};
use layer::{packed, packed_with, round_trip, section, tables};
use zstd_chunked::{Digest, EntryType, Options, SpanKind, Time, pack};

fn noise(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(size)
    .collect()
}

/// All kinds of members, as usual tools write them.
fn everything() -> Vec<u8> {
    let mut archive = Archive::default();
    archive
        .dir("./")
        .dir("./bin/")
        .file("./bin/tool", &noise(5_000, 1))
        .file("./empty", b"")
        .file("./block", &[7; 512])
        .link(b'1', "./bin/hard", "./bin/tool")
        .link(b'2', "./bin/soft", "../../etc/<passwd>&\u{e9}")
        .add(&Member { kind: b'3', name: b"./null", device: (1, 3), ..Member::default() })
        .add(&Member { kind: b'4', name: b"./disk", device: (8, 0), ..Member::default() })
        .add(&Member { kind: b'6', name: b"./pipe", ..Member::default() })
        .long(b'L', &format!("./{}", "long/".repeat(60)))
        .add(&Member { kind: b'5', name: b"./long", gnu: true, ..Member::default() })
        .long(b'K', &"t".repeat(300))
        .add(&Member { kind: b'2', name: b"./far", link: b"ttt", gnu: true, ..Member::default() })
        .pax(
            b'x',
            &[
                ("path", "./p\u{e4}x".as_bytes()),
                ("mtime", b"1700000001.25"),
                ("atime", b"5"),
                ("size", b"3"),
            ],
        )
        .add_with(&Member { name: b"./x", content: b"abc", ..Member::default() }, |block| {
            block[124..136].fill(b'0')
        })
        .pax(
            b'x',
            &[("SCHILY.xattr.security.capability", b"\x01\0\0\x02\0"), ("uid", b"3000000"), ("comment", b"")],
        )
        .file("./bin/ping", b"caps")
        .add_with(&Member { name: b"./big-id", gnu: true, ..Member::default() }, |block| {
            block[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff]);
        })
        .add_with(&Member { name: b"name", ..Member::default() }, |block| {
            block[345..351].copy_from_slice(b"prefix")
        });
    archive.end()
}

#[test]
fn all_kinds_of_members() {
    let (packed, layer) = round_trip(&everything());
    let layer = layer.unwrap();
    assert_eq!(packed.stats.members, 16);
    assert_eq!(layer.files.len(), 7);
    let entry = |name: &str| {
        layer.toc.entries.iter().find(|entry| entry.name == name).unwrap_or_else(|| panic!("{name}"))
    };
    assert_eq!(layer.files["./p\u{e4}x"], b"abc");
    assert_eq!(entry("./p\u{e4}x").mod_time, Some(Time { secs: 1_700_000_001, nanos: 250_000_000 }));
    assert_eq!(entry("./p\u{e4}x").access_time, Some(Time { secs: 5, nanos: 0 }));
    assert_eq!(entry("./bin/ping").xattrs["security.capability"], b"\x01\0\0\x02\0");
    assert_eq!((entry("./bin/ping").uid, entry("./bin/ping").gid), (3_000_000, 1_001));
    assert_eq!(entry("./big-id").uid, 0x7fff_ffff);
    assert_eq!((entry("./disk").kind, entry("./disk").dev_major), (EntryType::Block, 8));
    assert_eq!(entry("./far").link_name, "t".repeat(300));
    assert_eq!(entry("./bin/soft").link_name, "../../etc/<passwd>&\u{e9}");
    assert_eq!(entry("prefix/name").path().unwrap(), "prefix/name");
    assert_eq!(entry("./").path().unwrap(), "");
    assert!(entry("./empty").digest.is_none());
}

#[test]
fn ends_of_archives() {
    let mut archive = Archive::default();
    archive.file("a", b"content");
    for end in [0, 512, 1024, 1536, 10_240, 3 << 20] {
        let mut tar = archive.bytes.clone();
        tar.resize(tar.len() + end, 0);
        assert!(round_trip(&tar).1.is_some(), "{end} zeros");
    }
    assert!(round_trip(&[]).1.is_some());
    assert!(round_trip(&[0; 1024]).1.is_some());
}

#[test]
fn large_files_are_cut_with_zeros_apart() {
    let mut content = noise(3 << 20, 3);
    content[1 << 20..(1 << 20) + 300_000].fill(0);
    content[2_500_000..2_500_900].fill(0);
    content.extend_from_slice(&[0; 70_000]);
    content.extend(noise(1 << 20, 4));
    content.extend_from_slice(&vec![0; 5 << 20]);
    let mut archive = Archive::default();
    archive.file("large", &content).file("zeros", &vec![0; 9 << 20]).file("constant", &vec![1; 5 << 20]);
    let (packed, layer) = round_trip(&archive.end());
    let layer = layer.unwrap();
    let files: Vec<_> = layer.toc.files().collect();
    let zeros: u64 = files[0].chunks().filter(|chunk| chunk.zeros).map(|chunk| chunk.size).sum();
    assert_eq!(zeros, 300_000 + 70_000 + (5 << 20));
    assert!(files[0].chunk_count() > 8);
    // A single chunk has no type of its own.
    assert_eq!(files[1].chunk_count(), 1);
    assert!(files[2].chunks().all(|chunk| chunk.size <= 2 << 20));
    assert_eq!(packed.stats.zeros, zeros + (9 << 20));
}

#[test]
fn a_change_moves_few_chunks() {
    let content = noise(24 << 20, 5);
    let mut changed = content.clone();
    changed.splice(5_000_000..5_000_000, *b"inserted");
    changed[15_000_000..15_100_000].fill(9);
    let digests = |content: &[u8]| {
        let layer = round_trip(&Archive::default().file("f", content).end()).1.unwrap();
        let file = layer.toc.files().next().unwrap();
        file.chunks().map(|chunk| (chunk.digest, chunk.size)).collect::<Vec<_>>()
    };
    let old: std::collections::HashSet<_> = digests(&content).into_iter().collect();
    let new = digests(&changed);
    let fetched: u64 = new.iter().filter(|chunk| !old.contains(chunk)).map(|(_, size)| size).sum();
    assert!(fetched < 4 << 20, "{fetched} bytes");
}

#[test]
fn spans_cover_the_blob_and_equal_ones_have_equal_bytes() {
    let large = noise(6 << 20, 6);
    let mut changed = large.clone();
    changed[3_000_000..3_000_010].fill(1);
    let version = |large: &[u8], small: &[u8]| {
        let mut archive = Archive::default();
        for number in 0..20 {
            archive.file(&number.to_string(), &noise(1 + 100 * number, 9));
        }
        archive
            .link(b'2', "link", "target")
            .file("v/large", large)
            .dir("v/dir")
            .file("v/empty", b"")
            .file("v/small", small);
        archive.file("v/zeros", &[0; 100_000]).file("v/same", b"same");
        let (blob, packed) = packed(&archive.end());
        let annotations = packed.annotations.unwrap();
        let (toc, tar_split) = tables(&blob, &annotations).unwrap();
        let (mut spans, end) = (Vec::new(), annotations.positions.data_end());
        tar_split.spans(&toc, end, |span| spans.push(span)).unwrap();
        let mut at = 0;
        for span in &spans {
            assert_eq!(span.range.start, at);
            at = span.range.end;
            let decoded = zstd::stream::decode_all(section(&blob, span.range.clone()).unwrap()).unwrap();
            assert!(span.kind == SpanKind::Between || span.digest == Digest::of(&decoded));
        }
        assert_eq!(at, end);
        (blob, spans)
    };
    let (old, new) = (version(&large, b"small"), version(&changed, b"other"));
    let known: std::collections::HashMap<_, _> =
        old.1.iter().map(|span| ((span.kind, span.digest), span.range.clone())).collect();
    let (mut same, mut different) = (0, 0);
    for span in &new.1 {
        match known.get(&(span.kind, span.digest)) {
            Some(range) => {
                assert!(section(&old.0, range.clone()) == section(&new.0, span.range.clone()), "{span:?}");
                same += 1;
            }
            None => different += 1,
        }
    }
    // The chunks of the change, and the small file; no header differs.
    assert!(same > 30 && (2..=4).contains(&different), "{same} {different}");
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let mut archive = Archive { bytes: everything() };
    archive.bytes.truncate(archive.bytes.len() - 1024);
    while archive.bytes.ends_with(&[0; 512]) {
        archive.bytes.truncate(archive.bytes.len() - 512);
    }
    for index in 0..300 {
        archive.file(&format!("many/{index}"), &noise(index * 37, index as u64));
    }
    archive.file("large", &noise(12 << 20, 6)).file("zeros", &vec![0; 3 << 20]);
    let tar = archive.end();
    let (one, packed) = packed_with(&tar, 1);
    assert!(packed.annotations.is_some(), "{:?}", packed.plain);
    for threads in [2, 8] {
        assert!(packed_with(&tar, threads) == (one.clone(), packed.clone()), "{threads} threads");
    }
}

#[test]
fn what_a_table_cannot_hold_becomes_a_plain_layer() {
    let file = |name: &'static [u8]| Member { name, content: b"content", ..Member::default() };
    let cases: Vec<(&str, Archive)> = vec![
        ("UTF-8", Archive::default().add(&file(b"caf\xe9")).clone()),
        ("twice", Archive::default().file("a", b"1").file("./a", b"2").clone()),
        ("`..`", Archive::default().file("a/../../b", b"1").clone()),
        ("global", Archive::default().pax(b'g', &[("comment", b"c")]).file("a", b"1").clone()),
        ("hard link", Archive::default().link(b'1', "a", "elsewhere").clone()),
        ("below", Archive::default().link(b'2', "a", "/etc").file("a/b", b"1").clone()),
        ("root", Archive::default().file(".", b"").clone()),
        ("unusual", Archive::default().add(&Member { kind: b'7', ..file(b"a") }).clone()),
        ("slash", Archive::default().file("a/", b"1").clone()),
        ("out of range", Archive::default().pax(b'x', &[("uid", b"-1")]).file("a", b"1").clone()),
        ("out of range", Archive::default().pax(b'x', &[("mtime", b"999999999999")]).file("a", b"1").clone()),
        (
            "no content",
            Archive::default()
                .add_with(&Member { kind: b'5', name: b"a/", ..Member::default() }, |block| block[134] = b'7')
                .clone(),
        ),
    ];
    for (why, archive) in cases {
        let (packed, _) = round_trip(&archive.end());
        let plain = packed.plain.unwrap_or_else(|| panic!("{why}: has a table"));
        assert!(plain.contains(why), "{why}: {plain}");
    }
    let mut tar = Archive::default().file("a", b"1").end();
    tar.extend_from_slice(b"more");
    assert!(round_trip(&tar).0.plain.is_some());
}

#[test]
fn broken_archives_are_refused() {
    let whole = Archive::default().file("a", &[1; 3_000]).file("large", &noise(2 << 20, 1)).bytes.clone();
    let refused = |tar: &[u8]| pack(tar, std::io::sink(), &Options::default()).unwrap_err().to_string();
    for length in [1, 511, 513, 2_000, 3_600, 4_000, 10_000, 1 << 20, whole.len() - 1] {
        assert!(refused(&whole[..length]).contains("tar archive"), "{length}");
    }
    assert!(refused(&noise(2048, 1)).contains("checksum"));
    let sparse = Archive::default().add(&Member { kind: b'S', gnu: true, ..Member::default() }).end();
    assert!(refused(&sparse).contains("sparse"));
    let sparse = Archive::default().pax(b'x', &[("GNU.sparse.major", b"1")]).file("a", b"").end();
    assert!(refused(&sparse).contains("sparse"));
    let huge = Archive::default()
        .add_with(&Member { kind: b'x', ..Member::default() }, |block| {
            block[124..135].copy_from_slice(b"77777777777")
        })
        .end();
    assert!(refused(&huge).contains("limit"));
    let endless = Archive::default().pax(b'x', &[("a", &vec![b'x'; 1_000_000])]).bytes.repeat(10);
    assert!(refused(&endless).contains("limit"));
}
