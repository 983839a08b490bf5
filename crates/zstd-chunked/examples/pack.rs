//! Packs a tar archive: `pack ARCHIVE BLOB [LEVEL [THREADS]]`.

use std::{fs::File, io::BufWriter, time::Instant};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [archive, blob, rest @ ..] = &arguments[..] else {
        return Err("pack ARCHIVE BLOB [LEVEL [THREADS]]".into());
    };
    let mut options = zstd_chunked::Options::default();
    if let Some(level) = rest.first() {
        options.level = level.parse()?;
    }
    if let Some(threads) = rest.get(1) {
        options.threads = threads.parse()?;
    }
    let start = Instant::now();
    let packed = zstd_chunked::pack(File::open(archive)?, BufWriter::new(File::create(blob)?), &options)?;
    println!("{packed:#?}\n{:?}", start.elapsed());
    for (key, value) in packed.annotations.iter().flat_map(|annotations| annotations.to_map()) {
        println!("{key}={value}");
    }
    Ok(())
}
