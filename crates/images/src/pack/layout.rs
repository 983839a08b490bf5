//! OCI layouts: a folder with `oci-layout`, `index.json` and `blobs/sha256/...`, or the same as a tar file.
//!
//! Nothing is extracted: blobs in a tar file are sent from where they lie in it. Manifests are verified here; blobs
//! are verified by the registry that takes them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use crate::client::RawManifest;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{self, Descriptor, Index, MANIFEST_MAX_BYTES, MANIFEST_TYPES, Manifest};
use crate::pack::BlobFile;

const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Most entries of an archive: far above any real image, a bound on memory.
const ENTRIES_MAX: usize = 1 << 20;
/// Deepest nesting of indexes: one for platforms, one more for tools that wrap them.
const DEPTH_MAX: usize = 3;

/// An opened layout.
pub(super) struct Layout {
    path: PathBuf,
    /// Offset and size of each file of a tar archive; none for a folder.
    archive: Option<HashMap<String, (u64, u64)>>,
}

struct Collector<'a> {
    layout: &'a Layout,
    manifests: Vec<RawManifest>,
    blobs: Vec<BlobFile>,
}

impl Layout {
    pub(super) fn open(path: &Path) -> Result<Layout> {
        let metadata = std::fs::metadata(path).map_err(Error::io("reading", path))?;
        let archive = if metadata.is_dir() { None } else { Some(index_archive(path)?) };
        Ok(Layout { path: path.to_owned(), archive })
    }

    /// The manifests and blobs of the image with this name, or of the only image.
    pub(super) fn collect(&self, name: Option<&str>) -> Result<(Vec<RawManifest>, Vec<BlobFile>)> {
        let index = self.read("index.json").map_err(|error| match &self.archive {
            Some(files) if files.contains_key("manifest.json") => Error::Unsupported {
                what: format!("the docker archive {}", self.path.display()),
                help: "convert it: `skopeo copy docker-archive:FILE oci-archive:OUT.tar`".to_owned(),
            },
            _ => error,
        })?;
        let index: Index = manifest::parse("the layout's index.json", &index)?;
        let name_of = |d: &Descriptor| d.annotations.as_ref().and_then(|a| a.get(REF_NAME)).cloned();
        let mut matching = index.manifests.iter().filter(|d| name.is_none() || name_of(d).as_deref() == name);
        let (first, second) = (matching.next(), matching.next());
        let (Some(descriptor), None) = (first, second) else {
            let names: Vec<_> = index.manifests.iter().filter_map(name_of).collect();
            let reason = format!(
                "expected one image{}, found {} named [{}]; name one of them",
                name.map(|name| format!(" named `{name}`")).unwrap_or_default(),
                index.manifests.len(),
                names.join(", ")
            );
            return Err(Error::InvalidSource { path: self.path.clone(), reason });
        };
        let mut collector = Collector { layout: self, manifests: Vec::new(), blobs: Vec::new() };
        collector.manifest(descriptor, 0)?;
        Ok((collector.manifests, collector.blobs))
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let (path, offset, size) = self.locate(name)?;
        if size > MANIFEST_MAX_BYTES as u64 {
            let what = format!("`{name}` of {}", self.path.display());
            return Err(Error::SizeMismatch { what, expected: MANIFEST_MAX_BYTES as u64, found: size });
        }
        let mut file = File::open(&path).map_err(Error::io("reading", &path))?;
        file.seek(SeekFrom::Start(offset)).map_err(Error::io("reading", &path))?;
        let mut bytes = Vec::new();
        file.take(size).read_to_end(&mut bytes).map_err(Error::io("reading", &path))?;
        Ok(bytes)
    }

    /// File, offset and size of one of the layout's files.
    fn locate(&self, name: &str) -> Result<(PathBuf, u64, u64)> {
        let missing = || Error::InvalidSource {
            path: self.path.clone(),
            reason: format!(
                "it has no `{name}`; expected an OCI layout (`skopeo copy SOURCE oci:FOLDER` makes one)"
            ),
        };
        if let Some(files) = &self.archive {
            let (offset, size) = files.get(name).ok_or_else(missing)?;
            return Ok((self.path.clone(), *offset, *size));
        }
        let path = self.path.join(name);
        let metadata = std::fs::metadata(&path).map_err(|_| missing())?;
        Ok((path, 0, metadata.len()))
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<BlobFile> {
        let digest = &descriptor.digest;
        let (path, offset, size) = self.locate(&format!("blobs/{}/{}", digest.algorithm(), digest.hex()))?;
        if size != descriptor.size {
            let what = format!("blob {digest} of {}", self.path.display());
            return Err(Error::SizeMismatch { what, expected: descriptor.size, found: size });
        }
        Ok(BlobFile { digest: digest.clone(), size, path, offset })
    }
}

impl Collector<'_> {
    fn manifest(&mut self, descriptor: &Descriptor, depth: usize) -> Result<()> {
        let media_type = descriptor.media_type.as_str();
        if depth > DEPTH_MAX || !MANIFEST_TYPES.contains(&media_type) {
            return Err(Error::Unsupported {
                what: format!("a manifest of type `{media_type}`, {depth} deep,"),
                help: format!("expected one of {}", MANIFEST_TYPES.join(", ")),
            });
        }
        let digest = &descriptor.digest;
        if self.manifests.iter().any(|known| known.digest == *digest) {
            return Ok(());
        }
        let bytes = self.layout.read(&format!("blobs/{}/{}", digest.algorithm(), digest.hex()))?;
        let found = Digest::of(&bytes);
        if found != *digest {
            let what = format!("the manifest in {}", self.layout.path.display());
            return Err(Error::DigestMismatch { what, expected: digest.clone(), found });
        }
        if manifest::is_index(media_type) {
            let index: Index = manifest::parse("the index", &bytes)?;
            for child in &index.manifests {
                self.manifest(child, depth + 1)?;
            }
        } else {
            let manifest: Manifest = manifest::parse("the manifest", &bytes)?;
            for blob in manifest.layers.iter().chain([&manifest.config]) {
                if self.blobs.iter().all(|known| known.digest != blob.digest) {
                    self.blobs.push(self.layout.blob(blob)?);
                }
            }
        }
        let media_type = media_type.to_owned();
        self.manifests.push(RawManifest { digest: found, media_type, bytes: bytes.into() });
        Ok(())
    }
}

fn index_archive(path: &Path) -> Result<HashMap<String, (u64, u64)>> {
    let invalid = |reason: String| Error::InvalidSource { path: path.to_owned(), reason };
    let not_tar = |e| {
        invalid(format!("{e}; expected an uncompressed OCI archive (`skopeo copy SOURCE oci-archive:FILE`)"))
    };
    let file = File::open(path).map_err(Error::io("reading", path))?;
    let mut archive = tar::Archive::new(file);
    let mut files = HashMap::new();
    for entry in archive.entries_with_seek().map_err(not_tar)? {
        let entry = entry.map_err(not_tar)?;
        if entry.header().entry_type().is_file() {
            let name = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_owned();
            files.insert(name, (entry.raw_file_position(), entry.size()));
        }
        if files.len() > ENTRIES_MAX {
            return Err(invalid(format!("it has more than {ENTRIES_MAX} entries")));
        }
    }
    Ok(files)
}
