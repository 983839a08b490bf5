//! Layers that were made to harm: each is refused with a reason, within bounds.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy only exempts functions marked as tests")]

#[path = "support/archive.rs"]
mod archive;
#[path = "support/layer.rs"]
mod layer;

use std::io::{Cursor, Write};

use archive::Archive;
use layer::{packed, read_layer, tables};
use serde_json::{Value, json};
use zstd_chunked::{
    Annotations, Chunk, ChunkDecoder, Digest, Limits, Positions, Section, Toc, read_tar_split, read_toc,
};

/// Where the frames end in these tests.
const DATA_END: u64 = 1_000_000;

fn annotations_for(compressed: &[u8], raw_length: u64) -> Annotations {
    let toc = Section { offset: DATA_END + 8, length: compressed.len() as u64, raw_length };
    let tar_split = Section { offset: toc.range().end + 8, length: 10, raw_length: 10 };
    Annotations { checksum: Digest::of(compressed), positions: Positions { toc, tar_split } }
}

fn read(json: &str) -> Result<Toc, String> {
    let compressed = zstd::bulk::compress(json.as_bytes(), 1).unwrap();
    let annotations = annotations_for(&compressed, json.len() as u64);
    read_toc(&compressed, &annotations, &Limits::default()).map_err(|error| error.to_string())
}

fn read_entries(entries: Value) -> Result<Toc, String> {
    read(&json!({"version": 1, "entries": entries}).to_string())
}

fn digest(byte: u8) -> String {
    Digest([byte; 32]).to_string()
}

fn file(name: &str, size: u64, offset: u64, end: u64) -> Value {
    json!({"type": "reg", "name": name, "size": size, "digest": digest(1), "offset": offset, "endOffset": end})
}

/// A file of two chunks of 10 and 20 bytes.
fn two_chunks() -> Value {
    json!([
        {"type": "reg", "name": "f", "size": 30, "digest": digest(1), "offset": 100, "endOffset": 200,
            "chunkSize": 10, "chunkDigest": digest(2)},
        {"type": "chunk", "name": "f", "offset": 150, "chunkSize": 20, "chunkOffset": 10, "chunkDigest": digest(3),
            "chunkType": "zeros"},
    ])
}

#[test]
fn honest_tables_are_accepted() {
    let toc = read_entries(two_chunks()).unwrap();
    let chunks: Vec<Chunk> = toc.files().next().unwrap().chunks().collect();
    assert_eq!((chunks[0].range.clone(), chunks[0].size, chunks[0].zeros), (100..150, 10, false));
    assert_eq!((chunks[1].range.clone(), chunks[1].size, chunks[1].zeros), (150..200, 20, true));
    read(r#"{"version":1,"entries":null}"#).unwrap();
    read(r#"{"version":1,"entries":[{"type":"dir","name":"./","new":[{"x":1}]}],"later":{}}"#).unwrap();
    read_entries(json!([file("a", 1, 1, DATA_END)])).unwrap();
}

#[test]
fn hostile_tables_are_refused() {
    let changed = |index: usize, key: &str, value: Value| {
        let mut entries = two_chunks();
        entries[index][key] = value;
        entries
    };
    let without = |index: usize, key: &str| {
        let mut entries = two_chunks();
        entries[index].as_object_mut().unwrap().remove(key);
        entries
    };
    let dir = |name: &str| json!({"type": "dir", "name": name});
    let link = |kind: &str, name: &str, target: &str| json!({"type": kind, "name": name, "linkName": target});
    let cases = [
        ("`..`", json!([dir("../etc")])),
        ("`..`", json!([dir("a/../../b")])),
        ("`..`", json!([file("a", 1, 10, 20), link("hardlink", "b", "../../etc/shadow")])),
        ("zero byte", json!([dir("a\0b")])),
        ("empty", json!([dir("")])),
        ("zero byte", json!([link("symlink", "a", "b\0")])),
        ("empty path", json!([link("symlink", "a", "")])),
        ("limit", json!([dir(&"n".repeat(5_000))])),
        ("limit", json!([link("symlink", "a", &"n".repeat(5_000))])),
        ("twice", json!([file("a", 1, 10, 20), file("./a", 1, 20, 30)])),
        ("twice", json!([dir("a/"), dir("/a")])),
        ("below", json!([link("symlink", "a", "/etc"), file("a/passwd", 1, 10, 20)])),
        ("not a folder", json!([file("a/b", 1, 10, 20), link("symlink", "a", "/etc")])),
        ("earlier", json!([link("hardlink", "a", "b"), link("hardlink", "b", "a")])),
        ("earlier", json!([link("hardlink", "a", "a")])),
        ("earlier", json!([dir("d"), link("hardlink", "a", "d")])),
        ("root", json!([file("/", 1, 10, 20)])),
        ("of the blob", json!([file("a", 1, 0, 20)])),
        ("of the blob", json!([file("a", 1, 20, 20)])),
        ("of the blob", json!([file("a", 1, 30, 20)])),
        ("of the blob", json!([file("a", 1, 10, DATA_END + 1)])),
        ("of the blob", json!([file("a", 1, 10, u64::MAX)])),
        ("of the blob", json!([file("a", 1, 10, 30), file("b", 1, 20, 40)])),
        ("limit", json!([file("a", u64::MAX, 10, 20)])),
        ("limit", json!([file("a", 10 << 40, 10, 20), file("b", 10 << 40, 20, 30)])),
        ("no digest", json!([{"type": "reg", "name": "a", "size": 1, "offset": 10, "endOffset": 20}])),
        ("no regular file", json!([{"type": "fifo", "name": "a", "digest": digest(1)}])),
        ("follows no", json!([{"type": "chunk", "name": "a"}])),
        ("has chunks", json!([dir("f"), two_chunks()[1].clone()])),
        ("has chunks", json!([{"type": "reg", "name": "f"}, two_chunks()[1].clone()])),
        ("30 bytes, and chunks of 31", changed(1, "chunkSize", json!(21))),
        ("expected one at", changed(1, "chunkOffset", json!(11))),
        ("expected one at", changed(1, "chunkOffset", json!(u64::MAX))),
        ("expected one at", changed(0, "chunkOffset", json!(1))),
        ("expected one at", changed(1, "chunkSize", json!(0))),
        ("of the blob", changed(1, "offset", json!(100))),
        ("of the blob", changed(1, "offset", json!(90))),
        ("of the blob", changed(1, "offset", json!(200))),
        ("another file", changed(1, "name", json!("g"))),
        ("another file", changed(1, "endOffset", json!(200))),
        ("another file", without(1, "chunkDigest")),
        ("no digest", without(0, "chunkDigest")),
        ("sha256", changed(1, "chunkDigest", json!("sha256:12"))),
        ("sha256", changed(0, "digest", json!(format!("sha512:{}", "0".repeat(128))))),
        ("chunkType", changed(1, "chunkType", json!("holes"))),
        ("unknown variant", json!([{"type": "socket", "name": "a"}])),
        ("invalid", json!([{"type": "dir", "name": "a", "mode": -1}])),
        ("invalid", json!([{"type": "dir", "name": "a", "uid": 1u64 << 32}])),
        ("base64", json!([{"type": "dir", "name": "a", "xattrs": {"user.a": "!"}}])),
        ("RFC 3339", json!([{"type": "dir", "name": "a", "modtime": "yesterday"}])),
    ];
    for (why, entries) in cases {
        let found = read_entries(entries.clone()).expect_err(&entries.to_string());
        let found = if why == "chunkType" { found.replace("unknown variant", "chunkType") } else { found };
        assert!(found.contains(why), "{entries}: {found:?}, expected {why:?}");
    }
    for json in [
        "",
        "{}",
        "[]",
        "{\"version\":2,\"entries\":[]}",
        "{\"version\":1,\"entries\":[]}x",
        "{\"version\":1}",
        "{\"version\":1,\"version\":1,\"entries\":[]}",
        "\u{0}",
        &"[".repeat(100_000),
    ] {
        assert!(read(json).is_err(), "{json:.40}");
    }
}

#[test]
fn a_million_entries_are_accepted_and_one_more_refused() {
    let mut json = String::from(r#"{"version":1,"entries":["#);
    for index in 0..Limits::ENTRIES {
        json.push_str(&format!(r#"{{"type":"fifo","name":"{index}"}},"#));
    }
    json.pop();
    let whole = format!("{json}]}}");
    assert_eq!(read(&whole).unwrap().entries.len(), Limits::ENTRIES);
    let error = read(&format!(r#"{json},{{"type":"fifo","name":"x"}}]}}"#)).unwrap_err();
    assert!(error.contains("limit of 1000000 entries"), "{error}");
}

/// Zeros, compressed.
fn bomb(size: u64) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    for _ in 0..size >> 20 {
        encoder.write_all(&[0; 1 << 20]).unwrap();
    }
    encoder.finish().unwrap()
}

#[test]
fn bombs_stop_at_the_length_that_was_announced() {
    let limits = Limits::default();
    let compressed = bomb(1 << 30);
    assert!(compressed.len() < 1 << 20);
    // Announced smaller than it is, then as large as it is.
    assert!(read_toc(&compressed, &annotations_for(&compressed, 1_000), &limits).is_err());
    let error = read_toc(&compressed, &annotations_for(&compressed, 1 << 30), &limits).unwrap_err();
    assert!(error.to_string().contains("limit"), "{error}");

    let mut annotations = annotations_for(b"", 0);
    let mut toc = read_entries(json!([])).unwrap();
    toc.tar_split_digest = Some(Digest::of(&compressed));
    annotations.positions.tar_split.raw_length = 5_000;
    let split = read_tar_split(compressed.clone(), &toc, &annotations, &limits).unwrap();
    assert!(split.check(&toc).is_err());
    assert!(split.write_tar(|_| Ok(&b""[..]), std::io::sink()).is_err());
    annotations.positions.tar_split.raw_length = limits.tar_split_bytes + 1;
    assert!(read_tar_split(compressed.clone(), &toc, &annotations, &limits).is_err());

    let mut decoder = ChunkDecoder::new().unwrap();
    for size in [0, 10, 1 << 20] {
        let chunk = Chunk { file_offset: 0, size, range: 0..1, digest: Digest([0; 32]), zeros: false };
        let mut out = Vec::new();
        assert!(decoder.decode(&compressed, &chunk, &mut out).is_err());
        assert!(out.capacity() < 2 << 20);
        let mut written = Cursor::new(Vec::new());
        assert!(decoder.stream(&compressed[..], &chunk, &mut written).is_err());
        assert!(written.into_inner().len() as u64 <= size);
    }
    // The context is still good after an error.
    let chunk = Chunk { file_offset: 0, size: 3, range: 0..1, digest: Digest::of(b"abc"), zeros: false };
    let mut out = Vec::new();
    decoder.decode(&zstd::bulk::compress(b"abc", 1).unwrap(), &chunk, &mut out).unwrap();
    assert_eq!(out, b"abc");
    for other in [&b"abd"[..], b"ab", b"abcd", b""] {
        assert!(decoder.decode(&zstd::bulk::compress(other, 1).unwrap(), &chunk, &mut out).is_err());
    }
}

/// A tar-split that tells of another layer than the table, although its digest is right.
#[test]
fn a_tar_split_that_disagrees_is_refused() {
    let mut archive = Archive::default();
    archive
        .dir("d/")
        .file("d/a", b"content of a")
        .link(b'2', "s", "d/a")
        .pax(b'x', &[("SCHILY.xattr.user.a", b"v")]);
    archive.file("b", b"content of b");
    let (blob, packed) = packed(&archive.end());
    let annotations = packed.annotations.unwrap();
    let (toc, tar_split) = tables(&blob, &annotations).unwrap();
    let lines = String::from_utf8(zstd::decode_all(tar_split.compressed()).unwrap()).unwrap();
    let check = |lines: &str, toc: &Toc| {
        let compressed = zstd::bulk::compress(lines.as_bytes(), 1).unwrap();
        let mut toc = toc.clone();
        toc.tar_split_digest = Some(Digest::of(&compressed));
        let mut annotations = annotations;
        annotations.positions.tar_split.raw_length = lines.len() as u64;
        annotations.positions.tar_split.length = compressed.len() as u64;
        read_tar_split(compressed, &toc, &annotations, &Limits::default())?.check(&toc)
    };
    check(&lines, &toc).unwrap();

    type Change<'a> = (&'a str, &'a dyn Fn(&mut Toc));
    let changes: [Change<'_>; 12] = [
        ("size", &|toc| toc.entries[1].size += 1),
        ("mode", &|toc| toc.entries[1].mode = 0o4755),
        ("owner", &|toc| toc.entries[1].uid = 0),
        ("owner", &|toc| toc.entries[1].gid = 7),
        ("times", &|toc| toc.entries[1].mod_time = None),
        ("link target", &|toc| toc.entries[2].link_name = "/etc/shadow".into()),
        ("type", &|toc| toc.entries[2].kind = zstd_chunked::EntryType::Hardlink),
        ("attributes", &|toc| toc.entries[3].xattrs.clear()),
        ("device", &|toc| toc.entries[1].dev_minor = 3),
        ("not in the table", &|toc| toc.entries[1].name = "d/c".into()),
        ("not in the table", &|toc| drop(toc.entries.remove(1))),
        ("missing", &|toc| toc.entries.push(zstd_chunked::Entry::new(zstd_chunked::EntryType::Fifo, "more"))),
    ];
    for (why, change) in changes {
        let mut toc = toc.clone();
        change(&mut toc);
        let error = check(&lines, &toc).unwrap_err().to_string();
        assert!(error.contains(why), "{why}: {error}");
    }
    for (old, new) in [
        (r#""name":"d/a","size":12"#, r#""name":"d/a","size":13"#),
        (r#""name":"d/a""#, r#""name":"b""#),
        (r#""type":1"#, r#""type":3"#),
        (r#""type":1"#, r#""type":2"#),
        (r#""payload":""#, r#""payload":"!"#),
        ("\n", ""),
    ] {
        assert!(check(&lines.replacen(old, new, 1), &toc).is_err(), "{new}");
    }
    // The archive's end lies in the last lines: zeros, which the diff id covers.
    for at in 0..8 {
        let fewer: Vec<&str> =
            lines.lines().enumerate().filter(|(index, _)| *index != at).map(|(_, line)| line).collect();
        assert!(check(&(fewer.join("\n") + "\n"), &toc).is_err(), "without line {at}");
    }
    assert!(check(&format!("{{\"type\":1,\"name\":\"{}\"}}\n", "x".repeat(10 << 20)), &toc).is_err());

    // Content of another size than the archive says.
    let layer = read_layer(&blob, &annotations).unwrap();
    for content in [&b"short"[..], b"longer than expected"] {
        let open = |name: &str| Ok(if name == "b" { content } else { &layer.files[name][..] });
        assert!(tar_split.write_tar(open, std::io::sink()).is_err());
    }
}
