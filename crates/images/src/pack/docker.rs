//! Docker archives, as `docker save` writes them: `manifest.json`, configurations, and layers as plain archives.
//!
//! They name blobs by path and say neither sizes nor types, so the manifest is made here.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use serde::Deserialize;

use super::found::{Blob, Found};
use super::layer::is_plain;
use super::layout::Layout;
use crate::client::RawManifest;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{self, Descriptor, ImageConfig, Manifest, OCI_CONFIG, OCI_LAYER_ZSTD, OCI_MANIFEST};
use crate::pack::BlobFile;

/// One image of `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The image with this name, or the only one.
pub(super) fn find(archive: &Layout, path: &Path, name: Option<&str>) -> Result<Found> {
    let listed: Vec<Listed> =
        manifest::parse("the archive's manifest.json", &archive.read("manifest.json")?)?;
    let tags = |image: &Listed| image.repo_tags.clone().unwrap_or_default();
    let mut matching =
        listed.iter().filter(|image| name.is_none_or(|name| tags(image).iter().any(|t| t == name)));
    let (Some(image), None) = (matching.next(), matching.next()) else {
        let names: Vec<String> = listed.iter().flat_map(tags).collect();
        return Err(super::layout::ambiguous(path, name, listed.len(), &names));
    };
    let config = archive.read(&image.config)?;
    let parsed: ImageConfig = manifest::parse("the image's configuration", &config)?;
    let (layers, ids) = (image.layers.len(), parsed.rootfs.diff_ids.len());
    if layers != ids {
        return Err(Error::InvalidSource {
            path: path.to_owned(),
            reason: format!("its manifest.json lists {layers} layers, its configuration {ids}"),
        });
    }
    let mut found = Found::default();
    let mut descriptors = Vec::with_capacity(layers);
    for (name, diff_id) in image.layers.iter().zip(&parsed.rootfs.diff_ids) {
        let (blob, media_type) = layer(archive, name, diff_id)?;
        descriptors.push(describe(media_type, &blob.digest, blob.size));
        if found.blob(&blob.digest).is_none() {
            found.blobs.push(Blob::File(blob));
        }
    }
    let (file, offset, size) = archive.locate(&image.config)?;
    let digest = Digest::of(&config);
    let document = Manifest {
        schema_version: 2,
        media_type: Some(OCI_MANIFEST.to_owned()),
        config: describe(OCI_CONFIG, &digest, size),
        layers: descriptors,
    };
    found.blobs.push(Blob::File(BlobFile { digest, size, path: file, offset }));
    let bytes = super::to_json("the manifest", &document)?;
    let media_type = OCI_MANIFEST.to_owned();
    found.manifests.push(RawManifest { digest: Digest::of(&bytes), media_type, bytes: bytes.into() });
    Ok(found)
}

/// Where a layer lies, its digest and its type. A plain archive has the digest that the configuration says, which is
/// verified when it is packed, or by the registry that takes it.
fn layer(archive: &Layout, name: &str, diff_id: &Digest) -> Result<(BlobFile, &'static str)> {
    let (path, offset, size) = archive.locate(name)?;
    let mut blob = BlobFile { digest: diff_id.clone(), size, path, offset };
    let mut file = blob.open()?;
    let mut first = Vec::new();
    (&mut file).take(4).read_to_end(&mut first).map_err(Error::io("reading", &blob.path))?;
    if is_plain(&first) {
        return Ok((blob, "application/vnd.oci.image.layer.v1.tar"));
    }
    file.seek(SeekFrom::Start(offset)).map_err(Error::io("reading", &blob.path))?;
    let (mut hasher, mut left, mut buffer) = (diff_id.hasher(), file.take(size), vec![0; 256 << 10]);
    loop {
        match left.read(&mut buffer).map_err(Error::io("reading", &blob.path))? {
            0 => break,
            read => hasher.update(&buffer[..read]),
        }
    }
    blob.digest = hasher.finish();
    let gzip = first.starts_with(&[0x1f, 0x8b]);
    Ok((blob, if gzip { "application/vnd.oci.image.layer.v1.tar+gzip" } else { OCI_LAYER_ZSTD }))
}

fn describe(media_type: &str, digest: &Digest, size: u64) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: digest.clone(),
        size,
        platform: None,
        annotations: None,
    }
}
