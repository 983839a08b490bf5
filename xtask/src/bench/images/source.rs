//! The image under measurement: real files of this machine's /usr, in three layers, as an uncompressed OCI layout.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::super::payload::{self, Noise};
use crate::shell;

/// The kind of image that the peers were measured with: 662 MB of files, about 16,000 of them.
const BYTES: u64 = 650_000_000;
const FILES: usize = 15_800;
const LAYERS: usize = 3;
/// Larger files would make up the image with a few.
const FILE_BYTES_MAX: u64 = 40_000_000;

/// Files in a folder, layers' archives of them, and a layout that other tools read.
pub(crate) struct Source {
    pub(crate) layout: PathBuf,
    pub(crate) files: usize,
    pub(crate) bytes: u64,
    root: PathBuf,
    lists: Vec<Vec<PathBuf>>,
}

impl Source {
    /// Collects the image below `work`: all of it, or one part of `share`.
    pub(crate) fn collect(work: &Path, share: u64) -> Result<Source> {
        let root = work.join("rootfs");
        std::fs::create_dir_all(root.join("bin"))?;
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).context("busybox-static is not installed")?;
        let mut all = Vec::new();
        walk(Path::new("/usr"), &mut all)?;
        // An order that doesn't depend on folders, the same on each run.
        all.sort_by_cached_key(|(path, _)| payload::digest(path.as_os_str().as_bytes()));
        let (mut files, mut bytes) = (Vec::new(), 0u64);
        for (path, size) in all {
            if files.len() < FILES / share as usize && bytes + size <= BYTES / share {
                bytes += size;
                files.push(path);
            }
        }
        let mut lists = vec![Vec::new(); LAYERS];
        lists[0].push(PathBuf::from("bin/busybox"));
        for (number, path) in files.iter().enumerate() {
            let inside = path.strip_prefix("/").context("an absolute path")?.to_owned();
            let to = root.join(&inside);
            std::fs::create_dir_all(to.parent().context("a parent")?)?;
            std::fs::copy(path, &to).with_context(|| format!("copy {}", path.display()))?;
            lists[number * LAYERS / files.len()].push(inside);
        }
        let mut source = Source { layout: work.join("layout"), files: files.len() + 1, bytes, root, lists };
        source.write_layout()?;
        Ok(source)
    }

    /// The next version: one file of a hundred changed, in all layers.
    pub(crate) fn change_some(&mut self, seed: u64) -> Result<()> {
        let mut noise = Noise::new(seed);
        for path in self.lists.iter().flatten().filter(|path| !path.ends_with("busybox")) {
            if !noise.next().is_multiple_of(100) {
                continue;
            }
            let path = self.root.join(path);
            let mut bytes = std::fs::read(&path)?;
            bytes.extend_from_slice(b"\nchanged\n");
            std::fs::write(&path, bytes)?;
        }
        self.write_layout()
    }

    /// The one large file's image.
    pub(crate) fn large(work: &Path, bytes: u64) -> Result<Source> {
        let root = work.join("large");
        std::fs::create_dir_all(&root)?;
        payload::write(&root.join("model.bin"), 5, bytes)?;
        let lists = vec![vec![PathBuf::from("model.bin")]];
        let mut source = Source { layout: work.join("large-layout"), files: 1, bytes, root, lists };
        source.write_layout()?;
        Ok(source)
    }

    /// Changes one byte of a hundred of the large file: `runs` runs of equal length, at places of the seed.
    pub(crate) fn change_runs(&mut self, seed: u64, runs: u64) -> Result<()> {
        use std::os::unix::fs::FileExt as _;
        let file = File::options().write(true).open(self.root.join("model.bin"))?;
        let (mut noise, length) = (Noise::new(seed), self.bytes / 100 / runs);
        let mut run = vec![0; length as usize];
        for number in 0..runs {
            noise.fill(&mut run);
            let slot = self.bytes / runs;
            file.write_all_at(&run, slot * number + noise.next() % (slot - length))?;
        }
        self.write_layout()
    }

    fn write_layout(&mut self) -> Result<()> {
        let _ = std::fs::remove_dir_all(&self.layout);
        let blobs = self.layout.join("blobs/sha256");
        std::fs::create_dir_all(&blobs)?;
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for list in &self.lists {
            let names = self.layout.join("names");
            let folders: BTreeSet<&Path> = list.iter().flat_map(|path| path.ancestors().skip(1)).collect();
            let mut out = File::create(&names)?;
            let paths = folders
                .into_iter()
                .filter(|path| path.as_os_str() != "")
                .chain(list.iter().map(PathBuf::as_path));
            for path in paths {
                out.write_all(path.as_os_str().as_bytes())?;
                out.write_all(b"\0")?;
            }
            let archive = self.layout.join("layer.tar");
            let mut tar = Command::new("tar");
            tar.args(["--create", "--no-recursion", "--null", "--verbatim-files-from", "--format=pax"]);
            tar.args(["--pax-option=delete=atime,delete=ctime", "--owner=0", "--group=0", "--numeric-owner"]);
            tar.args(["--mtime=@1700000000", "--hard-dereference"]);
            tar.arg("--directory")
                .arg(&self.root)
                .arg("--files-from")
                .arg(&names)
                .arg("--file")
                .arg(&archive);
            shell::output(&mut tar)?;
            let digest = payload::digest_repeated(&archive, 1)?;
            let size = std::fs::metadata(&archive)?.len();
            std::fs::rename(&archive, blobs.join(&digest[7..]))?;
            std::fs::remove_file(&names)?;
            layers.push(serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": size,
            }));
            diff_ids.push(digest);
        }
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "config": { "Cmd": ["/bin/busybox", "true"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = put(&blobs, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            serde_json::json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers });
        let mut manifest = put(&blobs, kind, manifest.to_string().as_bytes())?;
        manifest["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": "v1" });
        let index = serde_json::json!({ "schemaVersion": 2, "manifests": [manifest] });
        std::fs::write(self.layout.join("index.json"), index.to_string())?;
        std::fs::write(self.layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(())
    }
}

fn put(blobs: &Path, kind: &str, bytes: &[u8]) -> Result<serde_json::Value> {
    let digest = payload::digest(bytes);
    std::fs::write(blobs.join(&digest[7..]), bytes)?;
    Ok(serde_json::json!({ "mediaType": kind, "digest": digest, "size": bytes.len() }))
}

/// All regular files with their sizes, not following links.
fn walk(folder: &Path, files: &mut Vec<(PathBuf, u64)>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            walk(&entry.path(), files)?;
        } else if kind.is_file() {
            let size = entry.metadata()?.len();
            if size <= FILE_BYTES_MAX {
                files.push((entry.path(), size));
            }
        }
    }
    Ok(())
}
