//! A packed image as an OCI layout on disk.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use serde_json::json;

use super::{BlobFile, PackedImage, to_json};
use crate::error::{Error, Result};

impl PackedImage {
    /// Writes the image as an OCI layout into a new folder, under this name. Packing into a folder of the same file
    /// system lets layers be moved there and not copied. Blocks.
    pub fn save(self, dir: &Path, name: &str) -> Result<()> {
        if !self.remote.is_empty() {
            return Err(Error::Unsupported {
                what: "an image whose layers are still in another registry".to_owned(),
                help: "leave out --keep-layers".to_owned(),
            });
        }
        let blobs = dir.join("blobs/sha256");
        // Not over an older one: what is there may be another image.
        std::fs::create_dir(dir).map_err(Error::io("creating", dir))?;
        std::fs::create_dir_all(&blobs).map_err(Error::io("creating", &blobs))?;
        for blob in &self.blobs {
            place(blob, &dir.join("blobs").join(blob.digest.algorithm()).join(blob.digest.hex()))?;
        }
        for manifest in &self.manifests {
            let path = dir.join("blobs").join(manifest.digest.algorithm()).join(manifest.digest.hex());
            std::fs::write(&path, &manifest.bytes).map_err(Error::io("writing", &path))?;
        }
        let Some(top) = self.manifests.last() else { return Ok(()) };
        let index = json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": top.media_type, "digest": top.digest, "size": top.bytes.len(),
            "annotations": { "org.opencontainers.image.ref.name": name },
        }]});
        for (file, bytes) in [
            ("index.json", to_json("the index", &index)?),
            ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ] {
            let path = dir.join(file);
            std::fs::write(&path, bytes).map_err(Error::io("writing", &path))?;
        }
        Ok(())
    }
}

fn place(blob: &BlobFile, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io("creating", folder))?;
    }
    let reading = |error| Error::io("reading", &blob.path)(error);
    let mut file = File::open(&blob.path).map_err(reading)?;
    let whole = blob.offset == 0 && file.metadata().map_err(reading)?.len() == blob.size;
    // A link to a file that the work folder is about to drop; where that can't be, a copy.
    if whole && std::fs::hard_link(&blob.path, to).is_ok() {
        return Ok(());
    }
    file.seek(SeekFrom::Start(blob.offset)).map_err(reading)?;
    let mut out = File::create(to).map_err(Error::io("creating", to))?;
    let copied = io::copy(&mut file.take(blob.size), &mut out).map_err(Error::io("writing", to))?;
    if copied != blob.size {
        return Err(Error::SizeMismatch {
            what: blob.path.display().to_string(),
            expected: blob.size,
            found: copied,
        });
    }
    Ok(())
}
