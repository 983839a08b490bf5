//! Packs and takes apart again, as a puller would.
#![allow(dead_code, reason = "not every test binary uses all of it")]

use std::{collections::BTreeMap, io::Read};

use zstd_chunked::{
    Annotations, ChunkDecoder, Digest, Limits, Options, Packed, TarSplit, Toc, pack, read_plain,
    read_tar_split, read_toc,
};

/// Packs with two threads.
pub(crate) fn packed(tar: &[u8]) -> (Vec<u8>, Packed) {
    packed_with(tar, 2)
}

pub(crate) fn packed_with(tar: &[u8], threads: usize) -> (Vec<u8>, Packed) {
    let mut blob = Vec::new();
    let packed = pack(tar, &mut blob, &Options { threads, ..Options::default() }).unwrap();
    (blob, packed)
}

/// A layer that was read.
#[derive(Debug, PartialEq)]
pub(crate) struct Layer {
    pub(crate) toc: Toc,
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    pub(crate) tar: Vec<u8>,
}

pub(crate) fn section(blob: &[u8], range: std::ops::Range<u64>) -> Option<&[u8]> {
    blob.get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
}

fn missing() -> zstd_chunked::Error {
    zstd_chunked::Error::Io { what: "reading the blob", source: std::io::ErrorKind::UnexpectedEof.into() }
}

pub(crate) fn tables(blob: &[u8], annotations: &Annotations) -> zstd_chunked::Result<(Toc, TarSplit)> {
    let limits = Limits::default();
    annotations.positions.check(&limits)?;
    let toc = section(blob, annotations.positions.toc.range()).ok_or_else(missing)?;
    let toc = read_toc(toc, annotations, &limits)?;
    let tar_split = section(blob, annotations.positions.tar_split.range()).ok_or_else(missing)?;
    let tar_split = read_tar_split(tar_split.to_vec(), &toc, annotations, &limits)?;
    tar_split.check(&toc)?;
    Ok((toc, tar_split))
}

/// Everything that a puller does: tables, each chunk by its range alone, each file's digest, the archive.
pub(crate) fn read_layer(blob: &[u8], annotations: &Annotations) -> zstd_chunked::Result<Layer> {
    let (toc, tar_split) = tables(blob, annotations)?;
    let mut decoder = ChunkDecoder::new()?;
    let mut files = BTreeMap::new();
    for file in toc.files() {
        let mut content = Vec::new();
        for chunk in file.chunks() {
            assert_eq!(chunk.file_offset, content.len() as u64);
            let frame = section(blob, chunk.range.clone()).ok_or_else(missing)?;
            let mut bytes = Vec::new();
            decoder.decode(frame, &chunk, &mut bytes)?;
            let mut streamed = Vec::new();
            decoder.stream(frame, &chunk, &mut streamed)?;
            assert_eq!(bytes, streamed);
            assert!(!chunk.zeros || bytes.iter().all(|&byte| byte == 0));
            content.extend_from_slice(&bytes);
        }
        if let Some(expected) = file.entry.digest {
            let found = Digest::of(&content);
            if found != expected {
                return Err(zstd_chunked::Error::Digest { what: file.entry.name.clone(), found, expected });
            }
        }
        files.insert(file.entry.name.clone(), content);
    }
    let mut tar = Vec::new();
    tar_split.write_tar(|name| Ok(&files[name][..]), &mut tar)?;
    Ok(Layer { toc, files, tar })
}

/// Packs, reads back, and requires that the archive is the same for pullers and for plain zstd.
pub(crate) fn round_trip(tar: &[u8]) -> (Packed, Option<Layer>) {
    let (blob, packed) = packed(tar);
    assert_eq!(packed.size, blob.len() as u64);
    assert_eq!(packed.digest, Digest::of(&blob));
    assert_eq!(packed.diff_id, Digest::of(tar));
    assert_eq!(packed.tar_size, tar.len() as u64);
    let mut plain = Vec::new();
    read_plain(&blob[..]).unwrap().read_to_end(&mut plain).unwrap();
    assert!(plain == tar, "plain zstd gives another archive");
    let layer = packed.annotations.map(|annotations| {
        let footer: &[u8; 64] = blob.last_chunk().unwrap();
        assert_eq!(zstd_chunked::Footer::parse(footer).unwrap().positions, annotations.positions);
        let layer = read_layer(&blob, &annotations).unwrap();
        assert!(layer.tar == tar, "the tar-split gives another archive");
        layer
    });
    assert_eq!(packed.plain.is_none(), layer.is_some());
    (packed, layer)
}
