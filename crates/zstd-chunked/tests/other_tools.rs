//! Layers of other tools are read, and ours are read by other tools.
//!
//! `fixtures/skopeo-1.18.blob` was written by skopeo 1.18 (Debian 13) with `--dest-compress-format zstd:chunked`; the JSON
//! beside it holds the annotations of its descriptor. It has a folder, a file, a hard link, a symlink, an empty file, a
//! file with runs of zeros (11 chunks), noise, a long name with an attribute and half a second, a device, a pipe, a large
//! uid.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy only exempts functions marked as tests")]

#[path = "support/archive.rs"]
mod archive;
#[path = "support/layer.rs"]
mod layer;

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use layer::{packed, read_layer, section};
use zstd_chunked::{Annotations, Digest, Footer};

const SKOPEO: &[u8] = include_bytes!("fixtures/skopeo-1.18.blob");
const SKOPEO_ANNOTATIONS: &str = include_str!("fixtures/skopeo-1.18.json");
const SKOPEO_DIFF_ID: &str = "sha256:774621357e87f23b0031e76616102124bd33b29d1992a691163e1f935703d01a";

fn skopeo_annotations() -> Annotations {
    Annotations::from_map(&serde_json::from_str(SKOPEO_ANNOTATIONS).unwrap()).unwrap().unwrap()
}

#[test]
fn reads_what_skopeo_writes() {
    let annotations = skopeo_annotations();
    assert_eq!(Footer::parse(SKOPEO.last_chunk().unwrap()).unwrap().positions, annotations.positions);
    let layer = read_layer(SKOPEO, &annotations).unwrap();
    assert_eq!(Digest::of(&layer.tar).to_string(), SKOPEO_DIFF_ID);
    let zeros = layer.toc.files().find(|file| file.entry.name == "zeros.img").unwrap();
    let sizes: Vec<_> = zeros.chunks().filter(|chunk| chunk.zeros).map(|chunk| chunk.size).collect();
    assert_eq!((zeros.chunk_count(), sizes), (11, vec![20_000, 5_001]));
}

/// The same archive packed by us: its tables have the very text that skopeo wrote, except where chunks lie.
#[test]
fn writes_what_skopeo_writes() {
    let annotations = skopeo_annotations();
    let theirs = read_layer(SKOPEO, &annotations).unwrap();
    let (blob, packed) = packed(&theirs.tar);
    let ours = read_layer(&blob, &packed.annotations.unwrap()).unwrap();
    let without_places = |layer: &layer::Layer| {
        let mut entries = layer.toc.entries.clone();
        entries.retain(|entry| entry.kind != zstd_chunked::EntryType::Chunk);
        for entry in &mut entries {
            (entry.offset, entry.end_offset) = (0, 0);
            (entry.chunk_size, entry.chunk_digest) = (0, None);
        }
        entries
    };
    assert_eq!(without_places(&ours), without_places(&theirs));
    let tar_split = |blob: &[u8], annotations: &Annotations| {
        let bytes = section(blob, annotations.positions.tar_split.range()).unwrap();
        String::from_utf8(zstd::decode_all(bytes).unwrap()).unwrap()
    };
    assert_eq!(tar_split(&blob, &packed.annotations.unwrap()), tar_split(SKOPEO, &annotations));
    // Its JSON is also what serde makes of the parsed table, up to Go's escapes of <, > and &.
    let raw = zstd::decode_all(section(SKOPEO, annotations.positions.toc.range()).unwrap()).unwrap();
    let unescaped = String::from_utf8(raw)
        .unwrap()
        .replace("\\u003c", "<")
        .replace("\\u003e", ">")
        .replace("\\u0026", "&");
    assert_eq!(serde_json::to_string(&theirs.toc).unwrap(), unescaped);
}

#[test]
fn zstd_decodes_it() {
    let tar = read_layer(SKOPEO, &skopeo_annotations()).unwrap().tar;
    let (blob, _) = packed(&tar);
    let mut zstd = Command::new("zstd")
        .args(["--decompress", "--stdout"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test needs zstd: cargo xtask setup installs it");
    let mut stdin = zstd.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&blob).unwrap());
    let output = zstd.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success() && output.stdout == tar);
}

/// An OCI layout with one layer of ours.
fn oci_layout(folder: &Path, tar: &[u8]) {
    use serde_json::json;
    let (blob, packed) = packed(tar);
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |media_type: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    };
    let config = json!({"architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [packed.diff_id.to_string()]}});
    let config = put("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let mut layer = put("application/vnd.oci.image.layer.v1.tar+zstd", &blob);
    layer["annotations"] = json!(packed.annotations.unwrap().to_map());
    let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": [layer]});
    let mut manifest = put("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes());
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    std::fs::write(folder.join("index.json"), index.to_string()).unwrap();
    std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// Runs a tool in a folder; it must succeed.
fn run(folder: &Path, program: &str, arguments: &[&str]) {
    let output =
        Command::new(program).current_dir(folder).args(arguments).output().unwrap_or_else(|error| {
            panic!("this test needs {program}: cargo xtask setup installs it ({error})")
        });
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn skopeo_podman_and_buildah_take_it_as_plain_zstd() {
    let tar = read_layer(SKOPEO, &skopeo_annotations()).unwrap().tar;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    oci_layout(&folder.path().join("image"), &tar);
    // Not the whole path: podman makes a name of it, in which capitals are refused.
    let source = "oci:image:latest";
    std::fs::write(path("policy.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#).unwrap();

    // skopeo decompresses the layer, and compares it with the diff id in the config.
    run(
        folder.path(),
        "skopeo",
        &["--policy", "policy.json", "copy", "--dest-decompress", source, "dir:copy"],
    );
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("copy/manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["layers"][0]["digest"], SKOPEO_DIFF_ID);

    // podman and buildah unpack it. Their stores are folders of this test: vfs needs no mount, so nothing is left.
    for (program, root) in [("podman", "podman-store"), ("buildah", "buildah-store")] {
        let (graph_root, run_root) = (path(root), path(&format!("{root}-run")));
        let store = ["--root", &graph_root, "--runroot", &run_root, "--storage-driver", "vfs"];
        let pull = ["pull", "--quiet", "--signature-policy", "policy.json", source];
        run(folder.path(), program, &[&store[..], &pull].concat());
        let unpacked = walk(&folder.path().join(root).join("vfs/dir"), "zeros.img");
        let expected = read_layer(SKOPEO, &skopeo_annotations()).unwrap().files["zeros.img"].clone();
        assert!(
            std::fs::read(unpacked.expect("zeros.img is in the store")).unwrap() == expected,
            "{program}"
        );
    }
}

fn walk(folder: &Path, name: &str) -> Option<std::path::PathBuf> {
    for entry in std::fs::read_dir(folder).ok()?.flatten() {
        if entry.file_name() == name {
            return Some(entry.path());
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir())
            && let Some(found) = walk(&entry.path(), name)
        {
            return Some(found);
        }
    }
    None
}
