//! The router's configuration file.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use anyplace_ebpf::Capacity;
use anyplace_model::MachineId;
use ipnet::Ipv4Net;
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
    /// Where `GET /metrics` answers.
    #[serde(default = "listen")]
    pub listen: SocketAddr,
    /// Ports of virtual IPs that fit. Sizes the kernel's maps when they are made (about 0.8 KiB each, at least 12 MiB); a
    /// change takes effect once the pinned maps are gone, after a reboot for instance.
    #[serde(default = "max_vip_ports")]
    pub max_vip_ports: u32,
    /// Where the machines of all locations are. Encapsulated packets from elsewhere are dropped and counted; empty: taken
    /// from anywhere.
    #[serde(default)]
    pub fleet: Vec<Ipv4Net>,
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

fn listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7630))
}

fn max_vip_ports() -> u32 {
    Capacity::default().vips
}

fn pin_dir() -> PathBuf {
    "/sys/fs/bpf/anyplace".into()
}
