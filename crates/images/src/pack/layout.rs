//! OCI layouts: a folder with `oci-layout`, `index.json` and `blobs/sha256/...`, or the same as a tar file.
//!
//! Nothing is extracted: blobs in a tar file are read from where they lie in it. Manifests are verified here; blobs
//! are verified when they are packed, or by the registry that takes them. An index may be sparse: of what it lists,
//! what is there is taken.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Component, Path, PathBuf};

use super::found::{Blob, Found};
use crate::client::RawManifest;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{self, Descriptor, Index, MANIFEST_MAX_BYTES, MANIFEST_TYPES, Manifest};
use crate::pack::BlobFile;

/// Where the tools write an image's name; containerd writes the whole name beside the tag.
const NAMES: [&str; 2] = ["org.opencontainers.image.ref.name", "io.containerd.image.name"];
/// Most entries of an archive: far above any real image, a bound on memory.
const ENTRIES_MAX: usize = 1 << 20;
/// Deepest nesting of indexes: one for platforms, one more for tools that wrap them.
pub(super) const DEPTH_MAX: usize = 3;

/// An opened layout.
pub(super) struct Layout {
    path: PathBuf,
    /// Offset and size of each file of a tar archive; none for a folder.
    archive: Option<HashMap<String, (u64, u64)>>,
}

struct Collector<'a> {
    layout: &'a Layout,
    found: Found,
}

impl Layout {
    pub(super) fn open(path: &Path) -> Result<Layout> {
        let metadata = std::fs::metadata(path).map_err(Error::io("reading", path))?;
        let archive = if metadata.is_dir() { None } else { Some(index_archive(path)?) };
        Ok(Layout { path: path.to_owned(), archive })
    }

    /// The image with this name, or the only one.
    pub(super) fn find(&self, name: Option<&str>) -> Result<Found> {
        if self.is_flat() {
            return self.find_flat();
        }
        let is_docker = self
            .archive
            .as_ref()
            .is_some_and(|f| f.contains_key("manifest.json") && !f.contains_key("index.json"));
        if is_docker {
            return super::docker::find(self, &self.path, name);
        }
        let index: Index = manifest::parse("the layout's index.json", &self.read("index.json")?)?;
        let names_of = |d: &Descriptor| -> Vec<String> {
            let annotations = d.annotations.as_ref();
            NAMES.iter().filter_map(|key| annotations?.get(*key)).cloned().collect()
        };
        let mut matching = index
            .manifests
            .iter()
            .filter(|d| name.is_none_or(|name| names_of(d).iter().any(|known| known == name)));
        let (Some(descriptor), None) = (matching.next(), matching.next()) else {
            let names: Vec<_> = index.manifests.iter().flat_map(names_of).collect();
            return Err(ambiguous(&self.path, name, index.manifests.len(), &names));
        };
        let mut collector = Collector { layout: self, found: Found::default() };
        collector.manifest(descriptor, 0)?;
        Ok(collector.found)
    }

    /// Whether this is a folder as builders write it with `dir:`, the only form that they leave uncompressed: the
    /// manifest as `manifest.json`, blobs beside it by their hexadecimal digits.
    fn is_flat(&self) -> bool {
        self.archive.is_none() && self.has("version") && self.has("manifest.json") && !self.has("index.json")
    }

    fn find_flat(&self) -> Result<Found> {
        let bytes = self.read("manifest.json")?;
        let parsed: Manifest = manifest::parse("the manifest", &bytes)?;
        let mut found = Found::default();
        for descriptor in parsed.layers.iter().chain([&parsed.config]) {
            if found.blob(&descriptor.digest).is_none() {
                found.blobs.push(Blob::File(self.blob_at(descriptor.digest.hex(), descriptor)?));
            }
        }
        let media_type = parsed.media_type.unwrap_or_else(|| manifest::OCI_MANIFEST.to_owned());
        found.manifests.push(RawManifest { digest: Digest::of(&bytes), media_type, bytes: bytes.into() });
        Ok(found)
    }

    pub(super) fn read(&self, name: &str) -> Result<Vec<u8>> {
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
    pub(super) fn locate(&self, name: &str) -> Result<(PathBuf, u64, u64)> {
        let missing = || Error::InvalidSource {
            path: self.path.clone(),
            reason: format!(
                "it has no `{name}`; expected an OCI layout (`skopeo copy SOURCE oci:FOLDER` makes one), or an archive of \
                 one, or a docker archive (`docker save`)"
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

    fn has(&self, name: &str) -> bool {
        self.locate(name).is_ok()
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<BlobFile> {
        self.blob_at(&blob_name(&descriptor.digest), descriptor)
    }

    fn blob_at(&self, name: &str, descriptor: &Descriptor) -> Result<BlobFile> {
        let digest = &descriptor.digest;
        let (path, offset, size) = self.locate(name)?;
        if size != descriptor.size {
            let what = format!("blob {digest} of {}", self.path.display());
            return Err(Error::SizeMismatch { what, expected: descriptor.size, found: size });
        }
        Ok(BlobFile { digest: digest.clone(), size, path, offset })
    }
}

/// For where the source doesn't hold exactly one image of the name.
pub(super) fn ambiguous(path: &Path, name: Option<&str>, held: usize, names: &[String]) -> Error {
    let reason = format!(
        "expected one image{}, found {held} named [{}]; name one of them with --image",
        name.map(|name| format!(" named `{name}`")).unwrap_or_default(),
        names.join(", ")
    );
    Error::InvalidSource { path: path.to_owned(), reason }
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
        if self.found.manifests.iter().any(|known| known.digest == *digest) {
            return Ok(());
        }
        let bytes = self.layout.read(&blob_name(digest))?;
        let found = digest.same_of(&bytes);
        if found != *digest {
            let what = format!("the manifest in {}", self.layout.path.display());
            return Err(Error::DigestMismatch { what, expected: digest.clone(), found });
        }
        if manifest::is_index(media_type) {
            let index: Index = manifest::parse("the index", &bytes)?;
            let before = self.found.manifests.len();
            for child in index.manifests.iter().filter(|child| self.layout.has(&blob_name(&child.digest))) {
                self.manifest(child, depth + 1)?;
            }
            if self.found.manifests.len() == before {
                return Err(Error::InvalidSource {
                    path: self.layout.path.clone(),
                    reason: format!(
                        "it has none of the {} images that its index lists",
                        index.manifests.len()
                    ),
                });
            }
        } else {
            let manifest: Manifest = manifest::parse("the manifest", &bytes)?;
            for blob in manifest.layers.iter().chain([&manifest.config]) {
                if self.found.blob(&blob.digest).is_none() {
                    self.found.blobs.push(Blob::File(self.layout.blob(blob)?));
                }
            }
        }
        let media_type = media_type.to_owned();
        self.found.manifests.push(RawManifest { digest: digest.clone(), media_type, bytes: bytes.into() });
        Ok(())
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

/// Offset and size of each file in a tar archive; links stand for what they point to.
fn index_archive(path: &Path) -> Result<HashMap<String, (u64, u64)>> {
    let invalid = |reason: String| Error::InvalidSource { path: path.to_owned(), reason };
    let not_tar = |e| {
        invalid(format!(
            "{e}; expected an uncompressed OCI archive (`skopeo copy SOURCE oci-archive:FILE`) or docker archive"
        ))
    };
    let file = File::open(path).map_err(Error::io("reading", path))?;
    let length = file.metadata().map_err(Error::io("reading", path))?.len();
    let mut archive = tar::Archive::new(file);
    let (mut files, mut links) = (HashMap::new(), Vec::new());
    for entry in archive.entries_with_seek().map_err(not_tar)? {
        let entry = entry.map_err(not_tar)?;
        let kind = entry.header().entry_type();
        let name = clean(Path::new(""), &entry.path().map_err(not_tar)?);
        if kind.is_file() {
            let (offset, size) = (entry.raw_file_position(), entry.size());
            if offset.saturating_add(size) > length {
                return Err(invalid(format!("it ends in the middle of `{name}`; copy or make it again")));
            }
            files.insert(name, (offset, size));
        } else if let Some(target) = entry.link_name().map_err(not_tar)? {
            // `docker save` writes a layer that comes again as a link to where it came first.
            let base = if kind.is_symlink() { Path::new(&name).parent() } else { None };
            let target = clean(base.unwrap_or(Path::new("")), &target);
            links.push((name, target));
        }
        if files.len() + links.len() > ENTRIES_MAX {
            return Err(invalid(format!("it has more than {ENTRIES_MAX} entries")));
        }
    }
    for (name, target) in links {
        if let Some(place) = files.get(&target).copied() {
            files.insert(name, place);
        }
    }
    Ok(files)
}

/// A path inside an archive in one spelling.
fn clean(base: &Path, path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for component in base.join(path).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_archives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive.tar");
        crate::mutations::files("archives", |kept, bytes| {
            std::fs::write(&path, bytes).unwrap();
            let found = Layout::open(&path).and_then(|layout| layout.find(None));
            let Ok(found) = found else {
                assert!(!kept, "{found:?}");
                return false;
            };
            for manifest in &found.manifests {
                assert_eq!(manifest.digest, manifest.digest.same_of(&manifest.bytes));
            }
            for blob in &found.blobs {
                let Blob::File(blob) = blob else { panic!("{blob:?} isn't in the archive") };
                // All of it is there.
                assert!(blob.offset + blob.size <= bytes.len() as u64, "{blob:?}");
            }
            true
        });
    }
}
