//! The registry's settings, `registry.toml`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::Deserialize;

use crate::access;
use crate::gc::{GcConfig, RetentionConfig};
use crate::scrub::ScrubConfig;
use crate::storage::StorageConfig;

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
    /// Another registry, which this one caches.
    #[serde(default)]
    pub upstream: Option<Upstream>,
    /// Where content is kept; by default in `data_dir`.
    #[serde(default)]
    pub storage: StorageConfig,
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

/// The registry behind a cache.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// Its address, such as `http://10.1.0.10:5000`.
    pub url: String,
    /// A file with a line `user:password` for it.
    #[serde(default)]
    pub credentials_file: Option<PathBuf>,
}

impl Config {
    /// The defaults, with this folder.
    pub fn new(data_dir: impl Into<PathBuf>) -> Config {
        Config {
            data_dir: data_dir.into(),
            listen: default_listen(),
            credentials_file: None,
            access: access::Config::default(),
            upstream: None,
            storage: StorageConfig::Local,
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
