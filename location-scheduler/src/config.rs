//! The role's configuration file.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::ensure;
use anyplace_location_core::{MovePolicy, Site, Timing};
use anyplace_model::{LocationId, OffPeakWindow};
use anyplace_store::EtcdConfig;
use serde::Deserialize;

/// `location-scheduler.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Folder for the store and the machine token.
    pub data_dir: PathBuf,
    /// Keeps the store in etcd rather than in `data_dir`.
    #[serde(default)]
    pub etcd: Option<EtcdConfig>,
    /// Where the API listens.
    #[serde(default = "listen")]
    pub listen: SocketAddr,
    /// Base URL by which the global scheduler reaches the API.
    pub advertise: String,
    /// The location's name.
    pub location: LocationId,
    /// Region, such as `eu`.
    pub region: String,
    /// Country (ISO 3166-1 alpha-2).
    pub country: String,
    /// Labels for placement constraints.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Degrees north.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
    /// IANA time zone of the off-peak window.
    pub timezone: String,
    /// Daily window for off-peak jobs, in local time.
    #[serde(default)]
    pub off_peak: Option<OffPeakWindow>,
    /// Base URL of the global scheduler.
    pub global: String,
    /// File with the location's token.
    pub token_file: PathBuf,
    /// How long a machine may be silent, in milliseconds.
    #[serde(default = "machine_lease_ms")]
    pub machine_lease_ms: u64,
    /// How long an instance that is to end keeps its connections, in milliseconds.
    #[serde(default = "drain_ms")]
    pub drain_ms: u64,
    /// How long the copy of an instance that moves may take to get ready, in milliseconds; then the move is given up, and
    /// tried again after the same time.
    #[serde(default = "move_ready_ms")]
    pub move_ready_ms: u64,
    /// How long after the last ones instances may be moved for their own sake, so that GPU memory is free in larger pieces,
    /// in milliseconds; 0 for never.
    #[serde(default = "tidy_pause_ms")]
    pub tidy_pause_ms: u64,
}

fn listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7610))
}

const fn machine_lease_ms() -> u64 {
    600
}

const fn drain_ms() -> u64 {
    5_000
}

const fn tidy_pause_ms() -> u64 {
    600_000
}

const fn move_ready_ms() -> u64 {
    600_000
}

impl Config {
    pub(crate) fn store_path(&self) -> PathBuf {
        self.data_dir.join("store.redb")
    }

    /// Refuses impossible values.
    pub(crate) fn validate(&self) -> anyhow::Result<()> {
        ensure!(
            (-90.0..=90.0).contains(&self.latitude) && (-180.0..=180.0).contains(&self.longitude),
            "latitude {} and longitude {} are no place; write degrees north (-90 to 90) and east (-180 to 180)",
            self.latitude,
            self.longitude
        );
        ensure!(
            jiff::tz::TimeZone::get(&self.timezone).is_ok(),
            "timezone `{}` is unknown; write an IANA name such as Europe/Amsterdam (Debian: package tzdata)",
            self.timezone
        );
        ensure!(
            (100..=60_000).contains(&self.machine_lease_ms),
            "machine_lease_ms {} is not between 100 and 60000; leave it out for 600",
            self.machine_lease_ms
        );
        ensure!(
            self.drain_ms <= 3_600_000,
            "drain_ms {} is over an hour; leave it out for 5000",
            self.drain_ms
        );
        ensure!(
            (1..=86_400_000).contains(&self.move_ready_ms),
            "move_ready_ms {} is not between 1 and 86400000 (a day); leave it out for 600000",
            self.move_ready_ms
        );
        Ok(())
    }

    pub(crate) const fn lease(&self) -> Duration {
        Duration::from_millis(self.machine_lease_ms)
    }

    pub(crate) const fn timing(&self) -> Timing {
        Timing { drain_ms: self.drain_ms }
    }

    pub(crate) const fn moves(&self) -> MovePolicy {
        let tidy_pause_ms = if self.tidy_pause_ms == 0 { None } else { Some(self.tidy_pause_ms) };
        MovePolicy { ready_ms: self.move_ready_ms, tidy_pause_ms }
    }

    pub(crate) fn site(&self) -> Site {
        Site {
            location: self.location.clone(),
            region: self.region.clone(),
            country: self.country.clone(),
            labels: self.labels.clone(),
            latitude: self.latitude,
            longitude: self.longitude,
            timezone: self.timezone.clone(),
            off_peak: self.off_peak,
        }
    }
}
