//! What the committed object was built from, as one stream of bytes to hash.
//!
//! Shared by `build.rs`, which compares it with `manifest.json`, and by `cargo xtask ebpf`, which writes that file.
//! Standard library only.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The files that the object depends on, relative to `ebpf/`, sorted.
pub(crate) fn files(ebpf: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = ["common/Cargo.toml", "programs/Cargo.toml", "programs/Cargo.lock"]
        .into_iter()
        .map(PathBuf::from)
        .collect();
    for folder in ["common/src", "programs/src"] {
        for entry in fs::read_dir(ebpf.join(folder))? {
            found.push(Path::new(folder).join(entry?.file_name()));
        }
    }
    found.sort();
    Ok(found)
}

/// All files, each as path, length and content.
pub(crate) fn canonical(ebpf: &Path) -> io::Result<Vec<u8>> {
    let mut stream = Vec::new();
    for file in files(ebpf)? {
        let content = fs::read(ebpf.join(&file))?;
        stream.extend(format!("{}\n{}\n", file.display(), content.len()).bytes());
        stream.extend(content);
    }
    Ok(stream)
}

/// A text field of `manifest.json`, which is flat and written by ourselves.
pub(crate) fn field<'a>(manifest: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = manifest.split_once(&format!("\"{name}\": \""))?;
    rest.split_once('"').map(|(value, _)| value)
}
