//! Refuses to build with an eBPF object that isn't the sources' own.

#[path = "sources.rs"]
mod sources;

use std::{fmt::Write as _, fs, path::Path, process::exit};

use sha2::{Digest as _, Sha256};

fn main() {
    let loader = Path::new(env!("CARGO_MANIFEST_DIR"));
    for path in [
        "build.rs",
        "sources.rs",
        "manifest.json",
        "anyplace.bpf.o",
        "../common",
        "../programs/src",
        "../programs/Cargo.toml",
        "../programs/Cargo.lock",
    ] {
        println!("cargo::rerun-if-changed={path}");
    }
    if let Err(reason) = check(loader) {
        println!("cargo::error={reason}: run `cargo xtask ebpf` to rebuild it, and commit the result");
        exit(1);
    }
}

fn check(loader: &Path) -> Result<(), String> {
    let ebpf = loader.parent().ok_or("the loader has no parent folder")?;
    let read =
        |name: &str| fs::read(loader.join(name)).map_err(|error| format!("ebpf/loader/{name}: {error}"));
    let manifest = String::from_utf8_lossy(&read("manifest.json")?).into_owned();
    let sources =
        sources::canonical(ebpf).map_err(|error| format!("the eBPF sources can't be read: {error}"))?;
    for (what, name, bytes) in [
        (
            "the eBPF sources have changed since ebpf/loader/anyplace.bpf.o was built",
            "sources_sha256",
            sources,
        ),
        (
            "ebpf/loader/anyplace.bpf.o is not the object that manifest.json describes",
            "object_sha256",
            read("anyplace.bpf.o")?,
        ),
    ] {
        let expected =
            sources::field(&manifest, name).ok_or_else(|| format!("manifest.json has no {name}"))?;
        let found = hex(&Sha256::digest(&bytes));
        if found != expected {
            return Err(format!("{what} ({name} is {found}, the manifest says {expected})"));
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
