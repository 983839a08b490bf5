//! From an image as its source has it to one whose layers are zstd:chunked.
//!
//! The archives inside stay the same byte for byte, so the configuration with its `diff_ids` does too; manifests are
//! written anew because they name the layers. An image whose layers all are as they would be is left as it is, digest
//! included. Manifests that are no images (signatures, attestations) are never changed; where they name an image by
//! its digest in the same index, as buildkit's attestations do, the name follows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use serde_json::{Map, Value};

use super::found::{Blob, Found};
use super::layer::{Expected, Guard, PackedLayer, SourceReader, Watch, repack};
use super::pipe::pipe;
use crate::client::{RawManifest, RemoteBlob};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{
    self, DOCKER_LIST, DOCKER_MANIFEST, Descriptor, ImageConfig, Manifest, OCI_CONFIG, OCI_INDEX,
    OCI_LAYER_ZSTD, OCI_MANIFEST,
};
use crate::pack::BlobFile;
use crate::pieces::{PIECES_ANNOTATION, Pieces};
use crate::progress::{Item, SharedProgress, Stage};

/// Most layers that are packed at once, however many cores there are: one is compressed on all cores already, others
/// fill the gaps in which it waits for its source. Each holds about 40 MiB (frames in work, a context for each core),
/// so that all together stay below 160 MiB.
const PARALLEL_MAX: usize = 4;
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Layers that are archives of files, in all spellings.
const LAYER_TYPES: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    OCI_LAYER_ZSTD,
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// An image that is packed, and what that took.
pub(super) struct Repacked {
    pub(super) manifests: Vec<RawManifest>,
    pub(super) blobs: Vec<Blob>,
    pub(super) bytes_read: u64,
}

/// What becomes of a layer.
enum Change {
    /// It is zstd:chunked, and only the hashes of its pieces are missing.
    Describe,
    /// It is packed again; its archive has this digest, where the image says so.
    Pack(Option<Digest>),
}

/// Packs the layers of `found` that aren't zstd:chunked, into files in `dir`.
pub(super) async fn run(found: Found, dir: &Path, progress: &SharedProgress) -> Result<Repacked> {
    let mut changes: BTreeMap<Digest, Change> = BTreeMap::new();
    let mut images = BTreeSet::new();
    for raw in found.manifests.iter().filter(|raw| !manifest::is_index(&raw.media_type)) {
        let parsed: Manifest = manifest::parse("the manifest", &raw.bytes)?;
        if !matches!(parsed.config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
            continue;
        }
        images.insert(raw.digest.clone());
        let diff_ids = diff_ids(&found, &parsed).await?;
        for (index, layer) in parsed.layers.iter().enumerate() {
            if !LAYER_TYPES.contains(&layer.media_type.as_str()) {
                continue;
            }
            if is_chunked(layer) {
                if !has(layer, PIECES_ANNOTATION) {
                    changes.entry(layer.digest.clone()).or_insert(Change::Describe);
                }
            } else {
                let diff_id = diff_ids.as_ref().and_then(|ids| ids.get(index)).cloned();
                changes.insert(layer.digest.clone(), Change::Pack(diff_id));
            }
        }
    }
    let guard = Guard::default();
    let mut jobs = Vec::with_capacity(changes.len());
    let mut bytes_read = 0;
    for (index, (digest, change)) in changes.into_iter().enumerate() {
        let Some(blob) = found.blob(&digest).cloned() else { continue };
        bytes_read += blob.size();
        let (to, watch) = (dir.join(format!("layer-{index}")), guard.watch());
        jobs.push(async move {
            let packed = match change {
                Change::Describe => describe(blob, &to, progress, &watch).await?,
                Change::Pack(diff_id) => pack(blob, diff_id, &to, progress, &watch).await?,
            };
            Ok((digest, packed))
        });
    }
    let parallel = std::thread::available_parallelism().map_or(1, usize::from).min(PARALLEL_MAX);
    let packed: BTreeMap<Digest, PackedLayer> =
        stream::iter(jobs).buffer_unordered(parallel).try_collect().await?;

    let mut renamed = BTreeMap::new();
    let mut manifests = Vec::with_capacity(found.manifests.len());
    for raw in found.manifests {
        let changed = if manifest::is_index(&raw.media_type) {
            rewrite_index(&raw, &renamed)?
        } else if images.contains(&raw.digest) {
            rewrite_image(&raw, &packed)?
        } else {
            None
        };
        let now = changed.unwrap_or_else(|| raw.clone());
        if now.digest != raw.digest {
            renamed.insert(raw.digest, now.clone());
        }
        manifests.push(now);
    }
    let mut blobs: Vec<Blob> = Vec::with_capacity(found.blobs.len());
    for blob in found.blobs {
        let now = match packed.get(blob.digest()) {
            Some(packed) => {
                let PackedLayer { digest, size, path, offset, .. } = packed.clone();
                Blob::File(BlobFile { digest, size, path, offset })
            }
            None => {
                bytes_read += blob.size();
                blob
            }
        };
        // Layers that differed only in their compression are one now.
        if blobs.iter().all(|known| known.digest() != now.digest()) {
            blobs.push(now);
        }
    }
    Ok(Repacked { manifests, blobs, bytes_read })
}

/// What the image's configuration says that its layers hold.
async fn diff_ids(found: &Found, manifest: &Manifest) -> Result<Option<Vec<Digest>>> {
    let Some(config) = found.blob(&manifest.config.digest) else { return Ok(None) };
    let config: ImageConfig = manifest::parse("the image's configuration", &config.read().await?)?;
    let (layers, ids) = (manifest.layers.len(), config.rootfs.diff_ids.len());
    if layers != ids {
        return Err(Error::InvalidManifest {
            what: "the image".to_owned(),
            reason: format!("its manifest has {layers} layers, its configuration {ids}"),
        });
    }
    Ok(Some(config.rootfs.diff_ids))
}

fn has(layer: &Descriptor, annotation: &str) -> bool {
    layer.annotations.as_ref().is_some_and(|all| all.contains_key(annotation))
}

fn is_chunked(layer: &Descriptor) -> bool {
    let known = layer.annotations.as_ref().map(zstd_chunked::Annotations::from_map);
    layer.media_type.ends_with("zstd") && matches!(known, Some(Ok(Some(_))))
}

fn item(digest: &Digest) -> Item {
    Item { stage: Stage::Pack, name: digest.short().to_owned() }
}

async fn pack(
    blob: Blob,
    diff_id: Option<Digest>,
    to: &Path,
    progress: &SharedProgress,
    watch: &Watch,
) -> Result<PackedLayer> {
    let item = item(blob.digest());
    progress.started(&item, blob.size());
    let (told, to, progress_here, watch) = (item.clone(), to.to_owned(), progress.clone(), watch.clone());
    let packed = match blob {
        Blob::File(file) => {
            blocking(move || {
                // A plain archive is verified by its diff_id, which is its digest.
                let hasher = (diff_id.as_ref() != Some(&file.digest)).then(|| file.digest.hasher());
                let source = std::io::Read::take(file.open()?, file.size);
                let source = SourceReader::new(source, hasher, &told, &progress_here, &watch);
                repack(source, &Expected { digest: &file.digest, diff_id: diff_id.as_ref() }, &to)
            })
            .await?
        }
        Blob::Remote(remote) => {
            let (writer, reader) = pipe();
            let digest = remote.digest.clone();
            let packing = blocking(move || {
                // The download verifies the blob's own digest.
                let source = SourceReader::new(reader, None, &told, &progress_here, &watch);
                repack(source, &Expected { digest: &digest, diff_id: diff_id.as_ref() }, &to)
            });
            let download = async {
                let mut blob =
                    remote.client.get_blob(&remote.reference, &remote.digest, Some(remote.size)).await?;
                while let Some(chunk) = blob.chunk().await? {
                    if writer.send(chunk).await.is_err() {
                        // The packer gave up, and says itself why.
                        return Ok(());
                    }
                }
                let _ = writer.end().await;
                Ok(())
            };
            let (packed, downloaded) = tokio::join!(packing, download);
            // Where the download failed, the packer only knows that its source broke off.
            downloaded.and(packed)?
        }
    };
    progress.finished(&item);
    Ok(packed)
}

/// Hashes the pieces of a blob that stays as it is.
async fn describe(blob: Blob, to: &Path, progress: &SharedProgress, watch: &Watch) -> Result<PackedLayer> {
    let item = item(blob.digest());
    progress.started(&item, blob.size());
    let file = match blob {
        Blob::File(file) => file,
        Blob::Remote(remote) => download(&remote, to).await?,
    };
    let (told, progress_here, watch) = (item.clone(), progress.clone(), watch.clone());
    let packed = blocking(move || {
        let source = std::io::Read::take(file.open()?, file.size);
        let mut source = SourceReader::new(source, Some(file.digest.hasher()), &told, &progress_here, &watch);
        let pieces = Pieces::read(&mut source, file.size).map_err(Error::io("reading", &file.path))?;
        source.verify(&file.digest)?;
        Ok(PackedLayer {
            diff_id: file.digest.clone(),
            annotations: BTreeMap::from([(PIECES_ANNOTATION.to_owned(), pieces.to_string())]),
            digest: file.digest,
            size: file.size,
            path: file.path,
            offset: file.offset,
        })
    })
    .await?;
    progress.finished(&item);
    Ok(packed)
}

async fn download(remote: &RemoteBlob, to: &Path) -> Result<BlobFile> {
    use tokio::io::AsyncWriteExt as _;
    let mut file = tokio::fs::File::create(to).await.map_err(Error::io("creating", to))?;
    let mut blob = remote.client.get_blob(&remote.reference, &remote.digest, Some(remote.size)).await?;
    while let Some(chunk) = blob.chunk().await? {
        file.write_all(&chunk).await.map_err(Error::io("writing", to))?;
    }
    file.flush().await.map_err(Error::io("writing", to))?;
    Ok(BlobFile { digest: remote.digest.clone(), size: remote.size, path: to.to_owned(), offset: 0 })
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Cancelled)?
}

fn object<'a>(what: &str, value: &'a mut Value) -> Result<&'a mut Map<String, Value>> {
    value.as_object_mut().ok_or_else(|| Error::InvalidManifest {
        what: what.to_owned(),
        reason: "expected a JSON object".to_owned(),
    })
}

fn list<'a>(value: &'a mut Value, key: &str) -> Vec<&'a mut Value> {
    value.get_mut(key).and_then(Value::as_array_mut).map(|list| list.iter_mut().collect()).unwrap_or_default()
}

fn digest_of(descriptor: &Value) -> Option<Digest> {
    descriptor.get("digest")?.as_str()?.parse().ok()
}

/// The manifest with its new layers; none where nothing changes. What isn't known here stays as it is.
fn rewrite_image(raw: &RawManifest, packed: &BTreeMap<Digest, PackedLayer>) -> Result<Option<RawManifest>> {
    let mut value: Value = manifest::parse("the manifest", &raw.bytes)?;
    let mut changed = false;
    for layer in list(&mut value, "layers") {
        let Some(packed) = digest_of(layer).and_then(|digest| packed.get(&digest)) else { continue };
        let before = layer.clone();
        let fields = object("a layer of the manifest", layer)?;
        fields.insert("mediaType".into(), OCI_LAYER_ZSTD.into());
        fields.insert("digest".into(), packed.digest.as_str().into());
        fields.insert("size".into(), packed.size.into());
        let annotations = fields.entry("annotations").or_insert_with(|| Map::new().into());
        let annotations = object("the annotations of a layer", annotations)?;
        for (key, text) in &packed.annotations {
            annotations.insert(key.clone(), text.as_str().into());
        }
        // A layer that can't be zstd:chunked and was packed by us before comes out as it went in.
        changed |= *layer != before;
    }
    if !changed {
        return Ok(None);
    }
    // zstd is no layer of docker's own schema.
    if raw.media_type == DOCKER_MANIFEST {
        if let Some(config) = value.get_mut("config") {
            object("the manifest's config", config)?.insert("mediaType".into(), OCI_CONFIG.into());
        }
        for layer in list(&mut value, "layers") {
            let media_type = layer.get("mediaType").and_then(Value::as_str).unwrap_or_default();
            if media_type == "application/vnd.docker.image.rootfs.diff.tar.zstd" {
                object("a layer of the manifest", layer)?.insert("mediaType".into(), OCI_LAYER_ZSTD.into());
            }
        }
    }
    serialize(value, OCI_MANIFEST).map(Some)
}

/// The index with the new names of its manifests; none where nothing changes.
fn rewrite_index(raw: &RawManifest, renamed: &BTreeMap<Digest, RawManifest>) -> Result<Option<RawManifest>> {
    let mut value: Value = manifest::parse("the index", &raw.bytes)?;
    let mut changed = false;
    for child in list(&mut value, "manifests") {
        let now = digest_of(child).and_then(|digest| renamed.get(&digest));
        let child = object("an entry of the index", child)?;
        if let Some(now) = now {
            changed = true;
            child.insert("digest".into(), now.digest.as_str().into());
            child.insert("size".into(), now.bytes.len().into());
            child.insert("mediaType".into(), now.media_type.as_str().into());
        }
        let Some(annotations) = child.get_mut("annotations").and_then(Value::as_object_mut) else { continue };
        for text in annotations.values_mut() {
            let named = text.as_str().and_then(|text| text.parse::<Digest>().ok());
            if let Some(now) = named.and_then(|digest| renamed.get(&digest)) {
                *text = now.digest.as_str().into();
                changed = true;
            }
        }
    }
    if !changed {
        return Ok(None);
    }
    let media_type = if raw.media_type == DOCKER_LIST { OCI_INDEX } else { raw.media_type.as_str() };
    serialize(value, media_type).map(Some)
}

fn serialize(mut value: Value, media_type: &str) -> Result<RawManifest> {
    object("the manifest", &mut value)?.insert("mediaType".into(), media_type.into());
    let bytes = super::to_json("the manifest", &value)?;
    Ok(RawManifest { digest: Digest::of(&bytes), media_type: media_type.to_owned(), bytes: bytes.into() })
}
