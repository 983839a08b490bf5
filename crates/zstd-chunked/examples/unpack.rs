//! Takes a blob apart by its table of contents, and proves that nothing is missing: `unpack BLOB ANNOTATIONS.json`.
//!
//! ANNOTATIONS.json holds the `annotations` of the layer's descriptor. Prints each file with its chunks, and the layer's
//! diff id.

use std::{collections::HashMap, fs};

use zstd_chunked::{Annotations, ChunkDecoder, Limits, read_tar_split, read_toc};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [blob, annotations] = &arguments[..] else { return Err("unpack BLOB ANNOTATIONS.json".into()) };
    let blob = fs::read(blob)?;
    let annotations = Annotations::from_map(&serde_json::from_slice(&fs::read(annotations)?)?)?
        .ok_or("these are no annotations of a zstd:chunked layer")?;
    let limits = Limits::default();
    annotations.positions.check(&limits)?;

    // A puller fetches these two ranges first, with one request.
    let range = |range: std::ops::Range<u64>| {
        blob.get(range.start as usize..range.end as usize).ok_or("blob too short")
    };
    let toc = read_toc(range(annotations.positions.toc.range())?, &annotations, &limits)?;
    let tar_split = range(annotations.positions.tar_split.range())?.to_vec();
    let tar_split = read_tar_split(tar_split, &toc, &annotations, &limits)?;
    tar_split.check(&toc)?;

    let (mut decoder, mut bytes, mut contents) = (ChunkDecoder::new()?, Vec::new(), HashMap::new());
    for file in toc.files() {
        let mut content = Vec::new();
        for chunk in file.chunks() {
            // A puller asks its store for `chunk.digest` first, and makes a hole of `chunk.zeros`.
            decoder.decode(range(chunk.range.clone())?, &chunk, &mut bytes)?;
            content.extend_from_slice(&bytes);
        }
        println!("{} ({} bytes, {} chunks)", file.entry.path()?, content.len(), file.chunk_count());
        contents.insert(file.entry.name.clone(), content);
    }
    let mut tar = Vec::new();
    tar_split
        .write_tar(|name| contents.get(name).map(|content| &content[..]).ok_or_else(missing), &mut tar)?;
    println!("diff id {}", zstd_chunked::Digest::of(&tar));
    Ok(())
}

fn missing() -> std::io::Error {
    std::io::ErrorKind::NotFound.into()
}
