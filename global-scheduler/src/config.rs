//! The role's configuration.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ipnet::Ipv4Net;
use serde::Deserialize;

/// Shorter leases would be lost by a busy machine's ordinary pauses.
const MIN_LEASE_MS: u64 = 200;

/// `global-scheduler.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the store and `admin.token` are.
    pub data_dir: PathBuf,
    /// Address of the API.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Where deployments get their virtual IPs from.
    pub vip_pools: Vec<Ipv4Net>,
    /// A location that hasn't reported for so long is lost.
    #[serde(default = "default_lease")]
    pub location_lease_ms: u64,
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7600))
}

const fn default_lease() -> u64 {
    3_000
}

impl Config {
    pub(crate) const fn lease(&self) -> Duration {
        Duration::from_millis(self.location_lease_ms)
    }

    pub(crate) fn validate(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            !self.vip_pools.is_empty(),
            "vip_pools is empty; write one such as \"203.0.113.0/24\""
        );
        anyhow::ensure!(
            self.location_lease_ms >= MIN_LEASE_MS,
            "location_lease_ms is {}; write {MIN_LEASE_MS} or more",
            self.location_lease_ms
        );
        Ok(())
    }
}
