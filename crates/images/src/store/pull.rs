//! Pulling: resolve the name, choose the platform, fetch and unpack the layers that are missing, record the image.
//!
//! A layer is decompressed and unpacked while it arrives, into a folder in `tmp`; it gets its name only after the
//! digest of the blob and the digest of the archive inside were both right.

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};

use super::stream::{ChannelReader, HashingReader, Message, channel};
use super::unpack::unpack;
use super::{PulledImage, Store, StoredImage, sync_parent};
use crate::client::{Client, RawManifest};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::manifest::{self, Descriptor, ImageConfig, Index, MANIFEST_MAX_BYTES, Manifest, Platform};
use crate::progress::{Item, SharedProgress, Stage};
use crate::reference::Reference;

/// Layers that are fetched at once, each with a thread that unpacks it.
const PARALLEL: usize = 3;
/// Deepest nesting of indexes that is followed.
const INDEX_DEPTH_MAX: usize = 3;
/// Buffer between the download and the decompressor.
const BUFFER_BYTES: usize = 128 << 10;

impl Store {
    /// Makes sure that the image is here, and gives its layers.
    ///
    /// A name with a tag is resolved at the registry each time; when the registry can't be reached, what the name
    /// meant last is used if it is here. A name with a digest that is here needs no registry.
    pub async fn pull(
        &self,
        reference: &Reference,
        client: &Client,
        progress: &SharedProgress,
    ) -> Result<PulledImage> {
        if reference.digest.is_some()
            && let Some(image) = self.find(reference)?
        {
            return Ok(image);
        }
        match self.fetch(reference, client, progress).await {
            Err(error) if error.is_unreachable() => match self.find(reference)? {
                Some(image) => {
                    tracing::warn!(%reference, %error, digest = %image.digest, "using the image that is here");
                    Ok(image)
                }
                None => Err(error),
            },
            other => other,
        }
    }

    async fn fetch(
        &self,
        reference: &Reference,
        client: &Client,
        progress: &SharedProgress,
    ) -> Result<PulledImage> {
        let top = client.get_manifest(reference).await?;
        let digest = top.digest.clone();
        let raw = choose_platform(reference, top, client).await?;
        let manifest: Manifest = manifest::parse(&format!("the manifest of `{reference}`"), &raw.bytes)?;
        let config_digest = &manifest.config.digest;
        let config_bytes = match self.read_blob(config_digest)? {
            Some(bytes) => bytes,
            None => {
                let blob = client.get_blob(reference, config_digest, Some(manifest.config.size)).await?;
                blob.read(MANIFEST_MAX_BYTES).await?
            }
        };
        let config: ImageConfig =
            manifest::parse(&format!("the configuration of `{reference}`"), &config_bytes)?;
        let diff_ids = &config.rootfs.diff_ids;
        if diff_ids.len() != manifest.layers.len() {
            return Err(Error::InvalidManifest {
                what: format!("the configuration of `{reference}`"),
                reason: format!("{} diff_ids for {} layers", diff_ids.len(), manifest.layers.len()),
            });
        }
        // A list, because the compiler can't see that a future made inside a stream's closure may change threads.
        let mut fetches = Vec::with_capacity(diff_ids.len());
        for (layer, diff_id) in manifest.layers.iter().zip(diff_ids) {
            fetches.push(self.ensure_layer(reference, layer, diff_id, client, progress));
        }
        stream::iter(fetches).buffer_unordered(PARALLEL).try_collect::<()>().await?;
        let layers = diff_ids.iter().map(|id| self.layer_path(id)).collect();
        let record = StoredImage {
            reference: reference.canonical(),
            digest: digest.clone(),
            manifest: raw.digest.clone(),
        };
        let record = serde_json::to_vec(&record).map_err(|e| Error::InvalidManifest {
            what: "the store's record of an image".to_owned(),
            reason: e.to_string(),
        })?;
        let files = [
            (self.blob_path(config_digest), config_bytes),
            (self.blob_path(&raw.digest), raw.bytes.to_vec()),
            (self.image_path(reference), record),
        ];
        let store = self.clone();
        let writing = tokio::task::spawn_blocking(move || {
            for (path, bytes) in files {
                if std::fs::read(&path).ok().as_ref() != Some(&bytes) {
                    store.write_file(&path, &bytes)?;
                }
            }
            Ok(())
        });
        writing.await.map_err(|_| Error::Cancelled)??;
        Ok(PulledImage { digest, config, layers })
    }

    /// Fetches a layer unless it is here; others that want the same one wait for it.
    async fn ensure_layer(
        &self,
        reference: &Reference,
        layer: &Descriptor,
        diff_id: &Digest,
        client: &Client,
        progress: &SharedProgress,
    ) -> Result<()> {
        check_layer_type(&layer.media_type)?;
        let item = Item { stage: Stage::Fetch, name: layer.digest.short().to_owned() };
        let lock = self.layer_lock(diff_id);
        let guard = lock.lock_owned().await;
        let path = self.layer_path(diff_id);
        if path.is_dir() {
            progress.skipped(&item, layer.size);
            return Ok(());
        }
        let mut blob = client.get_blob(reference, &layer.digest, Some(layer.size)).await?;
        progress.started(&item, layer.size);
        let (sender, reader) = channel();
        let (tmp, diff_id) = (self.inner.dir.join("tmp"), diff_id.clone());
        // The lock goes along: when this pull is given up, the next one waits until the unpacker has noticed.
        let unpacking = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            unpack_layer(reader, &tmp, &path, &diff_id)
        });
        let downloaded = async {
            while let Some(chunk) = blob.chunk().await? {
                let len = chunk.len() as u64;
                if sender.send(Message::Data(chunk)).await.is_err() {
                    // The unpacker gave up: its error says why.
                    return Ok(());
                }
                progress.advanced(&item, len);
            }
            let _ = sender.send(Message::Complete).await;
            Ok(())
        }
        .await;
        drop(sender);
        let unpacked = unpacking.await.map_err(|_| Error::Cancelled)?;
        // A failed download makes the unpacker fail too; the download's error is the cause.
        downloaded.and(unpacked)?;
        progress.finished(&item);
        Ok(())
    }
}

async fn choose_platform(reference: &Reference, top: RawManifest, client: &Client) -> Result<RawManifest> {
    let mut current = top;
    for _ in 0..INDEX_DEPTH_MAX {
        if !manifest::is_index(&current.media_type) {
            return Ok(current);
        }
        let index: Index = manifest::parse(&format!("the index of `{reference}`"), &current.bytes)?;
        let wanted = Platform::host();
        let fits = |d: &&Descriptor| match &d.platform {
            Some(platform) => *platform == wanted,
            // An index with one image often leaves its platform out.
            None => index.manifests.len() == 1,
        };
        let Some(chosen) = index.manifests.iter().find(fits) else {
            let found: Vec<String> =
                index.manifests.iter().filter_map(|d| d.platform.as_ref()).map(Platform::to_string).collect();
            return Err(Error::NoPlatform {
                reference: reference.to_string(),
                wanted: wanted.to_string(),
                found: found.join(", "),
            });
        };
        current = client.get_manifest(&reference.at(&chosen.digest)).await?;
    }
    Err(Error::Unsupported {
        what: format!("`{reference}`, indexes inside indexes,"),
        help: "push it with one index".to_owned(),
    })
}

fn check_layer_type(media_type: &str) -> Result<()> {
    if [".tar", ".tar.gzip", ".tar+gzip", ".tar.zstd", ".tar+zstd"]
        .iter()
        .any(|end| media_type.ends_with(end))
    {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("a layer of type `{media_type}`"),
        help: "expected a tar archive: plain, gzip or zstd".to_owned(),
    })
}

/// Blocking: unpacks what `reader` gives into `tmp`, and moves it to `path` if it is what `diff_id` says.
fn unpack_layer(reader: ChannelReader, tmp: &Path, path: &Path, diff_id: &Digest) -> Result<()> {
    let dir = tempfile::Builder::new()
        .prefix("layer-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir_in(tmp)
        .map_err(Error::io("creating a folder in", tmp))?;
    let mut archive = HashingReader { inner: decompressor(reader)?, hasher: Hasher::sha256() };
    unpack(&mut archive, dir.path())?;
    // What follows the archive's end (padding) counts for the digests too.
    let mut rest = vec![0; BUFFER_BYTES];
    loop {
        match archive.read(&mut rest) {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) => return Err(Error::io("unpacking a layer into", dir.path())(e)),
        }
    }
    let found = archive.hasher.finish();
    if found != *diff_id {
        let what = "the archive inside a layer".to_owned();
        return Err(Error::DigestMismatch { what, expected: diff_id.clone(), found });
    }
    // One sync of the file system in place of one for each of many thousand files.
    let opened = std::fs::File::open(dir.path()).map_err(Error::io("syncing", dir.path()))?;
    nix::unistd::syncfs(&opened).map_err(|e| Error::io("syncing", dir.path())(e.into()))?;
    std::fs::rename(dir.path(), path).map_err(Error::io("moving a layer to", path))?;
    // The folder has another name now: nothing is left to remove.
    let _ = dir.keep();
    sync_parent(path)
}

/// Tells the compression by the first bytes, since media types are not always right about it.
fn decompressor(reader: ChannelReader) -> Result<Box<dyn Read>> {
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, reader);
    let failed = |e: io::Error| Error::io("unpacking", "a layer")(e);
    let start = reader.fill_buf().map_err(failed)?;
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
        // A frame, or one of the sixteen skippable frames.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            Box::new(zstd::Decoder::with_buffer(reader).map_err(failed)?)
        }
        _ => Box::new(reader),
    })
}
