//! The router's configuration file.

use std::{net::Ipv4Addr, path::PathBuf};

use anyplace_model::MachineId;
use serde::Deserialize;

/// `state-router.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Folder for the snapshot of the routes.
    pub data_dir: PathBuf,
    /// This machine.
    pub machine: MachineId,
    /// Base URL of the location scheduler.
    pub location_scheduler: String,
    /// File with the machine's token.
    pub token_file: PathBuf,
    /// The machine's address in the fabric.
    pub address: Ipv4Addr,
    /// The interface to the fabric.
    pub uplink: String,
    /// A folder on a bpffs, for this machine alone.
    #[serde(default = "pin_dir")]
    pub pin_dir: PathBuf,
    /// The BGP daemon; without it, something else must bring packets for VIPs to the machine.
    #[serde(default)]
    pub bgp: Option<BgpConfig>,
}

/// How to drive bird2.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BgpConfig {
    /// File that `bird.conf` includes and the router writes.
    pub include: PathBuf,
    /// Bird's control socket.
    pub control_socket: PathBuf,
}

fn pin_dir() -> PathBuf {
    "/sys/fs/bpf/anyplace".into()
}
