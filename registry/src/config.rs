//! The registry's settings, `registry.toml`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyplace_model::Bytes;
use anyplace_service::ScrubConfig;
use serde::Deserialize;

use crate::access;
use crate::gc::{GcConfig, RetentionConfig};
use crate::storage::StorageConfig;
use crate::uploads;

/// Settings of a registry.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Folder for blobs, manifests and uploads in progress.
    pub data_dir: PathBuf,
    /// Address to listen on.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Lines of `user:password`; made at the first start. By default `credentials` in the data folder.
    #[serde(default)]
    pub credentials_file: Option<PathBuf>,
    /// Anonymous pulls, and tokens.
    #[serde(default)]
    pub access: access::Config,
    /// Other registries, which this one caches, in the order of asking.
    #[serde(default)]
    pub upstreams: Vec<Upstream>,
    /// What is kept of them.
    #[serde(default)]
    pub cache: CacheConfig,
    /// Where content is kept; by default in `data_dir`.
    #[serde(default)]
    pub storage: StorageConfig,
    /// What comes in parts.
    #[serde(default)]
    pub uploads: UploadsConfig,
    /// How long transfers may go on after a shutdown began, in seconds.
    #[serde(default = "default_drain_s")]
    pub drain_s: u64,
    /// Collection of what nothing needs.
    #[serde(default)]
    pub gc: GcConfig,
    /// What is let go although it could be pulled.
    #[serde(default)]
    pub retention: RetentionConfig,
    /// Re-hashing of what is stored.
    #[serde(default)]
    pub scrub: ScrubConfig,
}

/// A registry behind a cache.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// Its address, such as `http://10.1.0.10:5000`. A path in it is put before each repository's name.
    pub url: String,
    /// A file with a line `user:password` for it.
    #[serde(default)]
    pub credentials_file: Option<PathBuf>,
    /// It is asked only for repositories below this name, such as `docker.io`, which is left out when it is asked.
    /// Clients say it in the repository's name or, as mirrors are asked, in `?ns=` or `OCI-Namespace`.
    #[serde(default)]
    pub namespace: Option<String>,
}

/// What a cache keeps.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Bytes on disk. By default half of the file system of the data folder.
    pub disk_budget: Option<Bytes>,
    /// Bytes in memory, those on their way to clients included.
    pub memory_budget: Bytes,
    /// Size of the pieces of blobs whose manifest has no list of pieces: 1 to 8 MiB.
    pub piece_bytes: Bytes,
    /// How long an upstream's answer about a tag counts, in milliseconds.
    pub tag_ttl_ms: u64,
}

impl Default for CacheConfig {
    fn default() -> CacheConfig {
        CacheConfig {
            disk_budget: None,
            memory_budget: Bytes(256 << 20),
            piece_bytes: Bytes(4 << 20),
            tag_ttl_ms: 1_000,
        }
    }
}

/// What comes in parts, `[uploads]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UploadsConfig {
    /// The longest part of a chunked upload, as proxies before the registry let through; at most 500 MB.
    pub chunk_max: Bytes,
}

impl Default for UploadsConfig {
    fn default() -> UploadsConfig {
        UploadsConfig { chunk_max: Bytes(uploads::CHUNK_MAX_BYTES) }
    }
}

impl Config {
    /// The defaults, with this folder.
    pub fn new(data_dir: impl Into<PathBuf>) -> Config {
        Config {
            data_dir: data_dir.into(),
            listen: default_listen(),
            credentials_file: None,
            access: access::Config::default(),
            upstreams: Vec::new(),
            cache: CacheConfig::default(),
            storage: StorageConfig::Local,
            uploads: UploadsConfig::default(),
            drain_s: default_drain_s(),
            gc: GcConfig::default(),
            retention: RetentionConfig::default(),
            scrub: ScrubConfig::default(),
        }
    }

    /// The file with the users and passwords.
    pub fn credentials_path(&self) -> PathBuf {
        self.credentials_file.clone().unwrap_or_else(|| self.data_dir.join("credentials"))
    }
}

fn default_listen() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 5000).into()
}

fn default_drain_s() -> u64 {
    30
}
