//! From a source to manifests and blobs that are ready to send.
//!
//! A directory becomes one layer. An image that exists already (a layout, an archive, in a daemon, in another registry,
//! or just built) keeps its configuration, and its layers are packed again. Either way the layers are zstd:chunked,
//! with the hashes of their pieces in their descriptors, and the same input gives the same bytes.

mod build;
mod daemon;
mod directory;
mod docker;
mod found;
mod layer;
mod layout;
mod mirror;
mod pipe;
mod repack;
mod save;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::client::{Client, RawManifest, RemoteBlob};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{
    ContainerConfig, Descriptor, ImageConfig, Manifest, OCI_CONFIG, OCI_LAYER_ZSTD, OCI_MANIFEST, Platform,
    RootFs,
};
use crate::progress::SharedProgress;
use crate::reference::Reference;
pub use build::{Build, BuildOptions, BuildSecret};
pub use daemon::Daemon;
use found::{Blob, Found};
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
    /// An OCI layout folder, an OCI archive (the same as a tar file), or a docker archive.
    Layout {
        /// The folder or file.
        path: PathBuf,
        /// Which image of it, by its name; needed where there are several.
        name: Option<String>,
    },
    /// An image that docker, podman or containerd hold.
    Daemon {
        /// Who holds it.
        daemon: Daemon,
        /// Its name there.
        image: String,
    },
    /// An image in another registry.
    Registry {
        /// Who reads it.
        client: Client,
        /// Its name.
        reference: Reference,
        /// Whether to take all platforms, where there are several, and not only this machine's.
        all_platforms: bool,
    },
    /// A Dockerfile.
    Build(Build),
}

impl Source {
    /// Tells the sources on disk apart: a file is an archive, a folder with an `oci-layout` file is an OCI layout, any
    /// other folder is a root filesystem, run as `spec` says.
    pub fn detect(path: &Path, spec: ImageSpec) -> Result<Source> {
        let metadata = std::fs::metadata(path).map_err(Error::io("reading", path))?;
        if metadata.is_file() || path.join("oci-layout").is_file() {
            return Ok(Source::Layout { path: path.to_owned(), name: None });
        }
        Ok(Source::Directory { root: path.to_owned(), spec })
    }

    /// Reads sources that are named by a prefix: `docker-daemon:`, `podman:` and `containerd:` with an image's name
    /// there, `registry:` with a reference or a URL and repository, and `docker://` with a reference as docker reads
    /// it. None for any other text. `client` reads from other registries; `all_platforms` is for those.
    pub fn named(text: &str, client: &Client, all_platforms: bool) -> Result<Option<Source>> {
        for daemon in [Daemon::Docker, Daemon::Podman, Daemon::Containerd] {
            if let Some(image) = text.strip_prefix(daemon.prefix()).and_then(|rest| rest.strip_prefix(':')) {
                return Ok(Some(Source::Daemon { daemon, image: image.to_owned() }));
            }
        }
        let (client, reference) = if let Some(name) = text.strip_prefix("docker://") {
            let mut reference: Reference = name.parse()?;
            reference.registry.get_or_insert_with(|| "docker.io".to_owned());
            (client.clone(), reference)
        } else if let Some(name) = text.strip_prefix("registry:") {
            match name.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.split_once('/')?))) {
                Some((scheme, (host, name))) => (client.at(&format!("{scheme}://{host}"))?, name.parse()?),
                None => (client.clone(), name.parse()?),
            }
        } else {
            return Ok(None);
        };
        Ok(Some(Source::Registry { client, reference, all_platforms }))
    }
}

/// How to pack, beyond the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackOptions {
    /// Layers of an image that exists already stay as they are, and so does its digest.
    pub keep_layers: bool,
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
    _work: tempfile::TempDir,
}

impl PackedImage {
    /// Digest of the image: of its manifest or index.
    pub fn digest(&self) -> Option<&Digest> {
        self.manifests.last().map(|manifest| &manifest.digest)
    }
}

/// Makes an image from a source. Temporary files go into a new folder below `work`.
pub async fn pack(source: &Source, work: &Path, progress: &SharedProgress) -> Result<PackedImage> {
    pack_with(source, work, progress, PackOptions::default()).await
}

/// The same as [`pack`], with options.
pub async fn pack_with(
    source: &Source,
    work: &Path,
    progress: &SharedProgress,
    options: PackOptions,
) -> Result<PackedImage> {
    let begun = Instant::now();
    std::fs::create_dir_all(work).map_err(Error::io("creating", work))?;
    let dir =
        tempfile::Builder::new().prefix("pack-").tempdir_in(work).map_err(Error::io("creating", work))?;
    let found = match source {
        Source::Directory { root, spec } => return pack_directory(root, spec, dir, progress, begun).await,
        Source::Layout { path, name } => open_layout(path, name.as_deref()).await?,
        Source::Daemon { daemon, image } => {
            open_layout(&daemon::export(*daemon, image, dir.path(), progress).await?, None).await?
        }
        Source::Registry { client, reference, all_platforms } => {
            mirror::find(client, reference, *all_platforms).await?
        }
        Source::Build(build) => open_layout(&build::build(build, dir.path(), progress).await?, None).await?,
    };
    let (manifests, all, bytes_read) = if options.keep_layers {
        let bytes = found.blobs.iter().map(Blob::size).sum();
        (found.manifests, found.blobs, bytes)
    } else {
        let repacked = repack::run(found, dir.path(), progress).await?;
        (repacked.manifests, repacked.blobs, repacked.bytes_read)
    };
    let bytes_packed = all.iter().map(Blob::size).sum();
    let (mut blobs, mut remote) = (Vec::new(), Vec::new());
    for blob in all {
        match blob {
            Blob::File(file) => blobs.push(file),
            Blob::Remote(one) => remote.push(one),
        }
    }
    let elapsed = begun.elapsed();
    Ok(PackedImage { manifests, blobs, remote, bytes_read, bytes_packed, elapsed, _work: dir })
}

async fn open_layout(path: &Path, name: Option<&str>) -> Result<Found> {
    let (path, name) = (path.to_owned(), name.map(str::to_owned));
    let open = move || Layout::open(&path)?.find(name.as_deref());
    tokio::task::spawn_blocking(open).await.map_err(|_| Error::Cancelled)?
}

async fn pack_directory(
    root: &Path,
    spec: &ImageSpec,
    dir: tempfile::TempDir,
    progress: &SharedProgress,
    begun: Instant,
) -> Result<PackedImage> {
    let container = spec.container()?;
    let guard = layer::Guard::default();
    let (from, to) = (root.to_owned(), dir.path().join("layer-0"));
    let (progress, watch) = (progress.clone(), guard.watch());
    let packing = move || directory::write_layer(&from, &to, &progress, &watch);
    let (layer, bytes_read) = tokio::task::spawn_blocking(packing).await.map_err(|_| Error::Cancelled)??;
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
    let described = Descriptor {
        annotations: Some(layer.annotations),
        ..describe(OCI_LAYER_ZSTD, &layer.digest, layer.size)
    };
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(OCI_MANIFEST.to_owned()),
        config: describe(OCI_CONFIG, &config_digest, config_size),
        layers: vec![described],
    };
    let bytes = to_json("the manifest", &manifest)?;
    let manifest =
        RawManifest { digest: Digest::of(&bytes), media_type: OCI_MANIFEST.to_owned(), bytes: bytes.into() };
    Ok(PackedImage {
        manifests: vec![manifest],
        blobs: vec![
            BlobFile { digest: layer.digest, size: layer.size, path: layer.path, offset: layer.offset },
            BlobFile { digest: config_digest, size: config_size, path: config_path, offset: 0 },
        ],
        remote: Vec::new(),
        bytes_read,
        bytes_packed: layer.size + config_size,
        elapsed: begun.elapsed(),
        _work: dir,
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
