//! The role's configuration.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyplace_global_core::JobLimits;
use anyplace_model::INSTANCE_NET6;
use anyplace_store::EtcdConfig;
use ipnet::IpNet;
use serde::Deserialize;

/// Shorter leases would be lost by a busy machine's ordinary pauses.
const MIN_LEASE_MS: u64 = 200;

/// `global-scheduler.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the store and `admin.token` are.
    pub data_dir: PathBuf,
    /// Keeps the store in etcd rather than in `data_dir`. Then several global schedulers may run over it; one leads.
    #[serde(default)]
    pub etcd: Option<EtcdConfig>,
    /// How clients reach the API, told by the others when this one leads.
    #[serde(default)]
    pub advertise: Option<String>,
    /// Address of the API.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Where deployments get their virtual IPs from: one of each family that is here. IPv4 has to be.
    pub vip_pools: Vec<IpNet>,
    /// A location that hasn't reported for so long is lost.
    #[serde(default = "default_lease")]
    pub location_lease_ms: u64,
    /// What jobs leave to deployments.
    #[serde(default)]
    pub jobs: JobsConfig,
}

/// `[jobs]`.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobsConfig {
    /// Percent of each location's CPU, memory and whole GPUs that jobs leave free for deployments: 0 to 90.
    #[serde(default = "default_headroom")]
    pub headroom_percent: u8,
    /// A location is off-peak at any hour for a job with which less than so many percent of its CPU and memory are
    /// reserved: 1 to 100. Without it, only windows count.
    #[serde(default)]
    pub off_peak_below_percent: Option<u8>,
}

impl Default for JobsConfig {
    fn default() -> Self {
        Self { headroom_percent: default_headroom(), off_peak_below_percent: None }
    }
}

/// Room for the first seconds of a spike, until off-peak jobs have made way.
const fn default_headroom() -> u8 {
    10
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7600))
}

const fn default_lease() -> u64 {
    3_000
}

impl JobsConfig {
    pub(crate) fn limits(self) -> JobLimits {
        JobLimits {
            headroom_percent: self.headroom_percent,
            off_peak_below_percent: self.off_peak_below_percent.unwrap_or(0),
        }
    }

    fn validate(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.headroom_percent <= 90,
            "jobs.headroom_percent is {}; write 0 to 90",
            self.headroom_percent
        );
        if let Some(percent) = self.off_peak_below_percent {
            anyhow::ensure!(
                (1..=100).contains(&percent),
                "jobs.off_peak_below_percent is {percent}; write 1 to 100, or leave it out so that only windows count"
            );
        }
        Ok(())
    }
}

impl Config {
    pub(crate) const fn lease(&self) -> Duration {
        Duration::from_millis(self.location_lease_ms)
    }

    pub(crate) fn store_path(&self) -> PathBuf {
        self.data_dir.join("store.redb")
    }

    pub(crate) fn advertised(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| format!("http://{}", self.listen))
    }

    pub(crate) fn validate(&self) -> anyhow::Result<()> {
        self.validate_pools()?;
        self.jobs.validate()?;
        anyhow::ensure!(
            self.location_lease_ms >= MIN_LEASE_MS,
            "location_lease_ms is {}; write {MIN_LEASE_MS} or more",
            self.location_lease_ms
        );
        Ok(())
    }

    fn validate_pools(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.vip_pools.iter().any(|pool| pool.addr().is_ipv4()),
            "vip_pools has no IPv4 prefix; write one such as \"203.0.113.0/24\""
        );
        for (position, pool) in self.vip_pools.iter().enumerate() {
            let overlaps = |other: &&IpNet| other.contains(&pool.trunc()) || pool.contains(&other.trunc());
            if let Some(other) = self.vip_pools.iter().take(position).find(overlaps) {
                anyhow::bail!("vip_pools: {pool} overlaps {other}; leave one of them out");
            }
            if let IpNet::V6(pool) = pool
                && (pool.contains(&INSTANCE_NET6) || INSTANCE_NET6.contains(pool))
            {
                anyhow::bail!(
                    "vip_pools: {pool} overlaps {INSTANCE_NET6}, which instances have; write another"
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(pools: &str) -> Option<String> {
        let pools: Vec<&str> = pools.split_whitespace().collect();
        let config = serde_json::json!({ "data_dir": "/var/lib/anyplace/global", "vip_pools": pools });
        let config: Config = serde_json::from_value(config).unwrap();
        config.validate().err().map(|problem| problem.to_string())
    }

    #[test]
    fn bounds_of_jobs_are_percents() {
        let problem = |jobs: serde_json::Value| {
            let config = serde_json::json!({
                "data_dir": "/var/lib/anyplace/global", "vip_pools": ["203.0.113.0/24"], "jobs": jobs
            });
            let config: Config = serde_json::from_value(config).unwrap();
            config.validate().err().map(|problem| problem.to_string())
        };
        assert_eq!(problem(serde_json::json!({})), None);
        assert_eq!(problem(serde_json::json!({"headroom_percent": 0, "off_peak_below_percent": 100})), None);
        let found = problem(serde_json::json!({"headroom_percent": 91})).unwrap();
        assert_eq!(found, "jobs.headroom_percent is 91; write 0 to 90");
        let found = problem(serde_json::json!({"off_peak_below_percent": 0})).unwrap();
        assert!(found.starts_with("jobs.off_peak_below_percent is 0; write 1 to 100"), "{found}");
    }

    #[test]
    fn pools_of_both_families_may_not_overlap() {
        assert_eq!(problem("203.0.113.0/24 198.51.100.0/24 2001:db8::/64 2001:db8:0:1::/64"), None);
        for (pools, words) in [
            ("", "vip_pools has no IPv4 prefix"),
            ("2001:db8::/64", "vip_pools has no IPv4 prefix"),
            ("203.0.113.0/24 203.0.113.128/25", "vip_pools: 203.0.113.128/25 overlaps 203.0.113.0/24"),
            ("203.0.113.9/24 203.0.0.0/16", "vip_pools: 203.0.0.0/16 overlaps 203.0.113.9/24"),
            ("203.0.113.0/24 2001:db8::/64 2001:db8::/32", "2001:db8::/32 overlaps 2001:db8::/64"),
            ("203.0.113.0/24 fd5b:27d6:914c::/48", "overlaps fd5b:27d6:914c::/96"),
        ] {
            let found = problem(pools).unwrap_or_default();
            assert!(found.contains(words), "{pools}: {found}");
        }
    }
}
