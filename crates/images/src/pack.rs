//! From a source on disk to manifests and blobs that are ready to send.
//!
//! A directory becomes one zstd layer with reproducible bytes. An OCI layout or archive is passed through as it is:
//! its blobs are sent straight from the files they lie in.

mod directory;
mod layout;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::client::{RawManifest, RemoteBlob};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{
    ContainerConfig, Descriptor, ImageConfig, Manifest, OCI_CONFIG, OCI_LAYER_ZSTD, OCI_MANIFEST, Platform,
    RootFs,
};
use crate::progress::SharedProgress;
use layout::Layout;

/// Where an image comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A root filesystem, and how to run it.
    Directory {
        /// The root filesystem's folder.
        root: PathBuf,
        /// How to run it.
        spec: ImageSpec,
    },
    /// An OCI layout folder, or an OCI archive (the same as a tar file).
    Layout {
        /// The folder or file.
        path: PathBuf,
        /// Which image of it, by its `org.opencontainers.image.ref.name`; needed where there are several.
        name: Option<String>,
    },
}

impl Source {
    /// Tells the sources apart: a file is an OCI archive, a folder with an `oci-layout` file is an OCI layout, any
    /// other folder is a root filesystem, run as `spec` says.
    pub fn detect(path: &Path, spec: ImageSpec) -> Result<Source> {
        let metadata = std::fs::metadata(path).map_err(Error::io("reading", path))?;
        if metadata.is_file() || path.join("oci-layout").is_file() {
            return Ok(Source::Layout { path: path.to_owned(), name: None });
        }
        Ok(Source::Directory { root: path.to_owned(), spec })
    }
}

/// How an image that is packed from a directory runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageSpec {
    /// Command that always runs.
    pub entrypoint: Vec<String>,
    /// Default arguments.
    pub cmd: Vec<String>,
    /// Environment, `NAME=value` each.
    pub env: Vec<String>,
    /// Folder that it starts in.
    pub workdir: Option<String>,
    /// User, or `user:group`.
    pub user: Option<String>,
    /// Ports that it listens on: `80`, `80/tcp` or `53/udp`.
    pub ports: Vec<String>,
    /// Free text by key.
    pub labels: BTreeMap<String, String>,
}

/// Where a blob's bytes lie on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobFile {
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// The file that holds it.
    pub path: PathBuf,
    /// Where in that file it starts.
    pub offset: u64,
}

/// An image that is ready to send. Its temporary files go when it is dropped.
#[derive(Debug)]
pub struct PackedImage {
    /// Manifests in the order to send them: children before the index that lists them, the image itself last.
    pub manifests: Vec<RawManifest>,
    /// Layers and configurations that lie on disk.
    pub blobs: Vec<BlobFile>,
    /// Those that stay in another registry until they are sent.
    pub remote: Vec<RemoteBlob>,
    /// Bytes of files that were read to make it.
    pub bytes_read: u64,
    /// Bytes of all blobs.
    pub bytes_packed: u64,
    /// Time that packing took.
    pub elapsed: Duration,
    _work: Option<tempfile::TempDir>,
}

impl PackedImage {
    /// Digest of the image: of its manifest or index.
    pub fn digest(&self) -> Option<&Digest> {
        self.manifests.last().map(|manifest| &manifest.digest)
    }
}

/// Makes an image from a source. Temporary files go into a new folder below `work`.
pub async fn pack(source: &Source, work: &Path, progress: &SharedProgress) -> Result<PackedImage> {
    let (source, work, progress) = (source.clone(), work.to_owned(), progress.clone());
    let packing = tokio::task::spawn_blocking(move || match source {
        Source::Directory { root, spec } => pack_directory(&root, &spec, &work, &progress),
        Source::Layout { path, name } => pack_layout(&path, name.as_deref()),
    });
    packing.await.map_err(|_| Error::Cancelled)?
}

fn pack_directory(
    root: &Path,
    spec: &ImageSpec,
    work: &Path,
    progress: &SharedProgress,
) -> Result<PackedImage> {
    let begun = Instant::now();
    let container = spec.container()?;
    std::fs::create_dir_all(work).map_err(Error::io("creating", work))?;
    let dir =
        tempfile::Builder::new().prefix("pack-").tempdir_in(work).map_err(Error::io("creating", work))?;
    let layer_path = dir.path().join("layer.tar.zst");
    let layer = directory::write_layer(root, &layer_path, progress)?;
    let platform = Platform::host();
    let config = ImageConfig {
        architecture: platform.architecture,
        os: platform.os,
        config: Some(container),
        rootfs: RootFs { kind: "layers".to_owned(), diff_ids: vec![layer.diff_id] },
    };
    let config = to_json("the configuration", &config)?;
    let config_path = dir.path().join("config.json");
    std::fs::write(&config_path, &config).map_err(Error::io("writing", &config_path))?;
    let describe = |media_type: &str, digest: &Digest, size: u64| Descriptor {
        media_type: media_type.to_owned(),
        digest: digest.clone(),
        size,
        platform: None,
        annotations: None,
    };
    let (config_digest, config_size) = (Digest::of(&config), config.len() as u64);
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(OCI_MANIFEST.to_owned()),
        config: describe(OCI_CONFIG, &config_digest, config_size),
        layers: vec![describe(OCI_LAYER_ZSTD, &layer.digest, layer.size)],
    };
    let bytes = to_json("the manifest", &manifest)?;
    let manifest =
        RawManifest { digest: Digest::of(&bytes), media_type: OCI_MANIFEST.to_owned(), bytes: bytes.into() };
    Ok(PackedImage {
        manifests: vec![manifest],
        blobs: vec![
            BlobFile { digest: layer.digest, size: layer.size, path: layer_path, offset: 0 },
            BlobFile { digest: config_digest, size: config_size, path: config_path, offset: 0 },
        ],
        remote: Vec::new(),
        bytes_read: layer.bytes_read,
        bytes_packed: layer.size + config_size,
        elapsed: begun.elapsed(),
        _work: Some(dir),
    })
}

fn pack_layout(path: &Path, name: Option<&str>) -> Result<PackedImage> {
    let begun = Instant::now();
    let (manifests, blobs) = Layout::open(path)?.collect(name)?;
    let bytes = blobs.iter().map(|blob| blob.size).sum();
    Ok(PackedImage {
        manifests,
        blobs,
        remote: Vec::new(),
        bytes_read: bytes,
        bytes_packed: bytes,
        elapsed: begun.elapsed(),
        _work: None,
    })
}

fn to_json(what: &str, value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|e| Error::InvalidManifest { what: what.to_owned(), reason: e.to_string() })
}

impl ImageSpec {
    fn container(&self) -> Result<ContainerConfig> {
        let some = |list: &Vec<String>| (!list.is_empty()).then(|| list.clone());
        let invalid =
            |reason: String| Error::InvalidManifest { what: "the image's settings".to_owned(), reason };
        for env in &self.env {
            if env.find('=').is_none_or(|at| at == 0) {
                return Err(invalid(format!("env `{env}`: expected NAME=value")));
            }
        }
        let mut ports = BTreeMap::new();
        for port in &self.ports {
            let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
            let number: u16 = number.parse().ok().filter(|n| *n > 0).ok_or_else(|| {
                invalid(format!("port `{port}`: expected a number from 1 to 65535, such as 80 or 53/udp"))
            })?;
            if !matches!(protocol, "tcp" | "udp") {
                return Err(invalid(format!("port `{port}`: expected the protocol tcp or udp")));
            }
            ports.insert(format!("{number}/{protocol}"), serde_json::json!({}));
        }
        Ok(ContainerConfig {
            user: self.user.clone(),
            exposed_ports: (!ports.is_empty()).then_some(ports),
            env: some(&self.env),
            entrypoint: some(&self.entrypoint),
            cmd: some(&self.cmd),
            working_dir: self.workdir.clone(),
            labels: (!self.labels.is_empty()).then(|| self.labels.clone()),
            stop_signal: None,
        })
    }
}

#[cfg(test)]
mod tests;
